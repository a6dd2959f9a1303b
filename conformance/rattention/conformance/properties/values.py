"""Single values that random data never hold: NaN at the kink of relu, attributes near the ends of float32."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from rattention.conformance.case import Case
from rattention.conformance.context import Context
from rattention.conformance.judge import Violation
from rattention.conformance.properties.base import register
from rattention.conformance.strategies import Plan, Recipe, build
from rattention.conformance.strategies.pools import recipes

# ---------------------------------------------------------------------------------------------- relu at NaN

RELU = ("feature_map.vjp", "residual_linear_attention.vjp")
"""Operations in which a NaN reaches a gradient through the derivative of phi alone."""


def _relu(r: Recipe) -> bool:
    return r.feature_map == "relu"


def _draw_relu(plan: Plan) -> Iterator[Recipe]:
    for op in RELU:
        if plan.has(op):
            number = plan.count(2, 5, compiled=0.4)
            for i, recipe in enumerate(recipes(plan, op, "small", number, "relu", _relu, feature_map="relu")):
                yield recipe.without("poison").with_(extra=(i,))


def _make_relu(plan: Plan, recipe: Recipe) -> Case | None:
    if not _relu(recipe) or recipe.T < 1 or recipe.B < 1:
        return None
    case = build(recipe.without("poison"), plan.token_tiles())
    turn = int(recipe.extra[0]) if recipe.extra else 0
    name = "x" if "x" in case.tensors else ("q", "k")[turn % 2]
    x = case.tensors[name].copy()
    rng = recipe.rng("relu")
    # One channel of every token: what is not live is 0 in any case.
    x[..., int(rng.integers(0, x.shape[-1]))] = np.nan
    case.tensors[name] = x
    # Cotangents far from 0, so that one that passes is no small number.
    d = case.tensors["d_out"]
    case.tensors["d_out"] = (rng.choice([-1.0, 1.0], d.shape) * rng.uniform(0.5, 2.0, d.shape)).astype(d.dtype)
    case.params = {"tensor": name}
    case.clauses = ("FM-6",)
    return case


@register(
    "relu at NaN", "the derivative of relu at NaN is 0, and no cotangent passes", ("FM-6",), _draw_relu, _make_relu
)
def check_relu(ctx: Context, case: Case) -> list[Violation]:
    """The gradient of a NaN is 0, or NaN (NUM-5)."""
    got = ctx.run(case.op, case.tensors, case.attrs)
    name = case.params["tensor"]
    x, gradient = (t.astype(np.float64) for t in (case.tensors[name], got[f"d_{name}"]))
    passed = np.isnan(x) & ~np.isnan(gradient) & (gradient != 0)
    if not passed.any():
        return []
    at = tuple(int(i) for i in np.argwhere(passed)[0])
    message = (
        f"d_{name}: {int(passed.sum())} gradients of NaN are neither 0 nor NaN, first at {list(at)}: {gradient[at]:.6g}"
    )
    return [Violation(("FM-6",), message, "value", f"d_{name}", at, float(gradient[at]), 0.0, 0.0, guess="relu at NaN")]


# ---------------------------------------------------------------------------------------------- attributes

ENDS = {"great scale": 90, "small scale": -90, "great eps": 76, "small eps": -70}
"""Powers of two, which neither float16 nor a guard such as max(eps, 1e-12) keeps. Data are drawn to suit them:
every product on the way is a normal number of float32, whatever is multiplied first."""


def _draw_ends(plan: Plan) -> Iterator[Recipe]:
    wide = [d for d in plan.dtypes if d != "float16"]
    if not wide:
        return
    direct = plan.cost == "direct"
    for kind in ENDS:
        ops = ("sliding_window_attention", "rattention") if "scale" in kind else ("rms_mix", "rattention")
        for n, op in enumerate((*ops, *(f"{op}.vjp" for op in ops)) if direct else ops[:1]):
            if plan.has(op) and not (plan.profile == "smoke" and n % 2):
                seed = int(plan.rng("ends", op, kind).integers(0, 2**31))
                dtype = wide[(n + plan.seed) % len(wide)]
                yield Recipe(op, dtype, B=1, T=5, Hkv=2, G=2, D=4, Dv=4, window=2, seed=seed, extra=(kind,))


def _make_ends(plan: Plan, recipe: Recipe) -> Case | None:
    kind = str(recipe.extra[0]) if recipe.extra else ""
    if kind not in ENDS:
        return None
    power = ENDS[kind]
    case = build(recipe.with_(options=(), scale=1.0), plan.token_tiles())
    case.attrs["scale" if "scale" in kind else "eps"] = 2.0**power
    # <q, k> times the scale, and the mean of squares beside eps, are numbers of ordinary size.
    by = {"q": -2 * power / 3, "k": -power / 3} if "scale" in kind else dict.fromkeys(("v", "swa", "rla"), power / 2)
    for name, exponent in by.items():
        if name in case.tensors:
            x = case.tensors[name]
            case.tensors[name] = (x.astype(np.float64) * 2.0 ** round(exponent)).astype(x.dtype)
    case.clauses = ("SWA-2",) if "scale" in kind else ("MIX-2",)
    return case


@register("ends of float32", "attributes that float32 holds are taken as they are", ("SWA-2", "MIX-2"), _draw_ends,
          _make_ends, shrinks=False)  # fmt: skip
def check_ends(ctx: Context, case: Case) -> list[Violation]:
    """Agreement, with a scale or an eps far from 1 and data that make up for it."""
    got = ctx.run(case.op, case.tensors, case.attrs)
    found = ctx.judge(case, got, ctx.bounds(case.op, case.tensors, case.attrs), case.clauses)
    for v in found:
        v.guess = "an attribute clamped, or kept in 16 bits"
    return found
