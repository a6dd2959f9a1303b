"""Inert elements: padding, tokens past `lengths`, unused slots and their cotangents change nothing."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from rattention.conformance.case import Case
from rattention.conformance.context import Context
from rattention.conformance.judge import Violation, all_zero, same_bits
from rattention.conformance.properties.base import register
from rattention.conformance.strategies import Plan, Recipe, build
from rattention.conformance.strategies.build import empty_slots, inert_tokens, silence, unused_slots
from rattention.conformance.strategies.pools import recipes

OPS = ("sliding_window_attention", "residual_linear_attention", "rattention", "rattention_extend")
COUNTS = {"small": (4, 18, 0.17), "medium": (1, 5, 0.2), "tile": (0, 2, 0.5)}
CLAUSES = ("SEG-4", "SEG-5", "EXT-7", "EXT-9", "GRAD-5")


def _draw(plan: Plan) -> Iterator[Recipe]:
    for base in OPS:
        for op in (base, f"{base}.vjp"):
            if not plan.has(op):
                continue
            for size, (smoke, quick, share) in COUNTS.items():
                number = plan.count(smoke, quick, compiled=share) if smoke or plan.profile != "smoke" else 0
                if not number:
                    continue
                for i, recipe in enumerate(
                    recipes(plan, op, size, number, "inert", lambda r: r.has("segments") or r.has("lengths"))
                ):
                    layout = ("left", "middle", "right", "both", "mixed", "empty")[i % 6]
                    inert = "lengths" if base == "rattention_extend" else "segments"
                    if not plan.allows(inert):
                        continue
                    options = tuple(dict.fromkeys((*recipe.without("poison").options, inert)))
                    fill = ("partial", "empty", "mixed")[i % 3]
                    yield recipe.with_(options=options, layout=layout, fill=fill)


def _make(plan: Plan, recipe: Recipe) -> Case | None:
    case = build(recipe.without("poison"), plan.token_tiles())
    tokens, slots = inert_tokens(case.tensors), unused_slots(case.tensors)
    inert, unused = (mask is not None and bool(mask.any()) for mask in (tokens, slots))
    extend = case.base_op == "rattention_extend"
    found = ["GRAD-5"] if case.is_vjp else []
    if inert:
        found += ["EXT-7"] if extend else ["SEG-5"] if case.is_vjp else ["SEG-4", "SEG-5"]
    found += ["EXT-9"] if unused else []
    case.clauses = tuple(found)
    return case if inert or unused else None


@register("inert", "NaN, inf and huge numbers in inert elements change no bit", CLAUSES, _draw, _make)
def check(ctx: Context, case: Case) -> list[Violation]:
    """The same call with zeros and with poison where nothing may be read."""
    window = case.attrs["window"]
    clean = ctx.run(case.op, case.tensors, case.attrs)
    poisoned = silence(case.tensors, window, poison=True)
    if "positions" in poisoned and "segment_ids" in poisoned:
        ids = poisoned["segment_ids"]
        poisoned["positions"] = np.where(ids == 0, np.int32(-5), poisoned["positions"]).astype(np.int32)
    got = ctx.run(case.op, poisoned, case.attrs)
    found: list[Violation | None] = []
    for name, want in clean.items():
        violation = same_bits(name, got[name], want, case.clauses, "poison in inert elements")
        if violation:
            leaked = np.isnan(got[name].astype(np.float64)).any() and not np.isnan(want.astype(np.float64)).any()
            violation.guess = "NaN leak" if leaked else "inert elements are read"
            violation.clauses = _blame(case, name)
        found.append(violation)
    found += _zeros(case, got)
    return [v for v in found if v]


def _blame(case: Case, output: str) -> tuple[str, ...]:
    grad = ("GRAD-5",) if case.is_vjp else ()
    if case.base_op != "rattention_extend":
        return (*grad, "SEG-5")
    unused = unused_slots(case.tensors)
    tokens = inert_tokens(case.tensors)
    return (
        *grad,
        *(("EXT-9",) if unused is not None and unused.any() else ()),
        *(("EXT-7",) if tokens is not None and tokens.any() else ()),
    )


def _zeros(case: Case, got: dict[str, np.ndarray]) -> list[Violation | None]:
    """Outputs and gradients that the specification says are exactly zero."""
    tokens, slots = inert_tokens(case.tensors), unused_slots(case.tensors)
    extend = case.base_op == "rattention_extend"
    found: list[Violation | None] = []
    if case.is_vjp:
        for name in ("d_q", "d_k", "d_v"):
            if name in got and tokens is not None:
                found.append(all_zero(name, got[name], tokens, ("GRAD-5",), "the gradient of an inert token"))
        for name in ("d_cache_k", "d_cache_v"):
            if name in got and slots is not None:
                found.append(all_zero(name, got[name], slots, ("GRAD-5", "EXT-9"), "the gradient of an unused slot"))
        return found
    if tokens is not None:
        label = ("EXT-7",) if extend else ("SEG-4",)
        found.append(all_zero("out", got["out"], tokens, label, "the output of an inert token"))
    for name in ("cache_k", "cache_v"):
        empty = empty_slots(case.tensors, case.attrs["window"])
        if name in got and empty is not None:
            found.append(all_zero(name, got[name], empty, ("EXT-4", "EXT-9"), "a slot that no token fills"))
    return found
