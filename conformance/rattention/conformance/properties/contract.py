"""The contract between backend and runner: refusals of bad input, odd calls that are legal, empty sizes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from rattention.conformance.badcalls import bad_call, bad_names, base_call, everything
from rattention.conformance.case import Case
from rattention.conformance.context import Context, Moot, PortFailure
from rattention.conformance.description import names
from rattention.conformance.features import exercised
from rattention.conformance.judge import Violation
from rattention.conformance.properties.base import register
from rattention.conformance.strategies import Plan, Recipe, build
from rattention.conformance.strategies.plan import DTYPES, supported
from rattention.conformance.strategies.pools import OPTIONS
from rattention.conformance.told import by_user, told, trace
from rattention.spec import SpecError, Unsupported, load

ERRORS = tuple(label for label in load().judged if label.startswith("ERR") and label not in ("ERR-12", "ERR-13"))

# ---------------------------------------------------------------------------------------------- refusals


def _draw_bad(plan: Plan) -> Iterator[Recipe]:
    for n, op in enumerate(supported(plan)):
        for i, dtype in enumerate(plan.dtypes if plan.profile != "smoke" else plan.dtypes[:1]):
            if dtype == "float32" or i == 1 + (n + plan.seed) % 2 or plan.cost == "direct":
                seed = int(plan.rng("bad", op, dtype).integers(0, 2**31))
                options = tuple(o for o in everything(op) if plan.allows(o))
                for entry, target in bad_names(op):
                    yield Recipe(op, dtype, seed=seed, options=options, extra=(entry, target))


def _make_bad(plan: Plan, recipe: Recipe) -> Case | None:
    entry, target = recipe.extra
    bad = bad_call(recipe.op, recipe.dtype, recipe.seed, entry, target, recipe.options)
    if bad is None:
        return None
    clauses = tuple(dict.fromkeys((bad.clause, bad.raised_clause, "BCK-5")))
    params = {
        "text": bad.text,
        "entry": entry,
        "target": target,
        "dtype": recipe.dtype,
        "options": list(recipe.options),
    }
    return Case(recipe.op, bad.tensors, bad.attrs, f"bad input {entry} ({target})", recipe.seed, clauses, params=params)


@register("bad input", "every bad call is refused in the words of the shared validation", (*ERRORS, "BCK-5"), _draw_bad,
          _make_bad, shrinks=False)  # fmt: skip
def check_bad(ctx: Context, case: Case) -> list[Violation]:
    """One SpecError, its text that of the shared validation; inputs as they were."""
    want, entry = case.params["text"], case.params["entry"]
    before = {n: x.copy() for n, x in case.tensors.items()}
    clauses = case.clauses
    ctx.calls += 1
    if case.op not in names(ctx.describe, "operations"):
        raise Moot(f"{case.op} is not declared")
    try:
        ctx.call(case.op, case.tensors, case.attrs)
    except SpecError as error:
        if told(error) == want:
            return _untouched(case, before)
        message = f"{entry}: refused with other words: {told(error)!r}, expected {want!r}"
        return [Violation(("BCK-5", *clauses), message, "refusal")]
    except PortFailure as failure:
        return [Violation((failure.clause, *clauses), f"{entry}: {failure}", failure.kind)]
    except Unsupported as refusal:
        options = case.params.get("options")  # files of earlier versions do not say
        base = [base_call(case.op, dtype, case.seed or 0, options) for dtype in _storages(case)]
        if any(ctx.entitled(case.op, *call) for call in base):
            raise Moot("both invalid and beyond the backend: no one right answer") from None
        message = f"{entry}: Unsupported({told(refusal)}) for an invalid call, expected {want!r}"
        return [Violation(clauses, message, "refusal")]
    except BaseException as error:
        if by_user(error):
            raise
        message = f"{entry}: {type(error).__name__}: {told(error)[:200]}; expected SpecError: {want}"
        return [Violation(clauses, message, "crash", trace=trace(error))]
    return [Violation(clauses, f"{entry}: accepted; expected SpecError: {want}", "refusal")]


def _storages(case: Case) -> list[str]:
    """Storage dtypes of a bad call: of the valid call that was spoilt, and any other that is one. int32 is none."""
    classed = (t.name for t in load().operations[case.op].tensors if t.dtype == "storage")
    found = [str(case.tensors[name].dtype) for name in classed if name in case.tensors]
    drawn = case.params.get("dtype")  # files of earlier versions do not say
    return list(dict.fromkeys(d for d in (drawn, *found) if d in DTYPES)) or ["float32"]


def _untouched(case: Case, before: Mapping[str, np.ndarray]) -> list[Violation]:
    changed = [n for n, x in before.items() if case.tensors[n].tobytes() != x.tobytes()]
    return [Violation(("ERR-13",), f"a refused call changed its input {n}", "mutation", n) for n in changed]


# ---------------------------------------------------------------------------------------------- empty sizes


def _draw_empty(plan: Plan) -> Iterator[Recipe]:
    for n, op in enumerate(supported(plan)):
        for i, (B, T) in enumerate(((2, 0), (0, 3), (0, 0))):
            dtype = plan.dtypes[(n + i) % len(plan.dtypes)]
            # Each is a program of its own where programs are compiled.
            if i > {"direct": 2, "compiled": 1, "interpreted": 0}[plan.cost] or (i and plan.profile == "smoke"):
                continue
            for k, options in enumerate(_option_sets(plan, op)):
                if k and plan.cost != "direct":
                    continue
                window = (2, None, -1, 0)[(n + i + k) % 4]
                yield Recipe(op, dtype, B=B, T=T, Hkv=2, G=2, window=window, options=options, seed=i, layout="one")


def _option_sets(plan: Plan, op: str) -> list[tuple[str, ...]]:
    base = op.removesuffix(".vjp")
    options = tuple(o for o in OPTIONS.get(base, ()) if o != "scale" and plan.allows(o))
    if op.endswith(".vjp"):
        options += ("d_final_state", "d_cache_state") if options else ()
    return [(), options] if options else [()]


def _make_empty(plan: Plan, recipe: Recipe) -> Case:
    case = build(recipe)
    case.clauses = ("ERR-12",)
    return case


@register("empty sizes", "T = 0 and B = 0 work", ("ERR-12",), _draw_empty, _make_empty)
def check_empty(ctx: Context, case: Case) -> list[Violation]:
    """Shapes, dtypes, and the states that pass through unchanged."""
    ctx_violations = len(ctx.violations)
    try:
        got = ctx.run(case.op, case.tensors, case.attrs)
    finally:
        for v in ctx.violations[ctx_violations:]:
            v.clauses = ("ERR-12", *v.clauses)
    return ctx.judge(case, got, ctx.bounds(case.op, case.tensors, case.attrs), ("ERR-12",), record=False)


# ---------------------------------------------------------------------------------------------- odd but legal

ODD = ("numpy attributes", "defaults left out", "spare rows", "wide window", "late row", "garbage positions", "None")


def _draw_odd(plan: Plan) -> Iterator[Recipe]:
    kinds = ODD if plan.profile != "smoke" else ODD[:2]
    for n, op in enumerate(
        ("sliding_window_attention", "residual_linear_attention", "rattention", "rattention_extend")
    ):
        for k, kind in enumerate(kinds):
            for o in (op, f"{op}.vjp") if plan.cost == "direct" else (op,):
                if plan.has(o):
                    dtype = plan.dtypes[(n + k + plan.seed) % len(plan.dtypes)]
                    seed = int(plan.rng("odd", o, kind).integers(0, 2**31))
                    options = tuple(x for x in OPTIONS[op] if x != "scale" and plan.allows(x))
                    if plan.cost != "direct" and (n + k) % 4:
                        continue
                    yield Recipe(o, dtype, B=2, T=5, Hkv=1, G=2, window=2, options=options, seed=seed, extra=(kind,))


def _make_odd(plan: Plan, recipe: Recipe) -> Case | None:
    kind = recipe.extra[0] if recipe.extra else ""
    if recipe.has("rope") and recipe.D % 2:
        return None
    if kind == "late row" and recipe.base_op != "rattention_extend":
        return None
    if kind == "late row":
        recipe = recipe.without("rope")
    if kind == "wide window":
        if recipe.base_op == "rattention_extend":
            return None
        recipe = recipe.with_(window=10**6)
    case = build(recipe)
    t = case.tensors
    if kind == "defaults left out":
        if recipe.feature_map != "softmax":
            return None  # the shapes of the states follow from the map, which shrinking may have changed
        case.attrs = {"window": case.attrs["window"]}
    elif kind == "spare rows" and "rope_cos" in t:
        for name in ("rope_cos", "rope_sin"):
            spare = np.full((5, t[name].shape[1]), 3e4, t[name].dtype)
            t[name] = np.concatenate([t[name], spare])
    elif kind == "late row":
        t["cache_length"] = np.array([2**31 - 1 - recipe.T] * recipe.B, np.int32)
    elif kind == "garbage positions" and "positions" in t and "segment_ids" in t:
        padding = t["segment_ids"] == 0
        t["positions"] = np.where(padding, np.int32(2**31 - 1), t["positions"]).astype(np.int32)
    case.params = {"kind": kind}
    case.clauses = exercised(case.op, t, case.attrs)
    return case


@register("odd calls", "unusual calls that are legal", tuple(load().clauses)[:40], _draw_odd, _make_odd)
def check_odd(ctx: Context, case: Case) -> list[Violation]:
    """NumPy scalars as attributes, absent defaults, windows and positions far out, None for an absent tensor."""
    tensors: dict[str, Any] = dict(case.tensors)
    attrs = dict(case.attrs)
    if case.params["kind"] not in ODD:
        raise ValueError(f"kind {case.params['kind']!r}, expected one of {', '.join(ODD)}")
    if case.params["kind"] == "numpy attributes":
        types: dict[type, Any] = {int: np.int64, float: np.float64}
        attrs = {name: types.get(type(x), lambda y: y)(x) for name, x in attrs.items()}
    bounds = ctx.bounds(case.op, tensors, case.attrs)
    if case.params["kind"] == "None":
        given = dict(tensors)
        for t in load().operations[case.op].tensors:
            if t.optional and t.name not in tensors:
                given[t.name] = None
        got = ctx.run_raw(case.op, given, attrs)
    else:
        got = ctx.run(case.op, tensors, attrs)
    return ctx.judge(case, got, bounds, ("NUM-1",), record=False)
