# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportReturnType=false
"""Phase two: the fused output kernel. One program makes the final output of C tokens of HP query heads.

    state   acc_l  = phi(q) (H_c + M)           the saved state at the last border p <= t0 - w
    older   acc_l += phi(q) phi(k)^T v          tiles between that border and the window
    border  both, with complementary masks      tiles in which a diagonal splits the window from the residue
    inner   acc_s  = online softmax             tiles inside the window of all rows: no mask
    own     acc_s  with the causal mask         the tiles on the diagonal
    out     w_s rms(acc_s / l) + w_l rms(acc_l) one rounding, one write

The R = C HP rows of the tile are (token, head of the group) pairs, head fastest: all read the same keys, values and
state, so K, V and H cross into the core once per tile for the whole group, and the window's two ragged ends cost C
tokens instead of R. A border tile loads V once for both branches, K once per branch where keys are rotated.

Tiles have BN keys in the window and BL where the residue is read, whose feature maps need registers beside both
accumulators. Traffic per tile: R (D + Dv) elements of q and out, (w + C + N/2) (D + Dv) of K and V, F Dv of the state,
2 floats of statistics per row (log-sum-exp in base 2, and the reciprocal RMS of the linear branch): all that the
backward pass needs. Programs are independent. The order of all sums is fixed by the configuration (NUM-4).
"""

import triton
import triton.language as tl
from rattention.torch.triton.features import phi_as, scaled
from rattention.torch.triton.rotary import positions_of, rotate
from rattention.torch.triton.tiles import (
    NOWHERE,
    blocks_as,
    dot,
    dot_rows,
    down,
    load_blocks,
    load_blocks_again,
    load_state,
    load_values,
    long,
    times,
    up,
)


@triton.jit
def key_rows(i, start, b, T, BN: tl.constexpr, HAS_SEGMENTS: tl.constexpr):
    """Tokens i .. i+BN-1 [BN] and which of them are real (SEG-5: padding is never read)."""
    t = i + tl.arange(0, BN)
    live = t < T
    if HAS_SEGMENTS:
        live = live & (tl.load(start + b * T + t, mask=live, other=NOWHERE) <= t)
    return t, live


@triton.jit
def scores(q, kr, scale_log2, ND: tl.constexpr, NARROW: tl.constexpr, PRECISION: tl.constexpr):
    """Base-2 logits scale log2(e) <q, k> of rotated blocks: [R, BN] float32. The scale acts on the float32 product."""
    return times(dot_rows(q, kr, ND, NARROW, PRECISION), scale_log2)


