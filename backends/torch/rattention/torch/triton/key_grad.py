# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportReturnType=false
"""Backward, second kernel: dk and dv. One program per tile of BN keys of one batch row and key head.

    state    dv  = phi(k) E_{c+1}            d phi(k)  = v E_{c+1}^T         queries that read a later saved state
    tail     dv += phi(k) d_final            d phi(k) += v d_final^T         tokens of final_state past a saved state
    direct   dv += A^T dx_l, A = phi(q) phi(k)^T        d phi(k) += (dx_l v^T)^T phi(q)
             queries whose saved state ends before the next border: t - w in the key's own chunk, at most N of them
    softmax  dv += p^T dx_s                  d rope(k) += (p (dx_s v^T - Delta))^T rope(q)      the w + BN queries above
    out      dk, dv: one rounding, one write, summed in float32 over the G query heads of the group (GRAD-3)

Rows of a query tile are (token, head) pairs as in the forward. Traffic per tile: k, v, E_{c+1}; for each of the
w + N + BN queries and G heads, q (rotated and not), dx_s, dx_l and two floats; writes dk, dv.
"""

import triton
import triton.language as tl
from rattention.torch.triton.attention import behind_window, in_window, key_rows, read_state, scores
from rattention.torch.triton.features import phi_as, phi_grad, scaled
from rattention.torch.triton.query_grad import column_sums, state_grad
from rattention.torch.triton.rotary import positions_of, rotate
from rattention.torch.triton.tiles import (
    NOWHERE,
    add_weighted,
    dot,
    dot_rows,
    load_blocks,
    load_values,
    long,
    operand,
    store_blocks,
    store_values,
    up,
    zero_blocks,
)


@triton.jit
def query_rows(t, g, hi, G, start, b, Tk, HAS_SEGMENTS: tl.constexpr):
    """Segment starts of query rows (t, g) [R] and which of them exist: real tokens before `hi` of a real head."""
    live = (t < hi) & (g < G)
    s = tl.zeros([t.shape[0]], tl.int32)
    if HAS_SEGMENTS:
        s = tl.load(start + b * Tk + t, mask=live, other=NOWHERE)
        live = live & (s <= t)
    return s, live


