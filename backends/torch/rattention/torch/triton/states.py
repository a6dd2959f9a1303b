# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportReturnType=false
"""Phase one: the state of the linear branch at every N-th token, and the same sums backwards in time.

With p_c = c N and start[t] the first token of t's segment (NOWHERE for padding), the saved states are

    H_0 = S_init        H_{c+1} = L_c + (H_c if it belongs to the segment of token p_{c+1} - 1, else 0)
    L_c = sum of phi(k_i)^T v_i over the tokens i of chunk c in that segment

so H_c is the state of the segment that is live at the border p_c, and S_init while no segment has begun. A query of a
segment that starts at s may read H_c where s < p_c, or where its segment is the first of the row (SEG-2, SEG-6).
The gradient runs the other way: E_c = R_c + (E_{c+1} where H_{c+1} took H_c), R_c = sum of phi(q_t)^T d_rla_t over the
queries that read H_c.

1. local_states: one program per (batch row, head, chunk, tile of Dv). Sums of outer products inside a chunk, float32.
   Reads D + Dv elements per token (D again per further tile of Dv), writes F Dv floats per chunk.
2. carry_states / carry_gradients: one program per (batch row, head, tile of the state) walks the chunks in order. Reads
   F Dv floats and writes as many elements of the `WIDE` operand dtype per chunk; carries float32 (NUM-3).

Chunks are independent in step 1 and the walk of step 2 is elementwise, so a single long row still fills the device, and
the order of every sum is fixed (NUM-4).
"""

import triton
import triton.language as tl
from rattention.torch.triton.features import phi, scaled
from rattention.torch.triton.tiles import NOWHERE, column, dot, down, load_blocks, long, up, zero_blocks


