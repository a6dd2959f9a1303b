"""The fused backward: everything is rebuilt on chip from q, k, v and one state per step.

Grid (batch, kv heads, steps), the last axis from the end of the sequence to its start. Keys run `Plan.back` steps
ahead of queries, since a chunk needs the R tiles before it. Per step:

    1. shift the window of tiles and of their gradient sums by m; prepend the m new tiles of K, V, K^T, V^T
    2. rebuild the states of the m chunks from the one saved at the step's start
    3. per chunk, last first: gradients of the tile that its fold put into the state, from the state's cotangent D^T
    4. per query head of the chunk (staggered):
         p^T, o1^T, o2^T and their norms as in the forward; norms and mix backwards give do1^T, do2^T
         ds^T = p^T (V do1^T - sum(do1 o1));  dq^T += K^T ds^T;  dk += ds^T q;  dv += p^T do1
         border tiles of the linear branch likewise, without exponential;  D^T += do2^T phi(q)
    5. store dk, dv of the m tiles that no earlier chunk reads

dk, dv are summed over the query heads of the group in float32 in the window, and rounded once (GRAD-3).
Main memory: q, k, v and the cotangent once in, dq, dk, dv once out, one state per step in.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from rattention.jax.pallas import forward, gradients, states
from rattention.jax.pallas.parts import F32, clear, columns, interleave, read_once, rotate, shift
from rattention.jax.pallas.plan import Plan


def body(p: Plan, ref: SimpleNamespace) -> None:
    """The kernel. `ref` holds the references by name, see `calls.run_backward`."""
    at = pl.program_id(2)
    arriving = p.steps - 1 - at  # step of the keys that come in; negative: before the sequence
    step = arriving + p.back  # step whose queries are worked on; >= p.steps: after the sequence

    @pl.when(at == 0)
    def _start() -> None:
        start(p, ref)

    for head in range(p.together):
        load(p, ref, head, arriving)
    if p.back == 0:
        compute(p, ref, step)
    else:
        pl.when(step < p.steps)(functools.partial(compute, p, ref, step))
        if p.final and p.folds:
            pl.when(step >= p.steps)(functools.partial(states.unfold_only, p, ref, step))

    @pl.when(step < p.steps)
    def _store() -> None:
        for head in range(p.together):
            store_keys(p, ref, head)

    @pl.when(at == p.steps + p.back - 1)
    def _finish() -> None:
        finish(p, ref)


def start(p: Plan, ref: SimpleNamespace) -> None:
    """Before the first step: cotangent of the state, sums of the small gradients, gains as columns."""
    for head in range(p.together):
        if hasattr(ref, "d_state"):
            given = jnp.transpose(ref.d_final[0, head]) if p.final else jnp.zeros(ref.d_state.shape[1:], F32)
            if p.final and p.segments and not p.folds:
                # No fold drops the state on the way: the final one is the initial one only in a single segment.
                same = ref.owners[0, 0, 0] == ref.owners[0, 0, p.steps * p.m + p.R]
                given = jnp.where(same, given, jnp.zeros_like(given))
            ref.d_state[head] = given
    for name in ("d_swa_sum", "d_rla_sum", "d_q_scale_sum", "d_k_scale_sum", "d_memory_sum"):
        if hasattr(ref, name):
            sums = getattr(ref, name)
            sums[...] = jnp.zeros(sums.shape, sums.dtype)
    if p.mode == "mix" and not p.rolled:
        forward.gains(p, ref)
    if p.q_scale:
        ref.q_column[...] = jnp.transpose(jnp.broadcast_to(ref.q_scale[...], (p.C, p.key_dim)))
    if p.k_scale:
        ref.k_column[...] = jnp.transpose(jnp.broadcast_to(ref.k_scale[...], (p.C, p.key_dim)))
    if p.memory and p.linear:
        for h in range(p.together * p.G):
            ref.memory_t[h] = jnp.transpose(ref.memory[h]).astype(ref.memory_t.dtype)
    # The tiles behind the last step stand for queries that do not exist.
    for name in WINDOWS + SUMS:
        if hasattr(ref, name):
            for head in range(getattr(ref, name).shape[0]):
                clear(getattr(ref, name), head, 0, p.back * p.m)


WINDOWS = ("k_tiles", "kt_tiles", "v_tiles", "vn_tiles", "raw_tiles", "id_tiles")
SUMS = ("dk_sum", "dk_raw_sum", "dv_sum")


def load(p: Plan, ref: SimpleNamespace, head: int, arriving: Any) -> None:
    """Prepend the m tiles of step `arriving` of one kv head to the window, zeros before the sequence."""
    kept = p.back * p.m
    for name in WINDOWS + SUMS:
        if hasattr(ref, name) and not (name == "id_tiles" and head) and kept:
            shift(p, getattr(ref, name), head, False, kept)
    for n in range(p.m):
        rows = slice(n * p.C, (n + 1) * p.C)
        if p.segments and head == 0:
            row = jnp.where(arriving >= 0, ref.ids[0, :, rows], 0)
            ref.id_tiles[0, n] = jnp.broadcast_to(row, ref.id_tiles.shape[2:])
        raw = arrived(p, ref, ref.k[0, rows, head * p.key_dim : (head + 1) * p.key_dim], n, arriving)
        value = arrived(p, ref, ref.v[0, rows, head * p.value_dim : (head + 1) * p.value_dim], n, arriving)
        key = raw
        if p.rope:
            key = rotate(raw.astype(F32), ref.k_rope[0, rows]).astype(raw.dtype)
            key = arrived(p, ref, key, n, arriving)
            if hasattr(ref, "raw_tiles"):
                ref.raw_tiles[head, n] = raw
        ref.k_tiles[head, n] = key
        if hasattr(ref, "kt_tiles"):
            ref.kt_tiles[head, n] = jnp.transpose(key)
        if hasattr(ref, "v_tiles"):
            ref.v_tiles[head, n] = jnp.transpose(value)
        ref.vn_tiles[head, n] = value
        for name in SUMS:
            if hasattr(ref, name):
                sums = getattr(ref, name)
                sums[head, n] = jnp.zeros(sums.shape[2:], sums.dtype)


def arrived(p: Plan, ref: SimpleNamespace, x: Any, n: int, arriving: Any) -> Any:
    """Zero the rows of x [C, channels] that are padding, before the sequence or past its end."""
    if p.segments:
        x = forward.inert_to_zero(p, ref, x, n, arriving)
    row = lax.broadcasted_iota(jnp.int32, x.shape, 0) + (arriving * p.step + n * p.C)
    live = (row >= 0) & (row < p.keys) if p.ragged else row >= 0
    return jnp.where(live, x, jnp.zeros_like(x)) if p.back or p.ragged else x


class Transposed:
    """The tiles of a window turned as they are read, where there is no room for a turned copy."""

    def __init__(self, ref: Any):
        self.ref = ref

    def __getitem__(self, at: Any) -> Any:
        return jnp.transpose(self.ref[at])


def compute(p: Plan, ref: SimpleNamespace, step: Any) -> None:
    if p.rolled:
        ref = SimpleNamespace(**vars(ref), v_tiles=Transposed(ref.vn_tiles))
    ref = read_once(p, ref)
    if p.state:
        for head in range(p.together):
            states.rebuild(p, ref, step, head)

    if p.rolled:
        for n in reversed(range(p.m)):
            for head in range(p.together):
                gradients.rolled(p, ref, step, n, head)
        return

    def emitted() -> Iterator[Iterator[None]]:
        for n in reversed(range(p.m)):
            for head in range(p.together):
                for first in range(0, p.G, p.backward_heads):
                    yield gradients.task(p, ref, step, n, head, first)

    interleave(emitted(), p.config.backward_lag)


def store_keys(p: Plan, ref: SimpleNamespace, head: int) -> None:
    """dk and dv of the step's own tiles, which are complete: no earlier chunk reads them."""
    for n in range(p.m):
        tile = p.back * p.m + n
        rows = slice(n * p.C, (n + 1) * p.C)
        dk, dv = ref.dk_sum[head, tile], ref.dv_sum[head, tile]
        if p.rope:
            dk = rotate(dk, ref.rope[0, rows], inverse=True)
            if hasattr(ref, "dk_raw_sum"):
                dk = dk + ref.dk_raw_sum[head, tile]
        if p.segments:
            live = columns(p, ref.id_tiles[0, tile, :1])[:, :1] != 0
            dk, dv = jnp.where(live, dk, 0.0), jnp.where(live, dv, 0.0)
        ref.d_k[0, rows, head * p.key_dim : (head + 1) * p.key_dim] = dk.astype(ref.d_k.dtype)
        ref.d_v[0, rows, head * p.value_dim : (head + 1) * p.value_dim] = dv.astype(ref.d_v.dtype)


def finish(p: Plan, ref: SimpleNamespace) -> None:
    """What was summed over the whole sequence, per batch row."""
    for head in range(p.together):
        if p.initial and p.mode != "swa":
            ref.d_initial[0, head] = jnp.transpose(ref.d_state[head])
    for name, sums in (("d_swa_weight", "d_swa_sum"), ("d_rla_weight", "d_rla_sum")):
        if hasattr(ref, name):
            for h in range(p.together * p.G):
                row = jnp.sum(jnp.transpose(getattr(ref, sums)[h]), axis=0, keepdims=True)
                getattr(ref, name)[0, 0, h : h + 1] = row
    for name, sums in (("d_q_scale", "d_q_scale_sum"), ("d_k_scale", "d_k_scale_sum")):
        if hasattr(ref, name):
            getattr(ref, name)[0, 0] = jnp.sum(jnp.transpose(getattr(ref, sums)[...]), axis=0, keepdims=True)
    if hasattr(ref, "d_memory"):
        for h in range(p.together * p.G):
            ref.d_memory[0, h] = jnp.transpose(ref.d_memory_sum[h])
