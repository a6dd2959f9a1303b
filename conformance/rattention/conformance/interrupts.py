"""Ctrl-C, from the first import to the end of the process: one line or a report, never a traceback."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator

_commands = 0
"""Commands of this process that are at work and have set Ctrl-C themselves, which is one or none."""
SAVING = b"rattention: writing what was found; Ctrl-C again ends this at once\n"


def stop_quietly(*_: object) -> None:
    """End here and now. There is nothing to keep before a command begins and after it has ended.

    An exception would not do: it would come up inside some import, and a few packages swallow it there.
    """
    os.write(2, b"rattention: interrupted\n")
    os._exit(2)


def listen() -> None:
    """Called before the imports that take time. A Ctrl-C that the caller ignores stays ignored."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, stop_quietly)


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """The time of a command, in which Ctrl-C is a KeyboardInterrupt that the command answers."""
    if signal.getsignal(signal.SIGINT) is not stop_quietly:  # a test or another program calls the command
        yield
        return
    global _commands
    _commands += 1
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        _commands -= 1
        signal.signal(signal.SIGINT, stop_quietly)


def hold() -> None:
    """Called after a KeyboardInterrupt that ends a run: an impatient second one must not cost the report."""
    if not _commands:  # whoever calls the suite as a library has Ctrl-C in its own hands
        return

    def wait(*_: object) -> None:
        os.write(2, SAVING)
        signal.signal(signal.SIGINT, stop_quietly)

    signal.signal(signal.SIGINT, wait)
