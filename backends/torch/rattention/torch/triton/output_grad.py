# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportReturnType=false
"""Backward, first kernel: one program per tile of queries, the tiles of `attend`.

    again   x_s, x_l            both branch outputs, never stored by the forward: x_l from the saved states, x_s by
                                online softmax, so that its weights sum to 1 however the scores are rounded here
    norms   dx_s, dx_l          through the mix and both RMS norms; partial sums of the weight gradients
    out     dx_s, dx_l in the operand dtype, Delta in float32, the rotated queries: what the later kernels read

Delta is the row sum dx_s x_s of the rounded dx_s, so that a component common to all v_i cancels to rounding. Traffic
per tile: the key, value and state tiles of the forward, V of the border tiles twice; q, d_out; writes R (D + 2 Dv)
elements. Sums over tiles go to one row of partial sums per program and are added by a second, ordered reduction: no
atomics (NUM-4).
"""

import triton
import triton.language as tl
from rattention.torch.triton.attention import (
    behind_window,
    in_window,
    key_rows,
    linear_step,
    read_state,
    scores,
    softmax_step,
    tile_borders,
)
from rattention.torch.triton.features import phi_as, scaled
from rattention.torch.triton.rotary import positions_of, rotate
from rattention.torch.triton.tiles import (
    NOWHERE,
    blocks_as,
    load_blocks,
    load_blocks_again,
    load_values,
    long,
    operand,
    store_blocks,
    store_values,
    up,
)


@triton.jit
def norm_grad(x, r, weight, d, live, DV: tl.constexpr):
    """Through weight * x * r, r the reciprocal RMS of the row x: dx, and d * x * r for the weight (MIX-3: a zero row
    gives a finite r * weight * d)."""
    y = tl.where(live[:, None], x * r[:, None], 0.0)
    g = tl.where(live[:, None], weight * d, 0.0)
    return r[:, None] * (g - y * (tl.sum(g * y, axis=1) / DV)[:, None]), d * y


@triton.jit
def store_head_sums(base, x, heads, HP: tl.constexpr, C: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr):
    """Sum rows (token, head) over tokens; write one row of Dv per head that exists."""
    sums = tl.sum(tl.reshape(x, [C, HP, DVP]), axis=0)
    row = tl.arange(0, HP)
    store_values(base, row * DV, row < heads, sums, DV, DVP)


