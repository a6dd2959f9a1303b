"""Exact arithmetic: cases in which an honest implementation makes no error but the last rounding.

Small integers, powers of two and weights of 1/2 are exact in every storage dtype and so are their products and sums in
float32. What is left of the budget is the float32 part and half a unit in the last place, so a state kept in 16 bits, a
sum rounded on the way, or a branch rounded before its norm shows at once, where the 16-bit budget would hide it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from rattention.conformance.case import Case
from rattention.conformance.context import Context
from rattention.conformance.features import among
from rattention.conformance.judge import Violation
from rattention.conformance.oracle import Bounds, half_ulp
from rattention.conformance.properties.base import register
from rattention.conformance.strategies import Plan, Recipe, build
from rattention.conformance.strategies.build import silence
from rattention.conformance.strategies.pools import recipes
from rattention.numpy import quadratic

LINEAR = ("residual_linear_attention", "rattention", "rattention_extend")
STATES = ("final_state", "cache_state", "d_initial_state", "d_cache_state", "d_memory")


def _sizes(plan: Plan, op: str, purpose: str, counts: dict[str, tuple[int, int, float]], **fixed) -> Iterator[Recipe]:
    if not plan.has(op):
        return
    for size, (smoke, quick, share) in counts.items():
        number = plan.count(smoke, quick, compiled=share) if smoke or plan.profile != "smoke" else 0
        if number:
            yield from recipes(plan, op, size, number, purpose, **fixed)


def _keep(recipe: Recipe, *names: str) -> Recipe:
    return recipe.with_(options=tuple(o for o in recipe.options if o in names))


# ---------------------------------------------------------------------------------------------- the state

STATE_COUNTS = {"small": (2, 14, 0.2), "medium": (1, 5, 0.2), "long": (0, 3, 0.34)}


def _draw_state(plan: Plan) -> Iterator[Recipe]:
    for op in ("residual_linear_attention", "residual_linear_attention.vjp", "rattention", "rattention_extend"):
        fixed = {"feature_map": "identity", "weights": "float32", "suits": lambda r: r.feature_map == "identity"}
        for i, recipe in enumerate(_sizes(plan, op, "state", STATE_COUNTS, **fixed)):
            yield recipe.with_(extra=("big" if i % 3 == 0 else "small",))


def _sparse(rng: np.random.Generator, shape: tuple[int, ...], low: int, high: int) -> np.ndarray:
    """One integer other than zero per row of the last axis."""
    at = rng.integers(0, shape[-1], shape[:-1])
    sign = rng.choice([-1, 1], shape[:-1]) * rng.integers(low, high + 1, shape[:-1])
    return (np.arange(shape[-1]) == at[..., None]) * sign[..., None]


def _integers(case: Case, recipe: Recipe) -> None:
    """q and k one-hot, v and cotangents +-1, states integers: big ones where only float32 outputs are judged."""
    t = case.tensors
    big = recipe.extra[:1] == ("big",)
    for name, x in list(t.items()):
        if x.dtype == np.int32 or name.startswith("rope"):
            continue
        rng = recipe.rng(f"integer {name}")
        if name in ("q", "k", "cache_k"):
            value = _sparse(rng, x.shape, 1, 1 if recipe.T > 64 else 2)
        elif name in ("v", "cache_v", "d_out"):
            value = rng.choice([-1, 1], x.shape)
        elif name in ("q_scale", "k_scale"):
            # Small enough for every state on the way to fit the 8 bits of bfloat16.
            value = rng.choice([-1.0, 1.0] if recipe.T > 64 else [-1.0, 1.0, 2.0], x.shape)
        elif name in ("initial_state", "cache_state", "memory", "d_final_state", "d_cache_state"):
            value = rng.integers(-(2**21), 2**21, x.shape) if big else rng.integers(-20, 21, x.shape)
        else:
            continue
        t[name] = np.asarray(value).astype(x.dtype)
    t.update(silence(t, recipe.window, poison=recipe.has("poison")))


def _make_state(plan: Plan, recipe: Recipe) -> Case | None:
    if recipe.feature_map != "identity":
        return None
    case = build(recipe, plan.token_tiles())
    _integers(case, recipe)
    case.params = {"all": recipe.extra[:1] != ("big",) and case.base_op == "residual_linear_attention"}
    t, every = case.tensors, case.params["all"]
    given = {"initial_state", "cache_state", "d_final_state", "d_cache_state"} & set(t)
    if case.is_vjp and not every and not {"initial_state", "memory"} & set(t):
        return None  # no gradient of a state, and nothing else is judged
    labels = ("GRAD-4", "GRAD-1") if case.is_vjp else ("EXT-5", "RAT-4", "RLA-6", *(("RLA-2",) if every else ()))
    case.clauses = among(case.op, t, case.attrs, labels)
    case.clauses += ("NUM-3",) if not every and given else ()  # small integers fit into 16 bits
    return case if case.clauses else None


@register(
    "exact state",
    "integer data: the state and its gradient carry every bit of float32",
    ("NUM-3", "RLA-6", "RLA-2", "RAT-4", "EXT-5", "GRAD-4", "GRAD-1"),
    _draw_state,
    _make_state,
)
def check_state(ctx: Context, case: Case) -> list[Violation]:
    """float32 outputs in any case; 16-bit ones where every operand on the way is exact."""
    got = ctx.run(case.op, case.tensors, case.attrs)
    bounds = exact_bounds(case, got)
    if not case.params["all"]:
        bounds = {name: b for name, b in bounds.items() if name in STATES}
    found = ctx.judge(case, got, bounds, case.clauses, record=False)
    for v in found:
        v.guess = "state" if v.output in STATES else "precision"
        if v.output == "out":
            v.clauses = ("RLA-2", "NUM-3", "RLA-1")
    return found


def exact_bounds(case: Case, got: dict[str, np.ndarray]) -> Bounds:
    """Integer answers: float32 holds them exactly, the storage dtype to half a unit in the last place."""
    values = quadratic.run(case.op, case.tensors, case.attrs)
    return {
        name: (x, half_ulp(x, got[name].dtype) if got[name].dtype.itemsize == 2 else np.zeros_like(x))
        for name, x in values.items()
    }


# ---------------------------------------------------------------------------------------------- shared heads

HEAD_COUNTS = {"small": (2, 9, 0.2), "medium": (0, 3, 0.0)}


def _draw_heads(plan: Plan) -> Iterator[Recipe]:
    half = [d for d in plan.dtypes if d != "float32"]
    if not half:
        return
    for op in (
        "sliding_window_attention.vjp",
        "residual_linear_attention.vjp",
        "rattention.vjp",
        "rattention_extend.vjp",
    ):
        fixed = {"window": 0, "feature_map": "identity", "scale": None, "weights": "float32", "G": 8, "eps": 3.0}
        for i, recipe in enumerate(_sizes(plan, op, "heads", HEAD_COUNTS, **fixed)):
            dtype = half[i % len(half)]
            yield _keep(recipe, "segments", "lengths", "defaults").with_(dtype=dtype, Dv=4, G=(8, 3, 8, 2)[i % 4])


def _make_heads(plan: Plan, recipe: Recipe) -> Case | None:
    """At w = 0 the softmax weight is 1, so d_v is the sum over the group of what arrives at the branch.

    v holds +-1 and eps is 3, so the norm divides by 2; the cotangents are orthogonal to v, so that its Jacobian adds
    nothing. The linear branch has weight 0, or, alone, integers whose sum needs more bits than the storage has.
    """
    if recipe.dtype == "float32" or recipe.window != 0 or recipe.feature_map != "identity" or recipe.Dv != 4:
        return None
    if recipe.G < 2:
        return None
    case = build(recipe, plan.token_tiles())
    t = case.tensors
    rng = recipe.rng("heads")
    if case.base_op == "residual_linear_attention":
        t["k"] = _sparse(rng, t["k"].shape, 1, 1).astype(t["k"].dtype)
        t["q"] = rng.choice([-1, 1], t["q"].shape).astype(t["q"].dtype)
        t["v"] = rng.choice([-1, 1], t["v"].shape).astype(t["v"].dtype)
        odd = 2 * rng.integers(40, 60, t["d_out"].shape) + 1
        t["d_out"] = np.where(np.arange(4) == 0, odd, 0).astype(t["d_out"].dtype)
        t["q"] = _sparse(rng, t["q"].shape, 1, 1).astype(t["q"].dtype)
        if recipe.T > 4:
            return None
        case.params = {"outputs": ["d_v"]}
    else:
        sign = rng.choice([-1.0, 1.0], t["v"].shape)
        t["v"] = sign.astype(t["v"].dtype)
        G = recipe.G
        size = rng.standard_normal(t["d_out"].shape[:-1])
        x = np.repeat(sign, G, 2)
        d = np.stack([size * x[..., 0], -size * x[..., 1], np.zeros_like(size), np.zeros_like(size)], -1)
        t["d_out"] = d.astype(t["d_out"].dtype)
        if "swa_weight" in t:
            t["swa_weight"] = np.ones_like(t["swa_weight"])
            t["rla_weight"] = np.zeros_like(t["rla_weight"])
            case.attrs["eps"] = 3.0
        case.params = {"outputs": ["d_v"]}
    t.update(silence(t, recipe.window, poison=False))
    case.clauses = ("GRAD-3",)
    return case


@register(
    "shared heads", "gradients of a group are summed before the one rounding", ("GRAD-3",), _draw_heads, _make_heads
)
def check_heads(ctx: Context, case: Case) -> list[Violation]:
    """d_v of a group, to half a unit in the last place."""
    got = ctx.run(case.op, case.tensors, case.attrs)
    bounds = ctx.tight(case.op, case.tensors, case.attrs)
    bounds = {name: bounds[name] for name in case.params["outputs"]}
    found = ctx.judge(case, got, bounds, case.clauses, record=False)
    for v in found:
        v.clauses, v.guess = ("GRAD-3", "NUM-1"), "precision: a sum over the group rounded on the way"
    return found


# ---------------------------------------------------------------------------------------------- sums and norms

SUM_COUNTS = {"small": (2, 10, 0.2), "medium": (1, 4, 0.0)}


def _draw_sums(plan: Plan) -> Iterator[Recipe]:
    for op in ("sliding_window_attention", "rattention", "rattention_extend"):
        fixed = {"feature_map": "identity", "scale": 0.0, "weights": "float32"}
        for i, recipe in enumerate(_sizes(plan, op, "sums", SUM_COUNTS, **fixed)):
            # Powers of two in the window: every softmax weight of a full window is exact.
            window = (1, 3, 1, 0, 7, 15)[i % 6] if op != "rattention" else (1, -1, 3, -1, 1, 0)[i % 6]
            yield _keep(recipe, "rope", "segments", "defaults").with_(window=window, extra=("sums",), fill="beyond")


def _make_sums(plan: Plan, recipe: Recipe) -> Case | None:
    """Flat scores (scale 0), windows of a power of two: the softmax branch is a mean that needs more bits than storage.

    At window -1 the linear branch alone: a sum of integers past what storage holds, each operand within it.
    """
    window = recipe.window
    if window is None or window not in (-1, 0, 1, 3, 7, 15) or recipe.scale != 0.0 or recipe.feature_map != "identity":
        return None
    if recipe.base_op == "rattention_extend" and window == -1:
        return None
    case = build(recipe, plan.token_tiles())
    t = case.tensors
    limit = {"bfloat16": 256, "float16": 2048, "float32": 2**12}[recipe.dtype]
    rng = recipe.rng("sums")
    for name in ("v", "cache_v"):
        if name in t:
            t[name] = rng.integers(limit // 2, limit, t[name].shape).astype(t[name].dtype)
    if window == -1:
        T = max(recipe.T, 1)
        t["k"] = _sparse(rng, t["k"].shape, 1, 1).astype(t["k"].dtype)
        t["k"] = np.abs(t["k"].astype(np.float64)).astype(t["k"].dtype)
        t["q"] = np.ones_like(t["q"])
        top = max(1, limit // (2 * T))
        t["v"] = rng.integers(max(1, top // 2), top + 1, t["v"].shape).astype(t["v"].dtype)
    if "rla_weight" in t and window >= 0:
        t["rla_weight"] = np.zeros_like(t["rla_weight"])
        t["swa_weight"] = np.ones_like(t["swa_weight"])
        t["q"] = np.zeros_like(t["q"])
        for name in ("cache_state",):
            if name in t:
                t[name] = np.zeros_like(t[name])
    t.update(silence(t, window, poison=False))
    alone = case.base_op == "sliding_window_attention"
    # A window of one token sums nothing, and branches that are float32 anyway are not rounded to storage.
    case.clauses = ("NUM-3",) if window else ()
    case.clauses += ("SWA-3",) if alone and window >= 0 else ()
    case.clauses += ("RAT-3",) if not alone and window and recipe.dtype != "float32" else ()
    return case if case.clauses else None


@register(
    "exact sums",
    "means and sums that need more bits than storage enter the norms, and leave, rounded once",
    ("NUM-3", "SWA-3", "RAT-3"),
    _draw_sums,
    _make_sums,
)
def check_sums(ctx: Context, case: Case) -> list[Violation]:
    """`out` where every softmax weight is a power of two, to half a unit in the last place."""
    got = ctx.run(case.op, case.tensors, case.attrs)
    bounds = {"out": ctx.tight(case.op, case.tensors, case.attrs)["out"]}
    found = ctx.judge(case, got, bounds, case.clauses, live={"out": _full(case)}, record=False)
    for v in found:
        v.guess = "precision: rounded before the last step"
    return found


def _full(case: Case) -> np.ndarray:
    """`[B, T, 1, 1]`: rows whose window holds a power of two of tokens."""
    from rattention.conformance.masks import reads

    if case.attrs["window"] < 0:
        return np.ones((1, 1, 1, 1), bool)
    count = reads(case.tensors, case.attrs["window"]).softmax.sum(-1)
    return ((count & (count - 1)) == 0)[:, :, None, None]
