"""The suite against every mutant: run until the first failure, the tests of the clauses it breaks first.

Cases and the reference's answers do not depend on the mutant, so that all mutants of one run share them.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rattention.conformance import backends
from rattention.conformance.case import Case
from rattention.conformance.mutants import CATALOGUE, Mutant, Port
from rattention.conformance.oracle import Oracle
from rattention.conformance.properties import REGISTRY, make_case
from rattention.conformance.runner import Settings, plan_units
from rattention.conformance.session import Session, Unit
from rattention.conformance.strategies import make_plan
from rattention.conformance.workers import end_with_parent, without_interrupts

KEPT_CASE = 2**19
"""Bytes up to which a case stays in memory; larger ones are built again."""


@dataclass(frozen=True)
class Death:
    """What became of one mutant. `test` is the property that killed it, "" for a survivor.

    clauses: labels that the killing case checks or its violations name. cases: how many were run, the last one
    included. own: whether that test checks the clause that the mutant breaks first.
    """

    mutant: str
    test: str = ""
    op: str = ""
    clauses: tuple[str, ...] = ()
    cases: int = 0
    seconds: float = 0.0
    message: str = ""
    own: bool = False

    @property
    def killed(self) -> bool:
        return bool(self.test)


@dataclass
class Deck:
    """Every case of a profile and seed, in the order of the plan, with what is needed to sort them."""

    profile: str
    seed: int
    oracle: Oracle = field(default_factory=lambda: Oracle(2**30))

    def __post_init__(self) -> None:
        self.plan = make_plan(self.profile, self.seed, Port().describe())
        self.units: list[Unit] = []
        self.clauses: list[tuple[str, ...]] = []
        self.sizes: list[int] = []
        self.kept: dict[int, Case] = {}
        for unit in plan_units(self.plan, Settings(self.profile, self.seed)):
            case = make_case(REGISTRY[unit.property_name], self.plan, unit.recipe)
            if case is None:
                continue
            index = len(self.units)
            self.units.append(unit)
            self.clauses.append(case.clauses)
            self.sizes.append(_cost(case))
            if sum(t.nbytes for t in case.tensors.values()) <= KEPT_CASE:
                self.kept[index] = case

    def case(self, index: int) -> Case:
        unit = self.units[index]
        case = self.kept.get(index) or make_case(REGISTRY[unit.property_name], self.plan, unit.recipe)
        assert case is not None
        return case

    def order(self, mutant: Mutant) -> list[int]:
        """Indices of the cases: those that check its clauses first, and small before large unless size matters."""
        first, others = mutant.clauses[0], set(mutant.clauses[1:])
        sign = -1 if mutant.kind == "past size" else 1

        def key(i: int) -> tuple[int, int, int]:
            checked = self.clauses[i]
            tier = 0 if first in checked else 1 if others.intersection(checked) else 2
            return tier, sign * self.sizes[i].bit_length(), i

        return sorted(range(len(self.units)), key=key)

    def forget(self, index: int) -> None:
        """Drop a case whose tensors a mutant may have changed."""
        self.kept.pop(index, None)


def _cost(case: Case) -> int:
    shape = next((t.shape for name, t in case.tensors.items() if name in ("q", "x", "swa")), (1, 1, 1, 1))
    B, T, H, D = (*shape, 1, 1, 1, 1)[:4]
    return max(1, B * H * T * (T + D) * (3 if case.is_vjp else 1))


def judge(mutant: Mutant, deck: Deck) -> Death:
    """Run one mutant until it dies, or to the end."""
    begin = time.perf_counter()
    backend = mutant.make()
    try:
        return _judge(mutant, backend, deck, begin)
    finally:
        backends.close(backend)


def _judge(mutant: Mutant, backend: Any, deck: Deck, begin: float) -> Death:
    try:
        about = backends.describe(backend, mutant.id)
    except backends.CannotRun as reason:
        own = mutant.clauses[0] == "BCK-1"
        return Death(mutant.id, "describe", "", ("BCK-1",), 0, time.perf_counter() - begin, str(reason), own)
    session = Session(backend, about, deck.plan, oracle=deck.oracle)
    count = 0
    for index in deck.order(mutant):
        unit, case = deck.units[index], deck.case(index)
        count += 1
        violations, _ = session.verdict(REGISTRY[unit.property_name], case)
        session.ctx.shares = {}
        if violations:
            deck.forget(index)
            named = tuple(dict.fromkeys((*(label for v in violations for label in v.clauses), *deck.clauses[index])))
            seconds = time.perf_counter() - begin
            own = mutant.clauses[0] in named
            return Death(mutant.id, unit.property_name, case.op, named, count, seconds, violations[0].message, own)
    return Death(mutant.id, cases=count, seconds=time.perf_counter() - begin)


def select(text: str = "") -> list[Mutant]:
    """Mutants whose id contains `text`; all of them where it is empty."""
    return [m for m in CATALOGUE.values() if text in m.id]


def run_mutants(
    profile: str = "quick",
    seed: int = 0,
    mutants: Sequence[Mutant] | None = None,
    *,
    workers: int = 0,
    progress: Callable[[Death], None] | None = None,
) -> list[Death]:
    """Hold the suite against the mutants.

    Args:
        profile, seed: as for a run against a backend.
        mutants: which ones; the whole catalogue by default.
        workers: processes that share the list; 0 stays in this one.
        progress: called with each death as it becomes known.

    Returns:
        one Death per mutant, in the order of the catalogue.
    """
    chosen = list(CATALOGUE.values()) if mutants is None else list(mutants)
    found: dict[str, Death] = {}
    for death in _local(profile, seed, chosen) if workers <= 1 else _spread(profile, seed, chosen, workers):
        found[death.mutant] = death
        if progress:
            progress(death)
    return [found[m.id] for m in chosen]


def _local(profile: str, seed: int, chosen: Sequence[Mutant]) -> Iterator[Death]:
    deck = Deck(profile, seed)
    for mutant in chosen:
        yield judge(mutant, deck)


_DECK: Deck | None = None


def _start(profile: str, seed: int) -> None:
    global _DECK
    end_with_parent()
    _DECK = Deck(profile, seed)


def _one(name: str) -> Death:
    assert _DECK is not None
    return judge(CATALOGUE[name], _DECK)


def _spread(profile: str, seed: int, chosen: Sequence[Mutant], workers: int) -> Iterator[Death]:
    context = multiprocessing.get_context("spawn")
    with without_interrupts():
        pool = context.Pool(workers, _start, (profile, seed))
    with pool:
        yield from pool.imap_unordered(_one, [m.id for m in chosen], chunksize=4)
