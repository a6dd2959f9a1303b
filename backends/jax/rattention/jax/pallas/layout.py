"""From the tensors of the contract to the operands of the kernels, in operations that differentiate themselves.

[B, T, H, D] becomes [B, T, H*D], a reshape that a projection's output never left; D and Dv are padded where lanes need
it; per-token tables and segment bookkeeping are made here. All of it is linear in the differentiable tensors, so the
gradients of the public shapes follow from those of the kernels' shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from rattention.jax.pallas.config import Config
from rattention.jax.pallas.plan import Plan

F32 = jnp.float32


def padded_dim(dim: int, kv_heads: int, interpret: bool) -> int:
    """64 where pairs of heads fill the lanes, else the next multiple of 128; interpreted, of 8, which is enough."""
    if interpret and dim <= 64:
        return -(-dim // 8) * 8
    if dim <= 64 and kv_heads % 2 == 0:
        return 64
    return -(-dim // 128) * 128


def pad_channels(x: Any, axis: int, to: int, split: bool) -> Any:
    """Zeros behind the channels of `axis`, or with `split` behind each half of them."""
    size = x.shape[axis]
    if size == to:
        return x
    if not split:
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, to - size)
        return jnp.pad(x, widths)
    halves = jnp.split(x, 2, axis=axis)
    return jnp.concatenate([pad_channels(h, axis, to // 2, False) for h in halves], axis=axis)


def cut_channels(x: Any, axis: int, to: int, split: bool) -> Any:
    """The inverse of `pad_channels`."""
    if x.shape[axis] == to:
        return x
    if not split:
        return _first(x, axis, to)
    halves = jnp.split(x, 2, axis=axis)
    return jnp.concatenate([_first(h, axis, to // 2) for h in halves], axis=axis)


def _first(x: Any, axis: int, to: int) -> Any:
    at = [slice(None)] * x.ndim
    at[axis] = slice(0, to)
    return x[tuple(at)]


def flat(x: Any, to: int, split: bool) -> Any:
    """[B, T, H, D] as [B, T, H*Dp]."""
    x = pad_channels(x, 3, to, split)
    return x.reshape(*x.shape[:2], x.shape[2] * x.shape[3])


def state_in(p: Plan, x: Any) -> Any:
    """[..., F, Dv] as the kernels hold it, each half of F padded like D."""
    halves = jnp.split(x.astype(F32), p.halves, axis=-2)
    halves = [pad_channels(h, h.ndim - 2, p.key_dim, p.split) for h in halves]
    return pad_channels(jnp.concatenate(halves, axis=-2), x.ndim - 1, p.value_dim, False)


def state_out(p: Plan, x: Any) -> Any:
    """The inverse of `state_in`."""
    halves = [cut_channels(h, h.ndim - 2, p.true_key_dim, p.split) for h in jnp.split(x, p.halves, axis=-2)]
    return cut_channels(jnp.concatenate(halves, axis=-2), x.ndim - 1, p.true_value_dim, False)


def unflat(p: Plan, x: Any) -> Any:
    """[B, T, Hq*Dvp] as [B, T, Hq, Dv]."""
    return cut_channels(x.reshape(*x.shape[:2], p.q_heads, p.value_dim), 3, p.true_value_dim, False)


def differentiable(p: Plan, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Operands that carry gradients."""
    given = {
        "q": flat(tensors["q"], p.key_dim, p.split),
        "k": flat(tensors["k"], p.key_dim, p.split),
        "v": flat(tensors["v"], p.value_dim, False),
    }
    if p.mode == "mix":
        for name in ("swa_weight", "rla_weight"):
            given[name] = pad_channels(tensors[name].astype(F32), 1, p.value_dim, False).reshape(1, -1)
    for name in ("q_scale", "k_scale"):
        if getattr(p, name):
            given[name] = pad_channels(tensors[name].astype(F32), 0, p.key_dim, p.split)[None]
    if p.memory:
        given["memory"] = state_in(p, tensors["memory"])
    if p.initial:
        given["initial"] = state_in(p, tensors["initial_state"])
    return given


def steering(p: Plan, tensors: Mapping[str, Any], scale: Any, attrs: Mapping[str, Any]) -> dict[str, Any]:
    """Operands that carry none: numbers, rotary rows, segments."""
    given: dict[str, Any] = {
        "numbers": numbers(scale, attrs),
        "limits": jnp.full((1, 1, 1), p.keys - max(p.window, 0), jnp.int32),
    }
    if p.segments:
        ids = tensors["segment_ids"]
        ids = jnp.pad(ids, ((0, 0), (0, p.steps * p.step - ids.shape[1])))
        given["ids"] = ids[:, None]
        given["owners"], end = owners(p, ids)
        given["limits"] = (end - max(p.window, 0))[:, None, None]
    if p.rope:
        positions = tensors.get("positions")
        if positions is None:
            positions = default_positions(p, tensors.get("segment_ids"))
        given["rope"] = rotary_rows(p, tensors["rope_cos"], tensors["rope_sin"], positions)
    return given


