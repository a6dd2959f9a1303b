# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportReturnType=false
"""The operation `rms_mix` by itself: one program per BN tokens of one head, each row read once and written once.

mix reads 2 Dv and writes Dv elements per row. mix_grad reads 3 Dv and writes 2 Dv, and one row of partial sums per
program for the two weights, added by a second, ordered reduction.
"""

import triton
import triton.language as tl
from rattention.torch.triton.output_grad import norm_grad
from rattention.torch.triton.tiles import load_values, long, store_values, up


@triton.jit
def load_weight(weight, h, DV: tl.constexpr, DVP: tl.constexpr):
    cols = tl.arange(0, DVP)
    return up(tl.load(weight + h * DV + cols, mask=cols < DV, other=0.0))[None, :]


@triton.jit
def mix(
    swa, rla,  # [N, Hq, Dv] storage, contiguous
    swa_weight, rla_weight,  # [Hq, Dv]
    out,  # [N, Hq, Dv] storage
    N, Hq, eps, DV: tl.constexpr, DVP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(0) % Hq
    n0 = long(tl.program_id(0) // Hq) * BN
    rows = tl.arange(0, BN)
    live = n0 + rows < N
    at = (n0 * Hq + h) * DV
    a = up(load_values(swa + at, rows * (Hq * DV), live, DV, DVP))
    b = up(load_values(rla + at, rows * (Hq * DV), live, DV, DVP))
    ra = tl.rsqrt(tl.sum(a * a, axis=1) / DV + eps)
    rb = tl.rsqrt(tl.sum(b * b, axis=1) / DV + eps)
    o = load_weight(swa_weight, h, DV, DVP) * (a * ra[:, None])
    o += load_weight(rla_weight, h, DV, DVP) * (b * rb[:, None])
    store_values(out + at, rows * (Hq * DV), live, o, DV, DVP)


@triton.jit
def mix_grad(
    swa, rla, swa_weight, rla_weight,
    d_out,  # [N, Hq, Dv] storage
    d_swa, d_rla,  # [N, Hq, Dv] storage
    dw_s, dw_l,  # [programs / Hq, Hq, Dv] float32
    N, Hq, eps, DV: tl.constexpr, DVP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(0) % Hq
    n0 = long(tl.program_id(0) // Hq) * BN
    rows = tl.arange(0, BN)
    live = n0 + rows < N
    at = (n0 * Hq + h) * DV
    cols = tl.arange(0, DVP)
    part = long(tl.program_id(0)) * DV + cols
    d = up(load_values(d_out + at, rows * (Hq * DV), live, DV, DVP))
    x = up(load_values(swa + at, rows * (Hq * DV), live, DV, DVP))
    r = tl.rsqrt(tl.sum(x * x, axis=1) / DV + eps)
    dx, dw = norm_grad(x, r, load_weight(swa_weight, h, DV, DVP), d, live, DV)
    store_values(d_swa + at, rows * (Hq * DV), live, dx, DV, DVP)
    tl.store(dw_s + part, tl.sum(dw, axis=0), mask=cols < DV)
    x = up(load_values(rla + at, rows * (Hq * DV), live, DV, DVP))
    r = tl.rsqrt(tl.sum(x * x, axis=1) / DV + eps)
    dx, dw = norm_grad(x, r, load_weight(rla_weight, h, DV, DVP), d, live, DV)
    store_values(d_rla + at, rows * (Hq * DV), live, dx, DV, DVP)
    tl.store(dw_l + part, tl.sum(dw, axis=0), mask=cols < DV)
