"""The backward pass on tensors. Saved by the forward: the inputs and `stats`; states and rotated keys are made again.

Order: rotate keys, states (phase one of the forward) - output_grad - query_grad - local_states and carry_gradients over
the queries, backwards in time - residue_grad - key_grad - ordered sums of the partial results.
"""

from __future__ import annotations

import math

import torch
from rattention.torch.triton.key_grad import key_grad
from rattention.torch.triton.launch import launch
from rattention.torch.triton.output_grad import output_grad
from rattention.torch.triton.plan import Plan, ceil_div, readable
from rattention.torch.triton.query_grad import query_grad
from rattention.torch.triton.residue_grad import residue_grad
from rattention.torch.triton.states import carry_gradients
from torch import Tensor

MEMORY_CHUNK = 2048
"""Queries summed by one program for the gradient of the memory."""


def backward(
    plan: Plan, stats: Tensor, d_out: Tensor, d_final: Tensor | None, key_dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Gradients of every differentiable input that the plan has, by name, in the dtype and shape of the input; those of
    k and v in `key_dtype` where more is to be added to them before they are rounded (GRAD-3)."""
    p = plan
    gradients: dict[str, Tensor] = {}
    if p.B == 0 or p.Tk == 0 or p.Tq == 0:
        for name in ("q", "k", "v", "swa_weight", "rla_weight", "q_scale", "k_scale", "memory"):
            tensor = getattr(p, name)
            if tensor is not None:
                gradients[name] = torch.zeros_like(tensor, memory_format=torch.contiguous_format)
        if p.initial_state is not None:
            zero = torch.zeros_like(p.initial_state)
            gradients["initial_state"] = zero if d_final is None else zero + d_final
        return gradients

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=p.q.device)

    d_out = readable(d_out)
    d_final = None if d_final is None or p.mode == "soft" else d_final.contiguous()
    states = p.states()[0] if p.reads_states else None
    kr = p.rotated_keys()
    reads = p.linear or states is not None or p.memory is not None
    scale = 1.0 / math.sqrt(p.D) if p.scale is None else p.scale

    # ------------------------------------------------------------------ through the mix and the norms
    tile = p.config.output_grad
    HP = p.heads(tile.rows, p.memory is not None)
    C = tile.rows // HP
    tiles, blocks = ceil_div(p.Tq, C), ceil_div(p.G, HP)
    qr = empty(*p.q.shape, dtype=p.turned_dtype) if p.rope_cos is not None and p.soft else None
    rotated = p.q if qr is None else qr
    wide = (p.B, p.Tq, p.Hq, p.Dv)
    dx_s = empty(*wide, dtype=p.wide_dtype) if p.soft else None
    dx_l = empty(*wide, dtype=p.wide_dtype) if reads else None
    delta = empty(p.B, p.Hq, p.Tq)
    mix = p.mode == "mix"
    dw_s = empty(p.B, tiles, p.Hq, p.Dv) if mix and p.soft else None
    dw_l = empty(p.B, tiles, p.Hq, p.Dv) if mix else None
    start, first, last, fold_end = p.segments
    keys = (*p.k.stride()[:3], *kr.stride()[:3], *p.v.stride()[:3])
    scales = {"HAS_Q_SCALE": p.q_scale is not None, "HAS_K_SCALE": p.k_scale is not None}
    flags = {
        **p.shape, "DVP": p.DVP, "MAP": p.feature_map, "SOFT": p.soft, "LINEAR": p.linear,
        "HAS_STATES": states is not None, "HAS_MEMORY": p.memory is not None, **p.rope, **scales, **p.precision,
    }  # fmt: skip
    launch(
        output_grad, tiles * blocks * p.Hkv * p.B,
        p.q, p.k, kr, p.v, p.swa_weight, p.rla_weight, p.rope_cos, p.rope_sin, p.positions, start, first,
        p.q_scale, p.k_scale, p.memory, states, stats, d_out, qr, dx_s, dx_l, delta, dw_s, dw_l,
        *p.q.stride()[:3], *keys, *d_out.stride()[:3],
        p.B, p.Tq, p.Tk, p.offset, p.w, p.config.chunk, p.chunks, p.Hkv, p.G, p.table_rows, p.scale_log2, p.eps,
        HP=HP, C=C, BN=tile.keys, MIX=mix, **flags, warps=tile.warps, stages=tile.stages,
    )  # fmt: skip

    # ------------------------------------------------------------------ queries
    tile = p.config.query_grad
    HP = p.heads(tile.rows, p.memory is not None)
    C = tile.rows // HP
    tiles, blocks = ceil_div(p.Tq, C), ceil_div(p.G, HP)
    dq = empty(*p.q.shape, dtype=p.q.dtype)
    d_q_scale = empty(p.B * p.Hkv * blocks * tiles, p.D) if p.q_scale is not None and reads else None
    launch(
        query_grad, tiles * blocks * p.Hkv * p.B,
        p.q, p.k, kr, p.v, p.rope_cos, p.rope_sin, p.positions, start, first, p.q_scale, p.k_scale, p.memory, states,
        stats, rotated, dx_s, dx_l, delta, dq, d_q_scale, *p.q.stride()[:3], *keys, *rotated.stride()[:3],
        p.Tq, p.Tk, p.offset, p.w, p.config.chunk, p.chunks, p.Hkv, p.G, p.table_rows, p.scale_log2, scale,
        HP=HP, C=C, BN=tile.keys, **flags, warps=tile.warps, stages=tile.stages,
    )  # fmt: skip
    gradients["q"] = dq
    for name, partial in (("swa_weight", dw_s), ("rla_weight", dw_l)):
        weight = getattr(p, name)
        if weight is not None:
            total = torch.zeros_like(weight) if partial is None else partial.sum((0, 1)).to(weight.dtype)
            gradients[name] = total

    # ------------------------------------------------------------------ states, backwards in time
    grads = None
    if p.mode != "soft" and (p.initial_state is not None or (p.linear and p.chunks > 1)):
        assert dx_l is not None
        local = p.local_sums(p.q, dx_l, p.q_scale, "queries", p.Hkv, p.config.chunk, p.chunks)
        grads = empty(*local.shape, dtype=p.wide_dtype)
        d_initial = empty(p.B, p.Hkv, p.F, p.Dv)
        size = p.F * p.Dv
        block = p.state_block
        launch(
            carry_gradients, ceil_div(size, block) * p.B * p.Hkv,
            local, d_final, *p.segments, grads, d_initial, p.Tk, p.fold_end, p.config.chunk, p.chunks, p.Hkv, size,
            BE=block, HAS_D_FINAL=d_final is not None, HAS_SEGMENTS=p.rows is not None, warps=4, stages=2,
        )  # fmt: skip
        if p.initial_state is not None:
            gradients["initial_state"] = d_initial
    if p.memory is not None:
        assert dx_l is not None
        chunk = min(MEMORY_CHUNK, p.Tq)
        gradients["memory"] = p.local_sums(
            p.q, dx_l, p.q_scale, "memory", p.Hq, chunk, ceil_div(p.Tq, chunk)
        ).sum((0, 2))  # fmt: skip

    # ------------------------------------------------------------------ keys and values
    key_dtype = key_dtype or p.k.dtype
    dk_l = dv_l = d_k_scale = None
    if p.linear:
        tile = p.config.residue_grad
        HP = p.heads(tile.rows, False)
        tiles = ceil_div(p.Tk, tile.keys)
        partial_dtype = torch.float32 if p.soft else key_dtype
        dk_l, dv_l = empty(*p.k.shape, dtype=partial_dtype), empty(*p.v.shape, dtype=partial_dtype)
        d_k_scale = empty(p.B * p.Hkv * tiles, p.D) if p.k_scale is not None else None
        for part in ((True, False), (False, True)) if p.config.split_residue else ((True, True),):
            launch(
                residue_grad, tiles * p.Hkv * p.B,
                p.q, p.k, p.v, start, last, fold_end, p.q_scale, p.k_scale, grads, d_final, dx_l, dk_l, dv_l, d_k_scale,
                *p.q.stride()[:3], *p.k.stride()[:3], *p.v.stride()[:3],
                p.Tq, p.Tk, p.offset, p.w, p.config.chunk, p.chunks, p.Hkv, p.G, p.fold_end,
                **p.shape, DVP=p.DVP, HP=HP, C=tile.rows // HP, BN=tile.keys, MAP=p.feature_map,
                KEYS=part[0], VALUES=part[1],
                HAS_GRADS=grads is not None, HAS_D_FINAL=d_final is not None, HAS_SEGMENTS=p.rows is not None, **scales,
                WIDE=p.precision["WIDE"], PRECISION=p.precision["WIDE_PRECISION"], warps=tile.warps, stages=tile.stages,
            )  # fmt: skip
    if p.soft:
        tile = p.config.key_grad
        HP = p.heads(tile.rows, False)
        dk, dv = empty(*p.k.shape, dtype=key_dtype), empty(*p.v.shape, dtype=key_dtype)
        launch(
            key_grad, ceil_div(p.Tk, tile.keys) * p.Hkv * p.B,
            kr, p.v, rotated, p.rope_cos, p.rope_sin, p.positions, start, stats, dx_s, delta, dk_l, dv_l, dk, dv,
            *kr.stride()[:3], *p.v.stride()[:3], *rotated.stride()[:3],
            p.Tq, p.Tk, p.offset, p.w, p.Hkv, p.G, p.table_rows, p.scale_log2, scale,
            **p.shape, DVP=p.DVP, HP=HP, C=tile.rows // HP, BN=tile.keys, HAS_RESIDUE=dk_l is not None, **p.rope,
            **p.precision, warps=tile.warps, stages=tile.stages,
        )  # fmt: skip
    elif dk_l is not None and dv_l is not None:
        dk, dv = dk_l, dv_l
    else:
        dk = torch.zeros(p.k.shape, dtype=key_dtype, device=p.k.device)
        dv = torch.zeros(p.v.shape, dtype=key_dtype, device=p.v.device)
    gradients["k"], gradients["v"] = dk, dv
    for name, partial in (("q_scale", d_q_scale), ("k_scale", d_k_scale)):
        tensor = getattr(p, name)
        if tensor is not None:
            gradients[name] = torch.zeros_like(tensor) if partial is None else partial.sum(0).to(tensor.dtype)
    return gradients
