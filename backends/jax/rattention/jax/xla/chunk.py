"""One chunk of queries: both branches, norms and mix, and the step of the linear state.

Shapes: C queries, N = prefix + C keys (all of them for window None), h kv head, g query head of its group. Tensors come
and go in the public layout and storage dtype; inside everything is float32 (float64 in float64 calls).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from rattention.jax.xla.parts import mix, per_channel, phi, rotate, wide
from rattention.jax.xla.plan import Plan

Arrays = dict[str, Any]


def run_chunk(plan: Plan, state: Any, data: Arrays, fixed: Arrays) -> tuple[Any, jax.Array]:
    """Outputs `[B, C, Hq, Dv]` of one chunk, and the state for the next.

    Args:
        plan: the cut.
        state: `[B, Hkv, F, Dv]`, or None where nothing is folded and no initial state is given.
        data: differentiable arrays: `q [B, C, Hq, D]`, `k [B, N, Hkv, D]`, `v [B, N, Hkv, Dv]` (N = C, the chunk that
            leaves the window, without the softmax branch), and those of `q_scale`, `k_scale`, `memory`, `swa_weight`,
            `rla_weight` that the call has.
        fixed: the rest: `index` of the chunk; `start [B or 1]`, the first key that exists; `scale`, `eps`;
            `fold [B or 1, C]`, keys that may enter the state; with a rotary table its rows `rope_q [B or 1, C, 2, D/2]`
            and `rope_k [B or 1, N, 2, D/2]`; with segments `order_q`, `order_k`, and the segment to which the state
            belongs on either side, `before` and `after` `[B]`.
    """
    batch, queries, heads, dim = data["q"].shape
    kv_heads, channels = data["v"].shape[2:]
    group = heads // kv_heads
    # Heads before tokens, once: as the matrix products want them. Queries of a group share the rows of one tile.
    q = wide(data["q"]).reshape(batch, queries, kv_heads, group, dim).transpose(0, 2, 1, 3, 4)
    k, v = (wide(data[name]).swapaxes(1, 2) for name in "kv")
    swa = rla = jnp.zeros((batch, kv_heads, queries, group, channels), q.dtype)
    if plan.softmax:
        swa = _softmax_branch(plan, q, k, v, fixed)
    if plan.mix or not plan.softmax:
        rla, state = _linear_branch(plan, state, q, k, v, data, fixed)
    if plan.mix:
        a, b = (wide(data[n]).reshape(1, kv_heads, 1, group, channels) for n in ("swa_weight", "rla_weight"))
        out = mix(swa, rla, a, b, fixed["eps"])
    else:
        out = swa if plan.softmax else rla
    out = out.swapaxes(1, 2).reshape(batch, queries, heads, channels)
    return state, out.astype(data["q"].dtype)


def _softmax_branch(plan: Plan, q: jax.Array, k: jax.Array, v: jax.Array, fixed: Arrays) -> jax.Array:
    if "rope_q" in fixed:
        q, k = rotate(q, fixed["rope_q"][:, None, :, None]), rotate(k, fixed["rope_k"][:, None])
    scores = _dot(plan, "bhcgd,bhnd->bhcgn", q * jnp.asarray(fixed["scale"], q.dtype), k)
    scores = jnp.where(_window_mask(plan, fixed)[:, None, :, None], scores, -jnp.inf)
    # Every query sees at least itself, dead ones included, so the maximum is -inf only where the scores are.
    top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    p = jnp.exp(scores - top)
    return _dot(plan, "bhcgn,bhnv->bhcgv", p, v) / jnp.sum(p, axis=-1, keepdims=True)


def _window_mask(plan: Plan, fixed: Arrays) -> jax.Array:
    """`[B or 1, C, N]`: which keys each query attends to (SWA-1, SEG-1)."""
    query = jnp.arange(plan.chunk, dtype=jnp.int32)[None, :, None]
    key = jnp.arange(plan.span, dtype=jnp.int32)[None, None, :]
    first = fixed["index"] * plan.chunk
    if plan.full:
        inside = key <= first + query + plan.prefix
        first = 0
    else:
        inside = (key >= query) & (key <= query + plan.prefix)
    if plan.segmented:
        return inside & (fixed["order_q"][:, :, None] == fixed["order_k"][:, None, :])
    return inside & (key + first >= fixed["start"][:, None, None])


def _linear_branch(
    plan: Plan, state: Any, q: jax.Array, k: jax.Array, v: jax.Array, data: Arrays, fixed: Arrays
) -> tuple[jax.Array, Any]:
    out = jnp.zeros((*q.shape[:-1], v.shape[-1]), q.dtype)
    if state is None and "memory" not in data:
        return out, None
    features = phi(per_channel(q, wide(data["q_scale"])) if "q_scale" in data else q, plan.feature_map)
    if state is not None:
        out = _dot(plan, "bhcgf,bhfv->bhcgv", features, state)
        if plan.segmented:
            reads = fixed["order_q"] == fixed["before"][:, None]
            out = jnp.where(reads[:, None, :, None, None], out, 0)
    if "memory" in data:
        memory = data["memory"].reshape(q.shape[1], q.shape[3], *data["memory"].shape[1:])
        out = out + _dot(plan, "bhcgf,hgfv->bhcgv", features, memory)
    if not plan.linear or state is None:
        return out, state
    k, v = k[:, :, : plan.chunk], v[:, :, : plan.chunk]
    leaving = phi(per_channel(k, wide(data["k_scale"])) if "k_scale" in data else k, plan.feature_map)
    scores = _dot(plan, "bhcgf,bhnf->bhcgn", features, leaving)
    scores = jnp.where(_behind_mask(plan, fixed)[:, None, :, None], scores, 0)
    out = out + _dot(plan, "bhcgn,bhnv->bhcgv", scores, v)
    fold = fixed["fold"]
    if plan.segmented:
        fold = fold & (fixed["order_k"][:, : plan.chunk] == fixed["after"][:, None])
        state = jnp.where((fixed["before"] == fixed["after"])[:, None, None, None], state, 0)
    leaving = jnp.where(fold[:, None, :, None], leaving, 0)
    return out, state + _dot(plan, "bhnf,bhnv->bhfv", leaving, v)


def _behind_mask(plan: Plan, fixed: Arrays) -> jax.Array:
    """`[B or 1, C, C]`: which keys of the chunk have left the window of each query (RLA-1, SEG-2)."""
    query = jnp.arange(plan.chunk, dtype=jnp.int32)[None, :, None]
    key = jnp.arange(plan.chunk, dtype=jnp.int32)[None, None, :]
    behind = key <= query if plan.inclusive else key < query
    if plan.segmented:
        behind = behind & (fixed["order_q"][:, :, None] == fixed["order_k"][:, None, : plan.chunk])
    return behind


def _dot(plan: Plan, subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, x, y, precision=plan.precision, preferred_element_type=x.dtype)
