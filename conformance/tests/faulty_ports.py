"""Ports with one fault each, for the tests of the suite; every one calls the reference and then does its own thing."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from rattention.numpy.adapter import backend as honest
from rattention.spec import Result, Unsupported

Tensors = dict[str, np.ndarray]
Attrs = dict[str, Any]


class Port:
    """A backend named after its fault. `change` gets (op, tensors, attrs) and returns the outputs."""

    def __init__(self, change: Callable[[str, Tensors, Attrs], Any], **about: Any):
        self.change, self.about = change, about

    def describe(self) -> dict[str, Any]:
        return {**honest.describe(), "name": self.change.__name__, **self.about}

    def run(self, op: str, tensors: Mapping[str, np.ndarray], attrs: Mapping[str, Any]) -> Any:
        return self.change(op, tensors, attrs)  # type: ignore[arg-type]


def storage(tensors: Tensors) -> str:
    return next((str(x.dtype) for n, x in tensors.items() if n in ("q", "x", "swa")), "float32")


# ---------------------------------------------------------------------------------------------- gross


def always_zero(op: str, t: Tensors, a: Attrs) -> Any:
    return {n: np.zeros_like(x) for n, x in honest.run(op, t, a).items()}


def always_nan(op: str, t: Tensors, a: Attrs) -> Any:
    out = honest.run(op, t, a)
    return {n: x if x.dtype.kind == "i" else np.full_like(x, np.nan) for n, x in out.items()}


def capability_liar(op: str, t: Tensors, a: Attrs) -> Any:
    if "segment_ids" in t:
        honest.run(op, t, a)
        raise Unsupported("segments are for another day")
    return honest.run(op, t, a)


def kernel_liar(op: str, t: Tensors, a: Attrs) -> Any:
    return Result(dict(honest.run(op, t, a)), path="eager", kernels=[])


def input_changer(op: str, t: Tensors, a: Attrs) -> Any:
    out = honest.run(op, t, a)
    if op == "rattention_extend" and t["cache_state"].flags.writeable:
        t["cache_state"][...] = out["cache_state"]
    return out


def aliaser(op: str, t: Tensors, a: Attrs) -> Any:
    out = dict(honest.run(op, t, a))
    if "final_state" in out and "initial_state" in t and a["window"] is None:
        out["final_state"] = t["initial_state"]
    return out


# ---------------------------------------------------------------------------------------------- subtle


def window_at_bf16(op: str, t: Tensors, a: Attrs) -> Any:
    if storage(t) == "bfloat16" and op == "sliding_window_attention" and (a["window"] or 0) >= 1:
        honest.run(op, t, a)
        return honest.run(op, t, {**a, "window": a["window"] - 1})
    return honest.run(op, t, a)


def tiled_heads(op: str, t: Tensors, a: Attrs) -> Any:
    out = dict(honest.run(op, t, a))
    if op != "sliding_window_attention":
        return out
    Hq, Hkv = t["q"].shape[2], t["k"].shape[2]
    order = np.arange(Hq).reshape(Hq // Hkv, Hkv).T.reshape(-1)
    swapped = honest.run(op, {**t, "q": t["q"][:, :, order]}, a)["out"]
    return {"out": np.ascontiguousarray(swapped[:, :, np.argsort(order)])}


def tf32(op: str, t: Tensors, a: Attrs) -> Any:
    if storage(t) != "float32" or op != "rattention":
        return honest.run(op, t, a)
    honest.run(op, t, a)

    def cut(x: np.ndarray) -> np.ndarray:
        m, e = np.frexp(x.astype(np.float64))
        return np.ldexp(np.round(m * 2**11) / 2**11, e).astype(x.dtype)

    return honest.run(op, {n: cut(x) if n in ("q", "k", "v") else x for n, x in t.items()}, a)


def leaking_segments(op: str, t: Tensors, a: Attrs) -> Any:
    out = honest.run(op, t, a)
    if op != "residual_linear_attention" or "segment_ids" not in t or (t["segment_ids"] == 0).any():
        return out
    return honest.run(op, {**t, "segment_ids": np.ones_like(t["segment_ids"])}, a)


def bf16_state(op: str, t: Tensors, a: Attrs) -> Any:
    out = dict(honest.run(op, t, a))
    if "cache_state" in out:
        out["cache_state"] = out["cache_state"].astype(ml_dtypes.bfloat16).astype(np.float32)
    return out


def small_eps(op: str, t: Tensors, a: Attrs) -> Any:
    honest.run(op, t, a)
    return honest.run(op, t, {**a, "eps": 1e-8}) if op == "rms_mix" and "eps" in a else honest.run(op, t, a)


def gradient_ignores_window(op: str, t: Tensors, a: Attrs) -> Any:
    out = honest.run(op, t, a)
    if op != "sliding_window_attention.vjp":
        return out
    return honest.run(op, t, {**a, "window": None})


def decode_only(op: str, t: Tensors, a: Attrs) -> Any:
    out = dict(honest.run(op, t, a))
    if op == "rattention_extend" and t["q"].shape[1] == 1 and t["cache_length"].max(initial=0) > 3:
        out["out"] = (out["out"].astype(np.float64) * 1.02).astype(out["out"].dtype)
    return out


def past_256(op: str, t: Tensors, a: Attrs) -> Any:
    out = dict(honest.run(op, t, a))
    # A full window reads states alone: the clause named is about the tokens.
    if op == "residual_linear_attention" and t["q"].shape[1] > 256 and a["window"] is not None:
        out["out"][:, 256:] = 0
    return out


def float16_gradient(op: str, t: Tensors, a: Attrs) -> Any:
    out = dict(honest.run(op, t, a))
    if op == "rattention.vjp" and storage(t) == "float16" and "d_k_scale" in out:
        out["d_k_scale"] = (out["d_k_scale"].astype(np.float32) * 0.5).astype(out["d_k_scale"].dtype)
    return out


def crashing(op: str, t: Tensors, a: Attrs) -> Any:
    if op == "feature_map" and a.get("feature_map") == "relu":
        os._exit(3)
    return honest.run(op, t, a)


def table_without_entry(op: str, t: Tensors, a: Attrs) -> Any:
    if op == "feature_map" and a.get("feature_map") == "relu":
        looked_up("relu")
    return honest.run(op, t, a)


def looked_up(name: str) -> str:
    try:
        return {"softmax": "exp", "identity": "copy"}[name]
    except KeyError as error:
        raise LookupError(f"no kernel for {name}") from error


def segfault(op: str, t: Tensors, a: Attrs) -> Any:
    if op == "feature_map" and a.get("feature_map") == "relu":
        os.kill(os.getpid(), signal.SIGSEGV)
    return honest.run(op, t, a)


def leaves_content(op: str, t: Tensors, a: Attrs) -> Any:
    if op == "feature_map":
        os._exit(0)
    return honest.run(op, t, a)


def counts_one_more(op: str, t: Tensors, a: Attrs) -> Any:
    out = dict(honest.run(op, t, a))
    return out | {"cache_length": out["cache_length"] + np.int32(1)} if "cache_length" in out else out


def late_tokens(op: str, t: Tensors, a: Attrs) -> Any:
    out = dict(honest.run(op, t, a))
    if op == "rattention_extend" and t["q"].shape[1] > 30:
        out["out"][1, 30:, 1, 20:] += 1
    return out


def bf16_halved(op: str, t: Tensors, a: Attrs) -> Any:
    out = dict(honest.run(op, t, a))
    return out | {"out": out["out"] / out["out"].dtype.type(2)} if storage(t) == "bfloat16" and "out" in out else out


def hanging(op: str, t: Tensors, a: Attrs) -> Any:
    if op == "feature_map":
        time.sleep(3600)
    return honest.run(op, t, a)


def interrupting(op: str, t: Tensors, a: Attrs) -> Any:
    if a.get("feature_map") == "relu":
        raise KeyboardInterrupt("by itself")
    return honest.run(op, t, a)


class Extras:
    """An honest port with attributes of its own, under names that the suite's wire client has too."""

    describe, run = honest.describe, honest.run
    clauses = 3

    def close(self) -> None:
        raise RuntimeError("not yours to close")


crash = Port(crashing)
lookup = Port(table_without_entry)
segv = Port(segfault)
content = Port(leaves_content)
tiled = Port(tiled_heads)
window = Port(gradient_ignores_window)
counting = Port(counts_one_more)
late = Port(late_tokens)
hang = Port(hanging)
interrupt = Port(interrupting)
zero = Port(always_zero)
honest_by_name = honest
