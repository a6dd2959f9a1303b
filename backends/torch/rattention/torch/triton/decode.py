# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportReturnType=false
"""Decode: one new token per row. One program per (batch row, key head, split of the work).

    fold first   S += phi(k_new)^T v_new           only for window -1, whose query reads its own token
    state        acc_l = phi(q) (S + M)            each tile of S is read once,
    fold         S' = S + phi(k_old)^T v_old       and its successor written once: the token that leaves the ring
    ring         acc_s = online softmax over the cached slots; keys are turned on the fly (EXT-3)
    own          the new token, from its own tensors
    out          both norms and the mix, one write (in `combine` where the work is split)

The G query heads of the group are the rows of one tile, padded to 16 so that matrix units apply. Bound by memory:
traffic per (row, key head) is W (D + Dv) storage elements of the ring, F Dv floats of state read and F Dv written; rows
of the table are shared by all heads and rows and stay in cache. Splits share the tiles of the ring and of the state
round robin; each writes its running maximum, sum and accumulators [G, Dv], and `combine` adds them in order (NUM-4).

Two layouts of the ring: "canonical", slot j holds position length - W + j, read only; and "moving", W + 1 slots,
position p in slot p mod (W + 1), to which the new token is written in place. The spare slot is the one that no query
of this step reads, so nothing is read and written in one step.
"""

import triton
import triton.language as tl
from rattention.torch.triton.attention import scores, softmax_step
from rattention.torch.triton.features import phi, phi_as, scaled
from rattention.torch.triton.rotary import rotate
from rattention.torch.triton.tiles import (
    blocks_as,
    dot,
    load_blocks,
    load_state,
    load_values,
    long,
    store_blocks,
    store_state,
    store_values,
    times,
    up,
)


@triton.jit
def finish(
    acc_s, l, acc_l, g, live, swa_weight, rla_weight, out, h, b, Hkv, G, eps,
    DV: tl.constexpr, DVP: tl.constexpr, SOFT: tl.constexpr,
):  # fmt: skip
    """Both norms and the mix of rows g [R]; write [R, Dv] of `out`. A row that is not live gets 0 (EXT-7)."""
    cols = tl.arange(0, DVP)
    ok = (g < G)[:, None] & (cols < DV)[None, :]
    at = ((h * G + g) * DV)[:, None] + cols[None, :]
    r = tl.rsqrt(tl.sum(acc_l * acc_l, axis=1) / DV + eps)
    o = up(tl.load(rla_weight + at, mask=ok, other=0.0)) * (acc_l * r[:, None])
    if SOFT:
        x = acc_s / l[:, None]
        r = tl.rsqrt(tl.sum(x * x, axis=1) / DV + eps)
        o += up(tl.load(swa_weight + at, mask=ok, other=0.0)) * (x * r[:, None])
    o = tl.where(live, o, 0.0)
    store_values(out + (b * Hkv + h) * G * DV, g * DV, g < G, o, DV, DVP)


