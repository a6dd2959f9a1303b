"""Faults of rattention_extend: what the cache keeps, folds, counts and forgets."""

from __future__ import annotations

import numpy as np
from rattention.conformance.mutants.eager import Form
from rattention.conformance.mutants.port import plant
from rattention.conformance.mutants.state import to_bf16


class Extend(Form):
    """Helper for faults of the cache alone."""

    @property
    def extends(self):
        return self.op == "rattention_extend"

    @property
    def decodes(self):
        return self.extends and self.dims["T"] == 1


@plant("EXT-5", "decode only", "TRAPS 4: the last window overwritten, never folded")
class EvictedTokensLost(Extend):
    """Tokens that leave the cache are not folded; new ones longer than the window are."""

    def folds(self):
        folds = super().folds()
        return folds & (np.arange(folds.shape[1]) >= self.plan.slots) if self.extends else folds


@plant("EXT-5", "decode only", "TRAPS 4")
class OneTokenFoldedPerCall(Extend):
    """Each call folds one token at most, as decode needs."""

    def folds(self):
        folds = super().folds()
        return folds & (np.cumsum(folds, 1) == 1) if self.extends else folds


@plant("EXT-5", "decode only", "rationale: state before and after eviction")
class DecodeFoldsLate(Extend):
    """One-token calls fold the token that the next call will evict."""

    def folds(self):
        folds = super().folds()
        if not self.decodes or not self.plan.slots:
            return folds
        return np.roll(folds, 1, 1) & self.plan.live


@plant("SWA-1 EXT-2", "decode only", "TRAPS 1: decode window against prefill window")
class DecodeWindowShort(Extend):
    """One-token calls attend to w tokens."""

    def near_window(self):
        w = super().near_window()
        return max(w - 1, min(w, 0)) if self.decodes else w


@plant("EXT-1 RLA-1", "decode only", "TRAPS 19: continuation longer than the window")
class LongContinuationLosesFar(Extend):
    """In calls longer than the window the linear branch reads the carried state and cached tokens alone."""

    def far(self):
        mask = super().far()
        if self.extends and self.dims["T"] > self.plan.slots:
            return mask & (np.arange(mask.shape[2]) < self.plan.slots)
        return mask


@plant("EXT-1 RLA-4", "decode only", "TRAPS 26")
class DecodeIgnoresState(Extend):
    """One-token calls do not read cache_state."""

    def carried(self):
        return super().carried() & (not self.decodes)


@plant("EXT-3 ROPE-5", "decode only", "TRAPS 17: the ring holds rotated keys")
class CacheHoldsRotatedKeys(Extend):
    """Returned keys are rotated."""

    def new_cache(self, x):
        return super().new_cache(self.rotate(x, self.plan.rope_row) if x is self.k else x)


@plant("EXT-4", "decode only", "rationale: newest first")
class CacheReversed(Extend):
    """Slots come newest first."""

    def new_cache(self, x):
        return super().new_cache(x)[:, ::-1]


@plant("EXT-4", "decode only", "rationale: a ring returned as it lies in memory")
class CacheIsARing(Extend):
    """Slots are rotated by the length modulo W."""

    def new_cache(self, x):
        kept = super().new_cache(x)
        W = max(kept.shape[1], 1)
        return (
            np.stack([np.roll(row, n % W, 0) for row, n in zip(kept, self.plan.length, strict=True)])
            if len(kept)
            else kept
        )


@plant("EXT-4", "decode only", "rationale: filled from the left while short")
class CacheFilledFromTheLeft(Extend):
    """While the cache is not full its tokens stand on the left."""

    def new_cache(self, x):
        kept = super().new_cache(x)
        empty = (self.plan.keeps < 0).sum(1)
        return np.stack([np.roll(row, -n, 0) for row, n in zip(kept, empty, strict=True)]) if len(kept) else kept


@plant("EXT-4", "decode only", "TRAPS 20: slots not reset")
class EmptySlotsNotCleared(Extend):
    """Empty slots return ones instead of zeros."""

    def new_cache(self, x):
        return np.where((self.plan.keeps >= 0)[:, :, None, None], super().new_cache(x), 1)


