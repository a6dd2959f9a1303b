"""Who reads whom: the explicit masks of the quadratic form, from segments or from a cache.

Queries are the T tokens of the call. Keys are the tokens that some query or the final state may read: the same T
tokens, or, for `rattention_extend`, the W cache slots followed by the T new tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Reads:
    """Boolean masks and positions; T queries, S keys."""

    live: np.ndarray  # [B, T] query is a real token: not padding (SEG-4), not past lengths (EXT-7)
    readable: np.ndarray  # [B, S] key is a real token: not padding (SEG-5), not an unused slot (EXT-9)
    window: np.ndarray  # [B, T, S] the softmax branch of query t reads key s (SWA-1)
    behind: np.ndarray  # [B, T, S] the linear branch of query t reads key s (RLA-1)
    carried: np.ndarray  # [B, T] query reads the initial or cached state (RLA-4, SEG-6)
    folded: np.ndarray  # [B, S] key is part of the final state (RLA-6, SEG-7, EXT-5)
    keeps: np.ndarray  # [B] the final state contains the initial state (SEG-7, SEG-8)
    query_positions: np.ndarray  # [B, T] row of the rotary table (ROPE-4, EXT-8)
    key_positions: np.ndarray  # [B, S]


def _split(age: np.ndarray, both: np.ndarray, window: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Split the causal past of each query between the branches (RAT-2). `age` = t - i; `both` = the pair may meet.

    The two masks are complements within the past: age 0..w for softmax (SWA-1), age > w for the linear branch (RLA-1).
    """
    past = both & (age >= 0)
    if window is None:  # SWA-6, RLA-9
        return past, np.zeros_like(past)
    return past & (age <= window), past & (age > window)


def from_segments(
    batch: int, tokens: int, window: int | None, segment_ids: np.ndarray | None, positions: np.ndarray | None
) -> Reads:
    """Masks of one whole sequence per row, cut by `segment_ids [B, T]`; None is a single segment without padding."""
    ids = np.ones((batch, tokens), np.int64) if segment_ids is None else segment_ids.astype(np.int64)
    t = np.arange(tokens)
    live = ids != 0
    same = (ids[:, :, None] == ids[:, None, :]) & live[:, :, None] & live[:, None, :]  # SEG-1, SEG-2, SEG-5
    in_window, behind = _split(t[:, None] - t[None, :], same, window)
    # Index within the segment: live tokens of the same id that stand before (ids are contiguous, ERR-8).
    index = (same & (t[None, :] < t[:, None])).sum(-1)
    after = (same & (t[None, :] > t[:, None])).sum(-1)
    any_live = live.any(-1)
    rows = np.arange(batch)
    first = np.where(any_live, ids[rows, live.argmax(-1)] if tokens else 0, 0)
    last = np.where(any_live, ids[rows, tokens - 1 - live[:, ::-1].argmax(-1)] if tokens else 0, 0)
    folded = live & (ids == last[:, None])
    # RLA-6: index < L - max(w, 0), that is, at least max(w, 0) tokens of the segment stand after.
    folded &= False if window is None else after >= max(window, 0)
    where = index if positions is None else np.where(live, positions, 0)
    return Reads(
        live=live,
        readable=live,
        window=in_window,
        behind=behind,
        carried=live & (ids == first[:, None]),
        folded=folded,
        keeps=first == last,
        query_positions=where,
        key_positions=where,
    )


def from_cache(
    tokens: int, slots: int, window: int | None, cache_length: np.ndarray, lengths: np.ndarray | None
) -> Reads:
    """Masks of T new tokens per row behind a cache of W slots; key s < W is a slot, key W + i is new token i."""
    length = cache_length.astype(np.int64)[:, None]
    new = np.full_like(length, tokens) if lengths is None else lengths.astype(np.int64)[:, None]
    t, s = np.arange(tokens), np.arange(slots + tokens)
    live = t < new
    held = np.minimum(length, slots)
    readable = (s >= slots - held) & (s < slots + new)
    age = (t[:, None] + slots) - s[None, :]
    in_window, behind = _split(age, live[:, :, None] & readable[:, None, :], window)
    return Reads(
        live=live,
        readable=readable,
        window=in_window,
        behind=behind,
        carried=live,
        folded=readable & (s < new) if window is not None else np.zeros_like(readable),
        keeps=np.ones(len(length), bool),
        query_positions=np.where(live, length + t, 0),
        key_positions=np.where(readable, length + s - slots, 0),
    )


def next_slots(slots_after: int, slots: int, tokens: int, reads: Reads) -> tuple[np.ndarray, np.ndarray]:
    """For each slot of the cache after the call: the key that it holds, and whether it holds one. Both [B, Wnext].

    The newest key stands on the right, older ones to its left, the rest is zero-filled (EXT-4).
    """
    new = reads.readable[:, slots:].sum(-1, keepdims=True)
    source = slots + new - slots_after + np.arange(slots_after)
    inside = (source >= 0) & (source < slots + tokens)
    source = np.where(inside, source, 0)
    if not slots + tokens:
        return source, inside
    return source, inside & np.take_along_axis(reads.readable, source, -1)
