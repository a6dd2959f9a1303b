"""Numerics beside the budget: bit-equal reruns, layouts in memory, NaN that must surface, extremes that must not."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from rattention.conformance.case import Case
from rattention.conformance.context import Context, Moot
from rattention.conformance.features import among
from rattention.conformance.judge import Violation, all_zero, same_bits
from rattention.conformance.masks import reads
from rattention.conformance.properties.base import default_make, register
from rattention.conformance.properties.symmetry import BRANCHES, OPS, check_rows
from rattention.conformance.strategies import Plan, Recipe, build
from rattention.conformance.strategies.plan import supported
from rattention.conformance.strategies.pools import recipes

# ---------------------------------------------------------------------------------------------- reruns and strides


def _draw_twice(plan: Plan) -> Iterator[Recipe]:
    for op in supported(plan):
        yield from recipes(plan, op, "small", plan.count(1, 4, compiled=0.5), "twice", lambda r: True)
        if op.removesuffix(".vjp") in OPS:
            yield from recipes(plan, op, "tile", plan.count(1, 2, compiled=0.5), "twice", lambda r: True)


@register("reruns", "the same call gives the same bits", ("NUM-4",), _draw_twice)
def check_twice(ctx: Context, case: Case) -> list[Violation]:
    """The call, another one in between, and the call again."""
    first = ctx.run(case.op, case.tensors, case.attrs)
    other = {n: np.flip(x, 0).copy() if x.dtype.kind != "i" else x for n, x in case.tensors.items()}
    ctx.run(case.op, other, case.attrs)
    again = ctx.run(case.op, case.tensors, case.attrs)
    third = ctx.run(case.op, case.tensors, case.attrs)
    found = [same_bits(n, again[n], first[n], ("NUM-4",), "a rerun differs") for n in first]
    found += [same_bits(n, third[n], first[n], ("NUM-4",), "a rerun differs") for n in first]
    return [v for v in found if v]


def _draw_strides(plan: Plan) -> Iterator[Recipe]:
    for op in supported(plan):
        yield from recipes(plan, op, "small", plan.count(1, 12, compiled=0.25), "strides", lambda r: True)


LAYOUTS = ("swapped", "reversed", "ones reversed", "sliced", "read-only", "fortran", "offset", "broadcast")


def relaid(x: np.ndarray, layout: str) -> np.ndarray:
    """The same values in another memory layout."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r}, expected one of {', '.join(LAYOUTS)}")
    if layout == "swapped" and x.ndim >= 2:
        return np.ascontiguousarray(x.swapaxes(-2, -1)).swapaxes(-2, -1) if x.ndim < 4 else _heads_first(x)
    if layout == "reversed" and x.ndim:
        return np.ascontiguousarray(np.flip(x, -1))[..., ::-1]
    if layout == "ones reversed" and 1 in x.shape:
        # An axis of one element has any stride, a negative one too, and some libraries refuse it.
        return x.copy()[tuple(slice(None, None, -1) if n == 1 else slice(None) for n in x.shape)]
    if layout == "sliced" and x.ndim:
        wide = np.zeros((*x.shape[:-1], 2 * x.shape[-1]), x.dtype)
        wide[..., ::2] = x
        return wide[..., ::2]
    if layout == "read-only":
        copy = x.copy()
        copy.flags.writeable = False
        return copy
    if layout == "fortran":
        return np.asfortranarray(x)
    if layout == "offset":
        flat = np.zeros(x.size + 3, x.dtype)
        flat[3:] = x.reshape(-1)
        return flat[3:].reshape(x.shape)
    return x


def _heads_first(x: np.ndarray) -> np.ndarray:
    """Stored as [B, H, T, D], as most frameworks keep attention tensors."""
    return np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2)


