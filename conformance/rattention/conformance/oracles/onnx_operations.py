"""The operations of the specification as graphs of standard ONNX operators.

The softmax branch is `Attention` (opset 25): `left_window_size` is our window, None its -1. The linear branch is
`LinearAttention` (opset 27) with keys and values delayed by w + 1 steps, so that step t adds token t - w - 1: what left
the window. It runs one step past the last token, because final_state holds one token more than the last query reads.
Documents are a mask in the first, and in the second a gate that closes where a new document starts.

Everything is computed in float32 and cast once at the end. Batch and length stay symbolic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto
from rattention.conformance.oracles.onnx_graph import Graph
from rattention.spec import Call, load

BOOL, INT64 = TensorProto.BOOL, TensorProto.INT64


def model(call: Call, dtypes: dict[str, str]) -> onnx.ModelProto:
    """The graph of one call: its operation, attributes, and the optional tensors it was given.

    Args:
        call: a validated call of a forward operation.
        dtypes: dtype of each tensor given.
    """
    name = call.operation.name
    g = Graph(name)
    static = {d: call.dims[d] for d in ("Hq", "Hkv", "H", "D", "Dv", "F", "D/2", "W") if d in call.dims}
    inputs: dict[str, str] = {}
    for t in call.operation.tensors:
        if t.name in call.given:
            raw = g.input(t.name, dtypes[t.name], [static.get(d, d) for d in t.shape])
            inputs[t.name] = g.cast(raw, INT64) if t.dtype == "int32" else g.float(raw)
    build = {"feature_map": _feature_map, "rope_table": _rope_table, "rms_mix": _rms_mix}
    outputs = build[name](g, call, inputs) if name in build else _Sequence(g, call, inputs).outputs()
    stored = call.output_dtypes(dtypes)
    for o in load().operations[name].outputs:
        g.output(outputs[o.name], o.name, stored[o.name], [static.get(d, d) for d in o.shape])
    return g.model()


def _feature_map(g: Graph, call: Call, t: dict[str, str]) -> dict[str, str]:
    return {"out": phi(g, t["x"], call.attributes["feature_map"])}


def phi(g: Graph, x: str, kind: str) -> str:
    """FM-1 to FM-3."""
    if kind == "identity":
        return x
    if kind == "relu":
        return g("Concat", g("Relu", x), g("Relu", g("Neg", x)), axis=-1)
    return g("Concat", g("Softmax", x, axis=-1), g("Softmax", g("Neg", x), axis=-1), axis=-1)


def _rope_table(g: Graph, call: Call, t: dict[str, str]) -> dict[str, str]:
    """ROPE-1, ROPE-2: in double, cast once."""
    D, theta = call.attributes["head_dim"], float(call.attributes["theta"])
    frequency = theta ** (-2.0 * np.arange(D // 2) / D)
    positions = g("Unsqueeze", g.cast(t["positions"], TensorProto.DOUBLE), [1])
    angle = g("Mul", positions, frequency)
    return {"rope_cos": g("Cos", angle), "rope_sin": g("Sin", angle)}


def mix(g: Graph, call: Call, swa: str, rla: str, t: dict[str, str]) -> str:
    """MIX-1, MIX-2; RMSNormalization's own scale is per channel, ours per head and channel."""
    parts = []
    for name, x in (("swa", swa), ("rla", rla)):
        ones = np.ones(call.dims["Dv"], np.float32)
        normed = g("RMSNormalization", x, ones, axis=-1, epsilon=call.attributes["eps"], stash_type=1)
        parts.append(g("Mul", normed, t[f"{name}_weight"]))
    return g("Add", *parts)


def _rms_mix(g: Graph, call: Call, t: dict[str, str]) -> dict[str, str]:
    return {"out": mix(g, call, t["swa"], t["rla"], t)}


