"""Which clauses a call exercises, and which of them a failure points at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from rattention.spec import load

MAPS = {"softmax": "FM-1", "relu": "FM-2", "identity": "FM-3"}


def exercised(op: str, tensors: Mapping[str, np.ndarray], attrs: Mapping[str, Any]) -> tuple[str, ...]:
    """Every clause that agreement with the reference on this call speaks about, in the order of the specification."""
    base = op.removesuffix(".vjp")
    found = {"NUM-1", "BCK-2", "BCK-3", "ERR-13"}
    storage = next((str(x.dtype) for x in tensors.values() if x.dtype.kind != "i"), "float32")
    found.add("NUM-2" if storage == "float32" else "NUM-3")
    feature_map = attrs.get("feature_map", "softmax")
    if base == "rope_table":
        return _ordered({"ROPE-1", "ROPE-2", "NUM-1"})
    if base == "feature_map":
        found |= {MAPS[feature_map], "FM-4"} | ({"FM-5"} if feature_map == "softmax" else set())
    if op.endswith(".vjp") and feature_map == "relu" and base in ("feature_map", "residual_linear_attention"):
        found.add("FM-6")
    if base == "rms_mix":
        found |= {"MIX-1", "MIX-2"}
    if base in ("sliding_window_attention", "rattention", "rattention_extend"):
        found |= _softmax_branch(tensors, attrs, base)
    if base in ("residual_linear_attention", "rattention", "rattention_extend"):
        found |= _linear_branch(tensors, attrs, base)
    if base in ("rattention", "rattention_extend"):
        found |= {"MIX-1", "MIX-2", "RAT-1", "RAT-2", "RAT-3"}
        found |= {"ROPE-5"} if "rope_cos" in tensors else set()
    if base == "rattention":
        found.add("RAT-4")
    if base == "rattention_extend":
        found |= {"EXT-3", "EXT-4", "EXT-5", "EXT-6", "EXT-9", "EXT-10"}
        found |= {"EXT-7"} if "lengths" in tensors else set()
        found |= {"EXT-8"} if "rope_cos" in tensors else set()
        found |= {"EXT-11"} if "memory" in tensors else set()
    if op.endswith(".vjp"):
        found |= {"GRAD-1", "GRAD-2", "GRAD-6"}
        found |= {"GRAD-3"} if _group(tensors) > 1 else set()
        carried = ("initial_state", "cache_k", "d_final_state", "d_cache_state", "d_cache_k")
        found |= {"GRAD-4"} if any(n in tensors for n in carried) else set()
        inert = "lengths" in tensors or bool((tensors.get("segment_ids", np.ones(1)) == 0).any())
        found |= {"GRAD-5"} if inert or "cache_k" in tensors else set()
    return _ordered(found)


def _group(tensors: Mapping[str, np.ndarray]) -> int:
    return tensors["q"].shape[2] // tensors["k"].shape[2] if "q" in tensors and "k" in tensors else 1


def _softmax_branch(tensors: Mapping[str, np.ndarray], attrs: Mapping[str, Any], base: str) -> set[str]:
    window, T = attrs.get("window"), tensors["q"].shape[1]
    found = {"SWA-1", "SWA-2", "SWA-3"}
    found |= {"SWA-4"} if tensors["q"].shape[2] > 1 else set()
    found |= {"SWA-5"} if window == -1 else set()
    found |= {"SWA-6"} if window is None or window >= T - 1 else set()
    if "rope_cos" in tensors:
        found |= {"ROPE-3", "ROPE-4"}
    if "segment_ids" in tensors:
        found |= {"SEG-1", "SEG-4", "SEG-5"}
        found |= {"SEG-3"} if "rope_cos" in tensors and "positions" not in tensors else set()
    return found


def _linear_branch(tensors: Mapping[str, np.ndarray], attrs: Mapping[str, Any], base: str) -> set[str]:
    window = attrs.get("window")
    found = {"RLA-1", "RLA-2", "RLA-6", MAPS[attrs.get("feature_map", "softmax")], "FM-4"}
    found |= {"RLA-3"} if "q_scale" in tensors or "k_scale" in tensors else set()
    found |= {"RLA-4"} if "initial_state" in tensors or "cache_state" in tensors else {"RLA-7"}
    found |= {"RLA-5"} if "memory" in tensors else set()
    found |= {"RLA-8"} if tensors["q"].shape[2] > 1 else set()
    found |= {"RLA-9"} if window is None else set()
    if "segment_ids" in tensors:
        ids = tensors["segment_ids"]
        found |= {"SEG-2", "SEG-4", "SEG-5", "SEG-7"}
        found |= {"SEG-6"} if "initial_state" in tensors else set()
        found |= {"SEG-8"} if ids.size and (ids == 0).all(1).any() else set()
    return found


def _ordered(found: set[str]) -> tuple[str, ...]:
    return tuple(label for label in load().clauses if label in found)
