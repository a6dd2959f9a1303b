"""How cases are drawn: recipes (small plain data) and the builders that turn each into the same tensors every time."""

from rattention.conformance.strategies.build import build
from rattention.conformance.strategies.plan import Plan, make_plan
from rattention.conformance.strategies.recipe import Recipe

__all__ = ["Plan", "Recipe", "build", "make_plan"]
