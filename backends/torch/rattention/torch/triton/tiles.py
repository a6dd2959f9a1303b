# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportReturnType=false
"""Tiles: how the kernels hold, load, round and multiply blocks of tokens.

A row of D channels is held as a tuple of ND blocks of DB channels. The two halves of the row (0 .. ceil(D/2)-1 and the
rest) fill ND/2 blocks each, so that block j and block j + ND/2 are the two sides of the rotary pairs, and no block is
wider than 64 channels: that bounds the shared memory of one operand at any D. Channels past the end of a half are
zero. A row of Dv channels is one tile, padded to a power of two.

The kernels compute in float32. Operands of matrix products are rounded to a dtype chosen by the launcher: `NARROW` (the
storage dtype) where their range is bounded by that of the inputs, `WIDE` where it is not. For float16 storage `WIDE`
is float32 multiplied in TF32, whose mantissa is that of float16 and whose range is that of float32: a state, a score of
an unbounded feature map or a gradient through a small norm may pass 65504.

NumPy has no bfloat16: Triton's interpreter truncates where the device rounds to nearest, and multiplies bit patterns.
Under the interpreter the helpers below therefore round explicitly and keep the rounded values in float32.
"""

import triton
import triton.language as tl
from triton import knobs

INTERPRET = tl.constexpr(bool(knobs.runtime.interpret))
NOWHERE = tl.constexpr(2**31 - 1)
"""Segment start of a padding token: later than every token, so that nothing is in its segment."""


@triton.jit
def long(x):
    """`x` as int64, whether a tensor, a loop index, or an argument that specialisation made a constant."""
    return x + tl.full([], 0, tl.int64)


@triton.jit
def up(x):
    """Storage to float32, exactly."""
    if INTERPRET:
        if x.dtype == tl.bfloat16:
            return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def _nearest_bfloat16(x):
    """Bits of float32 `x` rounded to nearest even at the bfloat16 mantissa, NaN kept."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    return tl.where(x == x, rounded, 0x7FC00000)


@triton.jit
def down(x, DTYPE: tl.constexpr):
    """float32 to `DTYPE`, rounding to nearest even: for stores."""
    if INTERPRET:
        if tl.bfloat16 == DTYPE:
            return (_nearest_bfloat16(x) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def operand(x, DTYPE: tl.constexpr):
    """float32 or storage to `DTYPE`, for matrix products."""
    if INTERPRET:
        if tl.bfloat16 == DTYPE:
            return _nearest_bfloat16(up(x)).to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def blocks_as(x, ND: tl.constexpr, DTYPE: tl.constexpr):
    out = ()
    for j in tl.static_range(ND):
        out = out + (operand(x[j], DTYPE),)
    return out


@triton.jit
def column(j, D: tl.constexpr, DB: tl.constexpr, ND: tl.constexpr):
    """Channel numbers [DB] of block j, and which of them exist."""
    HALF: tl.constexpr = (D + 1) // 2
    inner = (j % (ND // 2)) * DB + tl.arange(0, DB)
    if j < ND // 2:
        return inner, inner < HALF
    else:
        return HALF + inner, inner < D - HALF


@triton.jit
def load_block(base, rows, live, j, D: tl.constexpr, DB: tl.constexpr, ND: tl.constexpr):
    """Block j of the rows at `base + rows` (element offsets [R]); zero where not `live`."""
    cols, real = column(j, D, DB, ND)
    if D == DB * ND:
        return tl.load(base + rows[:, None] + cols[None, :], mask=live[:, None], other=0.0)
    else:
        return tl.load(base + rows[:, None] + cols[None, :], mask=live[:, None] & real[None, :], other=0.0)


@triton.jit
def load_blocks(base, rows, live, D: tl.constexpr, DB: tl.constexpr, ND: tl.constexpr):
    """All blocks of the rows at `base + rows`, in the dtype they are stored in."""
    out = ()
    for j in tl.static_range(ND):
        out = out + (load_block(base, rows, live, j, D, DB, ND),)
    return out


@triton.jit
def load_blocks_again(base, rows, live, D: tl.constexpr, DB: tl.constexpr, ND: tl.constexpr):
    """`load_blocks` that the compiler does not merge with an earlier one: its registers were given up in between."""
    out = ()
    for j in tl.static_range(ND):
        cols, real = column(j, D, DB, ND)
        at = base + rows[:, None] + cols[None, :]
        out = out + (tl.load(at, mask=live[:, None] & real[None, :], other=0.0, eviction_policy="evict_first"),)
    return out


@triton.jit
def store_blocks(base, rows, live, x, D: tl.constexpr, DB: tl.constexpr, ND: tl.constexpr):
    """Write float32 blocks, rounded once to the dtype of the memory behind `base`."""
    for j in tl.static_range(ND):
        cols, real = column(j, D, DB, ND)
        at = base + rows[:, None] + cols[None, :]
        tl.store(at, down(x[j], base.dtype.element_ty), mask=live[:, None] & real[None, :])


@triton.jit
def load_values(base, rows, live, DV: tl.constexpr, DVP: tl.constexpr):
    """Rows of Dv channels [R, DVP]; zero where not `live` and past Dv."""
    cols = tl.arange(0, DVP)
    if DV == DVP:
        return tl.load(base + rows[:, None] + cols[None, :], mask=live[:, None], other=0.0)
    else:
        return tl.load(base + rows[:, None] + cols[None, :], mask=live[:, None] & (cols < DV)[None, :], other=0.0)


@triton.jit
def store_values(base, rows, live, x, DV: tl.constexpr, DVP: tl.constexpr):
    cols = tl.arange(0, DVP)
    at = base + rows[:, None] + cols[None, :]
    tl.store(at, down(x, base.dtype.element_ty), mask=live[:, None] & (cols < DV)[None, :])


@triton.jit
def load_state(base, j, sign: tl.constexpr, D: tl.constexpr, DB: tl.constexpr, ND: tl.constexpr, DV: tl.constexpr,
               DVP: tl.constexpr):  # fmt: skip
    """Rows of a state [F, Dv] that belong to block j of phi's positive (sign 0) or negative (1) half: [DB, DVP]."""
    cols, real = column(j, D, DB, ND)
    return load_values(base, (sign * D + cols) * DV, real, DV, DVP)


