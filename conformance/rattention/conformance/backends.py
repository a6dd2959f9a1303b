"""From what a person types to a backend: a registered name, a file, a module, or a command."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from rattention.conformance.description import names, plain
from rattention.conformance.told import by_user, told
from rattention.spec import Unsupported, load

GROUP = "rattention.backends"
BUILT_IN = {
    "numpy": "rattention.numpy.adapter:backend",
    "torch": "rattention.torch.adapter:backend",
    "torch-triton": "rattention.torch.triton_adapter:backend",
    "jax": "rattention.jax.adapter:backend",
    "jax-pallas": "rattention.jax.pallas_adapter:backend",
    "onnx": "rattention.conformance.oracles.onnx_backend:backend",
    "onnxruntime": "rattention.conformance.oracles.onnx_backend:runtime",
}
"""Used where the distribution is not installed and so has no entry points."""


class CannotRun(Exception):
    """The command cannot do its work, say for want of a backend; the text is one line that says why."""


def registered() -> dict[str, str]:
    """Every registered name and where it points, those of other distributions included."""
    found = dict(BUILT_IN)
    for point in importlib.metadata.entry_points(group=GROUP):
        found[point.name] = point.value
    return found


def resolve(text: str, seconds: float | None = None) -> Any:
    """The backend that `text` names: NAME, path/to/file.py:attribute, module:attribute, or exec:COMMAND.

    Args:
        seconds: how long a port behind `exec:` may take for an answer; None for its default.

    Raises:
        CannotRun: there is no such backend, or it fails to load.
    """
    if text.startswith("exec:"):
        from rattention.conformance.wire.client import RUN_SECONDS, START_SECONDS, Port

        try:
            command = shlex.split(text.removeprefix("exec:"))
        except ValueError as error:  # a quotation mark that is not closed
            raise CannotRun(f"{text}: the command is not one that a shell would take: {error}") from None
        if not command:
            raise CannotRun("exec: needs a command, as in exec:./port")
        # A program has its time to start, which a short limit for a call does not cut.
        limit = RUN_SECONDS if seconds is None else seconds
        return Port(command, run_seconds=limit, start_seconds=max(START_SECONDS, seconds or 0.0))
    target = registered().get(text, text)
    place, colon, attribute = target.rpartition(":")
    if not colon:
        known = ", ".join(registered())
        raise CannotRun(
            f"{text!r} is no backend: expected one of {known}, FILE.py:ATTRIBUTE, MODULE:ATTRIBUTE or exec:COMMAND"
        )
    try:
        module = _from_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
        backend = module
        for part in attribute.split("."):
            backend = getattr(backend, part)
    except CannotRun:
        raise
    except BaseException as error:  # whatever a third party's module does at import, SystemExit included
        if by_user(error):
            raise
        raise CannotRun(f"{text} does not load: {type(error).__name__}: {_one_line(error)}") from error
    if isinstance(backend, type):
        try:
            backend = backend()
        except BaseException as error:
            if by_user(error):
                raise
            raise CannotRun(f"{text} does not start: {type(error).__name__}: {_one_line(error)}") from error
    if not callable(getattr(backend, "run", None)) or not callable(getattr(backend, "describe", None)):
        raise CannotRun(f"{text} is no backend: it has no describe() and run()")
    return backend


def describe(backend: Any, text: str) -> Mapping[str, Any]:
    """`backend.describe()`, which must be a mapping.

    Raises:
        CannotRun: it fails or answers something else.
    """
    try:
        about = backend.describe()
        found = plain(about)  # a mapping of the backend's own class may fail as late as here
    except CannotRun:
        close(backend)
        raise
    except BaseException as error:  # SystemExit included: its status would pass for a verdict
        if by_user(error):
            abandon(backend)
            raise
        raise CannotRun(f"{text} does not describe itself: {type(error).__name__}: {_one_line(error)}") from error
    if not isinstance(about, Mapping):
        raise CannotRun(f"{text} does not describe itself: describe() gave {type(about).__name__}, not a mapping")
    return found


def is_wire_port(backend: Any) -> bool:
    """Whether a backend is a program behind the wire."""
    from rattention.conformance.wire.client import Port

    return issubclass(type(backend), Port)


def wire_clauses(backend: Any) -> tuple[str, ...]:
    """What every call of a port behind the wire exercises beside the call itself."""
    return backend.clauses if is_wire_port(backend) else ()


def held(backend: Any) -> tuple[str, ...]:
    """Clauses that the runner keeps in the place of this backend (chapter 12); none for a backend in this process."""
    return backend.held if is_wire_port(backend) else ()


def stop(backend: Any) -> str:
    """End the process of a port behind the wire for now; what is wrong with how it ended, or "".

    Nothing else has a process that the suite started.
    """
    return backend.stop() if is_wire_port(backend) else ""


def abandon(backend: Any) -> None:
    """End the process of a port behind the wire at once, whatever it is at."""
    if is_wire_port(backend):
        backend.abandon()


def stop_seconds() -> float:
    """How long a port has to end at `stop`."""
    from rattention.conformance.wire.client import STOP_SECONDS

    return STOP_SECONDS


def close(backend: Any) -> str:
    """`stop` for the last time.

    The contract knows no such method: a `close` of the backend's own is for others to call, and may do anything.
    """
    return backend.close() if is_wire_port(backend) else ""


def cost(name: str) -> str:
    """What a registered backend says that its programs cost: direct, compiled or interpreted."""
    return str(describe(resolve(name), name).get("cost") or "direct")


def runnable(names: list[str] | None = None) -> tuple[list[str], dict[str, str]]:
    """Registered backends that this machine can run, and for each of the others the reason why not.

    A backend that loads but lacks its device says so with Unsupported on the smallest call.
    """
    good, bad = [], {}
    for name in names or registered():
        try:
            backend = resolve(name)
            about = describe(backend, name)
            _probe(backend, about, name)
            good.append(name)
        except CannotRun as reason:
            bad[name] = str(reason)
    return good, bad


def _probe(backend: Any, about: Mapping[str, Any], name: str) -> None:
    """Raise CannotRun where one tiny call of a declared operation is refused for want of something."""
    dtypes = [dtype for dtype in names(about, "dtypes") if dtype in load().storage_dtypes] or ["float32"]
    calls: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
        "sliding_window_attention": (("q", "k", "v"), {"window": 1}),
        "rattention": (("q", "k", "v", "swa_weight", "rla_weight"), {"window": 1}),
    }
    op = next((op for op in calls if op in names(about, "operations")), None)
    if op is None:
        return
    given, attrs = calls[op]
    storage = np.dtype(getattr(ml_dtypes, dtypes[0], dtypes[0]))
    tensors = {
        n: np.ones((1, 2, 1, 4) if len(n) == 1 else (1, 4), storage if len(n) == 1 else np.float32) for n in given
    }
    try:
        backend.run(op, tensors, attrs)
    except Unsupported as refusal:
        raise CannotRun(f"{name}: {told(refusal)}") from None
    except BaseException as error:
        if by_user(error):
            raise
        return  # a fault, which the suite reports in full


def _from_file(path: Path) -> Any:
    path = path.expanduser().resolve()
    if not path.is_file():
        raise CannotRun(f"{path} does not exist")
    name = f"_rattention_port_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise CannotRun(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    # Files beside the port may be imported by it, as when Python runs a script; also later, when it runs.
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _one_line(error: BaseException) -> str:
    text = told(error).strip()
    return text.splitlines()[0] if text else "no message"
