"""Worker processes: each loads the backend afresh; one that dies or hangs costs its case alone."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

from rattention.conformance import backends
from rattention.conformance.judge import Violation
from rattention.conformance.session import Failure, Session, Unit, UnitResult
from rattention.conformance.stacks import Stack
from rattention.conformance.strategies import Plan
from rattention.conformance.told import ending
from rattention.spec import load

if TYPE_CHECKING:
    from rattention.conformance.runner import Progress, Settings

LOSSES = 10
"""Workers lost before the rest of the run is left out: a backend that takes every process down is known by then."""
CASE_SECONDS = 300.0
"""Seconds that a backend in this process may take for a case, where no `--timeout` says otherwise."""
STOP_SECONDS = 5.0
"""Seconds that the workers have to end by themselves, beside those of their ports; after Ctrl-C they have one."""
LEAVE_SECONDS = 5.0
"""Seconds that a worker has to end the process of its port. A worker without one ends at once."""
HURRIED = 60.0
"""Each case that hangs halves the time that the next may take, down to this many seconds."""
START_LIMIT = 300.0
"""Seconds a worker may take to load its backend."""


def end_with_parent() -> None:
    """Called in a worker: it ends when the process that started it was killed, whatever it is at."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        wait([parent.sentinel])
        leave()

    threading.Thread(target=watch, daemon=True, name="end with parent").start()


_backends: list[Any] = []
"""Those of this worker that have processes of their own."""


def leave(*_: object) -> None:
    """End this worker at once, and with it the processes that its backend has."""
    for backend in _backends:
        with contextlib.suppress(Exception):
            backends.abandon(backend)
    os._exit(1)


def serve(pipe: Connection, stack: Stack, target: str, plan: Plan, select: str, seconds: float | None) -> None:
    """The life of a worker: load, then answer ("run" | "minimise", units) with one message per unit."""
    end_with_parent()
    stack.record()
    try:
        _answer(pipe, target, plan, select, seconds)
    except KeyboardInterrupt:
        # Not from the terminal (see `without_interrupts`): a thread of the backend interrupts the process that it runs
        # in. The backend has taken its process down.
        os._exit(1)
    except OSError:  # the pipe is broken: the parent was killed
        leave()


def _answer(pipe: Connection, target: str, plan: Plan, select: str, seconds: float | None) -> None:
    backend = backends.resolve(target, seconds)
    if backends.is_wire_port(backend):
        _backends.append(backend)
        signal.signal(signal.SIGTERM, leave)
    session = Session(backend, backends.describe(backend, target), plan, select)
    pipe.send(("ready", None))
    with contextlib.suppress(EOFError):
        while True:
            what, units = pipe.recv()
            if what == "stop":
                break
            for unit in units:
                try:
                    answer = session.run(unit) if what == "run" else session.minimise(unit)
                except KeyboardInterrupt:
                    raise
                except BaseException:
                    # The suite itself failed: say where, and let the parent stop the run.
                    import traceback

                    pipe.send(("fault", f"{unit.property_name}: {unit.recipe}\n{traceback.format_exc()}"))
                    return
                pipe.send(("done", answer))
    fault = backends.close(backend)
    with contextlib.suppress(OSError):
        pipe.send(("closed", fault))


class SuiteFault(Exception):
    """A fault of the suite, not of the backend."""