@plant("EXT-6", "decode only", "TRAPS 19: one counter for all rows")
class OneLengthForAllRows(Extend):
    """All rows count as long as the first."""

    def make_plan(self):
        if self.extends and self.dims["B"]:
            seen = np.asarray(self.tensors["cache_length"])
            self.tensors["cache_length"] = np.full_like(seen, seen[0])
        return super().make_plan()


@plant("EXT-6", "decode only", "TRAPS 19")
class LengthGrowsByT(Extend):
    """cache_length grows by T whatever lengths says."""

    def forward(self):
        outputs = super().forward()
        if self.extends:
            outputs["cache_length"] = np.asarray(self.tensors["cache_length"]) + self.dims["T"]
        return outputs


@plant("EXT-6", "decode only", "rationale: a counter in 8 bits")
class LengthWraps(Extend):
    """cache_length wraps at 1024."""

    def forward(self):
        outputs = super().forward()
        if self.extends:
            outputs["cache_length"] = outputs["cache_length"] % 1024
        return outputs


@plant("EXT-6", "decode only", "rationale: the counter saturates at the ring's size")
class LengthStopsAtW(Extend):
    """cache_length never exceeds the number of slots."""

    def forward(self):
        outputs = super().forward()
        if self.extends and self.window is not None and self.window > 0:
            outputs["cache_length"] = np.minimum(outputs["cache_length"], self.plan.slots)
        return outputs


@plant("EXT-7", "decode only", "TRAPS 19: ragged lengths")
class LengthsIgnored(Extend):
    """lengths is accepted and not read."""

    def make_plan(self):
        if self.extends:
            self.tensors.pop("lengths", None)
        return super().make_plan()


@plant("EXT-7", "decode only", "rationale: rows past their length")
class OutputPastLengths(Extend):
    """Outputs past lengths repeat the last real one."""

    def hide(self, out):
        hidden = super().hide(out)
        if not self.extends or "lengths" not in self.tensors or not out.shape[1]:
            return hidden
        new = np.asarray(self.tensors["lengths"])
        at = np.minimum(np.arange(out.shape[1]), np.maximum(new[:, None] - 1, 0))
        repeated = np.take_along_axis(hidden, at[:, :, None, None], 1)
        return np.where((new > 0)[:, None, None, None], repeated, hidden)


@plant("EXT-7", "nan", "TRAPS 10")
class TokensPastLengthsMultiplied(Extend):
    """Tokens past lengths and unused slots are multiplied by zero instead of dropped."""

    def select(self, x, live):
        return x * live[:, :, None, None] if self.extends else super().select(x, live)


@plant("EXT-8", "decode only", "TRAPS 19: positions restart at each call")
class PositionsRestart(Extend):
    """New queries are rotated from position 0 on."""

    def scores(self):
        if not self.extends:
            return super().scores()
        rows, slots = self.plan.rope_row, self.plan.slots
        fresh = np.broadcast_to(np.arange(self.dims["T"]), rows[:, slots:].shape)
        self.rq, self.rk = self.rotate(self.q, fresh), self.rotate(self.k, rows)
        return self.dot(self.rq, self.rk) * np.float32(self.scale)


@plant("EXT-9", "decode only", "TRAPS 20: a recycled slot is not reset")
class UnusedSlotsAttended(Extend):
    """Softmax attends to slots older than cache_length."""

    def near(self):
        mask = super().near()
        if not self.extends:
            return mask
        distance = self.plan.distance()
        return (
            (distance >= 0)
            & (distance <= self.near_window())
            & self.plan.query_live[:, :, None]
            & (self.plan.live[:, None, :] | (np.arange(mask.shape[2]) < self.plan.slots))
        )


@plant("EXT-9", "nan", "TRAPS 10: unused ring slots")
class UnusedSlotsMultiplied(Extend):
    """Unused cache slots are multiplied by zero instead of dropped."""

    def load(self):
        super().load()
        if self.extends and self.plan.slots:
            poison = np.where(np.isnan(self.need("cache_v")), np.nan, 0).sum((1, 2))[:, None, None, :]
            self.v = self.v + poison


