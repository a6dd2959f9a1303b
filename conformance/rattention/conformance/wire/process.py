"""One run of a port's program: lines in, lines out, with a limit on the time that an answer may take."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import threading
from collections import deque

KEPT_LINES = 40
"""Lines of stderr that are shown with a failure."""
LONGEST_LINE = 2**20
"""Bytes of an answer; more is garbage."""


class Process:
    """A child process with its stdout as a queue of lines and the end of its stderr at hand.

    `rest`: bytes of stdout behind the last newline, which are no line yet.
    """

    def __init__(self, command: list[str]):
        self.child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=os.name == "posix",
        )
        self.lines: queue.Queue[bytes | None] = queue.Queue()
        self.rest = b""
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
            while chunk := self.child.stdout.read1(2**16):  # type: ignore[attr-defined]  (buffered, which IO does not say)
                *lines, rest = (self.rest + chunk).split(b"\n")
                if len(rest) > LONGEST_LINE:
                    lines, rest = [*lines, rest], b""
                self.rest = rest
                for line in lines:
                    self.lines.put(line)
        self.lines.put(None)

    def _read_err(self) -> None:
        assert self.child.stderr is not None
        with contextlib.suppress(ValueError, OSError):
            for line in self.child.stderr:
                self.errors.append(line.decode("utf-8", "replace").rstrip("\r\n")[:400])

    def send(self, line: str) -> None:
        """Write one line.

        Raises:
            OSError: the program has gone.
        """
        assert self.child.stdin is not None
        self.child.stdin.write(line.encode("utf-8") + b"\n")
        self.child.stdin.flush()

    def receive(self, timeout: float) -> bytes | None:
        """The next line without its newline; None where the program closed its output.

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

    def wait(self, seconds: float) -> int | None:
        """The exit status of a program that ends by itself within this time; None where it does not."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.child.wait(seconds)
        return self.child.returncode

    def written(self) -> bytes:
        """What stdout held when a program had ended, beside the lines that were received."""
        self.readers[0].join(1.0)
        found = []
        while not self.lines.empty():
            found.append(self.lines.get() or b"")
        return b"\n".join([*filter(None, found), self.rest]).strip()

    def kill(self) -> int | None:
        """End the program, after a moment to end by itself; its exit status."""
        if self.wait(0.2) is None:
            with contextlib.suppress(OSError):
                if os.name == "posix":
                    os.killpg(self.child.pid, signal.SIGKILL)  # with what it started: a shell, say, starts the port
                else:
                    self.child.kill()
        self.wait(5)
        for stream in (self.child.stdin, self.child.stdout, self.child.stderr):
            if stream is not None:
                with contextlib.suppress(OSError, ValueError):
                    stream.close()
        return self.child.returncode
