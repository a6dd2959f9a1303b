"""Which clause a wrong number points at: hypotheses that are tried, and what is left in the minimal case.

A hypothesis is what a backend with a known kind of fault would compute (hypotheses.py). Where the reference's answer to
it explains what the backend returned, and the right answer does not, the fault has a name.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from rattention.conformance.case import Case
from rattention.conformance.context import Broken, Context, Refused, storage_of
from rattention.conformance.hypotheses import Hypothesis, hypotheses
from rattention.conformance.judge import Violation, compare_one
from rattention.conformance.oracle import Bounds
from rattention.conformance.shape import Guess, shape_of_error
from rattention.conformance.strategies import Recipe
from rattention.conformance.suspects import PARAMETERS, ROUGH, STATES, suspects
from rattention.numpy import quadratic
from rattention.spec import load

NUMERIC = ("value", "nan", "hidden nan")
"""Kinds of violation that come from comparing numbers, whose clauses may be no more than suspects."""
LARGE = 2**16
"""Elements up to which the case that was found is explained along with the minimal one made of it."""


def diagnose(ctx: Context, case: Case, recipe: Recipe, violations: list[Violation], original: Case) -> None:
    """Put the likeliest clauses first in each violation that compared numbers, and add a guess."""
    wrong = [v for v in violations if v.kind in NUMERIC and v.output]
    outputs = {v.output for v in wrong}
    found = explain(ctx, case, original, outputs) if outputs else None
    for v in wrong:
        guess, labels = found or by_place(case, recipe, v)
        if v.guess.startswith("precision") and v.relative is not None and v.relative > ROUGH:
            v.guess = ""  # a probe for roundings found something greater
        v.guess = guess if found else v.guess or guess
        if case.is_vjp and labels:
            # Where the gradient of one parameter alone is wrong, what is said of that parameter comes first.
            own = (PARAMETERS[v.output],) if outputs == {v.output} and v.output in PARAMETERS else ()
            first = tuple(label for label in labels if label.startswith("GRAD")) or ("GRAD-1",)
            labels = (*first, *own, *labels)
        named = tuple(dict.fromkeys((*labels, *v.clauses[: v.named])))
        v.named = len(named)
        possible = sorted(suspects(case, v.output), key=list(load().clauses).index) if v.clauses == ("NUM-1",) else ()
        v.clauses = tuple(dict.fromkeys((*named, *possible, *v.clauses)))


def explain(ctx: Context, case: Case, original: Case, outputs: set[str]) -> Guess | None:
    """A guess and its clauses: the hypothesis that explains all the wrong `outputs`, the closest where several do.

    A minimal case is often too small to tell hypotheses apart, so that the case that it was made from has a say too,
    unless it is large.
    """
    answer = Answer.of(ctx, case, outputs)
    if answer is None:
        return None
    close = answer.explanations(ctx)
    wider = None
    if original.op == case.op and sum(x.size for x in original.tensors.values()) <= LARGE:
        wider = Answer.of(ctx, original, outputs)
    if wider is not None and close:
        both = wider.explanations(ctx, set(close))
        close = {guess: pair for guess, pair in close.items() if guess in both}
    if close:
        best = min(close.values(), key=lambda pair: pair[1])[0]
        return best.guess, best.clauses
    for told in (wider, answer):
        guess = told and shape_of_error(told.case, told.got, told.bounds, told.outputs)
        if guess:
            return guess
    return None


@dataclass
class Answer:
    """What a backend answers to a case, and which of the outputs asked about are wrong."""

    case: Case
    got: dict[str, np.ndarray]
    bounds: Bounds
    outputs: set[str]

    @classmethod
    def of(cls, ctx: Context, case: Case, outputs: set[str]) -> Answer | None:
        """None where there is no usable answer, or a right one: the property that failed makes other calls."""
        try:
            got = ctx.run(case.op, case.tensors, case.attrs)
            bounds = ctx.bounds(case.op, case.tensors, case.attrs)
        except (Broken, Refused, ValueError, KeyError, IndexError):
            return None
        finally:
            ctx.violations = []
        wrong = {n for n in outputs if n in bounds and n in got and compare_one(n, got[n], *bounds[n], ())[1] > 1.0}
        return cls(case, got, bounds, wrong) if wrong else None

    def explanations(self, ctx: Context, only: set[str] | None = None) -> dict[str, tuple[Hypothesis, float]]:
        """Hypotheses by guess, each with the largest share of the budget that it leaves unexplained, at most 1."""
        found: dict[str, tuple[Hypothesis, float]] = {}
        for h in hypotheses(self.case, self.outputs):
            if only is not None and h.guess not in only:
                continue
            try:
                if not self._near(h):
                    continue
                bounds = ctx.bounds(self.case.op, h.tensors, h.attrs)
            except (ValueError, KeyError, IndexError):
                continue
            worst = max(self._share(name, h, bounds) for name in self.outputs)
            if worst <= 1.0:
                found[h.guess] = (h, worst)
        return found

    def _near(self, h: Hypothesis) -> bool:
        """Whether the values that a hypothesis gives are near enough to the answer for their budgets to be worth it."""
        with np.errstate(all="ignore"):
            values = quadratic.run(self.case.op, h.tensors, h.attrs)
            for name in self.outputs:
                x, limit = self.got[name].astype(np.float64), self.bounds[name][1]
                value = values[name]
                if h.change is not None and value.shape == limit.shape:
                    value, _ = h.change(name, value, limit)
                if value.shape != x.shape:
                    return False
                size = 2.0**-6 if self.got[name].dtype.itemsize == 2 or storage_of(self.case) != "float32" else 2.0**-14
                far = np.abs(x - value) > 64 * limit + size * np.abs(value)
                if far.any():
                    return False
        return True

    def _share(self, name: str, h: Hypothesis, bounds: Bounds) -> float:
        if name not in bounds or bounds[name][0].shape != self.got[name].shape:
            return np.inf
        value, limit = bounds[name]
        if h.change is not None:
            value, limit = h.change(name, value, limit)
        return compare_one(name, self.got[name], value, limit, ())[1]


def by_place(case: Case, recipe: Recipe, v: Violation) -> Guess:
    """What the place of an error and the options that it needs say: a guess, and clauses where they name any."""
    t = case.tensors
    if v.kind == "hidden nan":
        return "NaN hidden", ("NUM-5",)
    leak = "NaN leak" if v.kind == "nan" else ""
    if _at_inert(case, v):
        label = "GRAD-5" if case.is_vjp else "SEG-4" if "segment_ids" in t else "EXT-7"
        return leak or "the output of an inert token", (label,)
    if recipe.has("poison"):
        labels = (("GRAD-5",) if case.is_vjp else ()) + (("SEG-5",) if "segment_ids" in t else ())
        labels += ("EXT-9", "EXT-7") if "lengths" in t else ("EXT-9",) if "cache_k" in t else ()
        return leak or "inert elements are read", labels
    if leak:
        return leak, _finite(case, v)
    grouped = "k" in t and t["q"].shape[2] > t["k"].shape[2] > 1
    packed = "segment_ids" in t
    guess = "segments" if packed else "head order" if grouped else "state" if v.output in STATES else ""
    return guess or _precision(v), ()


def _finite(case: Case, v: Violation) -> tuple[str, ...]:
    """The clauses that promise a number where there is NaN, though nothing that the call reads is NaN."""
    possible = suspects(case, v.output)
    empty = ("RLA-7",) if v.expected == 0 and case.base_op == "residual_linear_attention" else ()
    return tuple(label for label in (*empty, "FM-5", "SWA-5", "SWA-3", "MIX-3") if label in possible)


def _at_inert(case: Case, v: Violation) -> bool:
    """Whether the first wrong element is the output of padding or of a token past `lengths`."""
    if v.output not in ("out", "d_q", "d_k", "d_v") or len(v.index) != 4:
        return False
    b, t = v.index[:2]
    if "segment_ids" in case.tensors:
        return bool(case.tensors["segment_ids"][b, t] == 0)
    return "lengths" in case.tensors and t >= int(case.tensors["lengths"][b])


def _precision(v: Violation) -> str:
    """ "precision" where no number is further off than roundings can make it."""
    return "precision" if v.relative is not None and v.relative <= ROUGH else ""
