"""One run of a port's program: lines in, lines out, with a limit on the time that an answer may take."""

from __future__ import annotations

import contextlib
import os
import queue
import subprocess
import threading
from collections import deque

KEPT_LINES = 40
"""Lines of stderr that are shown with a failure."""
LONGEST_LINE = 2**20
"""Characters of an answer; more is garbage."""


class Process:
    """A child process with its stdout as a queue of lines and the end of its stderr at hand."""

    def __init__(self, command: list[str]):
        self.child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
            bufsize=1,
            start_new_session=os.name == "posix",
        )
        self.lines: queue.Queue[str | None] = queue.Queue()
        self.errors: deque[str] = deque(maxlen=KEPT_LINES)
        self.readers = [
            threading.Thread(target=self._read_out, daemon=True),
            threading.Thread(target=self._read_err, daemon=True),
        ]
        for reader in self.readers:
            reader.start()

    def _read_out(self) -> None:
        assert self.child.stdout is not None
        with contextlib.suppress(ValueError, OSError):
            while line := self.child.stdout.readline(LONGEST_LINE):
                self.lines.put(line)
        self.lines.put(None)

    def _read_err(self) -> None:
        assert self.child.stderr is not None
        with contextlib.suppress(ValueError, OSError):
            for line in self.child.stderr:
                self.errors.append(line.rstrip("\n")[:400])

    def send(self, line: str) -> None:
        """Write one line.

        Raises:
            OSError: the program has gone.
        """
        assert self.child.stdin is not None
        self.child.stdin.write(line + "\n")
        self.child.stdin.flush()

    def receive(self, timeout: float) -> str | None:
        """The next line; None where the program closed its output.

        Raises:
            TimeoutError: nothing came in time.
        """
        try:
            return self.lines.get(timeout=timeout)
        except queue.Empty:
            raise TimeoutError from None

    def stderr(self) -> str:
        """The last lines of stderr, as far as they have come."""
        self.readers[1].join(0.2)
        return "\n".join(self.errors)

    def kill(self) -> int | None:
        """End the program, after a moment to end by itself; its exit status."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.child.wait(0.2)
        if self.child.poll() is None:
            with contextlib.suppress(OSError):
                self.child.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.child.wait(5)
        for stream in (self.child.stdin, self.child.stdout, self.child.stderr):
            if stream is not None:
                with contextlib.suppress(OSError, ValueError):
                    stream.close()
        return self.child.returncode
