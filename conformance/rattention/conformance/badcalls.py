"""Bad calls, built from operations.toml: a valid call with one change, which all backends refuse in the same words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rattention.conformance.strategies import Recipe, build
from rattention.conformance.strategies.values import DTYPES
from rattention.spec import BadInput, SpecError, load, validate

EVERYTHING = {
    "sliding_window_attention": ("rope", "positions", "segments"),
    "residual_linear_attention": ("segments", "q_scale", "k_scale", "memory", "initial_state"),
    "rattention": ("rope", "positions", "segments", "q_scale", "k_scale", "memory", "initial_state"),
    "rattention_extend": ("lengths", "rope", "q_scale", "k_scale", "memory"),
}


@dataclass
class BadCall:
    """A call to refuse. `target` is the tensor or attribute that was changed; `text` is what the refusal must say."""

    entry: str
    clause: str
    target: str
    op: str
    tensors: dict[str, np.ndarray]
    attrs: dict[str, Any]
    text: str
    raised_clause: str


def everything(op: str) -> tuple[str, ...]:
    """Options of a call with every optional tensor."""
    options = EVERYTHING.get(op.removesuffix(".vjp"), ())
    return options + (("d_final_state", "d_cache_k", "d_cache_v", "d_cache_state") if op.endswith(".vjp") else ())


def base_recipe(op: str, dtype: str, seed: int, options: Sequence[str] | None = None) -> Recipe:
    """A small valid call with the optional tensors that `options` name, by default every one."""
    options = everything(op) if options is None else tuple(options)
    return Recipe(op, dtype, B=2, T=4, Hkv=2, G=2, D=4, Dv=3, window=2, options=options, layout="one", seed=seed)


def base_call(
    op: str, dtype: str, seed: int, options: Sequence[str] | None = None
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Tensors and attributes of the valid call that is then spoilt."""
    case = build(base_recipe(op, dtype, seed, options))
    if "cache_length" in case.tensors:
        case.tensors["cache_length"] = np.array([1, 5], np.int32)
        if "lengths" in case.tensors:
            case.tensors["lengths"] = np.array([4, 2], np.int32)
        if "rope_cos" in case.tensors:
            angle = np.linspace(0, 3, 10)[:, None] * np.ones(2)
            case.tensors["rope_cos"] = np.cos(angle).astype(np.float32)
            case.tensors["rope_sin"] = np.sin(angle).astype(np.float32)
    if "segment_ids" in case.tensors:
        case.tensors["segment_ids"] = np.array([[3, 3, 7, 7], [0, 5, 5, 0]], np.int32)
    return case.tensors, case.attrs


def applies(entry: BadInput, op: str) -> bool:
    """Whether an entry speaks about an operation; its `.vjp` counts with it."""
    return entry.on == "*" or op.removesuffix(".vjp") in entry.on


COTANGENTS: dict[str, tuple[str, Callable[[dict[str, np.ndarray]], Any]]] = {
    "cotangent-missing": ("ERR-1", lambda t: t.pop("d_out")),
    "cotangent-rank": ("ERR-2", lambda t: t.update(d_out=t["d_out"][..., 0].copy())),
    "cotangent-tokens": ("ERR-3", lambda t: t.update(d_out=np.concatenate([t["d_out"], t["d_out"]], 1))),
    "cotangent-dtype": ("ERR-4", lambda t: t.update(d_out=t["d_out"].astype(np.float64))),
    "cotangent-unknown": ("ERR-1", lambda t: t.update(d_nothing=t["d_out"].copy())),
}
"""What a `.vjp` adds: d_out missing or of the wrong rank, shape or dtype, and a cotangent of no output."""


def bad_names(op: str) -> list[tuple[str, str]]:
    """(entry, target) of every bad call of an operation; some have nothing to change and give no call."""
    spec = load().operations[op]
    found = []
    for entry in load().bad_inputs:
        if not applies(entry, op):
            continue
        for target in entry.tensors or (entry.argument or entry.name,):
            if entry.action.startswith("unknown") or target in spec.tensor or target in spec.attribute:
                found.append((entry.id, target))
    return found + [(name, "d_out") for name in COTANGENTS if op.endswith(".vjp")]


def bad_call(
    op: str, dtype: str, seed: int, name: str, target: str, options: Sequence[str] | None = None
) -> BadCall | None:
    """One bad call with the text of the shared validation; None where the entry does not fit the operation."""
    tensors, attrs = base_call(op, dtype, seed, options)
    if name in COTANGENTS:
        clause, change = COTANGENTS[name]
        change(tensors)
    else:
        entry = next(b for b in load().bad_inputs if b.id == name)
        clause = entry.clause
        if not spoil(entry, target, tensors, attrs):
            return None
    try:
        validate(op, tensors, attrs)
    except SpecError as error:
        return BadCall(name, clause, target, op, tensors, attrs, str(error), error.clause)
    return None


def spoil(entry: BadInput, target: str, t: dict[str, np.ndarray], attrs: dict[str, Any]) -> bool:
    """Apply the entry's change in place; False where the call has nothing to change."""
    action = entry.action
    if action == "unknown":
        t[target] = np.zeros((2, 4), np.float32)
    elif action == "attribute":
        attrs[entry.name] = entry.value
    elif action == "drop_attribute":
        attrs.pop(entry.name, None)
    elif action == "unknown_attribute":
        attrs[entry.name] = 0.5
    elif action == "special":
        return SPECIAL[entry.name](t, attrs)
    elif target not in t:
        return False
    else:
        return _tensor_change(entry, target, t)
    return True


