"""The kernels as `torch.library` operators, each with a fake implementation and a gradient.

    rattention::attention(q, k, v, ...) -> out, final_state, stats      rattention, sliding_window_attention and
    rattention::attention_grad(...)                                     residual_linear_attention, by `mode`
    rattention::extend / extend_grad, feature_map / feature_map_grad, rms_mix / rms_mix_grad, rope_table

To torch.compile and torch.export each is one opaque node. An operator's outputs are fresh tensors (ERR-13); an output
that a call does not have is an empty tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from rattention.torch.tangents import refuse_tangents
from rattention.torch.triton import features, mix, rotary
from rattention.torch.triton.backward import backward
from rattention.torch.triton.continuation import Continuation, extend_backward, extend_forward
from rattention.torch.triton.forward import forward
from rattention.torch.triton.launch import launch
from rattention.torch.triton.plan import Plan, ceil_div, power_of_two
from rattention.torch.triton.transforms import call, differentiable, once_differentiable
from torch import Tensor

ROWS = 64
"""Rows of one program of the elementwise kernels."""

_DIFFERENTIABLE = ("q", "k", "v", "swa_weight", "rla_weight", "q_scale", "k_scale", "memory", "initial_state")


# ---------------------------------------------------------------------------------------------------- attention


@torch.library.custom_op("rattention::attention", mutates_args=())
def attention(
    q: Tensor, k: Tensor, v: Tensor, swa_weight: Tensor | None, rla_weight: Tensor | None, rope_cos: Tensor | None,
    rope_sin: Tensor | None, positions: Tensor | None, segment_ids: Tensor | None, q_scale: Tensor | None,
    k_scale: Tensor | None, memory: Tensor | None, initial_state: Tensor | None,
    window: int | None, scale: float | None, feature_map: str, eps: float, mode: str, reduced: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """out [B, T, Hq, Dv], final_state [B, Hkv, F, Dv] (empty for mode "soft"), stats [2, B, Hq, T] for the gradient."""
    refuse_tangents()
    plan = Plan(
        q, k, v, window, scale, feature_map, eps, mode, reduced, swa_weight, rla_weight, rope_cos, rope_sin, positions,
        segment_ids, q_scale, k_scale, memory, initial_state,
    )  # fmt: skip
    return forward(plan)


@attention.register_fake
def _attention_fake(
    q, k, v, swa_weight, rla_weight, rope_cos, rope_sin, positions, segment_ids, q_scale, k_scale, memory,
    initial_state, window, scale, feature_map, eps, mode, reduced,
):  # fmt: skip
    B, T, Hq, D = q.shape
    Hkv, Dv = v.shape[2:]
    F = D if feature_map == "identity" else 2 * D
    final = q.new_empty((0,) if mode == "soft" else (B, Hkv, F, Dv), dtype=torch.float32)
    return q.new_empty(B, T, Hq, Dv), final, q.new_empty(2, B, Hq, T, dtype=torch.float32)


@torch.library.custom_op("rattention::attention_grad", mutates_args=())
def attention_grad(
    q: Tensor, k: Tensor, v: Tensor, swa_weight: Tensor | None, rla_weight: Tensor | None, rope_cos: Tensor | None,
    rope_sin: Tensor | None, positions: Tensor | None, segment_ids: Tensor | None, q_scale: Tensor | None,
    k_scale: Tensor | None, memory: Tensor | None, initial_state: Tensor | None, stats: Tensor,
    d_out: Tensor, d_final_state: Tensor | None,
    window: int | None, scale: float | None, feature_map: str, eps: float, mode: str, reduced: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, swa_weight, rla_weight, q_scale, k_scale, memory, initial_state; empty where absent."""
    plan = Plan(
        q, k, v, window, scale, feature_map, eps, mode, reduced, swa_weight, rla_weight, rope_cos, rope_sin, positions,
        segment_ids, q_scale, k_scale, memory, initial_state,
    )  # fmt: skip
    found = backward(plan, stats, d_out, d_final_state)
    return _all_gradients(found, _given(locals()), q)


