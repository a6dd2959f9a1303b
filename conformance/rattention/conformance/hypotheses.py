"""Kinds of fault, each as what a backend that has it would in effect compute.

Most are another call: a window one shorter, heads in tiled order, a missing scale. Some are the right answer, changed:
numbers flushed to zero, a state that counts twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from rattention.conformance.case import Case
from rattention.conformance.context import storage_of
from rattention.conformance.oracle import to_bits
from rattention.conformance.suspects import STATES

Change = Callable[[str, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""From an output's name, its value and its budget to what the fault makes of value and budget."""
WRONG = {"softmax": "FM-1", "relu": "FM-2", "identity": "FM-3"}
SMALLEST_NORMAL = {"float16": 2.0**-14, "bfloat16": 2.0**-126, "float32": 2.0**-126}


@dataclass
class Hypothesis:
    """A kind of fault, the clauses it breaks, the call that it amounts to, and what it changes in the answer."""

    guess: str
    clauses: tuple[str, ...]
    tensors: dict[str, np.ndarray]
    attrs: dict[str, Any]
    change: Change | None = None


def hypotheses(case: Case, outputs: set[str]) -> Iterator[Hypothesis]:
    """Known kinds of fault, for this case and the outputs of it that are wrong."""
    yield from _attributes(case, outputs)
    yield from _left_out(case, outputs)
    yield from _rotations(case)
    yield from _heads(case)
    yield from _tokens(case)
    yield from _operands(case)
    yield from _answers(case)


def _attr(case: Case, guess: str, clauses: tuple[str, ...], **changes: Any) -> Hypothesis:
    return Hypothesis(guess, clauses, dict(case.tensors), {**case.attrs, **changes})


def _swap(case: Case, guess: str, clauses: tuple[str, ...], **changes: np.ndarray | None) -> Hypothesis:
    new = {k: v for k, v in {**case.tensors, **changes}.items() if v is not None}
    return Hypothesis(guess, clauses, new, dict(case.attrs))


def _attributes(case: Case, outputs: set[str]) -> Iterator[Hypothesis]:
    """Another window, scale, eps or feature map."""
    t, a, base = case.tensors, case.attrs, case.base_op
    if "window" in a and "cache_k" not in t:
        yield from _windows(case, outputs)
    if base in ("sliding_window_attention", "rattention", "rattention_extend"):
        D = t["q"].shape[-1]
        given = a.get("scale")
        scale = D**-0.5 if given is None else given
        values = {
            "there were no scale": 1.0,
            "the scale were 1/D": 1.0 / D,
            "the scale were sqrt(D)": D**0.5,
            "the scale were 1/sqrt(Dv)": t["v"].shape[-1] ** -0.5,
            "the scale were the default": D**-0.5,
            "the scale were applied twice": scale**2,
            "the given scale multiplied the default": scale * D**-0.5,
            "the scale had the other sign": -scale,
        }
        for text, value in values.items():
            if value != scale:
                yield _attr(case, f"as if {text}", ("SWA-2",), scale=value)
        yield _attr(case, "as if weights were powers of 2, not of e", ("SWA-3", "SWA-2"), scale=scale * np.log(2.0))
    if base in ("rms_mix", "rattention", "rattention_extend"):
        for eps in (1e-8, 1e-12, 1e-5, 1e-3, 1e-6):
            if eps != a.get("eps", 1e-6):
                yield _attr(case, f"as if eps were {eps:g}", ("MIX-2",), eps=eps)
    if "feature_map" in a or base == "feature_map":
        mine = a.get("feature_map", "softmax")
        for kind in WRONG:
            if kind != mine and not {"memory", "initial_state", "cache_state"} & set(t):
                yield _attr(case, f"as if the feature map were {kind}", (WRONG[mine], WRONG[kind]), feature_map=kind)


