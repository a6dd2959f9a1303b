"""Faults of the linear branch: its state, the carried state and the memory."""

from __future__ import annotations

import ml_dtypes
import numpy as np
from rattention.conformance.mutants.eager import Form
from rattention.conformance.mutants.port import plant


def to_bf16(x: np.ndarray) -> np.ndarray:
    return x.astype(ml_dtypes.bfloat16).astype(np.float32)


class ChunkedState(Form):
    """The linear branch with a state carried from chunk to chunk of 16, so that `keep` can spoil it."""

    chunk = 16

    def keep(self, state: np.ndarray) -> np.ndarray:
        return state

    def far_branch(self):
        out = super().far_branch()
        if "segment_ids" in self.tensors or self.plan.slots or self.window is None:
            return out
        w, T = self.window, self.dims["T"]
        state = np.zeros((*self.fk.shape[:2], self.fk.shape[-1], self.v.shape[-1]), np.float32)
        parts = []
        for start in range(0, T, self.chunk):
            stop = min(start + self.chunk, T)
            rows = slice(start, stop)
            first = max(start - w - 1, 0)  # keys before this one are in the state
            mask = self.far()[:, None, None, rows, first:]
            local = (
                np.where(mask, self.dot(self.fq[..., rows, :], self.fk[:, :, first:]), 0) @ self.v[:, :, None, first:]
            )
            parts.append(local + self.fq[..., rows, :] @ state[:, :, None])
            after = max(stop - w - 1, 0)
            state = self.keep(state + self.fk[:, :, first:after].swapaxes(-1, -2) @ self.v[:, :, first:after])
        exact = self.a @ self.v[:, :, None]
        return out - exact + np.concatenate(parts, -2) if parts else out


@plant("NUM-3", "precision", "TRAPS 5: state kept in 16 bits")
class StateIn16Bits(ChunkedState):
    """The running state is kept in bfloat16, whatever the storage."""

    def keep(self, state):
        return to_bf16(state)

    def new_state(self):
        return to_bf16(super().new_state())


@plant("NUM-3 NUM-2", "precision", "TRAPS 5: wrong state but right output")
class FinalStateIn16Bits(Form):
    """Only the state handed on is rounded to bfloat16."""

    def new_state(self):
        return to_bf16(super().new_state())


@plant("NUM-3", "one dtype", "TRAPS 5: axlearn decode")
class FinalStateInStorage(Form):
    """The state handed on is rounded to the storage dtype when that is bfloat16."""

    def new_state(self):
        state = super().new_state()
        return to_bf16(state) if self.storage == "bfloat16" else state


@plant("RLA-6", "state", "rationale: the state of all tokens, as linear attention without a window returns it")
class FinalStateOfAllTokens(Form):
    """final_state covers the last window too."""

    def folds(self):
        if self.op == "rattention_extend" or self.window is None:
            return super().folds()
        return self.plan.live & (self.plan.document == self.plan.document.max(1, keepdims=True, initial=-1))


@plant("RLA-6 RAT-4", "state", "TRAPS 1: wrong state but right output")
class FinalStateOneShort(Form):
    """final_state covers i < T - w - 1: the cut of the last query, not of the ring."""

    def folds(self):
        folds = super().folds()
        if self.op == "rattention_extend" or not self.window or self.window < 0:
            return folds
        index = np.where(folds, self.plan.index, -1)
        return folds & (index < index.max(1, keepdims=True, initial=-1))


@plant("RLA-6 EXT-5", "state", "TRAPS 26: continuation drops what was carried")
class FinalStateForgetsTheInitial(Form):
    """final_state leaves out S_init."""

    def new_state(self):
        state, self.state = self.state, None
        try:
            return super().new_state()
        finally:
            self.state = state


@plant("RLA-5", "state", "rationale: memory and carried state added once, early")
class FinalStateHoldsMemory(Form):
    """memory is folded into final_state."""

    def new_state(self):
        state = super().new_state()
        return state + self.memory.mean(1) if self.memory is not None and self.op != "rattention_extend" else state


@plant("RLA-6 RLA-8", "state", "rationale: wrong state but right output")
class FinalStateHeadsReversed(Form):
    """The heads of final_state come in reverse order."""

    def new_state(self):
        return super().new_state()[:, ::-1]


@plant("RLA-6", "structured data", "rationale: a fault that shows where F equals Dv alone")
class SquareStateTransposed(Form):
    """When F equals Dv the final state is transposed."""

    def new_state(self):
        state = super().new_state()
        return state.swapaxes(-1, -2) if state.shape[-1] == state.shape[-2] else state


@plant("RLA-6", "state", "rationale: normalised accumulation, as a running mean")
class FinalStateIsAMean(Form):
    """final_state divides the sum by the number of its tokens once more than one is in."""

    def new_state(self):
        count = np.maximum(self.folds().sum(1), 1).astype(np.float32)
        return super().new_state() / count[:, None, None, None]


@plant("RLA-4", "state", "TRAPS 26: continuation ignores the carried state")
class CarriedStateIgnored(Form):
    """Queries do not read the carried state, which is still handed on."""

    def carried(self):
        return np.zeros_like(super().carried())


@plant("RLA-4", "state", "TRAPS 6: rows with nothing outside the window taken for empty")
class CarriedStateReadLate(Form):
    """Queries with no token behind their window do not read the carried state."""

    def carried(self):
        return super().carried() & np.any(self.far(), -1)[:, None, None, :, None]


