"""The state in the backward: rebuilt from the one saved, its cotangent unfolded, the gradient of keys through phi."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
from jax import lax
from rattention.jax.pallas import linear
from rattention.jax.pallas.parts import (
    F32,
    columns,
    dot,
    phi_gradient,
    split_halves,
)
from rattention.jax.pallas.plan import Plan


def base(p: Plan) -> int:
    """Index in the window of tile 0 of chunk 0 of the step at work."""
    return p.back * p.m - p.R


def rebuild(p: Plan, ref: SimpleNamespace, step: Any, head: int) -> None:
    """The states that the m chunks read, and phi of their border tiles, both ways round."""
    state = ref.states[0, head, 0] if p.folds else jnp.transpose(ref.initial[0, head])
    for n in range(p.m):
        chunk = step * p.m + n
        ref.read_state[head, n] = state.astype(ref.read_state.dtype)
        for i, r in enumerate(p.linear_tiles):
            features = linear.key_features(p, ref, head, base(p) + n + r)[2]
            ref.features[head, n, i] = jnp.transpose(features)
        if p.folds and n + 1 < p.m:
            value = fold_values(p, ref, head, n, chunk)
            state = linear.keep(p, ref, state, chunk) + dot(p, value, ref.features[head, n, 0])


def fold_mask(p: Plan, ref: SimpleNamespace, n: int, chunk: Any) -> Any:
    """Which tokens [1, C] of the tile that leaves after `chunk` enter the state; None: all."""
    if not (p.segments or p.final):
        return None
    enters = lax.broadcasted_iota(jnp.int32, (1, p.C), 1) + (chunk - p.R) * p.C < ref.limits[0, 0, 0]
    if p.segments:
        enters &= ref.id_tiles[0, base(p) + n, :1] == ref.owners[0, 0, chunk + 1]
    return enters


def fold_values(p: Plan, ref: SimpleNamespace, head: int, n: int, chunk: Any) -> Any:
    value = ref.v_tiles[head, base(p) + n]
    mask = fold_mask(p, ref, n, chunk)
    return value if mask is None else jnp.where(mask, value, jnp.zeros_like(value))


def unfold(p: Plan, ref: SimpleNamespace, n: int, head: int, chunk: Any) -> Any:
    """Gradients of the tile that `chunk` folded; the cotangent of the state it left becomes that of the state before.

    Returns the cotangent [C, F] of phi of that tile.
    """
    tile = base(p) + n
    d_state = ref.d_state[head]
    dtype = ref.vn_tiles.dtype
    rounded = d_state.astype(dtype)
    features = jnp.transpose(linear.key_features(p, ref, head, tile)[2])
    d_features = dot(p, ref.vn_tiles[head, tile], rounded)
    d_values = dot(p, features, rounded, (1, 1))
    mask = fold_mask(p, ref, n, chunk)
    if mask is not None:
        live = columns(p, mask.astype(F32))[:, :1] != 0
        d_features = jnp.where(live, d_features, 0.0)
        d_values = jnp.where(live, d_values, 0.0)
    ref.dv_sum[head, tile] += d_values
    ref.d_state[head] = linear.keep(p, ref, d_state, chunk)
    return d_features


def unfold_only(p: Plan, ref: SimpleNamespace, step: Any) -> None:
    """Past the last query: tokens that only the final state holds."""
    for n in reversed(range(p.m)):
        for head in range(p.together):
            d_features = unfold(p, ref, n, head, step * p.m + n)
            key_gradient(p, ref, head, base(p) + n, d_features)


def key_gradient(p: Plan, ref: SimpleNamespace, head: int, tile: int, d_features: Any) -> None:
    """Add the gradient through phi(k * k_scale), given d_features [C, F]."""
    x, halves, _ = linear.key_features(p, ref, head, tile)
    d = phi_gradient(p, x, halves, split_halves(p, jnp.transpose(d_features)))
    if p.k_scale:
        raw = jnp.transpose(linear.raw_keys(p, ref, head, tile)).astype(F32)
        ref.d_k_scale_sum[...] += d * raw
        d = d * ref.k_column[...]
    sums = ref.dk_raw_sum if hasattr(ref, "dk_raw_sum") else ref.dk_sum
    sums[head, tile] += jnp.transpose(d)
