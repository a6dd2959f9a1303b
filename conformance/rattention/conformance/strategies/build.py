"""From a recipe to a case. Shapes come from operations.toml; only integer tensors and inert elements are special."""

from __future__ import annotations

from typing import Any

import numpy as np
from rattention.conformance.case import Case
from rattention.conformance.strategies import layouts
from rattention.conformance.strategies.callline import call_line
from rattention.conformance.strategies.recipe import Recipe
from rattention.conformance.strategies.values import DTYPES, draw, poisoned, stream
from rattention.spec import load

TOKENS = ("q", "k", "v")
CACHE = ("cache_k", "cache_v")
OPTIONS = {"rope_cos": "rope", "rope_sin": "rope", "segment_ids": "segments"}
"""Optional tensors whose option in a recipe has another name."""


def dims(recipe: Recipe) -> dict[str, int]:
    """Sizes of the free and derived dimension symbols, M aside."""
    F = recipe.D if recipe.feature_map == "identity" else 2 * recipe.D
    W = recipe.slots if recipe.window is None else max(recipe.window, 0)
    return {
        "B": recipe.B,
        "T": recipe.T,
        "Hq": recipe.Hkv * recipe.G,
        "Hkv": recipe.Hkv,
        "H": recipe.Hkv * recipe.G,
        "G": recipe.G,
        "D": recipe.D,
        "D/2": recipe.D // 2,
        "Dv": recipe.Dv,
        "F": F,
        "W": W,
        "Wnext": W if recipe.window is not None else W + recipe.T,
    }


def attributes(recipe: Recipe) -> dict[str, Any]:
    """The attributes of the call; those equal to their default are left out where the recipe says so."""
    op = load().operations[recipe.op]
    values: dict[str, Any] = {
        "window": recipe.window,
        "feature_map": recipe.feature_map,
        "scale": recipe.scale,
        "eps": recipe.eps,
        "head_dim": recipe.D,
        "theta": float(recipe.rng("theta of the table").choice([1e4, 5e5, 100.0, 1.5])),
    }
    attrs = {name: values[name] for name in op.attribute}
    if recipe.has("defaults"):
        attrs = {n: v for n, v in attrs.items() if v != op.attribute[n].default or n == "window"}
    return attrs


def integers(recipe: Recipe, tiles: tuple[int, ...] = ()) -> dict[str, np.ndarray]:
    """segment_ids, positions, cache_length and lengths, where the recipe has them."""
    size = dims(recipe)
    B, T, W = size["B"], size["T"], size["W"]
    out: dict[str, np.ndarray] = {}
    if recipe.has("segments"):
        out["segment_ids"] = layouts.segment_ids(recipe.layout, B, T, recipe.rng("segments"), tiles)
    if recipe.base_op == "rattention_extend":
        rng = recipe.rng("cache_length")
        bounded = recipe.window is None
        out["cache_length"] = layouts.cache_lengths(recipe.fill, B, W, rng, bounded=bounded, past=reach(recipe))
        if recipe.has("lengths"):
            rng = recipe.rng("lengths")
            out["lengths"] = rng.integers(0, T + 1, B, dtype=np.int32)
            # Zero, everything and something between, in turn, so that few rows still see all three.
            if B:
                out["lengths"][int(rng.integers(0, B))] = int(rng.choice([0, T, max(T - 1, 0)]))
    if recipe.has("rope") and recipe.has("positions"):
        rng = recipe.rng("positions")
        rows = table_rows(recipe, {})
        near, far = (rng.integers(low, rows, (B, T), dtype=np.int32) for low in (0, min(reach(recipe)[0], rows - 1)))
        out["positions"] = np.where(rng.random((B, T)) < 0.5, near, far)
        if T and B and rng.random() < 0.5:  # the last row of the table, or rows to spare
            out["positions"][0, 0] = rows - 1
        if "segment_ids" in out and recipe.has("poison"):
            out["positions"] = np.where(out["segment_ids"] == 0, np.int32(-7), out["positions"]).astype(np.int32)
    return out


REACH = {"far": (4097, 6000), "farther": (2**15 + 1, 2**15 + 700), "farthest": (2**24 + 1, 2**31 - 2)}
"""How far caches and positions lie, fewest and most, under the options of these names: past a table of 4096 rows, past
16-bit integers, past what float32 counts and up to the last int32."""


def reach(recipe: Recipe) -> tuple[int, int]:
    """Fewest and most tokens that a cache beyond its window has seen, or rows that positions lie beyond the tokens."""
    if recipe.has("farthest") and not recipe.has("rope"):  # no table has so many rows
        size = dims(recipe)
        return REACH["farthest"][0], REACH["farthest"][1] - size["W"] - size["T"]  # the count stays an int32
    return next((REACH[option] for option in ("farther", "far") if recipe.has(option)), (1, 40))


def table_rows(recipe: Recipe, ints: dict[str, np.ndarray]) -> int:
    """M. It follows from the signature alone, except with the option "rows": then no row is spared."""
    size = dims(recipe)
    if recipe.has("positions"):
        return 2 * size["T"] + reach(recipe)[1]
    if recipe.base_op == "rattention_extend":
        if recipe.has("rows"):
            new = ints.get("lengths", np.full(size["B"], size["T"]))
            return int(np.max(np.where(new > 0, ints["cache_length"].astype(np.int64) + new, 0), initial=0))
        return size["W"] + size["T"] + reach(recipe)[1]
    return size["T"] + (0 if recipe.has("rows") else 1)


