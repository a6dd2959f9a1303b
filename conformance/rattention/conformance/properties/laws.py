"""Laws between calls: any split of a sequence, packed against separate, forward against extension."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from rattention.conformance.case import Case
from rattention.conformance.context import Context
from rattention.conformance.features import among
from rattention.conformance.judge import Violation
from rattention.conformance.oracle import Bounds
from rattention.conformance.properties.base import register
from rattention.conformance.strategies import Plan, Recipe, build
from rattention.conformance.strategies.pools import recipes

EXTEND = "rattention_extend"
CACHE = ("cache_k", "cache_v", "cache_state", "cache_length")


# ---------------------------------------------------------------------------------------------- splits


def _draw_splits(plan: Plan) -> Iterator[Recipe]:
    if not plan.has(EXTEND):
        return
    counts = {"small": (4, 36, 0.08), "medium": (1, 9, 0.12), "tile": (0, 3, 0.34)}
    for size, (smoke, quick, share) in counts.items():
        number = plan.count(smoke, quick, compiled=share) if smoke or plan.profile != "smoke" else 0
        for i, recipe in enumerate(
            recipes(plan, EXTEND, size, number, "splits", lambda r: not r.has("lengths")) if number else ()
        ):
            T = max(recipe.T, 2) if size == "small" else min(recipe.T, 24)
            kind = "ones" if plan.cost != "direct" else ("ones", "random", "random", "empty", "half", "ragged")[i % 6]
            yield recipe.without("lengths").with_(T=T, extra=(kind,))


def _pieces(kind: str, T: int, rng: np.random.Generator) -> list[int]:
    if kind == "ones":
        return [1] * T
    if kind == "half":
        return [T // 2, T - T // 2]
    cuts = sorted(int(c) for c in rng.integers(0, T + 1, int(rng.integers(1, 4))))
    if kind == "empty":
        cuts = sorted([*cuts, cuts[0]])
    edges = [0, *cuts, T]
    return [b - a for a, b in itertools.pairwise(edges)]


def _make_splits(plan: Plan, recipe: Recipe) -> Case | None:
    kind = recipe.extra[0] if recipe.extra else "random"
    if recipe.has("lengths") or recipe.T < 1 or recipe.B < 1:
        return None
    case = build(recipe, plan.token_tiles())
    rng = recipe.rng("pieces")
    pieces = _pieces("random" if kind == "ragged" else str(kind), recipe.T, rng)
    rows = [pieces] * recipe.B
    if kind == "ragged":
        rows = [_pieces("random", recipe.T, rng) for _ in range(recipe.B)]
        longest = max(len(r) for r in rows)
        rows = [r + [0] * (longest - len(r)) for r in rows]
    case.params = {"rows": rows}
    told = among(case.op, case.tensors, case.attrs, ("EXT-5", "EXT-6"))
    uneven = any(len({row[step] for row in rows}) > 1 for step in range(len(rows[0])))
    case.clauses = ("EXT-1", *told, *(("EXT-7",) if uneven else ()))
    case.clauses += ("EXT-8",) if "rope_cos" in case.tensors and recipe.T > 1 else ()
    return case


@register(
    "splits",
    "extending piece by piece is extending at once, for every split, row by row",
    ("EXT-1", "EXT-5", "EXT-6", "EXT-7", "EXT-8"),
    _draw_splits,
    _make_splits,
)
def check_splits(ctx: Context, case: Case) -> list[Violation]:
    """Every piece through the backend; outputs and last cache against the reference's one call."""
    t, rows = dict(case.tensors), np.array(case.params["rows"], np.int64)
    B, T = t["q"].shape[:2]
    begin = np.zeros(B, np.int64)
    outs = np.zeros((B, T, *t["q"].shape[2:3], t["v"].shape[3]), t["v"].dtype)
    cache = {name: t[name] for name in CACHE}
    for step in range(rows.shape[1]):
        lengths = rows[:, step]
        width = int(lengths.max(initial=0))
        piece = dict(t)
        for name in ("q", "k", "v"):
            piece[name] = np.full((B, width, *t[name].shape[2:]), np.nan, t[name].dtype)
            for b in range(B):
                piece[name][b, : lengths[b]] = t[name][b, begin[b] : begin[b] + lengths[b]]
        piece.update(cache)
        if (lengths != width).any():
            piece["lengths"] = lengths.astype(np.int32)
        got = ctx.run(EXTEND, piece, case.attrs)
        for b in range(B):
            outs[b, begin[b] : begin[b] + lengths[b]] = got["out"][b, : lengths[b]]
        begin += lengths
        cache = {name: got[name] for name in CACHE}
    result = {"out": outs, **cache}
    bounds = ctx.bounds(EXTEND, case.tensors, case.attrs)
    if case.attrs["window"] is None:
        bounds = _trim(bounds, result)
    labels = {"cache_length": "EXT-6", "cache_state": "EXT-5", "cache_k": "EXT-4", "cache_v": "EXT-4"}
    found = ctx.judge(case, result, bounds, ("EXT-1",), record=False)
    for v in found:
        label = labels.get(v.output, "EXT-8" if "rope_cos" in t else "EXT-1")
        v.clauses = tuple(dict.fromkeys(("EXT-1", label)))
        v.guess = "state" if v.output == "cache_state" else ""
    return found