@triton.jit
def weights(logits, lse):
    """Softmax weights 2^(logits - lse) from a saved log-sum-exp, never above 1 (SWA-3). The kernels of the backward sum
    a score in another order than the forward did: at scores of 1e30 it comes out greater by more than any exponent
    holds. NaN stays NaN (NUM-5)."""
    return tl.exp2(tl.minimum(logits - lse, 0.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def in_window(t, s, i, w):
    """[R, BN]: key i in the window of query t, whose segment starts at s (SWA-1, SEG-1)."""
    return (i[None, :] <= t[:, None]) & (i[None, :] >= tl.maximum(t - w, s)[:, None])


@triton.jit
def behind_window(t, s, i, w):
    """[R, BN]: key i in the residue of query t (RLA-1): the complement of in_window in the segment's past."""
    return (i[None, :] < (t - w)[:, None]) & (i[None, :] >= s[:, None])


@triton.jit
def tile_borders(t0, end, w, N, BL: tl.constexpr, SOFT: tl.constexpr, LINEAR: tl.constexpr):
    """Where the key tiles of queries t0 .. end-1 change kind: [saved, border) residue only, [border, inner) both,
    [inner, end) window only. `saved` is the border p_c whose state is read."""
    saved = 0
    border = (tl.maximum(t0 - w, 0) // BL) * BL
    inner = border
    if LINEAR:
        saved = (tl.maximum(t0 - tl.maximum(w, 0), 0) // N) * N
        inner = tl.cdiv(tl.maximum(end - 1 - w, 0), BL) * BL
        if not SOFT:
            border = inner
    return saved, border, inner


@triton.jit
def softmax_step(logits, v, m, l, acc, NARROW: tl.constexpr, PRECISION: tl.constexpr):
    """One tile of online softmax. A row that has met no key yet keeps m = -inf, l = 0."""
    top = tl.maximum(m, tl.max(logits, axis=1))
    shift = tl.where(top == -float("inf"), 0.0, top)
    p = tl.exp2(logits - shift[:, None])
    alpha = tl.exp2(m - shift)
    l = l * alpha + tl.sum(p, axis=1)
    acc = dot(p, v, acc * alpha[:, None], NARROW, PRECISION)
    return top, l, acc


@triton.jit
def linear_step(fq, fk, v, mask, acc, NF: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr):
    """acc + (phi(q) phi(k)^T, masked) v."""
    a = tl.where(mask, dot_rows(fq, fk, NF, WIDE, PRECISION), 0.0)
    return dot(a, v, acc, WIDE, PRECISION)


@triton.jit
def read_state(fq, reads, state, acc, D: tl.constexpr, DB: tl.constexpr, ND: tl.constexpr, NF: tl.constexpr,
               DV: tl.constexpr, DVP: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """acc + phi(q) state for the rows in `reads`; the state is [F, Dv]."""
    for j in tl.static_range(NF):
        h = load_state(state, j % ND, j // ND, D, DB, ND, DV, DVP)
        acc = dot(tl.where(reads[:, None], fq[j], 0.0), h, acc, WIDE, PRECISION)
    return acc


@triton.jit
def column_halves(x):
    """[R, 2 N] as two tiles [R, N]."""
    R: tl.constexpr = x.shape[0]
    N: tl.constexpr = x.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(x, [R, 2, N]), [0, 2, 1]))


@triton.jit
def mix_columns(x_s, x_l, r_s, r_l, swa_weight, rla_weight, out, rows, heads, inside, live, c0, DV: tl.constexpr,
                SOFT: tl.constexpr, MIX: tl.constexpr):  # fmt: skip
    """Columns c0 .. of the mix of both normalised branches, written to `out + rows`. Wide tiles go in halves: beside
    both accumulators the registers hold no whole tile of weights."""
    if x_l.shape[1] > 32:
        s0, s1 = column_halves(x_s)
        l0, l1 = column_halves(x_l)
        N: tl.constexpr = x_l.shape[1] // 2
        mix_columns(s0, l0, r_s, r_l, swa_weight, rla_weight, out, rows, heads, inside, live, c0, DV, SOFT, MIX)
        mix_columns(s1, l1, r_s, r_l, swa_weight, rla_weight, out, rows, heads, inside, live, c0 + N, DV, SOFT, MIX)
    else:
        cols = c0 + tl.arange(0, x_l.shape[1])
        ok = inside[:, None] & (cols < DV)[None, :]
        if MIX:
            at = heads[:, None] * DV + cols[None, :]
            o = up(tl.load(rla_weight + at, mask=ok, other=0.0)) * (x_l * r_l[:, None])
            if SOFT:
                o += up(tl.load(swa_weight + at, mask=ok, other=0.0)) * (x_s * r_s[:, None])
        elif SOFT:
            o = x_s
        else:
            o = x_l
        o = tl.where(live[:, None], o, 0.0)
        tl.store(out + rows[:, None] + cols[None, :], down(o, out.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["w"])
def attend(
    q,  # [B, Tq, Hq, D] storage, by strides
    k, kr,  # [B, Tk, Hkv, D] storage, by strides: keys, and keys rotated
    v,  # [B, Tk, Hkv, Dv] storage, by strides
    swa_weight, rla_weight,  # [Hq, Dv] or None
    cos, sin,  # [M, D/2] or None
    positions,  # [B, Tk] int32 or None
    start,  # [B, Tk] int32 or None: first token of each token's segment
    first,  # [B] int32 or None: first token of the row's first segment
    q_scale, k_scale,  # [D] or None
    memory,  # [Hq, F, Dv] float32 or None
    states,  # [B, Hkv, chunks, F, Dv] WIDE or None
    out,  # [B, Tq, Hq, Dv] storage, contiguous
    stats,  # [2, B, Hq, Tq] float32: log-sum-exp, reciprocal RMS of the linear branch
    sq_b, sq_t, sq_h, sk_b, sk_t, sk_h, sr_b, sr_t, sr_h, sv_b, sv_t, sv_h,
    B, Tq, Tk, offset, w, N, chunks, Hkv, G, M, scale_log2, eps,
    D: tl.constexpr, DB: tl.constexpr, ND: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    HP: tl.constexpr, C: tl.constexpr, BN: tl.constexpr, BL: tl.constexpr, MAP: tl.constexpr,
    SOFT: tl.constexpr, LINEAR: tl.constexpr, MIX: tl.constexpr, HAS_STATES: tl.constexpr, HAS_MEMORY: tl.constexpr,
    HAS_ROPE: tl.constexpr, HAS_POSITIONS: tl.constexpr, HAS_SEGMENTS: tl.constexpr, HAS_Q_SCALE: tl.constexpr,
    HAS_K_SCALE: tl.constexpr, NARROW: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    WIDE_PRECISION: tl.constexpr,
):  # fmt: skip
    """SOFT, LINEAR: whether a branch reads tokens at all. Queries are tokens offset .. offset+Tq-1 of the keys."""
    R: tl.constexpr = C * HP
    F: tl.constexpr = D if MAP == "identity" else 2 * D
    NF: tl.constexpr = ND if MAP == "identity" else 2 * ND
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
    oldest = tl.min(tl.where(live, s, NOWHERE), axis=0)  # no tile before this token matters to any row
    oldest = (oldest // BL) * BL
    end = tl.minimum(t0 + C, Tk)

    q_at = q + b * sq_b + long(tile * C) * sq_t + long(h * G) * sq_h
    k_at = k + b * sk_b + long(h) * sk_h
    r_at = kr + b * sr_b + long(h) * sr_h
    v_at = v + b * sv_b + long(h) * sv_h
    keys = tl.arange(0, BN)
    few = tl.arange(0, BL)

    # -------------------------------------------------------------- tiles: [older | border | inner | own]
    saved, border, inner = tile_borders(t0, end, w, N, BL, SOFT, LINEAR)

    acc_l = tl.zeros([R, DVP], tl.float32)
    if LINEAR or HAS_STATES or HAS_MEMORY:
        raw = load_blocks(q_at, token * sq_t + g * sq_h, live, D, DB, ND)
        fq = phi_as(scaled(raw, q_scale, HAS_Q_SCALE, D, DB, ND), MAP, D, DB, ND, WIDE)
        if HAS_MEMORY:
            m_at = memory + long(h * G + hb * HP) * (F * DV)
            acc_l = read_state(fq, live, m_at, acc_l, D, DB, ND, NF, DV, DVP, WIDE, WIDE_PRECISION)
        if HAS_STATES:
            reads = live
            if HAS_SEGMENTS:
                reads = live & ((s < saved) | (s == row_first))
            h_at = states + ((b * Hkv + h) * chunks + saved // N) * (F * DV)
            acc_l = read_state(fq, reads, h_at, acc_l, D, DB, ND, NF, DV, DVP, WIDE, WIDE_PRECISION)
        if LINEAR:
            for i in range(tl.maximum(saved, oldest), border, BL):
                n, real = key_rows(i, start, b, Tk, BL, HAS_SEGMENTS)
                at = long(i)
                kt = load_blocks(k_at + at * sk_t, few * sk_t, real, D, DB, ND)
                vt = load_values(v_at + at * sv_t, few * sv_t, real, DV, DVP)
                fk = phi_as(scaled(kt, k_scale, HAS_K_SCALE, D, DB, ND), MAP, D, DB, ND, WIDE)
                acc_l = linear_step(fq, fk, vt, behind_window(t, s, n, w), acc_l, NF, WIDE, WIDE_PRECISION)

    acc_s = tl.zeros([R, DVP], tl.float32)
    m = tl.full([R], -float("inf"), tl.float32)
    l = tl.zeros([R], tl.float32)
    if SOFT:
        if HAS_ROPE:
            # Read again: cheaper than registers held since the feature map.
            x = scaled(load_blocks_again(q_at, token * sq_t + g * sq_h, live, D, DB, ND), q, False, D, DB, ND)
            position = positions_of(positions, start, b, t, live, Tk, HAS_POSITIONS, HAS_SEGMENTS)
            qr = blocks_as(rotate(x, cos, sin, position, live, M, False, D, DB, ND), ND, NARROW)
        else:
            qr = load_blocks_again(q_at, token * sq_t + g * sq_h, live, D, DB, ND)
        if LINEAR:
            for i in range(tl.maximum(border, oldest), inner, BL):
                n, real = key_rows(i, start, b, Tk, BL, HAS_SEGMENTS)
                at = long(i)
                kt = load_blocks(k_at + at * sk_t, few * sk_t, real, D, DB, ND)
                vt = load_values(v_at + at * sv_t, few * sv_t, real, DV, DVP)
                fk = phi_as(scaled(kt, k_scale, HAS_K_SCALE, D, DB, ND), MAP, D, DB, ND, WIDE)
                acc_l = linear_step(fq, fk, vt, behind_window(t, s, n, w), acc_l, NF, WIDE, WIDE_PRECISION)
                if HAS_ROPE:
                    kt = load_blocks(r_at + at * sr_t, few * sr_t, real, D, DB, ND)
                logits = scores(qr, kt, scale_log2, ND, NARROW, PRECISION)
                logits = tl.where(in_window(t, s, n, w), logits, -float("inf"))
                m, l, acc_s = softmax_step(logits, vt, m, l, acc_s, NARROW, PRECISION)
        inner = tl.maximum(inner, oldest)
        own = inner
        if not HAS_SEGMENTS:
            if LINEAR:  # every tile from `inner` up to the diagonal lies in the window of all rows
                own = inner + (tl.maximum(t0 - inner, 0) // BN) * BN
                for i in range(inner, own, BN):
                    at = long(i)
                    every = keys < BN
                    kt = load_blocks(r_at + at * sr_t, keys * sr_t, every, D, DB, ND)
                    vt = load_values(v_at + at * sv_t, keys * sv_t, every, DV, DVP)
                    logits = scores(qr, kt, scale_log2, ND, NARROW, PRECISION)
                    m, l, acc_s = softmax_step(logits, vt, m, l, acc_s, NARROW, PRECISION)
        for i in range(own, end, BN):
            n, real = key_rows(i, start, b, Tk, BN, HAS_SEGMENTS)
            at = long(i)
            kt = load_blocks(r_at + at * sr_t, keys * sr_t, real, D, DB, ND)
            vt = load_values(v_at + at * sv_t, keys * sv_t, real, DV, DVP)
            logits = scores(qr, kt, scale_log2, ND, NARROW, PRECISION)
            logits = tl.where(in_window(t, s, n, w), logits, -float("inf"))
            m, l, acc_s = softmax_step(logits, vt, m, l, acc_s, NARROW, PRECISION)
        # A live row has met its own token, so l >= 1 unless its logits are all -inf: 0/0 is then the right answer.
        acc_s = acc_s / l[:, None]
        m = m + tl.log2(l)

    # -------------------------------------------------------------- epilogue
    r_s = tl.zeros([R], tl.float32)
    r_l = tl.zeros([R], tl.float32)
    if MIX:
        r_l = tl.rsqrt(tl.sum(acc_l * acc_l, axis=1) / DV + eps)
        if SOFT:
            r_s = tl.rsqrt(tl.sum(acc_s * acc_s, axis=1) / DV + eps)
    Hq = Hkv * G
    o_at = out + ((b * Tq + tile * C) * Hq + h * G) * DV
    o_rows = (token * Hq + g) * DV
    mix_columns(acc_s, acc_l, r_s, r_l, swa_weight, rla_weight, o_at, o_rows, h * G + g, inside, live, 0, DV, SOFT, MIX)
    rows_at = stats + (b * Hq + h * G) * Tq + tile * C + long(g) * Tq + token
    plane = long(B) * Hq * Tq
    tl.store(rows_at, tl.where(live, m, 0.0), mask=inside)
    tl.store(rows_at + plane, tl.where(live, r_l, 0.0), mask=inside)
