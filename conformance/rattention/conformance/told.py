"""What a backend hands over beside its numbers, put into words: any of it may be of a class that raises when asked."""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from pathlib import Path
from typing import Any

from rattention.spec import load

LONGEST = 2000
"""Characters of a text that a report repeats."""
LONGEST_TRACE = 8000
"""Characters of a traceback; of a longer one both ends are kept."""
SUITE = Path(__file__).parent


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
        return f"{text} ({Path(where.filename).name}, line {where.lineno}, in {where.name})"
    except Exception:  # no traceback at all, or one of sources that cannot be read
        return text


def trace(error: BaseException) -> str:
    """The traceback of an exception that a backend should not have raised: frames of the backend alone, as Python
    prints them, and those of the exceptions that led to it."""
    tb = error.__traceback__
    while tb is not None and of_the_suite(tb.tb_frame.f_code.co_filename):
        tb = tb.tb_next
    try:
        text = "".join(traceback.TracebackException(type(error), error, tb).format()).rstrip()
    except BaseException as other:  # an exception of a class that cannot even be printed has its frames
        if by_user(other):
            raise
        text = "".join(["Traceback (most recent call last):\n", *traceback.format_tb(tb), type(error).__name__])
    if len(text) <= LONGEST_TRACE:
        return text
    half = LONGEST_TRACE // 2
    return f"{text[:half]}\n  [... {len(text) - 2 * half} characters left out ...]\n{text[-half:]}"


def of_the_suite(file: str) -> bool:
    """Whether a frame is of the suite, on the way to the backend. The suite has backends of its own, too."""
    parts = Path(file).parts
    at = len(SUITE.parts)
    return Path(file).is_relative_to(SUITE) and parts[at] in ("context.py", "properties")


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
