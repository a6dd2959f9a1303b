"""Which clauses could have made an output of a call wrong: those whose conditions the call meets.

A call without segments cannot break a clause about segments, one with a single key/value head cannot mix up the order
of heads, and `cache_length` does not depend on the softmax. This is finer than what a right answer tells of a clause
(`features.exercised`): it serves to find the likeliest clause of a fault, and never counts a clause as held.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

import numpy as np
from rattention.conformance.case import Case
from rattention.conformance.features import MAPS
from rattention.conformance.strategies import Recipe, build

SOFTMAX = ("sliding_window_attention", "rattention", "rattention_extend")
LINEAR = ("residual_linear_attention", "rattention", "rattention_extend")
STATES = ("final_state", "cache_state")
PRECISION = ("NUM-2", "NUM-3", "FM-4", "RAT-3", "ROPE-2")
"""Clauses about roundings: none of them makes a number wrong by more than a few percent."""
SLIGHT = 2.0**-8
"""The largest error, in units of the largest value, that a rounding to 16 bits makes."""
ROUGH = 2.0**-5
"""The same of many roundings."""
PARAMETERS = {
    "d_q_scale": "RLA-3",
    "d_k_scale": "RLA-3",
    "d_memory": "RLA-5",
    "d_initial_state": "RLA-4",
    "d_swa_weight": "MIX-1",
    "d_rla_weight": "MIX-1",
}
EXP_OVERFLOWS = 80.0
"""Inputs of a softmax past which exp without the maximum subtracted overflows float32, or nearly so."""


@dataclass(frozen=True)
class Call:
    """What the conditions ask about: the call's tensors, attributes and what follows from them."""

    base: str
    t: Mapping[str, np.ndarray]
    a: Mapping[str, Any]
    half: bool  # 16-bit storage

    @property
    def window(self) -> int | None:
        return self.a.get("window")

    @property
    def keys(self) -> int:
        return self.t["q"].shape[1] + (self.t["cache_k"].shape[1] if "cache_k" in self.t else 0)

    @property
    def shared(self) -> bool:
        """Whether query heads share key/value heads."""
        return self.t["q"].shape[2] > self.t["k"].shape[2]

    @property
    def heads(self) -> bool:
        """Whether there is another key/value head to read."""
        return self.t["k"].shape[2] > 1

    @property
    def packed(self) -> bool:
        """Whether some row holds several segments."""
        ids = self.t.get("segment_ids")
        return ids is not None and any(len(set(row[row != 0].tolist())) > 1 for row in ids)

    @property
    def padded(self) -> bool:
        return "segment_ids" in self.t and bool((self.t["segment_ids"] == 0).any())

    @property
    def cached(self) -> bool:
        return "cache_k" in self.t

    @property
    def unused(self) -> bool:
        """Whether some cache slot holds no token."""
        return self.cached and bool((self.t["cache_length"] < self.t["cache_k"].shape[1]).any())

    @property
    def large(self) -> bool:
        """Whether exp of what phi reads, or of a score, may overflow."""
        sizes = [np.abs(self.t[n].astype(np.float64)).max(initial=0.0) for n in ("x", "q", "k") if n in self.t]
        return bool(np.nanmax([0.0, *sizes]) > EXP_OVERFLOWS)


def suspects(case: Case, output: str) -> frozenset[str]:
    """Clauses whose breach could have made `output` wrong; of any output where it is empty."""
    storage = next((x.dtype for n, x in case.tensors.items() if n in ("q", "x", "swa")), np.dtype(np.float32))
    call = Call(case.base_op, case.tensors, case.attrs, storage.itemsize == 2)
    if not case.is_vjp:
        return frozenset(_named(_forward(call, output)))
    forward = {label for label in _named(_forward(call, "out")) if not label.startswith("EXT")}
    own = {PARAMETERS[output]} if output in PARAMETERS else set()
    return frozenset({*_named(_gradient(call, output)), *forward, *own})


@cache
def plain(op: str, output: str) -> frozenset[str]:
    """Suspects of the simplest calls of an operation, of any window and feature map: no option is needed for them."""
    found: set[str] = set()
    for window, feature_map in product((1, None, -1), MAPS):
        case = build(Recipe(op, window=window, feature_map=feature_map, fill="beyond"))
        found |= suspects(case, output)
    return frozenset(found)


def _named(conditions: Mapping[str, bool]) -> set[str]:
    return {label for label, met in conditions.items() if met}


