"""The pools that recipes are drawn from: sizes beside borders, every option, every family, in balanced proportions.

A `Plan` belongs to one run: profile, seed and the backend's description. Backends that compile a program per
signature (shapes, dtypes, options, attributes) get signatures from a pool that depends on the profile alone, and fresh
values from the seed; the others get fresh signatures too.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rattention.conformance.strategies.recipe import Recipe
from rattention.conformance.strategies.values import FAMILIES
from rattention.spec import load

PROFILES = ("smoke", "quick", "full")
FULL = 1.5
"""Cases of `full` for each of `quick`, but where a property says otherwise; more seeds are the better way to more."""
COSTS = ("direct", "compiled", "interpreted")
INTERPRETED = 0.3
"""Cases of an interpreted backend, as a share of those of a compiled one."""
BY_NAME = {"jax": "compiled", "torch-triton": "interpreted", "jax-pallas": "interpreted"}

DTYPES = ("float32", "bfloat16", "float16")
OPTIONS = {
    "sliding_window_attention": ("rope", "positions", "segments", "scale"),
    "residual_linear_attention": ("segments", "q_scale", "k_scale", "memory", "initial_state"),
    "rattention": ("rope", "positions", "segments", "scale", "q_scale", "k_scale", "memory", "initial_state"),
    "rattention_extend": ("rope", "scale", "q_scale", "k_scale", "memory", "lengths"),
}
COTANGENTS = {
    "residual_linear_attention": ("d_final_state",),
    "rattention": ("d_final_state",),
    "rattention_extend": ("d_cache_k", "d_cache_v", "d_cache_state"),
}


class Bag:
    """Draws from weighted levels without replacement until they are used up: balanced even in short runs."""

    def __init__(self, rng: np.random.Generator):
        self.rng = rng
        self.left: dict[str, list[Any]] = {}

    def pick(self, factor: str, levels: Sequence[Any]) -> Any:
        bag = self.left.get(factor)
        if not bag:
            bag = [levels[i] for i in self.rng.permutation(len(levels))]
            self.left[factor] = bag
        return bag.pop()


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
        return {"q_scale": "scales", "k_scale": "scales"}.get(option, option) not in self.lacking

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
    listed = describe.get("operations")
    names = tuple(op for op in load().operations if op in listed) if isinstance(listed, list | tuple) else ()
    dtypes = tuple(d for d in DTYPES if d in (describe.get("dtypes") or ())) or DTYPES
    capable = describe.get("capabilities")
    lacking = frozenset(load().capabilities) - set(capable) if isinstance(capable, list | tuple) else frozenset()
    limits = describe.get("limits")
    return Plan(
        profile,
        seed,
        cost if cost in COSTS else "direct",
        dtypes,
        names,
        sizes,
        vectors,
        lacking,
        limits if isinstance(limits, Mapping) else {},
    )


def beside(values: Sequence[int], low: int, high: int) -> list[int]:
    """Each value, one below and one above, inside [low, high]."""
    return sorted({v + d for v in values for d in (-1, 0, 1) if low <= v + d <= high})


def tokens(plan: Plan, size: str) -> list[int]:
    """T for a size class; a tile border is a border of every backend that has one."""
    tiles = plan.token_tiles() or (16, 32, 64)
    if size == "small":
        return [1, 2, 3, 4, 5, 6, 7, 8, 9, 11]
    if size == "medium":
        return [12, 15, 16, 17, 23, 31, 32, 33, 40]
    if size == "tile":
        return beside([*tiles, *(2 * t for t in tiles)], 12, 300 if plan.cost == "direct" else 140) or [33, 64, 65]
    if size == "wide":
        return [3, 6, 9, 70] if plan.cost != "interpreted" else [3, 6, 9]
    if plan.cost == "interpreted":
        return [150, 261]
    if size == "span":
        return [150, 160, 192, 200, 255, 256, 257, 300, 320, 384, 511, 512, 513, 640, 1024]
    if size == "vast":
        return [2060, 2081, 2114]
    return [1030, 1047, 1090, 1088, 1025, 1152, *([1536, 2050] if plan.profile == "full" else [])]


WIDE = {"below 64": (24, 33, 40, 48), "up to 128": (64, 80, 96, 128), "above 128": (129, 160, 192, 256)}
"""Head dims of the size class "wide", in strata that every storage dtype meets."""


def channels(plan: Plan, size: str, bag: Bag, stratum: str, *, even: bool) -> int:
    """D for a size class, and in "wide" for a stratum of it."""
    if size == "wide":
        declared = beside(plan.tiles.get("D", ()), 8, 257) or [64]
        levels = [d for d in WIDE.get(stratum, declared) if not (even and d % 2)]
        return bag.pick(f"D {stratum} even={even}", levels)
    levels = {
        "small": [1, 2, 3, 4, 4, 5, 6, 8],
        "medium": [2, 4, 7, 8, 12, 16],
        "tile": [4, 6, 8, 16],
        "span": [4, 6, 8],
        "long": [4, 6],
        "deep": [2, 4, 8],
        "vast": [2, 4],
    }[size]
    return bag.pick(f"D even={even}", [d for d in levels if d % 2 == 0] if even else levels)


def value_channels(size: str, bag: Bag, dtype: str, D: int) -> int:
    """Dv for a size class: as D, below it and above it."""
    if size == "wide":
        stratum = bag.pick(f"Dv of {dtype}", ["D", "small", "middle", "large"])
        small, middle, large = [3, 16, 40], [65, 96, 128], [130, 160, 200, 256]
        return bag.pick(f"Dv {stratum}", {"D": [D], "small": small, "middle": middle, "large": large}[stratum])
    return bag.pick("Dv", [D, 3, 5, 8, 2, 4, 1])


FAR_WINDOWS: dict[str, list[int | None]] = {
    "none": [None],
    "narrow": [0, 1, 3, 13, 17, 40, -1],
    "tile": [64, 128],
    "beside a tile": [63, 65, 100, 127, 129],
    "half": [254, 255, 256, 512],
    "paper": [511],
    "whole": [-6, -1, 0, 1],
}
"""Windows of long sequences in strata that are met in turn: those of "whole" count from T, "paper" is the one that the
paper trains with, 512 tokens with the query's own."""


