"""Where a worker process was when it died or hung: its Python stack, kept for the process that started it."""

from __future__ import annotations

import contextlib
import faulthandler
import linecache
import os
import re
import signal
import tempfile
import time
from multiprocessing import reduction
from typing import Any

from rattention.conformance.told import of_the_suite

FRAME = re.compile(r'  File "(.*)", line (\d+) in (.*)')
PATIENCE = 2.0
"""Seconds that a process which hangs has to write its stack; it needs the interpreter for nothing."""


class Stack:
    """A file without a name that two processes have open: nothing is left of it, however they end.

    The parent makes it and hands it to `multiprocessing.Process` among the arguments; the child calls `record`.
    """

    def __init__(self) -> None:
        self.file: Any = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process lives

    def __reduce__(self) -> Any:
        if os.name != "posix":  # no file can be handed over
            return Stack, ()
        return _received, (reduction.DupFd(self.file.fileno()),)

    def record(self) -> None:
        """In the child: a fatal signal writes the stack, and so does `SIGUSR1`, which goes on afterwards."""
        faulthandler.enable(self.file, all_threads=False)
        if hasattr(faulthandler, "register"):
            faulthandler.register(signal.SIGUSR1, self.file, all_threads=False)

    def ask(self, pid: int | None) -> None:
        """In the parent: let a process that hangs write its stack."""
        if pid is None or not hasattr(faulthandler, "register"):
            return
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGUSR1)
            end = time.monotonic() + PATIENCE
            while not self._text() and time.monotonic() < end:
                time.sleep(0.05)

    def trace(self) -> str:
        """In the parent: the frames of the backend as a traceback; "" where none were written."""
        found = self._text()
        frames = [FRAME.fullmatch(line) for line in found.splitlines()]
        calls = [(match[1], int(match[2]), match[3]) for match in frames if match]
        inner = next((n for n, (file, _, _) in enumerate(calls) if of_the_suite(file)), 0)
        if not inner:
            return ""
        lines = ["Traceback (most recent call last):"]
        for file, number, name in reversed(calls[:inner]):
            lines.append(f'  File "{file}", line {number}, in {name}')
            source = linecache.getline(file, number).strip()
            lines += [f"    {source}"] if source else []
        fatal = re.search(r"^Fatal Python error: .*", found, re.MULTILINE)
        return "\n".join(lines + ([fatal[0]] if fatal else []))

    def close(self) -> None:
        self.file.close()

    def _text(self) -> str:
        size = os.fstat(self.file.fileno()).st_size
        return os.pread(self.file.fileno(), size, 0).decode("utf-8", "replace") if hasattr(os, "pread") else ""


def _received(descriptor: Any) -> Stack:
    stack = Stack.__new__(Stack)
    stack.file = os.fdopen(descriptor.detach(), "r+b", buffering=0)
    return stack
