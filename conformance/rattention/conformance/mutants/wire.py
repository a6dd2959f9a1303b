"""Breaches of the wire protocol: a port of the eager form in a process of its own that answers in a wrong way."""

from __future__ import annotations

import sys

from rattention.conformance.mutants.port import plant
from rattention.conformance.wire.client import Port as Client

SERVE = (
    "import sys; sys.path[:0] = {path!r}; from rattention.conformance.mutants.wire_server import serve; serve({how!r})"
)


class WirePort(Client):
    """The eager form behind the wire, honest where `how` is empty. Started by the interpreter that runs the suite."""

    how = ""

    def __init__(self) -> None:
        super().__init__([sys.executable, "-c", SERVE.format(path=list(sys.path), how=self.how)], run_seconds=60)


@plant("WIRE-1", "wire", "rationale: a reply written by two layers of the port")
class WireAnswersTwice(WirePort):
    """Each reply is written twice."""

    how = "twice"


@plant("WIRE-1", "wire", "rationale: requests answered from a pool of threads")
class WireAnswersOutOfOrder(WirePort):
    """Replies carry the number of the request before."""

    how = "order"


@plant("WIRE-1", "wire", "rationale: a library that prints to stdout")
class WireChatters(WirePort):
    """A line of progress stands before each reply."""

    how = "chatter"


@plant("WIRE-2", "wire", "rationale: outputs numbered, as some exporters do")
class WireNumbersItsOutputs(WirePort):
    """Output tensors are called output0, output1."""

    how = "names"


@plant("WIRE-2", "wire", "rationale: a file that is written after the reply, or never")
class WireWritesNothing(WirePort):
    """The reply says result, and there is no file."""

    how = "nothing"


@plant("WIRE-3", "wire", "rationale: a port that leaks until it is killed")
class WireCrashesNowAndThen(WirePort):
    """Every third request ends the process."""

    how = "crash"


@plant("WIRE-1 WIRE-3", "wire", "rationale: an uncaught exception printed in place of a reply")
class WireAnswersGarbage(WirePort):
    """Every third reply is no JSON, after which the process ends."""

    how = "garbage"
