"""What describe() says: it is whole, it says what the contract knows, and what it leaves out is refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rattention.conformance.case import Case
from rattention.conformance.context import Context, Refused
from rattention.conformance.description import foreign, limit_fault, names, number, plain
from rattention.conformance.judge import Violation
from rattention.conformance.properties.base import register
from rattention.conformance.strategies import Plan, Recipe, build
from rattention.conformance.strategies.plan import COSTS, DTYPES, inside
from rattention.conformance.strategies.pools import OPTIONS
from rattention.conformance.told import by_user, crash, shown, told
from rattention.spec import load

LARGEST = {"B": 64, "T": 2048, "Hkv": 64, "G": 64, "D": 2048, "Dv": 2048}
"""Sizes up to which a call beyond a declared limit is made."""


def _draw(plan: Plan) -> Iterator[Recipe]:
    yield Recipe("rattention", extra=("describe",))
    for op in load().operations:
        if op not in plan.operations:
            yield Recipe(op, extra=("undeclared",))
            continue
        for dtype in DTYPES:
            if dtype not in plan.dtypes:
                yield Recipe(op, dtype, extra=("undeclared",))
        for option in OPTIONS.get(op.removesuffix(".vjp"), ()):
            if not plan.allows(option):
                # Positions need a table to point into.
                options = ("rope", option) if option == "positions" else (option,)
                yield Recipe(op, plan.dtypes[0], options=options, extra=("undeclared",))
        for recipe in _past_limits(plan, op):
            yield recipe.with_(extra=("undeclared",))


def _past_limits(plan: Plan, op: str) -> Iterator[Recipe]:
    """For each declared limit a call that lies beyond it, and inside every other one where that can be."""
    spec = load().operations[op]
    symbols = {symbol for t in spec.tensors for symbol in t.shape}
    table = "head_dim" in spec.attribute  # which is D, and even
    symbols |= {"D"} if table else set()
    fields = {"B": "B", "T": "T", "Hkv": "Hkv", "Hq": "G", "H": "Hkv", "D": "D", "Dv": "Dv"}
    for name, bound in plan.limits.items():
        if name not in symbols | set(spec.attribute):
            continue
        field = fields.get(name, name)
        for value in _outside(name, bound):
            if field in LARGEST and not (1 if field not in ("B", "T") else 0) <= value <= LARGEST[field]:
                continue
            size = value + value % 2 if table and field == "D" else value
            recipe = Recipe(op, plan.dtypes[0], window=0).with_(**{field: size})
            if not inside(recipe, {name: bound}):
                yield recipe
                break


def _outside(name: str, bound: Any) -> list[Any]:
    """Values that a limit excludes, the nearest first."""
    if name == "feature_map":
        allowed = bound if isinstance(bound, list | tuple) else ()
        return [x for x in ("softmax", "relu", "identity") if allowed and x not in allowed]
    if name not in (*LARGEST, "Hq", "H", "window"):
        return []
    found: list[Any] = []
    if isinstance(bound, Mapping):
        low, high, step = (number(bound.get(key)) for key in ("minimum", "maximum", "multiple_of"))
        found += [int(high) + 1] if high is not None else []
        found += [int(low) - 1] if low is not None else []
        found += [int(step) + 1] if step is not None and step > 1 else []
        found += [None] if name == "window" and bound.get("none") is False else []
    elif isinstance(bound, list | tuple):
        known = [x for x in bound if isinstance(x, int) and not isinstance(x, bool)]
        found += [max(known) + 1] if known else []
        found += [None] if name == "window" and None not in bound else []
    elif number(bound) is not None:
        found.append(int(bound) + 1)
    return [x for x in found if x is None or x >= (-1 if name == "window" else 0)]


def _make(plan: Plan, recipe: Recipe) -> Case:
    if recipe.extra[:1] == ("describe",):
        return Case(recipe.op, {}, {}, "describe()", params={"what": "describe"}, clauses=("BCK-1",))
    case = build(recipe)
    case.params = {"what": "undeclared"}
    case.clauses = ("BCK-3",)
    return case


TYPES: dict[str, Any] = {
    "name": str,
    "version": str,
    "spec_version": str,
    "operations": (list, tuple),
    "dtypes": (list, tuple),
    "capabilities": (list, tuple),
    "tile_sizes": Mapping,
    "limits": Mapping,
}


@register("description", "describe() is whole, and what it leaves out is refused", ("BCK-1", "BCK-3"), _draw, _make,
          shrinks=False)  # fmt: skip
def check(ctx: Context, case: Case) -> list[Violation]:
    """Keys, types and known names; Unsupported, with a reason, for what is not declared."""
    if case.params["what"] == "describe":
        return _description(ctx)
    try:
        got = ctx.run(case.op, case.tensors, case.attrs)
    except Refused:
        return []
    # By now the backend declares what it did not when the case was stored.
    return ctx.judge(case, got, ctx.bounds(case.op, case.tensors, case.attrs), ("BCK-3",), record=False)


def _description(ctx: Context) -> list[Violation]:
    about, found = ctx.describe, []
    for text in (*_keys(about), *_names(about), *_sizes(about)):
        found.append(Violation(("BCK-1",), f"describe(): {text}", "structure"))
    try:
        same = plain(ctx.backend.describe()) == plain(about)
        text = "" if same else "a second call gives another answer"
    except BaseException as error:
        if by_user(error):
            raise
        text = f"a second call raises {crash(error)}"
    return found + ([Violation(("BCK-1",), f"describe(): {text}", "structure")] if text else [])


def _keys(about: Mapping[str, Any]) -> Iterator[str]:
    for key, kind in TYPES.items():
        if key not in about:
            yield f"key {key!r} is missing"
        elif not isinstance(about[key], kind):
            yield f"{key} is {type(about[key]).__name__}: {shown(about[key])}"
        elif foreign(about[key]):
            yield f"{key} is or holds {foreign(about[key])}"
    version = load().version
    if told(about.get("spec_version")) != version:
        yield f"spec_version {shown(about.get('spec_version'))}, this suite checks {version!r}"
    if "kernels" in about and not isinstance(about["kernels"], list | tuple):
        yield f"kernels is {type(about['kernels']).__name__}: {shown(about['kernels'])}"
    if "cost" in about and about["cost"] not in COSTS:
        yield f"cost is {shown(about['cost'])}, expected one of {', '.join(COSTS)}"


def _names(about: Mapping[str, Any]) -> Iterator[str]:
    """Names that the specification does not know, and operations none of whose calls is declared."""
    spec = load()
    known = {"operations": spec.operations, "dtypes": spec.storage_dtypes, "capabilities": spec.capabilities}
    for key, allowed in known.items():
        values = about.get(key) if isinstance(about.get(key), list | tuple) else ()
        for name in values or ():
            if not isinstance(name, str) or name not in allowed:
                yield f"{key} holds {shown(name)}, which is none of {', '.join(allowed)}"
        if key in about and not values and key != "capabilities":
            yield f"{key} is empty"
    if not isinstance(about.get("capabilities"), list | tuple):
        return
    for op in names(about, "operations"):
        if op in spec.operations:
            required = [t.name for t in spec.operations[op].tensors if not t.optional]
            for lacking in sorted(spec.needs(op, required) - set(names(about, "capabilities"))):
                yield f"operations holds {op!r}, every call of which needs the capability {lacking!r}"


def _sizes(about: Mapping[str, Any]) -> Iterator[str]:
    tiles, limits = about.get("tile_sizes"), about.get("limits")
    for key in ("T", "window", "D"):
        sizes = tiles.get(key) if isinstance(tiles, Mapping) else None
        given = sizes if isinstance(sizes, list | tuple) else (None,)
        if not all(isinstance(s, int) and number(s) is not None and s > 0 for s in given):
            yield f"tile_sizes[{key!r}] must be a list of positive ints, not {shown(sizes)}"
    operations = load().operations.values()
    known = {s for op in operations for t in op.tensors for s in t.shape} | {
        a for op in operations for a in op.attribute
    }
    for name, bound in (limits if isinstance(limits, Mapping) else {}).items():
        if name not in known:
            yield f"limits holds {shown(name)}, which is no dimension and no attribute"
        if limit_fault(bound):
            yield f"the limit of {name} {limit_fault(bound)}"
