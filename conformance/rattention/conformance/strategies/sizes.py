"""The levels of each size: T, D, Dv, windows, heads, rows and slots, at borders and beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from rattention.conformance.strategies.plan import Plan


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


def value_channels(plan: Plan, size: str, bag: Bag, dtype: str, D: int) -> int:
    """Dv for a size class: as D, below it and above it."""
    if size in ("span", "long", "deep", "vast") and plan.cost != "direct":
        return 16  # room for a marked token at each power of two (see the membership probes)
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


COSTLY_WINDOWS: dict[str, dict[str, list[int | None]]] = {
    "compiled": {"span": [511], "long": [13, 17, 40]},
    "interpreted": {"span": [64, 128], "long": [13, 17, 40]},
}
"""The far windows where each signature costs a program and there is one: tokens behind a long window, tokens far behind
a narrow one."""


def far(plan: Plan, size: str, bag: Bag, levels: Sequence[int]) -> tuple[int, int | None]:
    """T and a window for the size classes "span" and "long"; T leaves tokens behind a window that is a size itself."""
    if plan.cost == "direct":
        stratum = bag.pick("far stratum", [*FAR_WINDOWS])
        window = bag.pick(f"far {stratum}", FAR_WINDOWS[stratum])
    else:
        stratum = "costly"
        window = bag.pick("far window", COSTLY_WINDOWS[plan.cost][size])
    beyond = 0 if stratum in ("none", "narrow", "whole") else 40
    past = [n for n in levels if not beyond or n > (window or 0) + beyond] or levels
    T = bag.pick(f"T of {len(past)}", past)
    return T, T + window if stratum == "whole" and window is not None else window


def windows(plan: Plan, T: int, size: str, draw: np.random.Generator) -> list[int | None]:
    """Windows at, below and above T, 0, -1, None, and beside the tiles."""
    inside = [int(draw.integers(1, max(T - 1, 2))), int(draw.integers(1, max(T // 2, 2))), max(T // 3, 1)]
    levels: list[int | None] = [-1, 0, 1, 2, *inside, *inside, max(T - 2, 0), T - 1, T, T + 1, None]
    if size == "vast":
        return [None, 2049, 2055, T - 3, 1500] if plan.cost == "direct" else [None, 2055]
    if size == "small" and plan.cost != "direct":
        # As many as the pool has signatures, so that each operation meets each.
        return [-1, 0, 1, inside[0], max(T // 3, 1), max(T - 2, 0), T, None]
    if size == "wide" and plan.cost != "direct":
        return [0, 1]
    if size == "tile":
        sizes = plan.tiles.get("window") or plan.token_tiles() or (16, 32, 64)
        levels = [*beside(sizes, 0, max(T, 1)), *inside, -1, 0, None]
    return levels


def extend_tokens(plan: Plan, size: str) -> list[int]:
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


def extend_windows(plan: Plan, size: str, rng: np.random.Generator) -> list[int | None]:
    w = int(rng.integers(1, 8))
    slow = plan.cost == "interpreted"
    if plan.cost == "compiled" and size == "deep":
        return [None, 512]
    return {
        "small": [-1, 0, 1, 2, 3, w, w, 6, 9, None] if plan.cost == "direct" else [-1, 0, 1, 2, w, 6, 9, None],
        "medium": [-1, 0, 1, w, 11, 16, 17, 40, None],
        "tile": [*beside(plan.tiles.get("window") or (16, 32, 64), 1, 70), None],
        "wide": [-1, 0, 2, w, None],
        "span": [-1, 0, 5, 63, 64, 100, 129, 256, None] if not slow else [3, 130],
        "long": [3, 200, 17, None] if not slow else [3, 130],
        # As many None as there are numbers of slots, so that each is met.
        "deep": [128, 255, 512, 1024, 2047, 2050, 4100, *[None] * 5] if not slow else [100, 130],
        "vast": [2050, 4100, None] if not slow else [260],
    }[size]


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


def slots(plan: Plan, size: str) -> tuple[int, ...]:
    """Slots of a cache at window None: the most that there are where few programs are compiled."""
    levels = SLOTS.get(size, (0, 1, 4, 7))
    return levels if plan.cost != "compiled" or size != "deep" else levels[-1:]
