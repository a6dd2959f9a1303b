"""The rotary table, made on the host."""

from __future__ import annotations

from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from rattention.jax.dispatch import ARRAYS
from rattention.spec import Unsupported, validate


def rope_table(positions: Any, *, head_dim: int, theta: float = 10000.0) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of position * theta^(-2j/D), j = 0 .. D/2-1 (ROPE-1, ROPE-2).

    Args:
        positions: `[M]` int32, usually `numpy.arange(M, dtype=numpy.int32)`.
        head_dim: D, even.
        theta: base of the frequencies, > 0.

    Returns:
        `rope_cos`, `rope_sin` `[M, D/2]` float32, computed in float64 and rounded once. Concrete positions are
        worked on the host, so that this needs no 64-bit mode and adds constants to a traced function.

    Raises:
        SpecError: wrong rank or dtype of positions, odd head_dim, theta out of its domain.
        Unsupported: traced positions without 64-bit mode: there is no float64 to compute their angles in.
    """
    given, numbers = {"positions": positions}, {"head_dim": head_dim, "theta": theta}
    attrs = validate("rope_table", given, numbers, array=("a jax.Array or numpy.ndarray", ARRAYS)).attributes
    exponents = np.arange(0, attrs["head_dim"], 2, dtype=np.float64) / attrs["head_dim"]
    frequencies = attrs["theta"] ** -exponents
    if isinstance(positions, jax.core.Tracer):
        if not jax.config.jax_enable_x64:  # pyright: ignore[reportAttributeAccessIssue]
            raise Unsupported("rope_table of traced positions needs jax_enable_x64: angles are computed in float64")
        angles = positions.astype(jnp.float64)[:, None] * frequencies[None]
        return jnp.cos(angles).astype(jnp.float32), jnp.sin(angles).astype(jnp.float32)
    # To and from the device explicitly, where a transfer guard watches.
    angles = np.asarray(jax.device_get(positions)).astype(np.float64)[:, None] * frequencies
    return jax.device_put((np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)))
