"""Checks of a public call: shapes, dtypes, devices and attributes always; values where reading them costs nothing.

Values of segment ids, lengths and positions are looked at on the host alone. A tensor on a device is looked at only
with `check_values=True`: no hidden synchronisation. A tensor that a transformation traces cannot be looked at.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from rattention.spec import UNREAD, Call, SpecError, Unsupported, validate
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.nn import Parameter

EXTRA_DTYPES = ("float64",)
"""Storage dtypes of the public functions beyond the specification's: for gradient checks."""

PRECISIONS = (None, "float32", "tf32")

INTEGERS = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8, torch.bool)
"""Dtypes of tensors whose values are looked at; validation refuses all but the first by name."""

LONGEST = 2**31 - 1
"""No sequence is longer, since lengths and positions are int32. A window beyond it is as good as it."""


def check(
    operation: str,
    tensors: Mapping[str, Any],
    attributes: Mapping[str, Any],
    check_values: bool,
) -> Call:
    """Validate one call.

    Raises:
        SpecError: naming the argument, what was expected and what came.
        Unsupported: a DTensor; a rotary table that asks for a gradient; or `check_values` for a tensor whose values
            cannot be read.
    """
    given = {name: t for name, t in tensors.items() if isinstance(t, Tensor)}
    for name, t in given.items():
        refuse_exotic(operation, name, t)
    integers = {name: t for name, t in given.items() if t.dtype in INTEGERS}
    read = {name for name, t in integers.items() if on_host(t) or (check_values and has_values(t))}
    call = validate(
        operation,
        tensors,
        {name: number(value) for name, value in attributes.items()},
        host={name: values(t) if name in read else UNREAD for name, t in integers.items()},
        extra_dtypes=EXTRA_DTYPES,
        array=("a torch.Tensor", Tensor),
        devices={name: str(t.device) for name, t in given.items()},
    )
    if check_values and call.unread:
        raise Unsupported(f"check_values=True needs the values of {call.unread[0]}, which is traced or has none")
    refuse_gradients_of_constants(call, given)
    if call.attributes.get("window") is not None:
        call.attributes["window"] = min(call.attributes["window"], LONGEST)
    return call


def refuse_gradients_of_constants(call: Call, given: Mapping[str, Tensor]) -> None:
    """Refuse a rotary table that asks for a gradient: it is a constant of the call, and no gradient would come."""
    for spec in call.operation.tensors:
        t = given.get(spec.name)
        if t is None or spec.differentiable or not t.dtype.is_floating_point:
            continue
        if (t.requires_grad and torch.is_grad_enabled()) or forward_ad.unpack_dual(t).tangent is not None:
            raise Unsupported(
                f"{call.operation.name}: {spec.name} asks for a gradient, and rotary tables are constants of a call: "
                "detach it"
            )


def refuse_exotic(operation: str, name: str, t: Tensor) -> None:
    """Refuse tensors whose elements are not the array that their shape promises (ERR-14), and DTensors."""
    if is_dtensor(t):
        raise Unsupported(
            f"{operation}: {name} is a DTensor. Call with local tensors, each rank with its own batch rows or its own "
            "heads: DTensor.to_local(), or torch.distributed.tensor.experimental.local_map around the call"
        )
    masked = sys.modules.get("torch.masked")
    kind = (
        "a nested tensor"
        if t.is_nested
        else f"layout {t.layout}"
        if t.layout is not torch.strided
        else "a MaskedTensor"
        if masked is not None and isinstance(t, masked.MaskedTensor)
        else ""
    )
    if kind:
        raise SpecError(operation, name, "a dense torch.Tensor", kind, "ERR-14")


def is_dense(t: Tensor) -> bool:
    """Whether the elements of `t` can be read as those of an array: neither nested nor sparse nor quantised."""
    return not t.is_nested and t.layout is torch.strided and not t.is_quantized


def is_dtensor(t: Any) -> bool:
    """Whether this is a `torch.distributed.tensor.DTensor`; nobody has one before that module is imported."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def reduced(precision: str | None) -> bool:
    """Whether the caller lets float32 matrix products run below float32."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {PRECISIONS}, got {precision!r}")
    return precision == "tf32"


def plain(t: Tensor) -> bool:
    """A tensor with elements of its own: none that a transformation wraps or traces, and no FakeTensor or DTensor.

    A subclass that leaves dispatch alone, such as `nn.Parameter`, is plain. So is a tensor that a function under
    `torch.func` closes over.
    """
    if torch.compiler.is_compiling() or torch._C._is_tracing():
        return False
    hook = "__torch_dispatch__"  # by name: type checkers would bind it to the class
    own = getattr(type(t), hook) is getattr(Tensor, hook)
    return own and not is_functorch_wrapped_tensor(t)


def values(t: Tensor) -> np.ndarray:
    """The values of a plain integer tensor. A transformation that is at work must not see them being read."""
    with torch._C._DisableFuncTorch():
        return t.detach().as_subclass(Tensor).cpu().numpy()


def has_values(t: Tensor) -> bool:
    """Whether the values of `t` can be read, from a device at the price of waiting for it."""
    return plain(t) and t.device.type != "meta"


def is_empty_shell(t: Tensor) -> bool:
    """Whether `t` has a shape and no values: on the meta device, or fake, outside of any compilation."""
    return not torch.compiler.is_compiling() and (t.device.type == "meta" or isinstance(t, FakeTensor))


def on_host(t: Tensor) -> bool:
    """Whether the values of `t` can be read at no cost."""
    return plain(t) and t.device.type == "cpu"


class _NoNumber:
    """Stands in an attribute's place for a tensor that cannot become a number; validation shows it as what came."""

    def __init__(self, t: Tensor):
        self.text = f"a tensor of shape {list(t.shape)} on {t.device}: no gradient would reach it, and it is not read"

    def __repr__(self) -> str:
        return self.text


def number(value: Any) -> Any:
    """The number in a tensor on the host that holds one and asks for no gradient; anything but a tensor as it is."""
    if not isinstance(value, Tensor):
        return value
    constant = type(value) in (Tensor, Parameter) and not value.requires_grad and value.ndim == 0
    if constant and on_host(value.detach()) and forward_ad.unpack_dual(value).tangent is None:
        return value.item()
    return _NoNumber(value)
