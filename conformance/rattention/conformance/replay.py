"""A stored case again: the same tensors, the same property, the same verdict."""

from __future__ import annotations

from pathlib import Path

from rattention.conformance import backends, vectors
from rattention.conformance.case import Case
from rattention.conformance.properties import REGISTRY
from rattention.conformance.runner import close
from rattention.conformance.session import Session
from rattention.conformance.strategies import make_plan
from rattention.spec import load


def open_session(target: str) -> Session:
    """A session for single cases.

    Raises:
        CannotRun: there is no such backend, or it does not start.
    """
    backend = backends.resolve(target)
    about = backends.describe(backend, target)
    return Session(backend, about, make_plan("quick", 0, about))


def verdict_lines(session: Session, case: Case, name: str) -> tuple[list[str], bool]:
    """What one case says, line by line, and whether it failed.

    Raises:
        ValueError: the case names a property that this version does not have.
    """
    if case.property_name not in REGISTRY:
        raise ValueError(f"{name}: no property {case.property_name!r} in this version")
    violations, reason = session.verdict(REGISTRY[case.property_name], case)
    if not violations:
        return [f"{'unsupported' if reason else 'pass'}  {name}  {case.op}{f'  ({reason})' if reason else ''}"], False
    lines = [f"FAIL  {name}  {case.op}  property {case.property_name}"]
    for v in violations:
        lines.append(f"  {v.message}")
        labels = case.clauses if v.clauses == ("NUM-1",) and case.clauses else v.clauses
        lines.extend(f"    {label} {load().clauses.get(label, '')}" for label in labels[:6])
    return lines, True


def replay(path: Path, target: str) -> tuple[list[str], bool]:
    """Run the case at `path`."""
    case = vectors.load_case(path)
    session = open_session(target)
    try:
        return verdict_lines(session, case, path.name)
    finally:
        close(session.ctx.backend)


def check_set(path: Path, target: str) -> tuple[list[str], bool]:
    """Run every case of a set, checksums first."""
    session = open_session(target)
    lines: list[str] = []
    failed = total = 0
    try:
        for file, case in vectors.load_set(path):
            found, bad = verdict_lines(session, case, file.name)
            total += 1
            failed += bad
            lines += found
    finally:
        close(session.ctx.backend)
    if not total:
        raise ValueError("no cases there")
    return [*lines, f"{total - failed} of {total} cases conform"], failed > 0
