"""Agreement: every output of every operation lies within the error budget of the reference, forward and gradients."""

from __future__ import annotations

from collections.abc import Iterator

from rattention.conformance.case import Case
from rattention.conformance.context import Context
from rattention.conformance.features import exercised
from rattention.conformance.judge import Violation
from rattention.conformance.oracle import Bounds
from rattention.conformance.properties.base import default_make, register
from rattention.conformance.strategies import Plan, Recipe
from rattention.conformance.strategies.plan import supported
from rattention.conformance.strategies.pools import recipes
from rattention.spec import UNREAD, load, validate

PARTS = ("feature_map", "rms_mix", "rope_table")
ALL = tuple(label for label in load().clauses if not label.startswith(("ERR", "BCK", "WIRE")))
WATCHED = ("BCK-2", "BCK-3", "BCK-4", "ERR-13")
"""Checked on every call of every property, and named here."""

# Cases per size class of (parts, other operations), by profile smoke and quick; full has more (`Plan.count`).
COUNTS = {
    "small": ((6, 60), (18, 240)),
    "medium": ((1, 8), (3, 36)),
    "tile": ((0, 4), (0, 13)),
    "wide": ((0, 12), (1, 18)),
    "span": ((0, 3), (0, 10)),
    "long": ((0, 2), (0, 5)),
    "deep": ((0, 0), (0, 14)),
}
# The share of these that backends with costly programs get.
SHARES = {"small": 0.17, "medium": 0.2, "tile": 0.45, "wide": 0.17, "span": 0.25, "long": 0.34, "deep": 0.2}
COSTLY = ("span", "long", "deep")
"""`full` has no more of these than quick: its "long" is longer."""
FILLS = ("beyond", "full", "beyond", "mixed")
"""How full deep caches are: an empty one tests nothing."""


def _draw(plan: Plan) -> Iterator[Recipe]:
    for op in supported(plan):
        for size, counts in COUNTS.items():
            if size == "deep" and not op.startswith("rattention_extend"):
                continue
            smoke, quick = counts[op.removesuffix(".vjp") not in PARTS]
            full = quick if size in COSTLY else None
            number = plan.count(smoke, quick, full, compiled=SHARES[size]) if (smoke or plan.profile != "smoke") else 0
            if number and quick:
                for i, recipe in enumerate(recipes(plan, op, size, number, "agreement", lambda r: True)):
                    yield recipe.with_(fill=FILLS[i % 4]) if size == "deep" else recipe


def _make(plan: Plan, recipe: Recipe) -> Case:
    case = default_make(plan, recipe)
    case.clauses = exercised(case.op, case.tensors, case.attrs)
    return case


@register("agreement", "outputs lie within the error budget of the reference", (*ALL, *WATCHED), _draw, _make)
def check(ctx: Context, case: Case) -> list[Violation]:
    """NUM-1: one call, every output element by element."""
    got = ctx.run(case.op, case.tensors, case.attrs)
    return ctx.judge(case, got, bounds_of(ctx, case), ("NUM-1",))


def bounds_of(ctx: Context, case: Case) -> Bounds:
    """Value and budget of every output: what the case stores, and from the reference what it does not store."""
    call = validate(case.op, case.tensors, case.attrs, host=UNREAD)
    names = set(call.output_shapes())
    whole = names <= case.expected.keys() and names <= case.budget.keys()
    bounds: Bounds = {} if whole else ctx.bounds(case.op, case.tensors, case.attrs)
    return {
        name: (case.expected[name] if name in case.expected else bounds[name][0],
               case.budget[name] if name in case.budget else bounds[name][1])
        for name in call.output_shapes()
    }  # fmt: skip
