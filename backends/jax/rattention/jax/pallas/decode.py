"""A few new tokens on a full cache: one pass over ring and state.

Grid (batch, kv heads); everything of one kv head at once, so that ring and state are each read once and the folded
state is written once. Queries are few, so here they lie on sublanes as stored, and keys on lanes. The W cached slots
and T new tokens are the keys, the query heads of the group times T the rows of one tile:

    s = q [K; k]^T, softmax over keys, o1 = p [V; v]
    o2 = phi(q) S + border, where the border are the slots below t, which the t-th new token finds outside
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


def scores(p: Plan, rows: Any, keys: Any) -> Any:
    """rows keys^T [N, keys]; for one key by vector arithmetic, a matrix product would be all padding."""
    if keys.shape[0] == 1:
        return jnp.sum(rows.astype(F32) * keys.astype(F32), axis=1, keepdims=True)
    return dot(p, rows, keys, (1, 1))


def weigh(p: Plan, weights: Any, values: Any) -> Any:
    """weights [N, keys] values [keys, Dv]."""
    return weights.astype(F32) * values.astype(F32) if values.shape[0] == 1 else dot(p, weights, values)


def one_head(p: Plan, ref: SimpleNamespace, head: int) -> None:
    T, G, slots = p.tokens, p.G, ref.cache_k.shape[1]
    start, length = ref.bounds[0, 0, 0], ref.bounds[0, 0, 1]
    N = G * T
    scale, eps = ref.numbers[0, 0, 0], ref.numbers[0, 0, 1]
    dtype = ref.q.dtype

    def cut(source: Any, h: int, width: int) -> Any:
        return source[0, :, h * width : (h + 1) * width]

    old_k = cut(ref.cache_k, head, p.key_dim)
    old_v = live_rows(cut(ref.cache_v, head, p.value_dim), start, slots)
    new_k = live_rows(cut(ref.k, head, p.key_dim), 0, length)
    new_v = live_rows(cut(ref.v, head, p.value_dim), 0, length)
    heads = range(head * G, (head + 1) * G)
    stored = [live_rows(cut(ref.q, h, p.key_dim), 0, length) for h in heads]
    token = below([lax.broadcasted_iota(jnp.int32, (T, 1), 0)] * G)  # of each row

    # Softmax over slots and new tokens.
    queries, keys = stored, [old_k, new_k]
    if p.rope:
        queries = [rotate(x.astype(F32), ref.rope[0]).astype(dtype) for x in stored]
        keys = [
            rotate(x.astype(F32), table[0]).astype(dtype)
            for x, table in zip(keys, (ref.old_rope, ref.rope), strict=True)
        ]
    rows = below(queries)
    logits = [scores(p, rows, x) * (scale * LOG2E) for x in keys]
    slot = lax.broadcasted_iota(jnp.int32, (N, slots), 1)
    fresh = lax.broadcasted_iota(jnp.int32, (N, T), 1)
    # Unused slots may hold anything: what it does to their logits is dropped here, the rest by `live_rows`.
    logits[0] = jnp.where((slot >= start) & (slot >= token), logits[0], -jnp.inf)
    logits[1] = jnp.where(fresh <= token, logits[1], -jnp.inf)
    top = functools.reduce(jnp.maximum, [jnp.max(x, axis=1, keepdims=True) for x in logits])
    # Not above 0 even where the factor of x is contracted with the subtraction.
    weights = [jnp.exp2(jnp.minimum(x - top, 0.0)) for x in logits]
    total = functools.reduce(jnp.add, [jnp.sum(x, axis=1, keepdims=True) for x in weights])
    o1 = weigh(p, weights[0].astype(dtype), old_v) + weigh(p, weights[1].astype(dtype), new_v)

    # The linear branch: state, memory, and slots below t.
    x = below(stored).astype(F32)
    if p.q_scale:
        x = x * ref.q_scale[...]
    features = beside([h.astype(dtype) for h in phi(p, x, axis=1)])
    state = ref.state[0, head]
    o2 = dot(p, features, state.astype(dtype))
    edge = border(p, slots)
    raw = live_rows(old_k[:edge], start, slots).astype(F32)
    if p.k_scale:
        raw = raw * ref.k_scale[...]
    leaving = beside([h.astype(dtype) for h in phi(p, raw, axis=1)])  # [edge, F]
    if T > 1:
        # The first token finds every slot inside its window.
        weight = jnp.where(slot[:, :edge] < token, dot(p, features, leaving, (1, 1)), 0.0)
        o2 = o2 + dot(p, weight.astype(dtype), old_v[:edge])
    if p.memory:
        parts = [dot(p, features[i * T : (i + 1) * T], ref.memory[h].astype(dtype)) for i, h in enumerate(heads)]
        o2 = o2 + below(parts)
    gone = live_rows(old_v[:edge], 0, length)
    ref.next_state[0, head] = state + dot(p, leaving, gone, (0, 0))

    # Norms, mix, store.
    o1 = o1 * lax.rsqrt(jnp.sum(o1 * o1, axis=1, keepdims=True) * (1 / p.true_value_dim) + eps * total * total)
    o2 = o2 * lax.rsqrt(jnp.sum(o2 * o2, axis=1, keepdims=True) * (1 / p.true_value_dim) + eps)
    for i, h in enumerate(heads):
        at = slice(i * T, (i + 1) * T)
        gain = slice(h * p.value_dim, (h + 1) * p.value_dim)
        out = o1[at] * ref.swa_weight[:, gain] + o2[at] * ref.rla_weight[:, gain]
        ref.out[0, :, gain] = live_rows(out, 0, length).astype(ref.out.dtype)
