"""Checks of a public call: shapes, dtypes and attributes always; values where reading them costs nothing.

Values of segment ids, lengths and positions are looked at on the host alone. A tensor on a device, or one that a
transformation traces, is looked at only with `check_values=True`: no hidden synchronisation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from rattention.spec import Call, validate
from torch import Tensor

EXTRA_DTYPES = ("float64",)
"""Storage dtypes of the public functions beyond the specification's: for gradient checks."""

PRECISIONS = (None, "float32", "tf32")


def check(
    operation: str,
    tensors: Mapping[str, Tensor | None],
    attributes: Mapping[str, Any],
    check_values: bool,
) -> Call:
    """Validate one call.

    Raises:
        SpecError: naming the argument, what was expected and what came.
    """
    host = {}
    for name, t in tensors.items():
        if t is None or t.dtype.is_floating_point:
            continue
        if t.device.type == "cpu" and plain(t):
            host[name] = t.numpy()
        elif check_values:
            host[name] = t.cpu().numpy()
    return validate(operation, tensors, attributes, host=host, extra_dtypes=EXTRA_DTYPES)


def reduced(precision: str | None) -> bool:
    """Whether the caller lets float32 matrix products run below float32."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {PRECISIONS}, got {precision!r}")
    return precision == "tf32"


def plain(t: Tensor) -> bool:
    """A tensor with values of its own: not a subclass such as FakeTensor, and no transformation is at work."""
    transformed = torch._C._are_functorch_transforms_active()
    return type(t) is Tensor and not torch.compiler.is_compiling() and not transformed
