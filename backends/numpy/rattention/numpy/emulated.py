"""What a machine computes: the namespace of the quadratic form in its third meaning, float32 with real roundings.

Not an implementation to use, but the yardstick of the error budget: `Space("bfloat16")` is an honest implementation
that takes every liberty that the spec gives (chapter 10), so its share of the budget says how sharp the budget is; and
the keyword arguments plant faults in it, which the budget has to catch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from rattention.numpy import exact, quadratic
from rattention.numpy.storage import DTYPES, round_once


def run(op: str, tensors: Mapping[str, Any], attrs: Mapping[str, Any], **space: Any) -> dict[str, np.ndarray]:
    """One operation, or its `.vjp`, rounded to its output dtypes. `space`: keyword arguments of `Space`."""
    call = quadratic.check(op, tensors, attrs)
    given = {name: np.asarray(tensors[name]) for name in call.given}
    xp = Space(call.storage, **space)
    with np.errstate(all="ignore"):
        values = quadratic.evaluate(xp, call, quadratic.lift(xp, call, given))
    dtypes = call.output_dtypes({name: str(x.dtype) for name, x in given.items()})
    return {n: round_once(np.asarray(x, np.float64), dtypes[n]) for n, x in values.items()}


def to_tf32(x: np.ndarray) -> np.ndarray:
    """float32 rounded to the 10 stored mantissa bits of TF32, ties away from zero."""
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


@dataclass(frozen=True)
class Space:
    """The functions of `exact.py` in float32.

    Attributes:
        storage: storage dtype of the call.
        operands: what operands of matrix products are rounded to: the storage dtype by default, or `tf32`.
        state: what the running state of the linear branch is held in; anything but float32 is a fault (NUM-3).
        folded: contract phi(k)^T v first, as a state does, instead of phi(q) phi(k)^T.
        sequential: add term by term, instead of as the BLAS does.
        saved: the backward pass makes the softmax weights again from scores and a saved log-sum-exp.
        stretch: round operands on the grid of storage divided by this factor, as an implementation does that holds
            them in another scale, such as weights before their division by the softmax denominator.
        inner_eps: a fault: eps outside the root (MIX-2).
    """

    storage: str
    operands: str = ""
    state: str = "float32"
    folded: bool = False
    sequential: bool = False
    saved: bool = False
    stretch: float = 1.0
    inner_eps: bool = True

    def lift(self, x: np.ndarray, stored: bool) -> np.ndarray:
        return x.astype(np.float32)

    values = staticmethod(exact.values)
    where = staticmethod(exact.where)
    concat = staticmethod(exact.concat)
    take = staticmethod(exact.take)
    softmax = staticmethod(exact.softmax)
    shared = staticmethod(exact.shared)
    carried = staticmethod(exact.carried)

    def operand(self, x: np.ndarray) -> np.ndarray:
        kind = self.operands or self.storage
        if kind == "tf32":
            return to_tf32(x)
        if kind == "float32":
            return x
        near = x.astype(DTYPES[kind]).astype(np.float32)
        if self.stretch == 1.0:
            return near
        other = (x * np.float32(self.stretch)).astype(DTYPES[kind]).astype(np.float32) / np.float32(self.stretch)
        return np.where(near == x, x, other)  # what storage holds exactly needs no rounding

    def rms_norm(self, x: np.ndarray, eps: float) -> tuple[np.ndarray, np.ndarray]:
        if self.inner_eps:
            return exact.rms_norm(x, eps)
        factor = 1 / (np.sqrt(np.mean(x * x, -1, keepdims=True)) + eps)
        return x * factor, factor

    def recomputed(self, p: np.ndarray, s: np.ndarray, mask: np.ndarray) -> np.ndarray:
        if not self.saved:
            return p
        z = np.where(mask, s, np.float32(-np.inf))
        top = z.max(-1, keepdims=True, initial=-np.inf)
        some = np.isfinite(top)
        top = np.where(some, top, np.float32(0))
        total = np.exp(z - top).sum(-1, keepdims=True)
        lse = top + np.log(np.where(some, total, np.float32(1)))
        return np.where(mask, np.exp(z - lse), np.float32(0))

    def sum(self, x: np.ndarray, axis: int | tuple[int, ...], keepdims: bool = False) -> np.ndarray:
        if not self.sequential:
            return np.sum(x, axis, keepdims=keepdims)
        for a in (axis,) if isinstance(axis, int) else axis:
            total = np.cumsum(np.moveaxis(x, a, -1), -1)[..., -1:] if x.shape[a] else np.sum(x, a, keepdims=True)
            x = np.moveaxis(total, -1, a) if x.shape[a] else total
        return x if keepdims else np.squeeze(x, axis)

    def inner(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return self.sum(self.operand(a) * self.operand(b), -1, keepdims=True)

    def matmul(self, a: Any, b: np.ndarray, mask: np.ndarray | None = None, regroup: bool = False) -> Any:
        if regroup and (self.folded or self.state != "float32"):
            return Product(a, b)
        if isinstance(a, Product):
            assert mask is not None
            return self._by_state(a, b, mask)
        a = a if mask is None else np.where(mask, a, np.float32(0))
        return self._dot(self.operand(a), self.operand(b))

    def _dot(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        if not self.sequential:
            return a @ b
        shape = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        total = np.zeros((*shape, a.shape[-2], b.shape[-1]), np.float32)
        for j in range(a.shape[-1]):
            total += a[..., :, j, None] * b[..., None, j, :]
        return total

    def _by_state(self, a: Product, v: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """(left right) v under the mask as left (right v): for each row its own state of the rows that it reads."""
        left, right, v = self.operand(a.left), self.operand(a.right), self.operand(v)
        rows = []
        for t in range(left.shape[-2]):
            chosen = np.where(mask[..., t, None, :], right, np.float32(0))
            state = self._dot(chosen, v)
            if self.state != "float32":
                state = np.zeros_like(state)
                for j in range(v.shape[-2]):
                    state = state + chosen[..., :, j, None] * v[..., None, j, :]
                    state = round_once(state.astype(np.float64), self.state).astype(np.float32)
            rows.append(self._dot(left[..., t : t + 1, :], self.operand(state)))
        return np.concatenate(rows, -2) if rows else self._dot(a.left @ a.right, v)


@dataclass(frozen=True)
class Product:
    """left @ right, not formed."""

    left: np.ndarray
    right: np.ndarray

    def swapaxes(self, one: int, other: int) -> Product:
        return Product(self.right.swapaxes(one, other), self.left.swapaxes(one, other))
