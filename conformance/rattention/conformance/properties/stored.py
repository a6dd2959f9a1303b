"""Stored vectors: cases from disk, such as activations of a published transformer, with the answers beside them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rattention.conformance import vectors
from rattention.conformance.case import Case
from rattention.conformance.context import Context, storage_of
from rattention.conformance.features import exercised
from rattention.conformance.judge import Violation
from rattention.conformance.properties.agreement import ALL
from rattention.conformance.properties.agreement import check as agree
from rattention.conformance.properties.base import register
from rattention.conformance.strategies import Plan, Recipe

LIMIT = {"smoke": 4, "quick": 1000, "full": 1000}


def _draw(plan: Plan) -> Iterator[Recipe]:
    files = [file for path in plan.vectors for file in vectors.list_set(path)]
    for file in files[: LIMIT[plan.profile]]:
        case = vectors.load_case(file)
        # T weighs the unit for the workers; everything else is in the file.
        T = case.tensors["q"].shape[1] if "q" in case.tensors else 1
        yield Recipe(case.op, dtype=storage_of(case), T=T, seed=case.seed or 0, extra=(str(file),))


def _make(plan: Plan, recipe: Recipe) -> Case:
    case = vectors.load_case(Path(recipe.extra[0]))
    case.clauses = case.clauses or exercised(case.op, case.tensors, case.attrs)
    return case


@register("stored vectors", "cases from disk, real activations among them", ALL, _draw, _make, shrinks=False)
def check(ctx: Context, case: Case) -> list[Violation]:
    """The stored answer, within the stored budget."""
    return agree(ctx, case)
