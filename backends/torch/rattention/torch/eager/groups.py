"""Who may read whom in the linear branch: the documents that queries, keys and states belong to (SEG-2, SEG-6)."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Groups(NamedTuple):
    """Documents of queries `[B, T]`, of keys `[B, J]`, and of the state before key j `[B, J + 1]`."""

    q: Tensor
    k: Tensor
    alive: Tensor


def groups_of(q: Tensor | None, k: Tensor | None, alive: Tensor | None) -> Groups | None:
    """The three, or None where there are none."""
    return None if q is None or k is None or alive is None else Groups(q, k, alive)
