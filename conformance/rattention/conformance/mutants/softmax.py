"""Faults of scale, scores and softmax, and of the rotary embedding."""

from __future__ import annotations

import ml_dtypes
import numpy as np
from rattention.conformance.mutants.eager import Form
from rattention.conformance.mutants.port import plant


@plant("SWA-2", "softmax", "TRAPS 25")
class ScaleIgnored(Form):
    """A given scale is ignored."""

    def make_scale(self):
        return self.dims["D"] ** -0.5


@plant("SWA-2", "structured data", "rationale: `scale or default`")
class ScaleZeroIsDefault(Form):
    """scale 0 means the default."""

    def make_scale(self):
        return super().make_scale() or self.dims["D"] ** -0.5


@plant("SWA-2", "softmax", "TRAPS 25")
class ScaleWithoutRoot(Form):
    """The default scale is 1/D."""

    def make_scale(self):
        return 1 / self.dims["D"] if self.attrs.get("scale") is None else super().make_scale()


@plant("SWA-2", "softmax", "rationale: scale folded into both operands by its square root")
class ScaleLosesItsSign(Form):
    """A negative scale counts as positive."""

    def make_scale(self):
        return abs(super().make_scale())


@plant("SWA-3", "structured data", "TRAPS 25: cap on the scores")
class ScoresCapped(Form):
    """Scores are clipped to +-30, which random data never reach."""

    def scores(self):
        return np.clip(super().scores(), -30, 30)


@plant("SWA-3", "structured data", "rationale: the textbook softmax")
class SoftmaxWithoutMaximum(Form):
    """exp of the scores themselves: overflows past 88."""

    def softmax(self, scores, mask):
        e = np.where(mask[:, None, None], np.exp(scores), 0)
        total = e.sum(-1, keepdims=True)
        return e / np.where(total == 0, 1, total)


@plant("SWA-3", "softmax", "rationale: softmax-off-by-one")
class SoftmaxPlusOne(Form):
    """One is added to the denominator."""

    def softmax(self, scores, mask):
        p = super().softmax(scores, mask)
        top = np.where(mask[:, None, None], scores, -80).max(-1, keepdims=True, initial=-80)
        e = np.where(mask[:, None, None], np.exp(scores - top), 0).sum(-1, keepdims=True)
        return p * e / (e + np.exp(-top))


@plant("SWA-3", "softmax", "rationale: an epsilon against division by zero")
class SoftmaxWithEpsilon(Form):
    """The denominator is raised by one part in a thousand."""

    def softmax(self, scores, mask):
        return super().softmax(scores, mask) / np.float32(1.001)


@plant("SWA-3 SWA-1", "past size", "rationale: online softmax that forgets to rescale")
class RunningMaximumNotRescaled(Form):
    """Weights of the first 32 keys are not rescaled when a later tile raises the maximum."""

    def softmax(self, scores, mask):
        wide = mask[:, None, None]
        masked = np.where(wide, scores, -np.inf)
        p = super().softmax(scores, mask)
        if scores.shape[-1] <= 32:
            return p
        top = masked.max(-1, keepdims=True, initial=-np.inf)
        early = masked[..., :32].max(-1, keepdims=True, initial=-np.inf)
        gain = np.where(np.isfinite(early) & np.isfinite(top), np.exp(np.minimum(top - early, 60)), 1)
        gained = np.where(np.arange(scores.shape[-1]) < 32, p * gain, p)
        return gained / np.where(gained.sum(-1, keepdims=True) == 0, 1, gained.sum(-1, keepdims=True))


@plant("ROPE-3", "rope", "rationale: interleaved pairs, as in GPT-J")
class RopeInterleaved(Form):
    """Rotation acts on pairs (2j, 2j+1)."""

    def rotate(self, x, rows, sign=1):
        D = x.shape[-1]
        order = np.concatenate([np.arange(0, D - 1, 2), np.arange(1, D, 2)])
        if "rope_cos" not in self.tensors:
            return x
        return super().rotate(x[..., order], rows, sign)[..., np.argsort(order)]


@plant("ROPE-3", "rope", "rationale: q and k turned against each other")
class RopeOppositeForKeys(Form):
    """Keys turn in the direction of decreasing angle."""

    def rotate(self, x, rows, sign=1):
        return super().rotate(x, rows, -sign if x.ndim == 4 else sign)


@plant("ROPE-4", "rope", "rationale: an argument nobody wired up")
class PositionsIgnored(Form):
    """Given positions are not used."""

    def make_plan(self):
        plan = super().make_plan()
        if "positions" in self.tensors:
            plan.rope_row = np.maximum(plan.index, 0)
        return plan


@plant("ROPE-4 NUM-6", "rope", "rationale: positions shared over the batch")
class PositionsOfTheFirstRow(Form):
    """All rows of the batch use the positions of the first."""

    def make_plan(self):
        plan = super().make_plan()
        if len(plan.rope_row) > 1 and "positions" in self.tensors:
            rows = np.asarray(self.tensors["rope_cos"]).shape[0]
            plan.rope_row = np.clip(np.broadcast_to(plan.rope_row[:1], plan.rope_row.shape), 0, max(rows - 1, 0))
        return plan


@plant("ROPE-1", "rope", "rationale: exponent j/D for 2j/D")
class RopeFrequenciesOff(Form):
    """The table uses theta^(-j/D)."""

    def frequencies(self, D, theta):
        return float(theta) ** (-np.arange(D // 2) / D)


@plant("ROPE-2", "past size", "rationale: angles in float32 drift at large positions")
class RopeAnglesInFloat32(Form):
    """Angles of the table are computed in float32."""

    def frequencies(self, D, theta):
        return super().frequencies(D, theta).astype(np.float32)

    def rope_table(self):
        table = np.asarray(self.tensors["positions"]).astype(np.float32)[:, None]
        angle = table * self.frequencies(self.attrs["head_dim"], self.attrs["theta"])
        return {"rope_cos": np.cos(angle), "rope_sin": np.sin(angle)}


@plant("ROPE-2", "precision", "rationale: the table rounded twice")
class RopeTableInBf16(Form):
    """The table is rounded through bfloat16."""

    def rope_table(self):
        tables = super().rope_table()
        return {n: t.astype(ml_dtypes.bfloat16).astype(np.float32) for n, t in tables.items()}
