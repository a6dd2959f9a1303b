"""One device's part of a split sequence: the continuation of the tokens of the devices before it.

Device d holds tokens d L .. (d+1) L - 1 and needs two things of those before, both small.

- The halo, the last max(w, 0) keys and values before its own (`exchange.halo`).
- The state of all tokens older than the halo. The L tokens that leave the window on device e add up to one
  contribution, and the state of device d is their sum over the devices before it (`exchange.exclusive_sum`).

With segments, both are cut at the borders: slots of another document are masked, and a contribution counts as long as
its document lasts. The ids themselves are known to every device, so where they cut is decided without a message.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from rattention.jax import dispatch
from rattention.jax.missing import mark, replace
from rattention.jax.sharded import exchange
from rattention.jax.xla.ops import attend
from rattention.jax.xla.parts import per_channel, phi, wide
from rattention.jax.xla.plan import as_precision
from rattention.jax.xla.tokens import Segments, Tokens, of_forward

Arrays = dict[str, Any]


def on_one_device(
    op: str, tensors: Arrays, attrs: Arrays, impl: str | None, precision: object, rows_exist: bool
) -> Arrays:
    """An operation on the shard of one device."""
    call, arrays, _ = dispatch.check(op, tensors, attrs)
    return dispatch.compute(dispatch.choose(call, arrays, impl, precision), call, arrays, precision, rows_exist)


def one_row(
    tensors: Arrays, *, axis: str, devices: int, attrs: Arrays, impl: str | None, precision: object
) -> tuple[jax.Array, jax.Array]:
    """Out and final state of a sequence without segments: `rattention_extend` with halo and state as its cache."""
    k, v = tensors["k"], tensors["v"]
    batch, length = k.shape[:2]
    slots = max(attrs["window"], 0)
    halo_k, halo_v = (exchange.halo(x, slots, axis, devices) for x in (k, v))
    place = lax.axis_index(axis)
    # Without a device before it, slots hold zeros; they are also marked unused by the length.
    seen = jnp.full((batch,), place * length, jnp.int32)
    real = jnp.arange(length, dtype=jnp.int32)[None] - slots >= -seen[:, None]
    added = _leaving(halo_k, halo_v, tensors, real, attrs["feature_map"], precision)
    state = exchange.exclusive_sum(added, axis, devices)
    if "initial_state" in tensors:
        state = state + tensors["initial_state"]
    given = {name: x for name, x in tensors.items() if name != "initial_state"}
    cache = {"cache_k": halo_k, "cache_v": halo_v, "cache_state": state, "cache_length": seen}
    # The validation has seen that the table has a row for each token of the whole sequence.
    outputs = on_one_device("rattention_extend", given | cache, attrs, impl, precision, rows_exist=True)
    return outputs["out"], _of_the_last(outputs["cache_state"], axis, devices)


def documents(
    tensors: Arrays,
    *,
    axis: str,
    devices: int,
    attrs: Arrays,
    precision: object,
    missing: Callable[[Arrays], tuple[jax.Array, jax.Array] | None] | None,
) -> tuple[jax.Array, jax.Array]:
    """Out and final state of a sequence with segments or explicit positions, given whole `[B, T]` to every device.

    `missing` finds the tokens of the whole row that have no row in the rotary table; None where all have one.
    """
    q, k, v = (tensors[name] for name in "qkv")
    batch, length = k.shape[:2]
    slots = max(attrs["window"], 0)
    place = lax.axis_index(axis)
    ids = tensors.get("segment_ids")
    if ids is None:
        ids = jnp.ones((batch, length * devices), jnp.int32)
    whole = of_forward(length * devices, slots, ids)
    assert whole.segments is not None
    first = whole.segments.first
    here = _shard(whole, ids, tensors.get("positions"), length, place, devices)
    live, segments = here.live, here.segments
    assert live is not None
    assert segments is not None

    without = None if missing is None else missing(tensors)
    if without is not None:
        own, touched = (lax.dynamic_slice_in_dim(x, place * length, length, axis=1) for x in without)
        q = mark(q, own)

    # What inert tokens hold, NaN included, does not even leave its device.
    q, k, v = (jnp.where(live[:, slots:, None, None], x, jnp.zeros((), x.dtype)) for x in (q, k, v))
    halo_k, halo_v = (exchange.halo(x, slots, axis, devices) for x in (k, v))
    fold = live & (jnp.arange(slots + length, dtype=jnp.int32)[None] < here.end[:, None])
    fold &= segments.order == segments.last[:, None]
    added = _leaving(halo_k, halo_v, tensors | {"k": k, "v": v}, fold[:, :length], attrs["feature_map"], precision)
    before = segments.first  # the segment of the state that comes in
    state = exchange.exclusive_sum(
        added, axis, devices, joined=lambda hop: _entering(whole.segments, length, place - hop) == before
    )
    if "initial_state" in tensors:
        state = state + jnp.where((before == first)[:, None, None, None], tensors["initial_state"], 0)
    scale = attrs["scale"]
    numbers = {"scale": 1 / math.sqrt(q.shape[-1]) if scale is None else scale, "eps": attrs["eps"]}
    given = {name: x for name, x in tensors.items() if name not in ("positions", "segment_ids")}
    keys, values = (jnp.concatenate(pair, axis=1) for pair in ((halo_k, k), (halo_v, v)))
    out, after = attend(
        "rattention", attrs["window"], attrs["feature_map"], as_precision(precision, str(q.dtype)),
        here, q, keys, values, state, given, numbers,
    )  # fmt: skip
    out = out if without is None else replace(out, touched)
    return out, _of_the_last(after, axis, devices)


def _shard(
    whole: Tokens, ids: jax.Array, positions: jax.Array | None, length: int, place: jax.Array, devices: int
) -> Tokens:
    """The tokens of one device, those of its halo before them, out of the tokens of the whole row."""
    slots, segments = whole.prefix, whole.segments
    assert segments is not None

    def cut(x: jax.Array) -> jax.Array:
        padded = x if x.shape[1] == slots + length * devices else jnp.pad(x, ((0, 0), (slots, 0)))
        return lax.dynamic_slice_in_dim(padded, place * length, slots + length, axis=1)

    last = jnp.where(place == devices - 1, segments.last, _entering(segments, length, place + 1))
    return Tokens(
        prefix=slots,
        live=cut(ids != 0),
        start=whole.start,
        end=whole.end - place * length,
        positions=cut(jnp.broadcast_to(whole.positions if positions is None else positions, ids.shape)),
        segments=Segments(cut(segments.order), _entering(segments, length, place), last),
    )


def _entering(segments: Segments | None, length: int, place: Any) -> jax.Array:
    """`[B]`, the segment whose state enters device `place`: that of the last token that has left the window there."""
    assert segments is not None
    order = segments.order  # [B, slots + T]: before device p, the tokens up to index p L - 1 have left
    at = jnp.maximum(place * length - 1, 0)
    return jnp.maximum(lax.dynamic_index_in_dim(order, at, axis=1, keepdims=False), segments.first)


def _leaving(
    halo_k: jax.Array, halo_v: jax.Array, tensors: Arrays, real: jax.Array, feature_map: str, precision: object
) -> jax.Array:
    """phi(k)^T v of the L tokens that leave the window on this device, the oldest of halo and own, where `real`."""
    length = tensors["k"].shape[1]
    k = wide(jnp.concatenate([halo_k, tensors["k"]], axis=1)[:, :length])
    v = wide(jnp.concatenate([halo_v, tensors["v"]], axis=1)[:, :length])
    if "k_scale" in tensors:
        k = per_channel(k, wide(tensors["k_scale"]))
    features = jnp.where(real[:, :, None, None], phi(k, feature_map), 0)
    return jnp.einsum(
        "bthf,bthv->bhfv",
        features,
        v,
        precision=as_precision(precision, str(tensors["k"].dtype)),
        preferred_element_type=features.dtype,
    )


def _of_the_last(state: jax.Array, axis: str, devices: int) -> jax.Array:
    """The state of the last device, on every device."""
    return lax.psum(jnp.where(lax.axis_index(axis) == devices - 1, state, 0), axis)
