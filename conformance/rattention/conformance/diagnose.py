"""Which clause a wrong number points at: hypotheses that are tried, and what is left in the minimal case.

A hypothesis is another call, one that a backend with a known kind of fault would in effect compute: a window one
shorter, heads in tiled order, a missing scale. Where the reference's answer to that call explains what the backend
returned, and the answer to the right call does not, the fault has a name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from rattention.conformance.case import Case
from rattention.conformance.context import Broken, Context, Refused, storage_of
from rattention.conformance.judge import Violation, compare_one
from rattention.conformance.strategies import Recipe

Arrays = Mapping[str, np.ndarray]


@dataclass
class Hypothesis:
    """A kind of fault, the clauses it breaks, and the call that it amounts to."""

    guess: str
    clauses: tuple[str, ...]
    tensors: dict[str, np.ndarray]
    attrs: dict[str, Any]
    heads: np.ndarray | None = None  # order in which the query heads of the answer come out


def hypotheses(case: Case) -> Iterator[Hypothesis]:
    """Calls that known kinds of fault amount to, for this case."""
    t, a = dict(case.tensors), dict(case.attrs)

    def attr(guess: str, clauses: tuple[str, ...], **changes: Any) -> Hypothesis:
        return Hypothesis(guess, clauses, t, {**a, **changes})

    def swap(guess: str, clauses: tuple[str, ...], **changes: np.ndarray | None) -> Hypothesis:
        new = {k: v for k, v in {**t, **changes}.items() if v is not None}
        return Hypothesis(guess, clauses, new, a)

    base, vjp = case.base_op, case.is_vjp
    if "window" in a and "cache_k" not in t:
        yield from _windows(case, attr)
    if "scale" in a or base in ("sliding_window_attention", "rattention", "rattention_extend"):
        D = t["q"].shape[-1]
        for value, text in ((1.0, "no scale"), (1.0 / D, "scale 1/D"), (D**0.5, "scale sqrt(D)"), (D**-0.5, "default")):
            yield attr(f"scale: as if the scores had {text}", ("SWA-2",), scale=value)
    if "eps" in case.attrs or base in ("rms_mix", "rattention", "rattention_extend"):
        for eps in (1e-8, 1e-12, 1e-5, 1e-3, 1e-6):
            yield attr(f"scale: as if eps were {eps:g}", ("MIX-2",), eps=eps)
    if "feature_map" in a or base == "feature_map":
        for kind, label in (("softmax", "FM-1"), ("relu", "FM-2"), ("identity", "FM-3")):
            if kind != a.get("feature_map", "softmax") and not {"memory", "initial_state", "cache_state"} & set(t):
                wrong = {"softmax": "FM-1", "relu": "FM-2", "identity": "FM-3"}[a.get("feature_map", "softmax")]
                yield attr(f"feature map: as if it were {kind}", (wrong, label), feature_map=kind)
    dropped = {
        "memory": ("RLA-5", "EXT-11") if base == "rattention_extend" else ("RLA-5",),
        "initial_state": ("RLA-4",),
        "q_scale": ("RLA-3",),
        "k_scale": ("RLA-3",),
        "positions": ("ROPE-4",),
        "lengths": ("EXT-7",),
    }
    for name, clauses in dropped.items():
        if name in t and not (vjp and f"d_{name}" in _wrong(case)):
            yield swap(f"as if {name} were not given", clauses, **{name: None})
    if "rope_cos" in t:
        yield swap("rotation: as if there were none", ("ROPE-3",), rope_cos=None, rope_sin=None, positions=None)
        yield swap("rotation: as if it turned the other way", ("ROPE-3",), rope_sin=-t["rope_sin"])
    if "q" in t and t["q"].shape[2] > t["k"].shape[2] > 1:
        yield from _head_orders(case)
    if "segment_ids" in t:
        ids = t["segment_ids"]
        joined = (ids != 0).astype(ids.dtype)
        if (joined != ids).any() and not _torn(joined):
            yield swap("segments: as if all tokens were one segment", ("SEG-2", "SEG-1", "SEG-3"), segment_ids=joined)
    for name in ("initial_state", "cache_state", "memory"):
        if name in t:
            rounded = _bits(t[name], 8)
            yield swap(f"precision: as if {name} were rounded to bfloat16", ("NUM-3",), **{name: rounded})
    if "cache_length" in t and "rope_cos" in t:
        for step in (-1, 1):
            moved = t["cache_length"] + np.int32(step)
            if moved.min(initial=0) >= 0:
                yield swap(
                    "positions: as if the cache were one token longer or shorter", ("EXT-8",), cache_length=moved
                )
    if "swa_weight" in t:
        yield swap(
            "weights: as if the two were exchanged", ("MIX-1",), swa_weight=t["rla_weight"], rla_weight=t["swa_weight"]
        )
    if storage_of(case) == "float32":
        for bits, text in ((11, "TF32"), (8, "bfloat16")):
            cut = {k: _bits(t[k], bits) for k in ("q", "k", "v", "x", "cache_k", "cache_v", "d_out") if k in t}
            yield swap(f"precision: as if operands were rounded to {text}", ("NUM-2",), **cut)


def _windows(case: Case, attr: Any) -> Iterator[Hypothesis]:
    w, T = case.attrs["window"], case.tensors["q"].shape[1]
    names = {
        "sliding_window_attention": ("SWA-1",),
        "residual_linear_attention": ("RLA-1",),
        "rattention": ("SWA-1", "RLA-1", "RAT-2"),
    }.get(case.base_op, ())
    special = {None: ("SWA-6", "RLA-9"), -1: ("SWA-5", "RLA-1"), 0: ("SWA-1", "RLA-1")}.get(w, ())
    labels = tuple(dict.fromkeys((*names, *special)))
    if case.is_vjp:
        labels = ("GRAD-2", *labels)
    for other in dict.fromkeys((None, T, -1, 0, *((w - 1, w + 1) if w is not None else ()))):
        if other != w and (other is None or other >= -1):
            yield attr(f"window border: as if the window were {other}", labels, window=other)


def _head_orders(case: Case) -> Iterator[Hypothesis]:
    """Query head h reading kv head h mod Hkv instead of h // G."""
    Hq, Hkv = case.tensors["q"].shape[2], case.tensors["k"].shape[2]
    G = Hq // Hkv
    order = np.arange(Hq).reshape(G, Hkv).T.reshape(-1)  # the head that stands where the tiled order puts it
    back = np.argsort(order)
    t = dict(case.tensors)
    for name in ("q", "d_out"):
        if name in t:
            t[name] = t[name][:, :, order]
    for name in ("memory", "swa_weight", "rla_weight"):
        if name in t:
            t[name] = t[name][order]
    labels = {"sliding_window_attention": ("SWA-4",), "residual_linear_attention": ("RLA-8",)}
    clauses = labels.get(case.base_op, ("SWA-4", "RLA-8"))
    yield Hypothesis("head order: tiled over the kv heads, not grouped", clauses, t, dict(case.attrs), back)


