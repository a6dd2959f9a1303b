"""The operations as functions of arrays: from the public layout to chunks and back.

`run` is the entry. It computes step by step; who calls it compiles it.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from rattention.jax.xla import parts
from rattention.jax.xla.plan import Plan, as_precision, chunk_size
from rattention.jax.xla.scan import run_chunks
from rattention.jax.xla.tokens import Tokens, of_extend, of_forward, table_rows
from rattention.spec import Call

Arrays = dict[str, Any]
LINEAR = ("q_scale", "k_scale", "memory")


def run(call: Call, tensors: Arrays, precision: object = None) -> Arrays:
    """Run one validated operation, any but rope_table, on arrays; returns its outputs by name.

    The attributes `scale` and `eps` may be traced: a compiled program can have them as operands.
    """
    op, attrs = call.operation.name, call.attributes
    tensors = {name: jnp.asarray(t) for name, t in tensors.items() if t is not None}
    feature_map, eps = attrs.get("feature_map", "softmax"), attrs.get("eps", 1e-6)
    if op == "feature_map":
        x = tensors["x"]
        return {"out": parts.phi(parts.wide(x), feature_map).astype(x.dtype)}
    if op == "rms_mix":
        wide = {name: parts.wide(t).reshape((1,) * (4 - t.ndim) + t.shape) for name, t in tensors.items()}
        return {"out": parts.mix(**wide, eps=jnp.asarray(eps, wide["swa"].dtype)).astype(tensors["swa"].dtype)}
    scale = attrs.get("scale")
    numbers = {"scale": 1 / math.sqrt(call.dims["D"]) if scale is None else scale, "eps": eps}
    precision = as_precision(precision, call.storage)
    if op == "rattention_extend":
        return _extend(attrs["window"], feature_map, precision, tensors, numbers)
    return _forward(op, attrs["window"], feature_map, precision, tensors, numbers)


def _forward(op: str, window: int | None, feature_map: str, precision: Any, given: Arrays, numbers: Arrays) -> Arrays:
    tokens = given["q"].shape[1]
    if window is not None and window >= max(tokens, 1):
        window = None  # every token stays inside every window
    where = of_forward(tokens, max(window or 0, 0), given.get("segment_ids"))
    q, k, v = (_alive(given[name], where.live) for name in "qkv")
    out, state = attend(
        op, window, feature_map, precision, where, q, k, v, given.get("initial_state"), given, numbers
    )  # fmt: skip
    outputs = {"out": out}
    if op != "sliding_window_attention":
        outputs["final_state"] = state
    return outputs


def _extend(window: int | None, feature_map: str, precision: Any, given: Arrays, numbers: Arrays) -> Arrays:
    slots, tokens = given["cache_k"].shape[1], given["q"].shape[1]
    where = of_extend(slots, tokens, given["cache_length"], given.get("lengths"))
    stored = {name: _alive(jnp.concatenate([given[f"cache_{name}"], given[name]], axis=1), where.live) for name in "kv"}
    q = _alive(given["q"], where.live, slots)
    out, state = attend(
        "rattention", window, feature_map, precision, where, q, stored["k"], stored["v"], given["cache_state"], given,
        numbers,
    )  # fmt: skip
    cache = {f"cache_{name}": _newest(stored[name], slots, tokens, window, given.get("lengths")) for name in "kv"}
    return {
        "out": out,
        **cache,
        "cache_state": state,
        "cache_length": given["cache_length"] + given.get("lengths", tokens),
    }


def _newest(x: jax.Array, slots: int, tokens: int, window: int | None, lengths: jax.Array | None) -> jax.Array:
    """The cache after the call, out of `x [B, slots + tokens, ...]`: right-aligned, newest last (EXT-4)."""
    if lengths is None:
        return x if window is None else x[:, tokens:]
    if window is None:  # slots for every token, those past `lengths` on the left and empty
        x, size = _pad_tokens(x, tokens, 0), slots + tokens
    else:
        size = slots
    return jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, size, axis=0))(x, lengths)


def attend(
    op: str, window: int | None, feature_map: str, precision: Any, where: Tokens,
    q: jax.Array, keys: jax.Array, values: jax.Array, state: jax.Array | None, given: Arrays, numbers: Arrays,
) -> tuple[jax.Array, Any]:  # fmt: skip
    """Both branches: `q [B, T, Hq, D]`, keys and values of the tokens of `where`; out `[B, T, Hq, Dv]`, state.

    The inert tokens of q, keys and values are zeros already. `given` are the other tensors, `numbers` scale and eps.
    """
    batch, tokens, heads, dim = q.shape
    kv_heads, features = keys.shape[2], dim if feature_map == "identity" else 2 * dim
    wants_linear = op != "sliding_window_attention"
    if wants_linear and state is None:
        folded = jnp.zeros((batch, kv_heads, features, values.shape[3]), parts.wide_dtype(q.dtype))
    else:
        folded = state
    if tokens == 0 or (not wants_linear and window == -1):  # SWA-5
        return jnp.zeros((batch, tokens, heads, values.shape[3]), q.dtype), folded
    size = chunk_size(tokens)
    plan = Plan(
        prefix=where.prefix,
        chunk=size,
        chunks=-(-tokens // size),
        full=window is None,
        softmax=op != "residual_linear_attention" and window != -1,
        linear=wants_linear and window is not None,
        mix=op == "rattention",
        inclusive=window == -1,
        segmented=where.segments is not None,
        feature_map=feature_map,
        precision=precision,
    )
    total = plan.chunks * plan.chunk
    rows = _chunks(plan, _pad_tokens(q, 0, total - tokens))
    # From here on the prefix is there, also in a forward, and tokens fill whole chunks.
    left, right = plan.prefix + tokens - keys.shape[1], total - tokens
    windowed = {"k": _pad_tokens(keys, left, right), "v": _pad_tokens(values, left, right)}
    used = (("swa_weight", "rla_weight") if plan.mix else ()) + (LINEAR if wants_linear else ())
    params = {name: given[name] for name in used if name in given}
    fixed = _fixed(plan, where, numbers)
    if plan.softmax and "rope_cos" in given:
        table = table_rows(parts.wide(given["rope_cos"]), parts.wide(given["rope_sin"]), where, given.get("positions"))
        fixed["windowed"]["rope_k"] = table = _pad_tokens(table, left, right)
        fixed["steps"]["rope_q"] = _chunks(plan, table[:, plan.prefix :])
    carried = folded if plan.linear or state is not None else None
    out, after = run_chunks(plan, carried if wants_linear else None, rows, windowed, params, fixed)
    out = jnp.swapaxes(out, 0, 1).reshape(batch, total, heads, values.shape[3])[:, :tokens]
    if where.segments is not None and not plan.linear and folded is not None:
        folded = jnp.where((where.segments.first == where.segments.last)[:, None, None, None], folded, 0)
    return _alive(out, where.live, -tokens), after if plan.linear else folded


def _fixed(plan: Plan, where: Tokens, numbers: Arrays) -> dict[str, Arrays]:
    """What the scan reads and does not differentiate, see `run_chunk`."""
    total = plan.chunks * plan.chunk
    index = jnp.arange(total, dtype=jnp.int32).reshape(plan.chunks, 1, plan.chunk)
    steps: Arrays = {"fold": index < where.end[None, :, None]}
    windowed: Arrays = {}
    if where.segments is not None:
        order, first, last = where.segments
        windowed["order_k"] = padded = jnp.pad(order, ((0, 0), (0, plan.prefix + total - order.shape[1])))
        steps["order_q"] = _chunks(plan, padded[:, plan.prefix :])
        # The state at a border belongs to the segment of the last token before it; one that nothing is folded into
        # stays that of the first segment.
        border = padded[:, plan.chunk - 1 : total - 1 : plan.chunk] if plan.linear else padded[:, : plan.chunks - 1] * 0
        border = jnp.maximum(border, first[:, None]).T
        steps["before"] = jnp.concatenate([first[None], border])
        steps["after"] = jnp.concatenate([border, last[None]])
    return {"steps": steps, "windowed": windowed, "whole": numbers | {"start": where.start}}


def _chunks(plan: Plan, x: jax.Array) -> jax.Array:
    """`[B, chunks * C, ...]` to `[chunks, B, C, ...]`."""
    return jnp.swapaxes(x.reshape(x.shape[0], plan.chunks, plan.chunk, *x.shape[2:]), 0, 1)


def _alive(x: jax.Array, live: jax.Array | None, at: int = 0) -> jax.Array:
    """`x` at the tokens `live[:, at:]`, 0 elsewhere. Select, do not multiply: what inert tokens hold, NaN included,
    ends here, and so do their cotangents."""
    return x if live is None else jnp.where(live[:, at:, None, None], x, jnp.zeros((), x.dtype))


def _pad_tokens(x: jax.Array, left: int, right: int) -> jax.Array:
    return x if not left and not right else jnp.pad(x, ((0, 0), (left, right), (0, 0), (0, 0)))
