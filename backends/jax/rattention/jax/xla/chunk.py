"""One chunk of queries: both branches, norms and mix, and the step of the linear state.

Shapes: C queries, N = prefix + C keys (all of them for window None), b batch, h kv head, g query head of its group.
Everything here is float32 (float64 in float64 calls), whatever the storage dtype of the call.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from rattention.jax.xla.parts import mix, phi
from rattention.jax.xla.plan import Plan


def run_chunk(plan: Plan, state: Any, data: dict[str, Any], ints: dict[str, Any]) -> tuple[Any, jax.Array]:
    """Outputs of one chunk, and the state for the next.

    Args:
        plan: the cut.
        state: `[b, h, F, Dv]`, or None where nothing is folded and no initial state is given.
        data: differentiable arrays, those the plan asks for: `qs [b, h, g, C, D]` scaled and rotated queries,
            `ks [b, h, N, D]` rotated keys, `v [b, h, N, Dv]`; `qf`, `kf [b, h, C, D]` queries and keys of the
            feature map (keys of the chunk that leaves the window); `memory [h, g, F, Dv]`; `swa_weight`,
            `rla_weight` `[h, g, 1, Dv]`.
        ints: `index` of the chunk; `start [B or 1]`, the first key that exists; `eps`; with segments `order_q`,
            `order_k`, `before`, `after` (the segment to which the state belongs on either side); `fold [B or 1, C]`,
            keys that may enter the state.
    """
    value_shape = (*_rows(data).shape[:-1], data["v"].shape[-1])
    zeros = jnp.zeros(value_shape, data["v"].dtype)
    swa = _softmax_branch(plan, data, ints) if plan.softmax else zeros
    if not plan.mix and plan.softmax:
        return state, swa
    rla, state = _linear_branch(plan, state, data, ints, zeros)
    if not plan.mix:
        return state, rla
    return state, mix(swa, rla, data["swa_weight"], data["rla_weight"], ints["eps"])


def _rows(data: dict[str, Any]) -> jax.Array:
    return data["qs"] if "qs" in data else data["qf"]


def _softmax_branch(plan: Plan, data: dict[str, Any], ints: dict[str, Any]) -> jax.Array:
    scores = _dot(plan, "bhgcd,bhnd->bhgcn", data["qs"], data["ks"])
    scores = jnp.where(_window_mask(plan, ints)[:, None, None], scores, -jnp.inf)
    # Every query sees at least itself, dead ones included, so the maximum is -inf only where the scores are.
    top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    p = jnp.exp(scores - top)
    return _dot(plan, "bhgcn,bhnv->bhgcv", p, data["v"]) / jnp.sum(p, axis=-1, keepdims=True)


def _window_mask(plan: Plan, ints: dict[str, Any]) -> jax.Array:
    """`[B or 1, C, N]`: which keys each query attends to (SWA-1, SEG-1)."""
    query = jnp.arange(plan.chunk, dtype=jnp.int32)[:, None]
    key = jnp.arange(plan.span, dtype=jnp.int32)[None, :]
    first = ints["index"] * plan.chunk
    if plan.full:
        inside = key <= first + query + plan.prefix
        first = 0
    else:
        inside = (key >= query) & (key <= query + plan.prefix)
    if plan.segmented:
        return inside & (ints["order_q"][:, :, None] == ints["order_k"][:, None, :])
    return inside & (key + first >= ints["start"][:, None, None])


def _linear_branch(
    plan: Plan, state: Any, data: dict[str, Any], ints: dict[str, Any], zeros: jax.Array
) -> tuple[jax.Array, Any]:
    if not plan.linear and state is None and "memory" not in data:
        return zeros, None
    features = phi(data["qf"], plan.feature_map)
    out = zeros
    if state is not None:
        out = _dot(plan, "bhgcf,bhfv->bhgcv", features, state)
        if plan.segmented:
            reads = ints["order_q"] == ints["before"][:, None]
            out = jnp.where(reads[:, None, None, :, None], out, 0)
    if "memory" in data:
        out = out + _dot(plan, "bhgcf,hgfv->bhgcv", features, data["memory"])
    if not plan.linear or state is None:
        return out, state
    v = data["v"][:, :, : plan.chunk]
    kf = phi(data["kf"], plan.feature_map)
    scores = _dot(plan, "bhgcf,bhkf->bhgck", features, kf)
    scores = jnp.where(_behind_mask(plan, ints)[:, None, None], scores, 0)
    out = out + _dot(plan, "bhgck,bhkv->bhgcv", scores, v)
    fold = ints["fold"]
    if plan.segmented:
        fold = fold & (ints["order_k"][:, : plan.chunk] == ints["after"][:, None])
        state = jnp.where((ints["before"] == ints["after"])[:, None, None, None], state, 0)
    kf = jnp.where(fold[:, None, :, None], kf, 0)
    return out, state + _dot(plan, "bhkf,bhkv->bhfv", kf, v)


def _behind_mask(plan: Plan, ints: dict[str, Any]) -> jax.Array:
    """`[B or 1, C, C]`: which keys of the chunk have left the window of each query (RLA-1, SEG-2)."""
    query = jnp.arange(plan.chunk, dtype=jnp.int32)[:, None]
    key = jnp.arange(plan.chunk, dtype=jnp.int32)[None, :]
    behind = (key <= query if plan.inclusive else key < query)[None]
    if plan.segmented:
        behind = behind & (ints["order_q"][:, :, None] == ints["order_k"][:, None, : plan.chunk])
    return behind


def _dot(plan: Plan, subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, x, y, precision=plan.precision, preferred_element_type=x.dtype)
