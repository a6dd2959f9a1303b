"""The error budget: how far an honest implementation may be from the reference, element by element (NUM-1).

The quadratic form is evaluated over arrays that carry an error (`bounded.py`), and over emulated machines that round as
the spec allows (`emulated.py`). The budget of an output element is LAMBDA deviations of the first, SAMPLES times the
error of the second, and the one rounding to the output's dtype. Chapter 10 of the spec derives it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from rattention.numpy import emulated, quadratic
from rattention.numpy.bounded import LAMBDA, Bounded, Space
from rattention.numpy.storage import DTYPES, PRECISION
from rattention.numpy.tables import angles
from rattention.spec import Call, dtype_name

PIECE = 2_000_000
"""Pairs of query head, query and key that are evaluated at once; larger calls go by row, then by key/value head."""

STRETCHES = (1.0, 0.73)
"""The emulated machines round operands of matrix products as they are, and scaled by a factor of no significance."""

SAMPLES = 2.0
"""Times an emulated machine's error that a budget spans."""

TABLE_ULPS = 1.0
"""Ulps of float32 that an entry of a rotary table may be off."""


def evaluate(op: str, tensors: Mapping[str, Any], attrs: Mapping[str, Any]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Values and budgets of one operation, or of its `.vjp`.

    Args:
        op, tensors, attrs: as for `Backend.run`.

    Returns:
        For each output its value in float64, unrounded, and its budget: the largest |got - value| that conforms, both
        of the output's shape. Value NaN means that the formulas make it NaN (NUM-5); where an input holds an infinity,
        whether inf or NaN results depends on the order of operations, and the budget is infinite. Budget 0 means bit
        equality: copies of inputs, integers, and what the spec calls exactly 0. Where every number within the budget
        overflows the output's dtype the value is the infinity of its sign; where only some do, the budget is infinite.

    Raises:
        SpecError: the call is invalid.
    """
    call = quadratic.check(op, tensors, attrs)
    given = {name: np.asarray(tensors[name]) for name in call.given}
    dtypes = call.output_dtypes({name: dtype_name(x) for name, x in given.items()})
    if call.storage == "float64":
        dtypes = {n: "float64" if d in DTYPES else d for n, d in dtypes.items()}
    if op == "rope_table":
        return _tables(call, given)
    space = Space(call.storage)
    stretches = STRETCHES if call.storage in ("float16", "bfloat16") else STRETCHES[:1]
    machines = [emulated.Space(call.storage, stretch=s) for s in stretches] if call.storage != "float64" else []
    sums: dict[str, _Sum] = {}
    for piece, at in _pieces(call, given):
        part = call if piece is given else quadratic.check(op, piece, attrs)
        with np.errstate(all="ignore"):
            outputs = quadratic.evaluate(space, part, quadratic.lift(space, part, piece))
            rounded = [quadratic.evaluate(m, part, quadratic.lift(m, part, piece)) for m in machines]
        for o in call.operation.outputs:
            if o.name in outputs:
                whole = sums.setdefault(o.name, _Sum(call.output_shapes()[o.name], len(machines)))
                where = tuple(at.get(s, slice(None)) for s in o.shape)
                whole.add(where, outputs[o.name], [r[o.name] for r in rounded])
    infinite = any(np.isinf(x).any() for n, x in given.items() if n not in quadratic.INTEGERS)
    return {name: _finish(s, dtypes[name], infinite) for name, s in sums.items()}


class _Sum:
    """An output put together from pieces; where pieces overlap, as in the gradient of a shared weight, they add up."""

    def __init__(self, shape: tuple[int, ...], machines: int):
        self.value, self.deviation = np.zeros(shape), np.zeros(shape)
        self.emulated = [np.zeros(shape) for _ in range(machines)]
        self.stored = True

    def add(self, at: tuple[slice, ...], x: Bounded | np.ndarray, emulated: list[np.ndarray]) -> None:
        if isinstance(x, np.ndarray):
            self.value[at] = x
            return
        self.value[at] += x.value
        self.deviation[at] += np.sqrt(x.var)  # not in squares: errors of pieces may be coherent
        self.stored &= x.stored
        for whole, part in zip(self.emulated, emulated, strict=True):
            whole[at] += part

    def error(self) -> np.ndarray:
        """LAMBDA deviations, and SAMPLES times what the emulated machines are off: at the element, or in the mean of
        its row, since one element may be right by chance."""
        error = LAMBDA * self.deviation
        for got in self.emulated:
            with np.errstate(invalid="ignore"):
                off = np.abs(got - self.value)
            off = np.where(np.isfinite(off), off, 0.0)
            row = np.sqrt(np.mean(np.square(off), -1, keepdims=True)) if off.size else off
            error = np.maximum(error, LAMBDA * self.deviation + SAMPLES * np.maximum(off, row))
        return np.where(self.deviation > 0, error, 0.0)


def _finish(total: _Sum, dtype: str, infinite: bool) -> tuple[np.ndarray, np.ndarray]:
    """Add the rounding to the output's dtype. `infinite`: some input holds an infinity."""
    value, error = total.value, total.error()
    if dtype not in DTYPES or total.stored:
        return value, np.zeros_like(value)
    precision = PRECISION[dtype]
    with np.errstate(invalid="ignore", over="ignore"):
        size = np.where(np.isfinite(value), np.abs(value), 0.0)
        moved = (size > 0) | (error > 0)
        budget = error + np.where(moved, precision.u * (size + error) + precision.tiny, 0.0)
        top = precision.top * (1 + precision.u)  # where rounding turns to infinity
        budget = np.where(size + budget >= top, np.inf, budget)
        lost = (size - error) * (1 - precision.u) > top
        value, budget = np.where(lost, np.copysign(np.inf, value), value), np.where(lost, 0.0, budget)
    return value, np.where(infinite & ~np.isfinite(value), np.inf, budget)


def _tables(call: Call, given: Mapping[str, np.ndarray]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """ROPE-2: one ulp of float32, and what a float64 angle of that size may be off."""
    angle = np.abs(angles(given["positions"], call.attributes["head_dim"], call.attributes["theta"]))
    values = quadratic.evaluate(None, call, {"positions": given["positions"].astype(np.int64)})
    slack = 4 * PRECISION["float64"].u * (1 + angle)
    return {n: (x, TABLE_ULPS * np.spacing(np.abs(x).astype(np.float32)) + slack) for n, x in values.items()}


def _pieces(call: Call, given: dict[str, np.ndarray]) -> Iterator[tuple[dict[str, np.ndarray], dict[str, slice]]]:
    """Cut a call along batch rows and key/value heads, which meet in no operation except in sums over them."""
    dims = call.dims
    slots = dims.get("W", 0) if "cache_k" in given else 0  # a window is no number of keys: it may be past any sequence
    pairs = dims["B"] * dims.get("Hq", 0) * dims.get("T", 0) * (dims.get("T", 0) + slots)
    if "Hkv" not in dims or pairs <= PIECE:
        yield given, {}
        return
    per_head = pairs // (dims["B"] * dims["Hkv"])
    heads = max(1, min(dims["Hkv"], PIECE // per_head))
    rows = max(1, min(dims["B"], PIECE // (per_head * dims["Hkv"])))
    group = dims["Hq"] // dims["Hkv"]
    for b in range(0, dims["B"], rows):
        for n in range(0, dims["Hkv"], heads):
            at = {
                "B": slice(b, b + rows),
                "Hkv": slice(n, n + heads),
                "Hq": slice(n * group, (n + heads) * group),
            }
            yield (
                {
                    t.name: given[t.name][tuple(at.get(s, slice(None)) for s in t.shape)]
                    for t in call.operation.tensors
                    if t.name in given
                },
                at,
            )