def _make_strides(plan: Plan, recipe: Recipe) -> Case:
    case = default_make(plan, recipe)
    rng = recipe.rng("layout")
    # One layout for all of them, or one for each.
    same = str(rng.choice(LAYOUTS)) if rng.integers(0, 2) else ""
    layouts = {name: same or str(rng.choice(LAYOUTS)) for name in case.tensors}
    for name in ("d_out", "v", "x", "swa"):
        # A cotangent of ones with stride 0 is what the gradient of a sum is.
        if layouts.get(name) == "broadcast":
            x = case.tensors[name]
            case.tensors[name] = np.broadcast_to(x[:1, :1, :1, :1], x.shape).copy() if x.size else x
    case.params = {"layouts": layouts}
    return case


@register("strides", "strided, broadcast and read-only inputs change nothing", ("NUM-7",), _draw_strides, _make_strides)
def check_strides(ctx: Context, case: Case) -> list[Violation]:
    """Views against contiguous copies of the same values."""
    plain = ctx.run(case.op, case.tensors, case.attrs)
    views = {}
    for name, x in case.tensors.items():
        layout = case.params["layouts"][name]
        constant = layout == "broadcast" and x.size and x.ndim == 4 and (x == x[:1, :1, :1, :1]).all()
        views[name] = np.broadcast_to(x[:1, :1, :1, :1], x.shape) if constant else relaid(x, layout)
    got = ctx.run(case.op, views, case.attrs)
    found = [same_bits(n, got[n], plain[n], ("NUM-7",), "a view differs from its copy") for n in plain]
    return [v for v in found if v]


# ---------------------------------------------------------------------------------------------- NaN that must surface