def _forward(c: Call, output: str) -> dict[str, bool]:
    found = {"NUM-1": True, "NUM-2": not c.half, "NUM-3": True}
    if c.base == "rope_table":
        return {"NUM-1": True, "ROPE-1": True, "ROPE-2": True}
    if c.base == "feature_map":
        return found | _map(c)
    if c.base == "rms_mix":
        zero = any((c.t[name] == 0).all(-1).any() for name in ("swa", "rla"))
        return found | {"MIX-1": True, "MIX-2": True, "MIX-3": zero}
    if c.cached:
        found |= _extension(c, output)
    if output in ("", "out"):
        found |= _softmax(c) if c.base in SOFTMAX else {}
        found |= _linear(c) if c.base in LINEAR else {}
        found |= {"SEG-4": c.padded, "SEG-5": c.padded}
        if c.base in SOFTMAX and c.base in LINEAR:
            empty = c.window is not None and c.window < 0
            found |= {"MIX-1": True, "MIX-2": True, "MIX-3": empty, "RAT-1": True, "RAT-2": True, "RAT-3": c.half}
            found |= {"ROPE-5": "rope_cos" in c.t}
    if output in ("", *STATES):
        found |= _state(c)
    return found


def _map(c: Call) -> dict[str, bool]:
    kind = c.a.get("feature_map", "softmax")
    return {MAPS[kind]: True, "FM-4": c.half and kind != "identity", "FM-5": kind == "softmax" and c.large}


def _softmax(c: Call) -> dict[str, bool]:
    w, T, rope = c.window, c.t["q"].shape[1], "rope_cos" in c.t
    full = w is None or w >= c.keys - 1
    return {
        "SWA-1": w is not None and w >= 0,
        "SWA-2": w != -1 and c.keys > 1 and (c.t["q"].shape[3] > 1 or c.a.get("scale") is not None),
        "SWA-3": w != -1,
        "SWA-4": w != -1 and c.heads,
        "SWA-5": w == -1,
        "SWA-6": full and T > 1,
        "ROPE-3": rope and w != -1,
        "ROPE-4": "positions" in c.t and w != -1,
        "SEG-1": c.packed and w != -1,
        "SEG-3": c.packed and rope and "positions" not in c.t,
    }


def _linear(c: Call) -> dict[str, bool]:
    w = c.window
    state = "initial_state" in c.t or "cache_state" in c.t
    return {
        "RLA-1": w is not None,
        "RLA-2": w is not None or state or "memory" in c.t,
        "RLA-3": "q_scale" in c.t or "k_scale" in c.t,
        "RLA-4": state,
        "RLA-5": "memory" in c.t,
        "RLA-7": not state and "memory" not in c.t,
        "RLA-8": c.heads,
        "RLA-9": w is None,
        "SEG-2": c.packed,
        "SEG-6": (c.packed or c.padded) and "initial_state" in c.t,
        **_map(c),
    }


def _state(c: Call) -> dict[str, bool]:
    state = "initial_state" in c.t
    return {
        "RLA-3": "k_scale" in c.t,
        "RLA-6": not c.cached,
        "RLA-8": c.heads,
        "RLA-9": c.window is None and not c.cached,
        "RAT-4": c.base == "rattention",
        "SEG-5": c.padded,
        "SEG-6": (c.packed or c.padded) and state,
        "SEG-7": c.packed or c.padded,
        "SEG-8": c.padded and bool((c.t["segment_ids"] == 0).all(1).any()),
        **_map(c),
    }


def _extension(c: Call, output: str) -> dict[str, bool]:
    lengths, whole = "lengths" in c.t, c.window in (None, -1)
    seen = bool((c.t["cache_length"] > 0).any())
    every = {
        "out": {"EXT-1": seen, "EXT-2": not seen, "EXT-8": "rope_cos" in c.t, "EXT-9": c.unused},
        "cache_k": {"EXT-3": "rope_cos" in c.t, "EXT-4": True, "EXT-9": c.unused, "EXT-10": whole},
        "cache_v": {"EXT-4": True, "EXT-9": c.unused, "EXT-10": whole},
        "cache_state": {"EXT-5": True, "EXT-9": c.unused, "EXT-11": "memory" in c.t, "EXT-10": whole},
        "cache_length": {"EXT-6": True},
    }
    found = {"EXT-7": lengths, "EXT-10": c.window is None}
    for name, conditions in every.items():
        if output in ("", name):
            found |= {label: met or found.get(label, False) for label, met in conditions.items()}
    return found


def _gradient(c: Call, output: str) -> dict[str, bool]:
    T = c.t["q"].shape[1] if "q" in c.t else 0
    bounded = "window" in c.a and (c.window is not None and c.window < T - 1)
    carried = {"initial_state", "cache_k", "cache_state", "d_final_state", "d_cache_state", "d_cache_k", "d_cache_v"}
    sources = [c.t[n] for n in ("x", "q", "k") if n in c.t]
    corner = c.a.get("feature_map") == "relu" and any((x == 0).any() for x in sources)
    return {
        "NUM-1": True,
        "GRAD-1": True,
        "GRAD-2": bounded or c.packed or c.padded,
        "GRAD-3": "q" in c.t and c.shared and output not in ("d_q", "d_memory"),
        "GRAD-4": bool(carried & set(c.t)),
        "GRAD-5": c.padded or c.unused or "lengths" in c.t,
        "FM-6": corner,
    }