def far(bag: Bag, levels: Sequence[int]) -> tuple[int, int | None]:
    """T and a window for the size classes "span" and "long"; T leaves tokens behind a window that is a size itself."""
    stratum = bag.pick("far stratum", [*FAR_WINDOWS])
    window = bag.pick(f"far {stratum}", FAR_WINDOWS[stratum])
    beyond = 0 if stratum in ("none", "narrow", "whole") else 40
    past = [n for n in levels if not beyond or n > (window or 0) + beyond] or levels
    T = bag.pick(f"T of {len(past)}", past)
    return T, T + window if stratum == "whole" and window is not None else window


def windows(plan: Plan, T: int, size: str, draw: np.random.Generator) -> list[int | None]:
    """Windows at, below and above T, 0, -1, None, and beside the tiles."""
    inside = [int(draw.integers(1, max(T - 1, 2))), int(draw.integers(1, max(T // 2, 2))), max(T // 3, 1)]
    levels: list[int | None] = [-1, 0, 1, 2, *inside, *inside, max(T - 2, 0), T - 1, T, T + 1, None]
    if size == "vast":
        return [None, 2049, 2055, T - 3, 1500]
    if size == "tile":
        sizes = plan.tiles.get("window") or plan.token_tiles() or (16, 32, 64)
        levels = [*beside(sizes, 0, max(T, 1)), *inside, -1, 0, None]
    return levels


POOL = {"small": 8, "medium": 2, "tile": 1, "wide": 1, "span": 1, "long": 1, "deep": 1, "vast": 1}
"""Signatures of each operation and size class, where every new one costs the compilation of a program."""
SETS = 4
"""Sets of values drawn for each signature of the pool."""


def pool(plan: Plan, op: str, size: str) -> list[Recipe]:
    """The signatures that all properties share, the same in every run of a profile."""
    rng = np.random.default_rng((PROFILES.index(plan.profile), zlib.crc32(f"{op} {size}".encode())))
    bag = Bag(rng)
    number = {"smoke": 0.5, "quick": 1.0, "full": 1.5}[plan.profile] * POOL[size]
    number *= 0.6 if op.removesuffix(".vjp") in ("feature_map", "rms_mix", "rope_table") else 1.0
    number *= 0.6 if plan.cost == "interpreted" else 1.0
    return [_signature(plan, op, size, rng, bag, {}) for _ in range(max(1, round(number)))]


def recipes(
    plan: Plan,
    op: str,
    size: str,
    count: int,
    purpose: str,
    suits: Callable[[Recipe], bool] | None = None,
    **fixed: Any,
) -> Iterator[Recipe]:
    """`count` recipes of one size class, every factor balanced; `fixed` holds fields that do not vary.

    Where programs are compiled, a property that says what `suits` it gets signatures from the pool, whose fields win
    over `fixed`; without a suitable one, or without `suits`, it has a few signatures of its own.
    """
    values, value_bag = plan.rng(purpose, op, size), Bag(plan.rng(purpose, op, size, "bag"))
    drawn: list[Recipe] = []
    if plan.cost != "direct" and suits is not None:
        drawn = [r for s in (size, "small", "medium") for r in pool(plan, op, s) if suits(r)]
        of_size = len([r for r in pool(plan, op, size) if suits(r)])
        drawn = drawn[:of_size] or drawn
    if not drawn:
        shapes, bag = plan.shape_rng(purpose, op, size), Bag(plan.shape_rng(purpose, op, size, "bag"))
        signatures = count if plan.cost == "direct" else (count + SETS - 1) // SETS
        drawn = [_signature(plan, op, size, shapes, bag, fixed) for _ in range(signatures)]
    elif suits is not None:
        fixed = {}
    for i in range(count):
        yield _values(plan, drawn[i % len(drawn)], values, value_bag, fixed)


def _signature(plan: Plan, op: str, size: str, rng: np.random.Generator, bag: Bag, fixed: dict[str, Any]) -> Recipe:
    """One signature, inside the declared limits where a few draws find one."""
    for _ in range(12):
        recipe = _free_signature(plan, op, size, rng, bag, fixed)
        if not plan.limits or inside(recipe, plan.limits):
            break
    return recipe


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
        low, high, step = bound.get("minimum"), bound.get("maximum"), bound.get("multiple_of")
        if value is None:
            return "" if bound.get("none", True) else f"{name}=None is outside the limits"
        if (low is not None and value < low) or (high is not None and value > high) or (step and value % step):
            return f"{name}={value} is outside {dict(bound)}"
        return ""
    if isinstance(bound, int | float) and not isinstance(bound, bool) and isinstance(value, int | float):
        return f"{name}={value} is above {bound}" if value > bound else ""
    return ""


HEADS: dict[str, list[tuple[int, int]]] = {
    "small": [(1, 1), (2, 1), (1, 2), (2, 2), (1, 3), (3, 1), (1, 8), (2, 3), (1, 4), (2, 4), (1, 5), (4, 1), (1, 6),
              (1, 7), (3, 4), (8, 1), (1, 16), (2, 8), (5, 2)],
    "few": [(1, 1), (1, 2), (2, 1), (1, 3)],
    "wide": [(1, 1), (1, 2), (2, 1), (1, 3), (2, 2), (1, 8)],
    "span": [(1, 1), (1, 1), (1, 2), (2, 1), (1, 1), (1, 3)],
    "long": [(1, 1), (1, 1), (1, 1), (1, 2), (1, 1), (2, 1)],
    "vast": [(1, 1)],
}  # fmt: skip
"""(Hkv, G) by size class; "few" where a class is not named."""
HEADS["medium"] = HEADS["small"][:13]
INTERPRETED_HEADS = [(1, 1), (1, 2), (2, 1), (1, 3), (1, 1), (1, 8), (2, 2)]
"""Under an interpreter every program of a grid, so every row and every key/value head, costs its own time."""
ROWS = {
    "small": (1, 1, 1, 1, 2, 2, 2, 2, 2, 3, 3, 3, 4, 4, 5, 9),
    "medium": (1, 2, 2, 3),
    "span": (1, 1, 1, 2),
    "long": (1, 1, 1, 2),
    "vast": (1,),
    "deep": (1, 2, 2, 3),
}
"""B by size class."""
SCALES = (0.3, 1.0, -0.7, 0.0, 2.0, 0.11)
"""Of the attention scores. Most of them are rounded by float16 and bfloat16: a scale is not to pass through those."""
SLOTS = {"long": (100,), "span": (0, 40, 130), "deep": (130, 600, 1100, 2060, 4200)}
"""Slots of a cache at window None, by size class."""


def _free_signature(
    plan: Plan, op: str, size: str, rng: np.random.Generator, bag: Bag, fixed: dict[str, Any]
) -> Recipe:
    base = op.removesuffix(".vjp")
    extend = base == "rattention_extend"
    chance = {o: [True, False] for o in OPTIONS.get(base, ())}
    if size in ("long", "vast"):  # packed documents are shorter than what these sizes are for
        chance |= {"segments": [True, False, False]} if "segments" in chance else {}
    options = [o for o, levels in chance.items() if bag.pick(f"option {o}", levels) and plan.allows(o)]
    if op.endswith(".vjp"):
        options += [o for o in COTANGENTS.get(base, ()) if bag.pick(f"option {o}", [True, True, False])]
    if "rope" not in options and "positions" in options:
        options.append("rope")
    if (extend or "positions" in options) and bag.pick("far", [True, False, False]):
        options.append("far")
    if "options" in fixed:
        options = list(fixed["options"])
    levels = [fixed["T"]] if "T" in fixed else _extend_tokens(plan, size) if extend else tokens(plan, size)
    T, window = far(bag, levels) if size in ("long", "span") and not extend else (bag.pick("T", levels), None)
    dtype = bag.pick("dtype", plan.dtypes)
    stratum = bag.pick(f"D of {dtype}", [*WIDE, "declared"]) if size == "wide" else ""
    if stratum and "rope" in chance and plan.allows("rope") and "options" not in fixed:
        # Few calls are wide: each stratum is met with tables and without.
        turned = bag.pick(f"rope of {stratum}", [True, False])
        options = [o for o in options if turned or o not in ("rope", "positions")]
        options += ["rope"] if turned and "rope" not in options else []
    D = channels(plan, size, bag, stratum, even="rope" in options or base == "rope_table")
    Hkv, G = bag.pick("heads", HEADS.get(size, HEADS["few"]) if plan.cost != "interpreted" else INTERPRETED_HEADS)
    if extend:
        window = bag.pick("window", _extend_windows(plan, size, rng))
    elif size == "vast":
        window = bag.pick("window class", windows(plan, T, size, rng))
    elif size not in ("long", "span"):
        widths = windows(plan, T, size, rng)
        window = widths[bag.pick(f"window of {len(widths)}", range(len(widths)))]
    recipe = Recipe(
        op=op,
        dtype=dtype,
        B=bag.pick("B", ROWS.get(size, (1, 1, 2)) if plan.cost != "interpreted" else (1, 1, 2)),
        T=T,
        Hkv=Hkv,
        G=G,
        D=D,
        Dv=value_channels(size, bag, dtype, D),
        window=window if window is None else max(window, -1),
        feature_map=bag.pick("feature_map", ["softmax", "relu", "identity"]),
        scale=float(bag.pick("scale", SCALES)) if "scale" in options else None,
        eps=bag.pick("eps", [1e-6, 1e-6, 1e-2, 1e-5, 1.0]),
        options=tuple(o for o in options if o != "scale"),
        slots=0 if window is not None else bag.pick("slots", SLOTS.get(size, (0, 1, 4, 7))),
        weights=bag.pick("weights", ["float32", "storage", "mixed"]),
    )
    return recipe.with_(**{k: v for k, v in fixed.items() if k != "T"})


def _values(plan: Plan, recipe: Recipe, rng: np.random.Generator, bag: Bag, fixed: dict[str, Any]) -> Recipe:
    flags = [o for o in ("poison", "defaults") if bag.pick(o, [True, False])]
    if plan.cost == "direct" and bag.pick("rows", [True, False]):
        flags.append("rows")
    drawn = {
        "family": bag.pick("family", [*FAMILIES, "normal"]),
        "layout": bag.pick(
            "layout", ["mixed", "mixed", "pair", "tile", "many", "left", "middle", "dense", "one", "empty"]
        ),
        "fill": bag.pick("fill", ["mixed", "mixed", "beyond", "partial", "full", "empty"]),
        "seed": int(rng.integers(0, 2**31)),
        "options": recipe.options + tuple(flags),
    }
    return recipe.with_(**{k: v for k, v in drawn.items() if k not in fixed or k == "options"})


def _extend_tokens(plan: Plan, size: str) -> list[int]:
    slow = plan.cost == "interpreted"
    return {
        "small": [1, 1, 2, 3, 4, 5, 7, 9, 0],
        "medium": [1, 2, 12, 16, 17, 33],
        "tile": [*beside(plan.token_tiles() or (16, 32, 64), 1, 70), 1, 1],
        "wide": [1, 3, 6],
        "span": [150, 192, 256, 257, 300, 512, 513] if not slow else [1, 150],
        "long": [1030, 1, 1040] if not slow else [1, 150],
        "deep": [1, 1, 2, 5, 1, 17],
        "vast": [1, 3],
    }[size]


def _extend_windows(plan: Plan, size: str, rng: np.random.Generator) -> list[int | None]:
    w = int(rng.integers(1, 8))
    slow = plan.cost == "interpreted"
    return {
        "small": [-1, 0, 1, 2, 3, w, w, 6, 9, None],
        "medium": [-1, 0, 1, w, 11, 16, 17, 40, None],
        "tile": [*beside(plan.tiles.get("window") or (16, 32, 64), 1, 70), None],
        "wide": [-1, 0, 2, w, None],
        "span": [-1, 0, 5, 63, 64, 100, 129, 256, None] if not slow else [3, 130],
        "long": [3, 200, 17, None] if not slow else [3, 130],
        # As many None as there are numbers of slots, so that each is met.
        "deep": [128, 255, 512, 1024, 2047, 2050, 4100, *[None] * 5] if not slow else [100, 130],
        "vast": [2050, 4100, None] if not slow else [260],
    }[size]


def supported(plan: Plan) -> list[str]:
    """Operations that have vectors of their own in this plan, in the order of the specification."""
    return [op for op in load().operations if plan.has(op)]
