"""What a run draws from: its profile, its seed, and what the backend says of itself."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rattention.conformance.description import names, number
from rattention.conformance.strategies.recipe import Recipe
from rattention.spec import load

PROFILES = ("smoke", "quick", "full")
FULL = 1.5
"""Cases of `full` for each of `quick`, but where a property says otherwise; more seeds are the better way to more."""
COSTS = ("direct", "compiled", "interpreted")
INTERPRETED = 0.3
"""Cases of an interpreted backend, as a share of those of a compiled one."""
BY_NAME = {"jax": "compiled", "torch-triton": "interpreted", "jax-pallas": "interpreted"}

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Plan:
    """What a run draws from. `cost` is "direct", "compiled" or "interpreted"; `tiles` come from `describe()`."""

    profile: str
    seed: int
    cost: str = "direct"
    dtypes: tuple[str, ...] = DTYPES
    operations: tuple[str, ...] = ()
    tiles: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    vectors: tuple[str, ...] = ()
    lacking: frozenset[str] = frozenset()
    limits: Mapping[str, Any] = field(default_factory=dict)

    def allows(self, option: str) -> bool:
        """False for an option whose capability the backend does not declare: "description" alone asks for those."""
        needs = {"q_scale": ("scales",), "k_scale": ("scales",), "positions": ("positions", "rope")}
        return not self.lacking.intersection(needs.get(option, (option,)))

    def count(self, smoke: int, quick: int, full: int | None = None, *, compiled: float = 0.1) -> int:
        """How many cases a property draws; backends that compile or interpret get the share `compiled` of them."""
        number = {"smoke": smoke, "quick": quick, "full": full if full is not None else FULL * quick}[self.profile]
        share = {"direct": 1.0, "compiled": compiled, "interpreted": INTERPRETED * compiled}[self.cost]
        return max(1 if share else 0, round(number * share)) if number else 0

    def rng(self, *purpose: Any) -> np.random.Generator:
        """A stream of its own for each purpose, from the run's seed."""
        return np.random.default_rng((self.seed & 0xFFFFFFFF, zlib.crc32(repr(purpose).encode())))

    def shape_rng(self, *purpose: Any) -> np.random.Generator:
        """As `rng`, but from the profile alone where programs are compiled per shape."""
        if self.cost == "direct":
            return self.rng("shapes", *purpose)
        return np.random.default_rng((PROFILES.index(self.profile), zlib.crc32(repr(purpose).encode())))

    def has(self, op: str) -> bool:
        return not self.operations or op in self.operations

    def token_tiles(self) -> tuple[int, ...]:
        return tuple(self.tiles.get("T", ()))


def make_plan(profile: str, seed: int, describe: Mapping[str, Any], vectors: tuple[str, ...] = ()) -> Plan:
    """The plan of a run against a backend that describes itself so; what a broken description lacks is empty."""
    tiles = describe.get("tile_sizes")
    tiles = tiles if isinstance(tiles, Mapping) else {}
    sizes = {
        str(k): tuple(x for x in v if isinstance(x, int) and x > 0)
        for k, v in tiles.items()
        if isinstance(v, list | tuple)
    }
    cost = describe.get("cost") or BY_NAME.get(str(describe.get("name")), "direct")
    listed = names(describe, "operations")
    dtypes = tuple(d for d in DTYPES if d in names(describe, "dtypes")) or DTYPES
    told = isinstance(describe.get("capabilities"), list | tuple)
    lacking = frozenset(load().capabilities) - set(names(describe, "capabilities")) if told else frozenset()
    limits = describe.get("limits")
    return Plan(
        profile,
        seed,
        cost if cost in COSTS else "direct",
        dtypes,
        tuple(op for op in load().operations if op in listed),
        sizes,
        vectors,
        lacking,
        limits if isinstance(limits, Mapping) else {},
    )


def supported(plan: Plan) -> list[str]:
    """Operations that have vectors of their own in this plan, in the order of the specification."""
    return [op for op in load().operations if plan.has(op)]


def inside(recipe: Recipe, limits: Mapping[str, Any]) -> bool:
    """Whether the declared limits admit the recipe."""
    sizes = {n: getattr(recipe, n) for n in ("B", "T", "Hkv", "D", "Dv", "window", "feature_map", "eps")}
    sizes |= {"Hq": recipe.Hkv * recipe.G, "H": recipe.Hkv * recipe.G}
    sizes["F"] = recipe.D if recipe.feature_map == "identity" else 2 * recipe.D
    return not any(name in limits and outside(name, value, limits[name]) for name, value in sizes.items())


def outside(name: str, value: Any, bound: Any) -> str:
    """Why a declared limit excludes a value, or "": a largest number, a list of what is allowed, or a table with
    minimum, maximum, multiple_of and none."""
    if isinstance(bound, list | tuple):
        return "" if value in bound else f"{name}={value} is none of {list(bound)}"
    if isinstance(value, str):
        return ""
    if isinstance(bound, Mapping):
        low, high, step = (number(bound.get(key)) for key in ("minimum", "maximum", "multiple_of"))
        if value is None:
            return "" if bound.get("none", True) else f"{name}=None is outside the limits"
        if (low is not None and value < low) or (high is not None and value > high) or (step and value % step):
            return f"{name}={value} is outside {dict(bound)}"
        return ""
    if isinstance(bound, int | float) and not isinstance(bound, bool) and isinstance(value, int | float):
        return f"{name}={value} is above {bound}" if value > bound else ""
    return ""
