"""A whole run: plan the units, spread them over worker processes, make failures small, gather one outcome."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rattention.conformance import backends, interrupts, vectors
from rattention.conformance.judge import Violation
from rattention.conformance.oracle import Oracle
from rattention.conformance.parts import CALLS, roots
from rattention.conformance.properties import REGISTRY, make_case
from rattention.conformance.session import Failure, Session, Unit, UnitResult
from rattention.conformance.strategies import Plan, make_plan
from rattention.conformance.strategies.callline import call_line

if TYPE_CHECKING:
    from rattention.conformance.workers import Pool

Progress = Callable[[int, int, int], None]
"""Called with (units done, units in all, failures so far): before the first unit, and after each."""

INTERRUPTED = "interrupted"
FAILURES_PER_KIND = 2
FAILURES_SHRUNK = 24
FAILURES_INHERITED = 8
"""Those of them that may be of operations whose parts failed too."""
WHOLE = ("agreement", "bad input", "description", "stored vectors")
"""Properties that smoke runs in full on interpreted backends too; of the others it takes FEW cases."""
FEW = 4


@dataclass(frozen=True)
class Settings:
    """What to run. `vectors` are files or folders of cases run beside the properties; `workers` 0 stays in process.

    `timeout`: seconds that a port behind the wire may take for an answer, or another backend for a case in a worker
    process, before it counts as hung; None for the defaults of `wire.client` and `workers`.
    """

    profile: str = "quick"
    seed: int = 0
    select: str = ""
    vectors: tuple[str, ...] = ()
    workers: int = 0
    timeout: float | None = None
    stop_at_first: bool = False


@dataclass
class Outcome:
    """What a run found. `results` are in the order of the plan, whoever ran them.

    `stopped` says why a run ended before its end: it was interrupted, or the backend no longer started. `held`: clauses
    that the runner keeps for a port behind the wire.
    """

    backend: str
    describe: Mapping[str, Any]
    settings: Settings
    results: list[UnitResult] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    seconds: float = 0.0
    planned: int = 0
    stopped: str = ""
    held: tuple[str, ...] = ()

    @property
    def left_out(self) -> int:
        """Cases that were not run: a backend that takes process after process down is not asked for all of them."""
        return self.planned - len(self.results)

    @property
    def failed(self) -> bool:
        return any(r.status == "fail" for r in self.results)

    @property
    def conforming(self) -> bool:
        """No case failed, at least one passed, and the run came to its end."""
        return (
            not self.failed and not self.unfinished and any(r.status == "pass" and not r.always for r in self.results)
        )

    @property
    def empty(self) -> bool:
        """Whether --select named no case that could be run, and nothing failed all the same."""
        return not self.failed and all(r.status in ("skip", "runner") or r.always for r in self.results)

    @property
    def unfinished(self) -> bool:
        """No verdict: the run was stopped before every case was run, and no case had failed."""
        return bool(self.stopped) and self.left_out > 0 and not self.failed

    def violations(self) -> list[Violation]:
        """Every violation, the diagnosed ones of minimal cases in place of the raw ones."""
        diagnosed = {f.index: f.violations for f in self.failures}
        return [v for r in self.results for v in diagnosed.get(r.index, r.violations)]


def plan_units(plan: Plan, settings: Settings) -> list[Unit]:
    """Every unit of a run in its fixed order: the same plan and settings give the same list."""
    units: list[Unit] = []
    for name, prop in REGISTRY.items():
        recipes = list(prop.draw(plan))
        if plan.cost == "interpreted" and plan.profile == "smoke" and name not in WHOLE:
            # Every call costs a second or so: a few operations per property, others with another seed.
            step = -(-len(recipes) // FEW) or 1
            recipes = recipes[plan.seed % step :: step]
        units += [Unit(len(units) + i, name, recipe) for i, recipe in enumerate(recipes)]
    return units


def conform(
    target: str,
    settings: Settings,
    *,
    backend: Any = None,
    progress: Progress | None = None,
    oracle: Oracle | None = None,
) -> Outcome:
    """Run the suite.

    Args:
        target: what `backends.resolve` takes; with `backend` given, a name for reports.
        backend: an object to test in this process; then `settings.workers` does not matter.
        oracle: shared by several runs in one process, so that they share the reference's answers.

    Raises:
        CannotRun: there is no such backend, or it does not start.
    """
    from rattention.conformance.workers import Pool

    begin = time.perf_counter()
    local = backend is not None
    backend = backend if local else backends.resolve(target, settings.timeout)
    about = backends.describe(backend, target)
    plan = make_plan(settings.profile, settings.seed, about, settings.vectors)
    units = plan_units(plan, settings)
    outcome = Outcome(target, about, settings, planned=len(units), held=backends.held(backend))
    if progress:
        progress(0, len(units), 0)
    if local or settings.workers <= 0:
        session = Session(backend, about, plan, settings.select, oracle)
        _in_process(session, units, outcome, settings, progress)
        endings = [] if local else [backends.close(backend)]
    else:
        endings = [backends.close(backend)]
        endings += _in_workers(
            Pool(target, plan, settings, wire=backends.is_wire_port(backend)), units, outcome, progress
        )
    _ended(outcome, endings)
    _keep_raw(plan, units, outcome, worth_shrinking(outcome.results))
    outcome.failures.sort(key=lambda f: f.index)
    outcome.seconds = time.perf_counter() - begin
    return outcome


def _ended(outcome: Outcome, endings: list[str]) -> None:
    """Judge how the processes of a port ended after all their calls.

    The property `stop` has looked at one process after a few calls. What others did wrong at their end is a failure of
    its case, once, however many they were.
    """
    fault = next(filter(None, endings), "")
    for result in outcome.results:
        if fault and result.property_name == "stop" and result.status == "pass":
            result.status = "fail"
            result.violations = [Violation(("WIRE-4",), f"at the end of the run: {fault}", "stop")]


def _in_workers(pool: Pool, units: list[Unit], outcome: Outcome, progress: Progress | None) -> list[str]:
    """Fill the outcome; what was wrong with how processes of a port ended."""
    try:
        with pool:
            pool.run(units, progress)
            pool.minimise([units[i] for i in worth_shrinking(_found(pool, units))])
    except (KeyboardInterrupt, backends.CannotRun) as reason:
        if not _judged(pool.results.values()):
            raise  # there is nothing to keep
        if isinstance(reason, KeyboardInterrupt):
            interrupts.hold()
        outcome.stopped = str(reason) or INTERRUPTED
    outcome.results, outcome.failures = _found(pool, units), pool.failures
    return pool.endings


def _judged(results: Iterable[UnitResult]) -> bool:
    """Whether the backend had a say in any of them."""
    return any(r.status not in ("skip", "runner") for r in results)


def _found(pool: Pool, units: list[Unit]) -> list[UnitResult]:
    return [pool.results[unit.index] for unit in units if unit.index in pool.results]


def _in_process(
    session: Session, units: list[Unit], outcome: Outcome, settings: Settings, progress: Progress | None
) -> None:
    failed = 0
    try:
        for done, unit in enumerate(units):
            result = session.run(unit)
            outcome.results.append(result)
            failed += result.status == "fail"
            if progress:
                progress(done + 1, len(units), failed)
            if failed and settings.stop_at_first:
                break
        for index in worth_shrinking(outcome.results):
            failure = session.minimise(units[index])
            if failure:
                outcome.failures.append(failure)
    except KeyboardInterrupt:
        if not _judged(outcome.results):
            raise
        interrupts.hold()
        outcome.stopped = INTERRUPTED


def _keep_raw(plan: Plan, units: list[Unit], outcome: Outcome, chosen: list[int]) -> None:
    """Failures that did not come back, or took the process down, keep the case that they were found with."""
    small = {f.index for f in outcome.failures}
    by_index = {r.index: r for r in outcome.results}
    for index in chosen:
        if index in small:
            continue
        unit, result = units[index], by_index[index]
        case = make_case(REGISTRY[unit.property_name], plan, unit.recipe)
        if case is not None:
            about = call_line(case, unit.recipe)
            data = vectors.case_bytes(case)
            outcome.failures.append(
                Failure(index, unit.property_name, result.op, result.dtype, about, result.violations, data, case.note)
            )


def worth_shrinking(results: list[UnitResult]) -> list[int]:
    """Indices of the failures that are made small: a few per property and operation, the quickest first.

    Those of the smallest failing operations come before those that inherit their fault, of which few are taken. Crashes
    count apart: behind a few wrong numbers none of them must go without its traceback.
    """
    failed = [r for r in results if r.status == "fail"]
    smallest = roots(CALLS.get(r.property_name, r.op) for r in failed)
    seen: Counter[tuple[str, str, bool]] = Counter()
    chosen: dict[bool, list[int]] = {True: [], False: []}
    for r in sorted(failed, key=lambda r: (r.seconds > 0.5, r.index)):
        op = CALLS.get(r.property_name, r.op)
        mine = chosen[op in smallest]
        key = (r.property_name, op, r.crashed)
        if seen[key] < FAILURES_PER_KIND:
            seen[key] += 1
            mine.append(r.index)
    return [*chosen[True], *chosen[False][:FAILURES_INHERITED]][:FAILURES_SHRUNK]