def _torn(ids: np.ndarray) -> bool:
    """Whether the non-zero ids of some row do not lie together."""
    return any((np.diff(np.flatnonzero(row)) > 1).any() for row in ids)


def _bits(x: np.ndarray, bits: int) -> np.ndarray:
    """`x` with its significand rounded to `bits` bits."""
    mantissa, exponent = np.frexp(x.astype(np.float64))
    return np.ldexp(np.round(np.ldexp(mantissa, bits)), exponent - bits).astype(x.dtype)


def _wrong(case: Case) -> set[str]:
    return set(case.params.get("wrong", ()))


def explain(ctx: Context, case: Case, outputs: set[str]) -> Hypothesis | None:
    """The hypothesis that explains all the wrong `outputs`, the closest where several do."""
    try:
        got = ctx.run(case.op, case.tensors, case.attrs)
    except (Broken, Refused):
        return None
    finally:
        ctx.violations = []
    best, best_share = None, 1.0
    for h in hypotheses(case):
        try:
            bounds = ctx.bounds(case.op, h.tensors, h.attrs)
        except (ValueError, KeyError, IndexError):
            continue
        worst = 0.0
        for name in outputs:
            if name not in bounds or name not in got or bounds[name][0].shape != got[name].shape:
                worst = np.inf
                break
            value, limit = bounds[name]
            if h.heads is not None:
                value, limit = _reorder(name, value, h.heads), _reorder(name, limit, h.heads)
            worst = max(worst, compare_one(name, got[name], value, limit, ())[1])
        if worst < best_share:
            best, best_share = h, worst
    return best


