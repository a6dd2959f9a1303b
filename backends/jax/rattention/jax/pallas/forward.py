"""The fused forward: one pass over keys and values, both branches, norms and mix.

Grid (batch, kv heads, steps of m chunks); the last axis runs in order. Per step:

    1. shift the window of tiles by m, append the m new tiles of K (rotated, and as stored where that differs) and V^T
    2. per chunk: phi of the tile that is about to leave the window; the state as the chunk reads it; fold the tile
    3. per chunk and query head (staggered, see parts.interleave):
         s^T = K q^T for R + 1 tiles           o1^T = V^T p^T        p = softmax over keys, in one piece
         A^T = phi(K) phi(q)^T on border tiles o2^T = S^T phi(q)^T + V^T A^T
         out = swa_weight o1 / rms(o1) + rla_weight o2 / rms(o2), transposed back and stored
    4. last step: fold what is left of the sequence into the final state

With w + 1 a multiple of C the oldest tile and the chunk's own hold complementary triangles of the window: their scores
share one tile, and exponentials are taken of exactly w + 1 keys per query. Other windows mask each cut tile.

Main memory: q and out once, k and v once per kv head, the state never (training: once per step, for the backward).
Long windows (more than `config.tiles` inner tiles) run the softmax online, in a loop over groups of tiles.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from rattention.jax.pallas import linear, softmax
from rattention.jax.pallas.parts import F32, clear, columns, dot, interleave, read_once, rotate, shift
from rattention.jax.pallas.plan import Plan


def body(p: Plan, ref: SimpleNamespace) -> None:
    """The kernel. `ref` holds the references by name, see `calls.forward`."""
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _start() -> None:
        start(p, ref)

    for head in range(p.together):
        load(p, ref, head, step)
        if hasattr(ref, "states"):
            ref.states[0, head, 0] = ref.state[head]
    compute = functools.partial(_compute, p, ref, step)
    if p.prefix:
        pl.when(step >= p.prefix)(compute)
    else:
        compute()
    if p.final:
        pl.when(step == p.steps - 1)(functools.partial(finish, p, ref))


def start(p: Plan, ref: SimpleNamespace) -> None:
    """Before the first step of a (batch row, kv heads): state, empty window, gains as columns."""
    for head in range(p.together):
        if p.state or p.final:
            ref.state[head] = jnp.transpose(ref.initial[0, head]) if p.initial else jnp.zeros(ref.state.shape[1:], F32)
        if p.R:
            # Tiles before the sequence meet zero weights: they must not hold NaN.
            for window in (ref.k_tiles, ref.v_tiles) + ((ref.raw_tiles,) if hasattr(ref, "raw_tiles") else ()):
                clear(window, head, p.m, p.R)
    if p.R and p.segments:
        ref.id_tiles[...] = jnp.zeros(ref.id_tiles.shape, jnp.int32)
    if p.mode == "mix":
        gains(p, ref)
    if p.q_scale:
        ref.q_column[...] = jnp.transpose(jnp.broadcast_to(ref.q_scale[...], (p.C, p.key_dim)))
    if p.k_scale:
        ref.k_column[...] = jnp.transpose(jnp.broadcast_to(ref.k_scale[...], (p.C, p.key_dim)))
    if p.memory and p.linear:
        for h in range(p.together * p.G):
            ref.memory_t[h] = jnp.transpose(ref.memory[h]).astype(ref.memory_t.dtype)


def gains(p: Plan, ref: SimpleNamespace) -> None:
    """The rows of both weights as [Dv, C] columns, one pair per query head."""
    for h in range(p.together * p.G):
        at = slice(h * p.value_dim, (h + 1) * p.value_dim)
        for gain, row in ((ref.swa_gain, ref.swa_weight), (ref.rla_gain, ref.rla_weight)):
            gain[h] = jnp.transpose(jnp.broadcast_to(row[:, at], (p.C, p.value_dim)))


def load(p: Plan, ref: SimpleNamespace, head: int, step: Any) -> None:
    """Append the m new tiles of one kv head to the window."""
    windows = [ref.k_tiles, ref.v_tiles] + ([ref.raw_tiles] if hasattr(ref, "raw_tiles") else [])
    if p.R:
        for window in windows:
            shift(p, window, head, True, p.R)
    if p.segments and head == 0:
        if p.R:
            shift(p, ref.id_tiles, 0, True, p.R)
        for n in range(p.m):
            row = ref.ids[0, :, n * p.C : (n + 1) * p.C]
            ref.id_tiles[0, p.R + n] = jnp.broadcast_to(row, ref.id_tiles.shape[2:])
    for n in range(p.m):
        rows = slice(n * p.C, (n + 1) * p.C)
        raw = inert_to_zero(p, ref, ref.k[0, rows, head * p.key_dim : (head + 1) * p.key_dim], n, step)
        value = inert_to_zero(p, ref, ref.v[0, rows, head * p.value_dim : (head + 1) * p.value_dim], n, step)
        key = raw
        if p.rope:
            # Rows of the table behind the end hold anything, so the inert are zeroed again.
            key = rotate(raw.astype(F32), ref.rope[0, rows]).astype(raw.dtype)
            key = inert_to_zero(p, ref, key, n, step)
            if hasattr(ref, "raw_tiles"):
                ref.raw_tiles[head, p.R + n] = raw
        ref.k_tiles[head, p.R + n] = key
        ref.v_tiles[head, p.R + n] = jnp.transpose(value)


def inert_to_zero(p: Plan, ref: SimpleNamespace, x: Any, n: int, step: Any) -> Any:
    """Zero the rows of x [C, channels] that are padding or lie past the end: whatever they hold meets weight 0."""
    if p.segments:
        live = columns(p, ref.ids[0, :, n * p.C : (n + 1) * p.C])[:, :1] != 0
        return jnp.where(live, x, jnp.zeros_like(x))
    if p.ragged:
        row = lax.broadcasted_iota(jnp.int32, x.shape, 0)
        return jnp.where(row < p.keys - step * p.step - n * p.C, x, jnp.zeros_like(x))
    return x


def _compute(p: Plan, ref: SimpleNamespace, step: Any) -> None:
    ref = read_once(p, ref)

    def tasks() -> Iterator[Iterator[None]]:
        for n in range(p.m):
            for head in range(p.together):
                for first in range(0, p.G, p.heads):
                    yield task(p, ref, step, n, head, first)

    interleave(tasks(), p.config.lag)


def task(p: Plan, ref: SimpleNamespace, step: Any, n: int, head: int, first: int) -> Iterator[None]:
    """The queries of chunk n for `p.heads` query heads of one kv head; yields between stages."""
    chunk = step * p.m + n
    if first == 0 and p.linear:
        linear.prepare(p, ref, n, head, chunk)
        yield
    N = p.heads
    heads = [head * p.G + first + i for i in range(N)]
    rows = slice(n * p.C, (n + 1) * p.C)
    stored = [inert_queries(p, ref, ref.q[0, rows, h * p.key_dim : (h + 1) * p.key_dim], n) for h in heads]
    o1 = o2 = squares = None
    if p.softmax:
        scores = softmax.Scores(p, ref, step, n, head, N, softmax.scaled_queries(p, ref, stored, rows))
        yield from scores.first()
    if p.linear:
        features = linear.query_features(p, ref, stored)[2]
        yield
    if p.softmax:
        yield from scores.values()
        o1, squares = scores.output, scores.total
    if p.linear:
        o2 = linear.linear_output(p, ref, n, head, first, chunk, features)
        yield
    store(p, ref, n, heads, rows, o1, o2, squares)
    yield


def inert_queries(p: Plan, ref: SimpleNamespace, x: Any, n: int) -> Any:
    """Zero the queries of padding, so that their output is a number and its selection away is exact (SEG-4)."""
    return inert_to_zero(p, ref, x, n, None) if p.segments else x


def store(p: Plan, ref: SimpleNamespace, n: int, heads: list[int], rows: slice, o1: Any, o2: Any, total: Any) -> None:
    """Norms, mix, transpose, store."""
    eps = ref.numbers[0, 0, 1]
    if p.mode == "mix":
        if o1 is not None:
            # rms(o1 / total) without the division.
            r1 = lax.rsqrt(jnp.sum(o1 * o1, axis=0, keepdims=True) * (1 / p.true_value_dim) + eps * total * total)
            o1 = o1 * r1
        if o2 is not None:
            r2 = lax.rsqrt(jnp.sum(o2 * o2, axis=0, keepdims=True) * (1 / p.true_value_dim) + eps)
            o2 = o2 * r2
    elif o1 is not None:
        o1 = o1 * (1.0 / total)
    for i, h in enumerate(heads):
        at = slice(i * p.C, (i + 1) * p.C)
        parts = []
        if o1 is not None:
            parts.append(o1[:, at] * ref.swa_gain[h] if p.mode == "mix" else o1[:, at])
        if o2 is not None:
            parts.append(o2[:, at] * ref.rla_gain[h] if p.mode == "mix" else o2[:, at])
        out = functools.reduce(jnp.add, parts) if parts else jnp.zeros((p.value_dim, p.C), F32)
        if p.segments:
            out = jnp.where(ref.id_tiles[0, n + p.R, :1] != 0, out, 0.0)
        ref.out[0, rows, h * p.value_dim : (h + 1) * p.value_dim] = jnp.transpose(out.astype(ref.out.dtype))


def finish(p: Plan, ref: SimpleNamespace) -> None:
    """Fold the tokens i < T - max(w, 0) that are still in the window into the final state (RLA-6, SEG-7)."""
    last = p.steps * p.m - 1
    for head in range(p.together):

        def fold(r: Any, state: Any, head: int = head) -> Any:
            tile = p.m - 1 + r
            value = ref.v_tiles[head, tile]
            at = lax.broadcasted_iota(jnp.int32, (1, p.C), 1) + (last - p.R + r) * p.C
            enters = at < ref.limits[0, 0, 0]
            if p.segments:
                enters &= ref.id_tiles[0, tile, :1] == ref.owners[0, 0, last + p.R + 1]
            value = jnp.where(enters, value, jnp.zeros_like(value))
            return state + dot(p, value, jnp.transpose(linear.key_features(p, ref, head, tile)[2]))

        state = ref.state[head]
        if p.segments:
            # The state stands at chunk last + 1; what it holds belongs to the last segment or is dropped.
            same = ref.owners[0, 0, last + 1 if p.folds else 0] == ref.owners[0, 0, last + p.R + 1]
            state = jnp.where(same, state, jnp.zeros_like(state))
        state = lax.fori_loop(1 if p.folds else 0, p.R + 1, fold, state)
        ref.final_state[0, head] = jnp.transpose(state)
