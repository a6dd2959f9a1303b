"""Where tokens stand: segments, padding, positions, ragged lengths, cache slots, as integer arrays.

All of it is small integer work `[B or 1, tokens]`, done once per call, outside the scan.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Segments(NamedTuple):
    """Packed documents.

    Attributes:
        order: `[B, prefix + T]`, number of the segment, growing along the row; padding has that of the segment
            before it, 0 before the first.
        first, last: `[B]`, `order` of the first and last segment.
    """

    order: jax.Array
    first: jax.Array
    last: jax.Array


class Tokens(NamedTuple):
    """The tokens of one call, on the common axis of `Plan`: prefix slots, then the T new tokens.

    Attributes:
        prefix: slots before the first query.
        live: `[B, N]` bool, which tokens are real; None where all are. N is T in a forward, whose prefix is filling,
            and prefix + T in an extend.
        start: `[B or 1]`, index of the first slot that exists.
        end: `[B or 1]`, tokens at an index below it leave the window and enter the state (RLA-6).
        positions: `[B or 1, N]`.
        segments: None without `segment_ids`.
    """

    prefix: int
    live: jax.Array | None
    start: jax.Array
    end: jax.Array
    positions: jax.Array
    segments: Segments | None = None


def of_forward(tokens: int, prefix: int, segment_ids: jax.Array | None) -> Tokens:
    """Tokens of a forward over a whole sequence."""
    index = jnp.arange(tokens, dtype=jnp.int32)[None]
    start = jnp.full((1,), prefix, jnp.int32)
    if segment_ids is None:
        return Tokens(prefix, None, start, jnp.full((1,), tokens, jnp.int32), index)
    live = segment_ids != 0
    before = jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)))
    # A segment is numbered by 1 + the index of its first token.
    order = running_max(jnp.where(live & (segment_ids != before), index + 1, 0))
    first = jnp.min(jnp.where(live, order, tokens + 1), axis=1, initial=tokens + 1)
    last = jnp.max(order, axis=1, initial=0)
    # A row of padding alone: one empty segment, so that the initial state passes through (SEG-8).
    first = jnp.where(last == 0, 1, first)
    end = jnp.max(jnp.where(live, index + 1, 0), axis=1, initial=0)
    positions = index - jnp.maximum(order - 1, 0)
    order = jnp.pad(order, ((0, 0), (prefix, 0)))
    return Tokens(prefix, live, start, end, positions, Segments(order, first, jnp.maximum(last, first)))


def of_extend(slots: int, tokens: int, cache_length: jax.Array, lengths: jax.Array | None) -> Tokens:
    """Tokens of an extend: `slots` cached ones, newest last, then the new ones."""
    index = jnp.arange(slots + tokens, dtype=jnp.int32)[None]
    start = slots - jnp.minimum(cache_length, slots)
    live = index >= start[:, None]
    end = jnp.full_like(cache_length, tokens)
    if lengths is not None:
        end = lengths
        live = live & (index < slots + lengths[:, None])
    positions = cache_length[:, None] - slots + index
    return Tokens(slots, live, start, end, positions)


def running_max(x: jax.Array, block: int = 64) -> jax.Array:
    """Running maximum along the last axis of an integer `[B, T]`.

    Two levels of masked maxima, exact and a handful of operations to compile, where a logarithmic scan takes dozens.
    """
    rows, length = x.shape
    if length == 0:
        return x
    while block * block < length:
        block *= 2
    lowest = jnp.iinfo(x.dtype).min
    block = min(block, length)
    count = -(-length // block)
    x = jnp.pad(x, ((0, 0), (0, count * block - length)), constant_values=lowest).reshape(rows, count, block)

    def triangle(y: jax.Array, strict: int) -> jax.Array:
        at = jnp.arange(y.shape[-1], dtype=jnp.int32)
        seen = (at[None, :] <= at[:, None] - strict).reshape((1,) * (y.ndim - 1) + (at.size, at.size))
        return jnp.max(jnp.where(seen, y[..., None, :], lowest), axis=-1)

    inner = triangle(x, 0)
    if count > 1:
        inner = jnp.maximum(inner, triangle(inner[..., -1], 1)[..., None])
    return inner.reshape(rows, count * block)[:, :length]


def table_rows(cos: jax.Array, sin: jax.Array, where: Tokens, given: jax.Array | None) -> jax.Array:
    """Cosines and sines of each token, `[B or 1, N, 2, D/2]`; 0 for inert tokens whatever the table holds.

    `given` are explicit positions `[B, N]`.
    """
    table = jnp.stack([cos, sin], axis=1)
    tokens = where.positions.shape[1]
    if table.shape[0] == 0:  # then no token is real
        return jnp.zeros((1, tokens, *table.shape[1:]), table.dtype)
    if given is None and where.live is None:
        return table[None, :tokens]
    # Bounded here and not by the gather alone: inert tokens, as the empty slots of a cache, have no row, and
    # checkify.index_checks looks at every index.
    at = jnp.clip(where.positions if given is None else given, 0, table.shape[0] - 1)
    rows = jnp.take(table, at, axis=0, mode="clip")
    return rows if where.live is None else jnp.where(where.live[:, :, None, None], rows, 0)
