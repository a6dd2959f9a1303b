"""Comparisons, and what a failed one says: violations that name clauses, place and size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

HEAT = 48
"""Cells along each side of a heat map."""


@dataclass
class Violation:
    """One way in which one case failed.

    clauses: labels, the likeliest first. kind: value, nan, structure, refusal, crash, mutation or law; a crash
    is an exception that is no refusal, or the end of the backend's process. output: the tensor concerned. index, got,
    expected, budget: the first wrong element. share: the largest error in units of the budget, infinite where no error
    is admitted. wrong: fraction of elements that are wrong. heat: largest share over (t, d), coarsened. trace: the
    traceback of a crash, text because it travels between processes.
    """

    clauses: tuple[str, ...]
    message: str
    kind: str = "value"
    output: str = ""
    index: tuple[int, ...] = ()
    got: float | None = None
    expected: float | None = None
    budget: float | None = None
    share: float | None = None
    wrong: float | None = None
    heat: list[list[float]] = field(default_factory=list)
    guess: str = ""
    trace: str = ""

    @property
    def crash(self) -> bool:
        return self.kind == "crash"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def compare(
    got: Mapping[str, np.ndarray],
    bounds: Mapping[str, tuple[np.ndarray, np.ndarray]],
    clauses: tuple[str, ...] = ("NUM-1",),
    *,
    live: Mapping[str, np.ndarray] | None = None,
) -> tuple[list[Violation], dict[str, float]]:
    """Hold every output against value and budget.

    Args:
        got: outputs of the backend.
        bounds: output name to (value, budget).
        clauses: labels of a violation.
        live: masks, broadcast against an output, of the elements that are compared; the others are left alone.

    Returns:
        violations, one per output at most, and the largest share of the budget used, per output.
    """
    found: list[Violation] = []
    shares: dict[str, float] = {}
    for name, (value, budget) in bounds.items():
        if name not in got:
            continue
        violation, share = compare_one(name, got[name], value, budget, clauses, (live or {}).get(name))
        shares[name] = share
        if violation:
            found.append(violation)
    return found, shares


def compare_one(
    name: str,
    got: np.ndarray,
    value: np.ndarray,
    budget: np.ndarray,
    clauses: tuple[str, ...],
    live: np.ndarray | None = None,
) -> tuple[Violation | None, float]:
    """One output. NaN must meet NaN; an infinite expected value must be met exactly."""
    x = np.asarray(got).astype(np.float64)
    y = np.asarray(value).astype(np.float64)
    limit = np.broadcast_to(np.asarray(budget, np.float64), y.shape)
    with np.errstate(all="ignore"):
        error = np.abs(x - y)
        share = np.where(error == 0, 0.0, error / limit)  # infinite where the budget is zero
    missing = np.isnan(y) & ~np.isnan(x)
    extra = np.isnan(x) & ~np.isnan(y)
    infinite = np.isinf(y)
    share = np.where(np.isnan(y), np.where(missing, np.inf, 0.0), np.where(extra, np.inf, share))
    share = np.where(infinite, np.where(x == y, 0.0, np.inf), share)
    # An infinite budget admits any number and both infinities: some values within it overflow the dtype.
    share = np.where(np.isinf(limit) & ~np.isnan(x) & ~np.isnan(y), 0.0, share)
    share = np.where(np.isnan(share), np.inf, share)
    if live is not None:
        share = np.where(np.broadcast_to(live, share.shape), share, 0.0)
    worst = float(share.max(initial=0.0))
    if worst <= 1.0:
        return None, worst
    bad = share > 1.0
    at = tuple(int(i) for i in np.argwhere(bad)[0])
    kind = "nan" if (extra & bad).any() else "hidden nan" if (missing & bad).any() else "value"
    what = {
        "nan": f"{int((extra & bad).sum())} NaN where the reference is a number",
        "hidden nan": f"{int((missing & bad).sum())} numbers where the formulas give NaN",
        "value": _size(share, bad, (limit == 0) | infinite),
    }[kind]
    admitted = "exactly" if limit[at] == 0 or not np.isfinite(y[at]) else f"+- {limit[at]:.3g}"
    message = (
        f"{name}: {what}; {int(bad.sum())} of {bad.size} elements wrong, first at {list(at)}: "
        f"got {x[at]:.8g}, expected {y[at]:.8g} {admitted}"
    )
    return (
        Violation(
            clauses,
            message,
            kind,
            name,
            at,
            float(x[at]),
            float(y[at]),
            float(limit[at]),
            worst,
            float(bad.mean()),
            heat(share),
        ),
        worst,
    )


def _size(share: np.ndarray, bad: np.ndarray, exact: np.ndarray) -> str:
    """How wrong the elements `bad` are. Those that are `exact` admit no error, so there is no multiple to speak of."""
    rest = share[bad & ~exact]
    if not rest.size:
        return "must be exact"
    finite = rest[np.isfinite(rest)]
    said = f"error up to {finite.max():.3g} times the budget" if finite.size else "infinite where a number is expected"
    return said + (f", {int((bad & exact).sum())} elements that must be exact" if (bad & exact).any() else "")


def heat(share: np.ndarray) -> list[list[float]]:
    """Largest share over batch and heads as a small (t, d) grid; empty for outputs without tokens."""
    if share.ndim == 4:
        grid = share.max(axis=(0, 2)) if share.size else np.zeros((0, 0))
    elif share.ndim >= 2:
        grid = share.reshape(-1, share.shape[-1])
    else:
        grid = share.reshape(1, -1)
    if not grid.size:
        return []
    grid = np.minimum(np.nan_to_num(grid, nan=1e9, posinf=1e9), 1e9)
    for axis in (0, 1):
        if grid.shape[axis] > HEAT:
            edges = np.linspace(0, grid.shape[axis], HEAT + 1).astype(int)[:-1]
            grid = np.maximum.reduceat(grid, edges, axis)
    return [[round(float(x), 4) for x in row] for row in grid]


def same_bits(
    name: str, got: np.ndarray, expected: np.ndarray, clauses: tuple[str, ...], why: str, live: np.ndarray | None = None
) -> Violation | None:
    """Equality element by element, NaN equal to NaN and 0 equal to -0."""
    x, y = np.asarray(got), np.asarray(expected)
    if x.shape != y.shape or x.dtype != y.dtype:
        return Violation(
            clauses, f"{name}: {why}: {y.dtype}{list(y.shape)} became {x.dtype}{list(x.shape)}", "law", name
        )
    a, b = x.astype(np.float64), y.astype(np.float64)
    differ = ~((a == b) | (np.isnan(a) & np.isnan(b)))
    if live is not None:
        differ &= np.broadcast_to(live, differ.shape)
    if not differ.any():
        return None
    at = tuple(int(i) for i in np.argwhere(differ)[0])
    return Violation(
        clauses,
        f"{name}: {why}: {int(differ.sum())} of {differ.size} elements differ, first at {list(at)}: "
        f"{a[at]:.8g} against {b[at]:.8g}",
        "law",
        name,
        at,
        float(a[at]),
        float(b[at]),
        0.0,
        float("inf"),
        float(differ.mean()),
        heat(differ.astype(float) * 2),
    )


def all_zero(name: str, got: np.ndarray, where: np.ndarray, clauses: tuple[str, ...], why: str) -> Violation | None:
    """Exactly zero at the places `where`, a mask over the leading axes."""
    x = np.asarray(got).astype(np.float64)
    mask = np.broadcast_to(where.reshape(where.shape + (1,) * (x.ndim - where.ndim)), x.shape)
    bad = mask & ~(x == 0)
    if not bad.any():
        return None
    at = tuple(int(i) for i in np.argwhere(bad)[0])
    return Violation(
        clauses,
        f"{name}: {why} must be exactly 0; {int(bad.sum())} elements are not, first at {list(at)}: {x[at]:.8g}",
        "nan" if np.isnan(x[bad]).any() else "value",
        name,
        at,
        float(x[at]),
        0.0,
        0.0,
        float("inf"),
        float(bad.mean()),
        heat(bad.astype(float) * 2),
    )