@plant("EXT-9 EXT-5", "decode only", "TRAPS 20")
class UnusedSlotsFolded(Extend):
    """The values of unused slots enter cache_state."""

    def new_state(self):
        state = super().new_state()
        if not self.extends or not self.plan.slots:
            return state
        dead = ~self.plan.live[:, : self.plan.slots, None, None]
        v = np.where(dead, self.need("cache_v"), 0).transpose(0, 2, 1, 3)
        fk = self.phi(np.where(dead, self.need("cache_k"), 0).transpose(0, 2, 1, 3))
        return state + fk.swapaxes(-1, -2) @ v


@plant("EXT-10", "decode only", "rationale: a ring for every window")
class NoneDropsTheOldest(Extend):
    """At window None the oldest slot is zeroed once four tokens are in."""

    def new_cache(self, x):
        kept = super().new_cache(x)
        if self.window is not None or kept.shape[1] < 4:
            return kept
        first = np.argmax(self.plan.keeps >= 0, 1)
        return np.where((np.arange(kept.shape[1]) == first[:, None])[:, :, None, None], 0, kept)


@plant("EXT-10 EXT-5", "decode only", "rationale: an empty ring never evicts")
class MinusOneNeverFolds(Extend):
    """At window -1 new tokens are not folded."""

    def folds(self):
        return super().folds() & (not (self.extends and self.window == -1))


@plant("EXT-11", "decode only", "rationale: memory as a first state")
class MemoryFoldedIntoCache(Extend):
    """memory enters cache_state."""

    def new_state(self):
        state = super().new_state()
        return state + self.memory.mean(1) if self.extends and self.memory is not None else state


@plant("NUM-3 EXT-5", "decode only", "TRAPS 5: state kept in 16 bits over decode steps")
class CacheStateIn16Bits(Extend):
    """cache_state is rounded to bfloat16 after every call."""

    def new_state(self):
        state = super().new_state()
        return to_bf16(state) if self.extends else state


@plant("NUM-3", "decode only", "TRAPS 5: small increments to a large state are lost")
class SmallFoldsLost(Extend):
    """A fold below a 16384th of the state's largest value is dropped."""

    def new_state(self):
        state = super().new_state()
        if not self.extends or self.state is None:
            return state
        old = self.state
        floor = np.abs(old).max((-1, -2), keepdims=True, initial=0) / 16384
        return np.where(np.abs(state - old) < floor, old, state)


@plant("EXT-5 EXT-1", "past size", "rationale: a fault that starts at a length")
class PastThousandStateFrozen(Extend):
    """Rows of 1000 tokens and more fold nothing."""

    def folds(self):
        folds = super().folds()
        return folds & (np.asarray(self.tensors["cache_length"]) < 1000)[:, None] if self.extends else folds


@plant("EXT-1", "decode only", "rationale: the path of speculative decoding")
class TwoTokensNotCausal(Extend):
    """In calls of two to four tokens the new tokens see each other both ways."""

    def near(self):
        mask = super().near()
        if not self.extends or not 2 <= self.dims["T"] <= 4 or self.window == -1:
            return mask
        ahead = self.plan.same() & (self.plan.distance() < 0)
        return mask | ahead


@plant("EXT-1 EXT-7", "decode only", "rationale: rows with nothing new")
class IdleRowForgets(Extend):
    """A row with lengths 0 returns an empty cache."""

    def new_cache(self, x):
        kept = super().new_cache(x)
        if "lengths" not in self.tensors:
            return kept
        return np.where((np.asarray(self.tensors["lengths"]) > 0)[:, None, None, None], kept, 0)


@plant("EXT-5 RLA-1", "past size", "TRAPS 19")
class PrefillStateWholeChunks(Extend):
    """A call of more than 64 tokens folds whole chunks of 16 alone."""

    def folds(self):
        folds = super().folds()
        if not self.extends or self.dims["T"] <= 64:
            return folds
        top = np.where(folds, self.plan.index, -1).max(1, keepdims=True, initial=-1) + 1
        return folds & (self.plan.index < top // 16 * 16)
