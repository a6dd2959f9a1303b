"""Launching: one door through which every kernel passes, so that what ran is on record (BCK-4).

`recording()` collects the launches made inside it. `capturing(kind)` collects them without running anything: with meta
tensors it yields exactly the kernels, arguments and configurations that a device of that kind would get, which is what
the ahead-of-time matrix compiles.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rattention.torch.triton.config import Config, config_for, device_kind
from rattention.torch.triton.tiles import INTERPRET


@dataclass(frozen=True)
class Launch:
    """One kernel launch: positional arguments, compile-time constants and options."""

    name: str
    kernel: Any
    grid: int
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    warps: int
    stages: int


_record: ContextVar[list[Launch] | None] = ContextVar("launches", default=None)
_capture: ContextVar[str | None] = ContextVar("capture", default=None)
_override: ContextVar[Config | None] = ContextVar("config", default=None)


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collect the launches made in this block, in order."""
    launches: list[Launch] = []
    token = _record.set(launches)
    try:
        yield launches
    finally:
        _record.reset(token)


@contextlib.contextmanager
def capturing(kind: str) -> Iterator[list[Launch]]:
    """Collect launches as for a device of `kind`, running none."""
    token = _capture.set(kind)
    try:
        with recording() as launches:
            yield launches
    finally:
        _capture.reset(token)


@contextlib.contextmanager
def using(config: Config) -> Iterator[None]:
    """Use `config` instead of the table in this block: for tests of every configuration and for tuning."""
    token = _override.set(config)
    try:
        yield
    finally:
        _override.reset(token)


def configuration(like: torch.Tensor, D: int, Dv: int) -> Config:
    kind = _capture.get() or device_kind(like.device)
    return _override.get() or config_for(kind, D, Dv, like.dtype)


def target_kind(like: torch.Tensor) -> str:
    return _capture.get() or device_kind(like.device)


@contextlib.contextmanager
def _interpreter() -> Iterator[None]:
    """Two repairs to Triton's interpreter for the length of one launch.

    A scalar is held as an array of one element, which NumPy 2.4 no longer turns into the bound of a loop by itself. And
    every call of a device function patches the whole language anew, which takes longer than all arithmetic: once per
    module and launch is enough.
    """
    from triton.runtime import interpreter

    patch_tensor, patch_language = interpreter._patch_lang_tensor, interpreter._patch_lang
    patched: set[int] = set()

    def tensor(kind: Any, scope: Any) -> None:
        patch_tensor(kind, scope)
        scope.set_attr(kind, "__index__", lambda self: int(self.handle.data.item()))

    def language(fn: Any) -> Any:
        key = id(fn.__globals__)
        if key in patched:
            return None
        patched.add(key)
        return patch_language(fn)

    interpreter._patch_lang_tensor, interpreter._patch_lang = tensor, language
    try:
        yield
    finally:
        interpreter._patch_lang_tensor, interpreter._patch_lang = patch_tensor, patch_language


def launch(kernel: Any, programs: int, *arguments: Any, warps: int, stages: int, **constants: Any) -> None:
    """Run `kernel` on `programs` programs along one grid axis (the only one without a limit of 65535)."""
    name = kernel.fn.__name__ if hasattr(kernel, "fn") else kernel.__name__
    if programs == 0:
        return
    record = _record.get()
    if record is not None:
        record.append(Launch(name, kernel, programs, arguments, constants, warps, stages))
    if _capture.get() is not None:
        return
    if INTERPRET.value:
        # NumPy warns where the formulas rightly make inf and NaN.
        with np.errstate(all="ignore"), warnings.catch_warnings(), _interpreter():
            warnings.simplefilter("ignore", RuntimeWarning)
            kernel[(programs,)](*arguments, **constants)
    else:
        with torch.cuda.device(arguments[0].device):
            kernel[(programs,)](*arguments, **constants, num_warps=warps, num_stages=stages)
