"""Every pair of classes that can meet: which of them recipes hold, and recipes that hold those still missing.

Faults that need two things at once, such as trailing padding behind a live document or a long window in float16, lie
on pairs; drawing at random leaves some of them out under every seed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from rattention.conformance.strategies.classes import CHEAPEST, OVER, Chance, Factor, apart, cost, declared, factors
from rattention.conformance.strategies.plan import Plan
from rattention.conformance.strategies.recipe import Recipe

FIRST = ("T", "B", "tables", "segments", "cache", "window")
"""Factors that exclude most of the others are chosen before them."""

TRIES = 50
"""Ways that are tried to a recipe of a pair."""

Wanted = Callable[[str, str], bool]
"""Whether a pair of factors, by their names, is asked for."""


def completes(plan: Plan) -> bool:
    """Whether the plan holds pairs under every seed. Compiled and interpreted backends get too few calls for that."""
    return plan.cost == "direct"


def wanted(plan: Plan) -> Wanted:
    """The pairs that a profile holds: all of them, or in smoke those that matter most."""
    return _matter_most if plan.profile == "smoke" else lambda a, b: True


def _matter_most(a: str, b: str) -> bool:
    """The dtype with everything, and windows, feature maps, tables, caches and numbers of tokens with each other."""
    return "dtype" in (a, b) or {a, b} <= {"window", "feature_map", "tables", "cache", "T"}


class Pairs:
    """The pairs of one operation under a plan. Classes are numbered through, factor by factor."""

    def __init__(self, plan: Plan, op: str):
        self.op = op
        self.factors = factors(op)
        self.names = [(f, c) for f in self.factors for c in f.classes]
        self.number = {(f.name, c): i for i, (f, c) in enumerate(self.names)}
        self.own = {f.name: np.array([self.number[f.name, c] for c in f.classes]) for f in self.factors}
        self.plain, self.costs = _costs(op)
        self.declared = np.array([declared(plan, f, c) for f, c in self.names])
        self.reasons = _reasons(op)
        self.can_meet = np.array([[not why for why in row] for row in self.reasons])
        self.can_meet &= self.declared[:, None] & self.declared[None, :]
        self._prune()
        self.seen = np.zeros_like(self.can_meet)
        self.times = np.zeros(len(self.names), int)

    def _prune(self) -> None:
        """Two classes meet only in a call that has a class of every other factor, one that either of them can meet."""
        before = -1
        while (left := int(self.can_meet.sum())) != before:
            before = left
            for own in self.own.values():
                some = self.can_meet[:, own].astype(int)
                self.can_meet &= some @ some.T > 0

    def add(self, recipes: Iterable[Recipe]) -> None:
        """Note what these recipes hold."""
        for recipe in recipes:
            held = [self.number[f.name, f.of(recipe)] for f in self.factors]
            self.seen[np.ix_(np.array(held), np.array(held))] = True
            self.times[held] += 1

    def missing(self) -> np.ndarray:
        """Pairs that can meet and were not seen, symmetric; of a class with itself: the class was not seen."""
        return self.can_meet & ~self.seen

    def asked(self, wanted: Wanted) -> np.ndarray:
        """Which pairs are of factors that are asked for, and every class with itself."""
        names = [f.name for f, _ in self.names]
        return np.array([[a == b or wanted(a, b) or wanted(b, a) for b in names] for a in names])

    def complete(self, rng: np.random.Generator, start: Recipe, wanted: Wanted) -> Iterator[Recipe]:
        """Recipes that hold every pair that is missing, each as many of them as a greedy choice finds.

        Only what a pair itself asks for makes a recipe costlier than `OVER`.
        """
        asked = self.asked(wanted)
        while (gap := self.missing() & asked).any():
            first = int(rng.choice(np.flatnonzero(gap.sum(1) == gap.sum(1).max())))
            second = int(rng.choice(np.flatnonzero(gap[first])))
            pair = [first] if first == second else [first, second]
            # A greedy choice may end where no class of some factor is left; chance finds another way.
            tries = (self._recipe(rng, start, gap * (n == 0), pair) for n in range(TRIES))
            recipe = next(filter(None, tries), None)
            if recipe is not None:
                self.add([recipe])
            if recipe is None or not self.seen[first, second]:
                told = " with ".join(map(self._told, pair))
                raise AssertionError(f"{self.op}: {told} cannot be drawn, and no rule of `apart` says so: {recipe}")
            yield recipe

    def _recipe(self, rng: np.random.Generator, start: Recipe, gap: np.ndarray, held: list[int]) -> Recipe | None:
        """A recipe that holds the classes `held`, and of the other factors what fills most gaps; None in a dead end."""
        chosen = {self.names[i][0].name: i for i in held}
        spent = self.plain + sum(self.costs[i] for i in held)
        for f in sorted(self.factors, key=lambda f: (f.name not in FIRST, rng.random())):
            if f.name in chosen:
                continue
            own = self.own[f.name]
            among = np.ix_(own, np.array(held))
            able = self.can_meet[among].all(1)
            if not able.any():
                return None
            cheap = able & (spent + self.costs[own] <= np.log(OVER))
            gains = gap[among].sum(1) + rng.random(len(own)) / 2
            if not cheap.any():  # then the cheapest, and of those the one that fills most
                gains = gains - 1e6 * self.costs[own]
            i = int(own[np.argmax(np.where(cheap if cheap.any() else able, gains, -np.inf))])
            chosen[f.name] = i
            held = [*held, i]
            spent += self.costs[i]
        recipe = self._drawn(start, chosen, rng)
        return recipe if cost(recipe) <= OVER else self._drawn(start, chosen, CHEAPEST)

    def _drawn(self, start: Recipe, chosen: dict[str, int], rng: Chance) -> Recipe:
        recipe = start
        for f in self.factors:
            recipe = f.draw(recipe, self.names[chosen[f.name]][1], rng)
        return recipe

    def _told(self, i: int) -> str:
        factor, name = self.names[i]
        return f"{factor.name} {name}"


@functools.cache
def _reasons(op: str) -> list[list[str]]:
    """Why two classes cannot meet, "" where they can; two classes of one factor never do."""
    names: list[tuple[Factor, str]] = [(f, c) for f in factors(op) for c in f.classes]
    return [
        [("" if x == y else "two of one kind") if f is g else apart(f.name, x, g.name, y) for g, y in names]
        for f, x in names
    ]


@functools.cache
def _costs(op: str) -> tuple[float, np.ndarray]:
    """Logarithms: what a plain recipe costs, and how many times costlier it gets with each class."""
    plain = Recipe(op, T=8, window=1 if op.startswith("rattention_extend") else -1)
    drawn = [cost(f.draw(plain, c, CHEAPEST)) for f in factors(op) for c in f.classes]
    return float(np.log(cost(plain))), np.log(np.maximum(drawn, 1) / cost(plain))
