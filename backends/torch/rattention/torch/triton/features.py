# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportReturnType=false
"""The feature map phi on tuples of blocks, its gradient, and the kernels of the operation `feature_map`.

phi of a row held as ND blocks is held as NF = 2 ND blocks (ND for identity): those of the positive half, then those of
the negative half, each beside the channels it came from. Everything is float32 (FM-4); channels past D have phi 0.

feature_map and feature_map_grad: one program per BN rows; each reads D (+ F) elements and writes F (or D) per row.
"""

import triton
import triton.language as tl
from rattention.torch.triton.tiles import blocks_as, column, down, load_block, load_blocks, long, store_blocks, up


@triton.jit
def scaled(x, scale, HAS_SCALE: tl.constexpr, D: tl.constexpr, DB: tl.constexpr, ND: tl.constexpr):
    """float32 blocks x * scale[D] (RLA-3)."""
    out = ()
    for j in tl.static_range(ND):
        y = up(x[j])
        if HAS_SCALE:
            cols, real = column(j, D, DB, ND)
            y = y * up(tl.load(scale + cols, mask=real, other=0.0))[None, :]
        out = out + (y,)
    return out


@triton.jit
def _softmax(x, NEGATE: tl.constexpr, D: tl.constexpr, DB: tl.constexpr, ND: tl.constexpr):
    """softmax over all channels of x, or of -x: ND blocks. Shifted by the row's maximum: finite at any size (FM-5)."""
    top = tl.full([x[0].shape[0]], -float("inf"), tl.float32)
    for j in tl.static_range(ND):
        _, real = column(j, D, DB, ND)
        y = -x[j] if NEGATE else x[j]
        top = tl.maximum(top, tl.max(tl.where(real[None, :], y, -float("inf")), axis=1))
    total = tl.zeros([x[0].shape[0]], tl.float32)
    weights = ()
    for j in tl.static_range(ND):
        _, real = column(j, D, DB, ND)
        y = -x[j] if NEGATE else x[j]
        e = tl.where(real[None, :], tl.exp(y - top[:, None]), 0.0)
        total += tl.sum(e, axis=1)
        weights = weights + (e,)
    out = ()
    for j in tl.static_range(ND):
        out = out + (weights[j] / total[:, None],)
    return out


@triton.jit
def phi(x, MAP: tl.constexpr, D: tl.constexpr, DB: tl.constexpr, ND: tl.constexpr):
    """phi of float32 blocks: NF blocks [R, DB] float32."""
    if MAP == "softmax":
        return _softmax(x, False, D, DB, ND) + _softmax(x, True, D, DB, ND)
    elif MAP == "relu":
        # `x > 0` is false for NaN, which must not pass for 0 (NUM-5): x - x carries NaN and inf - inf.
        positive = ()
        negative = ()
        for j in tl.static_range(ND):
            positive = positive + (tl.where(x[j] < 0, 0.0, x[j]),)
            negative = negative + (tl.where(x[j] > 0, 0.0, -x[j]),)
        return positive + negative
    else:
        return x


@triton.jit
def phi_as(x, MAP: tl.constexpr, D: tl.constexpr, DB: tl.constexpr, ND: tl.constexpr, DTYPE: tl.constexpr):
    """phi of float32 blocks, each half rounded to the operand dtype before the other is begun: fewer live registers."""
    if MAP == "softmax":
        positive = blocks_as(_softmax(x, False, D, DB, ND), ND, DTYPE)
        return positive + blocks_as(_softmax(x, True, D, DB, ND), ND, DTYPE)
    elif MAP == "relu":
        return blocks_as(phi(x, MAP, D, DB, ND), 2 * ND, DTYPE)
    else:
        return blocks_as(x, ND, DTYPE)


@triton.jit
def phi_grad(x, d, MAP: tl.constexpr, D: tl.constexpr, DB: tl.constexpr, ND: tl.constexpr):
    """Gradient with respect to x [ND blocks] from d, that of phi(x) [NF blocks]. One half of phi at a time."""
    if MAP == "softmax":
        f = _softmax(x, False, D, DB, ND)
        inner = tl.zeros([x[0].shape[0]], tl.float32)
        for j in tl.static_range(ND):
            inner += tl.sum(f[j] * d[j], axis=1)
        rising = ()
        for j in tl.static_range(ND):
            rising = rising + (f[j] * (d[j] - inner[:, None]),)
        f = _softmax(x, True, D, DB, ND)
        inner = tl.zeros([x[0].shape[0]], tl.float32)
        for j in tl.static_range(ND):
            inner += tl.sum(f[j] * d[j + ND], axis=1)
        out = ()
        for j in tl.static_range(ND):
            out = out + (rising[j] - f[j] * (d[j + ND] - inner[:, None]),)
        return out
    elif MAP == "relu":
        out = ()
        for j in tl.static_range(ND):
            out = out + (tl.where(x[j] > 0, d[j], 0.0) - tl.where(x[j] < 0, d[j + ND], 0.0),)
        return out
    else:
        return d


@triton.jit
def feature_map(
    x,  # [N, D] storage, contiguous rows
    out,  # [N, F] storage, contiguous
    N,
    D: tl.constexpr, DB: tl.constexpr, ND: tl.constexpr, MAP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    n0 = long(tl.program_id(0)) * BN
    rows = tl.arange(0, BN)
    live = n0 + rows < N
    F: tl.constexpr = D if MAP == "identity" else 2 * D
    raw = load_blocks(x + n0 * D, rows * D, live, D, DB, ND)
    y = phi(scaled(raw, x, False, D, DB, ND), MAP, D, DB, ND)
    base = out + n0 * F
    for j in tl.static_range(ND):
        cols, real = column(j, D, DB, ND)
        at = base + (rows * F)[:, None] + cols[None, :]
        ok = live[:, None] & real[None, :]
        tl.store(at, down(y[j], out.dtype.element_ty), mask=ok)
        if MAP != "identity":
            tl.store(at + D, down(y[j + ND], out.dtype.element_ty), mask=ok)


@triton.jit
def feature_map_grad(
    x,  # [N, D] storage
    d_out,  # [N, F] storage
    d_x,  # [N, D] storage
    N,
    D: tl.constexpr, DB: tl.constexpr, ND: tl.constexpr, MAP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    n0 = long(tl.program_id(0)) * BN
    rows = tl.arange(0, BN)
    live = n0 + rows < N
    F: tl.constexpr = D if MAP == "identity" else 2 * D
    raw = scaled(load_blocks(x + n0 * D, rows * D, live, D, DB, ND), x, False, D, DB, ND)
    d = ()
    for j in tl.static_range(ND):
        d = d + (up(load_block(d_out + n0 * F, rows * F, live, j, D, DB, ND)),)
    if MAP != "identity":
        for j in tl.static_range(ND):
            d = d + (up(load_block(d_out + n0 * F + D, rows * F, live, j, D, DB, ND)),)
    g = phi_grad(raw, d, MAP, D, DB, ND)
    store_blocks(d_x + n0 * D, rows * D, live, g, D, DB, ND)
