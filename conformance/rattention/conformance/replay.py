"""A stored case again: the same tensors, the same property, the same verdict."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from rattention.conformance import backends, vectors
from rattention.conformance.case import Case
from rattention.conformance.diagnose import diagnose
from rattention.conformance.properties import REGISTRY
from rattention.conformance.session import Session
from rattention.conformance.shown import tensor_lines
from rattention.conformance.strategies import make_plan
from rattention.conformance.strategies.callline import call_line
from rattention.conformance.strategies.recover import recipe_of
from rattention.conformance.vectors import CaseError
from rattention.spec import load


def open_session(target: str) -> Session:
    """A session for single cases.

    Raises:
        CannotRun: there is no such backend, or it does not start.
    """
    backend = backends.resolve(target)
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


def verdict_lines(session: Session, case: Case, name: str, *, whole: bool = False) -> tuple[list[str], bool]:
    """What one case says, line by line, and whether it failed. `whole`: with the guess, and with its tensors."""
    judge = "" if case.property_name == "agreement" else f"  property {case.property_name}"
    violations, reason = session.verdict(REGISTRY[case.property_name], case)
    if not violations:
        verdict = f"{'unsupported' if reason else 'pass'}  {name}  {case.op}{judge}"
        return [f"{verdict}{f'  ({reason})' if reason else ''}"], False
    crashed = any(v.crash for v in violations)
    lines = [f"{'CRASH' if crashed else 'FAIL'}  {name}  {case.op}  property {case.property_name}"]
    if whole:
        lines.append(f"case: {call_line(case)}")
        diagnose(session.ctx, case, recipe_of(case), violations, violations)
    for v in violations:
        lines.append(f"- {v.message}{f'  (looks like: {v.guess})' if v.guess else ''}")
        lines.extend(f"    {line}" for line in v.trace.splitlines())
        labels = case.clauses if v.clauses == ("NUM-1",) and case.clauses else v.clauses
        lines.extend(f"    {label} {load().clauses.get(label, '')}" for label in labels[:6])
    return lines + (tensor_lines(session, case, violations) if whole else []), True


def replay(path: Path, target: str) -> tuple[list[str], bool]:
    """Run the case at `path`.

    Raises:
        CannotRun: there is no such backend, or it does not start.
        CaseError: the file cannot be used.
    """
    check_files([path])
    case = vectors.load_valid(path)
    session = open_session(target)
    try:
        return verdict_lines(session, case, path.name, whole=True)
    finally:
        backends.close(session.ctx.backend)


def check_set(path: Path, target: str, told: Callable[[list[str]], None]) -> bool:
    """Run every case of a set, checksums first; whether one failed. `told` gets the lines of each case as they come.

    Raises:
        CannotRun: there is no such backend, or it does not start.
        CaseError: the manifest or a file of the set cannot be used; then no case was run.
    """
    files = vectors.list_set(path)
    check_files(files)
    session = open_session(target)
    failed = refused = 0
    try:
        for file in files:
            lines, bad = verdict_lines(session, vectors.load_valid(file), file.name)
            failed += bad
            refused += lines[0].startswith("unsupported")
            told(lines)
    finally:
        backends.close(session.ctx.backend)
    told(
        [f"{len(files) - failed} of {len(files)} cases conform{f', {refused} of them unsupported' if refused else ''}"]
    )
    return failed > 0
