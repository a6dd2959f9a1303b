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
from rattention.conformance.properties.base import REGISTRY, register
from rattention.conformance.strategies import Plan, Recipe


def _draw(plan: Plan) -> Iterator[Recipe]:
    files = (file for path in plan.vectors for file in vectors.list_set(path))
    for file in {file.resolve(): file for file in files}.values():  # one that is named twice is one case
        case = vectors.load_valid(file)
        # T weighs the unit for the workers; everything else is in the file.
        T = case.tensors["q"].shape[1] if "q" in case.tensors else 1
        yield Recipe(case.op, dtype=storage_of(case), T=T, seed=case.seed or 0, extra=(str(file),))


def _make(plan: Plan, recipe: Recipe) -> Case:
    case = vectors.load_valid(Path(recipe.extra[0]))
    if case.property_name in ("agreement", "stored vectors"):
        case.clauses = exercised(case.op, case.tensors, case.attrs)
    elif not case.clauses:
        case.clauses = REGISTRY[case.property_name].clauses
    return case


@register("stored vectors", "cases from disk, real activations among them", ALL, _draw, _make,
          shrinks=False, stored=True)  # fmt: skip
def check(ctx: Context, case: Case) -> list[Violation]:
    """The verdict of the property that the case names: agreement with the stored answer, where it names no other."""
    name = "agreement" if case.property_name == "stored vectors" else case.property_name
    return REGISTRY[name].check(ctx, case)
