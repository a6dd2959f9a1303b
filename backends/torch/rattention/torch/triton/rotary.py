# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportReturnType=false
"""Rotary embedding: blocks of a row turned by a table, and the kernel that turns all keys once.

rotate_keys reads K once and writes K rotated (2 D storage elements per token and key head, plus D table entries). The
softmax branch reads those; the feature map reads K itself (ROPE-5). Turning the keys here rather than in every query
tile that sees them saves w / C rotations and keeps the inner loop of the attention kernel free of table loads.
"""

import triton
import triton.language as tl
from rattention.torch.triton.tiles import column, load_blocks, long, store_blocks, up


@triton.jit
def rope_table(
    positions,  # [M] int32
    frequencies,  # [D/2] float64: theta^(-2j/D)
    cos, sin,  # [M, D/2] float32
    M, HALF, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Angles in float64, one rounding (ROPE-2)."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    cols = tl.arange(0, BC)
    position = tl.load(positions + rows, mask=rows < M, other=0).to(tl.float64)
    frequency = tl.load(frequencies + cols, mask=cols < HALF, other=0.0)
    angle = position[:, None] * frequency[None, :]
    at = long(rows)[:, None] * HALF + cols[None, :]
    ok = (rows < M)[:, None] & (cols < HALF)[None, :]
    tl.store(cos + at, tl.cos(angle).to(tl.float32), mask=ok)
    tl.store(sin + at, tl.sin(angle).to(tl.float32), mask=ok)


@triton.jit
def load_table(table, position, live, j, M, D: tl.constexpr, DB: tl.constexpr, ND: tl.constexpr):
    """Rows `position` of a table [M, D/2] for block j < ND/2. A live position outside the table reads NaN: it cannot be
    refused without waiting for the device, and must not pass for a number."""
    cols, real = column(j, D, DB, ND)
    inside = (position >= 0) & (position < M)
    at = table + position[:, None] * (D // 2) + cols[None, :]
    entry = up(tl.load(at, mask=(live & inside)[:, None] & real[None, :], other=0.0))
    return tl.where((live & (inside == 0))[:, None], float("nan"), entry)


@triton.jit
def rotate(x, cos, sin, position, live, M, TRANSPOSE: tl.constexpr, D: tl.constexpr, DB: tl.constexpr,
           ND: tl.constexpr):  # fmt: skip
    """Turn float32 blocks `x` by the table rows `position` [R] (ROPE-3), or by their transpose: the gradient."""
    first = ()
    second = ()
    for j in tl.static_range(ND // 2):
        c = load_table(cos, position, live, j, M, D, DB, ND)
        s = load_table(sin, position, live, j, M, D, DB, ND)
        if TRANSPOSE:
            s = -s
        a = x[j]
        b = x[j + ND // 2]
        first = first + (a * c - b * s,)
        second = second + (b * c + a * s,)
    return first + second


@triton.jit
def positions_of(positions, start, b, t, live, T, HAS_POSITIONS: tl.constexpr, HAS_SEGMENTS: tl.constexpr):
    """Row of the rotary table for tokens t [R] of batch row b: given, or the index within the segment (ROPE-4)."""
    if HAS_POSITIONS:
        return tl.load(positions + long(b) * T + t, mask=live, other=0)
    elif HAS_SEGMENTS:
        return t - tl.load(start + long(b) * T + t, mask=live, other=0)
    else:
        return t


@triton.jit
def rotate_keys(
    k,  # [B, T, Hkv, D] storage, by strides
    cos, sin,  # [M, D/2]
    positions,  # [B, T] int32 or None
    start,  # [B, T] int32 or None
    out,  # [B, T, Hkv, D] storage, contiguous
    stride_b, stride_t, stride_h, T, Hkv, M,
    D: tl.constexpr, DB: tl.constexpr, ND: tl.constexpr, BN: tl.constexpr,
    HAS_POSITIONS: tl.constexpr, HAS_SEGMENTS: tl.constexpr,
):  # fmt: skip
    """One program turns BN tokens of one batch row and key head. Padding is written as zero."""
    pid = tl.program_id(0)
    tiles = tl.cdiv(T, BN)
    tile = pid % tiles
    h = (pid // tiles) % Hkv
    b = pid // tiles // Hkv
    i0 = tile * BN
    rows = tl.arange(0, BN)
    t = i0 + rows
    written = t < T
    live = written
    if HAS_SEGMENTS:
        live = written & (tl.load(start + long(b) * T + t, mask=written, other=0) <= t)
    position = positions_of(positions, start, b, t, live, T, HAS_POSITIONS, HAS_SEGMENTS)
    base = k + long(b) * stride_b + long(i0) * stride_t + long(h) * stride_h
    x = load_blocks(base, rows * stride_t, live, D, DB, ND)
    y = ()
    for j in tl.static_range(ND):
        y = y + (up(x[j]),)
    y = rotate(y, cos, sin, position, live, M, False, D, DB, ND)
    to = out + ((long(b) * T + i0) * Hkv + h) * D
    store_blocks(to, rows * (Hkv * D), written, y, D, DB, ND)
