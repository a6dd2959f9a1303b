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
    seconds = 60.0
    """For an answer; few where none is to come."""

    def __init__(self) -> None:
        super().__init__(
            [sys.executable, "-c", SERVE.format(path=list(sys.path), how=self.how)], run_seconds=self.seconds
        )


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


@plant("WIRE-3", "wire", "rationale: a lock that two threads of the port take in different order")
class WireHangs(WirePort):
    """Every third request has no answer."""

    how, seconds = "hang", 3.0


@plant("WIRE-1", "wire", "rationale: print(..., end='')")
class WireForgetsTheNewline(WirePort):
    """Replies are whole, and no newline ends them."""

    how, seconds = "newline", 3.0


@plant("WIRE-1", "wire", "rationale: what json.dumps writes where allow_nan is left at its default")
class WireWritesNotANumber(WirePort):
    """The metadata of a reply hold NaN, which JSON does not have."""

    how = "nan"


@plant("WIRE-1", "wire", "rationale: JSON put together from pieces of text")
class WireNamesAKeyTwice(WirePort):
    """Replies have the key id twice."""

    how = "keys"


@plant("WIRE-1", "wire", "rationale: a console that writes Latin-1")
class WireWritesLatin1(WirePort):
    """Replies hold a letter beyond ASCII that is not in UTF-8."""

    how = "latin"


@plant("WIRE-2", "wire", "rationale: a buffer written whole, whose end no tensor uses")
class WirePadsItsFiles(WirePort):
    """Files of outputs are as long as the next multiple of 64 bytes, with zeros behind the last tensor."""

    how = "padding"


@plant("WIRE-2", "wire", "rationale: tensors aligned to cache lines, as GGUF has them")
class WireLeavesHoles(WirePort):
    """In a file of outputs each tensor begins at a multiple of 64 bytes."""

    how = "holes"


@plant("WIRE-4", "wire", "rationale: a main function without a return, or an exception while the port shuts down")
class WireEndsBadly(WirePort):
    """At stop the process ends with exit status 1."""

    how = "status"


@plant("WIRE-4", "wire", "rationale: a thread that is not a daemon keeps the process")
class WireStaysAtStop(WirePort):
    """Stop is read, and the process goes on."""

    how, stop_seconds = "deaf", 2.0


@plant("WIRE-4", "wire", "rationale: a server that acknowledges every command")
class WireAnswersStop(WirePort):
    """A last line acknowledges stop."""

    how = "farewell"
