"""What the shape of an error says where no hypothesis about its cause explains it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from rattention.conformance.case import Case
from rattention.conformance.context import storage_of
from rattention.conformance.oracle import Bounds, to_bits
from rattention.conformance.suspects import STATES

UNITS = {"float32": 2.0**-19, "bfloat16": 2.0**-8, "float16": 2.0**-10}
"""How far, in units of its value, an answer that another formula gives may be from it."""
Guess = tuple[str, tuple[str, ...]]
CLEAR = 8.0
"""How many times the tolerance of a fit an error must be for the fit to say anything."""


def shape_of_error(case: Case, got: Mapping[str, np.ndarray], bounds: Bounds, outputs: set[str]) -> Guess | None:
    """A guess and its clauses, or None."""
    for name in sorted(outputs):
        if name not in got or name not in bounds or got[name].shape != bounds[name][0].shape:
            return None
    bits = _bits_left(got, bounds, outputs)
    if bits:
        label = "NUM-3" if outputs <= set(STATES) or storage_of(case) != "float32" else "NUM-2"
        return f"precision: numbers of no more than {bits} bits, as {_FORMATS[bits]} has", (label,)
    if case.is_vjp:
        return None
    if len(outputs) == 1 and outputs <= set(STATES):
        return _carried(case, got, bounds, *outputs)
    if outputs != {"out"}:
        return None
    y, limit = bounds["out"]
    x = got["out"].astype(np.float64)
    if case.base_op in ("sliding_window_attention", "residual_linear_attention"):
        softmax = case.base_op == "sliding_window_attention"
        if _fits(x, y, limit, [y]):
            return "rows off by a factor, as by another denominator", ("SWA-3",) if softmax else ("RLA-2",)
    if case.base_op == "rms_mix":
        t = {name: case.tensors[name].astype(np.float64) for name in ("swa", "rla", "swa_weight", "rla_weight")}
        for text, norm in NORMS.items():
            with np.errstate(all="ignore"):
                z = sum(t[f"{n}_weight"] * norm(t[n], case.attrs.get("eps", 1e-6)) for n in ("swa", "rla"))
                if (np.abs(x - z) <= 2 * limit + UNITS[storage_of(case)] * np.abs(z)).all():
                    return f"as if the norm {text}", ("MIX-2",)
        if _fits(x, y, limit, [t["swa_weight"] * t["swa"], t["rla_weight"] * t["rla"]]):
            return "rows of a branch off by a factor, as by another norm", ("MIX-2",)
    return None


def _rms(x: np.ndarray, eps: float, axis: int | tuple[int, ...] = -1) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x, axis, keepdims=True) + eps)


NORMS: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "took its mean over the heads": lambda x, eps: _rms(x, eps, -2),
    "took its mean over heads and channels": lambda x, eps: _rms(x, eps, (-2, -1)),
    "took its mean over the tokens": lambda x, eps: _rms(x, eps, 1),
    "subtracted the mean": lambda x, eps: _rms(x - x.mean(-1, keepdims=True), eps),
    "took a sum for the mean": lambda x, eps: x / np.sqrt((x * x).sum(-1, keepdims=True) + eps),
    "added eps outside of the root": lambda x, eps: x / (np.sqrt((x * x).mean(-1, keepdims=True)) + eps),
    "took eps for the least mean square": lambda x, eps: x / np.sqrt(np.maximum((x * x).mean(-1, keepdims=True), eps)),
}
"""Norms that are mistaken for the right one."""


def _carried(case: Case, got: Mapping[str, np.ndarray], bounds: Bounds, name: str) -> Guess | None:
    """A state handed on that is off by a multiple of the one that was given."""
    given = case.tensors.get("initial_state", case.tensors.get("cache_state"))
    value, limit = bounds[name]
    off = got[name].astype(np.float64) - value
    if (
        given is None
        or given.shape != off.shape
        or not np.isfinite(off).all()
        or not np.abs(given).max(initial=0.0) > 0
    ):
        return None
    state = given.astype(np.float64)
    factor = float((off * state).sum() / (state * state).sum())
    if (np.abs(off - factor * state) > limit * (1 + abs(factor)) + 1e-6 * np.abs(state)).any() or given.size < 4:
        return None
    return f"as if {1 + factor:.3g} times the carried state were handed on", (
        "EXT-5",
    ) if "cache_k" in case.tensors else ("RLA-6",)


_FORMATS = {8: "bfloat16", 11: "float16 or TF32"}


def _bits_left(got: Mapping[str, np.ndarray], bounds: Bounds, outputs: set[str]) -> int:
    """The significant bits that all numbers of float32 outputs end within though the answers have more; 0 for none."""
    for bits in _FORMATS:
        told = []
        for name in outputs:
            if got[name].dtype != np.float32:
                return 0
            x, (y, limit) = got[name].astype(np.float64), bounds[name]
            near = np.isfinite(x) & np.isfinite(y)
            told.append(bool((to_bits(x, bits) == x)[near].all()) and int((to_bits(y, bits) != y)[near].sum()) > 3)
            told.append(bool((np.abs(x - y) <= np.abs(y) * 2.0 ** (1 - bits) + limit + 2.0**-24)[near].all()))
        if all(told):
            return bits
    return 0


def _fits(x: np.ndarray, y: np.ndarray, limit: np.ndarray, basis: list[np.ndarray]) -> bool:
    """Whether every wrong row of `x` is a sum of the rows of `basis`, each times a factor of its own."""
    wrong = (np.abs(x - y) > limit).any(-1)
    if x.shape[-1] < len(basis) + 2 or not wrong.any() or not np.isfinite(x[wrong]).all():
        return False
    rows, answers, limits = x[wrong], y[wrong], np.broadcast_to(limit, x.shape)[wrong]
    parts = np.stack([np.broadcast_to(b, x.shape)[wrong] for b in basis], -1)  # [rows, Dv, factors]
    if not np.isfinite(parts).all():
        return False
    factors = np.linalg.pinv(parts) @ rows[..., None]
    left = np.abs((parts @ factors)[..., 0] - rows)
    size = np.abs(factors).max((-2, -1))[:, None]
    tolerance = limits * (1 + size) + 1e-6 * np.abs(rows).max(-1, keepdims=True)
    clear = np.abs(rows - answers).max(-1) > CLEAR * tolerance.max(-1)
    return bool((left <= tolerance).all() and clear.mean() > 0.5)