@attention_grad.register_fake
def _attention_grad_fake(
    q, k, v, swa_weight, rla_weight, rope_cos, rope_sin, positions, segment_ids, q_scale, k_scale, memory,
    initial_state, stats, d_out, d_final_state, window, scale, feature_map, eps, mode, reduced,
):  # fmt: skip
    given = _given(locals())
    return _all_gradients({n: torch.empty_like(x, memory_format=torch.contiguous_format)
                           for n, x in given.items() if x is not None}, given, q)  # fmt: skip


def _given(arguments: dict[str, Any]) -> dict[str, Tensor | None]:
    return {name: arguments[name] for name in _DIFFERENTIABLE}


def _all_gradients(found: dict[str, Tensor], given: dict[str, Tensor | None], like: Tensor) -> Any:
    none = torch.float32
    return tuple(
        like.new_empty(0, dtype=none) if x is None else found[name] if name in found else torch.zeros_like(x)
        for name, x in given.items()
    )


def _attention_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:13], output[2])
    ctx.attributes = inputs[13:]
    ctx.like = (output[0].shape, output[0].dtype, output[0].device)


def _attention_backward(ctx: Any, d_out: Tensor | None, d_final: Tensor | None, d_stats: Tensor | None) -> Any:
    *inputs, stats = ctx.saved_tensors
    if d_out is None:
        shape, dtype, device = ctx.like
        d_out = torch.zeros(shape, dtype=dtype, device=device)
    if ctx.attributes[4] == "soft":
        d_final = None
    dq, dk, dv, dws, dwl, dqs, dks, dm, di = call(attention_grad, *inputs, stats, d_out, d_final, *ctx.attributes)
    given = [x is not None for x in inputs]
    found = [dq, dk, dv, dws, dwl, None, None, None, None, dqs, dks, dm, di]
    return (*(g if ok else None for g, ok in zip(found, given, strict=True)), *(None,) * 6)


differentiable(attention, _attention_backward, _attention_context)
once_differentiable(attention_grad)


# ---------------------------------------------------------------------------------------------------- extend

_EXTEND_INPUTS = 16


