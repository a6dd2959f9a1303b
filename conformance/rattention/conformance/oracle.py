"""The judge's side of a comparison: reference values and error budgets, remembered while they may be asked again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
from rattention.numpy import budget as budgets

Bounds = dict[str, tuple[np.ndarray, np.ndarray]]
"""Output name to (value, budget): float64, or int32 with a budget of zero."""


class Oracle:
    """`rattention.numpy.budget.evaluate` behind a cache of bounded size.

    Several properties ask for the same call, shrinking asks again, and a run over many mutants asks for all of it each
    time. Entries are keyed by the content of the call.
    """

    def __init__(self, capacity: int = 256 * 2**20):
        self.capacity = capacity
        self.held = 0
        self.entries: OrderedDict[int, tuple[Bounds, int]] = OrderedDict()

    def evaluate(self, op: str, tensors: Mapping[str, np.ndarray], attrs: Mapping[str, Any]) -> Bounds:
        """Values and budgets of every output of the call."""
        key = _key(op, tensors, attrs)
        if key in self.entries:
            self.entries.move_to_end(key)
            return self.entries[key][0]
        with np.errstate(all="ignore"):
            found = dict(budgets.evaluate(op, tensors, attrs))
        size = sum(v.nbytes + b.nbytes for v, b in found.values())
        self.entries[key] = (found, size)
        self.held += size
        while self.held > self.capacity and len(self.entries) > 1:
            _, (_, dropped) = self.entries.popitem(last=False)
            self.held -= dropped
        return found

    def exact(self, op: str, tensors: Mapping[str, np.ndarray], attrs: Mapping[str, Any], storage: np.dtype) -> Bounds:
        """Bounds of a call whose operands of matrix products are all representable in `storage`.

        Such a call loses nothing by rounding operands: what is left is float32 arithmetic and one rounding of the
        outputs that have the storage dtype. So the float32 budget of the same numbers plus half a unit in the last
        place is what an implementation may use, hundreds of times less than the 16-bit budget admits.
        """
        wide = {k: v.astype(np.float32) if v.dtype == storage else v for k, v in tensors.items()}
        return self.evaluate(op, wide, attrs)


def _key(op: str, tensors: Mapping[str, np.ndarray], attrs: Mapping[str, Any]) -> int:
    parts: list[Any] = [op, tuple(sorted((k, repr(v)) for k, v in attrs.items()))]
    for name in sorted(tensors):
        x = tensors[name]
        parts.append((name, str(x.dtype), x.shape, x.tobytes()))
    return hash(tuple(parts))


PRECISION = {"float32": (24, -126), "bfloat16": (8, -126), "float16": (11, -14)}
"""Bits of the significand and smallest normal exponent of each storage dtype."""


def to_bits(x: np.ndarray, bits: int) -> np.ndarray:
    """`x` with its significand rounded to so many bits, whatever its exponent; float64 in, float64 out."""
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.round(np.ldexp(mantissa, bits)), exponent - bits)


def half_ulp(value: np.ndarray, storage: np.dtype) -> np.ndarray:
    """The largest error of one rounding of a number of this size to `storage`."""
    bits, smallest = PRECISION[str(storage)]
    with np.errstate(divide="ignore"):
        exponent = np.floor(np.log2(np.abs(value)))
    return np.ldexp(1.0, np.maximum(np.nan_to_num(exponent, neginf=smallest), smallest).astype(int) - bits)
