"""The operations as functions for people. Tensor layout `[B, T, H, D]` throughout; letters as in the specification.

Every function works under jit, vmap, grad, checkpoint and shard_map over batch and heads, and over explicit mesh axes.
Tensors are JAX or NumPy arrays. Anything else is refused by name (ERR-14), and so are arrays that were put on different
devices (ERR-15). Attributes are Python values, part of the compiled program: a traced `scale` is refused (ERR-5).
Common to all:

    impl: "xla", "pallas", or None, which takes Pallas on a TPU for the calls it supports and XLA elsewhere.
    precision: of the matrix products, a `jax.lax.Precision` or its name. None keeps the promise of the specification:
        true float32 for float32 inputs, operands rounded to storage at most for 16-bit ones.
    check_values: also check the values of integer tensors that live on an accelerator, at the price of a transfer;
        those of NumPy arrays and of concrete arrays on the CPU are always checked. Where values are not looked at, a
        real token without a row in the rotary table gets NaN (ERR-16).

A rotary table is a constant: a gradient with respect to it is refused (`Unsupported`). So is the second derivative of a
call that the Pallas kernels run; `impl="xla"` has it.

They raise `rattention.spec.SpecError` for an invalid call, `ValueError` for a precision that there is not, and
`rattention.spec.Unsupported` for a valid call that the chosen implementation lacks.
"""

from __future__ import annotations

from typing import Any

import jax
from rattention.jax import arguments, dispatch
from rattention.jax.cache import Cache
from rattention.spec import SpecError


def rattention(
    q: Any,
    k: Any,
    v: Any,
    swa_weight: Any,
    rla_weight: Any,
    rope_cos: Any = None,
    rope_sin: Any = None,
    positions: Any = None,
    segment_ids: Any = None,
    q_scale: Any = None,
    k_scale: Any = None,
    memory: Any = None,
    initial_state: Any = None,
    *,
    window: int | None,
    scale: float | None = None,
    feature_map: str = "softmax",
    eps: float = 1e-6,
    return_final_state: bool = False,
    impl: str | None = None,
    precision: object = None,
    check_values: bool = False,
) -> Any:
    """RAttention: softmax over the window, linear attention over what left it, both RMS-normalised and mixed (RAT-1).

    Args:
        q: queries `[B, T, Hq, D]`, before rotary embedding; float32, bfloat16 or float16 (the storage dtype).
        k: keys `[B, T, Hkv, D]`, Hq a multiple of Hkv; query head h reads kv head h // (Hq / Hkv).
        v: values `[B, T, Hkv, Dv]`.
        swa_weight, rla_weight: `[Hq, Dv]` gains of the two branches, float32 or storage.
        rope_cos, rope_sin: `[M, D/2]` rotary table, see `rope_table`; applied to the softmax branch alone.
        positions: `[B, T]` int32 rows of the table; default: index within the segment.
        segment_ids: `[B, T]` int32; nothing crosses a border between ids, 0 is padding.
        q_scale, k_scale: `[D]` factors before the feature map.
        memory: `[Hq, F, Dv]` float32 constant state per query head.
        initial_state: `[B, Hkv, F, Dv]` float32 state carried into the call.
        window: w >= -1: token t attends to t-w .. t. None is full causal attention.
        scale: of the scores, default 1/sqrt(D).
        feature_map: softmax, relu or identity.
        eps: inside the root of both norms.

    Returns:
        `out [B, T, Hq, Dv]` in the storage dtype; with `return_final_state` the pair of it and the state
        `[B, Hkv, F, Dv]` float32 of all tokens i < T - max(w, 0).
    """
    outputs = dispatch.run(
        "rattention",
        {
            "q": q,
            "k": k,
            "v": v,
            "swa_weight": swa_weight,
            "rla_weight": rla_weight,
            "rope_cos": rope_cos,
            "rope_sin": rope_sin,
            "positions": positions,
            "segment_ids": segment_ids,
            "q_scale": q_scale,
            "k_scale": k_scale,
            "memory": memory,
            "initial_state": initial_state,
        },
        {"window": window, "scale": scale, "feature_map": feature_map, "eps": eps},
        impl=impl,
        precision=precision,
        check_values=check_values,
    )
    return (outputs["out"], outputs["final_state"]) if return_final_state else outputs["out"]


