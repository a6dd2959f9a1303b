"""Symmetries: shared heads are repeated heads, rows stand alone, a window past the end is none, phi ignores shifts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from rattention.conformance.case import Case
from rattention.conformance.context import Context
from rattention.conformance.features import among
from rattention.conformance.judge import Violation, same_bits
from rattention.conformance.properties.base import register
from rattention.conformance.strategies import Plan, Recipe, build
from rattention.conformance.strategies.pools import recipes
from rattention.conformance.strategies.values import POISON

BRANCHES = ("sliding_window_attention", "residual_linear_attention")
OPS = (*BRANCHES, "rattention", "rattention_extend")


def _spread(
    plan: Plan,
    ops: tuple[str, ...],
    purpose: str,
    counts: tuple[int, int],
    share: float,
    suits: Callable[[Recipe], bool] | None = None,
    **fixed: Any,
) -> Iterator[Recipe]:
    for op in ops:
        number = plan.count(*counts, compiled=share)
        if plan.has(op) and number:
            yield from recipes(plan, op, "small", number, purpose, suits, **fixed)


# ---------------------------------------------------------------------------------------------- heads

HEADED = {"q": 2, "k": 2, "v": 2, "cache_k": 2, "cache_v": 2, "cache_state": 1, "initial_state": 1}
KV = ("k", "v", "cache_k", "cache_v", "cache_state", "initial_state")
PER_QUERY = {"q": 2, "memory": 0, "swa_weight": 0, "rla_weight": 0, "d_out": 2}


def _draw_heads(plan: Plan) -> Iterator[Recipe]:
    for i, recipe in enumerate(_spread(plan, OPS, "repeat", (3, 10), 0.2, lambda r: r.G > 1)):
        Hkv, G = ((2, 3), (3, 2), (2, 2), (1, 3), (2, 8))[i % 5]
        yield recipe.with_(Hkv=Hkv, G=G) if plan.cost == "direct" else recipe


def _make_heads(plan: Plan, recipe: Recipe) -> Case | None:
    if recipe.G < 2:
        return None
    case = build(recipe, plan.token_tiles())
    case.clauses = among(case.op, case.tensors, case.attrs, ("SWA-4", "RLA-8"))
    return case if case.clauses else None


@register(
    "repeated heads",
    "shared key/value heads give what repeated ones give",
    ("SWA-4", "RLA-8"),
    _draw_heads,
    _make_heads,
)
def check_heads(ctx: Context, case: Case) -> list[Violation]:
    """The grouped call against the reference of the same call with k, v and states repeated per query head."""
    got = ctx.run(case.op, case.tensors, case.attrs)
    G = case.tensors["q"].shape[2] // case.tensors["k"].shape[2]
    wide = {n: np.repeat(x, G, HEADED[n]) if n in KV else x for n, x in case.tensors.items()}
    bounds = ctx.bounds(case.op, wide, case.attrs)
    found = ctx.judge(case, got, {"out": bounds["out"]}, case.clauses, record=False)
    for v in found:
        v.guess = "head order"
    return found


# ---------------------------------------------------------------------------------------------- batch rows


def _draw_rows(plan: Plan) -> Iterator[Recipe]:
    ops = tuple(op for base in (*OPS, "feature_map", "rms_mix") for op in (base, f"{base}.vjp"))
    for i, recipe in enumerate(_spread(plan, ops, "rows", (1, 6), 0.34, lambda r: r.B > 1)):
        yield recipe.with_(B=(2, 3)[i % 2]) if plan.cost == "direct" else recipe


def _make_rows(plan: Plan, recipe: Recipe) -> Case | None:
    if recipe.B < 2:
        return None
    case = build(recipe, plan.token_tiles())
    case.params = {"row": int(recipe.rng("row").integers(0, recipe.B))}
    return case


ROWS = ("x", "q", "k", "v", "swa", "rla", "cache_k", "cache_v", "cache_state", "initial_state", "d_out")
BY_ROW = ("out", "final_state", "cache_k", "cache_v", "cache_state", "cache_length", "d_q", "d_k", "d_v", "d_x")
MORE_BY_ROW = ("d_swa", "d_rla", "d_initial_state", "d_cache_k", "d_cache_v", "d_cache_state")


@register("rows", "no batch row depends on another, whatever that one holds", ("NUM-6",), _draw_rows, _make_rows)
def check_rows(ctx: Context, case: Case) -> list[Violation]:
    """One row filled with NaN, inf and huge numbers: the other rows keep every bit."""
    clean = ctx.run(case.op, case.tensors, case.attrs)
    row = case.params["row"]
    bad = {n: x.copy() for n, x in case.tensors.items()}
    for name in ROWS:
        if name in bad and bad[name][row].size:
            values = np.resize(np.array(POISON), bad[name][row].shape)
            bad[name][row] = values.astype(bad[name].dtype)
    got = ctx.run(case.op, bad, case.attrs)
    rows = next(case.tensors[name].shape[0] for name in ("q", "x", "swa") if name in case.tensors)
    others = np.arange(rows) != row
    found = []
    for name in (*BY_ROW, *MORE_BY_ROW):
        if name in got:
            live = others.reshape(-1, *(1,) * (got[name].ndim - 1))
            v = same_bits(name, got[name], clean[name], ("NUM-6",), f"row {row} reaches other rows", live)
            if v:
                v.guess = "NaN leak" if np.isnan(v.got or 0.0) else "rows are mixed"
                found.append(v)
    return found


# ---------------------------------------------------------------------------------------------- windows past the end


def _draw_windows(plan: Plan) -> Iterator[Recipe]:
    for i, recipe in enumerate(_spread(plan, OPS[:3], "past the end", (2, 8), 0.13)):
        yield recipe.with_(window=None, extra=((-1, 0, 3, 10**6)[i % 4],))


def _make_windows(plan: Plan, recipe: Recipe) -> Case | None:
    if not recipe.extra or recipe.T < 1:
        return None
    case = build(recipe.with_(window=None), plan.token_tiles())
    case.attrs["window"] = max(recipe.T + int(recipe.extra[0]), 0)
    full = {**case.attrs, "window": None}
    case.clauses = among(case.op, case.tensors, full, ("SWA-6", "RLA-9"))
    return case if case.clauses else None


@register("window past the end", "every w >= T-1 is a full window", ("SWA-6", "RLA-9"), _draw_windows, _make_windows)
def check_windows(ctx: Context, case: Case) -> list[Violation]:
    """The outputs of a large window against the reference of none; the state too where w >= T."""
    got = ctx.run(case.op, case.tensors, case.attrs)
    bounds = ctx.bounds(case.op, case.tensors, {**case.attrs, "window": None})
    if case.attrs["window"] < case.tensors["q"].shape[1]:
        bounds = {"out": bounds["out"]}
    found = ctx.judge(case, got, bounds, case.clauses, record=False)
    for v in found:
        v.guess = "window border"
    return found


# ---------------------------------------------------------------------------------------------- linearity


def _plain(r: Recipe) -> bool:
    return not (r.has("initial_state") or r.has("memory"))


def _draw_linear(plan: Plan) -> Iterator[Recipe]:
    for recipe in _spread(plan, BRANCHES, "linear", (2, 8), 0.13, _plain):
        yield recipe.without("initial_state", "memory")


def _make_linear(plan: Plan, recipe: Recipe) -> Case | None:
    if recipe.has("initial_state") or recipe.has("memory"):
        return None
    case = build(recipe, plan.token_tiles())
    case.params = {"split": recipe.rng("split").integers(0, 2, case.tensors["v"].shape[:2]).tolist()}
    case.clauses = among(case.op, case.tensors, case.attrs, ("SWA-3", "RLA-2", "RLA-7"))
    return case if case.clauses else None


@register("linear in v", "each branch is linear in v", ("SWA-3", "RLA-2", "RLA-7"), _draw_linear, _make_linear)
def check_linear(ctx: Context, case: Case) -> list[Violation]:
    """Tokens cut into two sets: the two outputs add up to the reference's whole."""
    t = case.tensors
    mask = np.array(case.params["split"], bool).reshape(t["v"].shape[:2])[:, :, None, None]
    zero = np.zeros((), t["v"].dtype)
    parts = [{**t, "v": np.where(m, t["v"], zero).astype(t["v"].dtype)} for m in (mask, ~mask)]
    got = [ctx.run(case.op, part, case.attrs) for part in parts]
    sums = {name: got[0][name].astype(np.float64) + got[1][name].astype(np.float64) for name in got[0]}
    whole = ctx.bounds(case.op, t, case.attrs)
    limits = [ctx.bounds(case.op, part, case.attrs) for part in parts]
    bounds = {n: (whole[n][0], limits[0][n][1] + limits[1][n][1] + 1e-12) for n in whole}
    return ctx.judge(case, sums, bounds, case.clauses, record=False)


