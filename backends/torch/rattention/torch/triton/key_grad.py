# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportReturnType=false
"""Backward, last kernel: dk and dv. One program per tile of BN keys of one batch row and key head.

    softmax  dv = dv_l + p^T dx_s
             d rope(k) = scale sum_t (p (dx_s v^T - Delta))^T rope(q_t), then turned back: dk = dk_l + that
    out      dk, dv: one rounding, one write

dk_l, dv_l (float32) come from `residue_grad`. The queries are the w + BN ones that may have the keys in their window,
as rows (token, head): the sum over the G query heads happens in the accumulators (GRAD-3). All products are formed with
keys as rows, [BN, R], so that p^T and its gradient are operands as they stand. Traffic per tile: k (rotated), v, dk_l,
dv_l; for each query and head rotated q, dx_s and two floats; writes dk, dv.
"""

import triton
import triton.language as tl
from rattention.torch.triton.attention import key_rows, scores, weights
from rattention.torch.triton.residue_grad import query_rows
from rattention.torch.triton.rotary import positions_of, rotate
from rattention.torch.triton.tiles import (
    add_weighted,
    dot,
    load_block,
    load_blocks,
    load_values,
    long,
    operand,
    store_blocks,
    store_values,
    zero_blocks,
)


@triton.jit(do_not_specialize=["w"])
def key_grad(
    kr, v,  # [B, Tk, Hkv, .] storage, by strides
    qr,  # [B, Tq, Hq, D] storage, by strides: rotated queries, or q
    cos, sin, positions, start,
    stats,  # [2, B, Hq, Tq] float32
    dx_s,  # [B, Tq, Hq, Dv] WIDE
    delta,  # [B, Hq, Tq] float32
    dk_l, dv_l,  # [B, Tk, Hkv, .] float32 or None
    dk,  # [B, Tk, Hkv, D] storage
    dv,  # [B, Tk, Hkv, Dv] storage
    sr_b, sr_t, sr_h, sv_b, sv_t, sv_h, sp_b, sp_t, sp_h,
    Tq, Tk, offset, w, Hkv, G, M, scale_log2, scale,
    D: tl.constexpr, DB: tl.constexpr, ND: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    HP: tl.constexpr, C: tl.constexpr, BN: tl.constexpr, HAS_RESIDUE: tl.constexpr, HAS_ROPE: tl.constexpr,
    HAS_POSITIONS: tl.constexpr, HAS_SEGMENTS: tl.constexpr, NARROW: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, WIDE_PRECISION: tl.constexpr,
):  # fmt: skip
    R: tl.constexpr = C * HP
    pid = tl.program_id(0)
    tiles = tl.cdiv(Tk, BN)
    i0 = (pid % tiles) * BN
    h = (pid // tiles) % Hkv
    b = long(pid // tiles // Hkv)
    keys = tl.arange(0, BN)
    n, real = key_rows(i0, start, b, Tk, BN, HAS_SEGMENTS)
    inside = n < Tk
    kt = load_blocks(kr + b * sr_b + long(i0) * sr_t + long(h) * sr_h, keys * sr_t, real, D, DB, ND)
    vt = load_values(v + b * sv_b + long(i0) * sv_t + long(h) * sv_h, keys * sv_t, real, DV, DVP)
    vw = operand(vt, WIDE)
    out = (b * Tk + i0) * Hkv + h
    acc_v = tl.zeros([BN, DVP], tl.float32)
    if HAS_RESIDUE:
        acc_v = load_values(dv_l + out * DV, keys * (Hkv * DV), inside, DV, DVP)
    dr = zero_blocks(BN, DB, ND)

    rows = tl.arange(0, R)
    token = rows // HP
    Hq = Hkv * G
    lo = tl.maximum(i0, offset)
    hi = tl.minimum(i0 + BN + w, Tk)
    for hb in range(0, tl.cdiv(G, HP)):
        g = hb * HP + rows % HP
        q_at = qr + b * sp_b + long(h * G) * sp_h
        s_at = dx_s + (b * Tq * Hq + h * G) * DV
        f_at = (b * Hq + h * G) * Tq
        for at in range(lo, hi, C):
            t = at + token
            s, live = query_rows(t, g, hi, G, start, b, Tk, HAS_SEGMENTS)
            qt = load_blocks(q_at + long(at - offset) * sp_t, token * sp_t + g * sp_h, live, D, DB, ND)
            ds = load_values(s_at + long(at - offset) * (Hq * DV), (token * Hq + g) * DV, live, DV, DVP)
            one = f_at + long(g) * Tq + (at - offset) + token
            lse = tl.load(stats + one, mask=live, other=0.0)
            dd = tl.load(delta + one, mask=live, other=0.0)
            mask = (n[:, None] <= t[None, :]) & (n[:, None] >= tl.maximum(t - w, s)[None, :]) & live[None, :]
            logits = scores(kt, qt, scale_log2, ND, NARROW, PRECISION)
            p = tl.where(mask, weights(logits, lse[None, :]), 0.0)
            acc_v = dot(p, ds, acc_v, WIDE, WIDE_PRECISION)
            zero = tl.zeros([BN, R], tl.float32)
            dp = dot(vw, tl.trans(operand(ds, WIDE)), zero, WIDE, WIDE_PRECISION)
            # Select again: outside the window 0 * inf would be NaN.
            dz = tl.where(mask, p * (dp - dd[None, :]), 0.0)
            dr = add_weighted(dr, dz, qt, ND, WIDE, WIDE_PRECISION)

    store_values(dv + out * DV, keys * (Hkv * DV), inside, tl.where(real[:, None], acc_v, 0.0), DV, DVP)
    if HAS_ROPE:
        position = positions_of(positions, start, b, n, real, Tk, HAS_POSITIONS, HAS_SEGMENTS)
        dr = rotate(dr, cos, sin, position, real, M, True, D, DB, ND)
    final = ()
    for j in tl.static_range(ND):
        x = dr[j] * scale
        if HAS_RESIDUE:
            x += load_block(dk_l + out * D, keys * (Hkv * D), inside, j, D, DB, ND)
        final = final + (tl.where(real[:, None], x, 0.0),)
    store_blocks(dk + out * D, keys * (Hkv * D), inside, final, D, DB, ND)