@contextlib.contextmanager
def without_interrupts() -> Iterator[None]:
    """Processes started here do not see Ctrl-C, which a terminal sends to all: the parent alone ends the run.

    A Ctrl-C that comes meanwhile is heard afterwards. In the middle of a start it would leave a child that complains of
    half a message.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # which unblocks Ctrl-C where it has to start first
    heard: list[int] = []
    handler = signal.getsignal(signal.SIGINT)
    # The mask is for the child, which inherits it. Another thread of this process may take the signal all the same.
    ours = callable(handler) and threading.current_thread() is threading.main_thread()
    if ours:
        signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if ours:
            signal.signal(signal.SIGINT, handler)
            if heard:
                signal.raise_signal(signal.SIGINT)


class Worker:
    """One process that lives as `life(pipe, stack, *arguments)` says. Ctrl-C does not reach it."""

    def __init__(self, life: Callable[..., None], *arguments: Any):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.stack = Stack()
        self.process = context.Process(target=life, args=(theirs, self.stack, *arguments), daemon=True)
        with without_interrupts():
            self.process.start()
        theirs.close()
        self.ready = False
        self.queue: deque[Unit] = deque()
        self.since = time.monotonic()

    def kill(self) -> None:
        """Let it leave, and take nothing else for an answer."""
        self.process.terminate()
        self.process.join(LEAVE_SECONDS)
        self.process.kill()
        self.process.join()
        self.pipe.close()
        self.stack.close()

    def died(self) -> str:
        """Why a worker is lost whose pipe has ended."""
        self.process.join(5)
        return f"the process {ending(self.process.exitcode)}"

    def silent(self, limit: float) -> str:
        """Why a worker is lost that does not answer in time."""
        self.stack.ask(self.process.pid)
        return f"no answer within {limit:g} s"


class Pool:
    """`settings.workers` processes that share one list of units, heavy ones first.

    results: by index of the unit, and failures: made small; both hold what was found so far if a run ends early.
    endings: what was wrong with how ports behind the wire ended, known when the pool is closed.
    wire: the backend is such a port. Its client watches the time of every answer, so that a case has no limit.
    """

    def __init__(self, target: str, plan: Plan, settings: Settings, *, wire: bool = False):
        self.target, self.plan, self.settings = target, plan, settings
        self.results: dict[int, UnitResult] = {}
        self.failures: list[Failure] = []
        self.endings: list[str] = []
        self.stop_seconds = STOP_SECONDS + (backends.stop_seconds() if wire else 0.0)
        self.workers = [self._start() for _ in range(settings.workers)]
        self.losses = 0
        self.limit = math.inf if wire else settings.timeout or CASE_SECONDS
        self.start_limit = START_LIMIT + (settings.timeout or 0.0)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        for worker in self.workers:
            with contextlib.suppress(OSError, ValueError):
                worker.pipe.send(("stop", None))
        end = time.monotonic() + (self.stop_seconds if kind is None else 1.0)
        try:
            for worker in self.workers:
                worker.process.join(max(0.0, end - time.monotonic()))
                self._ending(worker.pipe)
        finally:  # also where a second Ctrl-C cuts the waiting short
            for worker in self.workers:
                worker.kill()

    def _ending(self, pipe: Connection) -> None:
        with contextlib.suppress(EOFError, OSError):
            while pipe.poll():
                kind, answer = pipe.recv()
                if kind == "closed" and answer:
                    self.endings.append(answer)

    def _start(self) -> Worker:
        return Worker(serve, self.target, self.plan, self.settings.select, self.settings.timeout)

    def run(self, units: Sequence[Unit], progress: Progress | None = None) -> None:
        """Fill `results`; units left out after too many lost workers have none."""
        failed = 0

        def take(unit: Unit, answer: Any) -> None:
            nonlocal failed
            self.results[unit.index] = answer
            failed += answer.status == "fail"
            if progress:
                progress(len(self.results), len(units), failed)

        self._spread("run", self._chunks(units), take, _lost)

    def minimise(self, units: Sequence[Unit]) -> None:
        """Fill `failures`: minimal cases; a unit that kills the worker while it shrinks is left as it was."""

        def take(unit: Unit, answer: Any) -> None:
            if answer is not None:
                self.failures.append(answer)

        self._spread("minimise", deque([u] for u in units), take, lambda *_: None)

    def _chunks(self, units: Sequence[Unit]) -> deque[list[Unit]]:
        """Units that share a compiled program stay together; what is long goes first: nobody waits at the end."""
        groups: dict[Any, list[Unit]] = {}
        for i, unit in enumerate(units):
            key = (unit.recipe.signature,) if self.plan.cost != "direct" else (i // 24,)
            groups.setdefault(key, []).append(unit)
        return deque(sorted(groups.values(), key=lambda g: -max(u.recipe.T * u.recipe.T for u in g)))

    def _spread(self, what: str, chunks: deque[list[Unit]], take: Any, lost: Any) -> None:
        while chunks or any(w.queue for w in self.workers):
            for i, worker in enumerate(self.workers):
                if worker.ready and not worker.queue and chunks:
                    chunk = chunks.popleft()
                    worker.queue.extend(chunk)
                    worker.since = time.monotonic()
                    worker.pipe.send((what, chunk))
                limit = self.limit if worker.ready else self.start_limit
                if (worker.queue or not worker.ready) and time.monotonic() - worker.since > limit:
                    self.limit = max(self.limit / 2, min(HURRIED, self.limit))
                    self._replace(i, worker.silent(limit), chunks, take, lost)
            for pipe in wait([w.pipe for w in self.workers], timeout=1.0):
                i = next(n for n, w in enumerate(self.workers) if w.pipe is pipe)
                worker = self.workers[i]
                try:
                    kind, answer = worker.pipe.recv()
                except (EOFError, OSError):
                    self._replace(i, worker.died(), chunks, take, lost)
                    continue
                worker.since = time.monotonic()
                if kind == "ready":
                    worker.ready = True
                elif kind == "fault":
                    raise SuiteFault(answer)
                else:
                    take(worker.queue.popleft(), answer)

    def _replace(self, i: int, why: str, chunks: deque[list[Unit]], take: Any, lost: Any) -> None:
        """Start a new worker in place of a lost one; the unit it was at is judged by `lost`, the others go back."""
        worker = self.workers[i]
        trace = worker.stack.trace()
        worker.kill()
        if not worker.ready:
            raise backends.CannotRun(f"{self.target} does not start in a worker process: {why}")
        rest = list(worker.queue)
        if rest:
            answer = lost(rest[0], why, trace)
            if answer is not None:
                take(rest[0], answer)
            if rest[1:]:
                chunks.append(rest[1:])
        self.losses += 1
        if self.losses >= LOSSES:
            chunks.clear()
        self.workers[i] = self._start()


def taken_down(op: str, why: str, trace: str) -> Violation:
    """What is wrong with a backend whose call ended its process, or never ended."""
    return Violation(("BCK-3",), f"{op}: the backend took its process down: {why}", "crash", trace=trace)


def _lost(unit: Unit, why: str, trace: str) -> UnitResult:
    recipe = unit.recipe
    stored = any(t.dtype == "storage" for t in load().operations[recipe.op].tensors)
    dtype = recipe.dtype if stored else "float32"  # as `storage_of` says of a case
    found = [taken_down(recipe.op, why, trace)]
    return UnitResult(unit.index, unit.property_name, recipe.op, dtype, "fail", ("BCK-3",), found)