# ---------------------------------------------------------------------------------------------- shifts of phi


def _soft(r: Recipe) -> bool:
    return r.feature_map == "softmax"


def _draw_shift(plan: Plan) -> Iterator[Recipe]:
    for recipe in _spread(plan, ("feature_map",), "shift", (3, 12), 0.25, _soft, feature_map="softmax"):
        yield recipe.with_(family="integers")


def _make_shift(plan: Plan, recipe: Recipe) -> Case | None:
    if recipe.feature_map != "softmax":
        return None
    case = build(recipe.with_(family="integers"), plan.token_tiles())
    case.params = {"shift": int(recipe.rng("shift").choice([-64, -16, 8, 100]))}
    return case


@register(
    "shift of phi", "a constant added to a row leaves the softmax map as it was", ("FM-5",), _draw_shift, _make_shift
)
def check_shift(ctx: Context, case: Case) -> list[Violation]:
    """Small integers, so that the shift itself rounds nothing."""
    x = case.tensors["x"]
    moved = {"x": (x.astype(np.float64) + case.params["shift"]).astype(x.dtype)}
    got = ctx.run(case.op, moved, case.attrs)
    bounds = ctx.bounds(case.op, case.tensors, case.attrs)
    return ctx.judge(case, got, bounds, ("FM-5", "FM-1"), record=False)
