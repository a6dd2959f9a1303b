"""A stored case again: the same tensors, the same property, the same verdict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from rattention.conformance import backends, vectors
from rattention.conformance.case import Case
from rattention.conformance.properties import REGISTRY
from rattention.conformance.session import Session
from rattention.conformance.strategies import make_plan
from rattention.conformance.vectors import CaseError
from rattention.spec import load

NOT_JUDGED = {"unsupported": "unsupported", "runner": "decided by the runner"}
"""Verdicts that are neither a pass nor a failure, and how the last line counts them."""


def open_session(target: str, seconds: float | None = None) -> Session:
    """A session for single cases. `seconds`: how long a port behind the wire may take for an answer.

    Raises:
        CannotRun: there is no such backend, it does not start, or its time cannot be limited.
    """
    backend = backends.resolve(target, seconds)
    if seconds is not None and not backends.is_wire_port(backend):
        raise backends.CannotRun(f"--timeout: {target} runs in this process, where no call can be ended; leave it out")
    about = backends.describe(backend, target)
    return Session(backend, about, make_plan("quick", 0, about))


def check_files(files: Iterable[Path]) -> None:
    """Read every case before any backend is judged on one: a backend must not fail because a file is wrong.

    A case of `agreement` is right or wrong by the answer that it stores. Any other property has `params`, which only
    the property itself understands; so the reference must pass such a case.

    Raises:
        CaseError: the first file that cannot be used.
    """
    reference: Session | None = None
    for file in files:
        case = vectors.load_valid(file)
        if case.property_name not in REGISTRY:
            raise CaseError(file, f"no property {case.property_name!r} in this version")
        if case.property_name in ("agreement", "stored vectors"):
            continue
        reference = reference or open_session("numpy")
        try:
            violations, _ = reference.verdict(REGISTRY[case.property_name], case)
        except Exception as error:
            reason = f"the property {case.property_name!r} cannot judge it: {type(error).__name__}: {error}"
            raise CaseError(file, reason) from error
        if violations:
            reason = f"the reference itself does not pass the property {case.property_name!r}: {violations[0].message}"
            raise CaseError(file, reason)


def verdict_lines(session: Session, case: Case, name: str) -> tuple[list[str], bool]:
    """What one case says, line by line, and whether it failed."""
    judge = "" if case.property_name == "agreement" else f"  property {case.property_name}"
    runners = session.runners_own(case)
    violations, reason = ([], runners) if runners else session.verdict(REGISTRY[case.property_name], case)
    if not violations:
        verdict = f"{'runner' if runners else 'unsupported' if reason else 'pass'}  {name}  {case.op}{judge}"
        return [f"{verdict}{f'  ({reason})' if reason else ''}"], False
    lines = [f"FAIL  {name}  {case.op}  property {case.property_name}"]
    for v in violations:
        lines.append(f"  {v.message}")
        labels = case.clauses if v.clauses == ("NUM-1",) and case.clauses else v.clauses
        lines.extend(f"    {label} {load().clauses.get(label, '')}" for label in labels[:6])
    return lines, True


def _note(fault: str) -> list[str]:
    """How a port ended is no verdict on the case, unless it is one of `stop`; yet it is not passed over."""
    return [f"note: {fault} (WIRE-4)"] if fault else []


def replay(path: Path, target: str, seconds: float | None = None) -> tuple[list[str], bool]:
    """Run the case at `path`. `seconds`: as in `open_session`.

    Raises:
        CannotRun: there is no such backend, or it does not start.
        CaseError: the file cannot be used.
    """
    check_files([path])
    case = vectors.load_valid(path)
    session = open_session(target, seconds)
    try:
        lines, failed = verdict_lines(session, case, path.name)
    finally:
        fault = backends.close(session.ctx.backend)
    return [*lines, *_note(fault)], failed


def check_set(path: Path, target: str, told: Callable[[list[str]], None], seconds: float | None = None) -> bool:
    """Run every case of a set, checksums first; whether one failed. `told` gets the lines of each case as they come.

    seconds: as in `open_session`.

    Raises:
        CannotRun: there is no such backend, or it does not start.
        CaseError: the manifest or a file of the set cannot be used; then no case was run.
    """
    files = vectors.list_set(path)
    check_files(files)
    session = open_session(target, seconds)
    failed = 0
    others: Counter[str] = Counter()
    try:
        for file in files:
            lines, bad = verdict_lines(session, vectors.load_valid(file), file.name)
            failed += bad
            others[lines[0].split()[0]] += 1
            told(lines)
    finally:
        fault = backends.close(session.ctx.backend)
    told(_note(fault))
    notes = [f"{others[kind]} of them {text}" for kind, text in NOT_JUDGED.items() if others[kind]]
    told([", ".join([f"{len(files) - failed} of {len(files)} cases conform", *notes])])
    return failed > 0
