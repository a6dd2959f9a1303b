# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportReturnType=false
"""Backward, second kernel: dq. One program per tile of queries.

    linear  d phi(q)       = dx_l (H_c + M)^T + (dx_l v^T, masked) phi(k), then through phi and q_scale
    softmax d rope(q)      = scale sum_i p (dx_s v_i - Delta) rope(k_i), then turned back
    out     dq             one rounding, one write

Traffic per tile: the key, value and state tiles of the forward, V of the border tiles twice; q (rotated and not), dx_s,
dx_l; writes R D elements, and one row of partial sums of d q_scale.
"""

import triton
import triton.language as tl
from rattention.torch.triton.attention import behind_window, in_window, key_rows, scores, tile_borders, weights
from rattention.torch.triton.features import phi_as, phi_grad, scaled
from rattention.torch.triton.rotary import positions_of, rotate
from rattention.torch.triton.tiles import (
    NOWHERE,
    add_weighted,
    column,
    dot,
    load_blocks,
    load_state,
    load_values,
    long,
    operand,
    store_blocks,
    up,
    zero_blocks,
)


@triton.jit
def state_grad(dx, reads, state, acc, D: tl.constexpr, DB: tl.constexpr, ND: tl.constexpr, NF: tl.constexpr,
               DV: tl.constexpr, DVP: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """d phi += dx state^T for the rows in `reads`; the state is [F, Dv]."""
    d = operand(tl.where(reads[:, None], up(dx), 0.0), WIDE)
    out = ()
    for j in tl.static_range(NF):
        h = load_state(state, j % ND, j // ND, D, DB, ND, DV, DVP)
        out = out + (dot(d, tl.trans(operand(h, WIDE)), acc[j], WIDE, PRECISION),)
    return out


@triton.jit
def column_sums(base, x, D: tl.constexpr, DB: tl.constexpr, ND: tl.constexpr):
    """Write the sum over rows of each channel: [D] float32."""
    for j in tl.static_range(ND):
        cols, real = column(j, D, DB, ND)
        tl.store(base + cols, tl.sum(x[j], axis=0), mask=real)


@triton.jit(do_not_specialize=["w"])
def query_grad(
    q, k, kr, v, cos, sin, positions, start, first, q_scale, k_scale, memory, states,
    stats,  # [2, B, Hq, Tq] float32
    qr,  # [B, Tq, Hq, D] storage, contiguous: rotated queries; or q by its strides
    dx_s, dx_l,  # [B, Tq, Hq, Dv] WIDE or None
    delta,  # [B, Hq, Tq] float32
    dq,  # [B, Tq, Hq, D] storage
    d_scale,  # [B, Hkv, head blocks, tiles, D] float32 or None
    sq_b, sq_t, sq_h, sk_b, sk_t, sk_h, sr_b, sr_t, sr_h, sv_b, sv_t, sv_h, sp_b, sp_t, sp_h,
    Tq, Tk, offset, w, N, chunks, Hkv, G, M, scale_log2, scale,
    D: tl.constexpr, DB: tl.constexpr, ND: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    HP: tl.constexpr, C: tl.constexpr, BN: tl.constexpr, MAP: tl.constexpr,
    SOFT: tl.constexpr, LINEAR: tl.constexpr, HAS_STATES: tl.constexpr, HAS_MEMORY: tl.constexpr,
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

    # -------------------------------------------------------------- d phi(q), and through phi
    gq = zero_blocks(R, DB, ND)
    if READS:
        dl = load_values(dx_l + out_at * DV, out_rows * DV, live, DV, DVP)
        df = zero_blocks(R, DB, NF)
        if HAS_MEMORY:
            df = state_grad(dl, live, m_at, df, D, DB, ND, NF, DV, DVP, WIDE, WIDE_PRECISION)
        if HAS_STATES:
            df = state_grad(dl, reads, h_at, df, D, DB, ND, NF, DV, DVP, WIDE, WIDE_PRECISION)
        if LINEAR:
            for i in range(tl.maximum(saved, oldest), inner, BN):
                n, real = key_rows(i, start, b, Tk, BN, HAS_SEGMENTS)
                kt = load_blocks(k_at + long(i) * sk_t, keys * sk_t, real, D, DB, ND)
                vt = load_values(v_at + long(i) * sv_t, keys * sv_t, real, DV, DVP)
                fk = phi_as(scaled(kt, k_scale, HAS_K_SCALE, D, DB, ND), MAP, D, DB, ND, WIDE)
                zero = tl.zeros([R, BN], tl.float32)
                da = dot(dl, tl.trans(operand(vt, WIDE)), zero, WIDE, WIDE_PRECISION)
                da = tl.where(behind_window(t, s, n, w), da, 0.0)
                df = add_weighted(df, da, fk, NF, WIDE, WIDE_PRECISION)
        again = load_blocks(q_at, q_rows, live, D, DB, ND)
        xq = scaled(again, q_scale, HAS_Q_SCALE, D, DB, ND)
        gq = phi_grad(xq, df, MAP, D, DB, ND)
        if HAS_Q_SCALE:
            share = ()
            for j in tl.static_range(ND):
                share = share + (tl.where(live[:, None], gq[j] * up(again[j]), 0.0),)
            at = ((b * Hkv + h) * tl.cdiv(G, HP) + hb) * tiles + tile
            column_sums(d_scale + at * D, share, D, DB, ND)
            gq = scaled(gq, q_scale, HAS_Q_SCALE, D, DB, ND)

    # -------------------------------------------------------------- d rope(q), and back
    if SOFT:
        p_at = qr + b * sp_b + long(tile * C) * sp_t + long(h * G) * sp_h
        qt = load_blocks(p_at, token * sp_t + g * sp_h, live, D, DB, ND)
        ds = load_values(dx_s + out_at * DV, out_rows * DV, live, DV, DVP)
        lse = tl.load(stats + rows_at, mask=live, other=0.0)
        dd = tl.load(delta + rows_at, mask=live, other=0.0)
        dr = zero_blocks(R, DB, ND)
        for i in range(tl.maximum(border, oldest), end, BN):
            n, real = key_rows(i, start, b, Tk, BN, HAS_SEGMENTS)
            kt = load_blocks(r_at + long(i) * sr_t, keys * sr_t, real, D, DB, ND)
            vt = load_values(v_at + long(i) * sv_t, keys * sv_t, real, DV, DVP)
            logits = scores(qt, kt, scale_log2, ND, NARROW, PRECISION)
            p = tl.where(in_window(t, s, n, w), weights(logits, lse[:, None]), 0.0)
            zero = tl.zeros([R, BN], tl.float32)
            dp = dot(ds, tl.trans(operand(vt, WIDE)), zero, WIDE, WIDE_PRECISION)
            # Select again: outside the window 0 * inf would be NaN.
            dz = tl.where(in_window(t, s, n, w), p * (dp - dd[:, None]), 0.0)
            dr = add_weighted(dr, dz, kt, ND, WIDE, WIDE_PRECISION)
        if HAS_ROPE:
            position = positions_of(positions, start, b, t, live, Tk, HAS_POSITIONS, HAS_SEGMENTS)
            dr = rotate(dr, cos, sin, position, live, M, True, D, DB, ND)
        total = ()
        for j in tl.static_range(ND):
            total = total + (gq[j] + dr[j] * scale,)
        gq = total
    final = ()
    for j in tl.static_range(ND):
        final = final + (tl.where(live[:, None], gq[j], 0.0),)
    store_blocks(dq + out_at * D, out_rows * D, inside, final, D, DB, ND)
