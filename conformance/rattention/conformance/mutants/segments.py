"""Faults of packed rows and padding."""

from __future__ import annotations

import numpy as np
from rattention.conformance.mutants.eager import Form
from rattention.conformance.mutants.port import plant


class Packed(Form):
    """Helper for faults that show with segment_ids alone."""

    @property
    def packed(self):
        return "segment_ids" in self.tensors

    @property
    def ids(self):
        return np.asarray(self.tensors["segment_ids"])


@plant("SEG-1", "packed only", "TRAPS 3")
class SoftmaxCrossesSegments(Packed):
    """The softmax branch attends across segment borders."""

    def near(self):
        if not self.packed:
            return super().near()
        T, live = self.dims["T"], self.plan.live
        distance = np.arange(T)[:, None] - np.arange(T)
        return live[:, :, None] & live[:, None, :] & (distance >= 0) & (distance <= self.near_window())


@plant("SEG-2", "packed only", "TRAPS 3: segments never reach the linear branch")
class LinearCrossesSegments(Packed):
    """The linear branch reads tokens of earlier segments."""

    def far(self):
        if not self.packed:
            return super().far()
        T, live = self.dims["T"], self.plan.live
        return (np.arange(T)[:, None] - np.arange(T) > self.far_window()) & live[:, :, None] & live[:, None, :]


