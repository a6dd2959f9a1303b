"""Head order, head ratio and channel faults."""

from __future__ import annotations

import numpy as np
from rattention.conformance.mutants.eager import Form
from rattention.conformance.mutants.port import plant


class Tiled(Form):
    """Heads laid out h % Hkv instead of h // G."""

    def group(self, x):
        B, T, Hq, X = x.shape
        Hkv = self.dims["Hkv"]
        return x.reshape(B, T, Hq // Hkv, Hkv, X).transpose(0, 3, 2, 1, 4)

    def ungroup(self, x):
        B, Hkv, G, T, X = x.shape
        return x.transpose(0, 3, 2, 1, 4).reshape(B, T, Hkv * G, X)

    @property
    def ratio(self):
        return self.dims["Hq"] // self.dims["Hkv"]


class TiledWhen(Tiled):
    """Tiled where `wrong()` says so."""

    def wrong(self) -> bool:
        raise NotImplementedError

    def group(self, x):
        return super().group(x) if self.wrong() else Form.group(self, x)

    def ungroup(self, x):
        return super().ungroup(x) if self.wrong() else Form.ungroup(self, x)


@plant("SWA-4 RLA-8", "heads", "TRAPS 16: tiled instead of repeated")
class HeadsTiled(Tiled):
    """Query head h reads key/value head h % Hkv in both branches."""


@plant("RLA-8", "heads", "TRAPS 16")
class LinearHeadsTiled(TiledWhen):
    """The linear branch on its own tiles the heads."""

    def wrong(self):
        return self.op == "residual_linear_attention"


@plant("SWA-4", "heads", "TRAPS 16")
class SoftmaxHeadsTiled(TiledWhen):
    """The softmax branch on its own tiles the heads."""

    def wrong(self):
        return self.op == "sliding_window_attention"


@plant("SWA-4 EXT-2", "decode only", "TRAPS 16")
class DecodeHeadsTiled(TiledWhen):
    """One-token calls of rattention_extend tile the heads."""

    def wrong(self):
        return self.op == "rattention_extend" and self.dims["T"] == 1


@plant("SWA-4 RLA-8", "one head ratio", "rationale: a group of three needs a padded tile")
class HeadsTiledAtThree(TiledWhen):
    """Heads are tiled when G is 3."""

    def wrong(self):
        return self.ratio == 3


@plant("SWA-4 RLA-8", "one head ratio", "rationale: the largest group overflows a tile")
class GroupOfEightSpills(Form):
    """When G is 8 the last query head of a group repeats the one before it."""

    def branches(self):
        out = super().branches()
        Hq, Hkv = self.dims["Hq"], self.dims["Hkv"]
        if Hq // Hkv != 8 or self.backward:
            return out
        out = out.copy()
        out[:, :, 7::8] = out[:, :, 6::8]
        return out


@plant("GRAD-1 GRAD-3", "one head ratio", "TRAPS 16")
class GroupGradientIsAMean(Form):
    """With shared key/value heads, their gradient is the mean over the group, not the sum."""

    def over_group(self, x):
        return x.mean(2)


@plant("MIX-1", "heads", "rationale: weights stored per key/value head")
class WeightsPerKeyHead(Form):
    """All heads use the branch weights of the first head."""

    def need(self, name):
        w = super().need(name)
        return np.broadcast_to(w[:1], w.shape) if name.endswith("a_weight") else w


@plant("MIX-1", "mix", "rationale: arguments in the wrong order")
class WeightsSwapped(Form):
    """swa_weight and rla_weight change places."""

    def mix(self, swa, rla):
        return super().mix(rla, swa)


@plant("MIX-1", "heads", "rationale: weights per head, not per head and channel")
class WeightsPerHead(Form):
    """The weight of the first channel serves all channels of a head."""

    def need(self, name):
        w = super().need(name)
        return np.broadcast_to(w[:, :1], w.shape) if name.endswith("a_weight") else w


@plant("SWA-2", "heads", "rationale: D and Dv are equal in every test of the author")
class ScaleFromValueDim(Form):
    """The default scale is 1/sqrt(Dv)."""

    def make_scale(self):
        scale = self.attrs.get("scale")
        return self.dims["Dv"] ** -0.5 if scale is None and "Dv" in self.dims else super().make_scale()


@plant("SWA-2 RLA-2", "heads", "rationale: vector loads of eight elements")
class OddTailOfChannelsDropped(Form):
    """The last D mod 8 channels of q are not read when D is past 8."""

    def load(self):
        super().load()
        D = self.dims["D"]
        if D > 8 and D % 8 and not self.backward:
            self.q = np.where(np.arange(D) < D // 8 * 8, self.q, 0)


@plant("SWA-3", "heads", "rationale: the output tile is D wide")
class WideValuesCut(Form):
    """When Dv exceeds D, output channels past D are zero."""

    def hide(self, out):
        out = super().hide(out)
        return np.where(np.arange(self.dims["Dv"]) < self.dims["D"], out, 0)


@plant("NUM-6 SWA-1", "structured data", "rationale: an index that forgets the batch")
class SecondRowReadsFirstKeys(Form):
    """In a batch of two or more, the last row uses the values of the first."""

    def load(self):
        super().load()
        if len(self.v) > 1 and "segment_ids" not in self.tensors:
            self.v = np.concatenate([self.v[:-1], self.v[:1]])


@plant("NUM-6", "nan", "TRAPS 10: a check over the whole batch")
class NanSpreadsOverTheBatch(Form):
    """One NaN anywhere makes every row NaN."""

    def hide(self, out):
        return np.full_like(out, np.nan) if np.isnan(out).any() else super().hide(out)
