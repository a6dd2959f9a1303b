"""Sizes of the chunks in which the eager kernels walk the sequence, and the heads they take at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

ROWS = 256
"""Query rows (tokens x query heads of a group) of one tile: enough to keep a matrix product busy."""

TILE = 1 << 18
"""Elements of one score tile, 1 MiB in float32: it stays in a core's cache between the product and the softmax."""


def band_chunk(group: int, keys: int) -> int:
    """Tokens per chunk for softmax over `keys` keys behind each token: a power of two, small where rows are long."""
    chunk = 64
    while chunk > 16 and chunk * group * (chunk + keys) > 2 * TILE:
        chunk //= 2
    while chunk < 128 and chunk * group < ROWS and 2 * chunk * group * (2 * chunk + keys) <= TILE:
        chunk *= 2
    return chunk


def scan_chunk(group: int) -> int:
    """Tokens per chunk of the linear branch: enough rows, and no more keys per row than the state costs anyway."""
    return 64 if group >= 2 else 128


def heads_at_once(heads: int, elements: int) -> int:
    """How many flat heads share tiles of `elements` elements: as many as the cache takes, one per thread at least."""
    return max(1, min(heads, max(torch.get_num_threads(), 4 * TILE // max(elements, 1))))


def spans(start: int, stop: int, step: int) -> Iterator[tuple[int, int]]:
    """Consecutive `[lo, hi)` that cover `[start, stop)`."""
    for lo in range(start, stop, step):
        yield lo, min(lo + step, stop)


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Switch autocast off for `device`. Devices that know no autocast, such as meta, have nothing to switch."""
    kind = device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


@contextmanager
def full_precision(device: torch.device, reduced: bool) -> Iterator[None]:
    """Keep float32 products in float32 under autocast, and where the program allows TF32 or bfloat16 passes (NUM-2).

    `reduced` leaves the second, PyTorch's own setting, alone: the caller has asked for less.
    """
    before = torch.get_float32_matmul_precision()
    with no_autocast(device):
        if reduced or before == "highest":
            yield
            return
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
