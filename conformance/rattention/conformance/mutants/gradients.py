"""Faults of the backward pass alone; the forward is right."""

from __future__ import annotations

import ml_dtypes
import numpy as np
from rattention.conformance.mutants.eager import Form
from rattention.conformance.mutants.port import plant


class Spoiled(Form):
    """One gradient is passed through `spoil`."""

    target = ""

    def spoil(self, d: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def run(self):
        outputs = super().run()
        if self.backward and self.target in outputs:
            outputs[self.target] = self.spoil(outputs[self.target])
        return outputs


@plant("GRAD-2", "gradient", "TRAPS 2: window ignored in the backward pass only")
class BackwardIgnoresTheWindow(Form):
    """The gradient is that of full causal softmax."""

    def near_window(self):
        return np.inf if self.backward and self.window not in (None, -1) else super().near_window()


@plant("GRAD-2", "gradient", "TRAPS 2")
class BackwardFarWindowOff(Form):
    """The gradient of the linear branch reads i <= t-w."""

    def far_window(self):
        w = super().far_window()
        return w - 1 if self.backward and 0 <= w < np.inf else w


@plant("GRAD-2", "gradient", "TRAPS 3")
class BackwardIgnoresSegments(Form):
    """The gradient of the linear branch crosses segment borders."""

    def far(self):
        if not self.backward or "segment_ids" not in self.tensors:
            return super().far()
        T = self.dims["T"]
        live = self.plan.live
        distance = np.arange(T)[:, None] - np.arange(T)
        return (distance > self.far_window()) & live[:, :, None] & live[:, None, :]


@plant("GRAD-1", "gradient", "rationale: the Jacobian of the softmax is not diagonal")
class SoftmaxGradientWithoutRowSum(Form):
    """ds = p * dp, without the subtraction of the row's sum."""

    def near_vjp(self, d, g):
        dp = d @ self.v.swapaxes(-1, -2)[:, :, None]
        ds = self.p * dp * np.float32(self.scale)
        rows, slots = self.plan.rope_row, self.plan.slots
        g["q"] += self.rotate(ds @ self.rk[:, :, None], rows[:, slots:], -1)
        g["k"] += self.rotate(self.over_group(ds.swapaxes(-1, -2) @ self.rq), rows, -1)
        g["v"] += self.over_group(self.p.swapaxes(-1, -2) @ d)


@plant("GRAD-1", "gradient", "rationale: the transpose of a rotation turns back")
class RopeGradientTurnsForward(Form):
    """Gradients of q and k are rotated forward instead of back."""

    def rotate(self, x, rows, sign=1):
        return super().rotate(x, rows, abs(sign))


@plant("GRAD-1", "gradient", "rationale: one gradient only")
class QueryGradientUnscaled(Form):
    """The softmax part of dq lacks the scale."""

    def near_vjp(self, d, g):
        before = g["q"].copy()
        super().near_vjp(d, g)
        g["q"] = before + (g["q"] - before) / np.float32(self.scale or 1)


@plant("GRAD-1", "gradient", "rationale: one gradient only")
class KeyGradientWithoutLinear(Form):
    """dk leaves out what reads it through the linear branch."""

    def far_vjp(self, d, g):
        before = g["k"].copy()
        super().far_vjp(d, g)
        if self.has_near:
            g["k"] = before


@plant("GRAD-1", "gradient", "rationale: one gradient only")
class ValueGradientWithoutLinear(Form):
    """dv leaves out what reads it through the linear branch."""

    def far_vjp(self, d, g):
        before = g["v"].copy()
        super().far_vjp(d, g)
        if self.has_near:
            g["v"] = before


@plant("GRAD-1", "past size", "rationale: a state saved at every chunk of 64 and detached")
class GradientStopsAtChunks(Form):
    """Keys and values get no gradient from queries in later chunks of 64, through the linear branch."""

    def far_vjp(self, d, g):
        whole = self.far
        query = self.plan.index[:, self.plan.slots :, None] // 64
        self.far = lambda: whole() & (query == self.plan.index[:, None, :] // 64)
        q = g["q"].copy()
        try:
            self.a = np.where(self.far()[:, None, None], self.a, 0)
            super().far_vjp(d, g)
        finally:
            self.far = whole
        g["q"] = q + (g["q"] - q)


@plant("GRAD-1", "past size", "TRAPS 11: a ragged tail that is never written")
class GradientTailNotWritten(Form):
    """When T is past 128, gradients of the last T mod 64 tokens of k are zero."""

    def collect(self, g):
        out, T = super().collect(g), self.dims["T"]
        if T > 128 and T % 64:
            out["d_k"] = out["d_k"].copy()
            out["d_k"][:, T // 64 * 64 :] = 0
        return out


@plant("GRAD-1", "past size", "rationale: a fault that starts past 256 tokens")
class Past256QueryGradientHalved(Form):
    """dq is halved from token 256 on."""

    def collect(self, g):
        out = super().collect(g)
        late = np.arange(self.dims["T"]) >= 256
        out["d_q"] = np.where(late[:, None, None], out["d_q"] / 2, out["d_q"])
        return out


@plant("GRAD-1", "past size", "rationale: a fault that starts past 512 tokens")
class Past512ValueGradientLost(Form):
    """dv is zero from token 512 on."""

    def collect(self, g):
        out = super().collect(g)
        late = np.arange(self.dims["T"]) >= 512
        out["d_v"] = np.where(late[:, None, None], 0, out["d_v"])
        return out


@plant("GRAD-3", "gradient", "TRAPS 16: dk and dv summed after rounding")
class GroupSumInStorage(Form):
    """Gradients of shared heads are rounded to bfloat16 one query head at a time, in bfloat16 calls."""

    def over_group(self, x):
        if self.storage != "bfloat16":
            return super().over_group(x)
        total = np.zeros_like(x[:, :, 0])
        for i in range(x.shape[2]):
            total = (total + x[:, :, i].astype(ml_dtypes.bfloat16)).astype(ml_dtypes.bfloat16).astype(np.float32)
        return total


@plant("GRAD-1", "gradient", "rationale: the Jacobian of the norm")
class NormGradientDiagonal(Form):
    """The gradient of the norm leaves out the mean over the row."""

    def norm_vjp(self, n, r, d):
        return r * d


@plant("GRAD-1", "gradient", "rationale: one gradient only")
class SecondHalfGradientSign(Form):
    """The gradient of softmax(-x) has the wrong sign."""

    def phi_vjp(self, x, d):
        if self.attrs["feature_map"] != "softmax":
            return super().phi_vjp(x, d)
        half = d.shape[-1] // 2
        zero = np.zeros_like(d)
        one, two = zero.copy(), zero.copy()
        one[..., :half], two[..., half:] = d[..., :half], d[..., half:]
        return super().phi_vjp(x, one) - super().phi_vjp(x, two)


@plant("GRAD-1 FM-2", "gradient", "rationale: one feature map only")
class ReluGradientOneSided(Form):
    """The gradient of relu(-x) is missing."""

    def phi_vjp(self, x, d):
        out = super().phi_vjp(x, d)
        return np.where(x > 0, out, 0) if self.attrs["feature_map"] == "relu" else out


@plant("GRAD-4", "gradient", "TRAPS 26: the carried state's gradient is dropped")
class CarriedStateGradientDropped(Spoiled):
    """d_initial_state is zero."""

    target = "d_initial_state"

    def spoil(self, d):
        return np.zeros_like(d)


@plant("GRAD-4", "gradient", "TRAPS 26")
class CacheStateGradientDropped(Spoiled):
    """d_cache_state is zero."""

    target = "d_cache_state"

    def spoil(self, d):
        return np.zeros_like(d)


@plant("GRAD-4", "gradient", "TRAPS 26")
class StateCotangentIgnored(Form):
    """The cotangent of the state handed on is not read."""

    def state_cotangent(self):
        return None


@plant("GRAD-4", "gradient", "TRAPS 26")
class StateCotangentStopsAtTheState(Form):
    """The cotangent of the state reaches k and v, not the carried state."""

    def far_vjp(self, d, g):
        carries = self.plan.carries_state
        self.plan.carries_state = np.zeros_like(carries)
        super().far_vjp(d, g)
        self.plan.carries_state = carries


@plant("GRAD-4", "gradient", "rationale: the state's cotangent broadcast over all tokens")
class StateCotangentReachesTheWindow(Form):
    """The cotangent of the state also reaches the tokens still in the window."""

    def folds(self):
        return self.plan.live if self.backward and self.window is not None else super().folds()


@plant("GRAD-4", "gradient", "rationale: cached keys are constants in most code")
class CacheKeyGradientDropped(Spoiled):
    """d_cache_k is zero."""

    target = "d_cache_k"

    def spoil(self, d):
        return np.zeros_like(d)


@plant("GRAD-4", "gradient", "rationale: an output seldom differentiated")
class CacheCotangentIgnored(Form):
    """Cotangents of the returned cache are not read."""

    def cache_cotangent(self, name, like):
        return np.zeros_like(like)


@plant("GRAD-4", "gradient", "rationale: slots shifted by one")
class CacheCotangentShifted(Form):
    """Cotangents of the returned cache reach the neighbouring token."""

    def cache_cotangent(self, name, like):
        return np.roll(super().cache_cotangent(name, like), 1, axis=1)


@plant("GRAD-1", "gradient", "rationale: one gradient only")
class MemoryGradientAveraged(Spoiled):
    """d_memory is averaged over the batch."""

    target = "d_memory"

    def spoil(self, d):
        return d / max(self.dims["B"], 1)


@plant("GRAD-1", "gradient", "rationale: memory is per query head, its gradient is not summed over a group")
class MemoryGradientShared(Spoiled):
    """d_memory is averaged over each group of query heads."""

    target = "d_memory"

    def spoil(self, d):
        Hkv = self.dims["Hkv"]
        grouped = d.reshape(Hkv, -1, *d.shape[1:])
        return np.broadcast_to(grouped.mean(1, keepdims=True), grouped.shape).reshape(d.shape)


@plant("GRAD-1", "gradient", "rationale: one gradient only")
class KeyScaleGradientFirstHead(Spoiled):
    """d_k_scale is multiplied by the number of heads."""

    target = "d_k_scale"

    def spoil(self, d):
        return d * (1 + self.dims["Hkv"])


@plant("GRAD-1", "gradient", "rationale: one gradient only")
class QueryScaleGradientSign(Spoiled):
    """d_q_scale has the wrong sign."""

    target = "d_q_scale"

    def spoil(self, d):
        return -d


@plant("GRAD-1 MIX-1", "gradient", "rationale: one gradient only")
class SoftmaxWeightGradientFirstRow(Form):
    """d_swa_weight leaves out the last token."""

    def mix_vjp(self, swa, rla, d):
        d_swa, d_rla, d_w, d_u = super().mix_vjp(swa, rla, d)
        last = (d * self.norm(swa)[0])[:, -1:].sum((0, 1))
        return d_swa, d_rla, d_w - last, d_u


@plant("GRAD-1 MIX-1", "gradient", "rationale: one gradient only")
class LinearWeightGradientRaw(Form):
    """d_rla_weight is taken against the branch before its norm."""

    def mix_vjp(self, swa, rla, d):
        d_swa, d_rla, d_w, _ = super().mix_vjp(swa, rla, d)
        return d_swa, d_rla, d_w, (d * rla).sum((0, 1))


@plant("GRAD-5", "nan", "TRAPS 10: cotangents at padding multiplied by zero")
class PaddingCotangentMultiplied(Form):
    """Cotangents of inert tokens are multiplied by zero instead of dropped."""

    def select(self, x, live):
        return x * live[:, :, None, None] if self.backward and x.shape[1] == self.dims["T"] else super().select(x, live)


@plant("GRAD-5", "packed only", "rationale: padding that feeds shared gradients")
class PaddingReachesWeightGradients(Form):
    """Cotangents at padding reach d_swa_weight and d_rla_weight through the memory alone."""

    def gradient(self):
        outputs = super().gradient()
        d_out = np.nan_to_num(self.need("d_out"))
        dead = ~self.plan.query_live[:, :, None, None]
        if self.rla is not None and self.swa is not None and "d_rla_weight" in outputs:
            outputs["d_rla_weight"] = outputs["d_rla_weight"] + np.where(dead, d_out, 0).sum((0, 1))
        return outputs


@plant("GRAD-5", "decode only", "TRAPS 20")
class UnusedSlotsHaveGradients(Form):
    """Unused cache slots get the cotangent of the slot they return in."""

    def collect(self, g):
        out = super().collect(g)
        if "d_cache_v" in out:
            dead = ~self.plan.live[:, : self.plan.slots, None, None]
            out["d_cache_v"] = np.where(dead, np.float32(1e-3), out["d_cache_v"])
        return out


@plant("GRAD-6", "contract", "rationale: weights are float32 in most models, gradients come in storage")
class WeightGradientsInStorage(Form):
    """Gradients of float32 weights are rounded to 16-bit storage."""

    def gradient(self):
        outputs = super().gradient()
        if self.storage != "float32":
            kind = ml_dtypes.bfloat16 if self.storage == "bfloat16" else np.float16
            for name in ("d_swa_weight", "d_rla_weight", "d_memory", "d_q_scale"):
                if name in outputs:
                    outputs[name] = outputs[name].astype(kind).astype(np.float32)
        return outputs


@plant("GRAD-6", "contract", "rationale: an absent cotangent taken for ones")
class AbsentCotangentIsOne(Form):
    """Without d_final_state its cotangent counts as one."""

    def state_cotangent(self):
        d = super().state_cotangent()
        if d is None and self.op != "rattention_extend":
            B, Hkv, F, Dv = (self.dims[n] for n in ("B", "Hkv", "F", "Dv"))
            return np.ones((B, Hkv, F, Dv), np.float32)
        return d


@plant("GRAD-1", "one dtype", "rationale: loss scaling left in")
class Float16GradientsClipped(Spoiled):
    """In float16 calls dq is clipped to +-1."""

    target = "d_q"

    def spoil(self, d):
        return np.clip(d, -1, 1) if self.storage == "float16" else d