def _windows(case: Case, outputs: set[str]) -> Iterator[Hypothesis]:
    w, T = case.attrs["window"], case.tensors["q"].shape[1]
    names = {
        "sliding_window_attention": ("SWA-1",),
        "residual_linear_attention": ("RLA-1",),
        "rattention": ("SWA-1", "RLA-1", "RAT-2"),
    }.get(case.base_op, ())
    special = {None: ("SWA-6", "RLA-9"), -1: ("SWA-5", "RLA-1"), 0: ("SWA-1", "RLA-1")}.get(w, ())
    if w is None or w == -1:
        names = tuple(label for label in special if case.base_op == "rattention" or label[:3] == names[0][:3])
    labels = tuple(dict.fromkeys((*names, *special)))
    if outputs == {"final_state"}:
        labels = ("RLA-9", "RLA-6") if w is None else ("RLA-6", "RAT-4")[: 1 + (case.base_op == "rattention")]
    if case.is_vjp:
        labels = ("GRAD-2", *labels)
    for other in dict.fromkeys((None, T, -1, 0, *((w - 1, w + 1, w // 2, 2 * w) if w is not None else ()))):
        if other != w and (other is None or other >= -1):
            yield _attr(case, f"as if the window were {other}", labels, window=other)


def _left_out(case: Case, outputs: set[str]) -> Iterator[Hypothesis]:
    """Optional tensors that are not read, or read otherwise."""
    t = case.tensors
    dropped = {
        "memory": ("RLA-5", "EXT-11") if case.base_op == "rattention_extend" else ("RLA-5",),
        "q_scale": ("RLA-3",),
        "k_scale": ("RLA-3",),
        "positions": ("ROPE-4",),
        "lengths": ("EXT-7",),
    }
    handed_on = bool(outputs) and outputs <= set(STATES)
    for name in ("initial_state", "cache_state"):
        extend = name == "cache_state"
        labels = (("EXT-5",) if extend else ("RLA-6",)) if handed_on else ("RLA-4",)
        if name in t and not (case.is_vjp and f"d_{name}" in outputs):
            zero = {name: None if not extend else np.zeros_like(t[name])}
            yield _swap(case, f"as if {name} were not {'handed on' if handed_on else 'read'}", labels, **zero)
            yield _swap(case, f"as if {name} counted twice", labels, **{name: 2 * t[name]})
    for name, clauses in dropped.items():
        if name in t and not (case.is_vjp and f"d_{name}" in outputs):
            yield _swap(case, f"as if {name} were not given", clauses, **{name: None})
    scales = {name: t[name] for name in ("q_scale", "k_scale") if name in t}
    if scales and not case.is_vjp:
        with np.errstate(all="ignore"):
            inverse = {name: (1 / x.astype(np.float64)).astype(x.dtype) for name, x in scales.items()}
        yield _swap(case, "as if q_scale and k_scale divided", ("RLA-3",), **inverse)
        one = {name: (1 + x.astype(np.float64)).astype(x.dtype) for name, x in scales.items()}
        yield _swap(case, "as if q_scale and k_scale counted from one", ("RLA-3",), **one)
        swapped = {"q_scale": t.get("k_scale"), "k_scale": t.get("q_scale")}
        yield _swap(case, "as if q_scale and k_scale were exchanged", ("RLA-3",), **swapped)
    if "swa_weight" in t and not case.is_vjp:
        swapped = {"swa_weight": t["rla_weight"], "rla_weight": t["swa_weight"]}
        yield _swap(case, "as if the two weights were exchanged", ("MIX-1",), **swapped)
        for what, at in (("head", np.s_[:1]), ("channel", np.s_[:, :1])):
            first = {n: np.broadcast_to(t[n][at], t[n].shape).copy() for n in ("swa_weight", "rla_weight")}
            yield _swap(case, f"as if the weights were those of the first {what}", ("MIX-1",), **first)


def _rotations(case: Case) -> Iterator[Hypothesis]:
    t = case.tensors
    if "rope_cos" not in t:
        return
    yield _swap(case, "as if nothing were rotated", ("ROPE-3",), rope_cos=None, rope_sin=None, positions=None)
    yield _swap(case, "as if the rotation turned the other way", ("ROPE-3",), rope_sin=-t["rope_sin"])
    swapped = {"rope_cos": t["rope_sin"], "rope_sin": t["rope_cos"]}
    yield _swap(case, "as if cos and sin were exchanged", ("ROPE-3",), **swapped)
    D = t["q"].shape[-1]
    if not case.is_vjp and D > 2:
        # Scores do not change when the channels of q and k do their places together, so neighbours brought into
        # the places of halves are rotated as neighbours.
        yield _swap(case, "as if rotary pairs were neighbours (2j, 2j+1)", ("ROPE-3",), **_channels(case, D))
    if "cache_length" in t:
        for step in (-1, 1):
            moved = t["cache_length"] + np.int32(step)
            if moved.min(initial=0) >= 0:
                yield _swap(case, "as if the cache were a token longer or shorter", ("EXT-8",), cache_length=moved)


def _channels(case: Case, D: int) -> dict[str, np.ndarray]:
    """Everything with channels of q and k, even channels first."""
    order = np.concatenate([np.arange(0, D, 2), np.arange(1, D, 2)])
    found = {n: case.tensors[n][..., order] for n in ("q", "k", "cache_k", "q_scale", "k_scale") if n in case.tensors}
    for name in ("initial_state", "cache_state", "memory"):
        if name in case.tensors:
            x = case.tensors[name]
            features = order if x.shape[-2] == D else np.concatenate([order, D + order])
            found[name] = x[..., features, :]
    return found


def _heads(case: Case) -> Iterator[Hypothesis]:
    """Query head h reading kv head h mod Hkv instead of h // G."""
    t = dict(case.tensors)
    if "q" not in t or not t["q"].shape[2] > t["k"].shape[2] > 1:
        return
    Hq, Hkv = t["q"].shape[2], t["k"].shape[2]
    G = Hq // Hkv
    order = np.arange(Hq).reshape(G, Hkv).T.reshape(-1)  # the head that stands where the tiled order puts it
    back = np.argsort(order)
    for name in ("q", "d_out"):
        if name in t:
            t[name] = t[name][:, :, order]
    for name in ("memory", "swa_weight", "rla_weight"):
        if name in t:
            t[name] = t[name][order]
    labels = {"sliding_window_attention": ("SWA-4",), "residual_linear_attention": ("RLA-8",)}
    clauses = labels.get(case.base_op, ("SWA-4", "RLA-8"))

    def reorder(name: str, value: np.ndarray, limit: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if name in ("out", "d_q"):
            return value[:, :, back], limit[:, :, back]
        per_head = name in ("d_memory", "d_swa_weight", "d_rla_weight")
        return (value[back], limit[back]) if per_head else (value, limit)

    yield Hypothesis("head order: tiled over the kv heads, not grouped", clauses, t, dict(case.attrs), reorder)
    if "memory" in t and not case.is_vjp:
        memory = case.tensors["memory"]
        for text, heads in (
            ("of kv head h // G", np.arange(Hq) // G),
            ("of the first of its group", np.arange(Hq) // G * G),
        ):
            yield _swap(case, f"as if query head h read the memory {text}", ("RLA-5",), memory=memory[heads])


def _tokens(case: Case) -> Iterator[Hypothesis]:
    if "segment_ids" not in case.tensors:
        return
    ids = case.tensors["segment_ids"]
    joined = (ids != 0).astype(ids.dtype)
    if (joined != ids).any():  # where padding tears the one segment, the call is invalid and explains nothing
        labels = {"sliding_window_attention": ("SEG-1",), "residual_linear_attention": ("SEG-2",)}
        clauses = labels.get(case.base_op, ("SEG-2", "SEG-1", "SEG-3"))
        yield _swap(case, "as if all tokens were one segment", clauses, segment_ids=joined)


def _operands(case: Case) -> Iterator[Hypothesis]:
    """Operands with fewer bits than they came with."""
    t = case.tensors
    for name in ("initial_state", "cache_state", "memory"):
        if name in t:
            rounded = {name: _bits(t[name], 8)}
            yield _swap(case, f"precision: as if {name} were rounded to bfloat16", ("NUM-3",), **rounded)
    if storage_of(case) != "float32":
        return
    groups = (("operands", ("q", "k", "v", "x", "cache_k", "cache_v", "d_out")), ("values", ("v", "cache_v")))
    for bits, text in ((11, "TF32"), (8, "bfloat16")):
        for what, names in groups:
            cut = {n: _bits(t[n], bits) for n in names if n in t}
            if cut:
                yield _swap(case, f"precision: as if {what} were rounded to {text}", ("NUM-2",), **cut)


def _answers(case: Case) -> Iterator[Hypothesis]:
    """The right call, its answer changed."""
    for dtype in dict.fromkeys((storage_of(case), "float16")):
        guess = f"subnormal numbers of {dtype} flushed to zero"
        yield Hypothesis(guess, ("NUM-1",), dict(case.tensors), dict(case.attrs), _flush(SMALLEST_NORMAL[dtype]))


def _flush(smallest: float) -> Change:
    def flush(name: str, value: np.ndarray, limit: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if value.dtype.kind != "f":
            return value, limit
        size = np.abs(value)
        # Next to the smallest normal number a rounding decides.
        either = np.abs(size - smallest) <= limit + 2.0**-10 * smallest
        return np.where(size < smallest, 0, value), np.where(either, limit + size, limit)

    return flush


def _bits(x: np.ndarray, bits: int) -> np.ndarray:
    """`x` in its own dtype, rounded to `bits` bits."""
    return to_bits(x.astype(np.float64), bits).astype(x.dtype)
