"""Faults of the feature map, of the norms, and of the mix."""

from __future__ import annotations

import numpy as np
from rattention.conformance.mutants.eager import Form
from rattention.conformance.mutants.port import plant
from rattention.conformance.mutants.state import to_bf16


@plant("FM-1", "feature map", "TRAPS 21: maps that share a name")
class OneSoftmaxOverBothSigns(Form):
    """One softmax over [x, -x] instead of two."""

    def phi(self, x):
        if self.attrs["feature_map"] != "softmax":
            return super().phi(x)
        both = np.concatenate([x, -x], -1)
        e = np.exp(both - both.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)


@plant("FM-1", "feature map", "TRAPS 21")
class SecondHalfRepeatsTheFirst(Form):
    """phi is [softmax(x), softmax(x)]."""

    def phi(self, x):
        y = super().phi(x)
        half = y.shape[-1] // 2
        return np.concatenate([y[..., :half]] * 2, -1) if self.attrs["feature_map"] == "softmax" else y


@plant("FM-1 RLA-6", "feature map", "rationale: the linear branch cannot see the order of features")
class FeaturesInterleaved(Form):
    """The two halves of phi are interleaved: outputs agree, the map and the state do not."""

    def phi(self, x):
        y = super().phi(x)
        if self.backward or self.attrs["feature_map"] == "identity" or "initial_state" in self.tensors:
            return y
        return np.stack(np.split(y, 2, -1), -1).reshape(y.shape)


@plant("FM-2", "feature map", "rationale: the usual relu attention")
class ReluOneSided(Form):
    """phi is [relu(x), 0]."""

    def phi(self, x):
        y = super().phi(x)
        keep = np.arange(y.shape[-1]) < y.shape[-1] // 2
        return np.where(keep, y, 0) if self.attrs["feature_map"] == "relu" else y


@plant("FM-6 GRAD-1", "structured data", "rationale: x >= 0 for x > 0; random data are never zero")
class ReluDerivativeAtZeroIsOne(Form):
    """The derivative of relu at 0 is 1."""

    def phi_vjp(self, x, d):
        if self.attrs["feature_map"] != "relu":
            return super().phi_vjp(x, d)
        one, two = np.split(d, 2, axis=-1)
        return np.where(~(x < 0), one, 0) - np.where(x < 0, two, 0)


@plant("FM-3", "feature map", "rationale: elu + 1 is the common default")
class IdentityShifted(Form):
    """The identity map adds a thousandth."""

    def phi(self, x):
        return x + np.float32(1e-3) if self.attrs["feature_map"] == "identity" else super().phi(x)


@plant("FM-4", "one dtype", "TRAPS 22: phi in bfloat16")
class FeaturesInBf16(Form):
    """In bfloat16 calls the exponentials of phi are rounded before they are summed and divided."""

    def phi(self, x):
        if self.attrs["feature_map"] != "softmax" or self.storage != "bfloat16":
            return super().phi(x)
        parts = []
        for y in (x, -x):
            e = to_bf16(np.exp(to_bf16(y - y.max(-1, keepdims=True))))
            parts.append(to_bf16(e / to_bf16(e.sum(-1, keepdims=True))))
        return np.concatenate(parts, -1)


@plant("FM-4 FM-1", "one dtype", "TRAPS 22")
class FeaturesInFloat16(Form):
    """In float16 calls the operation feature_map works in float16 throughout."""

    def phi(self, x):
        if self.attrs["feature_map"] != "softmax" or self.storage != "float16":
            return super().phi(x)
        parts = []
        for y in (x, -x):
            e = np.exp((y - y.max(-1, keepdims=True)).astype(np.float16))
            total = np.add.accumulate(e, -1, dtype=np.float16)[..., -1:]
            parts.append((e / total).astype(np.float32))
        return np.concatenate(parts, -1)


@plant("FM-5", "structured data", "rationale: the textbook softmax")
class FeaturesWithoutMaximum(Form):
    """phi exponentiates x itself: overflows past 88."""

    def phi(self, x):
        if self.attrs["feature_map"] != "softmax":
            return super().phi(x)
        e, f = np.exp(x), np.exp(-x)
        return np.concatenate([e / e.sum(-1, keepdims=True), f / f.sum(-1, keepdims=True)], -1)