def _tensor_change(entry: BadInput, target: str, t: dict[str, np.ndarray]) -> bool:
    x, axis = t[target], entry.axis
    if entry.action == "remove":
        del t[target]
    elif entry.action == "drop_axis":
        t[target] = x[..., 0].copy()
    elif entry.action == "add_axis":
        t[target] = x[..., None].copy()
    elif entry.action == "grow":
        if axis >= x.ndim:
            return False
        t[target] = np.concatenate([x, x.take([-1], axis)], axis)
    elif entry.action == "empty_axis":
        if axis >= x.ndim:
            return False
        t[target] = x.take([], axis)
    elif entry.action == "cast":
        value = str(entry.value)
        dtype = DTYPES.get(value, np.dtype(value) if value not in DTYPES else None)
        t[target] = x.astype(dtype)
    elif entry.action == "cast_other":
        t[target] = x.astype(DTYPES["float16" if str(x.dtype) != "float16" else "bfloat16"])
    elif entry.action == "put":
        t[target] = x.copy()
        t[target].reshape(-1)[entry.index] = _number(entry.value, t)
    else:
        raise ValueError(f"operations.toml: bad input {entry.id!r} has an unknown action {entry.action!r}")
    return True


def _number(value: Any, t: dict[str, np.ndarray]) -> int:
    """A number, or a dimension symbol with an offset, such as T+1."""
    if not isinstance(value, str):
        return int(value)
    symbol, _, offset = value.partition("+")
    sizes = {"T": t["q"].shape[1] if "q" in t else 0, "M": t["rope_cos"].shape[0] if "rope_cos" in t else 0}
    return sizes[symbol] + int(offset or 0)


def _head_ratio(t: dict[str, np.ndarray], attrs: dict[str, Any]) -> bool:
    """Hq = 3 beside Hkv = 2, in every tensor that has query heads."""
    if "k" not in t:
        return False
    for name, axis in (("q", 2), ("d_out", 2), ("swa_weight", 0), ("rla_weight", 0), ("memory", 0)):
        if name in t:
            t[name] = t[name].take(range(3), axis)
    return True


def _rope_cos_alone(t: dict[str, np.ndarray], attrs: dict[str, Any]) -> bool:
    return t.pop("rope_sin", None) is not None


def _rope_odd_dim(t: dict[str, np.ndarray], attrs: dict[str, Any]) -> bool:
    """D = 3 with a table of one pair."""
    if "rope_cos" not in t or "q" not in t:
        return False
    for name in ("q", "k", "cache_k", "d_cache_k"):
        if name in t:
            t[name] = t[name][..., :3].copy()
    for name in ("q_scale", "k_scale"):
        if name in t:
            t[name] = t[name][:3].copy()
    for name in ("memory", "initial_state", "cache_state", "d_final_state", "d_cache_state"):
        if name in t:
            t[name] = t[name][..., :6, :].copy()
    for name in ("rope_cos", "rope_sin"):
        t[name] = t[name][:, :1].copy()
    return True


def _positions_alone(t: dict[str, np.ndarray], attrs: dict[str, Any]) -> bool:
    return t.pop("rope_cos", None) is not None and t.pop("rope_sin", None) is not None


def _segments_torn(t: dict[str, np.ndarray], attrs: dict[str, Any]) -> bool:
    """The same id on both sides of another segment."""
    if "segment_ids" not in t:
        return False
    t["segment_ids"] = np.array([[1, 1, 2, 1], [4, 4, 4, 4]], np.int32)
    return True


def _table_too_short(t: dict[str, np.ndarray], attrs: dict[str, Any]) -> bool:
    """One row fewer than the longest row of tokens reads; default positions, where there is a choice."""
    if "rope_cos" not in t:
        return False
    t.pop("positions", None)
    rows = 3
    if "segment_ids" in t:
        t["segment_ids"] = np.array([[1, 1, 1, 1], [0, 2, 2, 2]], np.int32)
    if "cache_length" in t:
        rows = int(np.max(t["cache_length"] + t.get("lengths", t["q"].shape[1]))) - 1
    t["rope_cos"], t["rope_sin"] = t["rope_cos"][:rows].copy(), t["rope_sin"][:rows].copy()
    return True


def _cache_length_past_slots(t: dict[str, np.ndarray], attrs: dict[str, Any]) -> bool:
    """Window None, where every token has a slot: three tokens in two slots."""
    if "cache_length" not in t:
        return False
    attrs["window"] = None
    t["cache_length"] = np.array([1, 3], np.int32)
    for name in ("d_cache_k", "d_cache_v"):
        if name in t:
            extra = np.zeros((t[name].shape[0], t["q"].shape[1], *t[name].shape[2:]), t[name].dtype)
            t[name] = np.concatenate([t[name], extra], 1)
    return True


SPECIAL: dict[str, Callable[[dict[str, np.ndarray], dict[str, Any]], bool]] = {
    "head_ratio": _head_ratio,
    "rope_cos_alone": _rope_cos_alone,
    "rope_odd_dim": _rope_odd_dim,
    "positions_alone": _positions_alone,
    "segments_torn": _segments_torn,
    "table_too_short": _table_too_short,
    "cache_length_past_slots": _cache_length_past_slots,
}
"""The named constructions that operations.toml calls `special`."""
