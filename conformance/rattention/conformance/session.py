"""One backend under one plan in this process: units of work in, results out."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rattention.conformance import backends, vectors
from rattention.conformance.case import Case
from rattention.conformance.context import Broken, Context, Moot, Refused, storage_of
from rattention.conformance.diagnose import diagnose
from rattention.conformance.judge import Violation
from rattention.conformance.oracle import Oracle
from rattention.conformance.properties import REGISTRY, Property, make_case
from rattention.conformance.shrink import shrink
from rattention.conformance.strategies import Plan, Recipe
from rattention.conformance.strategies.callline import call_line
from rattention.spec import SpecError, load


@dataclass
class Unit:
    """One case to run: a property and a recipe."""

    index: int
    property_name: str
    recipe: Recipe


@dataclass
class UnitResult:
    """What became of a unit. status: pass, fail, unsupported, skip, or runner: see `Session.runners_own`.

    clauses: those that the case could have broken. always: it ran though --select does not name it.
    """

    index: int
    property_name: str
    op: str
    dtype: str
    status: str
    clauses: tuple[str, ...] = ()
    violations: list[Violation] = field(default_factory=list)
    reason: str = ""
    seconds: float = 0.0
    calls: int = 0
    shares: dict[tuple[str, str, str], float] = field(default_factory=dict)
    always: bool = False

    @property
    def crashed(self) -> bool:
        return any(v.crash for v in self.violations)


@dataclass
class Failure:
    """A failure made small: the case file's bytes, its call in one line and what is wrong.

    found: the storage dtype of the case that failed first, where shrinking has gone over to another; else empty.
    """

    index: int
    property_name: str
    op: str
    dtype: str
    call: str
    violations: list[Violation]
    case: bytes
    note: str = ""
    found: str = ""


def place_of(case: Case) -> tuple[str, str]:
    """Operation and storage dtype that reports file a case under; what a backend says of itself belongs to no one."""
    if case.params.get("what") == "describe":
        return "describe()", "any"
    return case.op, storage_of(case) if case.op in load().operations else "any"


class Session:
    """Runs units against one backend. Not shared between processes: each worker has its own."""

    def __init__(
        self,
        backend: Any,
        describe: Mapping[str, Any],
        plan: Plan,
        select: str = "",
        oracle: Oracle | None = None,
    ):
        self.plan = plan
        self.select = select
        self.ctx = Context(backend, describe, plan, oracle)
        self.moot = False

    def run(self, unit: Unit) -> UnitResult:
        """One unit. A fault of the suite itself is not caught: it is no verdict on the backend."""
        begin = time.perf_counter()
        prop = REGISTRY[unit.property_name]
        case = make_case(prop, self.plan, unit.recipe)
        result = UnitResult(unit.index, unit.property_name, unit.recipe.op, unit.recipe.dtype, "skip")
        if case is None:
            return result
        if not self.selected(prop, case) or not self.concerns(case):
            return result
        result.op, result.dtype = place_of(case)
        result.reason = self.runners_own(case)
        if result.reason:
            result.status = "runner"
            return result
        calls = self.ctx.calls
        self.ctx.held = set()
        result.always = not self.named(prop, case)
        result.violations, result.reason = self.verdict(prop, case)
        if self.moot and not result.violations:
            return result
        result.status = "fail" if result.violations else "unsupported" if result.reason else "pass"
        held = self.ctx.held | set(case.clauses) | set(backends.wire_clauses(self.ctx.backend))
        held -= set(backends.held(self.ctx.backend))
        result.clauses = tuple(label for label in load().clauses if label in held)
        result.calls = self.ctx.calls - calls
        result.shares, self.ctx.shares = self.ctx.shares, {}
        result.seconds = time.perf_counter() - begin
        return result

    def selected(self, prop: Property, case: Case) -> bool:
        """Whether --select keeps the case: a clause, the letters of a group of clauses, an operation, a property."""
        # What a backend says of itself decides which cases there are, whatever is selected.
        return case.params.get("what") == "describe" or self.named(prop, case)

    def named(self, prop: Property, case: Case) -> bool:
        """Whether --select names the case, or nothing is selected."""
        wanted = self.select
        if not wanted:
            return True
        clauses = (*case.clauses, *backends.wire_clauses(self.ctx.backend))
        clauses += ("BCK-4",) if self.ctx.describe.get("kernels") else ()
        names = {case.op, case.base_op, prop.name, case.property_name, *clauses}
        return wanted in names or any(label.startswith(wanted + "-") for label in clauses)

    def concerns(self, case: Case) -> bool:
        """Whether the case is about something that the backend has: one in this process has no wire."""
        judged = _judge_of(case).clauses
        return backends.is_wire_port(self.ctx.backend) or not all(label.startswith("WIRE-") for label in judged)

    def runners_own(self, case: Case) -> str:
        """Why the runner itself decides the case, or "" where the backend does.

        The runner adapts a port behind the wire to this contract, and keeps some of its clauses for it (chapter 12). A
        property of these clauses alone says nothing about the port.
        """
        if set(_judge_of(case).clauses) <= set(backends.held(self.ctx.backend)):
            return f"{_judge_of(case).name}: the runner decides it, and the port never sees it"
        return ""

    def verdict(self, prop: Property, case: Case) -> tuple[list[Violation], str]:
        """Violations, and the reason where the backend refused with every right to it. `moot` says of the last one
        whether the case asked for nothing."""
        ctx, self.moot = self.ctx, False
        ctx.violations = []
        found: list[Violation] = []
        reason = ""
        try:
            with np.errstate(all="ignore"):
                found = prop.check(ctx, case)
        except Refused as refusal:
            reason = str(refusal)
        except Moot:
            self.moot = True
        except Broken:
            pass
        found, ctx.violations = [*ctx.violations, *found], []
        return found, reason

    def minimise(self, unit: Unit) -> Failure | None:
        """Shrink a failing unit, name the likeliest fault, and write the case with the reference's answer.

        None where the failure does not come back: the backend is not deterministic, which NUM-4 reports.
        """
        prop = REGISTRY[unit.property_name]
        original = make_case(prop, self.plan, unit.recipe)
        if original is None:
            return None
        before, _ = self.verdict(prop, original)
        if not before:
            return None
        marks = {(v.kind, v.output) for v in before}

        def fails(recipe: Recipe) -> bool:
            case = self._legal(prop, recipe)
            return (
                case is not None
                and self._promised(case)
                and any((v.kind, v.output) in marks for v in self.verdict(prop, case)[0])
            )

        attempts = {"direct": 60, "compiled": 10, "interpreted": 6}[self.plan.cost]
        recipe = shrink(unit.recipe, fails, attempts) if prop.shrinks else unit.recipe
        case = self._legal(prop, recipe) or original
        violations, _ = self.verdict(prop, case)
        violations = violations or before
        diagnose(self.ctx, case, recipe, violations, before)
        self._answer(case, violations)
        op, dtype = place_of(case)
        found = place_of(original)[1]
        return Failure(
            unit.index,
            unit.property_name,
            op,
            dtype,
            call_line(case, recipe) if op == case.op else op,
            violations,
            vectors.case_bytes(case),
            case.note,
            found if found != dtype else "",
        )

    def _legal(self, prop: Property, recipe: Recipe) -> Case | None:
        """The case of a recipe, or None where shrinking has made one that cannot exist."""
        if recipe.has("rope") and recipe.D % 2:
            return None
        try:
            return make_case(prop, self.plan, recipe)
        except (ValueError, IndexError, ZeroDivisionError):
            return None

    def _promised(self, case: Case) -> bool:
        """Whether the description promises the call: what a backend does beyond its limits is another question."""
        try:
            return not self.ctx.entitled(case.op, case.tensors, case.attrs)
        except SpecError:  # properties of refusals alone have such cases, and they do not shrink
            return False

    def _answer(self, case: Case, violations: list[Violation]) -> None:
        """Store value and budget beside the inputs, where the case is a valid call; what was stored stays."""
        case.clauses = tuple(dict.fromkeys(label for v in violations for label in v.clauses)) or case.clauses
        try:
            bounds = self.ctx.bounds(case.op, case.tensors, case.attrs)
        except (ValueError, KeyError, IndexError):
            return
        case.answer(bounds)


def _judge_of(case: Case) -> Property:
    """The property whose verdict the case gets; a stored case names one."""
    return REGISTRY[case.property_name]