@triton.jit(do_not_specialize=["splits"])
def decode(
    q,  # [B, Hq, D] storage, contiguous
    k, v,  # [B, Hkv, D], [B, Hkv, Dv] storage, contiguous: the new token
    ring_k, ring_v,  # [B, slots, Hkv, .] storage, contiguous, keys unrotated
    state,  # [B, Hkv, F, Dv] float32
    next_state,  # the same shape; may be `state` itself
    length,  # [B] int32: tokens seen before this one
    active,  # [B] int32 or None: 0 for a row without a new token
    swa_weight, rla_weight, cos, sin, q_scale, k_scale, memory,
    out,  # [B, Hq, Dv] storage
    partial,  # [B, Hkv, SPLITS, R, 2 DVP + 2] float32 or None
    W, slots, Hkv, G, M, splits, scale_log2, eps,
    D: tl.constexpr, DB: tl.constexpr, ND: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, R: tl.constexpr,
    BN: tl.constexpr, SPLITS: tl.constexpr, MAP: tl.constexpr, SOFT: tl.constexpr, FOLD_FIRST: tl.constexpr,
    MOVING: tl.constexpr, HAS_ACTIVE: tl.constexpr, HAS_MEMORY: tl.constexpr, HAS_ROPE: tl.constexpr,
    HAS_Q_SCALE: tl.constexpr, HAS_K_SCALE: tl.constexpr, NARROW: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, WIDE_PRECISION: tl.constexpr,
):  # fmt: skip
    F: tl.constexpr = D if MAP == "identity" else 2 * D
    NF: tl.constexpr = ND if MAP == "identity" else 2 * ND
    pid = tl.program_id(0)
    split = pid % SPLITS
    h = (pid // SPLITS) % Hkv
    b = long(pid // SPLITS // Hkv)
    seen = tl.load(length + b)
    live = seen >= 0
    if HAS_ACTIVE:
        live = tl.load(active + b) > 0
    g = tl.arange(0, R)
    one = tl.arange(0, 1)
    rows = (g < G) & live
    alone = (one < 1) & live
    raw = load_blocks(q + (b * Hkv + h) * G * D, g * D, rows, D, DB, ND)
    k_new = load_blocks(k + (b * Hkv + h) * D, one, alone, D, DB, ND)
    v_new = load_values(v + (b * Hkv + h) * DV, one, alone, DV, DVP)
    head = b * slots * Hkv + h

    # -------------------------------------------------------------- the token that enters the state
    entering = alone
    k_old = k_new
    v_old = v_new
    if W > 0:
        leaving = seen - W
        entering = alone & (leaving >= 0)
        slot = 0
        if MOVING:
            slot = tl.maximum(leaving, 0) % slots
        k_old = load_blocks(ring_k + (head + long(slot) * Hkv) * D, one, entering, D, DB, ND)
        v_old = load_values(ring_v + (head + long(slot) * Hkv) * DV, one, entering, DV, DVP)
    f_old = phi(scaled(k_old, k_scale, HAS_K_SCALE, D, DB, ND), MAP, D, DB, ND)

    # -------------------------------------------------------------- state: read once, written once
    fq = phi_as(scaled(raw, q_scale, HAS_Q_SCALE, D, DB, ND), MAP, D, DB, ND, WIDE)
    acc_l = tl.zeros([R, DVP], tl.float32)
    s_at = (b * Hkv + h) * (F * DV)
    for j in tl.static_range(NF):
        # The condition is left to run time: without a branch between them the tiles' registers overlap, and spill.
        if j % splits == split:
            s = load_state(state + s_at, j % ND, j // ND, D, DB, ND, DV, DVP)
            enters = tl.where(entering[:, None], tl.trans(f_old[j]) * up(v_old), 0.0)
            if FOLD_FIRST:
                s += enters
                acc_l = dot(fq[j], s, acc_l, WIDE, WIDE_PRECISION)
            else:
                acc_l = dot(fq[j], s, acc_l, WIDE, WIDE_PRECISION)
                s += enters
            store_state(next_state + s_at, s, j % ND, j // ND, D, DB, ND, DV, DVP)
            if HAS_MEMORY:
                for head_g in range(0, G):
                    m_at = memory + long(h * G + head_g) * (F * DV)
                    x = load_state(m_at, j % ND, j // ND, D, DB, ND, DV, DVP)
                    f = tl.where((g == head_g)[:, None], fq[j], 0.0)
                    acc_l = dot(f, x, acc_l, WIDE, WIDE_PRECISION)

    # -------------------------------------------------------------- ring, and the new token itself
    acc_s = tl.zeros([R, DVP], tl.float32)
    m = tl.full([R], -float("inf"), tl.float32)
    l = tl.zeros([R], tl.float32)
    if SOFT:
        here = seen + tl.zeros([R], tl.int32)
        x = scaled(raw, q, False, D, DB, ND)
        y = scaled(k_new, q, False, D, DB, ND)
        if HAS_ROPE:
            x = rotate(x, cos, sin, here, rows, M, False, D, DB, ND)
            y = rotate(y, cos, sin, seen + tl.zeros([1], tl.int32), alone, M, False, D, DB, ND)
        qr = blocks_as(x, ND, NARROW)
        kr = blocks_as(y, ND, NARROW)
        if split == 0:
            m = tl.zeros([R], tl.float32)
            for j in tl.static_range(ND):
                m += tl.sum(up(qr[j]) * up(kr[j]), axis=1)
            m = times(m, scale_log2)
            l = tl.exp2(m - m)  # 1, or NaN where the formulas make it so
            acc_s = l[:, None] * up(v_new)
        tile = tl.arange(0, BN)
        for i in range(split * BN, tl.minimum(slots, W + MOVING), SPLITS * BN):
            slot = i + tile
            if MOVING:
                position = seen - 1 - (seen + slots - 1 - slot) % slots
                real = (slot < slots) & (position >= 0) & (position >= seen - W) & live
            else:
                position = seen - W + slot
                real = (slot < slots) & (position >= 0) & live
            at = head + long(i) * Hkv
            kt = load_blocks(ring_k + at * D, tile * (Hkv * D), real, D, DB, ND)
            vt = load_values(ring_v + at * DV, tile * (Hkv * DV), real, DV, DVP)
            if HAS_ROPE:
                turned = rotate(scaled(kt, q, False, D, DB, ND), cos, sin, position, real, M, False, D, DB, ND)
                kt = blocks_as(turned, ND, NARROW)
            logits = tl.where(real[None, :], scores(qr, kt, scale_log2, ND, NARROW, PRECISION), -float("inf"))
            m, l, acc_s = softmax_step(logits, vt, m, l, acc_s, NARROW, PRECISION)

    if MOVING:
        if split == 0:
            slot = seen % slots
            y = scaled(k_new, q, False, D, DB, ND)
            store_blocks(ring_k + (head + long(slot) * Hkv) * D, one, alone, y, D, DB, ND)
            store_values(ring_v + (head + long(slot) * Hkv) * DV, one, alone, up(v_new), DV, DVP)

    if SPLITS == 1:
        finish(acc_s, l, acc_l, g, live, swa_weight, rla_weight, out, h, b, Hkv, G, eps, DV, DVP, SOFT)
    else:
        width: tl.constexpr = 2 * DVP + 2
        at = partial + (((b * Hkv + h) * SPLITS + split) * R + g) * width
        cols = tl.arange(0, DVP)
        exists = g < G
        tl.store(at, m, mask=exists)
        tl.store(at + 1, l, mask=exists)
        tl.store(at[:, None] + 2 + cols[None, :], acc_s, mask=exists[:, None])
        tl.store(at[:, None] + 2 + DVP + cols[None, :], acc_l, mask=exists[:, None])


@triton.jit
def combine(
    partial,  # [B, Hkv, SPLITS, R, 2 DVP + 2] float32
    active, swa_weight, rla_weight, out, Hkv, G, eps,
    DV: tl.constexpr, DVP: tl.constexpr, R: tl.constexpr, SPLITS: tl.constexpr, SOFT: tl.constexpr,
    HAS_ACTIVE: tl.constexpr,
):  # fmt: skip
    """Join the splits of one (batch row, key head), in order."""
    h = tl.program_id(0) % Hkv
    b = long(tl.program_id(0) // Hkv)
    live = h >= 0
    if HAS_ACTIVE:
        live = tl.load(active + b) > 0
    g = tl.arange(0, R)
    exists = g < G
    cols = tl.arange(0, DVP)
    width: tl.constexpr = 2 * DVP + 2
    acc_s = tl.zeros([R, DVP], tl.float32)
    acc_l = tl.zeros([R, DVP], tl.float32)
    m = tl.full([R], -float("inf"), tl.float32)
    l = tl.zeros([R], tl.float32)
    for split in range(0, SPLITS):
        at = partial + (((b * Hkv + h) * SPLITS + split) * R + g) * width
        acc_l += tl.load(at[:, None] + 2 + DVP + cols[None, :], mask=exists[:, None], other=0.0)
        if SOFT:
            other = tl.load(at, mask=exists, other=0.0)
            top = tl.maximum(m, other)
            shift = tl.where(top == -float("inf"), 0.0, top)
            mine = tl.exp2(m - shift)
            theirs = tl.exp2(other - shift)
            l = l * mine + tl.load(at + 1, mask=exists, other=0.0) * theirs
            x = tl.load(at[:, None] + 2 + cols[None, :], mask=exists[:, None], other=0.0)
            acc_s = acc_s * mine[:, None] + x * theirs[:, None]
            m = top
    finish(acc_s, l, acc_l, g, live, swa_weight, rla_weight, out, h, b, Hkv, G, eps, DV, DVP, SOFT)
