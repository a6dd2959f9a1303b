"""Window faults: who attends to whom, and which branch a token falls to."""

from __future__ import annotations

import numpy as np
from rattention.conformance.mutants.eager import Form
from rattention.conformance.mutants.port import plant


@plant("SWA-1 RAT-2", "window", "TRAPS 1: a total that includes the token itself")
class WindowCountsTheToken(Form):
    """The softmax window holds w tokens where w+1 are due; the linear branch is right."""

    def near_window(self):
        w = super().near_window()
        return max(w - 1, min(w, 0))


@plant("SWA-1 RAT-2", "window", "TRAPS 1")
class WindowOneTooWide(Form):
    """The softmax window holds w+2 tokens."""

    def near_window(self):
        w = super().near_window()
        return w + 1 if w >= 0 else w


@plant("SWA-1 RLA-1", "window", "TRAPS 1: the same off-by-one in both branches hides from a complement check")
class BothWindowsCountTheToken(Form):
    """Both branches take w for w+1: each token is still read once, by the wrong branch."""

    def near_window(self):
        w = super().near_window()
        return max(w - 1, min(w, 0))

    def far_window(self):
        return self.near_window()


@plant("RLA-1 RAT-2", "window", "TRAPS 1")
class FarReadsTheBorder(Form):
    """The linear branch reads i <= t-w: the oldest token of the window counts twice."""

    def far_window(self):
        return super().far_window() - 1 if self.window is not None and self.window >= 0 else super().far_window()


@plant("RLA-1 RAT-2", "window", "TRAPS 4: a token lost between the branches")
class FarStartsLate(Form):
    """The linear branch reads i <= t-w-2: one token is seen by neither branch."""

    def far_window(self):
        return super().far_window() + 1


@plant("SWA-1", "window", "TRAPS 1: window 0 taken for no window")
class WindowZeroIsFull(Form):
    """`window or None`: 0 becomes full causal attention."""

    def near_window(self):
        return super().near_window() or np.inf


@plant("SWA-1", "window", "TRAPS 1: decode at w = 0")
class WindowZeroIsEmpty(Form):
    """At window 0 the token does not see itself."""

    def near_window(self):
        return -1 if self.window == 0 else super().near_window()


@plant("SWA-5", "window", "TRAPS 9: the empty row")
class MinusOneAttendsToItself(Form):
    """At window -1 the softmax branch still sees the token itself."""

    def near_window(self):
        return max(super().near_window(), 0)


@plant("SWA-5", "window", "TRAPS 9: a softmax over nothing is uniform over everything")
class EmptyRowIsUniform(Form):
    """A row without keys yields the mean of the values instead of zero."""

    def softmax(self, scores, mask):
        p = super().softmax(scores, mask)
        return np.where(np.any(mask, -1)[:, None, None, :, None], p, np.float32(1 / max(scores.shape[-1], 1)))


@plant("SWA-5", "window", "TRAPS 9")
class EmptyRowIsNan(Form):
    """A row without keys divides zero by zero."""

    def softmax(self, scores, mask):
        return np.where(np.any(mask, -1)[:, None, None, :, None], super().softmax(scores, mask), np.nan)


@plant("RLA-1", "window", "TRAPS 1: the exclusive variant of linear attention")
class MinusOneExcludesTheToken(Form):
    """At window -1 the linear branch reads i < t instead of i <= t."""

    def far_window(self):
        return 0 if self.window == -1 else super().far_window()


@plant("SWA-6", "window", "rationale: None mapped to the largest tile the author thought of")
class NoneMeansTwoHundred(Form):
    """Window None is a window of 200."""

    def near_window(self):
        return 200 if self.window is None else self.window


@plant("SWA-6 SWA-1", "window", "TRAPS 1: w >= T")
class LongWindowClipped(Form):
    """A window of T-1 or more is clipped to T-2, so that the last token misses the first."""

    def near_window(self):
        w = super().near_window()
        return self.dims["T"] - 2 if self.op != "rattention_extend" and w >= self.dims["T"] - 1 else w


@plant("SWA-6 RLA-9", "window", "TRAPS 1: w >= T")
class LongWindowWraps(Form):
    """The window is taken modulo T."""

    def near_window(self):
        w = super().near_window()
        return w % max(self.dims["T"], 1) if self.op != "rattention_extend" and 0 <= w < np.inf else w


@plant("SWA-1", "window", "rationale: a two-sided window, as in encoders")
class WindowLooksAhead(Form):
    """The window also reaches one token into the future."""

    def near(self):
        ahead = self.plan.same() & (self.plan.distance() == -1)
        return super().near() | ahead if self.window != -1 else super().near()


