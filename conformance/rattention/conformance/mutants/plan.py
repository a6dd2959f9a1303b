"""Who reads whom: one description of a call that serves packed rows, padding and the cache alike.

Keys are the cached tokens followed by the new ones, queries the new ones. Every token has a document, an index in it, a
row of the rotary table, and a flag that says whether it is live; the masks of both branches follow from these alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from rattention.spec import Call


@dataclass
class Plan:
    """All arrays lead with the batch. A document number of -1 is padding."""

    slots: int  # W, keys that come from the cache
    document: np.ndarray  # [B, W+T]
    index: np.ndarray  # [B, W+T], position inside the document
    rope_row: np.ndarray  # [B, W+T]
    live: np.ndarray  # [B, W+T] bool
    reads_state: np.ndarray  # [B, T] bool: the query reads the carried state
    carries_state: np.ndarray  # [B] bool: the returned state contains the carried one
    folds: np.ndarray  # [B, W+T] bool: the returned state contains this token
    keeps: np.ndarray  # [B, Wnext] index into the keys, -1 for an empty slot
    length: np.ndarray  # [B] tokens seen after the call

    @property
    def query_live(self) -> np.ndarray:
        return self.live[:, self.slots :]

    def distance(self) -> np.ndarray:
        """Query index minus key index, [B, T, W+T]."""
        return self.index[:, self.slots :, None] - self.index[:, None, :]

    def same(self) -> np.ndarray:
        """Query and key are live and of one document, [B, T, W+T]."""
        query = self.document[:, self.slots :, None]
        return (query == self.document[:, None, :]) & self.query_live[:, :, None] & self.live[:, None, :]


def from_segments(call: Call, tensors: Mapping[str, np.ndarray]) -> Plan:
    """The plan of a call without a cache: SEG-1 to SEG-8, RLA-6, ROPE-4."""
    B, T = call.dims["B"], call.dims["T"]
    window = call.attributes.get("window")
    ids = np.asarray(tensors["segment_ids"]) if "segment_ids" in tensors else np.ones((B, T), np.int64)
    document = np.full((B, T), -1)
    index = np.zeros((B, T), np.int64)
    reads = np.zeros((B, T), bool)
    carries = np.ones(B, bool)
    folds = np.zeros((B, T), bool)
    for b, row in enumerate(ids):
        names = list(dict.fromkeys(row[row != 0].tolist()))
        for number, name in enumerate(names):
            where = np.flatnonzero(row == name)
            document[b, where] = number
            index[b, where] = np.arange(where.size)
            reads[b, where] = number == 0
            if number == len(names) - 1 and window is not None:
                folds[b, where[: max(where.size - max(window, 0), 0)]] = True
        carries[b] = len(names) <= 1
    rows = np.asarray(tensors["positions"]) if "positions" in tensors else index
    live = document >= 0
    length = live.sum(1)
    return Plan(0, document, index, rows, live, reads, carries, folds, np.zeros((B, 0), np.int64), length)


def from_cache(call: Call, tensors: Mapping[str, np.ndarray]) -> Plan:
    """The plan of a continuation: EXT-4 to EXT-10."""
    B, T, W, after = (call.dims[name] for name in ("B", "T", "W", "Wnext"))
    window = call.attributes["window"]
    seen = np.asarray(tensors["cache_length"]).astype(np.int64)
    new = np.asarray(tensors["lengths"]).astype(np.int64) if "lengths" in tensors else np.full(B, T)
    key = np.arange(W + T)
    index = seen[:, None] - W + key
    live = (index >= 0) & (key < W + new[:, None])
    total = seen + new
    folds = live & (index < (total - W)[:, None]) if window is not None else np.zeros_like(live)
    keeps = np.arange(after) + (W + new)[:, None] - after
    at = np.clip(keeps, 0, max(W + T - 1, 0))
    filled = (keeps >= 0) & (np.take_along_axis(live, at, 1) if W + T else False)
    keeps = np.where(filled, keeps, -1)
    return Plan(
        slots=W,
        document=np.where(live, 0, -1),
        index=index,
        rope_row=np.maximum(index, 0),
        live=live,
        reads_state=live[:, W:],
        carries_state=np.ones(B, bool),
        folds=folds,
        keeps=keeps,
        length=total,
    )
