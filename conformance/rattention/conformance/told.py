"""What a backend hands over beside its numbers, put into words: any of it may be of a class that raises when asked."""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from typing import Any

from rattention.spec import load

LONGEST = 2000
"""Characters of a text that a report repeats."""


def told(error: Any) -> str:
    """`str(error)`, or what kept it from saying anything."""
    return _safe(str, error)


def shown(thing: Any) -> str:
    """`repr(thing)`, likewise."""
    return _safe(repr, thing)


def _safe(say: Any, thing: Any) -> str:
    try:
        # A plain str, and not a subclass with methods of its own, which might not even travel between processes.
        text = str.__str__(say(thing))
    except BaseException as other:
        if by_user(other):
            raise
        return f"({type(thing).__name__}, whose {say.__name__}() raises {type(other).__name__})"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def reason_of(refusal: BaseException) -> str:
    """The reason that an `Unsupported` gives; "" for none."""
    try:
        return told(getattr(refusal, "reason", refusal)).strip()
    except BaseException as other:  # an attribute that is computed may fail in any way
        if by_user(other):
            raise
        return told(refusal).strip()


def crash(error: BaseException) -> str:
    """Class, text and place of an exception that a backend should not have raised."""
    text = f"{type(error).__name__}: {told(error)}"
    try:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{text} ({where.name}, line {where.lineno})"
    except Exception:  # no traceback at all, or one of sources that cannot be read
        return text


def clause_of(error: BaseException) -> tuple[str, ...]:
    """The clause that a `SpecError` names, if the specification has it."""
    found = getattr(error, "clause", None)
    return (found,) if type(found) is str and found in load().clauses else ()


def by_user(error: BaseException) -> bool:
    """Whether an exception is Ctrl-C. In a worker, which does not hear Ctrl-C, it is the backend's own."""
    if not isinstance(error, KeyboardInterrupt):
        return False
    return multiprocessing.parent_process() is None or not hasattr(signal, "pthread_sigmask")


def ending(status: int | None) -> str:
    """How a process ended, for "the port ...": a negative status is the signal that ended it."""
    if status is None or status >= 0:
        return f"ended with exit status {status}"
    try:
        return f"was ended by the signal {signal.Signals(-status).name}"
    except ValueError:
        return f"was ended by the signal {-status}"
