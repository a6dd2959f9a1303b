"""The array namespace of the quadratic form, in its plain meaning: float64 values.

`quadratic.py` is written once against these functions and the operators `+ - *`, indexing, `reshape` and `swapaxes`.
Evaluated with this module it yields values; evaluated with `bounded.py`, which has the same functions over arrays that
carry an error bound, it yields values and error budgets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Array = np.ndarray


def lift(x: np.ndarray, stored: bool) -> Array:
    """An input tensor as an array of this namespace. `stored` says that it has the storage dtype of the call."""
    return x.astype(np.float64, order="C")


def values(x: Array) -> np.ndarray:
    """The plain values, for decisions such as the sign in relu."""
    return x


def where(mask: np.ndarray, x: Array) -> Array:
    """x where the mask holds, else 0: selection, so that NaN behind the mask stays there (SEG-5, EXT-9)."""
    return np.where(mask, x, 0.0)


def concat(parts: Sequence[Array], axis: int) -> Array:
    return np.concatenate(parts, axis)


def take(x: Array, index: np.ndarray) -> Array:
    """Rows of the second-to-last axis: out[..., i, :] = x[..., index[..., i], :]; leading axes of index broadcast."""
    return np.take_along_axis(x, np.broadcast_to(index, x.shape[:-2] + index.shape[-1:])[..., None], -2)


def sum(x: Array, axis: int | tuple[int, ...], keepdims: bool = False) -> Array:
    return np.sum(x, axis, keepdims=keepdims)


def inner(a: Array, b: Array) -> Array:
    """sum over the last axis of a b, kept as an axis of size 1: a product of two matmul operands, row by row."""
    return np.sum(a * b, -1, keepdims=True)


def shared(x: Array, n: Any) -> Array:
    """x, one number of a row, about to be spread over its n entries: values are as they were, errors move together."""
    return x


def carried(x: Array, n: Any) -> Array:
    """x, a state that n tokens are added to one after another: values are as they were, each sum rounds at its size."""
    return x


def softmax(s: Array, mask: np.ndarray | None = None) -> Array:
    """Softmax over the last axis of the entries that the mask selects; a row without any is 0 (SWA-3, SWA-5).

    The row maximum is subtracted first, so that no finite score overflows.
    """
    with np.errstate(all="ignore"):
        z = s if mask is None else np.where(mask, s, -np.inf)
        top = z.max(-1, keepdims=True, initial=-np.inf)
        if mask is not None:
            top = np.where(mask.any(-1, keepdims=True), top, 0.0)
        e = np.exp(z - top)
        if mask is not None:
            e = np.where(mask, e, 0.0)
        total = e.sum(-1, keepdims=True)
        return e / np.where(total == 0, 1.0, total)


def recomputed(p: Array, s: Array, mask: np.ndarray) -> Array:
    """p = softmax(s) once more, as exp(s - lse) from a saved log-sum-exp: values are as they were, errors grow."""
    return p


def rms_norm(x: Array, eps: float) -> tuple[Array, Array]:
    """x / sqrt(mean(x^2) + eps) over the last axis, and the factor 1 / sqrt(...) itself (MIX-2)."""
    with np.errstate(all="ignore"):
        factor = 1.0 / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps)
        return x * factor, factor


def matmul(a: Array, b: Array, mask: np.ndarray | None = None, regroup: bool = False) -> Array:
    """sum over j of a[..., t, j] b[..., j, d], over the j that mask[..., t, j] selects.

    A masked product is selected away, never multiplied by zero: 0 * NaN would leak a token into rows that do not read
    it. `regroup` marks a product that an implementation may never form, because it may contract in another order;
    values do not depend on it, error bounds do.
    """
    with np.errstate(all="ignore"):
        if mask is None:
            return a @ b
        if np.isfinite(b).all():
            return np.where(mask, a, 0.0) @ b
        rows = [
            np.sum(np.where(mask[..., t, :, None], a[..., t, :, None] * b, 0.0), -2, keepdims=True)
            for t in range(a.shape[-2])
        ]
        return np.concatenate(rows, -2) if rows else a @ b
