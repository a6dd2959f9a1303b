"""`rattention_extend` on the kernels: decode where a few tokens meet a full-size cache, else the forward over
[cache | new tokens] with queries for the new ones alone. Its gradient is that of the whole form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from rattention.jax.pallas import calls, decode, layout
from rattention.jax.pallas.once import once
from rattention.jax.pallas.plan import Plan

CACHE = ("cache_k", "cache_v", "cache_state")


def decodes(call: Any) -> bool:
    """Whether the decode kernel runs this call."""
    window, T = call.attributes["window"], call.dims["T"]
    return window is not None and 1 <= T <= min(decode.LONGEST, window)


def slots_after(x: Any, new: Any, start: Any, lengths: Any, count: int) -> Any:
    """The last `count` slots [B, count, ...] of [cache | new tokens] cut at `lengths`, zeros before `start`."""
    joined = jnp.concatenate([x, new], axis=1)
    source = x.shape[1] + lengths[:, None] - count + jnp.arange(count, dtype=jnp.int32)[None]
    live = source >= start[:, None]
    taken = jnp.take_along_axis(joined, jnp.clip(source, 0, max(joined.shape[1] - 1, 0))[..., None, None], axis=1)
    return jnp.where(live[..., None, None], taken, jnp.zeros_like(taken))


def bounds(call: Any, tensors: Mapping[str, Any]) -> tuple[Any, Any]:
    """Index [B] of the first cached slot that exists, and new tokens [B] that are real."""
    W, T = call.dims["W"], call.dims["T"]
    seen = tensors["cache_length"]
    lengths = tensors["lengths"] if "lengths" in tensors else jnp.full_like(seen, T)
    return W - jnp.minimum(seen, W), lengths


def next_cache(call: Any, tensors: Mapping[str, Any]) -> dict[str, Any]:
    start, lengths = bounds(call, tensors)
    count = call.dims["Wnext"]
    found = {}
    for name, new in (("cache_k", "k"), ("cache_v", "v")):
        found[name] = slots_after(tensors[name], tensors[new], start, lengths, count)
    found["cache_length"] = tensors["cache_length"] + lengths
    return found


def plan(
    call: Any, tensors: Mapping[str, Any], padded: int, prefix: int, exact: bool, config: Any, interpret: bool
) -> Plan:
    """Of the forward over [cache | new]; `padded` is the query tokens of the plan."""
    dims = {name: call.dims[name] for name in ("B", "Hq", "Hkv", "D", "Dv")} | {"T": padded}
    present = {name: name in tensors for name in ("q_scale", "k_scale", "memory")}
    present |= {"rope": "rope_cos" in tensors, "initial": True, "segments": True}
    return layout.make(dims, call.storage, "mix", call.attributes, present, True, prefix, exact, config, interpret)


def joined(call: Any, tensors: Mapping[str, Any], pad: int) -> dict[str, Any]:
    """[padding | cache | new tokens] with ids 1 where a token is and 0 elsewhere, and absolute positions."""
    W, T = call.dims["W"], call.dims["T"]
    start, lengths = bounds(call, tensors)
    index = jnp.arange(W + T, dtype=jnp.int32)[None]
    live = (index >= start[:, None]) & (index < W + lengths[:, None])
    ids = jnp.pad(live.astype(jnp.int32), ((0, 0), (pad, 0)))
    positions = tensors["cache_length"][:, None] - W + index
    found = dict(tensors) | {"segment_ids": ids, "initial_state": tensors["cache_state"]}
    found["positions"] = jnp.pad(jnp.where(live, positions, 0), ((0, 0), (pad, 0)))
    for name in ("k", "v"):
        both = jnp.concatenate([tensors[f"cache_{name}"], tensors[name]], axis=1)
        found[name] = jnp.pad(both, ((0, 0), (pad, 0), (0, 0), (0, 0)))
    return found


def fast(call: Any, tensors: Mapping[str, Any], exact: bool, config: Any, interpret: bool) -> dict[str, Any]:
    """Queries for the new tokens alone."""
    W, T = call.dims["W"], call.dims["T"]
    if decodes(call):
        return run_decode(call, tensors, exact, config, interpret)
    step = config.chunk * config.blocks
    prefix = -(-W // step)
    p = plan(call, tensors, T, prefix, exact, config, interpret)
    inputs = joined(call, tensors, prefix * step - W)
    given = layout.differentiable(p, inputs)
    results = calls.run_forward(p, given | layout.steering(p, inputs, layout.scale_of(call), call.attributes), False)
    return {
        "out": layout.unflat(p, results["out"]),
        "cache_state": layout.state_out(p, results["final_state"]),
    } | next_cache(call, tensors)


def whole(
    core: Any, call: Any, tensors: Mapping[str, Any], exact: bool, config: Any, interpret: bool
) -> dict[str, Any]:
    """The same by the differentiable core, with (unused) queries for the cached slots too."""
    W, T = call.dims["W"], call.dims["T"]
    p = plan(call, tensors, W + T, 0, exact, config, interpret)
    inputs = joined(call, tensors, 0)
    inputs["q"] = jnp.pad(tensors["q"], ((0, 0), (W, 0), (0, 0), (0, 0)))
    results = core(
        p, layout.differentiable(p, inputs), layout.steering(p, inputs, layout.scale_of(call), call.attributes)
    )
    return {
        "out": layout.unflat(p, results["out"])[:, W:],
        "cache_state": layout.state_out(p, results["final_state"]),
    } | next_cache(call, tensors)


def run_decode(call: Any, tensors: Mapping[str, Any], exact: bool, config: Any, interpret: bool) -> dict[str, Any]:
    p = plan(call, tensors, call.dims["T"], 0, exact, config, interpret)
    W = call.dims["W"]
    start, lengths = bounds(call, tensors)
    given = layout.differentiable(p, dict(tensors) | {"initial_state": tensors["cache_state"]})
    given["cache_k"] = layout.flat(tensors["cache_k"], p.key_dim, p.split)
    given["cache_v"] = layout.flat(tensors["cache_v"], p.value_dim, False)
    given["numbers"] = layout.numbers(layout.scale_of(call), call.attributes)
    given["bounds"] = jnp.stack([start, lengths], axis=-1)[:, None].astype(jnp.int32)
    if p.rope:
        at = tensors["cache_length"][:, None] + jnp.arange(-W, p.tokens, dtype=jnp.int32)[None]
        live = (at >= 0) & (at < (tensors["cache_length"] + lengths)[:, None])
        table = layout.rotary_rows(p, tensors["rope_cos"], tensors["rope_sin"], jnp.where(live, at, 0))
        given["old_rope"], given["rope"] = table[:, :W], table[:, W:]
    results = calls.run_decode(p, given)
    return {
        "out": layout.unflat(p, results["out"]),
        "cache_state": layout.state_out(p, results["next_state"]),
    } | next_cache(call, tensors)


def run(core: Any, call: Any, tensors: Mapping[str, Any], exact: bool, config: Any, interpret: bool) -> dict[str, Any]:
    """`fast` forwards, the derivative of `whole` backwards."""
    settings = (exact, config, interpret)
    names = [t.name for t in call.operation.tensors if t.differentiable and t.name in tensors]
    rest = {name: x for name, x in tensors.items() if name not in names}

    @jax.custom_vjp
    def extend(given: dict[str, Any], rest: dict[str, Any]) -> dict[str, Any]:
        return fast(call, given | rest, *settings)

    def forward(given: dict[str, Any], rest: dict[str, Any]) -> tuple[Any, Any]:
        given = once("rattention_extend", given)  # else JAX would refuse the rules of `extend`, in words of its own
        return extend(given, rest), (given, rest)

    def backward(saved: Any, cotangents: dict[str, Any]) -> tuple[Any, Any]:
        given, rest = saved
        cotangents = {name: x for name, x in cotangents.items() if name != "cache_length"}

        def floats(given: dict[str, Any]) -> dict[str, Any]:
            outputs = whole(core, call, given | rest, *settings)
            return {name: outputs[name] for name in cotangents}

        return jax.vjp(floats, given)[1](cotangents)[0], None

    extend.defvjp(forward, backward)
    return extend({name: tensors[name] for name in names}, rest)