@triton.jit
def store_state(base, x, j, sign: tl.constexpr, D: tl.constexpr, DB: tl.constexpr, ND: tl.constexpr, DV: tl.constexpr,
                DVP: tl.constexpr):  # fmt: skip
    cols, real = column(j, D, DB, ND)
    store_values(base, (sign * D + cols) * DV, real, x, DV, DVP)


@triton.jit
def times(x, y):
    """x * y, rounded before anything else is done with it.

    A compiler contracts a product with the subtraction of a maximum that follows: then unrounded products meet their
    own rounded maximum, and at great sizes none of them, or one far above it, is left of a softmax. A fused
    multiply-add is not contracted again, and costs the same.
    """
    return tl.fma(x, y, 0.0)


@triton.jit
def dot(a, b, acc, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """acc + a b, operands rounded to `DTYPE`, sums in float32."""
    return tl.dot(operand(a, DTYPE), operand(b, DTYPE), acc, input_precision=PRECISION)


@triton.jit
def dot_rows(a, b, n: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """sum_j a_j b_j^T over n blocks: inner products of the rows of a and b, [Ra, Rb] float32."""
    acc = tl.zeros([a[0].shape[0], b[0].shape[0]], tl.float32)
    for j in tl.static_range(n):
        acc = dot(a[j], tl.trans(b[j]), acc, DTYPE, PRECISION)
    return acc


@triton.jit
def zero_blocks(R: tl.constexpr, DB: tl.constexpr, n: tl.constexpr):
    out = ()
    for _ in tl.static_range(n):
        out = out + (tl.zeros([R, DB], tl.float32),)
    return out


@triton.jit
def add_weighted(acc, weights, x, n: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """acc_j + weights x_j for each of n blocks: weights [R, N], x_j [N, DB]."""
    out = ()
    for j in tl.static_range(n):
        out = out + (dot(weights, x[j], acc[j], DTYPE, PRECISION),)
    return out
