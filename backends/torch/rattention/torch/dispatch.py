"""Which implementation runs a call: the only place that knows there is more than one.

An implementation is a mapping from operation names to functions with the tensor signature of `eager.operations`:
tensors and attributes of operations.toml by keyword (absent tensors None, attributes complete), `reduced` for
precision, and a tuple of all outputs in the order of operations.toml as the result, differentiable by autograd. It may
raise Unsupported for a valid call that it lacks. The Triton implementation is the attribute `operations` of
`rattention.torch.triton`; it is imported when first used.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping

from rattention.spec import Unsupported
from rattention.torch.eager.operations import EAGER
from torch import Tensor

Implementation = Mapping[str, Callable[..., tuple[Tensor, ...]]]

_loaders: dict[str, Callable[[], Implementation]] = {}


def register(name: str, loader: Callable[[], Implementation]) -> None:
    """Make an implementation available as `impl=name`; `loader` is called when it is first asked for."""
    _loaders[name] = loader


def check_name(impl: str | None) -> None:
    """Refuse a name that no implementation has."""
    if impl is not None and impl not in _loaders:
        raise ValueError(f"impl: expected one of {', '.join(_loaders)} or None, got {impl!r}")


def choose(impl: str | None, operation: str, tensor: Tensor) -> Callable[..., tuple[Tensor, ...]]:
    """The function that runs `operation` on tensors like `tensor`.

    `impl=None` means Triton on CUDA and ROCm tensors where this installation has it, else eager. By name, the
    kernels also run on CPU tensors where Triton interprets (TRITON_INTERPRET=1). On the meta device nothing runs:
    the eager form gives the shapes, which are the same for all.

    Raises:
        Unsupported: the implementation named does not run here, with the reason (BCK-3).
        ValueError: no implementation has that name.
    """
    check_name(impl)
    if tensor.device.type == "meta":
        impl = "eager"
    elif impl is None:
        impl = "triton" if tensor.device.type == "cuda" and _has_triton() else "eager"
    functions = _loaders[impl]()
    if impl == "triton" and (reason := importlib.import_module("rattention.torch.triton").available(tensor.device)):
        raise Unsupported(f"impl='triton': {reason}")
    if operation not in functions:
        raise Unsupported(f"impl={impl!r} does not implement {operation}")
    return functions[operation]


def _has_triton() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("triton", "rattention.torch.triton"))


def _triton() -> Implementation:
    if not _has_triton():
        raise Unsupported("impl='triton' needs the packages triton and rattention.torch.triton installed")
    return importlib.import_module("rattention.torch.triton").operations


register("eager", lambda: EAGER)
register("triton", _triton)
