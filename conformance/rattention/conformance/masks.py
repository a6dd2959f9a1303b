"""Who reads whom: the sets of the specification, written down a second time, apart from the reference.

The membership probes compare what a backend does with these sets alone, so that a fault that the reference shared with
a backend would still show.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass
class Reads:
    """softmax, linear: `[B, T, N]`, whether query t reads token n in that branch; N = T, or W + T with a cache.

    folded: `[B, N]`, whether the state returned holds token n. live: `[B, T]`, whether the query is real.
    """

    softmax: np.ndarray
    linear: np.ndarray
    folded: np.ndarray
    live: np.ndarray


def reads(tensors: Mapping[str, np.ndarray], window: int | None) -> Reads:
    """The sets of a call of any operation with a window."""
    if "cache_length" in tensors:
        return _with_cache(tensors, window)
    B, T = tensors["q"].shape[:2]
    ids = tensors.get("segment_ids", np.ones((B, T), np.int32))
    t = np.arange(T)
    distance = t[:, None] - t[None, :]
    live = ids != 0
    same = (ids[:, :, None] == ids[:, None, :]) & live[:, :, None]
    softmax, linear = _branches(distance, window)
    folded = np.zeros((B, T), bool)
    for b in range(B):
        tokens = np.flatnonzero(live[b])
        if tokens.size and window is not None:
            last = tokens[ids[b, tokens] == ids[b, tokens[-1]]]
            folded[b, last[: max(len(last) - max(window, 0), 0)]] = True
    return Reads(softmax & same, linear & same, folded, live)


def _branches(distance: np.ndarray, window: int | None) -> tuple[np.ndarray, np.ndarray]:
    """SWA-1 and RLA-1: 0 <= t - i <= w, and t - i >= w + 1."""
    past = distance >= 0
    if window is None:
        return past, np.zeros_like(past)
    return past & (distance <= window), past & (distance >= window + 1)


def _with_cache(tensors: Mapping[str, np.ndarray], window: int | None) -> Reads:
    B, T = tensors["q"].shape[:2]
    W = tensors["cache_k"].shape[1]
    seen = tensors["cache_length"].astype(np.int64)
    new = tensors.get("lengths", np.full(B, T)).astype(np.int64)
    slots = seen[:, None] - W + np.arange(W)[None, :]
    position = np.concatenate([slots, seen[:, None] + np.arange(T)[None, :]], 1)
    real = np.concatenate([slots >= 0, np.arange(T)[None, :] < new[:, None]], 1)
    live = np.arange(T)[None, :] < new[:, None]
    distance = position[:, W:, None] - position[:, None, :]
    softmax, linear = _branches(distance, window)
    allowed = real[:, None, :] & live[:, :, None]
    folded = np.zeros((B, W + T), bool)
    if window is not None:
        folded = real & (position < (seen + new)[:, None] - max(window, 0))
    return Reads(softmax & allowed, linear & allowed, folded, live)
