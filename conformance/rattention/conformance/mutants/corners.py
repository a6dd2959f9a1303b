"""Faults behind a condition: a size, an option or a dtype that a suite of ordinary cases seldom meets."""

from __future__ import annotations

import ml_dtypes
import numpy as np
from rattention.conformance.mutants.eager import Form
from rattention.conformance.mutants.port import plant

# ---------------------------------------------------------------------------------------------- windows


@plant("SWA-6", "past size", "rationale: None mapped to the largest window that the author thought of")
class NoneMeans1024(Form):
    """Window None is a window of 1024."""

    def near_window(self):
        return 1024 if self.window is None else super().near_window()


@plant("SWA-6 EXT-10", "past size", "rationale: a buffer of fixed size for a full window")
class NoneMeans4096InDecode(Form):
    """An extension with window None attends to the last 4096 tokens."""

    def near_window(self):
        return 4096 if self.window is None and self.op == "rattention_extend" else super().near_window()


@plant("SWA-1 RLA-1", "past size", "rationale: a window that must fit on chip")
class WindowClippedAt2048(Form):
    """Windows above 2048 are windows of 2048 in both branches."""

    def near_window(self):
        w = super().near_window()
        return w if w == np.inf else min(w, 2048)

    def far_window(self):
        return self.near_window()


@plant("SWA-1 RAT-2", "past size", "rationale: a tile border met exactly")
class WindowOfWholeTilesShort(Form):
    """Windows that are multiples of 64 lose their oldest token."""

    def near_window(self):
        w = super().near_window()
        return w - 1 if 0 < w < np.inf and w % 64 == 0 else w


@plant("SWA-1", "past size", "rationale: whole tiles of keys, the ragged one dropped")
class LongWindowRoundedDown(Form):
    """Windows above 128 are rounded down to a multiple of 32 in the softmax branch."""

    def near_window(self):
        w = super().near_window()
        return w // 32 * 32 if 128 < w < np.inf else w


@plant("EXT-1 SWA-1", "past size", "rationale: split decode that forgets its first splits")
class DeepCacheReadInPart(Form):
    """One-token calls on a cache of more than 512 slots read the newest 512."""

    def near(self):
        mask, slots = super().near(), self.plan.slots
        if self.op != "rattention_extend" or self.dims["T"] != 1 or slots <= 512:
            return mask
        return mask & (np.arange(mask.shape[2]) >= slots - 512)


@plant("SEG-1", "packed only", "rationale: full attention takes another path")
class FullWindowIgnoresSegments(Form):
    """At window None the softmax branch crosses segment borders."""

    def near(self):
        if self.window is not None or "segment_ids" not in self.tensors:
            return super().near()
        live, T = self.plan.live, self.dims["T"]
        return (np.arange(T)[:, None] >= np.arange(T)) & live[:, :, None] & live[:, None, :]


# ---------------------------------------------------------------------------------------------- lengths


def _scaled_past(outputs, name, start):
    """Elements of one output from a token on, 3 % too large."""
    x = np.array(outputs[name])
    x[:, start:] *= np.float32(1.03)
    outputs[name] = x
    return outputs


@plant("NUM-1 RAT-1", "past size", "rationale: one dtype past one size")
class LongBf16Drifts(Form):
    """In bfloat16 `out` is 3 % too large from token 300 on."""

    def run(self):
        outputs = super().run()
        return _scaled_past(outputs, "out", 300) if self.storage == "bfloat16" and "out" in outputs else outputs


@plant("GRAD-1", "past size", "rationale: one gradient past one size")
class LongKeyGradientDrifts(Form):
    """d_k is 3 % too large from token 600 on."""

    def run(self):
        outputs = super().run()
        return _scaled_past(outputs, "d_k", 600) if "d_k" in outputs else outputs


@plant("RLA-1 RAT-2", "past size", "rationale: a path of its own for sequences of medium length")
class MediumLengthsLoseAToken(Form):
    """With 128 < T <= 700 token 130 never reaches the linear branch."""

    def far(self):
        mask = super().far()
        if 128 < self.dims["T"] <= 700 and self.op != "rattention_extend":
            return mask & (np.arange(mask.shape[2]) != 130)
        return mask


@plant("NUM-1", "past size", "rationale: an off-by-one where the last tile is whole")
class WholeTilesLastToken(Form):
    """When T is above 100 and a multiple of 64, the last token's `out` is zero."""

    def run(self):
        outputs, T = super().run(), self.dims.get("T", 0)
        if "out" in outputs and T > 100 and T % 64 == 0:
            outputs["out"] = np.array(outputs["out"])
            outputs["out"][:, -1] = 0
        return outputs


@plant("GRAD-4", "past size", "rationale: a backward scan over the first tiles alone")
class StateGradientOfTheFirstTiles(Form):
    """d_initial_state and d_cache_state hear of the first 128 tokens alone."""

    def carried(self):
        mask = super().carried()
        return mask & (np.arange(self.dims["T"]) < 128)[None, None, None, :, None] if self.backward else mask