@plant("RLA-4", "state", "rationale: a state scaled by the softmax temperature")
class CarriedStateHalved(Form):
    """The carried state is read at half its value past token 32."""

    def carried(self):
        self.factor = np.where(self.plan.index[:, self.plan.slots :] >= 32, 0.5, 1)[:, None, None, :, None]
        return super().carried()

    def far_branch(self):
        out = super().far_branch()
        if self.state is None:
            return out
        read = np.where(super().carried(), self.fq @ self.read_state()[:, :, None], 0)
        return out - (1 - self.factor) * read


@plant("RLA-5", "state", "rationale: memory taken for a carried state")
class MemoryReadLate(Form):
    """Queries with no token behind their window do not read memory."""

    def far_branch(self):
        out = super().far_branch()
        if self.memory is None:
            return out
        late = ~np.any(self.far(), -1)[:, None, None, :, None]
        return out - np.where(late, self.fq @ self.memory[None], 0)


@plant("RLA-5", "state", "rationale: memory stored per key/value head")
class MemoryPerKeyHead(Form):
    """All query heads of a group read the memory of the first."""

    def load(self):
        super().load()
        if self.memory is not None:
            self.memory = np.repeat(self.memory[:, :1], self.memory.shape[1], 1)


@plant("RLA-5", "state", "rationale: an optional tensor nobody wired up")
class MemoryIgnored(Form):
    """memory is accepted and not read."""

    def far_branch(self):
        out = super().far_branch()
        return out if self.memory is None else out - self.fq @ self.memory[None]


@plant("RLA-4 RLA-5", "state", "rationale: `if` / `elif` over the two optional states")
class MemoryHidesTheCarriedState(Form):
    """With memory given, the carried state is not read."""

    def carried(self):
        return super().carried() & (self.memory is None)


@plant("RLA-2", "linear", "rationale: the classic linear attention")
class LinearNormalised(Form):
    """The linear branch divides by the sum of its weights."""

    def far_branch(self):
        out = super().far_branch()
        total = self.a.sum(-1, keepdims=True)
        return out / np.where(np.abs(total) > 1e-6, total, 1)


@plant("RLA-2", "linear", "TRAPS 25: scale applied where none is due")
class LinearScaled(Form):
    """The linear branch multiplies by the softmax scale."""

    def dot(self, queries, keys):
        return super().dot(queries, keys) * np.float32(self.scale if queries is getattr(self, "fq", None) else 1)


@plant("RLA-2", "linear", "rationale: decay, as in retention")
class LinearDecays(Form):
    """Older tokens fade by 0.1 % per token."""

    def dot(self, queries, keys):
        a = super().dot(queries, keys)
        if queries is not getattr(self, "fq", None):
            return a
        return a * np.float32(0.999) ** np.clip(self.plan.distance(), 0, None)[:, None, None]


@plant("RLA-7", "linear", "rationale: an epsilon against empty rows")
class EmptyLinearRowLeaks(Form):
    """A token with nothing to read gets a thousandth of its own value."""

    def far_branch(self):
        out = super().far_branch()
        if self.state is not None or self.memory is not None:
            return out
        empty = ~np.any(self.far(), -1)[:, None, None, :, None]
        return out + np.where(empty, 1e-3 * self.v[:, :, None, self.plan.slots :], 0)


@plant("RLA-3", "linear", "rationale: scale after phi where it is due before")
class ScaleAfterPhi(Form):
    """q_scale multiplies the first half of phi(q)."""

    def features(self):
        scale, self.tensors["q_scale"] = self.get("q_scale"), np.ones(self.dims["D"], np.float32)
        super().features()
        if scale is None:
            del self.tensors["q_scale"]
        else:
            self.tensors["q_scale"] = scale
            self.fq = np.concatenate([self.fq[..., : scale.size] * scale, self.fq[..., scale.size :]], -1)


@plant("RLA-3", "linear", "rationale: one name typed twice")
class KeyScaleIsQueryScale(Form):
    """k is multiplied by q_scale."""

    def scaled(self, x, name):
        return super().scaled(x, "q_scale" if "q_scale" in self.tensors else name)


@plant("RLA-3", "linear", "rationale: an optional tensor nobody wired up")
class KeyScaleIgnored(Form):
    """k_scale is accepted and not applied."""

    def scaled(self, x, name):
        return x if name == "k_scale" else super().scaled(x, name)


@plant("RLA-3 SWA-2", "linear", "rationale: scales applied to q and k once for both branches")
class ScalesReachTheSoftmax(Form):
    """q_scale and k_scale multiply the operands of the softmax branch too."""

    def scores(self):
        q, k = self.q, self.k
        self.q, self.k = self.scaled(q, "q_scale"), self.scaled(k, "k_scale")
        try:
            return super().scores()
        finally:
            self.q, self.k = q, k


@plant("ROPE-5", "linear", "TRAPS 17: rotated keys where the feature map needs plain ones")
class LinearReadsRotatedKeys(Form):
    """phi sees rotated q and k."""

    def features(self):
        rows, slots, q, k = self.plan.rope_row, self.plan.slots, self.q, self.k
        if "rope_cos" in self.tensors:
            self.q, self.k = self.rotate(q, rows[:, slots:]), self.rotate(k, rows)
        try:
            super().features()
        finally:
            self.q, self.k = q, k
