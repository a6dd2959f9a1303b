"""Random calls for the tests of the reference, as a fixture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from rattention.spec import load

SEQUENCE_OPERATIONS = (
    "sliding_window_attention",
    "residual_linear_attention",
    "rattention",
    "rattention_extend",
)


@dataclass
class Draw:
    """One call: operation, tensors, attributes."""

    op: str
    tensors: dict[str, np.ndarray]
    attrs: dict[str, Any]


def storage(x: np.ndarray, dtype: str) -> np.ndarray:
    return x.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def segments(rng: np.random.Generator, batch: int, tokens: int) -> np.ndarray:
    """Ragged segments, padding on either side and between them, now and then a row of padding alone."""
    ids = np.zeros((batch, tokens), np.int32)
    for row in ids:
        at, name = int(rng.integers(0, 3)), 0
        while at < tokens and rng.random() < 0.9:
            length = int(rng.integers(1, tokens + 1))
            name += int(rng.integers(1, 4))
            row[at : at + length] = name
            at += length + int(rng.integers(0, 3)) * int(rng.random() < 0.5)
    return ids


def draw(
    rng: np.random.Generator, op: str, dtype: str = "float64", *, tokens: int | None = None, options: float = 0.5
) -> Draw:
    """A random valid call of `op` (or its `.vjp`); each optional tensor is present with probability `options`."""
    spec = load().operations[op]
    base = op.removesuffix(".vjp")
    B = int(rng.choice([1, 1, 2, 3, 0], p=[0.3, 0.3, 0.25, 0.1, 0.05]))
    T = tokens
    if T is None:
        T = int(rng.choice([0, 1, 2, 3, 5, 8, 13], p=[0.04, 0.08, 0.1, 0.15, 0.25, 0.23, 0.15]))
    B = max(B, 1) if tokens is not None else B
    N, G = int(rng.choice([1, 2])), int(rng.choice([1, 2, 3, 8], p=[0.35, 0.3, 0.2, 0.15]))
    D, Dv = int(rng.choice([2, 4, 6, 8])), int(rng.choice([1, 3, 4, 5]))
    if tokens is not None and tokens > 16:
        D, Dv = int(rng.choice([16, 32, 64])), int(rng.choice([16, 40, 64]))
    kind = str(rng.choice(["softmax", "relu", "identity"], p=[0.5, 0.25, 0.25]))
    window = [None, -1, 0, 1, max(T - 1, 0), T, T + 1, int(rng.integers(0, max(T, 1) + 1))][int(rng.integers(0, 8))]
    W = int(rng.integers(0, 6)) if window is None else max(window, 0)
    M = W + 2 * T + 24
    dims = {"B": B, "T": T, "Hq": N * G, "Hkv": N, "H": N * G, "D": D, "Dv": Dv, "M": M, "D/2": D // 2, "W": W}
    dims["F"] = D if kind == "identity" else 2 * D
    dims["Wnext"] = W if window is not None else W + T

    state = "float64" if dtype == "float64" else "float32"
    tensors: dict[str, np.ndarray] = {}
    for t in spec.tensors:
        if t.optional and rng.random() >= options:
            continue
        shape = tuple(dims[s] for s in t.shape)
        kind_of = {"storage": dtype, "weight": state, "float32": state}.get(t.dtype)
        if kind_of is not None:
            shift = rng.choice([0.0, 0.5]) if t.name.startswith(("v", "cache_v")) else 0.0
            tensors[t.name] = storage(rng.standard_normal(shape) + shift, kind_of)
    if "rope_cos" in tensors or "rope_sin" in tensors:
        angle = rng.uniform(0, 6.3, (M, D // 2))
        tensors |= {"rope_cos": storage(np.cos(angle), state), "rope_sin": storage(np.sin(angle), state)}
        if base in ("sliding_window_attention", "rattention") and rng.random() < options:
            tensors["positions"] = rng.integers(0, M, (B, T)).astype(np.int32)
    if "segment_ids" in spec.tensor and rng.random() < options:
        tensors["segment_ids"] = segments(rng, B, T)
    if base == "rattention_extend":
        top = W + 9 if window is not None else W
        tensors["cache_length"] = rng.integers(0, top + 1, B).astype(np.int32)
        if rng.random() < options:
            tensors["lengths"] = rng.integers(0, T + 1, B).astype(np.int32)
    if base == "rope_table":
        tensors["positions"] = rng.integers(-5, 10_000, M).astype(np.int32)

    attrs: dict[str, Any] = {}
    for a in spec.attributes:
        if a.name == "window":
            attrs["window"] = window
        elif a.name == "feature_map":
            attrs["feature_map"] = kind
        elif a.name == "scale":
            attrs["scale"] = [None, None, 1.0, -0.3, 0.0][int(rng.integers(0, 5))]
        elif a.name == "eps":
            attrs["eps"] = float(rng.choice([1e-6, 1e-3]))
        elif a.name == "head_dim":
            attrs |= {"head_dim": D, "theta": float(rng.choice([10000.0, 7.0]))}
    return Draw(op, tensors, attrs)


@pytest.fixture
def draw_call():
    """The function `draw`."""
    return draw


@pytest.fixture(scope="session")
def operations() -> tuple[str, ...]:
    """Every operation and every vjp."""
    return tuple(load().operations)