@plant("SEG-2 SEG-1", "past size", "rationale: a table of segments of fixed size")
class NinthSegmentJoinsTheEighth(Form):
    """All segments of a row from the eighth on are one."""

    def make_plan(self):
        plan = super().make_plan()
        if "segment_ids" in self.tensors:
            plan.document = np.minimum(plan.document, 7)
        return plan


@plant("SWA-1 SEG-1", "packed only", "rationale: a segment of one token taken for padding")
class LoneTokensDropped(Form):
    """A segment of one token has no softmax branch."""

    def near(self):
        mask, ids = super().near(), self.tensors.get("segment_ids")
        if ids is None:
            return mask
        alone = (np.asarray(ids)[:, :, None] == np.asarray(ids)[:, None, :]).sum(-1) == 1
        return mask & ~alone[:, :, None]


# ---------------------------------------------------------------------------------------------- heads, rows, channels


@plant("SWA-3 RLA-2", "past size", "rationale: one tile of values")
class ValuesPast128Dropped(Form):
    """Value channels from 128 on are zero."""

    def load(self):
        super().load()
        self.v = np.where(np.arange(self.v.shape[-1]) < 128, self.v, np.float32(0))


@plant("SWA-2", "past size", "rationale: one tile of keys")
class KeysPast128Dropped(Form):
    """Scores leave out the channels from 128 on."""

    def rotate(self, x, rows, sign=1):
        turned = super().rotate(x, rows, sign)
        return turned if sign < 0 else np.where(np.arange(x.shape[-1]) < 128, turned, np.float32(0))


@plant("SWA-2", "past size", "rationale: scale taken from the padded head dim")
class ScaleOfThePaddedHead(Form):
    """For D above 16 the default scale is that of the next power of two."""

    def make_scale(self):
        D = self.dims["D"]
        if self.attrs.get("scale") is None and D > 16:
            return float(2 ** int(np.ceil(np.log2(D)))) ** -0.5
        return super().make_scale()


@plant("MIX-2", "mix", "rationale: the norm divides by the padded width")
class NormOverThePaddedWidth(Form):
    """Where Dv is smaller than D, the norm's mean is taken over D channels."""

    def norm(self, x):
        wide = max(self.dims.get("D", 0), self.dims["Dv"])
        mean = np.sum(np.square(x), -1, keepdims=True) / np.float32(wide)
        r = 1 / np.sqrt(mean + np.float32(self.attrs["eps"]))
        return x * r, r


@plant("SWA-4 RLA-8", "one head ratio", "rationale: groups padded to a power of two")
class LargeOddGroupsSpill(Form):
    """When G is 5, 6 or 7 the last query head of a group repeats the one before it."""

    ratios = (5, 6, 7)

    def ungroup(self, x):
        if self.dims["Hq"] // self.dims["Hkv"] in self.ratios and not self.backward:
            x = np.array(x)
            x[:, :, -1] = x[:, :, -2]
        return super().ungroup(x)


@plant("SWA-4 RLA-8", "one head ratio", "rationale: a tile of eight query heads")
class GroupOfSixteenSpills(LargeOddGroupsSpill):
    """When G is above 8 the last query head of a group repeats the one before it."""

    ratios = tuple(range(9, 65))


@plant("NUM-6", "heads", "rationale: a grid over eight rows")
class RowsPastEightRepeat(Form):
    """Rows of `out` from the ninth on repeat the eighth."""

    def run(self):
        outputs = super().run()
        if "out" in outputs and self.dims.get("B", 0) > 8:
            outputs["out"] = outputs["out"][np.minimum(np.arange(self.dims["B"]), 7)]
        return outputs


@plant("RLA-6 EXT-5", "heads", "rationale: two rows per program, the odd one out")
class OddRowLosesState(Form):
    """With three rows or five, the last row's state is zero."""

    def new_state(self):
        state = np.array(super().new_state())
        if self.dims["B"] in (3, 5):
            state[-1] = 0
        return state


# ---------------------------------------------------------------------------------------------- options


@plant("RLA-3", "linear", "rationale: one `if` for both scales")
class LoneQueryScaleIgnored(Form):
    """q_scale without k_scale is ignored."""

    def scaled(self, x, name):
        alone = name == "q_scale" and "k_scale" not in self.tensors
        return x if alone else super().scaled(x, name)


@plant("RLA-3", "linear", "rationale: a default that is not 1")
class AbsentKeyScaleIsQueryScale(Form):
    """Where q_scale is given alone, keys are scaled by it too."""

    def scaled(self, x, name):
        if name == "k_scale" and "k_scale" not in self.tensors:
            return super().scaled(x, "q_scale")
        return super().scaled(x, name)


@plant("SEG-6 RLA-4", "packed only", "rationale: packed rows start from nothing")
class PackedRowsIgnoreTheInitialState(Form):
    """initial_state is ignored where segment_ids are given, save for the state handed on."""

    def carried(self):
        return super().carried() & ("segment_ids" not in self.tensors)