def _reorder(name: str, x: np.ndarray, heads: np.ndarray) -> np.ndarray:
    if name in ("out", "d_q"):
        return x[:, :, heads]
    return x[heads] if name in ("d_memory", "d_swa_weight", "d_rla_weight") else x


def diagnose(ctx: Context, case: Case, recipe: Recipe, violations: list[Violation], before: list[Violation]) -> None:
    """Put the likeliest clauses first in each violation that says no more than "outside the budget"; add a guess."""
    plain = [v for v in violations if v.clauses == ("NUM-1",)]
    outputs = {v.output for v in plain if v.output}
    found = explain(ctx, case, outputs) if outputs else None
    for v in plain:
        if found is not None:
            v.guess = found.guess
            v.clauses = tuple(dict.fromkeys((*found.clauses, "NUM-1")))
        else:
            labels, guess = by_features(case, recipe, v)
            v.clauses = tuple(dict.fromkeys((*labels, "NUM-1")))
            v.guess = guess
        if case.is_vjp:
            # Where the gradient of one parameter alone is wrong, what is said of that parameter comes first.
            own = PARAMETERS.get(v.output, ()) if outputs == {v.output} else ()
            v.clauses = tuple(dict.fromkeys((*_gradient_first(v), *own, *v.clauses)))


PARAMETERS = {
    "d_q_scale": ("RLA-3",),
    "d_k_scale": ("RLA-3",),
    "d_memory": ("RLA-5",),
    "d_initial_state": ("RLA-4",),
    "d_swa_weight": ("MIX-1",),
    "d_rla_weight": ("MIX-1",),
}


def _gradient_first(v: Violation) -> tuple[str, ...]:
    return tuple(label for label in v.clauses if label.startswith("GRAD")) or ("GRAD-1",)


def by_features(case: Case, recipe: Recipe, v: Violation) -> tuple[tuple[str, ...], str]:
    """Clauses of what the minimal case still needs, and where in the output it goes wrong."""
    t, out = case.tensors, v.output.removeprefix("d_")
    labels: list[str] = []
    guess = "NaN leak" if v.kind == "nan" else ""
    state = v.output in ("final_state", "cache_state")
    inert = _at_inert(case, v)
    if inert:
        labels += ["GRAD-5"] if case.is_vjp else ["SEG-4"] if "segment_ids" in t else ["EXT-7"]
        guess = guess or "padding"
    if recipe.has("poison"):
        labels += ["SEG-5"] if "segment_ids" in t else []
        labels += ["EXT-9", "EXT-7"] if "cache_k" in t else []
        labels += ["GRAD-5"] if case.is_vjp else []
        guess = guess or "NaN leak"
    if "segment_ids" in t:
        labels += _segment_labels(case, recipe, v)
        guess = guess or "segments"
    linear = case.base_op != "sliding_window_attention"
    if not case.is_vjp:
        labels += {
            "final_state": ["RLA-6", "RAT-4"],
            "cache_state": ["EXT-5", "EXT-11"] if "memory" in t else ["EXT-5"],
            "cache_k": ["EXT-3", "EXT-4"] if "rope_cos" in t else ["EXT-4"],
            "cache_v": ["EXT-4"],
            "cache_length": ["EXT-6"],
        }.get(out, [])
    else:
        carried = {"initial_state", "cache_k", "cache_v", "cache_state"}
        given = {"d_final_state", "d_cache_state", "d_cache_k", "d_cache_v"} & set(t)
        labels += ["GRAD-4"] if out in carried or given else []
        labels += ["GRAD-3"] if recipe.G > 1 and recipe.dtype != "float32" else []
    for name, clause in (("positions", "ROPE-4"), ("q_scale", "RLA-3"), ("k_scale", "RLA-3"), ("memory", "RLA-5")):
        labels += [clause] if name in t else []
    if "initial_state" in t:
        labels += ["RLA-6" if state else "RLA-4"]
    if "rope_cos" in t and out not in ("cache_k",):
        labels += ["EXT-8"] if "cache_length" in t else []
        labels += ["ROPE-3", "ROPE-5"] if linear else ["ROPE-3"]
    if "lengths" in t:
        labels += ["EXT-7", "EXT-6"]
    if recipe.scale is not None and "scale" in case.attrs:
        labels += ["SWA-2"]
    if recipe.eps != 1e-6 and "eps" in case.attrs:
        labels += ["MIX-2"]
    if recipe.G > 1:
        labels += {"sliding_window_attention": ["SWA-4"], "residual_linear_attention": ["RLA-8"]}.get(
            case.base_op, ["SWA-4", "RLA-8"]
        )
        guess = guess or "head order"
    labels += _general(case, recipe, v)
    return tuple(dict.fromkeys(labels)), guess or ("state" if state else _precision(case, v))


