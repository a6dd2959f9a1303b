"""Arrays that carry an error: the array namespace of the quadratic form, in its second meaning.

A `Bounded` is a float64 value and the standard deviation that rounding gives it in an honest implementation: one that
computes in float32 and, where the storage dtype has 16 bits, may round the operands of its matrix products to it. Each
rule below propagates that deviation through one operation and adds the operation's own rounding. Chapter 10 of the spec
derives the rules; the constants stand here and nowhere else.

Roundings are modelled as independent with mean zero (Higham and Mary, SIAM J. Sci. Comput. 41, 2019), so deviations add
in squares, and long sums stay sharp. Where the model fails, because equal data round equally, a second term adds what
errors of one relative sign would do.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rattention.numpy import exact
from rattention.numpy.storage import PRECISION

LAMBDA = 5.0
"""Deviations that a budget spans."""

UNIFORM = 1.0 / np.sqrt(3.0)
"""Deviation of one rounding in units of its bound u|x|: a uniform variable's."""

SUM_ROOT, SUM_LINEAR = 1.0 / 3.0, 0.05
"""A float32 sum of n terms deviates by u (SUM_ROOT sqrt(n) + SUM_LINEAR n) times the sum of their magnitudes. The root
is the random walk; the linear part holds for equal addends, which round the same way at every step of a binade."""

EXP = 2.0
"""Deviation of a float32 exponential, reciprocal or square root, in u: bounded by 2 ulp on every common device."""


class Bounded:
    """A value, its error variance, and what is known of how it may be rounded as an operand.

    Attributes:
        value: float64.
        var: variance of the error, of the shape of value, or 0.0 where exact.
        stored: it is an input in the storage dtype, moved but not computed on: as an operand it is exact.
        product: how it was made, if an implementation may contract it in another order; else None.
    """

    __array_ufunc__ = None  # NumPy arrays on the left defer to the operators here
    __slots__ = ("product", "space", "stored", "value", "var")

    def __init__(self, space: Space, value: Any, var: Any = 0.0, stored: bool = False, product: Product | None = None):
        self.space, self.value, self.var, self.stored, self.product = space, value, var, stored, product

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    def _moved(self, f: Callable[[np.ndarray], np.ndarray]) -> Bounded:
        var = f(self.var) if isinstance(self.var, np.ndarray) else self.var
        return Bounded(self.space, f(self.value), var, self.stored)

    def __getitem__(self, index: Any) -> Bounded:
        return self._moved(lambda x: x[index])

    def reshape(self, *shape: int) -> Bounded:
        return self._moved(lambda x: x.reshape(*shape))

    def swapaxes(self, one: int, other: int) -> Bounded:
        moved = self._moved(lambda x: x.swapaxes(one, other))
        if self.product is not None:
            moved.product = Product(self.product.right.swapaxes(one, other), self.product.left.swapaxes(one, other))
        return moved

    def __neg__(self) -> Bounded:
        return Bounded(self.space, -self.value, self.var, self.stored)

    def __add__(self, other: Any) -> Bounded:
        other = self.space.of(other)
        return self.space.rounded(self.value + other.value, self.var + other.var)

    def __sub__(self, other: Any) -> Bounded:
        return self + -self.space.of(other)

    def __mul__(self, other: Any) -> Bounded:
        other = self.space.of(other)
        a, b = _finite(self.value), _finite(other.value)
        var = a * a * other.var + (b * b + other.var) * self.var
        # A factor that is a Python number is itself rounded to float32.
        return self.space.rounded(self.value * other.value, var, 1.0 if other.value.ndim else 2.0)

    __radd__, __rmul__ = __add__, __mul__