def rope_tables(recipe: Recipe, rows: int) -> dict[str, np.ndarray]:
    """True tables of a small base, so that even neighbouring positions differ plainly; or angles without any order.

    Under true tables only differences of positions count, so those that do not restart, or start elsewhere, are right.
    A table is an input: any angle may stand at any position, and then each must be looked up where the spec says.
    """
    rng = recipe.rng("theta")
    theta = float(rng.choice([10.0, 100.0, 10000.0, np.nan]))
    if np.isnan(theta):
        angle = rng.uniform(-np.pi, np.pi, (rows, recipe.D // 2))
        return {"rope_cos": np.cos(angle), "rope_sin": np.sin(angle)}
    angle = np.arange(rows)[:, None] * theta ** (-2.0 * np.arange(recipe.D // 2) / recipe.D)
    return {"rope_cos": np.cos(angle), "rope_sin": np.sin(angle)}


def build(recipe: Recipe, tiles: tuple[int, ...] = ()) -> Case:
    """The case of a recipe; the same recipe and tiles give the same bytes.

    Inert elements (padding, tokens past `lengths`, unused slots) hold zeros, or `POISON` where the recipe says so.
    """
    op = load().operations[recipe.op]
    size = dims(recipe)
    ints = integers(recipe, tiles)
    storage = DTYPES[recipe.dtype]
    single = np.dtype(np.float32)
    weight = single if recipe.weights == "float32" else storage
    classes = {"storage": storage, "weight": weight, "float32": single}
    tensors: dict[str, np.ndarray] = {}
    table: dict[str, np.ndarray] = {}
    for t in op.tensors:
        if t.optional and not present(recipe, t.name):
            continue
        if t.name in ints:
            tensors[t.name] = ints[t.name]
        elif recipe.base_op == "rope_table":
            tensors[t.name] = _table_positions(recipe)
        elif t.name.startswith("rope_"):
            table = table or rope_tables(recipe, table_rows(recipe, ints))
            tensors[t.name] = table[t.name].astype(single if recipe.weights == "mixed" else weight)
        else:
            shape = tuple(size[s] for s in t.shape)
            values = draw(recipe.family, recipe.rng(stream(recipe.family, t.name)), shape, t.name)
            tensors[t.name] = np.ascontiguousarray(values.astype(classes[t.dtype]))
    _silence(recipe, tensors)
    case = Case(recipe.op, tensors, attributes(recipe), seed=recipe.seed)
    case.note = call_line(case, recipe)
    return case


def present(recipe: Recipe, name: str) -> bool:
    """Whether an optional tensor belongs to the recipe."""
    return recipe.has(OPTIONS.get(name, name)) and (name != "positions" or recipe.has("rope"))


def inert_tokens(tensors: dict[str, np.ndarray]) -> np.ndarray | None:
    """`[B, T]`: padding, or new tokens past `lengths`; None where the call has neither."""
    if "segment_ids" in tensors:
        return tensors["segment_ids"] == 0
    if "lengths" in tensors:
        return np.arange(tensors["q"].shape[1])[None, :] >= tensors["lengths"][:, None]
    return None


def unused_slots(tensors: dict[str, np.ndarray]) -> np.ndarray | None:
    """`[B, W]`: cache slots older than the first token of the row; None where the call has no cache."""
    if "cache_length" not in tensors:
        return None
    W = tensors["cache_k"].shape[1]
    return np.arange(W)[None, :] < W - tensors["cache_length"].astype(np.int64)[:, None]


def empty_slots(tensors: dict[str, np.ndarray], window: int | None) -> np.ndarray | None:
    """`[B, Wnext]`: slots of the cache returned by the call that no token fills; None where it has no cache."""
    if "cache_length" not in tensors:
        return None
    T, W = tensors["q"].shape[1], tensors["cache_k"].shape[1]
    new = tensors.get("lengths", np.full(tensors["q"].shape[0], T)).astype(np.int64)
    slots = W if window is not None else W + T
    return np.arange(slots)[None, :] < slots - (tensors["cache_length"].astype(np.int64) + new)[:, None]


def silence(tensors: dict[str, np.ndarray], window: int | None, *, poison: bool) -> dict[str, np.ndarray]:
    """A copy whose inert elements hold zeros, or NaN, inf and huge numbers, cotangents of inert outputs included."""
    out = dict(tensors)
    groups = (
        (("q", "k", "v", "d_out"), inert_tokens(tensors)),
        (("cache_k", "cache_v"), unused_slots(tensors)),
        (("d_cache_k", "d_cache_v"), empty_slots(tensors, window)),
    )
    for names, where in groups:
        for name in names:
            if where is not None and name in out:
                x = out[name]
                mask = where[:, :, None, None]
                out[name] = poisoned(x, where) if poison else np.where(mask, np.zeros((), x.dtype), x).astype(x.dtype)
    return out


def _silence(recipe: Recipe, tensors: dict[str, np.ndarray]) -> None:
    tensors.update(silence(tensors, recipe.window, poison=recipe.has("poison")))


def _table_positions(recipe: Recipe) -> np.ndarray:
    rng = recipe.rng("table")
    kinds = {
        "integers": lambda: np.arange(recipe.T),
        "large": lambda: rng.integers(0, 2**24, recipe.T),
        "trend": lambda: np.sort(rng.integers(0, 2**17, recipe.T)),
    }
    return kinds.get(recipe.family, lambda: rng.integers(0, 2**13, recipe.T))().astype(np.int32)
