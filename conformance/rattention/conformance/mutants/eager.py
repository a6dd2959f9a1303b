"""The eager form that mutants change: RAttention in float32 with explicit masks, cut into small overridable steps.

It is written for being changed in one place, not for speed: quadratic in T, every step a method, the same steps for the
forward, the gradient and the cache. Unchanged, it conforms; a mutant overrides one method (see the sibling modules).

Inside, queries are `[B, Hkv, G, T, D]`, keys `[B, Hkv, N, D]` with N = W + T.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from rattention.conformance.mutants import plan as plans
from rattention.spec import Call

Arrays = dict[str, np.ndarray]


class Form:
    """One call. Attributes worth reading in a mutant: `op`, `backward`, `attrs`, `dims`, `storage`, `plan`."""

    accumulate: Any = np.float32

    def __init__(self, call: Call, tensors: Mapping[str, np.ndarray]):
        self.call = call
        self.op = call.operation.name.removesuffix(".vjp")
        self.backward = call.operation.is_vjp
        self.attrs = call.attributes
        self.dims = call.dims
        self.storage = call.storage
        self.tensors = dict(tensors)
        self.window: int | None = call.attributes.get("window")

    # -------------------------------------------------------------------------------------------- entry

    def run(self) -> Arrays:
        """Outputs in float32, before the rounding to storage."""
        if self.op == "rope_table":
            return self.rope_table()
        if self.op == "feature_map":
            return self.feature_map()
        if self.op == "rms_mix":
            return self.rms_mix()
        self.plan = self.make_plan()
        self.load()
        return self.gradient() if self.backward else self.forward()

    @property
    def has_near(self) -> bool:
        return self.op != "residual_linear_attention"

    @property
    def has_far(self) -> bool:
        return self.op != "sliding_window_attention"

    def make_plan(self) -> plans.Plan:
        return (plans.from_cache if "cache_k" in self.tensors else plans.from_segments)(self.call, self.tensors)

    def get(self, name: str) -> np.ndarray | None:
        t = self.tensors.get(name)
        # In C order, so that sums do not depend on the strides of the argument (NUM-7).
        return None if t is None else np.asarray(t).astype(self.accumulate, order="C")

    def need(self, name: str) -> np.ndarray:
        t = self.get(name)
        assert t is not None, name
        return t

    # -------------------------------------------------------------------------------------------- small operations

    def rope_table(self) -> Arrays:
        """ROPE-1, ROPE-2."""
        D, theta = self.attrs["head_dim"], self.attrs["theta"]
        angle = np.asarray(self.tensors["positions"])[:, None] * self.frequencies(D, theta)
        return {"rope_cos": np.cos(angle), "rope_sin": np.sin(angle)}

    def frequencies(self, D: int, theta: float) -> np.ndarray:
        return float(theta) ** (-2.0 * np.arange(D // 2) / D)

    def feature_map(self) -> Arrays:
        x = self.need("x")
        if self.backward:
            return {"d_x": self.phi_vjp(x, self.need("d_out"))}
        return {"out": self.phi(x)}

    def rms_mix(self) -> Arrays:
        swa, rla = self.need("swa"), self.need("rla")
        if not self.backward:
            return {"out": self.mix(swa, rla)}
        d_swa, d_rla, d_swa_weight, d_rla_weight = self.mix_vjp(swa, rla, self.need("d_out"))
        return {"d_swa": d_swa, "d_rla": d_rla, "d_swa_weight": d_swa_weight, "d_rla_weight": d_rla_weight}

    # -------------------------------------------------------------------------------------------- operands

    def group(self, x: np.ndarray) -> np.ndarray:
        """[B, T, Hq, X] -> [B, Hkv, G, T, X]: query head h reads key/value head h // G (SWA-4)."""
        B, T, Hq, X = x.shape
        Hkv = self.dims["Hkv"]
        return x.reshape(B, T, Hkv, Hq // Hkv, X).transpose(0, 2, 3, 1, 4)

    def ungroup(self, x: np.ndarray) -> np.ndarray:
        B, Hkv, G, T, X = x.shape
        return x.transpose(0, 3, 1, 2, 4).reshape(B, T, Hkv * G, X)

    def load(self) -> None:
        """Select before multiplying: whatever inert tokens hold is replaced by zero (SEG-5, EXT-7, EXT-9)."""
        plan = self.plan
        self.q = self.group(self.select(self.need("q"), plan.query_live))
        keys, values = self.need("k"), self.need("v")
        if plan.slots:
            keys = np.concatenate([self.need("cache_k"), keys], 1)
            values = np.concatenate([self.need("cache_v"), values], 1)
        self.k = self.select(keys, plan.live).transpose(0, 2, 1, 3)
        self.v = self.select(values, plan.live).transpose(0, 2, 1, 3)
        self.state = self.get("cache_state" if "cache_k" in self.tensors else "initial_state")
        memory = self.get("memory")
        self.memory = None if memory is None else memory.reshape(self.dims["Hkv"], -1, *memory.shape[1:])
        self.scale = self.make_scale()

    def select(self, x: np.ndarray, live: np.ndarray) -> np.ndarray:
        return np.where(live[:, :, None, None], x, np.float32(0))

    def make_scale(self) -> float:
        scale = self.attrs.get("scale")
        return self.dims["D"] ** -0.5 if scale is None else scale

    # -------------------------------------------------------------------------------------------- masks

    def near(self) -> np.ndarray:
        """SWA-1: keys of the softmax branch, [B, T, N]."""
        distance, same = self.plan.distance(), self.plan.same()
        return same & (distance >= 0) & (distance <= self.near_window())

    def far(self) -> np.ndarray:
        """RLA-1: keys of the linear branch, [B, T, N]."""
        return self.plan.same() & (self.plan.distance() > self.far_window())

    def near_window(self) -> float:
        return np.inf if self.window is None else self.window

    def far_window(self) -> float:
        return np.inf if self.window is None else self.window

    # -------------------------------------------------------------------------------------------- softmax branch

    def rotate(self, x: np.ndarray, rows: np.ndarray, sign: int = 1) -> np.ndarray:
        """ROPE-3 on [B, H.., T, D]; sign -1 is the transpose."""
        cos, sin = self.get("rope_cos"), self.get("rope_sin")
        if cos is None or sin is None:
            return x
        at = self.select_rows(rows)
        shape = (x.shape[0],) + (1,) * (x.ndim - 3) + (x.shape[-2], x.shape[-1] // 2)
        c, s = self.table(cos, at).reshape(shape), sign * self.table(sin, at).reshape(shape)
        one, two = np.split(x, 2, axis=-1)
        return np.concatenate([one * c - two * s, two * c + one * s], -1)

    def select_rows(self, rows: np.ndarray) -> np.ndarray:
        """Inert tokens may carry any position; they are zero, so that any row does."""
        return np.where((rows >= 0) & (rows < self.need("rope_cos").shape[0]), rows, 0)

    def table(self, table: np.ndarray, at: np.ndarray) -> np.ndarray:
        return table[at] if table.shape[0] else np.zeros((*at.shape, table.shape[1]), table.dtype)

    def scores(self) -> np.ndarray:
        """SWA-2, [B, Hkv, G, T, N]."""
        rows, slots = self.plan.rope_row, self.plan.slots
        self.rq, self.rk = self.rotate(self.q, rows[:, slots:]), self.rotate(self.k, rows)
        return self.dot(self.rq, self.rk) * np.float32(self.scale)

    def dot(self, queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
        return queries @ keys.swapaxes(-1, -2)[:, :, None]

    def softmax(self, scores: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """SWA-3; a row without keys is zero (SWA-5)."""
        mask = mask[:, None, None]
        top = np.where(mask, scores, -np.inf).max(-1, keepdims=True, initial=-np.inf)
        # A NaN or infinite score must surface: only the empty row is exempt from the subtraction.
        p = np.where(mask, np.exp(np.where(mask, scores - np.where(top == -np.inf, 0, top), -np.inf)), 0)
        total = p.sum(-1, keepdims=True)
        return p / np.where(mask.any(-1, keepdims=True), total, 1)

    def near_branch(self) -> np.ndarray:
        self.p = self.softmax(self.scores(), self.near())
        return self.p @ self.v[:, :, None]

    # -------------------------------------------------------------------------------------------- linear branch

    def phi(self, x: np.ndarray) -> np.ndarray:
        """FM-1 to FM-5."""
        kind = self.attrs["feature_map"]
        if kind == "softmax":
            return np.concatenate([_softmax(x), _softmax(-x)], -1)
        return np.concatenate([_relu(x), _relu(-x)], -1) if kind == "relu" else x

    def phi_vjp(self, x: np.ndarray, d: np.ndarray) -> np.ndarray:
        kind = self.attrs["feature_map"]
        if kind == "identity":
            return d
        one, two = np.split(d, 2, axis=-1)
        if kind == "softmax":
            return _softmax_vjp(_softmax(x), one) - _softmax_vjp(_softmax(-x), two)
        return np.where(x > 0, one, 0) - np.where(x < 0, two, 0)  # FM-6, at NaN too

    def scaled(self, x: np.ndarray, name: str) -> np.ndarray:
        scale = self.get(name)
        return x if scale is None else x * scale

    def features(self) -> None:
        """RLA-3; inert keys have no features."""
        self.fq = self.phi(self.scaled(self.q, "q_scale"))
        fk = self.phi(self.scaled(self.k, "k_scale"))
        self.fk = np.where(self.plan.live[:, None, :, None], fk, 0)

    def carried(self) -> np.ndarray:
        """Factor 1 or 0 of the carried state per query, [B, 1, 1, T, 1] (RLA-4, SEG-6)."""
        return self.plan.reads_state[:, None, None, :, None]

    def far_branch(self) -> np.ndarray:
        self.features()
        self.a = np.where(self.far()[:, None, None], self.dot(self.fq, self.fk), 0)
        out = self.a @ self.v[:, :, None]
        if self.state is not None:
            out = out + np.where(self.carried(), self.fq @ self.read_state()[:, :, None], 0)
        if self.memory is not None:
            out = out + self.fq @ self.memory[None]
        return out

    def read_state(self) -> np.ndarray:
        """The carried state as queries see it, [B, Hkv, F, Dv]."""
        assert self.state is not None
        return self.state

    def new_state(self) -> np.ndarray:
        """RLA-6: the state handed on, [B, Hkv, F, Dv]."""
        folds = self.folds()[:, None, :, None]
        folded = np.where(folds, self.fk, 0).swapaxes(-1, -2) @ np.where(folds, self.v, 0)
        if self.state is None:
            return folded
        return folded + np.where(self.plan.carries_state[:, None, None, None], self.state, 0)

    def folds(self) -> np.ndarray:
        return self.plan.folds

    # -------------------------------------------------------------------------------------------- mix

    def norm(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """MIX-2: the normalised rows and the factor that made them."""
        r = 1 / np.sqrt(np.mean(np.square(x), -1, keepdims=True) + np.float32(self.attrs["eps"]))
        return x * r, r

    def mix(self, swa: np.ndarray, rla: np.ndarray) -> np.ndarray:
        """MIX-1 on [B, T, Hq, Dv]."""
        return self.need("swa_weight") * self.norm(swa)[0] + self.need("rla_weight") * self.norm(rla)[0]

    def mix_vjp(self, swa: np.ndarray, rla: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, ...]:
        """Gradients of swa, rla, swa_weight, rla_weight."""
        d_x, d_w = [], []
        for x, name in ((swa, "swa_weight"), (rla, "rla_weight")):
            n, r = self.norm(x)
            d_x.append(self.norm_vjp(n, r, d * self.need(name)))
            d_w.append((d * n).sum((0, 1)))
        return *d_x, *d_w

    def norm_vjp(self, n: np.ndarray, r: np.ndarray, d: np.ndarray) -> np.ndarray:
        return r * (d - n * np.mean(d * n, -1, keepdims=True))

    # -------------------------------------------------------------------------------------------- forward

    def forward(self) -> Arrays:
        outputs = {"out": self.hide(self.branches())}
        if self.has_far:
            outputs["final_state" if "cache_k" not in self.tensors else "cache_state"] = self.new_state()
        if "cache_k" in self.tensors:
            outputs["cache_k"], outputs["cache_v"] = self.new_cache(self.k), self.new_cache(self.v)
            outputs["cache_length"] = self.plan.length
        return outputs

    def branches(self) -> np.ndarray:
        self.swa = self.ungroup(self.near_branch()) if self.has_near else None
        self.rla = self.ungroup(self.far_branch()) if self.has_far else None
        if self.swa is not None and self.rla is not None:
            return self.mix(self.swa, self.rla)
        out = self.swa if self.rla is None else self.rla
        assert out is not None
        return out

    def hide(self, out: np.ndarray) -> np.ndarray:
        """SEG-4, EXT-7."""
        return self.select(out, self.plan.query_live)

    def new_cache(self, x: np.ndarray) -> np.ndarray:
        """[B, Hkv, N, X] -> the kept tokens [B, Wnext, Hkv, X] (EXT-4)."""
        keeps = self.plan.keeps
        kept = np.take_along_axis(x.transpose(0, 2, 1, 3), np.maximum(keeps, 0)[:, :, None, None], 1)
        return np.where((keeps >= 0)[:, :, None, None], kept, 0)

    # -------------------------------------------------------------------------------------------- gradient

    def gradient(self) -> Arrays:
        """GRAD-1 to GRAD-6; the forward is recomputed with the same steps."""
        self.branches()
        d_out = self.select(self.need("d_out"), self.plan.query_live)
        g: Arrays = {name: np.zeros_like(x) for name, x in (("q", self.q), ("k", self.k), ("v", self.v))}
        d_near = d_far = d_out
        if self.swa is not None and self.rla is not None:
            d_near, d_far, g["swa_weight"], g["rla_weight"] = self.mix_vjp(self.swa, self.rla, d_out)
        if self.has_near:
            self.near_vjp(self.group(d_near), g)
        if self.has_far:
            self.far_vjp(self.group(d_far), g)
        return self.collect(g)

    def near_vjp(self, d: np.ndarray, g: Arrays) -> None:
        rows, slots = self.plan.rope_row, self.plan.slots
        dp = d @ self.v.swapaxes(-1, -2)[:, :, None]
        ds = self.p * (dp - (dp * self.p).sum(-1, keepdims=True)) * np.float32(self.scale)
        g["q"] += self.rotate(ds @ self.rk[:, :, None], rows[:, slots:], -1)
        g["k"] += self.rotate(self.over_group(ds.swapaxes(-1, -2) @ self.rq), rows, -1)
        g["v"] += self.over_group(self.p.swapaxes(-1, -2) @ d)

    def over_group(self, x: np.ndarray) -> np.ndarray:
        """GRAD-3: sum over the query heads that share a key/value head."""
        return x.sum(2)

    def state_cotangent(self) -> np.ndarray | None:
        return self.get("d_cache_state" if "cache_k" in self.tensors else "d_final_state")

    def far_vjp(self, d: np.ndarray, g: Arrays) -> None:
        da = np.where(self.far()[:, None, None], d @ self.v.swapaxes(-1, -2)[:, :, None], 0)
        d_fq = da @ self.fk[:, :, None]
        d_fk = self.over_group(da.swapaxes(-1, -2) @ self.fq)
        g["v"] += self.over_group(self.a.swapaxes(-1, -2) @ d)
        d_state = self.state_cotangent()
        if d_state is not None:
            folds = self.folds()[:, None, :, None]
            d_fk += np.where(folds, self.v @ d_state.swapaxes(-1, -2), 0)
            g["v"] += np.where(folds, self.fk @ d_state, 0)
        if self.state is not None:
            reads = self.carried()
            d_fq += np.where(reads, d @ self.read_state().swapaxes(-1, -2)[:, :, None], 0)
            g["state"] = self.over_group(np.where(reads, self.fq, 0).swapaxes(-1, -2) @ d)
            if d_state is not None:
                g["state"] += np.where(self.plan.carries_state[:, None, None, None], d_state, 0)
        if self.memory is not None:
            d_fq += d @ self.memory[None].swapaxes(-1, -2)
            live = self.plan.query_live[:, None, None, :, None]
            g["memory"] = (np.where(live, self.fq, 0).swapaxes(-1, -2) @ d).sum(0)
        for name, x, df in (("q", self.q, d_fq), ("k", self.k, d_fk)):
            dx = self.phi_vjp(self.scaled(x, f"{name}_scale"), df)
            g[name] += self.scaled(dx, f"{name}_scale")
            g[f"{name}_scale"] = (dx * x).reshape(-1, x.shape[-1]).sum(0)

    def collect(self, g: Arrays) -> Arrays:
        """Gradients in the layout of their inputs, inert ones exactly zero (GRAD-5)."""
        live, slots = self.plan.live, self.plan.slots
        out: Arrays = {"d_q": self.select(self.ungroup(g["q"]), self.plan.query_live)}
        for name in ("k", "v"):
            d = g[name].transpose(0, 2, 1, 3)
            if "cache_k" in self.tensors:
                d = d + self.cache_cotangent(name, d)
                out[f"d_cache_{name}"] = self.select(d[:, :slots], live[:, :slots])
            out[f"d_{name}"] = self.select(d[:, slots:], live[:, slots:])
        if "state" in g:
            out["d_cache_state" if "cache_k" in self.tensors else "d_initial_state"] = g["state"]
        if "memory" in g:
            out["d_memory"] = g["memory"].reshape(self.dims["Hq"], *g["memory"].shape[2:])
        for name in ("swa_weight", "rla_weight", "q_scale", "k_scale"):
            if name in g:
                out[f"d_{name}"] = g[name]
        return {name: x for name, x in out.items() if self.call.has_output(name)}

    def cache_cotangent(self, name: str, like: np.ndarray) -> np.ndarray:
        """GRAD-4: what the cotangent of the returned cache says about each key, [B, N, Hkv, X]."""
        total = np.zeros_like(like)
        d = self.get(f"d_cache_{name}")
        if d is not None:
            for b, keeps in enumerate(self.plan.keeps):
                total[b, keeps[keeps >= 0]] = d[b, keeps >= 0]
        return total


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _softmax_vjp(y: np.ndarray, d: np.ndarray) -> np.ndarray:
    return y * (d - (y * d).sum(-1, keepdims=True))


def _relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)