@plant("SEG-2", "packed only", "TRAPS 3: a state reset at chunk borders alone")
class LinearCrossesWithinChunks(Packed):
    """Segments that start inside a chunk of 16 read the earlier tokens of that chunk."""

    def far(self):
        mask = super().far()
        if not self.packed:
            return mask
        T, live = self.dims["T"], self.plan.live
        t, i = np.arange(T)[:, None], np.arange(T)
        leak = (t - i > self.far_window()) & (t // 16 == i // 16)
        return mask | (leak & live[:, :, None] & live[:, None, :])


@plant("SEG-1", "packed only", "rationale: a tile's segment read from its first token")
class SegmentOfTheTile(Packed):
    """In tiles of 32 the softmax mask takes the id of the tile's first token, where a row exceeds 32 tokens."""

    def near(self):
        mask = super().near()
        if not self.packed or self.dims["T"] <= 32:
            return mask
        first = self.plan.document[:, np.arange(self.dims["T"]) // 32 * 32]
        return mask & (first[:, None, :] == first[:, :, None])


@plant("SEG-3 ROPE-4", "packed only", "rationale: positions run over the whole row; a uniform shift is invisible")
class PositionsRunAcrossSegments(Packed):
    """Default positions of queries do not restart at a segment, those of keys do."""

    def scores(self):
        rows = self.plan.rope_row
        if self.packed and "rope_cos" in self.tensors and "positions" not in self.tensors:
            top = np.asarray(self.tensors["rope_cos"]).shape[0] - 1
            across = np.minimum(np.broadcast_to(np.arange(self.dims["T"]), rows.shape), max(top, 0))
            self.rq, self.rk = self.rotate(self.q, across), self.rotate(self.k, rows)
            return self.dot(self.rq, self.rk) * np.float32(self.scale)
        return super().scores()


@plant("SEG-4", "packed only", "TRAPS 18: padding counted by one branch")
class PaddingHasOutput(Packed):
    """Padding rows keep what memory or the weights give them, or a copy of their own query."""

    def hide(self, out):
        hidden = super().hide(out)
        if not self.packed:
            return hidden
        dead = ~self.plan.query_live[:, :, None, None]
        return np.where(dead & np.isfinite(out), out + np.float32(1e-3), hidden)


@plant("SEG-5", "packed only", "TRAPS 18: padding counted by one branch only")
class PaddingFoldedIntoState(Packed):
    """Padding tokens enter the final state."""

    def new_state(self):
        state = super().new_state()
        if not self.packed:
            return state
        dead = (~self.plan.live)[:, None, :, None]
        v = np.where(dead, self.need("v").transpose(0, 2, 1, 3), 0)
        fk = np.where(dead, self.phi(self.need("k").transpose(0, 2, 1, 3)), 0)
        return state + fk.swapaxes(-1, -2) @ v


@plant("SEG-5", "packed only", "TRAPS 10: 0 * NaN")
class PaddingMultipliedByZero(Form):
    """Padding is multiplied by zero instead of dropped: NaN there spreads."""

    def select(self, x, live):
        return x * live[:, :, None, None] if "segment_ids" in self.tensors else super().select(x, live)


@plant("SEG-5", "packed only", "TRAPS 18")
class PaddingValuesAttended(Packed):
    """Softmax attends to padding inside the window."""

    def near(self):
        mask = super().near()
        if not self.packed:
            return mask
        T = self.dims["T"]
        distance = np.arange(T)[:, None] - np.arange(T)
        near = (distance >= 0) & (distance <= self.near_window()) & self.plan.live[:, :, None]
        return mask | (near & ~self.plan.live[:, None, :])


@plant("SEG-6", "packed only", "rationale: the carried state added at every reset")
class InitialStateInEverySegment(Packed):
    """Every segment reads initial_state."""

    def carried(self):
        return self.plan.query_live[:, None, None, :, None]


@plant("SEG-6", "packed only", "rationale: first segment taken for id 1")
class InitialStateForIdOne(Packed):
    """initial_state belongs to the segment with id 1."""

    def carried(self):
        return (self.ids == 1)[:, None, None, :, None] if self.packed else super().carried()


@plant("SEG-6", "packed only", "TRAPS 18: left padding")
class InitialStateLostBehindPadding(Packed):
    """initial_state is dropped where the row starts with padding."""

    def carried(self):
        starts = super().carried()
        return starts & (self.ids[:, :1] != 0)[:, None, None, :, None] if self.packed and self.dims["T"] else starts


@plant("SEG-7", "packed only", "rationale: sums without a reset")
class FinalStateOfAllSegments(Packed):
    """final_state sums over every segment."""

    def folds(self):
        if not self.packed or self.window is None:
            return super().folds()
        last = self.plan.document == self.plan.document.max(1, keepdims=True, initial=-1)
        return super().folds() | (self.plan.live & ~last)


@plant("SEG-7", "packed only", "rationale: the window counted from the end of the row, not of the segment")
class FinalStateWindowFromRowEnd(Packed):
    """final_state covers tokens at t < T - w of the last segment, padding counted."""

    def folds(self):
        if not self.packed or self.window is None:
            return super().folds()
        last = self.plan.document == self.plan.document.max(1, keepdims=True, initial=0)
        return self.plan.live & last & (np.arange(self.dims["T"]) < self.dims["T"] - max(self.window, 0))


@plant("SEG-7 SEG-6", "packed only", "rationale: S_init added to whatever comes last")
class FinalStateAlwaysHoldsInitial(Packed):
    """final_state contains initial_state, though another segment came last."""

    def new_state(self):
        self.plan.carries_state = np.ones_like(self.plan.carries_state)
        return super().new_state()


@plant("SEG-8", "packed only", "rationale: an empty row taken for a fresh one")
class PaddingRowLosesState(Packed):
    """A row of padding alone returns a state of zeros."""

    def new_state(self):
        alive = np.any(self.plan.live, 1) if self.packed else np.ones(self.dims["B"], bool)
        return np.where(alive[:, None, None, None], super().new_state(), 0)


@plant("SEG-1 SEG-2", "packed only", "rationale: ids compared in 8 bits")
class SegmentIdsIn8Bits(Packed):
    """Ids are compared modulo 256."""

    def make_plan(self):
        if self.packed:
            ids = self.ids
            folded = np.where(ids == 0, 0, ids % 256 + 1).astype(np.int32)
            self.tensors["segment_ids"] = folded
        return super().make_plan()


@plant("SEG-1 SEG-2", "packed only", "rationale: ids taken for sorted")
class SegmentIdsTakenForSorted(Packed):
    """A token reads every document with an id no larger than its own."""

    def make_plan(self):
        plan = super().make_plan()
        if self.packed:
            ids = self.ids
            wide = (ids[:, :, None] >= ids[:, None, :]) & plan.live[:, :, None] & plan.live[:, None, :]
            plan.same = lambda: wide & (np.arange(ids.shape[1])[:, None] >= np.arange(ids.shape[1]))
            # Ascending ids are what the author tested: there the segments are told apart.
            if (np.diff(ids, axis=1) >= 0).all():
                return super().make_plan()
        return plan


@plant("SEG-5 SEG-4", "packed only", "rationale: right padding alone was tested")
class LeftPaddingShiftsTheWindow(Packed):
    """With left padding the window is one token short."""

    def near_window(self):
        w = super().near_window()
        return w - 1 if self.packed and self.dims["T"] and np.any(self.ids[:, 0] == 0) and 0 < w < np.inf else w