@triton.jit(do_not_specialize=["w"])
def output_grad(
    q, k, kr, v, swa_weight, rla_weight, cos, sin, positions, start, first, q_scale, k_scale, memory, states,
    stats,  # [2, B, Hq, Tq] float32
    d_out,  # [B, Tq, Hq, Dv] storage, by strides
    qr,  # [B, Tq, Hq, D] storage or None: rotated queries
    dx_s, dx_l,  # [B, Tq, Hq, Dv] WIDE or None
    delta,  # [B, Hq, Tq] float32
    dw_s, dw_l,  # [B, tiles, Hq, Dv] float32 or None
    sq_b, sq_t, sq_h, sk_b, sk_t, sk_h, sr_b, sr_t, sr_h, sv_b, sv_t, sv_h, so_b, so_t, so_h,
    B, Tq, Tk, offset, w, N, chunks, Hkv, G, M, scale_log2, eps,
    D: tl.constexpr, DB: tl.constexpr, ND: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    HP: tl.constexpr, C: tl.constexpr, BN: tl.constexpr, MAP: tl.constexpr,
    SOFT: tl.constexpr, LINEAR: tl.constexpr, MIX: tl.constexpr, HAS_STATES: tl.constexpr, HAS_MEMORY: tl.constexpr,
    HAS_ROPE: tl.constexpr, HAS_POSITIONS: tl.constexpr, HAS_SEGMENTS: tl.constexpr, HAS_Q_SCALE: tl.constexpr,
    HAS_K_SCALE: tl.constexpr, NARROW: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    WIDE_PRECISION: tl.constexpr,
):  # fmt: skip
    R: tl.constexpr = C * HP
    F: tl.constexpr = D if MAP == "identity" else 2 * D
    NF: tl.constexpr = ND if MAP == "identity" else 2 * ND
    READS: tl.constexpr = LINEAR or HAS_STATES or HAS_MEMORY
    pid = tl.program_id(0)
    tiles = tl.cdiv(Tq, C)
    tile = pid % tiles
    hb = (pid // tiles) % tl.cdiv(G, HP)
    h = (pid // tiles // tl.cdiv(G, HP)) % Hkv
    b = long(pid // tiles // tl.cdiv(G, HP) // Hkv)

    rows = tl.arange(0, R)
    token = rows // HP
    g = hb * HP + rows % HP
    t0 = tile * C + offset
    t = t0 + token
    inside = (t < Tk) & (g < G)
    live = inside
    s = tl.zeros([R], tl.int32)
    row_first = 0
    if HAS_SEGMENTS:
        s = tl.load(start + b * Tk + t, mask=inside, other=NOWHERE)
        live = inside & (s <= t)
        row_first = tl.load(first + b)
    oldest = (tl.min(tl.where(live, s, NOWHERE), axis=0) // BN) * BN
    end = tl.minimum(t0 + C, Tk)
    saved, border, inner = tile_borders(t0, end, w, N, BN, SOFT, LINEAR)

    Hq = Hkv * G
    q_at = q + b * sq_b + long(tile * C) * sq_t + long(h * G) * sq_h
    q_rows = token * sq_t + g * sq_h
    k_at = k + b * sk_b + long(h) * sk_h
    r_at = kr + b * sr_b + long(h) * sr_h
    v_at = v + b * sv_b + long(h) * sv_h
    m_at = memory
    if HAS_MEMORY:
        m_at = memory + long(h * G + hb * HP) * (F * DV)
    h_at = states
    reads = live
    if HAS_STATES:
        h_at = states + ((b * Hkv + h) * chunks + saved // N) * (F * DV)
        if HAS_SEGMENTS:
            reads = live & ((s < saved) | (s == row_first))
    keys = tl.arange(0, BN)
    out_at = (b * Tq + tile * C) * Hq + h * G  # of tensors [B, Tq, Hq, .]
    out_rows = token * Hq + g
    rows_at = (b * Hq + h * G) * Tq + tile * C + long(g) * Tq + token  # of tensors [B, Hq, Tq]
    plane = long(B) * Hq * Tq
    d_at = d_out + b * so_b + long(tile * C) * so_t + long(h * G) * so_h
    d_rows = token * so_t + g * so_h
    w_cols = tl.arange(0, DVP)
    w_at = ((h * G + g) * DV)[:, None] + w_cols[None, :]
    w_ok = inside[:, None] & (w_cols < DV)[None, :]
    part_at = ((b * tiles + tile) * Hq + h * G + hb * HP) * DV

    # -------------------------------------------------------------- the linear branch again, and its norm
    if MIX:
        x = tl.zeros([R, DVP], tl.float32)
        if READS:
            raw = load_blocks(q_at, q_rows, live, D, DB, ND)
            fq = phi_as(scaled(raw, q_scale, HAS_Q_SCALE, D, DB, ND), MAP, D, DB, ND, WIDE)
            if HAS_MEMORY:
                x = read_state(fq, live, m_at, x, D, DB, ND, NF, DV, DVP, WIDE, WIDE_PRECISION)
            if HAS_STATES:
                x = read_state(fq, reads, h_at, x, D, DB, ND, NF, DV, DVP, WIDE, WIDE_PRECISION)
            if LINEAR:
                for i in range(tl.maximum(saved, oldest), inner, BN):
                    n, real = key_rows(i, start, b, Tk, BN, HAS_SEGMENTS)
                    kt = load_blocks(k_at + long(i) * sk_t, keys * sk_t, real, D, DB, ND)
                    vt = load_values(v_at + long(i) * sv_t, keys * sv_t, real, DV, DVP)
                    fk = phi_as(scaled(kt, k_scale, HAS_K_SCALE, D, DB, ND), MAP, D, DB, ND, WIDE)
                    x = linear_step(fq, fk, vt, behind_window(t, s, n, w), x, NF, WIDE, WIDE_PRECISION)
        r = tl.load(stats + plane + rows_at, mask=live, other=0.0)
        weight = up(tl.load(rla_weight + w_at, mask=w_ok, other=0.0))
        d = up(load_values(d_at, d_rows, live, DV, DVP))
        d, dw = norm_grad(x, r, weight, d, live, DV)
        if READS:
            store_values(dx_l + out_at * DV, out_rows * DV, inside, d, DV, DVP)
        store_head_sums(dw_l + part_at, dw, G - hb * HP, HP, C, DV, DVP)
    elif READS:
        d = up(load_values(d_at, d_rows, live, DV, DVP))
        store_values(dx_l + out_at * DV, out_rows * DV, inside, d, DV, DVP)

    # -------------------------------------------------------------- the softmax branch again, and its norm
    if SOFT:
        if HAS_ROPE:
            x_q = scaled(load_blocks_again(q_at, q_rows, live, D, DB, ND), q, False, D, DB, ND)
            position = positions_of(positions, start, b, t, live, Tk, HAS_POSITIONS, HAS_SEGMENTS)
            x_q = rotate(x_q, cos, sin, position, live, M, False, D, DB, ND)
            store_blocks(qr + out_at * D, out_rows * D, inside, x_q, D, DB, ND)
            qt = blocks_as(x_q, ND, NARROW)
        else:
            qt = load_blocks_again(q_at, q_rows, live, D, DB, ND)
        x = tl.zeros([R, DVP], tl.float32)
        m = tl.full([R], -float("inf"), tl.float32)
        l = tl.zeros([R], tl.float32)
        for i in range(tl.maximum(border, oldest), end, BN):
            n, real = key_rows(i, start, b, Tk, BN, HAS_SEGMENTS)
            kt = load_blocks(r_at + long(i) * sr_t, keys * sr_t, real, D, DB, ND)
            vt = load_values(v_at + long(i) * sv_t, keys * sv_t, real, DV, DVP)
            logits = scores(qt, kt, scale_log2, ND, NARROW, PRECISION)
            logits = tl.where(in_window(t, s, n, w), logits, -float("inf"))
            m, l, x = softmax_step(logits, vt, m, l, x, NARROW, PRECISION)
        x = x / tl.where(live, l, 1.0)[:, None]
        d = up(load_values(d_at, d_rows, live, DV, DVP))
        if MIX:
            r = tl.rsqrt(tl.sum(x * x, axis=1) / DV + eps)
            weight = up(tl.load(swa_weight + w_at, mask=w_ok, other=0.0))
            d, dw = norm_grad(x, r, weight, d, live, DV)
            store_head_sums(dw_s + part_at, dw, G - hb * HP, HP, C, DV, DVP)
        store_values(dx_s + out_at * DV, out_rows * DV, inside, d, DV, DVP)
        dd = tl.sum(up(operand(d, WIDE)) * x, axis=1)
        tl.store(delta + rows_at, tl.where(live, dd, 0.0), mask=inside)