@plant("RLA-5 RLA-9", "linear", "rationale: a full window skips the linear branch")
class FullWindowForgetsMemory(Form):
    """At window None neither memory nor a carried state is read."""

    def far_branch(self):
        out = super().far_branch()
        return out * np.float32(0) if self.window is None else out


@plant("EXT-6 EXT-7", "decode only", "rationale: at least one token per call")
class IdleRowsCountOne(Form):
    """cache_length of a row with nothing new grows by one."""

    def forward(self):
        outputs = super().forward()
        if "lengths" in self.tensors:
            outputs["cache_length"] = outputs["cache_length"] + (np.asarray(self.tensors["lengths"]) == 0)
        return outputs


@plant("EXT-6", "decode only", "rationale: counters in float32 stop at 2^24")
class LengthsInFloat32(Form):
    """cache_length is counted in float32."""

    def forward(self):
        outputs = super().forward()
        if "cache_length" in outputs:
            outputs["cache_length"] = outputs["cache_length"].astype(np.float32).astype(np.int64)
        return outputs


@plant("EXT-4", "decode only", "rationale: a copy skipped where source and target have one size")
class WholeReplacementKeepsTheOldCache(Form):
    """Where T equals W and the cache was full, the cache comes back unchanged."""

    def new_cache(self, x):
        kept, W = super().new_cache(x), self.plan.slots
        if self.window is not None and W and self.dims["T"] == W and self.plan.live.all():
            return x.transpose(0, 2, 1, 3)[:, :W]
        return kept


@plant("ROPE-4 EXT-8", "past size", "TRAPS 5: positions in 16 bits")
class PositionsInFloat16(Form):
    """Positions pass through float16, which counts to 2048."""

    def select_rows(self, rows):
        return super().select_rows(rows.astype(np.float16).astype(np.int64))


@plant("NUM-5", "nan", "rationale: a cache cleaned on loading")
class NanInTheCacheHidden(Form):
    """NaN in live cache slots is read as zero."""

    def need(self, name):
        x = super().need(name)
        return np.where(np.isnan(x), 0, x) if name in ("cache_k", "cache_v") else x


@plant("NUM-3 RLA-1", "one dtype", "rationale: bfloat16 values handed over in float16, whose range is smaller")
class ValuesThroughFloat16(Form):
    """bfloat16 values pass through float16."""

    def need(self, name):
        x = super().need(name)
        return x.astype(np.float16).astype(x.dtype) if name == "v" and self.storage == "bfloat16" else x


@plant("MIX-1 FM-4", "one dtype", "rationale: parameters cast to the dtype of the activations")
class WeightsCastToStorage(Form):
    """float32 weights of the mix are rounded to storage in 16-bit calls."""

    def need(self, name):
        x = super().need(name)
        to = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}.get(self.storage)
        return x.astype(to).astype(x.dtype) if to and name in ("swa_weight", "rla_weight") else x


@plant("GRAD-4 EXT-7", "gradient", "rationale: ragged rows were added later")
class RaggedRowsLoseTheStateCotangent(Form):
    """d_cache_state is ignored where lengths are given."""

    def state_cotangent(self):
        return None if "lengths" in self.tensors else super().state_cotangent()


@plant("GRAD-1 RLA-5", "gradient", "rationale: a sum over the batch forgotten")
class MemoryGradientOfTheFirstRow(Form):
    """d_memory is that of the first row."""

    def far_vjp(self, d, g):
        super().far_vjp(d, g)
        if self.memory is not None:
            live = self.plan.query_live[:1, None, None, :, None]
            g["memory"] = (np.where(live, self.fq[:1], 0).swapaxes(-1, -2) @ d[:1]).sum(0)


@plant("GRAD-1", "gradient", "rationale: a fault of one feature map in one dtype")
class ReluKeyGradientBf16(Form):
    """In bfloat16 with relu features d_k of rattention is 5 % too large."""

    def run(self):
        outputs = super().run()
        if self.op == "rattention" and self.storage == "bfloat16" and self.attrs["feature_map"] == "relu":
            outputs = {n: x * np.float32(1.05) if n == "d_k" else x for n, x in outputs.items()}
        return outputs


@plant("FM-3 EXT-2", "decode only", "rationale: a map that decode does not know")
class DecodeTakesReluForIdentity(Form):
    """One-token calls clip identity features at zero."""

    def phi(self, x):
        one = self.op == "rattention_extend" and self.dims["T"] == 1 and self.attrs["feature_map"] == "identity"
        return np.maximum(x, 0) if one else super().phi(x)


@plant("EXT-2 MIX-1", "decode only", "rationale: prefill and forward are two code paths")
class PrefillMixesWithTheFirstHead(Form):
    """An extension of empty caches mixes every head with the weights of the first."""

    def need(self, name):
        x = super().need(name)
        fresh = self.op == "rattention_extend" and not np.any(self.tensors["cache_length"])
        return np.broadcast_to(x[:1], x.shape) if fresh and name in ("swa_weight", "rla_weight") else x