def rattention_extend(
    q: Any,
    k: Any,
    v: Any,
    swa_weight: Any,
    rla_weight: Any,
    cache: Cache,
    lengths: Any = None,
    rope_cos: Any = None,
    rope_sin: Any = None,
    q_scale: Any = None,
    k_scale: Any = None,
    memory: Any = None,
    *,
    window: int | None,
    scale: float | None = None,
    feature_map: str = "softmax",
    eps: float = 1e-6,
    impl: str | None = None,
    precision: object = None,
    check_values: bool = False,
) -> tuple[jax.Array, Cache]:
    """Continue a sequence by T tokens: prefill, chunked prefill and decode (EXT-1).

    Work and memory per token do not depend on how many came before (except for window None, whose cache grows). The
    new cache has the shapes of the old one, so `jax.jit(..., donate_argnames="cache")` updates it in place.

    Args:
        cache: from `Cache.empty` or the previous call.
        lengths: `[B]` int32, new tokens of each row that are real, the rest inert; default T for every row.
        q, k, v and the others: as in `rattention`; positions run on from `cache.length`, so the rotary table needs
            max(cache.length + lengths) rows.

    Returns:
        `out [B, T, Hq, Dv]`, 0 past lengths, and the new cache.
    """
    if not isinstance(cache, Cache):
        raise SpecError("rattention_extend", "cache", "a rattention.jax.Cache", arguments.kind(cache), "ERR-14")
    outputs = dispatch.run(
        "rattention_extend",
        {
            "q": q,
            "k": k,
            "v": v,
            "swa_weight": swa_weight,
            "rla_weight": rla_weight,
            "cache_k": cache.k,
            "cache_v": cache.v,
            "cache_state": cache.state,
            "cache_length": cache.length,
            "lengths": lengths,
            "rope_cos": rope_cos,
            "rope_sin": rope_sin,
            "q_scale": q_scale,
            "k_scale": k_scale,
            "memory": memory,
        },
        {"window": window, "scale": scale, "feature_map": feature_map, "eps": eps},
        impl=impl,
        precision=precision,
        check_values=check_values,
    )
    names = ("cache_k", "cache_v", "cache_state", "cache_length")
    return outputs["out"], Cache(*(outputs[name] for name in names))


def sliding_window_attention(
    q: Any,
    k: Any,
    v: Any,
    rope_cos: Any = None,
    rope_sin: Any = None,
    positions: Any = None,
    segment_ids: Any = None,
    *,
    window: int | None,
    scale: float | None = None,
    impl: str | None = None,
    precision: object = None,
    check_values: bool = False,
) -> jax.Array:
    """Softmax attention over tokens t-w .. t (SWA-1); arguments as in `rattention`. Returns `out [B, T, Hq, Dv]`."""
    return dispatch.run(
        "sliding_window_attention",
        {
            "q": q,
            "k": k,
            "v": v,
            "rope_cos": rope_cos,
            "rope_sin": rope_sin,
            "positions": positions,
            "segment_ids": segment_ids,
        },
        {"window": window, "scale": scale},
        impl=impl,
        precision=precision,
        check_values=check_values,
    )["out"]


def residual_linear_attention(
    q: Any,
    k: Any,
    v: Any,
    q_scale: Any = None,
    k_scale: Any = None,
    memory: Any = None,
    initial_state: Any = None,
    segment_ids: Any = None,
    *,
    window: int | None,
    feature_map: str = "softmax",
    return_final_state: bool = False,
    impl: str | None = None,
    precision: object = None,
    check_values: bool = False,
) -> Any:
    """Linear attention over tokens i <= t-w-1, without denominator (RLA-1, RLA-2); arguments as in `rattention`.

    Returns `out [B, T, Hq, Dv]`; with `return_final_state` the pair of it and the state.
    """
    outputs = dispatch.run(
        "residual_linear_attention",
        {
            "q": q,
            "k": k,
            "v": v,
            "q_scale": q_scale,
            "k_scale": k_scale,
            "memory": memory,
            "initial_state": initial_state,
            "segment_ids": segment_ids,
        },
        {"window": window, "feature_map": feature_map},
        impl=impl,
        precision=precision,
        check_values=check_values,
    )
    return (outputs["out"], outputs["final_state"]) if return_final_state else outputs["out"]


def rms_mix(
    swa: Any,
    rla: Any,
    swa_weight: Any,
    rla_weight: Any,
    *,
    eps: float = 1e-6,
    impl: str | None = None,
    precision: object = None,
) -> jax.Array:
    """swa_weight * rms(swa) + rla_weight * rms(rla), rms(x) = x / sqrt(mean(x^2) + eps) (MIX-1, MIX-2).

    Args:
        swa, rla: `[B, T, Hq, Dv]`; weights `[Hq, Dv]`. Returns `out [B, T, Hq, Dv]`.
    """
    tensors = {"swa": swa, "rla": rla, "swa_weight": swa_weight, "rla_weight": rla_weight}
    return dispatch.run("rms_mix", tensors, {"eps": eps}, impl=impl, precision=precision)["out"]


def feature_map(x: Any, *, feature_map: str = "softmax", impl: str | None = None) -> jax.Array:
    """phi(x) over the last axis: `[B, T, H, D]` to `[B, T, H, F]`, F = 2D for softmax and relu, D for identity."""
    return dispatch.run("feature_map", {"x": x}, {"feature_map": feature_map}, impl=impl)["out"]
