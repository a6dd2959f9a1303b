"""Long decoding: token after token through the cache, the error of the state must not grow past the budget."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from rattention.conformance.case import Case
from rattention.conformance.context import Context
from rattention.conformance.judge import Violation
from rattention.conformance.oracle import half_ulp
from rattention.conformance.properties.base import register
from rattention.conformance.strategies import Plan, Recipe, build

STEPS = {"smoke": 40, "quick": 270, "full": 32768}
INTERPRETED = {"smoke": 4, "quick": 24, "full": 200}
LONG = 100
"""Tokens folded into a state from which on 16 bits do not hold it."""
CACHE = ("cache_k", "cache_v", "cache_state", "cache_length")


def _draw(plan: Plan) -> Iterator[Recipe]:
    if not plan.has("rattention_extend"):
        return
    steps = (INTERPRETED if plan.cost == "interpreted" else STEPS)[plan.profile]
    for i, dtype in enumerate(plan.dtypes if plan.profile != "smoke" else plan.dtypes[-1:]):
        rng = plan.rng("drift", dtype)
        window = (3, 0, 7)[i % 3] if plan.cost != "direct" else int(rng.choice([0, 1, 3, 7]))
        for kind in ("integers", "values") if plan.profile != "smoke" else ("values",):
            # One decode of full length tells of all: the integers of one dtype, another with every seed.
            longest = kind == "integers" and i == plan.seed % len(plan.dtypes)
            shorter = {"smoke": steps, "quick": 130, "full": 2048}[plan.profile]
            yield Recipe(
                "rattention_extend",
                dtype,
                B=1,
                T=steps if longest or (kind == "integers" and plan.profile != "full") else min(steps, shorter),
                Hkv=1,
                G=2,
                D=4,
                Dv=4,
                window=window,
                feature_map="identity" if kind == "integers" else "softmax",
                fill="empty",
                seed=int(rng.integers(0, 2**31)),
                extra=(kind,),
            )


def _make(plan: Plan, recipe: Recipe) -> Case | None:
    """q, k, v of all steps in one case; v with a mean of 0.5, where a 16-bit state drifts most."""
    if not recipe.extra or recipe.window is None or recipe.B < 1:
        return None
    kind = recipe.extra[0]
    if recipe.feature_map != ("identity" if kind == "integers" else "softmax"):
        return None  # the answer below is that of one map; shrinking may have changed it
    case = build(recipe.with_(options=(), fill="empty", family="offset"))
    t = case.tensors
    rng = recipe.rng("drift")
    if kind == "integers":
        t["k"] = (np.arange(recipe.D) == rng.integers(0, recipe.D, t["k"].shape[:3])[..., None]).astype(t["k"].dtype)
        t["v"] = rng.integers(1, 4, t["v"].shape).astype(t["v"].dtype)
    else:
        t["v"] = (0.5 + 0.25 * rng.standard_normal(t["v"].shape)).astype(t["v"].dtype)
    t["cache_length"] = np.zeros_like(t["cache_length"])
    t["cache_state"] = np.zeros_like(t["cache_state"])
    case.params = {"kind": kind}
    folded = recipe.T - max(recipe.window, 0)
    case.clauses = ("EXT-1", "EXT-6") if recipe.T > 1 else ("EXT-6",)
    case.clauses += ("EXT-5",) if folded > 0 else ()
    case.clauses += ("NUM-3",) if folded >= LONG else ()  # fewer terms fit into 16 bits
    return case


@register(
    "drift", "the state of a long decode stays exact to float32", ("NUM-3", "EXT-1", "EXT-5", "EXT-6"), _draw, _make
)
def check(ctx: Context, case: Case) -> list[Violation]:
    """Decode every token; the state against float64 sums, exactly for integers, to 1e-4 in any case."""
    t, w = case.tensors, max(case.attrs["window"], 0)
    T = t["q"].shape[1]
    cache = {name: t[name] for name in CACHE}
    rest = {n: x for n, x in t.items() if n not in ("q", "k", "v", *CACHE)}
    outs = np.zeros((*t["q"].shape[:3], t["v"].shape[3]), t["v"].dtype)
    for step in range(T):
        piece = {n: t[n][:, step : step + 1] for n in ("q", "k", "v")}
        got = ctx.run("rattention_extend", {**rest, **piece, **cache}, case.attrs)
        cache = {name: got[name] for name in CACHE}
        outs[:, step] = got["out"][:, 0]
    found = []
    if int(cache["cache_length"][0]) != T:
        message = f"cache_length is {cache['cache_length'].tolist()} after {T} tokens"
        found.append(Violation(("EXT-6",), message, "value", "cache_length"))
    state, limit = _state(case, T - w)
    found += ctx.judge(case, {"cache_state": cache["cache_state"]}, {"cache_state": (state, limit)}, ("NUM-3", "EXT-5"))
    for v in found:
        v.guess = v.guess or "state"
    if T <= 400:
        bounds = ctx.bounds("rattention_extend", t, case.attrs)
        found += ctx.judge(case, {"out": outs}, {"out": bounds["out"]}, ("EXT-1", "NUM-3"), record=False)
    return found


def _state(case: Case, folded: int) -> tuple[np.ndarray, np.ndarray]:
    """The state of the first `folded` tokens, summed in float64, and what float32 sums of honest operands may miss."""
    k = case.tensors["k"][:, : max(folded, 0)].astype(np.float64)
    v = case.tensors["v"][:, : max(folded, 0)].astype(np.float64)
    if case.params["kind"] not in ("integers", "values"):
        raise ValueError(f"kind {case.params['kind']!r}, expected integers or values")
    if case.params["kind"] == "integers":
        state = np.einsum("btkf,btkd->bkfd", k, v)
        return state, np.zeros_like(state)
    e = np.exp(k - k.max(-1, keepdims=True)), np.exp(-k - (-k).max(-1, keepdims=True))
    phi = np.concatenate([x / x.sum(-1, keepdims=True) for x in e], -1)
    state = np.einsum("btkf,btkd->bkfd", phi, v)
    size = np.einsum("btkf,btkd->bkfd", phi, np.abs(v))
    # phi may be rounded to storage as an operand, each token's independently. Sums are float32: n roundings of partial
    # sums that grow to `size` deviate by u sqrt(n) / 3 of it, and five deviations count (chapter 10, Sums).
    operand = np.sqrt(np.einsum("btkf,btkd->bkfd", phi**2, v**2)) * 5
    storage = case.tensors["k"].dtype
    unit = half_ulp(np.ones(()), storage) if storage.itemsize == 2 else 2.0**-22
    sums = 2.0**-24 * (16 + 5 * np.sqrt(max(folded, 0)) / 3) * size
    return state, operand * unit + np.minimum(sums, 1e-4 * size)