@dataclass(frozen=True)
class Product:
    """left @ right, both finite: [..., T, F] and [..., F, S]."""

    left: np.ndarray
    right: np.ndarray

    def coherence(self, v: np.ndarray) -> np.ndarray:
        """How much larger the states right @ v are than if their terms had random signs, [..., 1, Dv], at least 1.

        In energy summed over F; the largest over the first and the last quarter, half, three quarters of the rows, all.
        """
        cuts = np.linspace(0, v.shape[-2], min(v.shape[-2], 4) + 1).astype(int)
        worst, state, alone = np.ones(()), np.zeros(()), np.zeros(())
        prefixes = []
        for start, stop in itertools.pairwise(cuts):
            right, rows = self.right[..., start:stop], v[..., start:stop, :]
            state = state + right @ rows
            alone = alone + np.square(right).sum(-2, keepdims=True) @ np.square(rows)
            prefixes.append((state, alone))
        for part, energy in prefixes + [(state - s, alone - e) for s, e in prefixes[:-1]]:
            largest = np.square(part).sum(-2, keepdims=True)
            worst = np.maximum(worst, largest / np.where(energy > 0, energy, np.inf))
        return worst


PATCH = 1 << 16
"""Elements of a matrix that are worked on at once, so that the intermediates of a formula stay in a core's cache."""


