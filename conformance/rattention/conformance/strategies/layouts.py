"""Where segments, padding, cached tokens and positions lie."""

from __future__ import annotations

import itertools

import numpy as np

LAYOUTS = ("one", "pair", "tile", "many", "left", "right", "middle", "both", "dense", "empty", "mixed")
FILLS = ("empty", "partial", "full", "beyond", "mixed")


def segment_ids(layout: str, B: int, T: int, rng: np.random.Generator, tiles: tuple[int, ...] = ()) -> np.ndarray:
    """`[B, T]` int32: non-zero ids contiguous, 0 padding; "mixed" gives each row a layout of its own."""
    rows = np.zeros((B, T), np.int32)
    for b in range(B):
        kind = str(rng.choice([k for k in LAYOUTS if k != "mixed"])) if layout == "mixed" else layout
        # A batch of padding alone tests little: with several rows, one of them is empty.
        if layout == "empty" and B > 1 and b != rng.integers(0, B):
            kind = "many"
        rows[b] = _row(kind, T, rng, tiles)
    return rows


def _row(kind: str, T: int, rng: np.random.Generator, tiles: tuple[int, ...]) -> np.ndarray:
    row = np.zeros(T, np.int32)
    if T == 0 or kind == "empty":
        return row
    begin = end = 0
    if kind in ("left", "both"):
        begin = int(rng.integers(1, max(2, T // 2 + 1)))
    if kind in ("right", "both"):
        end = int(rng.integers(1, max(2, T // 3 + 1)))
    begin, end = min(begin, T), max(T - end, min(begin, T))
    live = end - begin
    if kind in ("one",) or live <= 1:
        cuts = np.array([], int)
    elif kind == "dense":
        # Documents of one to three tokens: dozens in a row, many of them shorter than any window.
        cuts = begin + np.cumsum(rng.integers(1, 4, live))
        cuts = cuts[cuts < end]
    elif kind == "tile":
        borders = [c + d for t in tiles or (4, 8) for c in range(t, T, t) for d in (-1, 0, 1) if 0 < c + d < T]
        cuts = np.unique(rng.choice(borders or [T // 2], min(3, max(1, len(borders)))))
    elif kind == "pair" or kind in ("left", "right"):
        cuts = rng.integers(1, live, 1) + begin
    else:
        count = int(rng.integers(2, max(3, min(6, live)) + 1))
        cuts = np.unique(rng.integers(1, live, count)) + begin
    # Ids need not grow: 7 then 3 is legal, and the same id may stand in every row.
    ids = rng.permutation(np.arange(1, len(cuts) + 2)) * int(rng.choice([1, 1, 256, 65536]))
    if rng.integers(0, 4) == 0:
        ids = ids + 2**24  # neighbours that float32 cannot tell apart
    edges = [begin, *cuts.tolist(), end]
    for i, (a, z) in enumerate(itertools.pairwise(edges)):
        row[a:z] = ids[i]
        if kind == "middle" and i and z - a > 1:
            row[a : a + int(rng.integers(1, z - a))] = 0
    if kind == "middle" and not (row == 0).any():
        row[rng.integers(0, T)] = 0
        row = _mend(row)
    return row


def _mend(row: np.ndarray) -> np.ndarray:
    """New ids for the halves of a segment that padding has cut in two."""
    out, fresh = row.copy(), int(row.max()) + 1
    starts = np.flatnonzero(np.diff(row, prepend=0) != 0)
    seen: set[int] = set()
    for start in starts:
        value = int(row[start])
        if value == 0:
            continue
        if value in seen:
            stop = start
            while stop < len(row) and row[stop] == value:
                stop += 1
            out[start:stop] = fresh
            fresh += 1
        seen.add(value)
    return out


def index_in_segment(ids: np.ndarray) -> np.ndarray:
    """`[B, T]`: how many tokens of its own segment stand before each token; 0 at padding."""
    out = np.zeros(ids.shape, np.int64)
    for b, row in enumerate(ids):
        count = 0
        for t, value in enumerate(row):
            count = count + 1 if t and value == row[t - 1] else 0
            out[b, t] = count if value else 0
    return out


def cache_lengths(
    fill: str, B: int, W: int, rng: np.random.Generator, *, bounded: bool, past: tuple[int, int] = (1, 40)
) -> np.ndarray:
    """`[B]` int32: tokens seen so far. `bounded`: window None, where the cache holds them all.

    past: the fewest and the most tokens beyond the slots of a cache that has seen more than it holds.
    """
    choices = {
        "empty": lambda: 0,
        "partial": lambda: int(rng.integers(1, W)) if W > 1 else 0,
        "full": lambda: W,
        "beyond": lambda: W if bounded else W + int(rng.integers(past[0], past[1] + 1)),
    }
    out = []
    for b in range(B):
        kind = fill if fill != "mixed" else ("empty", "partial", "full", "beyond")[(b + int(rng.integers(0, 4))) % 4]
        out.append(min(choices[kind](), W) if bounded else choices[kind]())
    return np.array(out, np.int32).reshape(B)