@dataclass
class _Sequence:
    """The four operations that read a sequence. Keys are the cached tokens, if any, and then the new ones."""

    g: Graph
    call: Call
    t: dict[str, str]

    def __post_init__(self) -> None:
        g, t, call = self.g, self.t, self.call
        self.name = call.operation.name
        self.window: int | None = call.attributes["window"]
        self.extends = self.name == "rattention_extend"
        self.slots = g.size(t["cache_k"], 1) if self.extends else g.constant(0)
        self.T = g.size(t["q"], 1)
        keys, values = t["k"], t["v"]
        if self.extends:
            keys, values = g("Concat", t["cache_k"], keys, axis=1), g("Concat", t["cache_v"], values, axis=1)
        self.N = g.size(keys, 1)
        self.batch = g("Slice", g("Shape", keys), [0], [1], [0])
        self.places()
        # Inert tokens are replaced by zero before any arithmetic (SEG-5, EXT-7, EXT-9).
        self.q = self.select(self.queries(self.live), t["q"])
        self.k, self.v = self.select(self.live, keys), self.select(self.live, values)

    def select(self, live: str, x: str) -> str:
        return self.g.either(self.g("Unsqueeze", live, [2, 3]), x, 0.0)

    def queries(self, x: str) -> str:
        """The new tokens of something over all tokens, [B, N, ..] -> [B, T, ..]."""
        g = self.g
        if not self.extends:
            return x
        start = g("Unsqueeze", self.slots, [0])
        return g("Slice", x, start, [2**62], [1])

    # -------------------------------------------------------------------------------------------- who is where

    def places(self) -> None:
        """`document` (0 is inert), `live` and `row` (of the rotary table) of every token, [B, N]."""
        g, t = self.g, self.t
        shape = g("Concat", self.batch, g("Unsqueeze", self.N, [0]), axis=0)
        every = g("Expand", g.range(self.N), shape)
        if self.extends:
            seen = g("Unsqueeze", t["cache_length"], [1])
            index = g("Add", g("Sub", seen, self.slots), every)
            real = g("Unsqueeze", t["lengths"], [1]) if "lengths" in t else self.T
            self.real = real
            live = g("And", g("GreaterOrEqual", index, 0), g("Less", every, g("Add", self.slots, real)))
            self.document = g.cast(live, INT64)
        elif "segment_ids" in t:
            self.document = t["segment_ids"]
            live = g("Not", g("Equal", self.document, 0))
            # Index in the segment: how many earlier tokens carry the same id.
            earlier = g("Less", g("Unsqueeze", g.range(self.N), [0]), g("Unsqueeze", g.range(self.N), [1]))
            same = g("And", self.same(self.document, self.document), earlier)
            index = g("ReduceSum", g.cast(same, INT64), [2], keepdims=0)
        else:
            self.document = g("Expand", 1, shape)
            live, index = g("Equal", self.document, 1), every
        self.live = live
        self.row = g.either(live, t.get("positions", index), 0)

    def same(self, one: str, two: str) -> str:
        g = self.g
        return g("Equal", g("Unsqueeze", one, [2]), g("Unsqueeze", two, [1]))

    # -------------------------------------------------------------------------------------------- softmax branch

    def rotated(self, x: str, rows: str) -> str:
        """ROPE-3 on [B, H, T, D]. The operator wants a row per token, so zeros are added for inert ones."""
        g, t = self.g, self.t
        if "rope_cos" not in t:
            return x
        half = [self.call.dims["D/2"]]
        spare = g("ConstantOfShape", g("Concat", g("Unsqueeze", self.N, [0]), half, axis=0))
        cos, sin = (g("Concat", t[name], spare, axis=0) for name in ("rope_cos", "rope_sin"))
        # Cached keys of a row without a query may lie beyond the table (ERR-9); nobody reads how they are rotated.
        rows = g("Min", rows, g("Sub", g.size(cos, 0), 1))
        return g("RotaryEmbedding", x, cos, sin, rows, interleaved=0)

    def softmax_branch(self) -> str:
        """[B, T, Hq, Dv]. SWA-1, SWA-5, SWA-6."""
        g, w = self.g, self.window
        q, k, v = (g.heads_first(x) for x in (self.q, self.k, self.v))
        if w == -1:  # Attention has no empty window: its -1 means unbounded
            shape = g("Concat", *(g("Slice", g("Shape", x), [a], [a + 1], [0]) for x, a in self.out_axes()), axis=0)
            return g("ConstantOfShape", shape)
        q, k = self.rotated(q, self.queries(self.row)), self.rotated(k, self.row)
        attributes: dict[str, Any] = {}
        if self.call.attributes["scale"] is not None:
            # The operator multiplies q and k by the root of its scale, which a negative one does not have.
            q = g("Mul", q, float(self.call.attributes["scale"]))
            attributes["scale"] = 1.0
        if self.extends:
            mask = self.cache_mask()
        else:
            attributes |= {"is_causal": 1, "left_window_size": -1 if w is None else w}
            mask = None
            if "segment_ids" in self.t:
                mask = g("Unsqueeze", self.same(self.document, self.document), [1])
        return g.heads_first(g("Attention", q, k, v, mask, **attributes))

    def out_axes(self) -> list[tuple[str, int]]:
        return [(self.q, 0), (self.q, 1), (self.q, 2), (self.v, 3)]

    def cache_mask(self) -> str:
        """Slots that hold tokens and lie in the window, [B, 1, T, N]: the cache is ragged, so a mask says it all."""
        g, w = self.g, self.window
        key = g("Unsqueeze", g.range(self.N), [0])
        query = g("Add", g("Unsqueeze", g.range(self.T), [1]), self.slots)
        distance = g("Sub", query, key)
        inside = g("GreaterOrEqual", distance, 0)
        if w is not None:
            inside = g("And", inside, g("LessOrEqual", distance, w))
        return g("Unsqueeze", g("And", g("Unsqueeze", self.live, [1]), inside), [1])

    # -------------------------------------------------------------------------------------------- linear branch

    def features(self, name: str) -> str:
        """phi of the scaled q or k, inert tokens zero, [B, N, H, F] (RLA-3)."""
        g = self.g
        x = self.q if name == "q" else self.k
        if f"{name}_scale" in self.t:
            x = g("Mul", x, self.t[f"{name}_scale"])
        y = phi(g, x, self.call.attributes["feature_map"])
        return self.select(self.queries(self.live) if name == "q" else self.live, y)

    def linear_branch(self) -> tuple[str, str]:
        """[B, T, Hq, Dv], and the state handed on."""
        g, t, w, dims = self.g, self.t, self.window, self.call.dims
        fq, fk = self.features("q"), self.features("k")
        query, key, value = fq, fk, self.v
        if w is None:  # no token reaches the branch
            key = g("ConstantOfShape", g("Shape", key))
        if self.extends:
            query = g("Pad", query, g("Concat", [0], g("Unsqueeze", self.slots, [0]), [0, 0, 0, 0, 0, 0], axis=0))
        ids = self.document
        if w is not None and w >= 0:
            query = g("Pad", query, [0, 0, 0, 0, 0, 1, 0, 0])
            key, value, late = (self.delayed(x, rank) for x, rank in ((key, 4), (value, 4), (ids, 2)))
            # The step after a token of the last document belongs to it, whatever comes: it folds one more token.
            ids = g("Pad", ids, [0, 0, 0, 1])
            before = g("Slice", g("Pad", ids, [0, 1, 0, 0]), [0], [-1], [1])
            reader = g.either(g("Equal", ids, 0), before, ids)
            own = g("And", g("Equal", late, reader), g("Not", g("Equal", late, 0)))
            key = self.select(own, key)
        state = t.get("cache_state" if self.extends else "initial_state")
        extra: tuple[Any, ...] = ()
        rule = "linear"
        if "segment_ids" in t:
            rule, extra = "gated", (self.gate(ids),)
        packed = [g.pack(x) for x in (query, key, value)]
        heads = {"q_num_heads": dims["Hq"], "kv_num_heads": dims["Hkv"]}
        out, after = g("LinearAttention", *packed, state, *extra, results=2, update_rule=rule, scale=1.0, **heads)
        out = g.unpack(out, dims["Hq"])
        if w is not None and w >= 0:
            out = g.slice(out, 0, -1, 1)
        out = self.queries(out)
        if "memory" in t:
            memory = g.heads_first(g("MatMul", g.heads_first(fq), t["memory"]))
            out = g("Add", out, memory)
        if self.extends and w is not None:
            after = self.folded(fk, t["cache_state"])
        return out, after

    def delayed(self, x: str, rank: int) -> str:
        """w + 1 steps later, one step longer: [B, N, ..] -> [B, N + 1, ..]; no more zeros than there are steps."""
        g = self.g
        steps = g("Add", self.N, 1)
        late = g("Unsqueeze", g("Min", (self.window or 0) + 1, steps), [0])
        padded = g("Pad", x, g("Concat", [0], late, [0] * (2 * rank - 2), axis=0))
        return g("Slice", padded, [0], g("Unsqueeze", steps, [0]), [1])

    def gate(self, ids: str) -> str:
        """Log-decay [B, N, Hkv]: minus infinity where a document other than the first starts (SEG-2, SEG-6)."""
        g = self.g
        before = g("Slice", g("Pad", ids, [0, 1, 0, 0]), [0], [-1], [1])
        starts = g("And", g("Not", g("Equal", ids, 0)), g("Not", g("Equal", ids, before)))
        count = g("CumSum", g.cast(starts, INT64), 1)
        closes = g("And", starts, g("Greater", count, 1))
        decay = g.either(closes, np.array(-np.inf, np.float32), 0.0)
        wide = g("Concat", g("Shape", ids), [self.call.dims["Hkv"]], axis=0)
        return g("Expand", g("Unsqueeze", decay, [2]), wide)

    def folded(self, fk: str, state: str) -> str:
        """EXT-5: the tokens that left the cache, by a product, since rows differ in how many they are."""
        g = self.g
        left = g("Less", g("Unsqueeze", g.range(self.N), [0]), self.real)
        if "lengths" not in self.t:
            left = g("Expand", left, g("Shape", self.live))
        key, value = g.heads_first(self.select(left, fk)), g.heads_first(self.v)
        return g("Add", state, g("MatMul", g("Transpose", key, perm=[0, 1, 3, 2]), value))

    # -------------------------------------------------------------------------------------------- cache

    def kept(self, x: str) -> str:
        """EXT-4: the last slots of [B, N, Hkv, X], zeros where no token is."""
        g = self.g
        slots = self.N if self.window is None else self.slots
        # Slot s holds token s + W + (real tokens) - slots.
        first = g("Sub", g("Add", self.slots, self.real), slots)
        source = g("Add", g.range(slots), first)
        shape = g("Concat", self.batch, g("Unsqueeze", slots, [0]), axis=0)
        source = g("Expand", source, shape)
        # A spare row of zeros takes every empty slot, so that indices always exist.
        spare = g("Pad", x, [0, 0, 0, 0, 0, 1, 0, 0])
        source = g.either(g("Less", source, 0), self.N, source)
        return g("GatherND", spare, g("Unsqueeze", source, [2]), batch_dims=1)

    def outputs(self) -> dict[str, str]:
        g = self.g
        found: dict[str, str] = {}
        swa = rla = None
        if self.name != "residual_linear_attention":
            swa = self.softmax_branch()
        if self.name != "sliding_window_attention":
            rla, state = self.linear_branch()
            found["cache_state" if self.extends else "final_state"] = state
        out = mix(g, self.call, swa, rla, self.t) if swa and rla else swa or rla
        assert out is not None
        found["out"] = self.select(self.queries(self.live), out)
        if self.extends:
            found |= {"cache_k": self.kept(self.k), "cache_v": self.kept(self.v)}
            grown = g("Squeeze", self.real, [1]) if "lengths" in self.t else self.T
            found["cache_length"] = g("Add", self.t["cache_length"], grown)
        return found
