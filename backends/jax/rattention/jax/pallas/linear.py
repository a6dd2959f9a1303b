"""The linear branch: phi of keys and queries, the state and its fold, the output of a task."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
from jax import lax
from rattention.jax.pallas.parts import F32, below, beside, columns, dot, linear_mask, phi
from rattention.jax.pallas.plan import Plan


def raw_keys(p: Plan, ref: SimpleNamespace, head: int, tile: Any) -> Any:
    """A tile of unrotated keys (ROPE-5)."""
    return (ref.raw_tiles if p.rope else ref.k_tiles)[head, tile]


def key_features(p: Plan, ref: SimpleNamespace, head: int, tile: Any) -> tuple[Any, Any, Any]:
    """phi(k) of a tile, transposed: its input [D, C] float32, its halves, and both as one [F, C] of storage dtype."""
    raw = raw_keys(p, ref, head, tile)
    x = jnp.transpose(raw).astype(F32)
    if p.k_scale:
        x = x * ref.k_column[...]
    halves = phi(p, x)
    return x, halves, below([h.astype(raw.dtype) for h in halves])


def query_features(p: Plan, ref: SimpleNamespace, stored: list[Any]) -> tuple[Any, Any, Any]:
    """phi(q), transposed: its input [D, N*C], its halves, and both as one [F, N*C] of storage dtype."""
    x = beside([jnp.transpose(y) for y in stored]).astype(F32)
    if p.q_scale:
        x = x * beside([ref.q_column[...]] * len(stored))
    halves = phi(p, x)
    return x, halves, below([h.astype(stored[0].dtype) for h in halves])


def fold_values(p: Plan, ref: SimpleNamespace, head: int, tile: int, chunk: Any) -> Any:
    """V^T [Dv, C] of the tile that leaves the window after `chunk`, without what must not enter the state."""
    value = ref.v_tiles[head, tile]
    if not (p.segments or (p.final and p.ragged)):
        return value
    enters = lax.broadcasted_iota(jnp.int32, (1, p.C), 1) + (chunk - p.R) * p.C < ref.limits[0, 0, 0]
    if p.segments:
        enters &= ref.id_tiles[0, tile, :1] == ref.owners[0, 0, chunk + 1]
    return jnp.where(enters, value, jnp.zeros_like(value))


def prepare(p: Plan, ref: SimpleNamespace, n: int, head: int, chunk: Any) -> None:
    """The state as chunk n reads it, phi of its border tiles, and the fold of the tile that leaves."""
    if p.state:
        ref.read_state[head, n] = ref.state[head].astype(ref.read_state.dtype)
    for i, r in enumerate(p.linear_tiles):
        features = key_features(p, ref, head, n + r)[2]
        ref.features[head, n, i] = jnp.transpose(features)
    if p.folds:
        # Linear tiles start with the oldest, r = 0, which is the one that leaves.
        added = dot(p, fold_values(p, ref, head, n, chunk), ref.features[head, n, 0])
        ref.state[head] = keep(p, ref, ref.state[head], chunk) + added


def keep(p: Plan, ref: SimpleNamespace, state: Any, chunk: Any) -> Any:
    """The state after `chunk`, before its fold: nothing of another segment stays (SEG-2)."""
    if not p.segments:
        return state
    return jnp.where(ref.owners[0, 0, chunk + 1] == ref.owners[0, 0, chunk], state, jnp.zeros_like(state))


def linear_output(p: Plan, ref: SimpleNamespace, n: int, head: int, first: int, chunk: Any, features: Any) -> Any:
    """o2^T [Dv, N*C]: the state, the memory, and the border tiles."""
    parts = []
    if p.state:
        read = dot(p, ref.read_state[head, n], features)
        if p.segments:
            read = jnp.where(beside([owned(p, ref, n, chunk)] * p.heads), read, 0.0)
        parts.append(read)
    if p.memory:
        parts.append(
            beside(
                [
                    dot(p, ref.memory_t[head * p.G + first + i], features[:, i * p.C : (i + 1) * p.C])
                    for i in range(p.heads)
                ]
            )
        )
    for i, r in enumerate(p.linear_tiles):
        weight = linear_weights(p, ref, n, head, i, r, features, p.heads)
        parts.append(dot(p, ref.v_tiles[head, n + r], weight.astype(features.dtype)))
    return functools.reduce(jnp.add, parts)


def owned(p: Plan, ref: SimpleNamespace, n: int, chunk: Any) -> Any:
    """Which queries [1, C] of chunk n belong to the segment of the state."""
    return ref.id_tiles[0, n + p.R, :1] == ref.owners[0, 0, chunk]


def linear_weights(p: Plan, ref: SimpleNamespace, n: int, head: int, i: int, r: int, features: Any, heads: int) -> Any:
    """A^T [C, heads*C]: phi(k) phi(q)^T of border tile r where the linear branch reads it, else 0."""
    weight = dot(p, ref.features[head, n, i], features)
    return mask_linear(p, ref, n, r, weight, heads)


def mask_linear(p: Plan, ref: SimpleNamespace, n: int, r: int, x: Any, heads: int) -> Any:
    x = jnp.where(linear_mask(p, r, heads), x, 0.0)
    if p.segments:
        key = columns(p, ref.id_tiles[0, n + r, :1])
        query = jnp.broadcast_to(ref.id_tiles[0, n + p.R, :1], (p.C, p.C))
        x = jnp.where(beside([key == query] * heads), x, 0.0)
    return x
