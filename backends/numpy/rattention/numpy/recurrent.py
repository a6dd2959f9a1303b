"""The recurrent form of the reference: token by token, with the ring of the last w tokens and the state.

This is the mechanism as a decoder runs it, and it shares no formula with the quadratic form. At each token

    1. a token that opens a segment empties the ring and resets the state;
    2. window -1: the token is folded into the state at once;
    3. softmax reads ring and token, the linear branch reads state and memory;
    4. the oldest token of a full ring leaves it and is folded into the state; the new one takes its place.

The ring is a slice of the sequence, which has `slots` cache slots (or dead ones) in front: while token t is read, the
ring is `[t, t + slots)` and the token itself stands at `t + slots`. Only the loop over tokens is Python; rows and heads
are vectorised. Work per token depends on the window, F and Dv alone, not on what came before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from rattention.numpy.quadratic import INTEGERS, check
from rattention.numpy.tables import rope_table
from rattention.spec import Call

Array = np.ndarray


def run(op: str, tensors: Mapping[str, Any], attrs: Mapping[str, Any]) -> dict[str, Array]:
    """One operation, or its `.vjp`, in float64, unrounded (`cache_length` in int32).

    Raises:
        SpecError: the call is invalid.
    """
    call = check(op, tensors, attrs)
    t = {n: np.asarray(tensors[n]) for n in call.given}
    # In C order, so that no sum depends on the strides of an argument (NUM-7).
    t = {n: x.astype(np.int64 if n in INTEGERS else np.float64, order="C") for n, x in t.items()}
    with np.errstate(all="ignore"):
        outputs = _dispatch(call, t)
    return {o.name: outputs[o.name] for o in call.operation.outputs if call.has_output(o.name)}


def _dispatch(call: Call, t: dict[str, Array]) -> dict[str, Array]:
    name, attrs = call.operation.name, call.attributes
    if name == "rope_table":
        cos, sin = rope_table(t["positions"], attrs["head_dim"], attrs["theta"])
        return {"rope_cos": cos, "rope_sin": sin}
    if name == "feature_map":
        return {"out": phi(t["x"], attrs["feature_map"])}
    if name == "feature_map.vjp":
        return {"d_x": phi_back(t["x"], t["d_out"], attrs["feature_map"])}
    if name == "rms_mix":
        return {"out": t["swa_weight"] * rms(t["swa"], attrs["eps"]) + t["rla_weight"] * rms(t["rla"], attrs["eps"])}
    if name == "rms_mix.vjp":
        outputs = {}
        for branch in ("swa", "rla"):
            x, w = t[branch], t[f"{branch}_weight"]
            outputs[f"d_{branch}"] = rms_back(x, w * t["d_out"], attrs["eps"])
            outputs[f"d_{branch}_weight"] = np.einsum("bthd,bthd->hd", t["d_out"], rms(x, attrs["eps"]))
        return outputs
    if call.operation.is_vjp:
        from rattention.numpy.recurrent_vjp import attention_vjp

        return attention_vjp(call, t)
    return attention(call, t)


# ------------------------------------------------------------------------------------------------ per token


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def phi(x: Array, kind: str) -> Array:
    """The feature map, [..., D] -> [..., F] (FM-1 to FM-3)."""
    if kind == "softmax":
        return np.concatenate([softmax(x), softmax(-x)], -1)
    if kind == "relu":
        return np.concatenate([np.maximum(x, 0), np.maximum(-x, 0)], -1)  # maximum keeps NaN
    return x


def phi_back(x: Array, d: Array, kind: str) -> Array:
    """Transposed derivative of `phi` at x."""
    if kind == "identity":
        return d
    up, down = np.split(d, 2, -1)
    if kind == "relu":
        return np.where(x > 0, up, 0.0) - np.where(x < 0, down, 0.0)
    a, b = softmax(x), softmax(-x)
    return a * up - a * np.sum(a * up, -1, keepdims=True) - b * down + b * np.sum(b * down, -1, keepdims=True)


def rms(x: Array, eps: float) -> Array:
    """x / sqrt(mean(x^2) + eps) over the last axis (MIX-2)."""
    return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + eps)


def rms_back(x: Array, d: Array, eps: float) -> Array:
    """Transposed derivative of `rms` at x: d / r - x <x, d> / (Dv r^3)."""
    r = np.sqrt(np.square(x).mean(-1, keepdims=True) + eps)
    return d / r - x * (np.sum(x * d, -1, keepdims=True) / (x.shape[-1] * r**3))


def turn(x: Array, cos: Array, sin: Array) -> Array:
    """Rotate the pairs (j, j + D/2), as complex numbers (ROPE-3). x [B, S, H, D], tables [B, S, D/2]."""
    half = x.shape[-1] // 2
    z = (x[..., :half] + 1j * x[..., half:]) * (cos + 1j * sin)[:, :, None]
    return np.concatenate([z.real, z.imag], -1)


# ------------------------------------------------------------------------------------------------ a sequence


@dataclass
class Sequence:
    """A call as the loop reads it: `slots` places in front, then the T tokens. Inert entries are zero."""

    q: Array  # [B, T, N, G, D]
    k: Array  # [B, S, N, D], S = slots + T
    v: Array  # [B, S, N, Dv]
    q_rot: Array  # q and k of the softmax branch, rotated
    k_rot: Array
    fq: Array | None  # [B, T, N, G, F]; None without the linear branch
    fk: Array | None  # [B, S, N, F]
    segment: Array  # [B, S] id of the segment, 0 where inert
    opens: Array  # [B, T] token opens a segment
    first: Array  # [B, T] token belongs to the first segment of its row
    cos: Array | None  # [B, S, D/2] rows of the rotary table, 0 where inert
    sin: Array | None
    state: Array  # [B, N, F, Dv] the state carried in
    carries: bool  # a state was carried in
    slots: int
    window: int | None
    scale: float


def sequence(call: Call, t: dict[str, Array]) -> Sequence:
    """Lay out a call: heads grouped, cache in front, inert entries replaced by zeros (SEG-5, EXT-7, EXT-9)."""
    d, attrs = call.dims, call.attributes
    B, T, N, G = d["B"], d["T"], d["Hkv"], d["Hq"] // d["Hkv"]
    w = attrs["window"]
    k, v = t["k"], t["v"]
    if "cache_length" in t:
        slots = d["W"]
        k, v = np.concatenate([t["cache_k"], k], 1), np.concatenate([t["cache_v"], v], 1)
        at = np.arange(-slots, T) + t["cache_length"][:, None]  # position of every slot and token
        new = t.get("lengths", np.full(B, T))[:, None]
        segment = ((at >= 0) & (np.arange(-slots, T) < new)).astype(np.int64)
        state, carries = t["cache_state"], True
    else:
        # The ring starts with dead slots; more than T of them would never be reached.
        slots = 0 if w is None else min(max(w, 0), T)
        k, v = (np.concatenate([np.zeros((B, slots, *x.shape[2:])), x], 1) for x in (k, v))
        segment = np.zeros((B, slots + T), np.int64)
        segment[:, slots:] = t.get("segment_ids", 1)
        at = np.zeros((B, slots + T), np.int64)
        at[:, slots:] = t["positions"] if "positions" in t else _index_in_segment(segment[:, slots:])
        carries = "initial_state" in t
        state = t.get("initial_state", np.zeros((B, N, d.get("F", 0), d["Dv"])))
    live = segment != 0
    k, v = np.where(live[..., None, None], k, 0.0), np.where(live[..., None, None], v, 0.0)
    q = np.where(live[:, slots:, None, None], t["q"], 0.0).reshape(B, T, N, G, d["D"])
    now = segment[:, slots:]
    before = np.concatenate([np.zeros((B, 1), np.int64), now], 1)[:, :T]
    opens = (now != 0) & (now != before)
    first = (np.cumsum(opens, 1) == 1) & (now != 0)
    if "cache_length" in t:
        opens[:] = False  # the sequence began before the cache
        first = now != 0

    cos = sin = None
    q_rot, k_rot = q, k
    if "rope_cos" in t:
        rows = np.where(live, at, 0)
        cos, sin = (_rows(t[n], rows, live) for n in ("rope_cos", "rope_sin"))
        k_rot = turn(k, cos, sin)
        q_rot = turn(q.reshape(B, T, N * G, d["D"]), cos[:, slots:], sin[:, slots:]).reshape(q.shape)
    fq = fk = None
    if "feature_map" in attrs:
        kind = attrs["feature_map"]
        fq = np.where(live[:, slots:, None, None, None], phi(q * t.get("q_scale", 1.0), kind), 0.0)
        fk = np.where(live[..., None, None], phi(k * t.get("k_scale", 1.0), kind), 0.0)
    scale = attrs.get("scale")
    scale = 1.0 / math.sqrt(d["D"]) if scale is None else scale
    return Sequence(q, k, v, q_rot, k_rot, fq, fk, segment, opens, first, cos, sin, state, carries, slots, w, scale)


def _rows(table: Array, rows: Array, live: Array) -> Array:
    if not len(table):
        return np.zeros((*rows.shape, table.shape[1]))
    # Cached keys of a row without a query are rotated for nobody: the table need not reach them (ERR-9).
    return np.where(live[..., None], table[np.minimum(rows, len(table) - 1)], 0.0)


def _index_in_segment(ids: Array) -> Array:
    """Distance of each token from the one that opened its segment (SEG-3)."""
    index = np.zeros(ids.shape, np.int64)
    for t in range(1, ids.shape[1]):
        index[:, t] = np.where(ids[:, t] == ids[:, t - 1], index[:, t - 1] + 1, 0)
    return index


class Mechanism:
    """Ring and state of one sequence; `read` gives both branches at a token, `advance` moves on to the next."""

    def __init__(self, s: Sequence, initial: Array, memory: Array | None):
        self.s, self.initial, self.memory = s, initial, memory
        self.state = initial.copy()  # a row of padding alone keeps it (SEG-8)
        self.holds = np.full(len(initial), s.carries)  # the state has something to read
        self.finite = bool(np.isfinite(s.k_rot).all() and np.isfinite(s.v).all())

    def span(self, t: int) -> slice:
        """Where ring and token stand in the sequence while token t is read (SWA-1, SWA-6)."""
        if self.s.window == -1:
            return slice(0, 0)  # SWA-5
        start = 0 if self.s.window is None else t
        return slice(start, t + self.s.slots + 1)

    def begin(self, t: int) -> None:
        """A token that opens a segment resets the state: S_init for the first (SEG-6), else 0 (SEG-2)."""
        s = self.s
        opens = s.opens[:, t]
        if opens.any():
            fresh = np.where(s.first[:, t, None, None, None], self.initial, 0.0)
            self.state = np.where(opens[:, None, None, None], fresh, self.state)
            self.holds = np.where(opens, s.first[:, t] & s.carries, self.holds)
        if s.window == -1:
            self.fold(t + s.slots, t)  # RLA-1

    def fold(self, i: int, t: int) -> None:
        """Add phi(k_i)^T v_i to the state of the rows where i belongs to the segment of token t (EXT-5)."""
        s = self.s
        if s.fk is None:
            return
        joins = (s.segment[:, i] == s.segment[:, t + s.slots]) & (s.segment[:, i] != 0)
        if joins.any():
            outer = s.fk[:, i, :, :, None] * s.v[:, i, :, None, :]
            self.state = np.where(joins[:, None, None, None], self.state + outer, self.state)
            self.holds |= joins

    def window(self, t: int) -> tuple[Array, Array, Array]:
        """Rotated keys, values and who is alive in ring and token: [B, R, N, D], [B, R, N, Dv], [B, R] (SEG-1)."""
        s, span = self.s, self.span(t)
        here = s.segment[:, t + s.slots, None]
        alive = (s.segment[:, span] == here) & (here != 0)
        k, v = s.k_rot[:, span], s.v[:, span]
        if not self.finite:  # a NaN of another segment must not be multiplied by its zero weight
            k, v = (np.where(alive[..., None, None], x, 0.0) for x in (k, v))
        return k, v, alive

    def read_window(self, t: int, k: Array, v: Array, alive: Array) -> tuple[Array, Array]:
        """Softmax weights [B, N, G, R] over ring and token, and sum p v [B, N, G, Dv] (SWA-2, SWA-3)."""
        mask = alive[:, None, None]
        scores = self.s.scale * np.matmul(self.s.q_rot[:, t], k.transpose(0, 2, 3, 1))
        scores = np.where(mask, scores, -np.inf)
        some = mask.any(-1, keepdims=True)
        top = np.where(some, scores.max(-1, keepdims=True, initial=-np.inf), 0.0)
        e = np.where(mask, np.exp(scores - top), 0.0)
        p = e / np.where(some, e.sum(-1, keepdims=True), 1.0)
        return p, np.matmul(p, v.transpose(0, 2, 1, 3))

    def read_state(self, t: int) -> Array:
        """phi(q_t) (S + M), [B, N, G, Dv] (RLA-2, RLA-5); exactly 0 where there is nothing to read (RLA-7)."""
        fq = self.s.fq
        assert fq is not None
        out = np.matmul(fq[:, t], self.state)
        if self.memory is not None:
            return out + np.matmul(fq[:, t, :, :, None], self.memory)[..., 0, :]
        return np.where(self.holds[:, None, None, None], out, 0.0)

    def advance(self, t: int) -> None:
        """Token t is done: the oldest token of the ring leaves it for the state (RLA-6, EXT-5, EXT-10)."""
        if self.s.window is not None and self.s.window >= 0:
            self.fold(t, t)  # the ring [t, t + slots) loses its first; without slots, the token itself


def attention(call: Call, t: dict[str, Array]) -> dict[str, Array]:
    """The four operations that read a sequence."""
    s, d, attrs = sequence(call, t), call.dims, call.attributes
    B, T, N, G = d["B"], d["T"], d["Hkv"], d["Hq"] // d["Hkv"]
    swa, rla = "scale" in attrs, "feature_map" in attrs
    memory = t["memory"].reshape(N, G, d["F"], d["Dv"]) if "memory" in t else None
    m = Mechanism(s, s.state, memory)
    out = np.zeros((B, T, N, G, d["Dv"]))
    for i in range(T):
        m.begin(i)
        y = z = np.zeros((B, N, G, d["Dv"]))
        if swa:
            y = m.read_window(i, *m.window(i))[1]
        if rla:
            z = m.read_state(i)
        if swa and rla:
            y, z = rms(y, attrs["eps"]), rms(z, attrs["eps"])
            y = t["swa_weight"].reshape(N, G, d["Dv"]) * y
            z = t["rla_weight"].reshape(N, G, d["Dv"]) * z
        live = s.segment[:, i + s.slots, None, None, None] != 0
        out[:, i] = np.where(live, y + z, 0.0)  # SEG-4, EXT-7
        m.advance(i)
    outputs = {"out": out.reshape(B, T, N * G, d["Dv"]), "final_state": m.state, "cache_state": m.state}
    if "cache_length" in t:
        # The ring of row b now starts at its own number of new tokens (EXT-6).
        new = t.get("lengths", np.full(B, T))
        outputs |= {"cache_k": _ring(s.k, new, d["Wnext"], T), "cache_v": _ring(s.v, new, d["Wnext"], T)}
        outputs["cache_length"] = (t["cache_length"] + new).astype(np.int32)
    return outputs


def last_tokens(n: int, tokens: int, total: int, slots: int) -> tuple[slice, slice]:
    """Where the newest entries of a row with n new tokens stand in the sequence, and in the next ring (EXT-4)."""
    stop = total - tokens + n
    start = max(stop - slots, 0)
    return slice(start, stop), slice(slots - (stop - start), slots)


def _ring(x: Array, new: Array, slots: int, tokens: int) -> Array:
    """The last `slots` entries of each row, newest last, zeros on the left. x [B, W + T, ...]."""
    out = np.zeros((x.shape[0], slots, *x.shape[2:]))
    for b, n in enumerate(new):
        source, target = last_tokens(int(n), tokens, x.shape[1], slots)
        out[b, target] = x[b, source]
    return out
