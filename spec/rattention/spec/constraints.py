"""Constraints that tie several tensors together, or that need the values of integer tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from rattention.spec.errors import SpecError

INT32_MAX = 2**31 - 1


def check_shapes(op: str, given: Mapping[str, Any], attrs: Mapping[str, Any], dims: Mapping[str, int]) -> None:
    """ERR-6, ERR-7, and ERR-9 where positions follow from the shapes: need names and shapes alone."""
    if "Hkv" in dims and dims["Hq"] % dims["Hkv"]:
        raise SpecError(op, "q", f"a multiple of Hkv={dims['Hkv']} query heads", f"Hq={dims['Hq']}", "ERR-6")
    if op.startswith("rope_table"):
        return
    for one, other in (("rope_cos", "rope_sin"), ("rope_sin", "rope_cos")):
        if one in given and other not in given:
            raise SpecError(op, other, f"a tensor beside {one}", "none", "ERR-7")
    if "rope_cos" in given and dims["D"] % 2:
        raise SpecError(op, "rope_cos", "an even D to rotate in pairs", f"D={dims['D']}", "ERR-7")
    if "positions" in given and "rope_cos" not in given:
        raise SpecError(op, "positions", "rope_cos and rope_sin beside it", "none", "ERR-7")
    if "rope_cos" in given and not {"positions", "segment_ids", "cache_length"} & set(given):
        _rows_for(op, dims["T"] if dims["B"] else 0, dims)


def check_values(
    op: str, host: Mapping[str, np.ndarray], given: Mapping[str, Any], attrs: Mapping[str, Any], dims: Mapping[str, int]
) -> None:
    """ERR-8 to ERR-11: `host` holds the integer tensors that can be looked at."""
    segment_ids = host.get("segment_ids")
    if segment_ids is not None:
        _segments(op, segment_ids)
    if "lengths" in host:
        lengths = host["lengths"]
        _range(op, "lengths", lengths, 0, dims["T"], f"0 <= lengths <= T={dims['T']}", "ERR-10")
    if "cache_length" in host:
        length = host["cache_length"]
        top = INT32_MAX - dims["T"] if attrs["window"] is not None else dims["W"]
        bound = (
            f"T more than which int32 holds ({top})"
            if attrs["window"] is not None
            else f"the W={top} slots of the cache"
        )
        _range(op, "cache_length", length, 0, top, f"0 <= cache_length <= {bound}", "ERR-11")
    if "rope_cos" in given:
        _rows(op, host, segment_ids, given, dims)


def _rows(
    op: str, host: Mapping[str, np.ndarray], segment_ids: Any, given: Mapping[str, Any], dims: Mapping[str, int]
) -> None:
    """ERR-9: every row of the table that a real token reads exists."""
    rows = dims["M"]
    if "positions" in given:
        if "positions" in host and ("segment_ids" in host or "segment_ids" not in given):
            positions = host["positions"]
            live = np.ones_like(positions, bool) if segment_ids is None else segment_ids != 0
            _range(
                op,
                "positions",
                np.where(live, positions, 0) if rows else positions[live],
                0,
                rows - 1,
                f"rows 0 <= positions < M={rows}",
                "ERR-9",
            )
        return
    if "cache_length" in given:
        if "cache_length" not in host or ("lengths" in given and "lengths" not in host):
            return
        new = host["lengths"] if "lengths" in host else np.full(dims["B"], dims["T"])
        # With no new token nothing but the cached keys is rotated, and with no query neither are they.
        needed = int(np.max(np.where(new > 0, host["cache_length"].astype(np.int64) + new, 0), initial=0))
    elif segment_ids is not None:
        needed = longest_segment(segment_ids)
    else:  # no ids: check_shapes has compared T; ids that are not on the host: nobody can
        return
    _rows_for(op, needed, dims)


def _rows_for(op: str, needed: int, dims: Mapping[str, int]) -> None:
    if needed > dims["M"]:
        raise SpecError(op, "rope_cos", f"a row for each of {needed} positions", f"M={dims['M']}", "ERR-9")


def longest_segment(segment_ids: np.ndarray) -> int:
    """Tokens in the longest non-padding segment of `segment_ids [B, T]`."""
    longest = 0
    for row in segment_ids:
        live = row[row != 0]
        if live.size:
            longest = max(longest, int(np.unique(live, return_counts=True)[1].max()))
    return longest


def _segments(op: str, ids: np.ndarray) -> None:
    negative = ids < 0
    if negative.any():
        b, t = np.argwhere(negative)[0]
        raise SpecError(op, "segment_ids", "ids >= 0", f"{ids[b, t]} at [{b}, {t}]", "ERR-8")
    for b, row in enumerate(ids):
        starts = np.flatnonzero(np.diff(row, prepend=0) != 0)
        starts = starts[row[starts] != 0]
        seen, counts = np.unique(row[starts], return_counts=True)
        if (counts > 1).any():
            torn = seen[counts > 1][0]
            t = starts[row[starts] == torn][1]
            raise SpecError(op, "segment_ids", "equal ids to be contiguous", f"id {torn} again at [{b}, {t}]", "ERR-8")


def _range(op: str, name: str, values: np.ndarray, low: int, high: int, expected: str, clause: str) -> None:
    wrong = (values < low) | (values > high)
    if wrong.any():
        at = np.argwhere(wrong)[0]
        raise SpecError(op, name, expected, f"{values[tuple(at)]} at {[int(i) for i in at]}", clause)
