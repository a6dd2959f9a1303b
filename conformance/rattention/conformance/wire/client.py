"""A port as a backend: start, run, stop; a port that crashes, hangs or answers garbage is restarted (WIRE-3)."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rattention.conformance import jsontext, tensorfile
from rattention.conformance.backends import CannotRun
from rattention.conformance.case import to_json
from rattention.conformance.context import PortFailure
from rattention.conformance.told import ending
from rattention.conformance.wire import schema
from rattention.conformance.wire.process import Process
from rattention.spec import Result, SpecError, Unsupported, load, validate

PROTOCOL = 1
START_SECONDS = 60.0
RUN_SECONDS = 120.0
STOP_SECONDS = 10.0
RESTARTS = 200
"""Restarts after which the port is given up: by then every case fails and nothing is learned."""
HANGS = 12
"""Hangs after which it is given up; each halves the time that the next answer may take, down to HURRIED seconds."""
HURRIED = 5.0
SHOWN = 200
"""Characters of a wrong answer that a message repeats."""
UNSEEN = ("ERR-13", "NUM-7")
"""Clauses about the memory of the caller: tensors reach a port in files, which the runner writes anew for each call."""
REFUSALS = (*(c for c in load().judged if c.startswith("ERR-") and c not in ("ERR-12", "ERR-13")), "BCK-5")
"""Clauses about invalid calls."""


class Port:
    """A program that speaks the wire protocol.

    The client is the adapter of the port: it refuses invalid calls itself, with the shared validation, so that a port
    need not repeat it. A port whose description says `"validates": true` is sent them, and judged on its refusals.
    """

    clauses = ("WIRE-1", "WIRE-2", "WIRE-3")
    """What every call through the wire exercises."""
    stop_seconds = STOP_SECONDS

    def __init__(self, command: list[str], *, run_seconds: float = RUN_SECONDS, start_seconds: float = START_SECONDS):
        self.command, self.run_seconds, self.start_seconds = command, run_seconds, start_seconds
        self.folder: Path | None = None
        self.process: Process | None = None
        self.about: dict[str, Any] | None = None
        self.requests = self.starts = self.hangs = 0
        self.lost = ""  # why the last process had to go, for calls that get none any more

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
            validate(op, given, attrs)
        if self.process is None:
            if self.starts > RESTARTS or self.hangs > HANGS:
                counts = f"the port hung {self.hangs} times and was started {self.starts} times"
                raise PortFailure(f"given up: {counts}; the last time {self.lost}")
            self._start()
        self.requests += 1
        if self.folder is None:
            self.folder = Path(tempfile.mkdtemp(prefix="rattention-wire-"))
        place = self.folder / str(self.requests)
        place.mkdir()
        try:
            return self._exchange(op, given, attrs, place)
        finally:
            shutil.rmtree(place, ignore_errors=True)

    @property
    def held(self) -> tuple[str, ...]:
        """Clauses that the runner keeps in the place of this port, which it cannot break."""
        validates = self.about is not None and self.about.get("validates")
        return UNSEEN if validates else (*UNSEEN, *REFUSALS)

    def stop(self) -> str:
        """Send `stop`, and make sure that the process ends; what is wrong with how it did (WIRE-4), or "".

        The next call starts a new process.
        """
        process = self.process
        if process is None:
            return ""
        with contextlib.suppress(OSError, ValueError):
            process.send(json.dumps({"cmd": "stop"}))
        status = process.wait(self.stop_seconds)
        said = self._said(process)
        if status is None:
            fault = f"the port ignores `stop`: {self.stop_seconds:g} s later its process was still there"
        elif status != 0:
            fault = f"at `stop` the port {ending(status)}, expected exit status 0"
        elif written := process.written():
            fault = f"the port answers `stop`, which has no reply: {_shown(written)}"
        else:
            fault = said = ""
        process.kill()
        self.process = None  # not before: `abandon` may have to end it in between
        return fault + said

    def close(self) -> str:
        """`stop`, and remove the folder of the tensor files too."""
        fault = self.stop()
        self._clear()
        return fault

    def abandon(self) -> None:
        """End the process at once, and remove the folder."""
        process, self.process = self.process, None
        if process is not None:
            process.kill()
        self._clear()

    def _clear(self) -> None:
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder = None

    # ------------------------------------------------------------------------------------------ the conversation

    def _start(self) -> None:
        self.starts += 1
        try:
            self.process = Process(self.command)
        except OSError as error:
            self.lost = f"{self.command[0]} does not start: {error.strerror or error}"
            raise PortFailure(self.lost) from None
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
            raise PortFailure(f"the port reports an error: {reply['message']}{self._said(self.process)}", "BCK-3")
        try:
            if target.exists() and not target.is_file():  # a pipe or a device might be read for ever
                raise ValueError("out.safetensors is no regular file")
            outputs, _ = tensorfile.read(target)
        except (OSError, ValueError) as error:
            raise PortFailure(f"no usable output file: {error}{self._said(self.process)}", "WIRE-2") from None
        result = Result(outputs)
        result.metadata.update(reply.get("metadata", {}))  # whatever the port calls it: "outputs", say
        return result

    def _ask(self, request: dict[str, Any], seconds: float, *kinds: str) -> dict[str, Any]:
        """Send one line and read one, which must be a reply of one of `kinds`."""
        process = self.process
        assert process is not None
        stray: list[bytes] = []
        while not process.lines.empty() and (line := process.lines.get()) is not None:
            stray.append(line)
        try:
            process.send(json.dumps(request, allow_nan=False))
            line = process.receive(seconds)
        except TimeoutError:
            self.hangs += 1
            self.run_seconds = max(self.run_seconds / 2, min(HURRIED, self.run_seconds))
            came = f"what came has no newline at its end: {_shown(process.rest)}" if process.rest else "nothing came"
            clause = "WIRE-1" if process.rest else "WIRE-3"
            self._fail(f"the port hangs: no answer to {request['cmd']!r} within {seconds:g} s; {came}", clause)
        except OSError:
            line = None
        if line is None:
            said = self._said(process)
            rest = process.written()
            came = f"; its last words have no newline at their end: {_shown(rest)}" if rest else ""
            self.process = None
            self.lost = f"the port {ending(process.kill())}{came}{said}"
            raise PortFailure(self.lost)
        if stray:
            lines = "a line" if len(stray) == 1 else f"{len(stray)} lines"
            self._fail(f"the port wrote {lines} that nobody asked for: {_shown(stray[0])}")
        try:
            # As strict as the readers of other languages: a port of theirs may not rest on what Python's lets pass.
            reply = jsontext.parse(line.decode("utf-8"))
        except ValueError as error:
            self._fail(f"the port answered what is no JSON ({str(error)[:120]}): {_shown(line)}")
        wrong = schema.fault("reply", reply)
        if wrong:
            self._fail(f"the port's answer breaks the schema: {wrong}; it was {_shown(line)}")
        if reply["reply"] not in kinds:
            self._fail(f"the port answered {reply['reply']!r} to {request['cmd']!r}")
        return reply

    def _fail(self, text: str, clause: str = "WIRE-1") -> Any:
        """Give up the process, so that the next call starts a new one."""
        said = self._said(self.process)
        if self.process is not None:
            self.process.kill()
            self.process = None
        self.lost = text + said
        raise PortFailure(self.lost, clause)

    def _said(self, process: Process | None) -> str:
        text = process.stderr() if process is not None else ""
        return f"; stderr: {text[-600:]}" if text.strip() else ""


def _shown(raw: bytes) -> str:
    """The beginning of what a port wrote."""
    text = raw.decode("utf-8", "backslashreplace")
    return repr(text if len(text) <= SHOWN else f"{text[:SHOWN]}...")
