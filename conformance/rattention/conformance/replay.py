"""A stored case again: the same tensors, the same property, the same verdict, in a process of its own."""

from __future__ import annotations

import os
import sys
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from rattention.conformance import backends, vectors
from rattention.conformance.case import Case
from rattention.conformance.diagnose import diagnose
from rattention.conformance.judge import Violation
from rattention.conformance.properties import REGISTRY
from rattention.conformance.session import Session
from rattention.conformance.shown import tensor_lines
from rattention.conformance.stacks import Stack
from rattention.conformance.strategies import make_plan
from rattention.conformance.strategies.callline import call_line
from rattention.conformance.strategies.recover import recipe_of
from rattention.conformance.told import told
from rattention.conformance.vectors import CaseError
from rattention.conformance.workers import Worker, end_with_parent, taken_down
from rattention.spec import load

NOT_JUDGED = {"unsupported": "unsupported", "runner": "decided by the runner"}
"""Verdicts that are neither a pass nor a failure, and how the last line counts them."""


def open_session(target: str, seconds: float | None = None) -> Session:
    """A session for single cases. `seconds`: how long a port behind the wire may take for an answer.

    Raises:
        CannotRun: there is no such backend, or it does not start.
    """
    backend = backends.resolve(target, seconds)
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
    runners = session.runners_own(case)
    violations, reason = ([], runners) if runners else session.verdict(REGISTRY[case.property_name], case)
    if not violations:
        verdict = f"{'runner' if runners else 'unsupported' if reason else 'pass'}  {name}  {case.op}{judge}"
        return [f"{verdict}{f'  ({reason})' if reason else ''}"], False
    if whole:
        diagnose(session.ctx, case, recipe_of(case), violations, case)
    return failure_lines(session, case, name, violations, whole=whole), True


def failure_lines(session: Session, case: Case, name: str, violations: list[Violation], *, whole: bool) -> list[str]:
    """What a failed case says."""
    label = "CRASH" if any(v.crash for v in violations) else "FAIL"
    lines = [f"{label}  {name}  {case.op}  property {case.property_name}"]
    lines += [f"case: {call_line(case)}"] if whole else []
    for v in violations:
        lines.append(f"- {v.message}{f'  (looks like: {v.guess})' if v.guess else ''}")
        lines.extend(f"    {line}" for line in v.trace.splitlines())
        labels = case.clauses if v.clauses == ("NUM-1",) and case.clauses else v.clauses
        lines.extend(f"    {label} {load().clauses.get(label, '')}" for label in labels[:6])
    return lines + (tensor_lines(session, case, violations) if whole else [])


Answer = tuple[list[str], bool]
"""What a case says, line by line, and whether it failed."""


def judged(
    target: str, files: Sequence[Path], *, whole: bool = False, seconds: float | None = None
) -> Iterator[Answer]:
    """The answer of each file, and a note where a port did not end as it should. `seconds`: for one answer.

    Raises:
        CannotRun: there is no such backend, or it does not start.
    """
    # A port behind the wire has a process of its own.
    yield from (_here if target.startswith("exec:") else _apart)(target, files, whole, seconds)


def _here(target: str, files: Sequence[Path], whole: bool, seconds: float | None) -> Iterator[Answer]:
    session = open_session(target, seconds)
    try:
        for file in files:
            yield verdict_lines(session, vectors.load_valid(file), file.name, whole=whole)
    except KeyboardInterrupt:
        backends.abandon(session.ctx.backend)
        raise
    finally:
        fault = backends.close(session.ctx.backend)
    if fault:  # no verdict on the case, yet it is not passed over
        yield [f"note: {fault} (WIRE-4)"], False


def _apart(target: str, files: Sequence[Path], whole: bool, seconds: float | None) -> Iterator[Answer]:
    """In a process apart from this one, whose end would pass for a verdict. One that dies costs its case alone."""
    rest = deque(files)
    while rest:
        worker = Worker(_live, target, list(rest), whole)
        ready = False
        try:
            while rest:
                if ready and not worker.pipe.poll(seconds):
                    raise TimeoutError
                kind, answer = worker.pipe.recv()
                ready = True
                if kind == "cannot":
                    raise backends.CannotRun(answer)
                if kind == "done":
                    rest.popleft()
                    yield answer
        except (EOFError, OSError) as error:
            why = worker.silent(seconds or 0) if isinstance(error, TimeoutError) else worker.died()
            if not ready:
                raise backends.CannotRun(f"{target} does not start: {why}") from None
            case, name = vectors.load_valid(rest[0]), rest.popleft().name
            lost = taken_down(case.op, why, worker.stack.trace())
            yield failure_lines(open_session("numpy"), case, name, [lost], whole=whole), True
        finally:
            worker.kill()


def _live(pipe: Connection, stack: Stack, target: str, files: list[Path], whole: bool) -> None:
    """The life of the process: say that it is ready, then the answer of each file."""
    end_with_parent()
    stack.record()
    if os.isatty(0):  # for a `breakpoint()` in the backend: multiprocessing has closed stdin
        sys.stdin = open(0, closefd=False)  # noqa: SIM115 - as long as the process lives
    try:
        session = open_session(target)
        pipe.send(("ready", None))
        for file in files:
            pipe.send(("done", verdict_lines(session, vectors.load_valid(file), file.name, whole=whole)))
    except (backends.CannotRun, CaseError) as reason:
        pipe.send(("cannot", str(reason)))
    except KeyboardInterrupt:  # the backend's own, for Ctrl-C does not come here
        os._exit(1)
    except BaseException as error:  # SystemExit included: its status would be lost with this process
        traceback.print_exc()
        pipe.send(("cannot", f"the suite itself failed: {type(error).__name__}: {told(error)}"))


def replay(path: Path, target: str, seconds: float | None = None) -> tuple[list[str], bool]:
    """Run the case at `path`. `seconds`: as in `open_session`.

    Raises:
        CannotRun: there is no such backend, or it does not start.
        CaseError: the file cannot be used.
    """
    check_files([path])
    (case, *notes) = judged(target, [path], whole=True, seconds=seconds)
    return [*case[0], *(line for lines, _ in notes for line in lines)], case[1]


def check_set(path: Path, target: str, say: Callable[[list[str]], None], seconds: float | None = None) -> bool:
    """Run every case of a set, checksums first; whether one failed. `say` gets the lines of each case as they come.

    seconds: as in `open_session`.

    Raises:
        CannotRun: there is no such backend, or it does not start.
        CaseError: the manifest or a file of the set cannot be used; then no case was run.
    """
    files = vectors.list_set(path)
    check_files(files)
    failed = 0
    others: Counter[str] = Counter()
    for lines, bad in judged(target, files, seconds=seconds):
        failed += bad
        others[lines[0].split()[0]] += 1
        say(lines)
    notes = [f"{others[kind]} of them {text}" for kind, text in NOT_JUDGED.items() if others[kind]]
    say([", ".join([f"{len(files) - failed} of {len(files)} cases conform", *notes])])
    return failed > 0
