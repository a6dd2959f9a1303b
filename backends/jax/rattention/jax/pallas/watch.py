"""What really ran: kernels as they start, and the interpreter's verdict on races.

Interpreted kernels report at run time, from a callback at each grid point; compiled ones when their program is traced,
which is all that a host can know of them.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator
from typing import Any

from jax.experimental.pallas import tpu as pltpu


class Watch:
    """Kernels seen while the watch was on, in order, and the race records of the interpreted ones."""

    def __init__(self) -> None:
        self.traced: list[str] = []
        self.ran: list[str] = []
        self.races: list[Any] = []

    @property
    def racy(self) -> bool:
        return any(r.races_found for r in self.races)


_watches: list[Watch] = []


@contextlib.contextmanager
def watching() -> Iterator[Watch]:
    """Record the kernels of a `with` block; the caller waits for its results inside the block."""
    watch = Watch()
    _watches.append(watch)
    try:
        yield watch
    finally:
        _watches.remove(watch)


def traced(name: str) -> None:
    """A kernel was built into a program."""
    for watch in _watches:
        if name not in watch.traced:
            watch.traced.append(name)


@functools.cache
def interpreter(name: str) -> Any:
    """The TPU interpreter as the suite runs it: races are recorded, memory nobody wrote is NaN."""

    def at_grid_point(*at: Any) -> Any:
        state = _race_state()
        for watch in _watches:
            if name not in watch.ran:
                watch.ran.append(name)
            if state is not None and not any(state is r for r in watch.races):
                watch.races.append(state)
        # JAX 0.10 threads an ordering token through the callback; its documentation knows two arguments and no result.
        return at[0] if len(at) == 3 else None

    return pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", grid_point_recorder=at_grid_point)


def _race_state() -> Any:
    # JAX has no public reader for the verdict that its documentation names `races.races_found`.
    module = sys.modules.get("jax._src.pallas.mosaic.interpret.interpret_pallas_call")
    return getattr(module, "races", None)
