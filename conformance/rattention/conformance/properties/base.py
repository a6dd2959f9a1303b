"""What a property is: a name, the clauses it checks, where its cases come from, and its verdict on one case."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rattention.conformance.case import Case
from rattention.conformance.context import Context
from rattention.conformance.judge import Violation
from rattention.conformance.strategies import Plan, Recipe, build

Draw = Callable[[Plan], Iterator[Recipe]]
Make = Callable[[Plan, Recipe], Case | None]
Check = Callable[[Context, Case], list[Violation]]


@dataclass(frozen=True)
class Property:
    """One property of the suite.

    name, about: for reports. clauses: every label it can check; a case may name fewer. draw: the recipes of a plan, in
    a fixed order. make: a recipe's case, None where the recipe makes no sense for the property (shrinking asks for such
    recipes). check: the verdict; it must not depend on anything but the case. stored: its cases come from disk, and
    keep the property that they name.
    """

    name: str
    about: str
    clauses: tuple[str, ...]
    draw: Draw
    make: Make
    check: Check
    shrinks: bool = True
    stored: bool = False


REGISTRY: dict[str, Property] = {}


def default_make(plan: Plan, recipe: Recipe) -> Case:
    """The recipe's own call and nothing else."""
    return build(recipe, plan.token_tiles())


def register(
    name: str,
    about: str,
    clauses: tuple[str, ...],
    draw: Draw,
    make: Make = default_make,
    *,
    shrinks: bool = True,
    stored: bool = False,
) -> Callable[[Check], Check]:
    """Decorator of a property's `check`."""

    def enter(check: Check) -> Check:
        if name in REGISTRY:
            raise ValueError(f"property {name!r} is registered twice")
        REGISTRY[name] = Property(name, about, clauses, draw, make, check, shrinks, stored)
        return check

    return enter


def make_case(prop: Property, plan: Plan, recipe: Recipe) -> Case | None:
    """The case of a property, labelled with it."""
    case = prop.make(plan, recipe)
    if case is not None:
        case.property_name = case.property_name if prop.stored else prop.name
        case.seed = recipe.seed
        case.clauses = case.clauses or prop.clauses
        case.note = case.note or prop.about
    return case