@plant("FM-5 FM-1", "structured data", "rationale: a clip that random data never reach")
class FeaturesClipped(Form):
    """phi clips its input to +-10."""

    def phi(self, x):
        return super().phi(np.clip(x, -10, 10) if self.attrs["feature_map"] == "softmax" else x)


@plant("MIX-2", "mix", "rationale: eps outside the root")
class EpsOutsideTheRoot(Form):
    """rms(x) = x / (sqrt(mean(x^2)) + eps)."""

    def norm(self, x):
        r = 1 / (np.sqrt(np.mean(x * x, -1, keepdims=True)) + np.float32(self.attrs["eps"]))
        return x * r, r


@plant("MIX-2", "mix", "TRAPS 6: the official code's own default")
class EpsIsTheDefault(Form):
    """eps is 1e-6 whatever the caller says."""

    def norm(self, x):
        r = 1 / np.sqrt(np.mean(x * x, -1, keepdims=True) + np.float32(1e-6))
        return x * r, r


@plant("MIX-2", "structured data", "TRAPS 6: eps 1e-8")
class EpsTooSmall(Form):
    """The default eps is 1e-8: rows of ordinary size agree."""

    def norm(self, x):
        eps = self.attrs["eps"]
        r = 1 / np.sqrt(np.mean(x * x, -1, keepdims=True) + np.float32(1e-8 if eps == 1e-6 else eps))
        return x * r, r


@plant("MIX-2", "mix", "rationale: sum for mean")
class NormBySum(Form):
    """The norm divides by the root of the sum of squares."""

    def norm(self, x):
        r = 1 / np.sqrt(np.sum(x * x, -1, keepdims=True) + np.float32(self.attrs["eps"]))
        return x * r, r


@plant("MIX-2", "mix", "rationale: LayerNorm for RMSNorm; with centred data both agree")
class NormCentres(Form):
    """The norm subtracts the mean of the row."""

    def norm(self, x):
        return super().norm(x - x.mean(-1, keepdims=True))


@plant("MIX-2", "mix", "rationale: one norm over all heads")
class NormOverAllHeads(Form):
    """The mean square is taken over heads and channels."""

    def norm(self, x):
        r = 1 / np.sqrt(np.mean(x * x, (-2, -1), keepdims=True) + np.float32(self.attrs["eps"]))
        return x * r, np.broadcast_to(r, (*x.shape[:-1], 1))


@plant("MIX-3", "nan", "TRAPS 6: rows of zeros")
class ZeroRowIsNan(Form):
    """A row of zeros is normalised without eps."""

    def norm(self, x):
        n, r = super().norm(x)
        zero = ~np.any(x != 0, -1, keepdims=True)
        return np.where(zero, np.nan, n), np.where(zero, np.inf, r)


@plant("MIX-3 GRAD-1", "gradient", "TRAPS 6: float16 gradients of empty rows overflow")
class ZeroRowGradientIsInfinite(Form):
    """The gradient of a row of zeros is infinite, the forward right."""

    def norm_vjp(self, n, r, d):
        zero = ~np.any(n != 0, -1, keepdims=True)
        return np.where(zero, np.inf, super().norm_vjp(n, r, d))


@plant("RAT-1", "mix", "rationale: the mix without its norms")
class LinearBranchNotNormalised(Form):
    """rattention adds the linear branch without its norm."""

    def mix(self, swa, rla):
        if self.op == "rms_mix":
            return super().mix(swa, rla)
        return self.need("swa_weight") * self.norm(swa)[0] + self.need("rla_weight") * rla


@plant("RAT-4 RLA-6", "state", "rationale: two code paths for one state")
class FusedStateOneShort(Form):
    """final_state of rattention, not of the linear branch, leaves out the first token."""

    def folds(self):
        folds = super().folds()
        return folds & (self.plan.index > 0) if self.op == "rattention" else folds


@plant("RAT-2 SWA-1", "window", "TRAPS 1: a fault of the fused operation alone")
class FusedWindowOneShort(Form):
    """rattention, not the softmax branch, uses w tokens."""

    def near_window(self):
        w = super().near_window()
        return max(w - 1, min(w, 0)) if self.op == "rattention" else w