def _trim(bounds: Bounds, result: dict[str, np.ndarray]) -> Bounds:
    """Ragged pieces leave a wider cache of a full window than one call does: compare the slots that both have."""
    out = dict(bounds)
    for name in ("cache_k", "cache_v"):
        slots = min(bounds[name][0].shape[1], result[name].shape[1])
        value, budget = bounds[name]
        out[name] = (value[:, value.shape[1] - slots :], budget[:, budget.shape[1] - slots :])
        result[name] = result[name][:, result[name].shape[1] - slots :]
    return out


# ---------------------------------------------------------------------------------------------- forward = extension


def _draw_forward(plan: Plan) -> Iterator[Recipe]:
    if not (plan.has(EXTEND) and plan.has("rattention")):
        return
    for size, (smoke, quick, share) in {"small": (3, 18, 0.12), "medium": (1, 6, 0.17), "tile": (0, 2, 0.5)}.items():
        number = plan.count(smoke, quick, compiled=share) if smoke or plan.profile != "smoke" else 0
        for recipe in recipes(plan, "rattention", size, number, "forward") if number else ():
            yield recipe.without("segments", "positions", "initial_state")


def _make_forward(plan: Plan, recipe: Recipe) -> Case | None:
    if recipe.has("segments") or recipe.has("positions") or recipe.has("initial_state"):
        return None
    case = build(recipe, plan.token_tiles())
    filled = {**case.tensors, **empty_cache(case.tensors, case.attrs)}
    case.clauses = ("EXT-2", *among(EXTEND, filled, case.attrs, ("EXT-5", "EXT-9")))
    return case


