# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportReturnType=false
"""Backward, third kernel: what the linear branch sends to dk and dv. One program per tile of BN keys and key head.

    state    dv  = phi(k) E_{c+1}            d phi(k)  = v E_{c+1}^T         queries that read a later saved state
    tail     dv += phi(k) d_final            d phi(k) += v d_final^T         tokens of final_state past a saved state
    direct   dv += A^T dx_l, A = phi(q) phi(k)^T        d phi(k) += (dx_l v^T)^T phi(q)
             queries whose saved state ends before the next border: t - w in the key's own chunk, at most N of them
    out      through phi and k_scale: dk, dv in float32 for `key_grad` to add to, or final where no softmax follows

All products are formed with keys as rows, [BN, R], so that A^T and its gradient are operands as they stand. Rows of a
query tile are (token, head) pairs as in the forward: the sum over the G query heads happens in the accumulators
(GRAD-3). dk and dv share phi(q) alone, so where both do not fit the registers they are two launches, KEYS and VALUES.
Traffic per tile: k, v, E_{c+1}, and for each of up to N queries and G heads q and dx_l.
"""

import triton
import triton.language as tl
from rattention.torch.triton.attention import key_rows
from rattention.torch.triton.features import phi_as, phi_grad, scaled
from rattention.torch.triton.query_grad import column_sums
from rattention.torch.triton.tiles import (
    NOWHERE,
    add_weighted,
    dot,
    dot_rows,
    load_blocks,
    load_blocks_again,
    load_state,
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


@triton.jit
def through_state(fk, v, feeds, state, acc_v, df, D: tl.constexpr, DB: tl.constexpr, ND: tl.constexpr,
                  NF: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
                  WIDE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """acc_v + phi(k) E and d phi(k) + v E^T for the keys in `feeds`, each tile of E [F, Dv] read once."""
    masked = operand(tl.where(feeds[:, None], up(v), 0.0), WIDE)
    out = ()
    for j in tl.static_range(NF):
        e = operand(load_state(state, j % ND, j // ND, D, DB, ND, DV, DVP), WIDE)
        if VALUES:
            acc_v = dot(tl.where(feeds[:, None], fk[j], 0.0), e, acc_v, WIDE, PRECISION)
        d = df[j]
        if KEYS:
            d = dot(masked, tl.trans(e), d, WIDE, PRECISION)
        out = out + (d,)
    return acc_v, out


@triton.jit(do_not_specialize=["w", "row_fold_end"])
def residue_grad(
    q,  # [B, Tq, Hq, D] storage, by strides
    k, v,  # [B, Tk, Hkv, .] storage, by strides
    start, last, fold_end, q_scale, k_scale,
    grads,  # [B, Hkv, chunks, F, Dv] WIDE or None: E_c
    d_final,  # [B, Hkv, F, Dv] float32 or None
    dx_l,  # [B, Tq, Hq, Dv] WIDE
    dk,  # [B, Tk, Hkv, D] float32 or storage
    dv,  # [B, Tk, Hkv, Dv] float32 or storage
    d_scale,  # [B, Hkv, tiles, D] float32 or None
    sq_b, sq_t, sq_h, sk_b, sk_t, sk_h, sv_b, sv_t, sv_h,
    Tq, Tk, offset, w, N, chunks, Hkv, G, row_fold_end,
    D: tl.constexpr, DB: tl.constexpr, ND: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    HP: tl.constexpr, C: tl.constexpr, BN: tl.constexpr, MAP: tl.constexpr, KEYS: tl.constexpr,
    VALUES: tl.constexpr, HAS_GRADS: tl.constexpr,
    HAS_D_FINAL: tl.constexpr, HAS_SEGMENTS: tl.constexpr, HAS_Q_SCALE: tl.constexpr, HAS_K_SCALE: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
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
    fk = phi_as(scaled(kt, k_scale, HAS_K_SCALE, D, DB, ND), MAP, D, DB, ND, WIDE)
    acc_v = tl.zeros([BN, DVP], tl.float32)
    df = zero_blocks(BN, DB, NF)

    c = i0 // N
    if HAS_GRADS:
        feeds = real & (c + 1 < chunks)
        if HAS_SEGMENTS:
            feeds = feeds & (n >= tl.load(start + b * Tk + tl.minimum((c + 1) * N, Tk) - 1))
        e_at = grads + ((b * Hkv + h) * chunks + tl.minimum(c + 1, chunks - 1)) * (F * DV)
        acc_v, df = through_state(fk, vt, feeds, e_at, acc_v, df, D, DB, ND, NF, DV, DVP, KEYS, VALUES, WIDE, PRECISION)
    if HAS_D_FINAL:
        end = row_fold_end
        opening = 0
        if HAS_SEGMENTS:
            end = tl.load(fold_end + b)
            opening = tl.load(last + b)
        opening = tl.maximum(opening, (end // N) * N)
        if (i0 < end) & (i0 + BN > opening):
            feeds = real & (n >= opening) & (n < end)
            f_at = d_final + (b * Hkv + h) * (F * DV)
            acc_v, df = through_state(
                fk, vt, feeds, f_at, acc_v, df, D, DB, ND, NF, DV, DVP, KEYS, VALUES, WIDE, PRECISION
            )

    rows = tl.arange(0, R)
    token = rows // HP
    Hq = Hkv * G
    lo = tl.maximum(i0 + w + 1, offset)
    hi = tl.minimum((c + 1) * N + w, Tk)
    for hb in range(0, tl.cdiv(G, HP)):
        g = hb * HP + rows % HP
        q_at = q + b * sq_b + long(h * G) * sq_h
        l_at = dx_l + (b * Tq * Hq + h * G) * DV
        for at in range(lo, hi, C):
            t = at + token
            s, live = query_rows(t, g, hi, G, start, b, Tk, HAS_SEGMENTS)
            qt = load_blocks(q_at + long(at - offset) * sq_t, token * sq_t + g * sq_h, live, D, DB, ND)
            fq = phi_as(scaled(qt, q_scale, HAS_Q_SCALE, D, DB, ND), MAP, D, DB, ND, WIDE)
            dl = load_values(l_at + long(at - offset) * (Hq * DV), (token * Hq + g) * DV, live, DV, DVP)
            mask = (n[:, None] < (t - w)[None, :]) & (n[:, None] >= s[None, :]) & live[None, :]
            if VALUES:
                a = tl.where(mask, dot_rows(fk, fq, NF, WIDE, PRECISION), 0.0)
                acc_v = dot(a, dl, acc_v, WIDE, PRECISION)
            if KEYS:
                zero = tl.zeros([BN, R], tl.float32)
                da = tl.where(mask, dot(vw, tl.trans(operand(dl, WIDE)), zero, WIDE, PRECISION), 0.0)
                df = add_weighted(df, da, fq, NF, WIDE, PRECISION)

    out = (b * Tk + i0) * Hkv + h
    if VALUES:
        store_values(dv + out * DV, keys * (Hkv * DV), inside, tl.where(real[:, None], acc_v, 0.0), DV, DVP)
    if KEYS:
        raw = load_blocks_again(k_at, keys * sk_t, real, D, DB, ND)
        gk = phi_grad(scaled(raw, k_scale, HAS_K_SCALE, D, DB, ND), df, MAP, D, DB, ND)
        if HAS_K_SCALE:
            share = ()
            for j in tl.static_range(ND):
                share = share + (tl.where(real[:, None], gk[j] * up(raw[j]), 0.0),)
            column_sums(d_scale + ((b * Hkv + h) * tiles + tile) * D, share, D, DB, ND)
            gk = scaled(gk, k_scale, HAS_K_SCALE, D, DB, ND)
        final = ()
        for j in tl.static_range(ND):
            final = final + (tl.where(real[:, None], gk[j], 0.0),)
        store_blocks(dk + out * D, keys * (Hkv * D), inside, final, D, DB, ND)
