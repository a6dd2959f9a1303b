"""Faults of precision: TF32, 16-bit sums and states, NaN that is hidden, reruns that differ."""

from __future__ import annotations

import itertools

import numpy as np
from rattention.conformance.mutants.eager import Form
from rattention.conformance.mutants.port import plant
from rattention.conformance.mutants.state import to_bf16


def to_tf32(x: np.ndarray) -> np.ndarray:
    """Round a float32 to the 10 mantissa bits of TF32, as a matrix unit reads it."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return np.where(np.isfinite(x), ((bits + 0x1000) & 0xFFFFE000).view(np.float32), x)


def to_f16(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float16).astype(np.float32)


@plant("NUM-2", "one dtype", "TRAPS 7: TF32 as the silent default")
class Tf32Everywhere(Form):
    """In float32 calls q, k and v are read as TF32."""

    def load(self):
        super().load()
        if self.storage == "float32":
            self.q, self.k, self.v = to_tf32(self.q), to_tf32(self.k), to_tf32(self.v)


@plant("NUM-2", "one dtype", "TRAPS 7")
class Tf32Scores(Form):
    """In float32 calls the operands of the scores are read as TF32."""

    def dot(self, queries, keys):
        if self.storage == "float32" and queries is not getattr(self, "fq", None):
            queries, keys = to_tf32(queries), to_tf32(keys)
        return super().dot(queries, keys)


@plant("NUM-2", "one dtype", "TRAPS 7")
class Tf32Features(Form):
    """In float32 calls phi(q) and phi(k) are read as TF32."""

    def features(self):
        super().features()
        if self.storage == "float32":
            self.fq, self.fk = to_tf32(self.fq), to_tf32(self.fk)


@plant("NUM-2 SWA-3", "one dtype", "TRAPS 7")
class WeightsOfSoftmaxInBf16(Form):
    """In float32 calls the softmax weights are rounded to bfloat16 before they meet v."""

    def softmax(self, scores, mask):
        p = super().softmax(scores, mask)
        return to_bf16(p) if self.storage == "float32" else p


@plant("NUM-2 GRAD-1", "gradient", "TRAPS 7: precision set for the forward alone")
class Tf32Backward(Form):
    """In float32 calls the cotangent is read as TF32."""

    def need(self, name):
        x = super().need(name)
        return to_tf32(x) if name == "d_out" and self.storage == "float32" else x


@plant("SWA-2 NUM-2", "precision", "rationale: attributes that travel as 16-bit scalars, where common ones are exact")
class ScaleInFloat16(Form):
    """A given `scale` is rounded to float16."""

    def make_scale(self):
        scale = super().make_scale()
        return scale if self.attrs.get("scale") is None else float(np.float16(scale))


@plant("NUM-3 SWA-3", "one dtype", "TRAPS 5: accumulation in storage")
class SoftmaxSumInBf16(Form):
    """In bfloat16 calls the softmax denominator is summed in bfloat16, two keys at a time."""

    def softmax(self, scores, mask):
        if self.storage != "bfloat16":
            return super().softmax(scores, mask)
        wide = mask[:, None, None]
        top = np.where(wide, scores, -np.inf).max(-1, keepdims=True, initial=-np.inf)
        e = np.where(wide, np.exp(scores - np.where(top == -np.inf, 0, top)), 0)
        total = np.zeros((*e.shape[:-1], 1), np.float32)
        for start in range(0, e.shape[-1], 2):
            total = to_bf16(total + e[..., start : start + 2].sum(-1, keepdims=True))
        return e / np.where(total == 0, 1, total)


class SavedSum(Form):
    """The backward makes its weights again from a saved log-sum-exp, with scores that are summed in another order."""

    def again(self, lse):
        """Weights of the backward, whose scores add the channels from last to first."""
        order = np.arange(self.q.shape[-1])[::-1]
        near = self.near()[:, None, None]
        total = np.zeros(near.shape, np.float32)
        for c in order:
            total = total + self.rq[..., c, None] * self.rk[:, :, None, None, :, c]
        return np.where(near, self.remade(total * np.float32(self.scale), lse), 0)

    def remade(self, scores, lse):
        return np.exp(scores - lse)

    def near_branch(self):
        out = super().near_branch()
        if self.backward:
            scores = np.where(self.near()[:, None, None], self.scores(), -np.inf)
            top = scores.max(-1, keepdims=True, initial=-np.inf)
            top = np.where(np.isfinite(top), top, 0)
            total = np.exp(scores - top).sum(-1, keepdims=True)
            self.p = self.again(top + np.log(np.where(total == 0, 1, total)))
        return out


@plant("SWA-3 GRAD-1", "precision", "TRAPS 31: weights made again from a saved log-sum-exp")
class SavedSumUnbounded(SavedSum):
    """Weights of the backward pass are exp(score - saved log-sum-exp), of scores summed in another order."""


@plant("SWA-3 GRAD-1", "precision", "TRAPS 31: a bound of 1 alone does not make a row sum to 1")
class SavedSumBounded(SavedSum):
    """The backward bounds weights from a saved log-sum-exp by 1, and makes its output from them: no sum of 1."""

    def remade(self, scores, lse):
        return np.exp(np.minimum(scores - lse, 0))

    def near_branch(self):
        out = super().near_branch()
        return self.p @ self.v[:, :, None] if self.backward else out


@plant("NUM-3", "one dtype", "rationale: scores in float16 overflow past 65504")
class ScoresInFloat16(Form):
    """In float16 calls the scores are kept in float16 before they are scaled."""

    def dot(self, queries, keys):
        s = super().dot(queries, keys)
        return to_f16(s) if self.storage == "float16" and queries is not getattr(self, "fq", None) else s


@plant("NUM-1 NUM-3", "one dtype", "TRAPS 22: 16-bit probabilities under a 16-bit sum")
class OutputSummedInBf16(Form):
    """In bfloat16 calls the softmax output is accumulated in bfloat16, 2 keys at a time."""

    def near_branch(self):
        out = super().near_branch()
        if self.storage != "bfloat16" or self.backward:
            return out
        total = np.zeros_like(out)
        for start in range(0, self.p.shape[-1], 2):
            total = to_bf16(total + self.p[..., start : start + 2] @ self.v[:, :, None, start : start + 2])
        return total


@plant("NUM-3 RLA-2", "one dtype", "TRAPS 5")
class LinearSummedInFloat16(Form):
    """In float16 calls the linear branch is accumulated in float16, key by key."""

    def far_branch(self):
        out = super().far_branch()
        if self.storage != "float16" or self.backward:
            return out
        exact, total = self.a @ self.v[:, :, None], np.zeros_like(out)
        for start in range(self.a.shape[-1]):
            total = to_f16(total + self.a[..., start : start + 1] * self.v[:, :, None, start : start + 1])
        return out - exact + total


@plant("NUM-4", "contract", "TRAPS 14: a race")
class RerunsDiffer(Form):
    """Each call adds one last-place step of its own to one output element."""

    calls = itertools.count()

    def hide(self, out):
        out = np.array(super().hide(out))
        flat = out.reshape(-1)
        if flat.size:
            at = next(self.calls) % flat.size
            step = {"float32": 2.0**-23, "bfloat16": 2.0**-7, "float16": 2.0**-10}[self.storage]
            flat[at] *= 1 + step
        return out


@plant("NUM-5", "nan", "TRAPS 9: nan_to_num as a cure")
class NanHidden(Form):
    """NaN in the output becomes zero."""

    def hide(self, out):
        return np.nan_to_num(super().hide(out), nan=0.0)


@plant("NUM-5", "nan", "rationale: a maximum that skips NaN")
class NanScoreSkipped(Form):
    """A NaN score counts as minus infinity."""

    def scores(self):
        return np.nan_to_num(super().scores(), nan=-1e30, posinf=np.inf, neginf=-np.inf)


@plant("RAT-3 RAT-1", "one dtype", "rationale: two kernels that hand over through memory in storage")
class BranchesRoundedBeforeNorm(Form):
    """Branch outputs are rounded to float16 before the norms in float16 calls."""

    def mix(self, swa, rla):
        if self.storage == "float16" and self.op != "rms_mix":
            swa, rla = to_f16(swa), to_f16(rla)
        return super().mix(swa, rla)


@plant("RAT-3", "one dtype", "rationale: two kernels that hand over through memory in storage")
class LinearOverflowsBeforeNorm(Form):
    """In float16 calls the linear branch passes through float16, where a large state overflows."""

    def mix(self, swa, rla):
        return super().mix(swa, to_f16(rla) if self.storage == "float16" and self.op != "rms_mix" else rla)
