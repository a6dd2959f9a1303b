"""What the faces of the library refuse beside the tensors of a call: sizes, dtypes and precisions, by name."""

from __future__ import annotations

from typing import Any

import jax.export
import jax.numpy as jnp
import numpy as np
from rattention.jax import dispatch
from rattention.spec import load


def sizes(least: int = 1, **given: Any) -> None:
    """Ints from `least` on; the symbolic sizes of `jax.export` too.

    Raises:
        ValueError: one is not; the text names it.
    """
    for name, size in given.items():
        if jax.export.is_symbolic_dim(size):
            continue
        if isinstance(size, bool) or not isinstance(size, int | np.integer) or size < least:
            raise ValueError(f"{name}: expected an int >= {least}, got {size!r}")


def storage_dtype(name: str, dtype: Any) -> np.dtype:
    """`dtype` as a storage dtype of the specification; float64 is one in 64-bit mode.

    Raises:
        ValueError: it is none; the text calls it `name`.
    """
    allowed = (*load().storage_dtypes, *dispatch.extra_dtypes())
    try:
        found = None if dtype is None else jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or found.name not in allowed:
        raise ValueError(f"{name}: expected a floating-point dtype of {', '.join(allowed)}, got {dtype!r}")
    return found


def kind(x: Any) -> str:
    """The type of an argument, in full."""
    return f"{type(x).__module__}.{type(x).__qualname__}"