def _draw_nan(plan: Plan) -> Iterator[Recipe]:
    ops = [op for base in (*OPS, "feature_map", "rms_mix") for op in (base, f"{base}.vjp")]
    for op in ops:
        if plan.has(op):
            number = plan.count(2, 36 if op.startswith("rattention_extend") else 20, compiled=0.2)
            for i, recipe in enumerate(recipes(plan, op, "small", number, "nan", lambda r: True)):
                fill = ("full", "beyond", "mixed")[i // 6 % 3]
                yield recipe.without("poison").with_(extra=(i,), fill=fill)


def _make_nan(plan: Plan, recipe: Recipe) -> Case | None:
    if recipe.T < 1 or recipe.B < 1:
        return None
    case = build(recipe.without("poison"), plan.token_tiles())
    names = [n for n in ("x", "q", "k", "v", "swa", "rla", "d_out", "cache_k", "cache_v") if n in case.tensors]
    turn = int(recipe.extra[0]) if recipe.extra else 0
    name = names[turn % len(names)]
    x = case.tensors[name].copy()
    live = _live(case, name)
    if not live.any():
        return None
    rng = recipe.rng("nan")
    b, t = np.argwhere(live)[rng.integers(0, int(live.sum()))]
    h, d = rng.integers(0, x.shape[2]), rng.integers(0, x.shape[3])
    value = float(rng.choice([np.nan, np.nan, np.inf, -np.inf]))
    x[b, t, h, d] = value
    case.tensors[name] = x
    case.params = {"tensor": name, "at": [int(b), int(t), int(h), int(d)], "value": value}
    case.clauses = ("NUM-5",)
    return case


def _live(case: Case, name: str) -> np.ndarray:
    """`[B, T]` or `[B, W]`: the elements of `name` that take part in the call."""
    from rattention.conformance.strategies.build import inert_tokens, unused_slots

    slots = unused_slots(case.tensors)
    if name.startswith("cache_") and slots is not None:
        return ~slots
    inert = inert_tokens(case.tensors)
    return np.ones(case.tensors[name].shape[:2], bool) if inert is None else ~inert


@register("NaN surfaces", "an output that the formulas make NaN is NaN", ("NUM-5",), _draw_nan, _make_nan)
def check_nan(ctx: Context, case: Case) -> list[Violation]:
    """One NaN in a live token: wherever the reference gives NaN, and wherever the sets say that it is read."""
    got = ctx.run(case.op, case.tensors, case.attrs)
    bounds = ctx.bounds(case.op, case.tensors, case.attrs)
    found, asked = [], False
    for name, (value, limit) in bounds.items():
        if name not in got or value.dtype.kind == "i":
            continue
        # With an infinite input the order of operations decides between inf and NaN, and the budget says nothing.
        must = np.isnan(value) & ~np.isinf(limit)
        if case.base_op in OPS:
            must &= _concerned(case, name, value.shape)
        if name == "out":
            must |= _reached(case, value.shape)
        asked |= bool(must.any())
        hidden = must & ~np.isnan(got[name].astype(np.float64))
        if hidden.any():
            at = tuple(int(i) for i in np.argwhere(hidden)[0])
            place, count = case.params, int(hidden.sum())
            message = (
                f"{name}: {place['value']} in {place['tensor']} at {place['at']} is hidden: the formulas make "
                f"{count} elements NaN that are numbers, first at {list(at)}: {float(got[name][at]):.6g}"
            )
            found.append(Violation(("NUM-5",), message, "hidden nan", name, at, guess="NaN hidden"))
    if not asked and not ctx.violations:
        raise Moot("no element of an output must be NaN")
    return found


def _reached(case: Case, shape: tuple[int, ...]) -> np.ndarray:
    """Outputs that read the NaN for certain: k or v of a token that the query reads, in a branch that counts."""
    must = np.zeros(shape, bool)
    name, (b, t, h, d) = case.params["tensor"], case.params["at"]
    if name not in ("k", "v", "cache_k", "cache_v") or case.base_op not in OPS or np.isinf(case.params["value"]):
        return must
    who = reads(case.tensors, case.attrs["window"])
    W = case.tensors["cache_k"].shape[1] if "cache_k" in case.tensors else 0
    token = t if name.startswith("cache_") else W + t
    G = case.tensors["q"].shape[2] // case.tensors["k"].shape[2]
    heads = slice(h * G, (h + 1) * G)
    both = case.base_op.startswith("rattention")
    rows = np.zeros(shape[1], bool)
    if case.base_op != BRANCHES[1]:
        rows |= who.softmax[b, :, token]
    if case.base_op != BRANCHES[0]:
        rows |= who.linear[b, :, token]
    where = np.flatnonzero(rows)
    if name.endswith("v") and not both:
        must[b, where, heads, d] = True
    else:
        must[b, where, heads] = True
    return must


def _concerned(case: Case, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Where the NaN of an output can be demanded: the NaN is tied to the element by sets of tokens that are not empty.

    A query with nothing to read is 0 whatever it holds (SWA-5, RLA-7), and so is the gradient of a token that nobody
    reads: implementations that select give 0 there, those that multiply give NaN, and both are right. A state holds
    whatever was folded into it; gradients are demanded of the queries and tokens that met the NaN.
    """
    some = np.zeros(shape, bool)
    tensor, (b, t, _, _) = case.params["tensor"], case.params["at"]
    who = reads(case.tensors, case.attrs["window"])
    # The sets of the branches that the operation has.
    either = np.zeros_like(who.softmax)
    if case.base_op != BRANCHES[1]:
        either |= who.softmax
    if case.base_op != BRANCHES[0]:
        either |= who.linear
    W = case.tensors["cache_k"].shape[1] if "cache_k" in case.tensors else 0
    token = t if tensor.startswith("cache_") else W + t
    reading = either[b].any(-1) | (who.live[b] & _reads_state(case))
    if not case.is_vjp:
        if name == "out":
            some[b, reading] = True
        else:
            some[b] = tensor not in ("q", "d_out") and (name in ("cache_k", "cache_v") or bool(who.folded[b, token]))
        return some
    if tensor in ("q", "d_out"):
        tokens, queries = either[b, t], np.arange(either.shape[1]) == t
    else:
        queries = either[b, :, token]
        tokens = (np.arange(either.shape[2]) == token) & queries.any()
    if name == "d_q":
        some[b, queries & reading] = True
    elif name in ("d_k", "d_v"):
        some[b, tokens[W:]] = True
    elif name in ("d_cache_k", "d_cache_v"):
        some[b, tokens[:W]] = True
    return some


def _reads_state(case: Case) -> bool:
    """Whether every live query reads a state, so that it has something to read whatever its window holds."""
    t = case.tensors
    if case.base_op == BRANCHES[0]:
        return False
    return "memory" in t or "cache_state" in t or ("initial_state" in t and "segment_ids" not in t)


# ---------------------------------------------------------------------------------------------- extremes


def _calm(r: Recipe) -> bool:
    return r.feature_map == "softmax"


def _draw_extreme(plan: Plan) -> Iterator[Recipe]:
    for op in ("feature_map", *(o for base in OPS for o in (base, f"{base}.vjp"))):
        if plan.has(op):
            number = plan.count(2, 6, compiled=0.34)
            for i, recipe in enumerate(recipes(plan, op, "small", number, "extreme", _calm, feature_map="softmax")):
                yield recipe.with_(extra=(i,))
    yield from _draw_uneven(plan)


def _draw_uneven(plan: Plan) -> Iterator[Recipe]:
    """Gradients of a softmax whose scores round otherwise in every order of summation, each row with one clear winner.

    An implementation that makes weights again, in the order of another kernel, then has weights far above 1, or none.
    """
    dtype = "float32" if "float32" in plan.dtypes else plan.dtypes[0]
    for op in ("sliding_window_attention.vjp", "rattention.vjp", "rattention_extend.vjp"):
        if plan.has(op):
            for i in range(plan.count(1, 2, compiled=0.5)):
                seed = int(plan.rng("uneven", op, i).integers(0, 2**31))
                sizes = {"T": 17, "Hkv": 1, "G": 2, "D": 24, "Dv": 8, "window": (None, 5)[i % 2], "slots": 4}
                yield Recipe(op, dtype, options=(), fill="beyond", seed=seed, extra=("uneven",), **sizes)


def _make_extreme(plan: Plan, recipe: Recipe) -> Case | None:
    if recipe.feature_map != "softmax":
        return None
    case = build(recipe.without("poison"), plan.token_tiles())
    rng = recipe.rng("extreme")
    top = {"float16": 6e4, "bfloat16": 1e15, "float32": 1e15}[recipe.dtype]
    for name in ("q_scale", "k_scale"):
        if name in case.tensors:
            case.tensors[name] = np.ones_like(case.tensors[name])
    if case.attrs.get("scale") is not None:
        case.attrs["scale"] = 1.0
    for name in ("q", "k", "cache_k", "x"):
        if name in case.tensors:
            x = case.tensors[name]
            size = top if name != "x" else {"float16": 6.5e4}.get(recipe.dtype, 3e38)
            if "uneven" in recipe.extra:
                value = rng.choice([-1.0, 1.0], x.shape) * rng.uniform(0.5, 1.0, x.shape) * size
            else:
                value = rng.choice([-1.0, 1.0, 0.5, 0.0], x.shape) * size
            case.tensors[name] = value.astype(x.dtype)
    case.clauses = among(case.op, case.tensors, case.attrs, ("SWA-3", "FM-5"))
    return case if case.clauses else None


@register("extremes", "finite inputs of any size give finite outputs", ("SWA-3", "FM-5"), _draw_extreme, _make_extreme)
def check_extreme(ctx: Context, case: Case) -> list[Violation]:
    """Scores and rows near the end of the range: no NaN, and no infinity where the answer has none."""
    from rattention.conformance.strategies.build import silence

    tensors = silence(case.tensors, case.attrs["window"], poison=False) if "window" in case.attrs else case.tensors
    got = ctx.run(case.op, tensors, case.attrs)
    bounds = ctx.bounds(case.op, tensors, case.attrs)
    found = []
    for name, (value, limit) in bounds.items():
        if name not in got:
            continue
        x = got[name].astype(np.float64)
        calm = np.isfinite(value) & (limit < np.inf)
        bad = calm & ~np.isfinite(x)
        if bad.any():
            at = tuple(int(i) for i in np.argwhere(bad)[0])
            message = f"{name}: {x[at]} at {list(at)} for finite inputs; {int(bad.sum())} of {bad.size} elements"
            found.append(Violation(case.clauses, message, "nan", name, at, guess="a maximum not subtracted"))
    return found or ctx.judge(case, got, bounds, case.clauses, record=False)


# ---------------------------------------------------------------------------------------------- rows of zeros


def _bare(r: Recipe) -> bool:
    return not (r.has("initial_state") or r.has("memory"))


def _draw_zero(plan: Plan) -> Iterator[Recipe]:
    for op in ("rms_mix", "rms_mix.vjp", *(o for base in OPS for o in (base, f"{base}.vjp"))):
        if plan.has(op):
            number = plan.count(1, 5, compiled=0.2)
            for i, recipe in enumerate(recipes(plan, op, "small", number, "zero", _bare)):
                window = (-1, None, 0, 2, 1)[i % 5]
                own = recipe.without("initial_state", "memory").with_(window=window)
                yield own if plan.cost == "direct" else recipe


def _make_zero(plan: Plan, recipe: Recipe) -> Case | None:
    if not _bare(recipe):
        return None
    case = build(recipe, plan.token_tiles())
    t = case.tensors
    rng = recipe.rng("zero")
    for name in ("swa", "rla", "v"):
        if name in t and rng.integers(0, 2):
            rows = rng.integers(0, 2, t[name].shape[:3])[..., None]
            t[name] = np.where(rows, t[name], np.zeros((), t[name].dtype)).astype(t[name].dtype)
    for name in ("cache_state",):
        if name in t:
            t[name] = np.zeros_like(t[name])
    case.clauses = among(case.op, t, case.attrs, ("SWA-5", "RLA-7"))
    case.clauses += ("MIX-3",) if _normalises_zeros(case) else ()
    return case if case.clauses else None


def _normalises_zeros(case: Case) -> bool:
    """Whether a norm meets a row of zeros: one that was drawn, or a branch with nothing to read."""
    t = case.tensors
    if case.base_op == "rms_mix":
        return any(bool((~t[name].any(-1)).any()) for name in ("swa", "rla"))
    if case.base_op in BRANCHES:
        return False
    who = reads(t, case.attrs["window"])
    return any(bool((who.live & ~branch.any(-1)).any()) for branch in (who.softmax, who.linear))


@register(
    "nothing to read",
    "empty branches are exactly 0, and rows of zeros have finite gradients",
    ("SWA-5", "RLA-7", "MIX-3"),
    _draw_zero,
    _make_zero,
)
def check_zero(ctx: Context, case: Case) -> list[Violation]:
    """Exact zeros in the branches, and agreement in everything else."""
    got = ctx.run(case.op, case.tensors, case.attrs)
    found: list[Violation | None] = []
    if case.base_op in BRANCHES and not case.is_vjp:
        who = reads(case.tensors, case.attrs["window"])
        linear = case.base_op == BRANCHES[1]
        nothing = np.logical_not(np.any(who.linear if linear else who.softmax, -1))
        found.append(all_zero("out", got["out"], nothing, case.clauses, "a token with nothing to read"))
    bounds = ctx.bounds(case.op, case.tensors, case.attrs)
    clauses = ("MIX-3",) if case.base_op not in BRANCHES else case.clauses
    judged = ctx.judge(case, got, bounds, clauses, record=False)
    if case.is_vjp:
        for v in judged:
            v.clauses = ("MIX-3", "GRAD-1") if v.kind == "nan" else ("GRAD-1", *case.clauses)
    return [v for v in [*found, *judged] if v]


__all__ = ["check_extreme", "check_nan", "check_rows", "check_strides", "check_twice", "check_zero", "relaid"]
