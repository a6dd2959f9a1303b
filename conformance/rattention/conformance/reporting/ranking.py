"""Which of the failing clauses is the likeliest: fault localisation over the cases that failed and those that passed.

Three kinds of evidence are put together.

1. Operations are made of each other. Where `feature_map` fails, what fails in `rattention` follows from it, so that the
   failures of the smallest failing operations count in full and those of operations built on them hardly.
2. The spectrum: a clause is the likelier, the more of these failures it could explain (recall) and the fewer cases that
   it bears on passed (precision). Their geometric mean is Ochiai's coefficient, known from fault localisation in
   programs, with clauses in the place of statements.
3. What a failure was found to look like. A clause that is named by a violation, or by a hypothesis that explains it,
   counts more than one that is a mere suspect.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rattention.conformance.judge import Violation
from rattention.conformance.parts import CALLS, parts, roots
from rattention.conformance.runner import Outcome
from rattention.conformance.session import Failure, UnitResult
from rattention.conformance.suspects import PRECISION, ROUGH, SLIGHT, plain
from rattention.spec import load

FOLLOWS = 0.02
"""What a failure counts that a smaller operation's failure explains."""
SUSPECT = 0.4
"""What a suspect counts, beside a clause that there is evidence for."""
STRONG = 0.6
"""What a suspect counts that more speaks for: an option that the minimal case cannot do without, an error so small that
it may be a rounding."""
FORWARD = 0.5
"""What a clause of the forward counts, in units of a suspect, where the gradient alone fails."""
GRADIENT = ("GRAD", "NUM", "FM-6")
"""Clauses that a gradient may break by itself."""
EXACT = ("structure", "refusal", "crash", "mutation", "membership", "law", "hidden nan")
"""Kinds of violation that are no comparison of numbers within a budget: their clauses are what was checked."""


STOPS = ("crash", "refusal")
"""Kinds of violation that leave nothing to compare."""


def likelihoods(outcome: Outcome) -> dict[str, float]:
    """For each clause that a failure points at, how likely it is the one that the fault breaks, from 0 to 1."""
    smallest = roots(operation(r) for r in outcome.results if r.status == "fail")
    groups = grouped(outcome)
    pointed: dict[str, float] = defaultdict(float)
    total = 0.0
    for op, mine in groups:
        weight = 1.0 if op in smallest else FOLLOWS
        total += weight
        for shares in mine:
            for label, share in shares.items():
                pointed[label] += weight * share / len(mine)
    spectrum = ochiai(outcome.results, smallest)
    return {label: x / total * spectrum(label) for label, x in pointed.items()}


def operation(result: UnitResult | Failure) -> str:
    return CALLS.get(result.property_name, result.op)


def grouped(outcome: Outcome) -> list[tuple[str, list[dict[str, float]]]]:
    """Failures by property and operation, and how strongly each points at which clauses: the minimal ones of a group,
    and the raw ones where none was made small."""
    small: dict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
    raw: dict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
    for failure in outcome.failures:
        shares = blamed(failure.violations, failure.suspects, failure.op, minimal=True)
        small[failure.property_name, operation(failure)].append(shares)
    stopped: dict[tuple[str, str], set[str]] = defaultdict(set)
    for r in outcome.results:
        if r.status == "fail":
            key = r.property_name, operation(r)
            raw[key].append(blamed(r.violations, [r.suspects] * len(r.violations), r.op))
            if r.property_name not in ("agreement", "bad input") and any(v.kind in STOPS for v in r.violations):
                stopped[key].update(r.clauses)
    groups = []
    for key, mine in raw.items():
        # A call that gave no answer breaks what its property asks, whatever else it breaks.
        asked = dict.fromkeys(stopped[key], STRONG)
        groups.append((key[1], [asked | shares for shares in small.get(key, mine)]))
    return groups


def blamed(
    violations: Sequence[Violation], suspected: Sequence[frozenset[str]], op: str, *, minimal: bool = False
) -> dict[str, float]:
    """How strongly a failure of `op` points at each clause, from 0 to 1. `minimal`: its case was made small."""
    shares: dict[str, float] = {}
    for n, violation in enumerate(violations):
        mine = suspected[n] if n < len(suspected) else frozenset()
        # What the simplest calls do not have and a minimal case still has is needed for the failure.
        needed = mine - plain(op, violation.output) if minimal and op in load().operations else frozenset()
        for label, share in _of(violation, mine, needed).items():
            # Were the forward wrong, its own cases would fail, and those of the gradient would not count.
            inherited = op.endswith(".vjp") and share <= STRONG and not label.startswith(GRADIENT)
            shares[label] = max(shares.get(label, 0.0), share * (FORWARD if inherited else 1.0))
    return shares


def _of(violation: Violation, suspected: frozenset[str], needed: frozenset[str]) -> dict[str, float]:
    if violation.kind in EXACT:
        return {label: 1.0 / (1 + 0.25 * rank) for rank, label in enumerate(dict.fromkeys(violation.clauses))}
    shares = {}
    error = float("inf") if violation.relative is None else violation.relative
    for label in {*suspected, *violation.clauses[violation.named :]}:
        if label == "NUM-1":
            continue  # every wrong number breaks it
        if label not in PRECISION:
            shares[label] = STRONG if label in needed else SUSPECT
        elif error <= ROUGH:
            shares[label] = STRONG if error <= SLIGHT else SUSPECT
    for rank, label in enumerate(violation.clauses[: violation.named]):
        shares[label] = 1.0 / (1 + 0.25 * rank)
    return shares


@dataclass
class Spectrum:
    """Cases of the failing operations and their parts, by the clauses that they bear on."""

    failed: Counter[str]
    passed: Counter[str]
    failures: int

    def __call__(self, label: str) -> float:
        """Ochiai's coefficient; a clause that no failing case bears on counts as if one did."""
        hit = max(self.failed[label], 1)
        return hit / (max(self.failures, 1) * (hit + self.passed[label])) ** 0.5


def ochiai(results: list[UnitResult], smallest: set[str]) -> Spectrum:
    """The spectrum of a run. `smallest`: the failing operations whose failures count."""
    near = smallest.union(*(parts(op) for op in smallest))
    spectrum = Spectrum(Counter(), Counter(), 0)
    for r in results:
        if operation(r) not in near:
            continue
        if r.status == "fail":
            spectrum.failures += 1
            spectrum.failed.update(r.suspects.union(*(v.clauses for v in r.violations)))
        elif r.status == "pass":
            # A property of its own tells of the clauses that it checks, agreement of all that the call bears on.
            spectrum.passed.update(r.suspects if r.property_name == "agreement" else set(r.clauses))
    return spectrum


def ranked(likely: dict[str, float], labels: Iterable[str]) -> list[str]:
    """`labels`, the likeliest first; equals in the order of the specification."""
    order = list(load().clauses)
    return sorted(labels, key=lambda label: (-round(likely.get(label, 0.0), 6), order.index(label)))


def telling(outcome: Outcome) -> list[Failure]:
    """The failures, those of the smallest failing operations first."""
    smallest = roots(operation(r) for r in outcome.results if r.status == "fail")
    return sorted(outcome.failures, key=lambda failure: operation(failure) not in smallest)


def sorted_clauses(violation: Violation, likely: dict[str, float]) -> list[str]:
    """The clauses of a violation: those with evidence as they come, then the suspects in the order of the whole run."""
    if violation.kind in EXACT:
        return list(violation.clauses)
    named = violation.clauses[: violation.named]
    return [*named, *ranked(likely, (label for label in violation.clauses if label not in named))]
