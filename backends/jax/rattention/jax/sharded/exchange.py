"""What devices along the sequence send each other: the halo of keys and values, and sums of states.

Functions of one device's shard, inside `jax.shard_map`; `axis` names the mesh axis of `devices` places.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax


def halo(x: jax.Array, slots: int, axis: str, devices: int) -> jax.Array:
    """The last `slots` tokens before this device's own `x [B, L, ...]`: `[B, slots, ...]`, zeros before the start.

    One hop for each device that the slots reach back to, with the part of its tokens that they see.
    """
    length = x.shape[1]
    parts = []
    for hop in range(1, devices):
        missing = slots - (hop - 1) * length
        if missing <= 0:
            break
        part = x[:, max(length - missing, 0) :]
        parts.insert(0, _shift(part, hop, axis, devices))
    filled = sum(part.shape[1] for part in parts)
    empty = jnp.zeros((x.shape[0], slots - filled, *x.shape[2:]), x.dtype)
    return jnp.concatenate([empty, *parts], axis=1)


def exclusive_sum(x: jax.Array, axis: str, devices: int, joined: Callable[[int], jax.Array] | None = None) -> jax.Array:
    """The sum of `x [B, ...]` over the devices before this one, zeros on the first, in 1 + ceil(log2 n) hops.

    Args:
        joined: for sums that start over at segments: `joined(hop) [B]` says whether the segment that the sum of the
            device `hop` places before belongs to is still that of this device's.
    """
    total = _shift(x, 1, axis, devices)
    hop = 1
    while hop < devices - 1:
        more = _shift(total, hop, axis, devices)
        if joined is not None:
            more = jnp.where(joined(hop).reshape(-1, *(1,) * (x.ndim - 1)), more, 0)
        total = total + more
        hop *= 2
    return total


def _shift(x: jax.Array, hop: int, axis: str, devices: int) -> jax.Array:
    """`x` of the device `hop` places before; zeros where there is none."""
    return lax.ppermute(x, axis, [(i, i + hop) for i in range(devices - hop)])
