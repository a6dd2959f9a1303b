"""Storage dtypes: their precision, and the one rounding at the end of a call."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

DTYPES: dict[str, type] = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}


@dataclass(frozen=True)
class Precision:
    """Of a binary format: u the unit roundoff, `tiny` the absolute error near zero, `top` the largest number."""

    u: float
    tiny: float
    top: float


PRECISION = {
    "float64": Precision(2.0**-53, 2.0**-1022, float(np.finfo(np.float64).max)),
    # Implementations may flush subnormal float32 and bfloat16 to zero; float16 has them, so half a subnormal is lost.
    "float32": Precision(2.0**-24, 2.0**-126, float(np.finfo(np.float32).max)),
    "bfloat16": Precision(2.0**-8, 2.0**-126, float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)),
    "float16": Precision(2.0**-11, 2.0**-25, float(np.finfo(np.float16).max)),
}


def round_once(x: np.ndarray, dtype: str) -> np.ndarray:
    """Round float64 to the nearest value of `dtype`, ties to even, once; integers pass. Always a fresh array.

    The cast of ml_dtypes from float64 goes through float32, which rounds twice. Rounding to float32 by truncation with
    a sticky last bit (round to odd) keeps what the second rounding needs to know.
    """
    if dtype not in DTYPES:
        return x.astype(dtype)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        if dtype != "bfloat16":
            return x.astype(DTYPES[dtype])
        near = x.astype(np.float32)
        below = np.where(np.abs(near.astype(np.float64)) > np.abs(x), np.nextafter(near, np.float32(0)), near)
        below = np.atleast_1d(below.astype(np.float32))
        sticky = (below.astype(np.float64) != x) & np.isfinite(below)
        odd = below.view(np.uint32) | sticky.astype(np.uint32)
        return odd.view(np.float32).reshape(x.shape).astype(DTYPES[dtype])
