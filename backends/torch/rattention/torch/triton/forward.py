"""The forward pass on tensors: rotate keys, states, output."""

from __future__ import annotations

import torch
from rattention.torch.triton.attention import attend
from rattention.torch.triton.launch import launch
from rattention.torch.triton.plan import Plan, ceil_div
from torch import Tensor


def forward(plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """out [B, Tq, Hq, Dv] storage, final_state [B, Hkv, F, Dv] float32 (empty for "soft"), stats [2, B, Hq, Tq]."""
    p = plan
    out = torch.empty((p.B, p.Tq, p.Hq, p.Dv), dtype=p.q.dtype, device=p.q.device)
    stats = torch.empty((2, p.B, p.Hq, p.Tq), dtype=torch.float32, device=p.q.device)
    states, final = p.states()
    if p.B == 0 or p.Tq == 0:
        return out, final, stats
    kr = p.rotated_keys()
    tile = p.config.attend
    HP = p.heads(tile.rows, p.memory is not None)
    C = tile.rows // HP
    start, first, _, _ = p.segments
    launch(
        attend, ceil_div(p.Tq, C) * ceil_div(p.G, HP) * p.Hkv * p.B,
        p.q, p.k, kr, p.v, p.swa_weight, p.rla_weight, p.rope_cos, p.rope_sin, p.positions, start, first,
        p.q_scale, p.k_scale, p.memory, states, out, stats,
        *p.q.stride()[:3], *p.k.stride()[:3], *kr.stride()[:3], *p.v.stride()[:3],
        p.B, p.Tq, p.Tk, p.offset, p.w, p.config.chunk, p.chunks, p.Hkv, p.G, p.table_rows, p.scale_log2, p.eps,
        **p.shape, DVP=p.DVP, HP=HP, C=C, BN=tile.keys, BL=min(tile.keys, tile.residue), MAP=p.feature_map,
        SOFT=p.soft, LINEAR=p.linear,
        MIX=p.mode == "mix", HAS_STATES=states is not None, HAS_MEMORY=p.memory is not None, **p.rope,
        HAS_Q_SCALE=p.q_scale is not None, HAS_K_SCALE=p.k_scale is not None, **p.precision,
        warps=tile.warps, stages=tile.stages,
    )  # fmt: skip
    return out, final, stats