@triton.jit(do_not_specialize=["w", "row_fold_end"])
def local_states(
    x,  # [B, T, H G, D] storage, by strides: keys (G = 1), or queries
    y,  # [B, T, H G, Dv], by strides: values, or gradients of the linear branch
    scale,  # [D] or None
    start,  # [B, Tk] int32 or None
    first, last, fold_end,  # [B] int32 or None: see Plan
    out,  # [B, H, chunks, F, Dv] float32
    sx_b, sx_t, sx_h, sy_b, sy_t, sy_h,
    Tk, offset, w, row_fold_end, N, chunks, H, G,
    D: tl.constexpr, DB: tl.constexpr, ND: tl.constexpr, DV: tl.constexpr, DVB: tl.constexpr, GP: tl.constexpr,
    BN: tl.constexpr, MAP: tl.constexpr, MODE: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SEGMENTS: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """MODE "keys": chunk c sums tokens [cN, (c+1)N); the last chunk sums what final_state adds to a saved state.
    MODE "queries": chunk c sums the queries that read H_c, those with t - w in chunk c. MODE "memory": chunk c sums
    queries [cN, (c+1)N), all of which read the memory."""
    F: tl.constexpr = D if MAP == "identity" else 2 * D
    NF: tl.constexpr = ND if MAP == "identity" else 2 * ND
    TILES: tl.constexpr = (DV + DVB - 1) // DVB
    pid = tl.program_id(0)
    tile = pid % TILES
    c = (pid // TILES) % chunks
    h = (pid // TILES // chunks) % H
    b = long(pid // TILES // chunks // H)
    lo = c * N
    hi = lo + N
    opening = 0
    if MODE == "keys":
        if HAS_SEGMENTS:
            opening = tl.load(start + b * Tk + tl.minimum(hi, Tk) - 1)
        if c == chunks - 1:
            hi = row_fold_end
            if HAS_SEGMENTS:
                hi = tl.load(fold_end + b)
                opening = tl.load(last + b)
            lo = (hi // N) * N
    elif MODE == "queries":
        hi = hi + w
        lo = tl.where(c == 0, offset, tl.maximum(lo + w, offset))
    else:
        lo += offset
        hi += offset
    hi = tl.minimum(hi, Tk)
    border = c * N
    row_first = 0
    if HAS_SEGMENTS:
        row_first = tl.load(first + b)

    acc = zero_blocks(DB, DVB, NF)
    rows = tl.arange(0, BN * GP)
    token = rows // GP
    g = rows % GP
    v_cols = tile * DVB + tl.arange(0, DVB)
    for i in range(lo, hi, BN):
        t = i + token
        live = (t < hi) & (g < G)
        if HAS_SEGMENTS:
            s = tl.load(start + b * Tk + t, mask=live, other=NOWHERE)
            live = live & (s <= t)
            if MODE == "keys":
                live = live & (t >= opening)
            elif MODE == "queries":
                live = live & ((s < border) | (s == row_first))
        i_x = long(i - offset)
        head = long(h * G)
        raw = load_blocks(x + b * sx_b + i_x * sx_t + head * sx_h, token * sx_t + g * sx_h, live, D, DB, ND)
        f = phi(scaled(raw, scale, HAS_SCALE, D, DB, ND), MAP, D, DB, ND)
        at = y + b * sy_b + i_x * sy_t + head * sy_h + (token * sy_t + g * sy_h)[:, None] + v_cols[None, :]
        values = tl.load(at, mask=live[:, None] & (v_cols < DV)[None, :], other=0.0)
        sums = ()
        for j in tl.static_range(NF):
            sums = sums + (dot(tl.trans(f[j]), values, acc[j], WIDE, PRECISION),)
        acc = sums

    base = out + ((b * H + h) * chunks + c) * (F * DV)
    for j in tl.static_range(NF):
        cols, real = column(j % ND, D, DB, ND)
        at = base + ((j // ND) * D + cols)[:, None] * DV + v_cols[None, :]
        tl.store(at, acc[j], mask=real[:, None] & (v_cols < DV)[None, :])


@triton.jit
def _continues(start, row_first, b, c, N, Tk, HAS_SEGMENTS: tl.constexpr):
    """Whether H_{c+1} takes H_c: the segment live at the border p_{c+1} began before chunk c, or is the first one, or
    the first one is still to come."""
    if HAS_SEGMENTS:
        at = tl.minimum((c + 1) * N, Tk) - 1
        s = tl.load(start + b * Tk + at)
        return (s < c * N) | (s == row_first) | (at < row_first)
    else:
        return c >= 0


@triton.jit(do_not_specialize=["row_fold_end"])
def carry_states(
    local,  # [B, H, chunks, F, Dv] float32, of local_states in MODE "keys"
    initial,  # [B, H, F, Dv] float32 or None
    start, first, last, fold_end,
    states,  # [B, H, chunks, F, Dv] WIDE: H_c
    final,  # [B, H, F, Dv] float32
    Tk, row_fold_end, N, chunks, H, SIZE,
    BE: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_SEGMENTS: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    tiles = tl.cdiv(SIZE, BE)
    e = (pid % tiles) * BE + tl.arange(0, BE)
    ok = e < SIZE
    bh = long(pid // tiles)
    b = bh // H
    row_first = 0
    row_last = 0
    end = row_fold_end
    if HAS_SEGMENTS:
        row_first = tl.load(first + b)
        row_last = tl.load(last + b)
        end = tl.load(fold_end + b)
    folded = end // N
    acc = tl.zeros([BE], tl.float32)
    if HAS_INITIAL:
        acc = tl.load(initial + bh * SIZE + e, mask=ok, other=0.0)
    saved = acc
    tail = tl.zeros([BE], tl.float32)
    for c in range(0, chunks):
        at = (bh * chunks + c) * SIZE + e
        tl.store(states + at, down(acc, states.dtype.element_ty), mask=ok)
        saved = tl.where(c == folded, acc, saved)
        tail = tl.load(local + at, mask=ok, other=0.0)
        acc = tail + tl.where(_continues(start, row_first, b, c, N, Tk, HAS_SEGMENTS), acc, 0.0)
    if HAS_SEGMENTS:
        saved = tl.where((row_last < folded * N) | (row_last == row_first), saved, 0.0)
    tl.store(final + bh * SIZE + e, saved + tail, mask=ok)


@triton.jit(do_not_specialize=["row_fold_end"])
def carry_gradients(
    local,  # [B, H, chunks, F, Dv] float32, of local_states in MODE "queries"
    d_final,  # [B, H, F, Dv] float32 or None
    start, first, last, fold_end,
    grads,  # [B, H, chunks, F, Dv] WIDE: E_c
    d_initial,  # [B, H, F, Dv] float32
    Tk, row_fold_end, N, chunks, H, SIZE,
    BE: tl.constexpr, HAS_D_FINAL: tl.constexpr, HAS_SEGMENTS: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    tiles = tl.cdiv(SIZE, BE)
    e = (pid % tiles) * BE + tl.arange(0, BE)
    ok = e < SIZE
    bh = long(pid // tiles)
    b = bh // H
    row_first = 0
    row_last = 0
    end = row_fold_end
    if HAS_SEGMENTS:
        row_first = tl.load(first + b)
        row_last = tl.load(last + b)
        end = tl.load(fold_end + b)
    folded = end // N
    d_tail = tl.zeros([BE], tl.float32)
    if HAS_D_FINAL:
        d_tail = tl.load(d_final + bh * SIZE + e, mask=ok, other=0.0)
        if HAS_SEGMENTS:
            d_tail = tl.where((row_last < folded * N) | (row_last == row_first), d_tail, 0.0)
    acc = tl.zeros([BE], tl.float32)
    for step in range(0, chunks):
        c = chunks - 1 - step
        at = (bh * chunks + c) * SIZE + e
        later = tl.where(_continues(start, row_first, b, c, N, Tk, HAS_SEGMENTS), acc, 0.0)
        acc = up(tl.load(local + at, mask=ok, other=0.0)) + later
        if HAS_D_FINAL:
            acc += tl.where(c == folded, d_tail, 0.0)
        tl.store(grads + at, down(acc, grads.dtype.element_ty), mask=ok)
    tl.store(d_initial + bh * SIZE + e, acc, mask=ok)
