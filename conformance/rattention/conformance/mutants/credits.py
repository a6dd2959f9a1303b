"""Whether each credit is earned: a property that counts for a clause kills a mutant of that clause with such a case.

A case that passes is counted for the clauses that it is said to test (`features.py`, the properties). If no mutant of a
clause ever fails one of the cases of a property that are counted for it, the count says more than the property sees.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rattention.conformance import backends
from rattention.conformance.mutants import CATALOGUE
from rattention.conformance.mutants.runner import Deck
from rattention.conformance.properties import REGISTRY
from rattention.conformance.session import Session

TRIED = 40
"""Cases of a property and clause that each mutant has to survive."""


@dataclass(frozen=True)
class Credit:
    """A property and a clause that its cases are counted for. `mutant` is one of the clause that it kills, or ""."""

    property_name: str
    clause: str
    cases: int
    mutant: str


def credits(deck: Deck, progress: Callable[[Credit], None] | None = None) -> list[Credit]:
    """Every credit of a profile, in the order of the properties and clauses."""
    counted: dict[tuple[str, str], list[int]] = defaultdict(list)
    for index, unit in enumerate(deck.units):
        for clause in deck.clauses[index]:
            counted[unit.property_name, clause].append(index)
    found = []
    for (name, clause), indices in counted.items():
        chosen = sorted(indices, key=lambda i: deck.sizes[i])
        step = -(-len(chosen) // TRIED)
        credit = Credit(name, clause, len(indices), _killed(deck, name, clause, chosen[::step]))
        found.append(credit)
        if progress:
            progress(credit)
    return found


def _killed(deck: Deck, name: str, clause: str, indices: list[int]) -> str:
    """The first mutant of the clause, those that break it first before others, that fails one of the cases."""
    for mutant in _of(clause):
        backend = CATALOGUE[mutant].make()
        try:
            session = Session(backend, backends.describe(backend, mutant), deck.plan, oracle=deck.oracle)
            for index in indices:
                if session.verdict(REGISTRY[name], deck.case(index))[0]:
                    deck.forget(index)
                    return mutant
        except backends.CannotRun:
            continue
        finally:
            backends.close(backend)
    return ""


def _of(clause: str) -> Iterator[str]:
    """Mutants that break the clause in the first place, and then the others that do."""
    yield from (m.id for m in CATALOGUE.values() if m.clauses[0] == clause)
    yield from (m.id for m in CATALOGUE.values() if clause in m.clauses[1:])
