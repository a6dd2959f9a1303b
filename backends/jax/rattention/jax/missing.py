"""Positions without a row in the rotary table, where their values cannot be refused: traced, or on an accelerator.

Their tokens get NaN (ERR-16): as a query, and as a key in the output of each query that attends to it. The row that
the gather reads instead reaches nothing: the outputs in question are replaced, and a replaced output has no gradient.
The gradient of the token's own query is NaN, so that a training step that looks at gradients alone sees it too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from rattention.jax.xla.tokens import of_forward
from rattention.spec import Call

Arrays = dict[str, Any]


def run(implementation: Callable[[Arrays], Arrays], call: Call, tensors: Arrays) -> Arrays:
    """`implementation(tensors)` with NaN for the tokens whose position has no row."""
    found = without_row(call, tensors)
    if found is None:
        return implementation(tensors)
    own, touched = found
    outputs = implementation(tensors | {"q": mark(tensors["q"], own)})
    return outputs | {"out": replace(outputs["out"], touched)}


def mark(q: jax.Array, own: jax.Array) -> jax.Array:
    """The same queries; the gradient of those of `own [B, T]` is NaN."""
    nan = _nan_where(own, q.dtype)
    return jnp.where(jnp.isnan(nan), lax.stop_gradient(q), q * (nan + 1))


def replace(out: jax.Array, touched: jax.Array) -> jax.Array:
    """NaN for the tokens of `touched [B, T]`; no gradient flows back through them."""
    nan = _nan_where(touched, out.dtype)
    return jnp.where(jnp.isnan(nan), nan, out)


def without_row(call: Call, tensors: Arrays) -> tuple[jax.Array, jax.Array] | None:
    """`[B, T]` bool, two: tokens without a row, and tokens that attend to one. None where every token has one."""
    if "rope_cos" not in tensors or 0 in (call.dims["B"], call.dims["T"]):
        return None
    T, M = call.dims["T"], call.dims["M"]
    if "cache_length" in tensors:
        index = jnp.arange(T, dtype=jnp.int32)[None]
        positions = tensors["cache_length"][:, None] + index
        live = index < tensors["lengths"][:, None] if "lengths" in tensors else index < T
        own = live & ((positions < 0) | (positions >= M))
        return own, own  # older keys have smaller positions: where the query has a row, they do
    if "positions" not in tensors and M >= T:
        return None
    ids = tensors.get("segment_ids")
    where = of_forward(T, 0, ids)
    positions = tensors.get("positions", where.positions)
    own = (positions < 0) | (positions >= M)
    if where.live is not None:
        own = own & where.live
    if "positions" not in tensors:
        return own, own  # likewise within a segment
    # How many keys without a row stand in the window: a difference of running counts.
    count = jnp.pad(jnp.cumsum(own.astype(jnp.int32), axis=1), ((0, 0), (1, 0)))
    index = jnp.arange(T, dtype=jnp.int32)[None]
    first = jnp.zeros_like(positions) if where.segments is None else jnp.maximum(where.segments.order - 1, 0)
    if call.attributes["window"] is not None:
        first = jnp.maximum(first, index - min(max(call.attributes["window"], 0), T))
    touched = count[:, 1:] > jnp.take_along_axis(count, first, axis=1)
    return own, touched if where.live is None else touched & where.live


def _nan_where(x: jax.Array, dtype: Any) -> jax.Array:
    """`[B, T, 1, 1]`, NaN where `x [B, T]`, else 0. A gather past the end makes it: a NaN that is written out would
    stop every call under `jax_debug_nans`."""
    found = jnp.take(jnp.zeros((1,), dtype), x.astype(jnp.int32), mode="fill", fill_value=float("nan"))
    return found[:, :, None, None]
