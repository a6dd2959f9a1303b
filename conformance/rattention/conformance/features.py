"""Which clauses a call exercises: those whose breach the outputs of this one call could show.

A clause counts as held where a case passed that it could have failed. A call without padding says nothing about
padding, and a window that no token has left says nothing about the state.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from rattention.conformance.strategies.build import inert_tokens, unused_slots
from rattention.spec import load

MAPS = {"softmax": "FM-1", "relu": "FM-2", "identity": "FM-3"}
ALWAYS = ("NUM-1", "BCK-2", "BCK-3", "ERR-13")
"""Held against every call that runs."""
SOFTMAX = ("sliding_window_attention", "rattention", "rattention_extend")
LINEAR = ("residual_linear_attention", "rattention", "rattention_extend")
LARGE = 100.0
"""From here on exp overflows float32 where no maximum was subtracted."""
FAR = 100
"""From here on an angle computed in float32 shows in the last place of a rotary table."""


def exercised(op: str, tensors: Mapping[str, np.ndarray], attrs: Mapping[str, Any]) -> tuple[str, ...]:
    """The clauses that agreement with the reference on this call can break, in the order of the specification."""
    base, vjp = op.removesuffix(".vjp"), op.endswith(".vjp")
    found: set[str] = set(ALWAYS)
    if base == "rope_table":
        positions = np.abs(tensors["positions"].astype(np.int64))
        found |= {"ROPE-1"} if positions.any() else set()
        found |= {"ROPE-2"} if (positions >= FAR).any() else set()
        return _ordered(found)
    if next((x.dtype.itemsize for x in tensors.values() if x.dtype.kind != "i"), 4) == 4:
        found.add("NUM-2")
    feature_map = attrs.get("feature_map", "softmax")
    if base == "feature_map":
        found |= _map(feature_map, [tensors["x"]], vjp)
        # Elsewhere features may be rounded to storage, and what they were computed in is lost in the budget.
        found |= {"FM-4"} if feature_map == "softmax" else set()
    if base == "rms_mix":
        found |= {"MIX-1", "MIX-2"}
    if base in SOFTMAX + LINEAR:
        facts = _facts(base, tensors, attrs)
        found |= _attention(base, vjp, facts, tensors, feature_map)
        # The budget of a 16-bit call has room for a 16-bit sum of few terms.
        found |= {"NUM-3"} if "NUM-2" in found and (facts.softmax > 1 or facts.folds) else set()
    if vjp:
        found |= {"GRAD-1", "GRAD-6"}
    return _ordered(found)


def among(
    op: str, tensors: Mapping[str, np.ndarray], attrs: Mapping[str, Any], labels: tuple[str, ...]
) -> tuple[str, ...]:
    """Those of `labels` that the call exercises."""
    found = exercised(op, tensors, attrs)
    return tuple(label for label in labels if label in found)


@dataclass(frozen=True)
class Facts:
    """What the window, the segments and the cache make of a call.

    window: w, None for no end. longest: tokens of the longest context, cached ones included. G, Hkv: heads.
    softmax: most tokens that one query reads in that branch. linear: whether a query reads a token in that branch.
    state: whether a query reads a state that was given. folds: whether a token is folded into the state returned.
    near, far: whether two segments of a row are close enough for the softmax branch to reach across their border, and
    far enough apart for the linear one. documents: most segments in a row. bare: a row holds padding alone.
    inert: tokens are; unused: cache slots are; dirty: these do not hold zeros alone.
    """

    window: int | None
    longest: int
    G: int
    Hkv: int
    softmax: int
    linear: bool
    state: bool
    folds: bool
    near: bool = False
    far: bool = False
    documents: int = 1
    bare: bool = False
    inert: bool = False
    unused: bool = False
    dirty: bool = False


def _facts(base: str, tensors: Mapping[str, np.ndarray], attrs: Mapping[str, Any]) -> Facts:
    window, (B, T, Hq, _), Hkv = attrs.get("window"), tensors["q"].shape, tensors["k"].shape[2]
    tokens, slots = inert_tokens(dict(tensors)), unused_slots(dict(tensors))
    runs = _runs(tensors["segment_ids"]) if "segment_ids" in tensors else [[(0, T)] if T else []] * B
    near = far = False
    for row in runs:
        for (first, end), (start, stop) in itertools.pairwise(row):
            near |= window is None or start - end + 1 <= window
            far |= window is not None and stop - 1 - first > window
    lengths = [stop - start for row in runs for start, stop in row]
    if "cache_length" in tensors:
        new = tensors.get("lengths", np.full(B, T)).astype(np.int64)
        lengths = (tensors["cache_length"].astype(np.int64) + np.where(new > 0, new, 0))[new > 0].tolist()
    longest = int(max(lengths, default=0))
    reach = longest if window is None else min(longest, window + 1)
    return Facts(
        window=window,
        longest=longest,
        G=Hq // Hkv,
        Hkv=Hkv,
        softmax=reach if base in SOFTMAX else 0,
        linear=base in LINEAR and window is not None and longest > window + 1,
        state=longest > 0 and any(n in tensors for n in ("initial_state", "memory", "cache_state")),
        folds=base in LINEAR and window is not None and longest > max(window, 0),
        near=near,
        far=far,
        documents=max(map(len, runs), default=0),
        bare="segment_ids" in tensors and T > 0 and any(not row for row in runs),
        inert=tokens is not None and bool(tokens.any()),
        unused=slots is not None and bool(slots.any()),
        dirty=_dirty(tensors, tokens, ("k", "v")) or _dirty(tensors, slots, ("cache_k", "cache_v")),
    )


def _runs(ids: np.ndarray) -> list[list[tuple[int, int]]]:
    """First token and end of each segment, row by row."""
    found = []
    for row in ids:
        edges = [0, *(np.flatnonzero(np.diff(row)) + 1).tolist(), len(row)] if len(row) else []
        found.append([(a, z) for a, z in itertools.pairwise(edges) if row[a] != 0])
    return found


def _dirty(tensors: Mapping[str, np.ndarray], where: np.ndarray | None, names: tuple[str, ...]) -> bool:
    """Whether elements that nobody may read hold anything but zeros."""
    if where is None:
        return False
    return any(bool((tensors[n].astype(np.float32)[where] != 0).any()) for n in names if n in tensors)


def _attention(base: str, vjp: bool, f: Facts, tensors: Mapping[str, np.ndarray], feature_map: str) -> set[str]:
    """Clauses of the operations with a window. A gradient shows what a state holds where a cotangent comes from it."""
    if not f.longest and not f.inert and not f.bare:
        return set()
    found: set[str] = set()
    if base in SOFTMAX:
        found |= _softmax_branch(f, tensors)
    if base in LINEAR:
        found |= _linear_branch(base, vjp, f, tensors, feature_map)
    if base in ("rattention", "rattention_extend") and f.longest:
        found |= {"MIX-1", "MIX-2", "RAT-1"}
        found |= {"RAT-2"} if f.longest > 1 else set()
        found |= {"ROPE-5"} if "rope_cos" in tensors and f.linear else set()
    if base == "rattention" and (not vjp or "d_final_state" in tensors):
        found.add("RAT-4")
    if base == "rattention_extend":
        found |= _cache(vjp, f, tensors)
    elif f.inert:
        found |= set() if vjp else {"SEG-4"}
        found |= {"SEG-5"} if f.dirty or f.softmax > 1 else set()
    if vjp:
        bounded = f.window is not None and f.longest > f.window + 1
        found |= {"GRAD-2"} if bounded or f.inert or f.documents > 1 else set()
        found |= {"GRAD-3"} if f.G > 1 else set()
        found |= {"GRAD-4"} if _carries(tensors) else set()
        found |= {"GRAD-5"} if f.inert or f.unused else set()
    return found


def _carries(tensors: Mapping[str, np.ndarray]) -> bool:
    """Whether a state or a cache goes into the call, or a cotangent of one."""
    names = ("initial_state", "cache_k", "cache_state", "d_final_state", "d_cache_state", "d_cache_k")
    return any(n in tensors and tensors[n].size for n in names)


def _softmax_branch(f: Facts, tensors: Mapping[str, np.ndarray]) -> set[str]:
    found = {"SWA-3"} if f.softmax else set()
    found |= {"SWA-1"} if f.window is not None and f.window >= 0 and f.longest else set()
    found |= {"SWA-5"} if f.window == -1 and f.longest else set()
    found |= {"SWA-6"} if f.longest > 1 and (f.window is None or f.window >= f.longest - 1) else set()
    found |= {"SWA-4"} if f.softmax and f.Hkv > 1 and f.G > 1 else set()
    if f.softmax > 1:  # over one token a softmax is 1 whatever the score
        found.add("SWA-2")
        found |= {"ROPE-3", "ROPE-4"} if "rope_cos" in tensors else set()
    if f.documents > 1:
        found |= {"SEG-1"} if f.near else set()
        found |= {"SEG-3"} if f.softmax > 1 and _restarts(tensors) else set()
    return found


def _restarts(tensors: Mapping[str, np.ndarray]) -> bool:
    """Whether default positions matter where a segment begins: under tables that turn evenly, differences alone do."""
    if "rope_cos" not in tensors or "positions" in tensors:
        return False
    angle = tensors["rope_cos"].astype(np.float64) + 1j * tensors["rope_sin"].astype(np.float64)
    step = angle[1:] * angle[:-1].conj()
    return bool(step.size) and bool((np.abs(step - step[:1]) > 0.1).any())


def _linear_branch(base: str, vjp: bool, f: Facts, tensors: Mapping[str, np.ndarray], feature_map: str) -> set[str]:
    returned = not vjp or "d_final_state" in tensors or "d_cache_state" in tensors
    found: set[str] = set()
    if f.linear or f.state:
        found |= _map(feature_map, [tensors[n] for n in ("q", "k")], vjp) | {"RLA-2"}
        found |= {"RLA-3"} if "q_scale" in tensors or ("k_scale" in tensors and f.linear) else set()
        found |= {"RLA-8"} if f.Hkv > 1 and f.G > 1 else set()
    found |= {"RLA-1"} if f.window is not None and f.longest > f.window else set()
    found |= {"RLA-4"} if "initial_state" in tensors and f.longest else set()
    found |= {"RLA-5"} if "memory" in tensors and f.longest else set()
    found |= {"RLA-6"} if base != "rattention_extend" and returned and f.longest and f.window is not None else set()
    found |= {"RLA-7"} if not vjp and f.window != -1 and not f.state and f.longest else set()
    found |= {"RLA-9"} if f.window is None and f.longest else set()
    if "segment_ids" in tensors:
        found |= {"SEG-2"} if f.far else set()
        found |= {"SEG-6"} if "initial_state" in tensors and f.documents > 1 else set()
        found |= {"SEG-7"} if f.documents > 1 and returned and f.folds else set()
        found |= {"SEG-8"} if f.bare and "initial_state" in tensors and returned else set()
    return found


def _cache(vjp: bool, f: Facts, tensors: Mapping[str, np.ndarray]) -> set[str]:
    seen, W = tensors["cache_length"], tensors["cache_k"].shape[1]
    rope = "rope_cos" in tensors
    found = {"EXT-3"} if rope and W and (seen > 0).any() else set()
    found |= {"EXT-8"} if rope and (seen > 0).any() and f.softmax > 1 else set()
    found |= {"EXT-7"} if f.inert else set()
    found |= {"EXT-9"} if f.unused and (f.dirty or f.softmax > 1) else set()
    found |= {"EXT-10"} if f.window in (None, -1) else set()
    if vjp:
        return found
    found |= {"EXT-6"}
    found |= {"EXT-4"} if W else set()
    found |= {"EXT-5"} if f.folds else set()
    found |= {"EXT-11"} if "memory" in tensors else set()
    return found


def _map(feature_map: str, inputs: list[np.ndarray], vjp: bool) -> set[str]:
    """Clauses of phi that show wherever it is used."""
    found = {MAPS[feature_map]}
    if feature_map == "softmax":
        with np.errstate(invalid="ignore"):
            found |= {"FM-5"} if any((np.abs(x.astype(np.float32)) >= LARGE).any() for x in inputs) else set()
    if feature_map == "relu" and vjp:
        found |= {"FM-6"} if any((x == 0).any() or np.isnan(x.astype(np.float32)).any() for x in inputs) else set()
    return found


def _ordered(found: set[str]) -> tuple[str, ...]:
    return tuple(label for label in load().clauses if label in found)
