"""A few new tokens on a full cache: one pass over ring and state.

Grid (batch, kv heads); everything of one kv head at once, so that ring and state are each read once and the folded
state is written once. The W cached slots and T new tokens are the keys, the query heads of the group times T the
columns of one tile:

    s^T = [K; k] q^T, softmax over keys, o1^T = [V; v]^T p^T
    o2^T = S^T phi(q)^T + border, where the border are the slots below t, which the t-th new token finds outside
    S' = S + phi(k_j)^T v_j over the slots that leave
    out = swa_weight o1 / rms(o1) + rla_weight o2 / rms(o2)

Needs 1 <= T <= min(W, `LONGEST`): then only cached slots leave, and new tokens are always in the window.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
from jax import lax
from rattention.jax.pallas.parts import F32, LOG2E, below, beside, dot, phi, rotate
from rattention.jax.pallas.plan import Plan

LONGEST = 16


def border(p: Plan, slots: int) -> int:
    """Slots that may leave or lie outside the window of a new token, rounded up to whole tiles of rows."""
    return min(slots, -(-p.tokens // 16) * 16)


def body(p: Plan, ref: SimpleNamespace) -> None:
    """The kernel. `ref` holds the references by name, see `calls.run_decode`."""
    for head in range(p.together):
        one_head(p, ref, head)


def live_rows(x: Any, first: Any, last: Any) -> Any:
    """Zero the rows of x outside [first, last)."""
    row = lax.broadcasted_iota(jnp.int32, x.shape, 0)
    return jnp.where((row >= first) & (row < last), x, jnp.zeros_like(x))


def column(row: Any, lanes: int) -> Any:
    """A row [1, n] as [n, lanes]."""
    return jnp.transpose(jnp.broadcast_to(row, (lanes, row.shape[1])))


def one_head(p: Plan, ref: SimpleNamespace, head: int) -> None:
    T, G, slots = p.tokens, p.G, ref.cache_k.shape[1]
    start, length = ref.bounds[0, 0, 0], ref.bounds[0, 0, 1]
    N = G * T
    scale, eps = ref.numbers[0, 0, 0], ref.numbers[0, 0, 1]
    dtype = ref.q.dtype

    def cut(source: Any, h: int, width: int) -> Any:
        return source[0, :, h * width : (h + 1) * width]

    old_k = live_rows(cut(ref.cache_k, head, p.key_dim), start, slots)
    old_v = live_rows(cut(ref.cache_v, head, p.value_dim), start, slots)
    new_k = live_rows(cut(ref.k, head, p.key_dim), 0, length)
    new_v = live_rows(cut(ref.v, head, p.value_dim), 0, length)
    heads = range(head * G, (head + 1) * G)
    stored = [live_rows(cut(ref.q, h, p.key_dim), 0, length) for h in heads]
    token = beside([lax.broadcasted_iota(jnp.int32, (1, T), 1)] * G)  # of each column

    # Softmax over slots and new tokens.
    queries, keys = stored, [old_k, new_k]
    if p.rope:
        queries = [rotate(x.astype(F32), ref.rope[0]).astype(dtype) for x in stored]
        keys = [
            rotate(x.astype(F32), table[0]).astype(dtype)
            for x, table in zip(keys, (ref.old_rope, ref.rope), strict=True)
        ]
    rows = below(queries)
    logits = [dot(p, x, rows, (1, 1)) * (scale * LOG2E) for x in keys]
    slot = lax.broadcasted_iota(jnp.int32, (slots, N), 0)
    fresh = lax.broadcasted_iota(jnp.int32, (T, N), 0)
    logits[0] = jnp.where((slot >= start) & (slot >= token), logits[0], -jnp.inf)
    logits[1] = jnp.where(fresh <= token, logits[1], -jnp.inf)
    top = functools.reduce(jnp.maximum, [jnp.max(x, axis=0, keepdims=True) for x in logits])
    # Not above 0 even where the factor of x is contracted with the subtraction.
    weights = [jnp.exp2(jnp.minimum(x - top, 0.0)) for x in logits]
    total = functools.reduce(jnp.add, [jnp.sum(x, axis=0, keepdims=True) for x in weights])
    values = [dot(p, v, w.astype(dtype), (0, 0)) for v, w in zip((old_v, new_v), weights, strict=True)]
    o1 = values[0] + values[1]

    # The linear branch: state, memory, and slots below t.
    x = beside([jnp.transpose(y.astype(F32)) for y in stored])
    if p.q_scale:
        x = x * column(ref.q_scale[...], N)
    features = below([h.astype(dtype) for h in phi(p, x)])
    state = ref.state[0, head]
    o2 = dot(p, state.astype(dtype), features, (0, 0))
    edge = border(p, slots)
    raw = jnp.transpose(old_k[:edge].astype(F32))
    if p.k_scale:
        raw = raw * column(ref.k_scale[...], edge)
    leaving = below([h.astype(dtype) for h in phi(p, raw)])  # [F, edge]
    weight = jnp.where(slot[:edge] < token, dot(p, leaving, features, (0, 0)), 0.0)
    o2 = o2 + dot(p, old_v[:edge], weight.astype(dtype), (0, 0))
    if p.memory:
        parts = [
            dot(p, ref.memory[h].astype(dtype), features[:, i * T : (i + 1) * T], (0, 0)) for i, h in enumerate(heads)
        ]
        o2 = o2 + beside(parts)
    gone = live_rows(old_v[:edge], 0, length)
    ref.next_state[0, head] = state + dot(p, leaving, gone)

    # Norms, mix, store.
    o1 = o1 * lax.rsqrt(jnp.sum(o1 * o1, axis=0, keepdims=True) * (1 / p.true_value_dim) + eps * total * total)
    o2 = o2 * lax.rsqrt(jnp.sum(o2 * o2, axis=0, keepdims=True) * (1 / p.true_value_dim) + eps)
    for i, h in enumerate(heads):
        at = slice(i * T, (i + 1) * T)
        gain = slice(h * p.value_dim, (h + 1) * p.value_dim)
        out = jnp.transpose(o1[:, at]) * ref.swa_weight[:, gain] + jnp.transpose(o2[:, at]) * ref.rla_weight[:, gain]
        ref.out[0, :, gain] = live_rows(out, 0, length).astype(ref.out.dtype)