def _segment_labels(case: Case, recipe: Recipe, v: Violation) -> list[str]:
    base, ids = case.base_op, case.tensors["segment_ids"]
    labels = []
    if v.output == "final_state":
        labels += ["SEG-8"] if ids.size and (ids == 0).all(1).any() else []
        labels += ["SEG-7", "SEG-6"] if "initial_state" in case.tensors else ["SEG-7"]
    elif "initial_state" in case.tensors:
        labels += ["SEG-6"]
    labels += [] if base == "residual_linear_attention" else ["SEG-1"]
    labels += [] if base == "sliding_window_attention" else ["SEG-2"]
    labels += ["SEG-3"] if "rope_cos" in case.tensors and "positions" not in case.tensors else []
    labels += ["SEG-5"] if (ids == 0).any() else []
    return (["GRAD-2"] if case.is_vjp else []) + labels


def _at_inert(case: Case, v: Violation) -> bool:
    """Whether the first wrong element is the output of padding or of a token past `lengths`."""
    if v.output not in ("out", "d_q", "d_k", "d_v") or len(v.index) != 4:
        return False
    b, t = v.index[:2]
    if "segment_ids" in case.tensors:
        return bool(case.tensors["segment_ids"][b, t] == 0)
    return "lengths" in case.tensors and t >= int(case.tensors["lengths"][b])


def _general(case: Case, recipe: Recipe, v: Violation) -> list[str]:
    """What is left to blame when no option is needed for the failure."""
    base, window = case.base_op, case.attrs.get("window")
    labels: list[str] = []
    maps = {"softmax": "FM-1", "relu": "FM-2", "identity": "FM-3"}
    if base == "rope_table":
        return ["ROPE-1", "ROPE-2"]
    if recipe.dtype != "float32":
        labels += ["FM-4"] if base == "feature_map" else ["NUM-3"]
        labels += ["RAT-3"] if base in ("rattention", "rattention_extend") else []
    elif _precision(case, v) == "precision":
        labels += ["NUM-2", "NUM-3"]
    if base in ("rms_mix", "rattention", "rattention_extend"):
        labels += ["MIX-1", "MIX-2", "MIX-3"]
    if base == "feature_map":
        return [*labels, maps[recipe.feature_map], *(["FM-5"] if recipe.feature_map == "softmax" else [])]
    if base in ("sliding_window_attention", "rattention", "rattention_extend"):
        labels += ["SWA-6"] if window is None else ["SWA-5"] if window == -1 else ["SWA-1"]
        labels += ["SWA-3", "SWA-2"]
    if base in ("residual_linear_attention", "rattention", "rattention_extend"):
        labels += ["RLA-9"] if window is None else ["RLA-1"]
        labels += ["RLA-2", maps[recipe.feature_map], "RLA-7"]
    if base.startswith("rattention"):
        labels += ["RAT-2", "RAT-1"]
    return labels


def _precision(case: Case, v: Violation) -> str:
    """ "precision" where numbers are nearly right, else the plain word for a wrong one."""
    if v.got is None or v.expected is None or not np.isfinite([v.got, v.expected]).all():
        return "NaN" if v.kind == "nan" else ""
    size = max(abs(v.expected), 1e-30)
    return "precision" if abs(v.got - v.expected) < 0.02 * size else "value"