@plant("SWA-1", "window", "rationale: strict causality of the linear branch applied to the softmax branch")
class WindowSkipsTheToken(Form):
    """The token does not see itself unless it is alone."""

    def near(self):
        mask = super().near()
        strict = mask & (self.plan.distance() > 0)
        return np.where(strict.any(-1, keepdims=True), strict, mask)


@plant("RLA-9", "window", "rationale: None mapped to -1, or to a window that the linear branch does not know")
class NoneFeedsTheLinearBranch(Form):
    """At window None the linear branch reads all earlier tokens."""

    def far_window(self):
        return 0 if self.window is None else self.window


@plant("RLA-9 RLA-6", "state", "rationale: max(w, 0) of None taken as 0")
class NoneFoldsEverything(Form):
    """At window None the final state takes in every token."""

    def folds(self):
        return self.plan.live if self.window is None and self.op != "rattention_extend" else super().folds()


@plant("SWA-1 RLA-1", "past size", "rationale: window rounded up to the tile of the kernel")
class WindowRoundedToTile(Form):
    """Windows above 16 are rounded up to a multiple of 16 in the softmax branch."""

    def near_window(self):
        w = super().near_window()
        return w if w <= 16 or w == np.inf else -(-w // 16) * 16


@plant("SWA-1 RLA-1", "past size", "rationale: whole tiles skipped instead of a diagonal")
class BorderTileDropped(Form):
    """Tiles of 64 keys that the window cuts are left out of the softmax, unless they hold the query."""

    def near(self):
        mask, w = super().near(), self.near_window()
        query = self.plan.index[:, self.plan.slots :, None]
        key_tile = self.plan.index[:, None, :] // 64
        whole = (key_tile * 64 >= query - w) | (key_tile == query // 64)
        return mask & whole


@plant("RLA-1 RAT-2", "past size", "TRAPS 4: tokens between chunk border and window never folded")
class FarStopsAtChunk(Form):
    """Past 64 tokens the linear branch reads whole chunks of 64 alone."""

    def far(self):
        query = self.plan.index[:, self.plan.slots :, None]
        reach = (query - self.far_window()) // 64 * 64
        key = self.plan.index[:, None, :]
        return super().far() & ((query < 64) | (key < reach))


@plant("SWA-1", "past size", "TRAPS 11: the ragged tail")
class RaggedTailLosesWindow(Form):
    """When T is past 64 and no multiple of 64, queries of the last partial tile see that tile alone."""

    def near(self):
        mask, T = super().near(), self.dims["T"]
        if T < 64 or T % 64 == 0:
            return mask
        start = T // 64 * 64
        query, key = np.arange(T)[:, None], np.arange(mask.shape[2]) - self.plan.slots
        return mask & ((query < start) | (key >= start))


@plant("RLA-1", "past size", "TRAPS 11")
class RaggedTailLosesState(Form):
    """When T is past 128 and no multiple of 64, the last partial tile reads nothing in the linear branch."""

    def far(self):
        mask, T = super().far(), self.dims["T"]
        return mask & (np.arange(T)[:, None] < T // 64 * 64) if T > 128 and T % 64 else mask


@plant("SWA-1 RAT-1", "past size", "TRAPS 11: windows of whole tiles")
class WindowOfWholeTiles(Form):
    """A window of 64, 128 or 256 tokens loses its oldest one, where there are tokens behind it."""

    def near(self):
        mask, w = super().near(), self.window
        return mask & (self.plan.distance() < w) if w in (64, 128, 256) else mask


def _past(size: int, name: str, doc: str, clauses: str, **methods) -> None:
    cls = type(name, (Form,), {"__doc__": doc, **methods})
    plant(clauses, "past size", f"rationale: suites whose sequences stay below {size} tokens")(cls)


def _blind(size: int):
    def near(self):
        query = self.plan.index[:, self.plan.slots :, None]
        return Form.near(self) & ~((query >= size) & (self.plan.distance() == 3))

    return near


def _deaf(size: int):
    def far(self):
        return Form.far(self) & ~(self.plan.index[:, None, :] == size)

    return far


def _stuck(size: int):
    def folds(self):
        return Form.folds(self) & (self.plan.index < size)

    return folds


for _n in (64, 128, 256, 512, 1024):
    _title = f"From token {_n} on, softmax misses the third last token."
    _past(_n, f"Past{_n}WindowHole", _title, "SWA-1", near=_blind(_n))
    _past(_n, f"Past{_n}TokenLost", f"Token {_n} never reaches the linear branch.", "RLA-1 RAT-2", far=_deaf(_n))
for _n in (128, 512):
    _past(_n, f"Past{_n}StateStuck", f"The state takes in no token from {_n} on.", "RLA-6 EXT-5", folds=_stuck(_n))
