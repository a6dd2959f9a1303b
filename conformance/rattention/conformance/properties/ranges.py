"""Sums and branches whose range is wider than storage: many small terms after a large one, huge and tiny branches.

Random data of unit size never leave the range in which 16-bit accumulators look honest. Here each term is below half a
unit in the last place of the sum it joins, or the branch lies outside what float16 holds, while inputs and outputs are
ordinary numbers of the storage dtype: float32 inside has no trouble, anything less is wrong by far more than rounding.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from rattention.conformance.case import Case
from rattention.conformance.context import Context
from rattention.conformance.judge import Violation
from rattention.conformance.properties.base import register
from rattention.conformance.strategies import Plan, Recipe, build

BITS = {"float32": 11, "bfloat16": 8, "float16": 11}
"""Significant bits that the large term is put above; float32 takes those of TF32."""

BRANCHES = ("sliding_window_attention", "residual_linear_attention", "rattention_extend")

SCALES = {"great": 2.0**40, "small": 2.0**-40}
"""Powers of two on both sides of what float16 holds."""


def _draw_sums(plan: Plan) -> Iterator[Recipe]:
    if plan.profile == "smoke":
        return
    length = 150 if plan.cost == "interpreted" else 520
    for n, base in enumerate(BRANCHES):
        for op in (base, f"{base}.vjp"):
            if not plan.has(op):
                continue
            for i, dtype in enumerate(plan.dtypes):
                if op.endswith(".vjp") and plan.cost != "direct" and i:
                    continue
                window = {"sliding_window_attention": None, "residual_linear_attention": -1}.get(base, 2)
                seed = int(plan.rng("long sums", op, dtype).integers(0, 2**31))
                yield Recipe(op, dtype, T=length + n, D=2, Dv=2, window=window, feature_map="identity", seed=seed)


def _make_sums(plan: Plan, recipe: Recipe) -> Case | None:
    """Flat scores, one feature: out is a mean of all values, or their sum."""
    if recipe.T < 4 or recipe.feature_map != "identity":
        return None
    case = build(recipe.with_(options=(), fill="empty"), plan.token_tiles())
    t = case.tensors
    top = 2.0 ** BITS[recipe.dtype]
    rng = recipe.rng("sums")
    for name in ("q", "k", "cache_k"):
        if name in t:
            t[name] = (np.arange(recipe.D) == 0).astype(t[name].dtype) * np.ones(t[name].shape, t[name].dtype)
    small = rng.choice([0.75, 0.625], t["v"].shape)
    first, last = np.arange(recipe.T)[:, None, None] == 0, np.arange(recipe.T)[:, None, None] == recipe.T - 1
    mean = recipe.base_op == "sliding_window_attention"
    # A mean divides by the number of tokens: there the denominator is the sum that is put to the test.
    t["v"] = (small if mean else np.where(first, top, small)).astype(t["v"].dtype)
    if "d_out" in t:
        small = rng.choice([0.75, 0.625], t["d_out"].shape)
        t["d_out"] = np.where(last, top, small).astype(t["d_out"].dtype)
    if "cache_state" in t:
        t["cache_state"] = np.zeros_like(t["cache_state"])
        t["cache_length"] = np.zeros_like(t["cache_length"])
    case.clauses = {
        "sliding_window_attention": ("SWA-3", "NUM-3"),
        "residual_linear_attention": ("NUM-3", "RLA-2"),
    }.get(recipe.base_op, ("NUM-3", "EXT-5"))
    if recipe.is_vjp:
        case.clauses = ("NUM-3", "GRAD-1")
    return case


@register(
    "long sums",
    "hundreds of small terms after a large one are not lost",
    ("NUM-3", "SWA-3", "RLA-2", "EXT-5", "GRAD-1"),
    _draw_sums,
    _make_sums,
)
def check_sums(ctx: Context, case: Case) -> list[Violation]:
    """Agreement, on data that no accumulator of 16 bits survives."""
    got = ctx.run(case.op, case.tensors, case.attrs)
    found = ctx.judge(case, got, ctx.bounds(case.op, case.tensors, case.attrs), case.clauses)
    for v in found:
        v.guess = "precision: accumulated in 16 bits"
    return found


def _draw_ranges(plan: Plan) -> Iterator[Recipe]:
    dtype = "float16" if "float16" in plan.dtypes else plan.dtypes[0]
    for op in ("rattention", "rattention_extend", "rattention.vjp"):
        if not plan.has(op):
            continue
        for kind in ("huge", "tiny"):
            for i in range(plan.count(1, 4, compiled=0.25)):
                rng = plan.rng("ranges", op, kind, i)
                yield Recipe(
                    op,
                    dtype,
                    B=1,
                    T=int(rng.integers(2, 9)),
                    Hkv=1 + i % 2,
                    G=2,
                    D=4,
                    Dv=4,
                    window=int(rng.integers(0, 3)),
                    feature_map=("softmax", "relu")[i % 2],
                    eps=1e-12 if kind == "tiny" else 1e-6,
                    options=("initial_state",) if op != "rattention_extend" else (),
                    fill="beyond",
                    seed=int(rng.integers(0, 2**31)),
                    extra=(kind,),
                )

    yield from _draw_scaled(plan)


def _draw_scaled(plan: Plan) -> Iterator[Recipe]:
    """bfloat16 beyond the range of float16: everything that is linear in values and cotangents scales with them."""
    if "bfloat16" not in plan.dtypes or plan.profile == "smoke":
        return
    forward = (*BRANCHES, "rattention")
    ops = (*forward, *(f"{op}.vjp" for op in forward)) if plan.cost == "direct" else ("rattention",)
    for op in ops:
        if not plan.has(op):
            continue
        for i, kind in enumerate(SCALES):
            rng = plan.rng("scaled", op, kind)
            yield Recipe(
                op,
                "bfloat16",
                T=5,
                Hkv=1 + i,
                G=2 - i,
                D=4,
                Dv=4,
                window=1,
                options=(),
                fill="beyond",
                seed=int(rng.integers(0, 2**31)),
                extra=(kind,),
            )


def _make_ranges(plan: Plan, recipe: Recipe) -> Case | None:
    if not recipe.extra or recipe.window is None or recipe.window < 0 or recipe.T < 1:
        return None
    case = build(recipe, plan.token_tiles())
    t = case.tensors
    if recipe.extra[0] in SCALES:
        for name in ("v", "cache_v", "d_out"):
            if name in t:
                t[name] = (t[name].astype(np.float64) * SCALES[recipe.extra[0]]).astype(t[name].dtype)
        case.clauses = ("NUM-1",)
        return case
    huge = recipe.extra[0] == "huge"
    for name in ("v", "cache_v"):
        if name in t and not huge:
            # Past the smallest normal float16, 2^-14: a mean of these needs bits that float16 has not.
            t[name] = (np.round(t[name].astype(np.float64) * 64) * 2.0**-24).astype(t[name].dtype)
    for name in ("initial_state", "cache_state"):
        if name in t:
            t[name] = (t[name] * np.float32(2.0**20 if huge else 2.0**-18)).astype(np.float32)
    case.clauses = ("RAT-3", "RAT-1") if recipe.dtype == "float16" else ("RAT-1",)
    return case


@register(
    "ranges",
    "branches that storage cannot hold reach the norms all the same",
    ("RAT-3", "RAT-1", "NUM-1"),
    _draw_ranges,
    _make_ranges,
)
def check_ranges(ctx: Context, case: Case) -> list[Violation]:
    """float16 calls whose branches overflow, or lie among the subnormal numbers; bfloat16 out of float16's reach."""
    got = ctx.run(case.op, case.tensors, case.attrs)
    found = ctx.judge(case, got, ctx.bounds(case.op, case.tensors, case.attrs), case.clauses)
    for v in found:
        scaled = case.clauses == ("NUM-1",)
        v.guess = "precision: " + (
            "a range narrower than storage's" if scaled else "branches rounded to storage before their norms"
        )
    return found