def numbers(scale: Any, attrs: Mapping[str, Any]) -> Any:
    """Scale of the scores and eps, as the kernels read them."""
    return jnp.stack([jnp.asarray(scale, F32), jnp.asarray(attrs.get("eps", 1e-6), F32)]).reshape(1, 1, 2)


def scale_of(call: Any) -> Any:
    """The factor on the scores, 1/sqrt(D) unless given (SWA-2)."""
    scale = call.attributes.get("scale")
    return call.dims["D"] ** -0.5 if scale is None else scale


def owners(p: Plan, ids: Any) -> tuple[Any, Any]:
    """Whose segment the state holds at each chunk [B, 1, chunks and more], and the end [B] of the last segment.

    At chunk c the state ends before token (c - R) C; it belongs to the last segment that began before that token, and
    to the first of the row where none did. The backward asks for up to R chunks, rounded up to steps, past the last.
    """
    length = ids.shape[1]
    index = jnp.arange(length, dtype=jnp.int32)
    live = ids != 0
    end = jnp.max(jnp.where(live, index + 1, 0), axis=1, initial=0)
    chunks = p.steps * p.m
    bounds = (jnp.arange(chunks + p.back * p.m + p.R + 2, dtype=jnp.int32) - p.R) * p.C
    begun = live[:, None, :] & (index[None, None, :] < bounds[None, :, None])
    newest = jnp.max(jnp.where(begun, index, -1), axis=2, initial=-1)
    oldest = jnp.min(jnp.where(live, index, length), axis=1, initial=length)
    at = jnp.clip(jnp.where(newest < 0, oldest[:, None], newest), 0, length - 1)
    return jnp.take_along_axis(ids, at, axis=1)[:, None].astype(jnp.int32), end.astype(jnp.int32)


def default_positions(p: Plan, ids: Any) -> Any:
    """Index within the segment [1 or B, keys] (ROPE-4, SEG-3)."""
    index = jnp.arange(p.keys, dtype=jnp.int32)[None]
    if ids is None:
        return index
    before = jnp.pad(ids[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    starts = jnp.where(ids != before, index, 0)
    return index - jax.lax.cummax(starts, axis=1)


def rotary_rows(p: Plan, cos: Any, sin: Any, positions: Any) -> Any:
    """(cos, cos, -sin, sin) of each token, [1 or B, keys, 2D] float32; padded channels are left where they are."""
    if cos.shape[0] == 0:
        cos, sin = (jnp.zeros((1, x.shape[1]), x.dtype) for x in (cos, sin))
    half = p.key_dim // 2
    rows = [jnp.take(x.astype(F32), positions, axis=0, mode="clip") for x in (cos, sin)]
    c, s = (jnp.pad(x, ((0, 0), (0, 0), (0, half - x.shape[-1]))) for x in rows)
    return jnp.concatenate([c, c, -s, s], axis=-1)


def make(
    shape: Mapping[str, int],
    dtype: str,
    mode: str,
    attrs: Mapping[str, Any],
    present: Mapping[str, bool],
    final: bool,
    prefix: int,
    exact: bool,
    config: Config,
    interpret: bool,
) -> Plan:
    """The plan of a call."""
    kv = shape["Hkv"]
    D, Dv = padded_dim(shape["D"], kv, interpret), padded_dim(shape["Dv"], kv, interpret)
    keys = prefix * config.chunk * config.blocks + shape["T"]
    window = attrs["window"]
    return Plan(
        batch=shape["B"],
        tokens=shape["T"],
        q_heads=shape["Hq"],
        kv_heads=kv,
        key_dim=D,
        value_dim=Dv,
        true_key_dim=shape["D"],
        true_value_dim=shape["Dv"],
        split=present["rope"] and shape["D"] != D,
        window=keys if window is None else min(window, keys),
        prefix=prefix,
        mode=mode,
        feature_map=attrs.get("feature_map", "softmax"),
        dtype=dtype,
        rope=present["rope"],
        q_scale=present["q_scale"],
        k_scale=present["k_scale"],
        memory=present["memory"],
        initial=present["initial"],
        segments=present["segments"],
        final=final,
        exact=exact,
        config=config,
        interpret=interpret,
    )
