"""A port as a backend: start, run, stop; a port that crashes, hangs or answers garbage is restarted (WIRE-3)."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rattention.conformance import jsontext, tensorfile
from rattention.conformance.backends import CannotRun
from rattention.conformance.case import to_json
from rattention.conformance.context import PortFailure
from rattention.conformance.wire import schema
from rattention.conformance.wire.process import Process
from rattention.spec import Result, SpecError, Unsupported, load, validate

PROTOCOL = 1
START_SECONDS = 60.0
RUN_SECONDS = 120.0
STOP_SECONDS = 5.0
RESTARTS = 200
"""Restarts after which the port is given up: by then every case fails and nothing is learned."""
HANGS = 12
"""Hangs after which it is given up; each halves the time that the next answer may take, down to HURRIED seconds."""
HURRIED = 5.0


class Port:
    """A program that speaks the wire protocol.

    The client is the adapter of the port: it refuses invalid calls itself, with the shared validation, so that a port
    need not repeat it. A port whose description says `"validates": true` is sent them, and judged on its refusals.
    """

    clauses = ("WIRE-1", "WIRE-2", "WIRE-3")
    """What every call through the wire exercises."""

    def __init__(self, command: list[str], *, run_seconds: float = RUN_SECONDS, start_seconds: float = START_SECONDS):
        self.command, self.run_seconds, self.start_seconds = command, run_seconds, start_seconds
        self.folder = Path(tempfile.mkdtemp(prefix="rattention-wire-"))
        self.process: Process | None = None
        self.about: dict[str, Any] | None = None
        self.requests = self.starts = self.hangs = 0

    # ------------------------------------------------------------------------------------------ the two calls

    def describe(self) -> dict[str, Any]:
        """The port's own description, from its answer to `start`.

        Raises:
            CannotRun: the program does not start, or does not answer as it should.
        """
        if self.about is None:
            try:
                self._start()
            except PortFailure as failure:
                raise CannotRun(" ".join(str(failure).split())) from None
        assert self.about is not None
        return dict(self.about)

    def run(self, op: str, tensors: Mapping[str, np.ndarray], attrs: Mapping[str, Any]) -> Result:
        """One call.

        Raises:
            SpecError, Unsupported: as any backend.
            PortFailure: the port crashed, hung, or answered something else than the protocol allows.
        """
        about = self.describe()
        given = {name: np.asarray(x) for name, x in tensors.items() if x is not None}
        if not about.get("validates"):
            validate(op, given, attrs, host={n: x for n, x in given.items() if x.dtype == np.int32})
            if op not in about["operations"]:
                raise Unsupported(f"operation {op} is not declared")
        if self.process is None:
            if self.starts > RESTARTS or self.hangs > HANGS:
                raise PortFailure(f"given up: the port hung {self.hangs} times and was started {self.starts} times")
            self._start()
        self.requests += 1
        place = self.folder / str(self.requests)
        place.mkdir()
        try:
            return self._exchange(op, given, attrs, place)
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def close(self) -> None:
        """Ask the port to stop, and make sure that it has."""
        process = self.process
        if process is not None:
            with contextlib.suppress(OSError, ValueError):
                process.send(json.dumps({"cmd": "stop"}))
            end = time.monotonic() + STOP_SECONDS
            while process.child.poll() is None and time.monotonic() < end:
                time.sleep(0.01)
            process.kill()
            self.process = None  # not before: `abandon` may have to end it in between
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder = Path(tempfile.gettempdir()) / "rattention-wire-closed"

    def abandon(self) -> None:
        """End the port at once, perhaps in the middle of a call, and leave nothing behind."""
        process, self.process = self.process, None
        if process is not None:
            process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    # ------------------------------------------------------------------------------------------ the conversation

    def _start(self) -> None:
        self.starts += 1
        try:
            self.process = Process(self.command)
        except OSError as error:
            raise PortFailure(f"{self.command[0]} does not start: {error.strerror or error}") from None
        hello = {"cmd": "start", "protocol": PROTOCOL, "spec_version": load().version}
        reply = self._ask(hello, self.start_seconds, "describe")
        if reply["protocol"] != PROTOCOL:
            self._fail(f"the port speaks protocol {reply['protocol']}, this suite {PROTOCOL}")
        if self.about is not None and reply["describe"] != self.about:
            self._fail("after a restart the port describes itself otherwise")
        self.about = reply["describe"]

    def _exchange(self, op: str, tensors: Mapping[str, np.ndarray], attrs: Mapping[str, Any], place: Path) -> Result:
        source, target = place / "in.safetensors", place / "out.safetensors"
        tensorfile.write(source, tensors)
        request = {
            "cmd": "run",
            "id": self.requests,
            "op": op,
            "attrs": to_json(dict(attrs)),
            "tensors": str(source),
            "outputs": str(target),
        }
        reply = self._ask(request, self.run_seconds, "result", "unsupported", "error")
        if reply["id"] != self.requests:
            self._fail(f"the port answered request {reply['id']} where {self.requests} was asked")
        if reply["reply"] == "unsupported":
            raise Unsupported(reply["reason"])
        if reply["reply"] == "error":
            fields = reply.get("spec_error")
            if fields:
                raise SpecError(**{k: fields[k] for k in ("operation", "argument", "expected", "got", "clause")})
            raise PortFailure(f"the port reports an error: {reply['message']}{self._said()}")
        try:
            if target.exists() and not target.is_file():  # a pipe or a device might be read for ever
                raise ValueError("out.safetensors is no regular file")
            outputs, _ = tensorfile.read(target)
        except (OSError, ValueError) as error:
            raise PortFailure(f"no usable output file: {error}{self._said()}", "WIRE-2") from None
        result = Result(outputs)
        result.metadata.update(reply.get("metadata", {}))  # whatever the port calls it: "outputs", say
        return result

    def _ask(self, request: dict[str, Any], seconds: float, *kinds: str) -> dict[str, Any]:
        """Send one line and read one, which must be a reply of one of `kinds`."""
        process = self.process
        assert process is not None
        stray = 0
        while not process.lines.empty() and process.lines.get() is not None:
            stray += 1
        try:
            process.send(json.dumps(request, allow_nan=False))
            line = process.receive(seconds)
        except TimeoutError:
            self.hangs += 1
            self.run_seconds = max(self.run_seconds / 2, min(HURRIED, self.run_seconds))
            self._fail(f"the port hangs: no answer within {seconds:.0f} s", "WIRE-3")
        except OSError:
            line = None
        if line is None:
            said = self._said()
            status = process.kill()
            self.process = None
            raise PortFailure(f"the port ended with exit status {status}{said}")
        if stray:
            self._fail(f"the port wrote {stray} lines that nobody asked for")
        try:
            # As strict as the readers of other languages: a port of theirs may not rest on what Python's lets pass.
            reply = jsontext.parse(line)
        except ValueError as error:
            self._fail(f"the port answered what is no JSON ({str(error)[:120]}): {line[:120]!r}")
        wrong = schema.fault("reply", reply)
        if wrong:
            self._fail(f"the port's answer breaks the schema: {wrong}; it was {line[:200].strip()!r}")
        if reply["reply"] not in kinds:
            self._fail(f"the port answered {reply['reply']!r} to {request['cmd']!r}")
        return reply

    def _fail(self, text: str, clause: str = "WIRE-1") -> Any:
        """Give up the process, so that the next call starts a new one."""
        said = self._said()
        if self.process is not None:
            self.process.kill()
            self.process = None
        raise PortFailure(text + said, clause)

    def _said(self) -> str:
        text = self.process.stderr() if self.process is not None else ""
        return f"; stderr: {text[-600:]}" if text.strip() else ""