def patches(shape: tuple[int, ...], mask: np.ndarray | None) -> Iterator[tuple[slice, slice]]:
    """Cut [..., T, S] into blocks of rows, each with the range of columns that its mask reaches."""
    T, S = shape[-2:]
    step = max(PATCH * T // max(int(np.prod(shape)), 1), 1)
    if step >= T:
        yield slice(0, T), slice(0, S)
        return
    for first in range(0, T, step):
        rows = slice(first, min(first + step, T))
        columns = slice(0, S)
        if mask is not None:
            reached = np.flatnonzero(mask[..., rows, :].any(tuple(range(mask.ndim - 1))))
            columns = slice(int(reached[0]), int(reached[-1]) + 1) if reached.size else slice(0, 0)
        yield rows, columns


def _finite(x: np.ndarray) -> np.ndarray:
    """x with NaN and inf replaced by 0: they are found in values, and must not spread through error terms."""
    return x if np.isfinite(x).all() else np.where(np.isfinite(x), x, 0.0)


class Space:
    """The namespace: the functions of `exact.py` over `Bounded`, for calls of one storage dtype."""

    def __init__(self, storage: str):
        inside = PRECISION["float64" if storage == "float64" else "float32"]
        self.u, self.tiny = inside.u, inside.tiny
        half = storage in ("float16", "bfloat16")
        self.operand_u = PRECISION[storage].u if half else 0.0
        self.operand_tiny = PRECISION[storage].tiny if half else 0.0

    # -------------------------------------------------------------------------------------------- making and moving

    def lift(self, x: np.ndarray, stored: bool) -> Bounded:
        return Bounded(self, x.astype(np.float64), stored=stored)

    def of(self, x: Any) -> Bounded:
        return x if isinstance(x, Bounded) else Bounded(self, np.asarray(x, np.float64))

    def values(self, x: Bounded) -> np.ndarray:
        return x.value

    def rounded(self, value: np.ndarray, var: Any, roundings: float = 1.0) -> Bounded:
        """A float32 result: `roundings` roundings on top of what was propagated."""
        square = np.square(_finite(value))
        # Below the smallest normal number a result may be flushed to zero; what is exactly zero stays so.
        flushed = np.multiply(square > 0, self.tiny**2 * roundings)
        square *= (self.u * UNIFORM) ** 2 * roundings
        square += flushed
        square += var
        return Bounded(self, value, square)

    def where(self, mask: np.ndarray, x: Bounded) -> Bounded:
        var = np.where(mask, x.var, 0.0) if isinstance(x.var, np.ndarray) else x.var
        return Bounded(self, np.where(mask, x.value, 0.0), var, x.stored)

    def concat(self, parts: Sequence[Bounded], axis: int) -> Bounded:
        value = np.concatenate([p.value for p in parts], axis)
        stored = all(p.stored for p in parts)
        if all(not isinstance(p.var, np.ndarray) for p in parts):
            return Bounded(self, value, stored=stored)
        return Bounded(self, value, np.concatenate([np.broadcast_to(p.var, p.shape) for p in parts], axis), stored)

    def take(self, x: Bounded, index: np.ndarray) -> Bounded:
        return x._moved(lambda y: exact.take(y, index))

    # -------------------------------------------------------------------------------------------- sums and products

    def accumulation(self, n: Any) -> Any:
        """Deviation of a float32 sum of n terms, relative to the sum of magnitudes."""
        return self.u * (SUM_ROOT * np.sqrt(n) + SUM_LINEAR * n)

    def sum(self, x: Bounded, axis: int | tuple[int, ...], keepdims: bool = False) -> Bounded:
        value = np.sum(x.value, axis, keepdims=keepdims)
        axes = (axis,) if isinstance(axis, int) else axis
        n = int(np.prod([x.shape[a] for a in axes]))
        if n == 1:
            var = np.sum(x.var, axis, keepdims=keepdims) if isinstance(x.var, np.ndarray) else x.var
            return Bounded(self, value, var)
        clean = _finite(x.value)
        var = np.square(self.accumulation(n) * np.sum(np.abs(clean), axis, keepdims=keepdims))
        if isinstance(x.var, np.ndarray):
            together = np.sum(np.copysign(np.sqrt(x.var), clean), axis, keepdims=keepdims)
            var = var + np.sum(x.var, axis, keepdims=keepdims) + np.square(together)
        return Bounded(self, value, var)

    def _operand(self, x: Bounded) -> tuple[np.ndarray, Any, Any]:
        """Finite value, variance as an operand, and the deviation that may be coherent, signed like the value.

        A fresh rounding to storage is bounded by u|x|, so all of them together by u times the result: their coherent
        deviation is 1 / LAMBDA of the bound. A propagated error has no such bound and counts in full.
        """
        value = _finite(x.value)
        var, deviation = x.var, np.sqrt(x.var)
        if self.operand_u and not x.stored:
            size = np.abs(value)
            fresh = self.operand_u * size + self.operand_tiny * (size > 0)
            var = var + np.square(fresh * UNIFORM)
            deviation = deviation + fresh / LAMBDA
        if not isinstance(var, np.ndarray):
            return value, 0.0, 0.0
        return value, var, np.copysign(deviation, value)

    def shared(self, x: Bounded, n: Any) -> Bounded:
        """An error common to n entries adds up with one sign where their sum is taken: n times its variance each."""
        return Bounded(self, x.value, x.var * n)

    def carried(self, x: Bounded, n: Any) -> Bounded:
        """A recurrence starts from the carried state, so that each of n additions rounds at its size too.

        At its whole size, unlike a sum that grows from zero; equal addends round alike, n times u at worst.
        """
        relative = self.u * (UNIFORM * np.sqrt(n) + np.asarray(n) / LAMBDA)
        return Bounded(self, x.value, x.var + np.square(relative * np.abs(_finite(x.value))))

    def inner(self, a: Bounded, b: Bounded) -> Bounded:
        (x, vx, dx), (y, vy, dy) = self._operand(a), self._operand(b)
        var = np.sum(x * x * vy + (y * y + vy) * vx, -1, keepdims=True)
        var = var + np.square(np.abs(np.sum(dx * y, -1, keepdims=True)) + np.abs(np.sum(x * dy, -1, keepdims=True)))
        var = var + np.square(self.accumulation(x.shape[-1]) * np.sum(np.abs(x * y), -1, keepdims=True))
        return Bounded(self, exact.inner(a.value, b.value), var)

    def matmul(self, a: Bounded, b: Bounded, mask: np.ndarray | None = None, regroup: bool = False) -> Bounded:
        value = exact.matmul(a.value, b.value, mask)
        y = self._operand(b)
        coherence = None if a.product is None or not self.operand_u else a.product.coherence(y[0])
        var = np.zeros(value.shape)
        for rows, columns in patches(a.shape, mask):
            var[..., rows, :] = self._matmul_variance(a, y, mask, coherence, rows, columns)
        return Bounded(self, value, var, product=Product(_finite(a.value), y[0]) if regroup else None)

    def _matmul_variance(
        self, a: Bounded, y: Any, mask: np.ndarray | None, coherence: Any, rows: slice, columns: slice
    ) -> np.ndarray:
        """Of the given rows, whose mask is empty outside the given columns."""
        part = a[..., rows, columns]
        product = None if a.product is None else Product(a.product.left[..., rows, :], a.product.right[..., columns])
        y, vy, dy = (t[..., columns, :] if isinstance(t, np.ndarray) else t for t in y)
        if mask is not None:
            mask = mask[..., rows, columns]
            part = self.where(mask, part)
        x, vx, dx = self._operand(part)
        n = x.shape[-1] if mask is None else mask.sum(-1, keepdims=True)
        squares = np.square(y)
        sizes = np.abs(x) if product is None else np.abs(product.left) @ np.abs(product.right)
        if product is not None and mask is not None:
            sizes = np.where(mask, sizes, 0.0)
        sizes = sizes @ np.abs(y)
        # Each of the n products may be flushed to zero.
        var = np.square(self.accumulation(n) * sizes + n * self.tiny * (sizes > 0))
        together: Any = 0.0
        if product is not None and self.operand_u:
            var += self._state(product, y, mask, n, coherence)
        if isinstance(vy, np.ndarray):
            var += np.square(x) @ vy
            squares = squares + vy
            together = np.abs(x @ dy)
        if isinstance(vx, np.ndarray):
            var += vx @ squares
            together = together + np.abs(dx @ y)
        var += np.square(together)
        return var

    def _state(
        self, product: Product, v: np.ndarray, mask: np.ndarray | None, n: Any, coherence: np.ndarray
    ) -> np.ndarray:
        """Variance of (left right) v where right v, a state, is rounded as the operand."""
        terms = np.square(product.left) @ np.square(product.right)
        if mask is not None:
            terms = np.where(mask, terms, 0.0)
        relative = (terms @ np.square(v)) * coherence * self.operand_u**2
        # Near zero the rounding error is absolute, and one for all features where they are alike.
        apart, alike = (
            np.square(product.left).sum(-1, keepdims=True),
            np.square(np.abs(product.left).sum(-1, keepdims=True)),
        )
        floor = (apart + alike * (3.0 / LAMBDA**2)) * (np.asarray(n) > 0) * self.operand_tiny**2
        return (relative + floor) * UNIFORM**2

    # -------------------------------------------------------------------------------------------- softmax

    def softmax(self, s: Bounded, mask: np.ndarray | None = None) -> Bounded:
        """p moves with its own logit against those of the others: odds p / (1 - p) are multiplied by exp(D).

        D spans LAMBDA deviations of s_i minus the weighted rest, so the bound stays inside [0, 1] for any logits.
        """
        p = exact.softmax(s.value, mask)
        var = np.zeros(p.shape)
        for rows, columns in patches(p.shape, mask):
            at = (..., rows, columns)
            chosen = None if mask is None else mask[at]
            var[at] = self._softmax_variance(s[at], p[at], chosen)
        return Bounded(self, p, var)

    def _softmax_variance(self, s: Bounded, p: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
        with np.errstate(all="ignore"):
            seen = np.isfinite(s.value) if mask is None else np.isfinite(s.value) & mask
            z = np.where(seen, s.value, -np.inf)
            top = z.max(-1, keepdims=True, initial=-np.inf)
            top = np.where(np.isfinite(top), top, 0.0)
            n = seen.sum(-1, keepdims=True)
            # The exponent s - top is formed and multiplied in float32: one rounding of each term.
            var = np.where(seen, s.var + self.u**2 * (np.square(z) + np.square(top)), 0.0)
            clean = np.where(np.isfinite(p), p, 0.0)
            e = np.where(seen, np.exp(z - top), 0.0)
            total = e.sum(-1, keepdims=True)
            # The complement 1 - p and its logarithm. That of the largest weight is a sum over the others, scaled by the
            # second largest: the subtraction would lose it, and so would an underflow, however wide the errors are.
            largest = np.arange(z.shape[-1]) == (z.argmax(-1)[..., None] if z.shape[-1] else 0)
            second = np.where(largest, -np.inf, z).max(-1, keepdims=True, initial=-np.inf)
            alone = ~np.isfinite(second)
            second = np.where(alone, top, second)
            behind = np.where(largest | ~seen, 0.0, np.exp(z - second))
            weight = behind.sum(-1, keepdims=True)
            complement = np.where(largest, weight * np.exp(second - top), total - e)
            rest = complement / np.where(total == 0, 1.0, total)
            odds = z - top - np.where(largest, np.log(weight) + (second - top), np.log(complement))
            mean = np.sum(clean * var, -1, keepdims=True)
            of_largest = np.sum(behind * var, -1, keepdims=True) / weight
            others = np.where(largest, of_largest, (mean - clean * var) / rest)
            others = np.clip(others, 0.0, var.max(-1, keepdims=True, initial=0.0))
            D = LAMBDA * np.sqrt(var + np.where(alone, 0.0, others))
            high, low = 1 / (1 + np.exp(-(odds + D))), 1 / (1 + np.exp(-(odds - D)))
            # Far off, what one weight gains another loses: with opposite values their errors add, not in squares.
            far = np.maximum(high - clean, clean - low) * np.sqrt(2.0)
            error = np.where(D < 1, clean * rest * np.expm1(np.minimum(D, 1.0)), far) / LAMBDA
            error = np.where(seen & ~alone, error, 0.0)
            # A weight may be flushed to zero twice: as an exponential, and as a quotient.
            own = clean * (EXP * 2 * self.u + self.accumulation(n)) + 2 * self.tiny * ((clean > 0) & ~alone)
        return np.square(error) + np.square(own)

    def recomputed(self, p: Bounded, s: Bounded, mask: np.ndarray) -> Bounded:
        """A backward pass has p = exp(s - lse) with lse rounded to float32: its weights do not quite sum to 1."""
        var = np.zeros(p.shape) + p.var
        for rows, columns in patches(p.shape, mask):
            at = (..., rows, columns)
            score = np.where(mask[at], np.abs(_finite(s.value[at])), 0.0)
            exponent = self.u * UNIFORM * (score + score.max(-1, keepdims=True, initial=0.0))
            relative = np.expm1(np.minimum(LAMBDA * exponent, 4.0)) / LAMBDA
            var[at] += np.square(relative * _finite(p.value[at]))
        return Bounded(self, p.value, var)

    # -------------------------------------------------------------------------------------------- norm

    def rms_norm(self, x: Bounded, eps: float) -> tuple[Bounded, Bounded]:
        """Through the Jacobian of the norm: the element's own error, and that of the root mean square r.

        |r' - r| <= (2 mean|x e| + mean e^2) / (r' + r), and r' >= r - rms(e): the root mean square is a norm.
        """
        normed, factor = exact.rms_norm(x.value, eps)
        clean, width = _finite(x.value), x.shape[-1]
        with np.errstate(all="ignore"):
            r = 1.0 / _finite(factor)
            deviation = np.sqrt(x.var) if isinstance(x.var, np.ndarray) else np.zeros_like(clean)
            mean_square = np.mean(np.square(deviation), -1, keepdims=True)
            least = np.maximum(r - LAMBDA * np.sqrt(mean_square), np.sqrt(eps))
            cross = np.mean(np.abs(clean) * deviation, -1, keepdims=True)
            shift = (2 * cross + LAMBDA * mean_square) / (r + least)
            unit = np.abs(_finite(normed))
            error = np.hypot(deviation, unit * shift) / least
            error = np.minimum(error, (unit + np.sqrt(width)) / LAMBDA)
            own = self.u * (EXP + 1.0) + 0.5 * self.accumulation(width)
            var = np.square(_finite(error)) + np.square(own * unit)
            var_factor = np.square(_finite(factor)) * (np.square(_finite(shift / least)) + own**2)
        return Bounded(self, normed, var), Bounded(self, factor, var_factor)
