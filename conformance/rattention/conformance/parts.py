"""Which operations are made of which, and where a fault that shows in several of them must lie."""

from __future__ import annotations

from collections.abc import Iterable

PARTS = {
    "residual_linear_attention": ("feature_map",),
    "rattention": ("sliding_window_attention", "residual_linear_attention", "rms_mix", "feature_map"),
    "rattention_extend": (
        *("rattention", "sliding_window_attention", "residual_linear_attention", "rms_mix", "feature_map"),
    ),
}
"""Operations that another one is made of."""
CALLS = {"forward is extension": "rattention_extend"}
"""Properties whose cases are of one operation and whose calls of another."""


def parts(op: str) -> tuple[str, ...]:
    """Every smaller operation that `op` rests on: a gradient rests on its forward and on the gradients of its parts."""
    base = op.removesuffix(".vjp")
    smaller = PARTS.get(base, ())
    return smaller if op == base else (base, *smaller, *(f"{part}.vjp" for part in smaller))


def roots(failed: Iterable[str]) -> set[str]:
    """Those of the failed operations none of whose parts failed: the fault is in them, the others inherit it."""
    every = set(failed)
    return {op for op in every if not every.intersection(parts(op))}