def empty_cache(tensors: Mapping[str, np.ndarray], attrs: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The cache of a row that has seen nothing; its slots hold NaN, which must not matter (EXT-9)."""
    k, v, window = tensors["k"], tensors["v"], attrs["window"]
    W = 0 if window is None else max(window, 0)
    F = k.shape[3] * (1 if attrs.get("feature_map", "softmax") == "identity" else 2)
    B, _, Hkv, D = k.shape
    return {
        "cache_k": np.full((B, W, Hkv, D), np.nan, k.dtype),
        "cache_v": np.full((B, W, Hkv, v.shape[3]), np.nan, v.dtype),
        "cache_state": np.zeros((B, Hkv, F, v.shape[3]), np.float32),
        "cache_length": np.zeros(B, np.int32),
    }


@register(
    "forward is extension",
    "extending an empty cache gives the outputs and the state of the forward",
    ("EXT-2", "EXT-5", "EXT-9"),
    _draw_forward,
    _make_forward,
)
def check_forward(ctx: Context, case: Case) -> list[Violation]:
    """One prefill against the reference's forward."""
    attrs = dict(case.attrs)
    got = ctx.run(EXTEND, {**case.tensors, **empty_cache(case.tensors, attrs)}, attrs)
    bounds = ctx.bounds("rattention", case.tensors, attrs)
    result = {"out": got["out"], "final_state": got["cache_state"]}
    found = ctx.judge(case, result, bounds, ("EXT-2",), record=False)
    for v in found:
        v.clauses = ("EXT-2", "EXT-5") if v.output == "final_state" else ("EXT-2",)
    return found


# ---------------------------------------------------------------------------------------------- packing


def _draw_packing(plan: Plan) -> Iterator[Recipe]:
    counts = {"small": (3, 12, 0.17), "medium": (0, 3, 0.34), "tile": (0, 1, 1.0)}

    def suits(r: Recipe) -> bool:
        return r.has("segments") and not r.has("positions")

    for base in ("sliding_window_attention", "residual_linear_attention", "rattention"):
        for op in (base, f"{base}.vjp"):
            if not plan.has(op):
                continue
            for size, (smoke, quick, share) in counts.items():
                number = plan.count(smoke, quick, compiled=share) if smoke or plan.profile != "smoke" else 0
                for i, recipe in enumerate(recipes(plan, op, size, number, "packing", suits) if number else ()):
                    if not plan.allows("segments"):
                        continue
                    options = tuple(dict.fromkeys((*recipe.options, "segments")))
                    layout = ("many", "tile", "mixed", "middle")[i % 4]
                    yield recipe.with_(options=options, layout=layout).without("positions")


def _make_packing(plan: Plan, recipe: Recipe) -> Case | None:
    if not recipe.has("segments") or recipe.has("positions"):
        return None
    case = build(recipe, plan.token_tiles())
    labels = ("SEG-1", "SEG-2", "SEG-3", "SEG-6")
    labels = ("GRAD-2", *labels) if case.is_vjp else (*labels, "SEG-7")
    case.clauses = among(case.op, case.tensors, case.attrs, labels)
    return case if set(case.clauses) - {"GRAD-2"} else None


@register(
    "packing",
    "packed documents give what each gives alone",
    ("SEG-1", "SEG-2", "SEG-3", "SEG-6", "SEG-7", "GRAD-2"),
    _draw_packing,
    _make_packing,
)
def check_packing(ctx: Context, case: Case) -> list[Violation]:
    """The packed call against the reference of every document by itself."""
    t, attrs = case.tensors, case.attrs
    got = ctx.run(case.op, t, attrs)
    ids = t["segment_ids"]
    found: list[Violation] = []
    for b, row in enumerate(ids):
        starts = [int(s) for s in np.flatnonzero(np.diff(row, prepend=0) != 0) if row[s] != 0]
        for n, start in enumerate(starts):
            stop = start
            while stop < len(row) and row[stop] == row[start]:
                stop += 1
            alone = _document(t, b, slice(start, stop), first=n == 0, last=n == len(starts) - 1)
            bounds = ctx.bounds(case.op, alone, attrs)
            part = _part(got, b, slice(start, stop), last=n == len(starts) - 1)
            bounds = {name: bounds[name] for name in part if name in bounds}
            for v in ctx.judge(case, part, bounds, ("SEG-2",), record=False):
                v.message = f"document {n} of row {b}, tokens {start} to {stop - 1}: {v.message}"
                v.clauses, v.guess = _packing_labels(case, v, n), "segments"
                if v.index and len(v.index) == 4:
                    v.index = (b, v.index[1] + start, *v.index[2:])
                found.append(v)
    return found[:4]


def _packing_labels(case: Case, v: Violation, n: int) -> tuple[str, ...]:
    base, labels = case.base_op, ["GRAD-2"] if case.is_vjp else []
    if v.output == "final_state":
        return (*labels, "SEG-7", "SEG-2")
    if "initial_state" in case.tensors and n > 0:
        labels.append("SEG-6")
    labels += [] if base == "sliding_window_attention" else ["SEG-2"]
    labels += [] if base == "residual_linear_attention" else ["SEG-1"]
    labels += ["SEG-3"] if "rope_cos" in case.tensors else []
    return tuple(labels)


def _document(t: Mapping[str, np.ndarray], b: int, at: slice, *, first: bool, last: bool) -> dict[str, np.ndarray]:
    """The call of one document alone."""
    out = {}
    for name, x in t.items():
        if name in ("q", "k", "v", "d_out"):
            out[name] = x[b : b + 1, at]
        elif name == "initial_state":
            out[name] = x[b : b + 1] if first else np.zeros_like(x[b : b + 1])
        elif name == "d_final_state":
            out[name] = x[b : b + 1] if last else np.zeros_like(x[b : b + 1])
        elif name not in ("segment_ids",):
            out[name] = x
    return out


def _part(got: dict[str, np.ndarray], b: int, at: slice, *, last: bool) -> dict[str, np.ndarray]:
    """The document's share of the packed answer; gradients that documents share are left to the agreement."""
    part = {name: got[name][b : b + 1, at] for name in ("out", "d_q", "d_k", "d_v") if name in got}
    if last and "final_state" in got:
        part["final_state"] = got["final_state"][b : b + 1]
    return part
