"""The pools that recipes are drawn from: sizes beside borders, every option, every family, in balanced proportions.

Backends that compile a program per signature (shapes, dtypes, options, attributes) get signatures from a pool that
depends on the profile alone, and fresh values from the seed; the others get fresh signatures too.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from rattention.conformance.strategies.plan import PROFILES, Plan, inside
from rattention.conformance.strategies.recipe import Recipe
from rattention.conformance.strategies.sizes import (
    HEADS,
    INTERPRETED_HEADS,
    ROWS,
    SCALES,
    WIDE,
    Bag,
    channels,
    extend_tokens,
    extend_windows,
    far,
    slots,
    tokens,
    value_channels,
    windows,
)
from rattention.conformance.strategies.values import FAMILIES

OPTIONS = {
    "sliding_window_attention": ("rope", "positions", "segments", "scale"),
    "residual_linear_attention": ("segments", "q_scale", "k_scale", "memory", "initial_state"),
    "rattention": ("rope", "positions", "segments", "scale", "q_scale", "k_scale", "memory", "initial_state"),
    "rattention_extend": ("rope", "scale", "q_scale", "k_scale", "memory", "lengths"),
}
COTANGENTS = {
    "residual_linear_attention": ("d_final_state",),
    "rattention": ("d_final_state",),
    "rattention_extend": ("d_cache_k", "d_cache_v", "d_cache_state"),
}

POOL = {"small": 8, "medium": 2, "tile": 2, "wide": 2, "span": 1, "long": 1, "deep": 2, "vast": 2}
"""Signatures of each operation and size class, where every new one costs the compilation of a program."""
SETS = 4
"""Sets of values drawn for each signature of the pool."""


def pool(plan: Plan, op: str, size: str) -> list[Recipe]:
    """The signatures that all properties share, the same in every run of a profile."""
    rng = np.random.default_rng((PROFILES.index(plan.profile), zlib.crc32(f"{op} {size}".encode())))
    bag = Bag(rng)
    number = {"smoke": 0.5, "quick": 1.0, "full": 1.5}[plan.profile] * POOL[size]
    number *= 0.6 if op.removesuffix(".vjp") in ("feature_map", "rms_mix", "rope_table") else 1.0
    number *= 0.6 if plan.cost == "interpreted" else 1.0
    return [_signature(plan, op, size, rng, bag, {}) for _ in range(max(1, round(number)))]


def recipes(
    plan: Plan,
    op: str,
    size: str,
    count: int,
    purpose: str,
    suits: Callable[[Recipe], bool] | None = None,
    **fixed: Any,
) -> Iterator[Recipe]:
    """`count` recipes of one size class, every factor balanced; `fixed` holds fields that do not vary.

    Where programs are compiled, a property that says what `suits` it gets signatures from the pool, whose fields win
    over `fixed`; without a suitable one, or without `suits`, it has a few signatures of its own.
    """
    values, value_bag = plan.rng(purpose, op, size), Bag(plan.rng(purpose, op, size, "bag"))
    drawn: list[Recipe] = []
    if plan.cost != "direct" and suits is not None:
        drawn = [r for s in (size, "small", "medium") for r in pool(plan, op, s) if suits(r)]
        of_size = len([r for r in pool(plan, op, size) if suits(r)])
        drawn = drawn[:of_size] or drawn
    if not drawn:
        shapes, bag = plan.shape_rng(purpose, op, size), Bag(plan.shape_rng(purpose, op, size, "bag"))
        signatures = count if plan.cost == "direct" else (count + SETS - 1) // SETS
        drawn = [_signature(plan, op, size, shapes, bag, fixed) for _ in range(signatures)]
    elif suits is not None:
        fixed = {}
    for i in range(count):
        yield _values(plan, drawn[i % len(drawn)], values, value_bag, fixed)


def _signature(plan: Plan, op: str, size: str, rng: np.random.Generator, bag: Bag, fixed: dict[str, Any]) -> Recipe:
    """One signature, inside the declared limits where a few draws find one."""
    for _ in range(12):
        recipe = _free_signature(plan, op, size, rng, bag, fixed)
        if not plan.limits or inside(recipe, plan.limits):
            break
    return recipe


def _free_signature(
    plan: Plan, op: str, size: str, rng: np.random.Generator, bag: Bag, fixed: dict[str, Any]
) -> Recipe:
    base = op.removesuffix(".vjp")
    extend = base == "rattention_extend"
    chance = {o: [True, False] for o in OPTIONS.get(base, ())}
    if size in ("long", "vast"):  # packed documents are shorter than what these sizes are for
        packed = [True, False, False] if size == "long" or plan.cost == "direct" else [False]
        chance |= {"segments": packed} if "segments" in chance else {}
    options = [o for o, levels in chance.items() if bag.pick(f"option {o}", levels) and plan.allows(o)]
    if op.endswith(".vjp"):
        options += [o for o in COTANGENTS.get(base, ()) if bag.pick(f"option {o}", [True, True, False])]
    if "rope" not in options and "positions" in options:
        options.append("rope")
    if (extend or "positions" in options) and bag.pick("far", [True, False, False]):
        options.append("farthest" if extend and "rope" not in options else "far")
    if "options" in fixed:
        options = list(fixed["options"])
    levels = [fixed["T"]] if "T" in fixed else extend_tokens(plan, size) if extend else tokens(plan, size)
    if size in ("long", "span") and not extend:
        T, window = far(plan, size, bag, levels)
    else:
        T, window = bag.pick("T", levels), None
    dtype = bag.pick("dtype", plan.dtypes)
    if size == "span" and plan.cost != "direct" and "float32" in plan.dtypes:
        dtype = "float32"  # of the one signature there is: where little is rounded, little is hidden
    stratum = bag.pick(f"D of {dtype}", [*WIDE, "declared"]) if size == "wide" else ""
    if stratum and "rope" in chance and plan.allows("rope") and "options" not in fixed:
        # Few calls are wide: each stratum is met with tables and without.
        turned = bag.pick(f"rope of {stratum}", [True, False])
        options = [o for o in options if turned or o not in ("rope", "positions")]
        options += ["rope"] if turned and "rope" not in options else []
    D = channels(plan, size, bag, stratum, even="rope" in options or base == "rope_table")
    Hkv, G = bag.pick("heads", HEADS.get(size, HEADS["few"]) if plan.cost != "interpreted" else INTERPRETED_HEADS)
    if extend:
        window = bag.pick("window", extend_windows(plan, size, rng))
    elif size == "vast":
        window = bag.pick("window class", windows(plan, T, size, rng))
    elif size not in ("long", "span"):
        widths = windows(plan, T, size, rng)
        window = widths[bag.pick(f"window of {len(widths)}", range(len(widths)))]
    recipe = Recipe(
        op=op,
        dtype=dtype,
        B=bag.pick("B", ROWS.get(size, (1, 1, 2)) if plan.cost != "interpreted" else (1, 1, 2)),
        T=T,
        Hkv=Hkv,
        G=G,
        D=D,
        Dv=value_channels(plan, size, bag, dtype, D),
        window=window if window is None else max(window, -1),
        feature_map=bag.pick("feature_map", ["softmax", "relu", "identity"]),
        scale=float(bag.pick("scale", SCALES)) if "scale" in options else None,
        eps=bag.pick("eps", [1e-6, 1e-6, 1e-2, 1e-5, 1.0]),
        options=tuple(o for o in options if o != "scale"),
        slots=0 if window is not None else bag.pick("slots", slots(plan, size)),
        weights=bag.pick("weights", ["float32", "storage", "mixed"]),
    )
    return recipe.with_(**{k: v for k, v in fixed.items() if k != "T"})


def _values(plan: Plan, recipe: Recipe, rng: np.random.Generator, bag: Bag, fixed: dict[str, Any]) -> Recipe:
    flags = [o for o in ("poison", "defaults") if bag.pick(o, [True, False])]
    if plan.cost == "direct" and bag.pick("rows", [True, False]):
        flags.append("rows")
    drawn = {
        "family": bag.pick("family", [*FAMILIES, "normal"]),
        "layout": bag.pick(
            "layout", ["mixed", "mixed", "pair", "tile", "many", "left", "middle", "dense", "one", "empty"]
        ),
        "fill": bag.pick("fill", ["mixed", "mixed", "beyond", "partial", "full", "empty"]),
        "seed": int(rng.integers(0, 2**31)),
        "options": recipe.options + tuple(flags),
    }
    return recipe.with_(**{k: v for k, v in drawn.items() if k not in fixed or k == "options"})
