"""RAttention in plain NumPy, float32 inside, one row of the batch and one head at a time.

A port as a newcomer would write it from the documents, without a thought to speed. It conforms; the
lists beside it change one line of it at a time. Run it with `rattention conform benchmarks/diagnosed/port.py:port`.

Keys are the W cached tokens followed by the T new ones, N in all; queries are the new ones.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from rattention.spec import Call, dtype_name, load, validate

DTYPES: dict[str, Any] = {
    "float32": np.float32,
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
    "int32": np.int32,
}

Arrays = dict[str, np.ndarray]


class Port:
    """The backend: validate, widen to float32, compute, round once."""

    def describe(self) -> dict[str, Any]:
        spec = load()
        return {
            "name": "plain",
            "version": "1",
            "spec_version": spec.version,
            "operations": list(spec.operations),
            "dtypes": list(spec.storage_dtypes),
            "capabilities": list(spec.capabilities),
            "tile_sizes": {"T": [64], "window": [64], "D": [16]},
            "limits": {},
        }

    def run(self, op: str, tensors: Any, attrs: Any) -> Arrays:
        given = {name: np.asarray(x) for name, x in tensors.items() if x is not None}
        integers = {name: x for name, x in given.items() if x.dtype == np.int32}
        call = validate(op, tensors, attrs, host=integers)
        dtypes = call.output_dtypes({name: dtype_name(x) for name, x in given.items()})
        t = {name: x if name in integers else np.array(x, np.float32, order="C") for name, x in given.items()}
        with np.errstate(all="ignore"):  # NaN and inf are numbers like others
            outputs = compute(call, t, call.storage)
            return {name: np.array(outputs[name]).astype(DTYPES[dtypes[name]]) for name in call.output_shapes()}


def compute(call: Call, t: Arrays, storage: str) -> Arrays:
    op, a = call.operation.name, call.attributes
    if op == "rope_table":
        return rope_table(t["positions"], a["head_dim"], a["theta"])
    if op == "feature_map":
        return {"out": phi(t["x"], a["feature_map"])}
    if op == "feature_map.vjp":
        return {"d_x": phi_vjp(t["x"], t["d_out"], a["feature_map"])}
    if op == "rms_mix":
        return {"out": mix(t["swa"], t["rla"], t["swa_weight"], t["rla_weight"], a["eps"])}
    if op == "rms_mix.vjp":
        return mix_vjp(t["swa"], t["rla"], t, t["d_out"], a["eps"])
    out = {name: np.zeros(shape, np.float32) for name, shape in call.output_shapes().items()}
    for b in range(call.dims["B"]):
        row = Row(call, t, b)
        if call.operation.is_vjp:
            row.backward(out)
        else:
            row.forward(out)
    return out


# ---------------------------------------------------------------------------------------------- small operations


def rope_table(positions: np.ndarray, D: int, theta: float) -> Arrays:
    frequency = float(theta) ** (-2.0 * np.arange(D // 2) / D)
    angle = positions.astype(np.float64)[:, None] * frequency
    return {"rope_cos": np.cos(angle), "rope_sin": np.sin(angle)}


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    half = x.shape[-1] // 2
    one, two = x[:, :half], x[:, half:]
    return np.concatenate([one * cos - two * sin, two * cos + one * sin], -1)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def softmax_vjp(y: np.ndarray, d: np.ndarray) -> np.ndarray:
    return y * (d - (d * y).sum(-1, keepdims=True))


def phi(x: np.ndarray, kind: str) -> np.ndarray:
    if kind == "identity":
        return x
    if kind == "relu":
        return np.concatenate([np.maximum(x, 0), np.maximum(-x, 0)], -1)
    return np.concatenate([softmax(x), softmax(-x)], -1)


def phi_vjp(x: np.ndarray, d: np.ndarray, kind: str) -> np.ndarray:
    if kind == "identity":
        return d
    one, two = d[..., : x.shape[-1]], d[..., x.shape[-1] :]
    if kind == "relu":
        return np.where(x > 0, one, 0) - np.where(x < 0, two, 0)
    return softmax_vjp(softmax(x), one) - softmax_vjp(softmax(-x), two)


def root(x: np.ndarray, eps: float) -> np.ndarray:
    return np.sqrt(np.mean(x * x, -1, keepdims=True) + np.float32(eps))


def mix(swa: np.ndarray, rla: np.ndarray, swa_weight: np.ndarray, rla_weight: np.ndarray, eps: float) -> np.ndarray:
    return swa_weight * (swa / root(swa, eps)) + rla_weight * (rla / root(rla, eps))


def mix_vjp(swa: np.ndarray, rla: np.ndarray, t: Arrays, d: np.ndarray, eps: float) -> Arrays:
    g = {}
    for name, x in (("swa", swa), ("rla", rla)):
        r = root(x, eps)
        n = x / r
        dn = d * t[f"{name}_weight"]
        g[f"d_{name}"] = (dn - n * np.mean(dn * n, -1, keepdims=True)) / r
        g[f"d_{name}_weight"] = (d * n).reshape(-1, *d.shape[-2:]).sum(0)
    return g


# ---------------------------------------------------------------------------------------------- one row of the batch


class Row:
    """One row: its tokens, who reads whom, and both branches. Arrays are [T, H, X] and [N, Hkv, X]."""

    def __init__(self, call: Call, t: Arrays, b: int):
        self.call, self.t, self.b = call, t, b
        self.base = call.operation.name.removesuffix(".vjp")
        self.window = call.attributes["window"]
        self.cached = "cache_k" in t
        self.G = call.dims["Hq"] // call.dims["Hkv"]
        self.T, self.W = call.dims["T"], t["cache_k"].shape[1] if self.cached else 0
        if self.cached:
            self.from_cache(int(t["cache_length"][b]))
        else:
            self.from_segments(t["segment_ids"][b] if "segment_ids" in t else np.ones(self.T, np.int32))
        self.masks()
        q, k, v = t["q"][b], t["k"][b], t["v"][b]
        if self.cached:
            k, v = np.concatenate([t["cache_k"][b], k]), np.concatenate([t["cache_v"][b], v])
        self.q = np.where(self.query_live[:, None, None], q, 0)
        self.k = np.where(self.live[:, None, None], k, 0)
        self.v = np.where(self.live[:, None, None], v, 0)
        scale = call.attributes.get("scale")
        self.scale = np.float32(call.dims["D"] ** -0.5 if scale is None else scale)
        self.feature_map = call.attributes.get("feature_map", "softmax")
        self.state = t["cache_state"][b] if self.cached else t["initial_state"][b] if "initial_state" in t else None

    # ------------------------------------------------------------------------------------------ tokens

    def from_cache(self, seen: int) -> None:
        new = int(self.t["lengths"][self.b]) if "lengths" in self.t else self.T
        slot = np.arange(self.W + self.T)
        self.index = seen - self.W + slot
        self.live = (self.index >= 0) & (slot < self.W + new)
        self.document = np.where(self.live, 1, 0)
        self.position = np.maximum(self.index, 0)
        self.reads_state = self.live[self.W :]
        self.carries_state = True
        self.folds = self.live & (self.index < seen + new - self.W)
        if self.window is None:
            self.folds = np.zeros_like(self.live)
        slots = self.call.dims["Wnext"]
        self.kept = self.W + new - slots + np.arange(slots)
        self.length = seen + new

    def from_segments(self, ids: np.ndarray) -> None:
        start = np.array([int(np.argmax(ids == i)) for i in ids], int)
        self.index = np.arange(self.T) - start
        self.live = ids != 0
        self.document = ids
        self.position = self.t["positions"][self.b] if "positions" in self.t else self.index
        names = ids[ids != 0]
        first, last = (names[0], names[-1]) if names.size else (0, 0)
        self.reads_state = self.live & (ids == first)
        self.carries_state = first == last
        if self.window is None:
            self.folds = np.zeros(self.T, bool)
        else:
            self.folds = self.live & (ids == last) & (self.index < (ids == last).sum() - max(self.window, 0))

    def masks(self) -> None:
        """SWA-1 and RLA-1: near and far, [T, N]."""
        self.query_live = self.live[self.W :]
        same = self.document[self.W :, None] == self.document[None, :]
        same &= self.query_live[:, None] & self.live[None, :]
        distance = self.index[self.W :, None] - self.index[None, :]
        window = np.inf if self.window is None else self.window
        self.near = same & (distance >= 0) & (distance <= window)
        self.far = same & (distance > window)

    def table(self, name: str, rows: np.ndarray) -> np.ndarray:
        table = self.t[name]
        rows = np.where((rows >= 0) & (rows < table.shape[0]), rows, 0)  # padding may hold any position
        return table[rows] if table.shape[0] else np.zeros((len(rows), table.shape[1]), np.float32)

    # ------------------------------------------------------------------------------------------ softmax branch

    def rotated(self, h: int) -> tuple[np.ndarray, np.ndarray]:
        q, k = self.q[:, h], self.k[:, h // self.G]
        if "rope_cos" not in self.t:
            return q, k
        cos, sin = self.table("rope_cos", self.position), self.table("rope_sin", self.position)
        return rotate(q, cos[self.W :], sin[self.W :]), rotate(k, cos, sin)

    def weights(self, h: int) -> np.ndarray:
        q, k = self.rotated(h)
        scores = np.where(self.near, (q @ k.T) * self.scale, -np.inf)
        top = scores.max(-1, keepdims=True, initial=-np.inf)
        e = np.where(self.near, np.exp(scores - np.where(top == -np.inf, 0, top)), 0)
        total = e.sum(-1, keepdims=True)
        return e / np.where(self.near.any(-1, keepdims=True), total, 1)

    def softmax_branch(self, h: int) -> np.ndarray:
        return self.weights(h) @ self.v[:, h // self.G]

    def softmax_vjp(self, h: int, d: np.ndarray, g: Arrays) -> None:
        q, k = self.rotated(h)
        kv, p = h // self.G, self.weights(h)
        dp = d @ self.v[:, kv].T
        ds = softmax_vjp(p, dp) * self.scale
        dq, dk = ds @ k, ds.T @ q
        if "rope_cos" in self.t:
            cos, sin = self.table("rope_cos", self.position), self.table("rope_sin", self.position)
            dq, dk = rotate(dq, cos[self.W :], -sin[self.W :]), rotate(dk, cos, -sin)
        g["q"][:, h] += dq
        g["k"][:, kv] += dk
        g["v"][:, kv] += p.T @ d

    # ------------------------------------------------------------------------------------------ linear branch

    def scaled(self, x: np.ndarray, name: str) -> np.ndarray:
        return x * self.t[name] if name in self.t else x

    def features(self, h: int) -> tuple[np.ndarray, np.ndarray]:
        fq = phi(self.scaled(self.q[:, h], "q_scale"), self.feature_map)
        fk = phi(self.scaled(self.k[:, h // self.G], "k_scale"), self.feature_map)
        return fq, np.where(self.live[:, None], fk, 0)

    def linear_branch(self, h: int) -> np.ndarray:
        fq, fk = self.features(h)
        out = np.where(self.far, fq @ fk.T, 0) @ self.v[:, h // self.G]
        if self.state is not None:
            out = out + np.where(self.reads_state[:, None], fq @ self.state[h // self.G], 0)
        if "memory" in self.t:
            out = out + fq @ self.t["memory"][h]
        return out

    def new_state(self, kv: int) -> np.ndarray:
        fk = self.features(kv * self.G)[1]
        folded = np.where(self.folds[:, None], fk, 0).T @ np.where(self.folds[:, None], self.v[:, kv], 0)
        if self.state is not None and self.carries_state:
            folded = folded + self.state[kv]
        return folded

    def linear_vjp(self, h: int, d: np.ndarray, g: Arrays) -> None:
        kv = h // self.G
        fq, fk = self.features(h)
        a = np.where(self.far, fq @ fk.T, 0)
        da = np.where(self.far, d @ self.v[:, kv].T, 0)
        dfq, dfk = da @ fk, da.T @ fq
        g["v"][:, kv] += a.T @ d
        if self.state is not None:
            reads = self.reads_state[:, None]
            dfq = dfq + np.where(reads, d @ self.state[kv].T, 0)
            g["state"][kv] += np.where(reads, fq, 0).T @ d
        if "memory" in self.t:
            dfq = dfq + d @ self.t["memory"][h].T
            g["memory"][h] += np.where(self.query_live[:, None], fq, 0).T @ d
        d_state = self.t.get("d_cache_state" if self.cached else "d_final_state")
        if d_state is not None and h % self.G == 0:
            folds = self.folds[:, None]
            dfk = dfk + np.where(folds, self.v[:, kv] @ d_state[self.b, kv].T, 0)
            g["v"][:, kv] += np.where(folds, fk @ d_state[self.b, kv], 0)
            if self.state is not None and self.carries_state:
                g["state"][kv] += d_state[self.b, kv]
        for name, x, df, to in (("q", self.q[:, h], dfq, g["q"][:, h]), ("k", self.k[:, kv], dfk, g["k"][:, kv])):
            dx = phi_vjp(self.scaled(x, f"{name}_scale"), df, self.feature_map)
            to += self.scaled(dx, f"{name}_scale")
            g[f"{name}_scale"] += (dx * x).sum(0)

    # ------------------------------------------------------------------------------------------ outputs

    def branches(self) -> tuple[np.ndarray, np.ndarray]:
        shape = (self.T, self.call.dims["Hq"], self.call.dims["Dv"])
        swa, rla = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        for h in range(shape[1]):
            if self.base != "residual_linear_attention":
                swa[:, h] = self.softmax_branch(h)
            if self.base != "sliding_window_attention":
                rla[:, h] = self.linear_branch(h)
        return swa, rla

    def forward(self, out: Arrays) -> None:
        swa, rla = self.branches()
        y = {"sliding_window_attention": swa, "residual_linear_attention": rla}.get(self.base)
        if y is None:
            y = mix(swa, rla, self.t["swa_weight"], self.t["rla_weight"], self.call.attributes["eps"])
        out["out"][self.b] = np.where(self.query_live[:, None, None], y, 0)
        state = "cache_state" if self.cached else "final_state"
        if state in out:
            for kv in range(self.call.dims["Hkv"]):
                out[state][self.b, kv] = self.new_state(kv)
        if self.cached:
            out["cache_length"] = out["cache_length"].astype(np.int64)
            out["cache_length"][self.b] = self.length
            for name, x in (("cache_k", self.k), ("cache_v", self.v)):
                for slot, n in enumerate(self.kept):
                    if n >= 0 and self.live[n]:
                        out[name][self.b, slot] = x[n]

    def backward(self, out: Arrays) -> None:
        t, b = self.t, self.b
        d = np.where(self.query_live[:, None, None], t["d_out"][b], 0)
        Hkv, F = self.call.dims["Hkv"], self.call.dims.get("F", 0)
        Dv = self.call.dims["Dv"]
        g: Arrays = {"q": np.zeros_like(self.q), "k": np.zeros_like(self.k), "v": np.zeros_like(self.v)}
        g["state"] = np.zeros((Hkv, F, Dv), np.float32)
        g["memory"] = np.zeros((Hkv * self.G, F, Dv), np.float32)
        g["q_scale"], g["k_scale"] = np.zeros(self.q.shape[2], np.float32), np.zeros(self.q.shape[2], np.float32)
        near = far = d
        if self.base.startswith("rattention"):
            mixed = mix_vjp(*self.branches(), t, d, self.call.attributes["eps"])
            near, far = mixed["d_swa"], mixed["d_rla"]
            out["d_swa_weight"] += mixed["d_swa_weight"]
            out["d_rla_weight"] += mixed["d_rla_weight"]
        for h in range(Hkv * self.G):
            if self.base != "residual_linear_attention":
                self.softmax_vjp(h, near[:, h], g)
            if self.base != "sliding_window_attention":
                self.linear_vjp(h, far[:, h], g)
        for name in ("k", "v"):
            if f"d_cache_{name}" in t:
                for slot, n in enumerate(self.kept):
                    if n >= 0 and self.live[n]:
                        g[name][n] += t[f"d_cache_{name}"][b, slot]
        for name, live in (("q", self.query_live), ("k", self.live), ("v", self.live)):
            g[name] = np.where(live[:, None, None], g[name], 0)
        out["d_q"][b], out["d_k"][b], out["d_v"][b] = g["q"], g["k"][self.W :], g["v"][self.W :]
        if self.cached:
            out["d_cache_k"][b], out["d_cache_v"][b] = g["k"][: self.W], g["v"][: self.W]
        carried = "d_cache_state" if self.cached else "d_initial_state"
        if carried in out:
            out[carried][b] = g["state"]
        for name in ("memory", "q_scale", "k_scale"):
            if f"d_{name}" in out:
                out[f"d_{name}"] += g[name]


port = Port()