@triton.jit(do_not_specialize=["w", "row_fold_end"])
def key_grad(
    q,  # [B, Tq, Hq, D] storage, by strides
    k, kr, v,  # [B, Tk, Hkv, .] storage, by strides
    qr,  # [B, Tq, Hq, D] storage, by strides: rotated queries, or q
    cos, sin, positions, start, last, fold_end, q_scale, k_scale,
    grads,  # [B, Hkv, chunks, F, Dv] WIDE or None: E_c
    d_final,  # [B, Hkv, F, Dv] float32 or None
    stats,  # [3, B, Hq, Tq] float32
    dx_s, dx_l,  # [B, Tq, Hq, Dv] WIDE or None
    delta,  # [B, Hq, Tq] float32
    dk,  # [B, Tk, Hkv, D] storage
    dv,  # [B, Tk, Hkv, Dv] storage
    d_scale,  # [B, Hkv, tiles, D] float32 or None
    sq_b, sq_t, sq_h, sk_b, sk_t, sk_h, sr_b, sr_t, sr_h, sv_b, sv_t, sv_h, sp_b, sp_t, sp_h,
    Tq, Tk, offset, w, N, chunks, Hkv, G, M, row_fold_end, scale_log2, scale,
    D: tl.constexpr, DB: tl.constexpr, ND: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    HP: tl.constexpr, C: tl.constexpr, BN: tl.constexpr, MAP: tl.constexpr,
    SOFT: tl.constexpr, LINEAR: tl.constexpr, HAS_GRADS: tl.constexpr, HAS_D_FINAL: tl.constexpr,
    HAS_ROPE: tl.constexpr, HAS_POSITIONS: tl.constexpr, HAS_SEGMENTS: tl.constexpr, HAS_Q_SCALE: tl.constexpr,
    HAS_K_SCALE: tl.constexpr, NARROW: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    WIDE_PRECISION: tl.constexpr,
):  # fmt: skip
    R: tl.constexpr = C * HP
    F: tl.constexpr = D if MAP == "identity" else 2 * D
    NF: tl.constexpr = ND if MAP == "identity" else 2 * ND
    pid = tl.program_id(0)
    tiles = tl.cdiv(Tk, BN)
    tile = pid % tiles
    h = (pid // tiles) % Hkv
    b = long(pid // tiles // Hkv)
    i0 = tile * BN
    keys = tl.arange(0, BN)
    n, real = key_rows(i0, start, b, Tk, BN, HAS_SEGMENTS)
    inside = n < Tk
    k_at = k + b * sk_b + long(i0) * sk_t + long(h) * sk_h
    kt = load_blocks(k_at, keys * sk_t, real, D, DB, ND)
    vt = load_values(v + b * sv_b + long(i0) * sv_t + long(h) * sv_h, keys * sv_t, real, DV, DVP)
    vw = operand(vt, WIDE)

    rows = tl.arange(0, R)
    token = rows // HP
    q_at = q + b * sq_b + long(h * G) * sq_h
    p_at = qr + b * sp_b + long(h * G) * sp_h
    Hq = Hkv * G
    o_at = (b * Tq * Hq + h * G) * DV
    rows_at = (b * Hq + h * G) * Tq

    # -------------------------------------------------------------- linear branch
    acc_v = tl.zeros([BN, DVP], tl.float32)
    gk = zero_blocks(BN, DB, ND)
    if LINEAR:
        x = scaled(kt, k_scale, HAS_K_SCALE, D, DB, ND)
        fk = phi_as(x, MAP, D, DB, ND, WIDE)
        df = zero_blocks(BN, DB, NF)
        c = i0 // N
        if HAS_GRADS:
            feeds = real & (c + 1 < chunks)
            if HAS_SEGMENTS:
                feeds = feeds & (n >= tl.load(start + b * Tk + tl.minimum((c + 1) * N, Tk) - 1))
            e_at = grads + ((b * Hkv + h) * chunks + tl.minimum(c + 1, chunks - 1)) * (F * DV)
            acc_v = read_state(fk, feeds, e_at, acc_v, D, DB, ND, NF, DV, DVP, WIDE, WIDE_PRECISION)
            df = state_grad(vw, feeds, e_at, df, D, DB, ND, NF, DV, DVP, WIDE, WIDE_PRECISION)
        if HAS_D_FINAL:
            end = row_fold_end
            opening = 0
            if HAS_SEGMENTS:
                end = tl.load(fold_end + b)
                opening = tl.load(last + b)
            opening = tl.maximum(opening, (end // N) * N)
            if (i0 < end) & (i0 + BN > opening):
                feeds = real & (n >= opening) & (n < end)
                e_at = d_final + (b * Hkv + h) * (F * DV)
                acc_v = read_state(fk, feeds, e_at, acc_v, D, DB, ND, NF, DV, DVP, WIDE, WIDE_PRECISION)
                df = state_grad(vw, feeds, e_at, df, D, DB, ND, NF, DV, DVP, WIDE, WIDE_PRECISION)
        lo = tl.maximum(i0 + w + 1, offset)
        hi = tl.minimum((c + 1) * N + w, Tk)
        for hb in range(0, tl.cdiv(G, HP)):
            g = hb * HP + rows % HP
            for at in range(lo, hi, C):
                t = at + token
                s, live = query_rows(t, g, hi, G, start, b, Tk, HAS_SEGMENTS)
                qi = long(at - offset)
                qt = load_blocks(q_at + qi * sq_t, token * sq_t + g * sq_h, live, D, DB, ND)
                fq = phi_as(scaled(qt, q_scale, HAS_Q_SCALE, D, DB, ND), MAP, D, DB, ND, WIDE)
                dl = load_values(dx_l + o_at + qi * (Hq * DV), (token * Hq + g) * DV, live, DV, DVP)
                mask = behind_window(t, s, n, w) & live[:, None]
                a = tl.where(mask, dot_rows(fq, fk, NF, WIDE, WIDE_PRECISION), 0.0)
                acc_v = dot(tl.trans(operand(a, WIDE)), dl, acc_v, WIDE, WIDE_PRECISION)
                zero = tl.zeros([R, BN], tl.float32)
                da = tl.where(mask, dot(dl, tl.trans(vw), zero, WIDE, WIDE_PRECISION), 0.0)
                df = add_weighted(df, tl.trans(operand(da, WIDE)), fq, NF, WIDE, WIDE_PRECISION)
        x = scaled(kt, k_scale, HAS_K_SCALE, D, DB, ND)
        gk = phi_grad(x, df, MAP, D, DB, ND)
        if HAS_K_SCALE:
            share = ()
            for j in tl.static_range(ND):
                share = share + (tl.where(real[:, None], gk[j] * up(kt[j]), 0.0),)
            column_sums(d_scale + ((b * Hkv + h) * tiles + tile) * D, share, D, DB, ND)
            gk = scaled(gk, k_scale, HAS_K_SCALE, D, DB, ND)

    # -------------------------------------------------------------- softmax branch
    if SOFT:
        if HAS_ROPE:
            kt = load_blocks(kr + b * sr_b + long(i0) * sr_t + long(h) * sr_h, keys * sr_t, real, D, DB, ND)
        dr = zero_blocks(BN, DB, ND)
        lo = tl.maximum(i0, offset)
        hi = tl.minimum(i0 + BN + w, Tk)
        for hb in range(0, tl.cdiv(G, HP)):
            g = hb * HP + rows % HP
            for at in range(lo, hi, C):
                t = at + token
                s, live = query_rows(t, g, hi, G, start, b, Tk, HAS_SEGMENTS)
                qi = long(at - offset)
                qt = load_blocks(p_at + qi * sp_t, token * sp_t + g * sp_h, live, D, DB, ND)
                ds = load_values(dx_s + o_at + qi * (Hq * DV), (token * Hq + g) * DV, live, DV, DVP)
                at_stats = rows_at + long(g) * Tq + (at - offset) + token
                lse = tl.load(stats + at_stats, mask=live, other=0.0)
                dd = tl.load(delta + at_stats, mask=live, other=0.0)
                mask = in_window(t, s, n, w) & live[:, None]
                logits = scores(qt, kt, scale_log2, ND, NARROW, PRECISION)
                p = tl.where(mask, tl.exp2(logits - lse[:, None]), 0.0)
                acc_v = dot(tl.trans(operand(p, WIDE)), ds, acc_v, WIDE, WIDE_PRECISION)
                zero = tl.zeros([R, BN], tl.float32)
                dp = dot(ds, tl.trans(vw), zero, WIDE, WIDE_PRECISION)
                dz = tl.where(mask, p * (dp - dd[:, None]), 0.0)
                dr = add_weighted(dr, tl.trans(operand(dz, WIDE)), qt, ND, WIDE, WIDE_PRECISION)
        if HAS_ROPE:
            position = positions_of(positions, start, b, n, real, Tk, HAS_POSITIONS, HAS_SEGMENTS)
            dr = rotate(dr, cos, sin, position, real, M, True, D, DB, ND)
        total = ()
        for j in tl.static_range(ND):
            total = total + (gk[j] + dr[j] * scale,)
        gk = total

    final = ()
    for j in tl.static_range(ND):
        final = final + (tl.where(real[:, None], gk[j], 0.0),)
    store_blocks(dk + ((b * Tk + i0) * Hkv + h) * D, keys * (Hkv * D), inside, final, D, DB, ND)
    acc_v = tl.where(real[:, None], acc_v, 0.0)
    store_values(dv + ((b * Tk + i0) * Hkv + h) * DV, keys * (Hkv * DV), inside, acc_v, DV, DVP)