@torch.library.custom_op("rattention::extend", mutates_args=())
def extend(
    q: Tensor, k: Tensor, v: Tensor, swa_weight: Tensor, rla_weight: Tensor, cache_k: Tensor, cache_v: Tensor,
    cache_state: Tensor, cache_length: Tensor, lengths: Tensor | None, rope_cos: Tensor | None,
    rope_sin: Tensor | None, q_scale: Tensor | None, k_scale: Tensor | None, memory: Tensor | None,
    window: int | None, scale: float | None, feature_map: str, eps: float, reduced: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """out, cache_k, cache_v, cache_state, cache_length, in the canonical form."""
    refuse_tangents()
    return extend_forward(
        Continuation(q, k, v, swa_weight, rla_weight, cache_k, cache_v, cache_state, cache_length, lengths, rope_cos,
                     rope_sin, q_scale, k_scale, memory, window, scale, feature_map, eps, reduced)
    )  # fmt: skip


@extend.register_fake
def _extend_fake(
    q, k, v, swa_weight, rla_weight, cache_k, cache_v, cache_state, cache_length, lengths, rope_cos, rope_sin, q_scale,
    k_scale, memory, window, scale, feature_map, eps, reduced,
):  # fmt: skip
    B, T, Hq, D = q.shape
    Hkv, Dv = v.shape[2:]
    W = cache_k.shape[1] + (T if window is None else 0)
    return (
        q.new_empty(B, T, Hq, Dv), q.new_empty(B, W, Hkv, D), q.new_empty(B, W, Hkv, Dv),
        torch.empty_like(cache_state, memory_format=torch.contiguous_format), torch.empty_like(cache_length),
    )  # fmt: skip


@torch.library.custom_op("rattention::extend_grad", mutates_args=())
def extend_grad(
    q: Tensor, k: Tensor, v: Tensor, swa_weight: Tensor, rla_weight: Tensor, cache_k: Tensor, cache_v: Tensor,
    cache_state: Tensor, cache_length: Tensor, lengths: Tensor | None, rope_cos: Tensor | None,
    rope_sin: Tensor | None, q_scale: Tensor | None, k_scale: Tensor | None, memory: Tensor | None,
    d_out: Tensor, d_cache_k: Tensor | None, d_cache_v: Tensor | None, d_cache_state: Tensor | None,
    window: int | None, scale: float | None, feature_map: str, eps: float, reduced: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, swa_weight, rla_weight, cache_k, cache_v, cache_state, q_scale, k_scale, memory."""
    continuation = Continuation(
        q, k, v, swa_weight, rla_weight, cache_k, cache_v, cache_state, cache_length, lengths, rope_cos, rope_sin,
        q_scale, k_scale, memory, window, scale, feature_map, eps, reduced,
    )  # fmt: skip
    return extend_backward(continuation, d_out, d_cache_k, d_cache_v, d_cache_state)


@extend_grad.register_fake
def _extend_grad_fake(
    q, k, v, swa_weight, rla_weight, cache_k, cache_v, cache_state, cache_length, lengths, rope_cos, rope_sin, q_scale,
    k_scale, memory, d_out, d_cache_k, d_cache_v, d_cache_state, window, scale, feature_map, eps, reduced,
):  # fmt: skip
    inputs = (q, k, v, swa_weight, rla_weight, cache_k, cache_v, cache_state, q_scale, k_scale, memory)
    return tuple(
        q.new_empty(0, dtype=torch.float32) if x is None
        else torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in inputs
    )  # fmt: skip


def _extend_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:15])
    ctx.attributes = inputs[15:]
    ctx.like = (output[0].shape, output[0].dtype, output[0].device)


def _extend_backward(ctx: Any, d_out: Any, d_k: Any, d_v: Any, d_state: Any, d_length: Any) -> Any:
    inputs = ctx.saved_tensors
    if d_out is None:
        shape, dtype, device = ctx.like
        d_out = torch.zeros(shape, dtype=dtype, device=device)
    found = call(extend_grad, *inputs, d_out, d_k, d_v, d_state, *ctx.attributes)
    dq, dk, dv, dws, dwl, dck, dcv, dcs, dqs, dks, dm = found
    all_found = (dq, dk, dv, dws, dwl, dck, dcv, dcs, None, None, None, None, dqs, dks, dm)
    return (*(None if x is None else g for x, g in zip(inputs, all_found, strict=True)), *(None,) * 5)


differentiable(extend, _extend_backward, _extend_context)
once_differentiable(extend_grad)


# ---------------------------------------------------------------------------------------------------- parts


def _rows(x: Tensor) -> tuple[int, dict[str, Any]]:
    D = x.shape[-1]
    half = power_of_two((D + 1) // 2)
    return x.numel() // D if D else 0, {"D": D, "DB": min(half, 64), "ND": 2 * half // min(half, 64), "BN": ROWS}


@torch.library.custom_op("rattention::feature_map", mutates_args=())
def feature_map(x: Tensor, feature_map: str) -> Tensor:
    """phi(x): [B, T, H, D] -> [B, T, H, F]."""
    refuse_tangents()
    x = x.contiguous()
    out = _feature_map_fake(x, feature_map)
    n, shape = _rows(x)
    launch(features.feature_map, ceil_div(n, ROWS), x, out, n, **shape, MAP=feature_map, warps=4, stages=1)
    return out


@feature_map.register_fake
def _feature_map_fake(x, feature_map):
    D = x.shape[-1]
    return x.new_empty(*x.shape[:-1], D if feature_map == "identity" else 2 * D)


@torch.library.custom_op("rattention::feature_map_grad", mutates_args=())
def feature_map_grad(x: Tensor, d_out: Tensor, feature_map: str) -> Tensor:
    x, d_out = x.contiguous(), d_out.contiguous()
    d_x = torch.empty_like(x)
    n, shape = _rows(x)
    launch(features.feature_map_grad, ceil_div(n, ROWS), x, d_out, d_x, n, **shape, MAP=feature_map, warps=4, stages=1)
    return d_x


@feature_map_grad.register_fake
def _feature_map_grad_fake(x, d_out, feature_map):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _feature_map_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.map = inputs[1]


differentiable(
    feature_map,
    lambda ctx, d_out: (call(feature_map_grad, ctx.saved_tensors[0], d_out, ctx.map), None),
    _feature_map_context,
)
once_differentiable(feature_map_grad)


@torch.library.custom_op("rattention::rms_mix", mutates_args=())
def rms_mix(swa: Tensor, rla: Tensor, swa_weight: Tensor, rla_weight: Tensor, eps: float) -> Tensor:
    """swa_weight rms(swa) + rla_weight rms(rla): [B, T, Hq, Dv]."""
    refuse_tangents()
    B, T, Hq, Dv = swa.shape
    out = torch.empty(swa.shape, dtype=swa.dtype, device=swa.device)
    launch(
        mix.mix, ceil_div(B * T, ROWS) * Hq, swa.contiguous(), rla.contiguous(), swa_weight.contiguous(),
        rla_weight.contiguous(), out, B * T, Hq, eps, DV=Dv, DVP=power_of_two(Dv), BN=ROWS, warps=4, stages=1,
    )  # fmt: skip
    return out


@rms_mix.register_fake
def _rms_mix_fake(swa, rla, swa_weight, rla_weight, eps):
    return torch.empty_like(swa, memory_format=torch.contiguous_format)


@torch.library.custom_op("rattention::rms_mix_grad", mutates_args=())
def rms_mix_grad(
    swa: Tensor, rla: Tensor, swa_weight: Tensor, rla_weight: Tensor, d_out: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, T, Hq, Dv = swa.shape
    programs = ceil_div(B * T, ROWS)
    d_swa, d_rla = (torch.empty(swa.shape, dtype=swa.dtype, device=swa.device) for _ in range(2))
    dw_s, dw_l = (torch.empty(programs, Hq, Dv, dtype=torch.float32, device=swa.device) for _ in range(2))
    launch(
        mix.mix_grad, programs * Hq, swa.contiguous(), rla.contiguous(), swa_weight.contiguous(),
        rla_weight.contiguous(), d_out.contiguous(), d_swa, d_rla, dw_s, dw_l, B * T, Hq, eps, DV=Dv,
        DVP=power_of_two(Dv), BN=ROWS, warps=4, stages=1,
    )  # fmt: skip
    return d_swa, d_rla, dw_s.sum(0).to(swa_weight.dtype), dw_l.sum(0).to(rla_weight.dtype)


@rms_mix_grad.register_fake
def _rms_mix_grad_fake(swa, rla, swa_weight, rla_weight, d_out, eps):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (swa, rla, swa_weight, rla_weight))


def _rms_mix_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.eps = inputs[4]


differentiable(
    rms_mix,
    lambda ctx, d_out: (*call(rms_mix_grad, *ctx.saved_tensors, d_out, ctx.eps), None),
    _rms_mix_context,
)
once_differentiable(rms_mix_grad)


@torch.library.custom_op("rattention::rope_table", mutates_args=())
def rope_table(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Rotary cosines and sines [M, head_dim/2] float32 of `positions` [M]."""
    M, half = positions.shape[0], head_dim // 2
    cos, sin = (torch.empty(M, half, dtype=torch.float32, device=positions.device) for _ in range(2))
    exponents = torch.arange(half, dtype=torch.float64, device=positions.device) * (-2.0 / head_dim)
    frequencies = torch.pow(torch.tensor(theta, dtype=torch.float64, device=positions.device), exponents)
    launch(
        rotary.rope_table, ceil_div(M, ROWS), positions.contiguous(), frequencies, cos, sin, M, half,
        BM=ROWS, BC=power_of_two(half, 1), warps=4, stages=1,
    )  # fmt: skip
    return cos, sin


@rope_table.register_fake
def _rope_table_fake(positions, head_dim, theta):
    return tuple(positions.new_empty(positions.shape[0], head_dim // 2, dtype=torch.float32) for _ in range(2))
