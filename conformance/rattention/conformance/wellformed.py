"""Whether a case that was read from a file is a call on which a backend can be judged; if not, what is wrong with it.

A backend must never fail because the file was wrong. So the call is checked as every backend checks it, and what is
stored beside it must fit the outputs of that call.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from rattention.conformance.case import Case
from rattention.spec import Call, SpecError, load, validate

REFUSED = "bad input"
"""The property whose cases are invalid calls on purpose; `params["text"]` is what the refusal must say."""
PARAMS: dict[str, tuple[str, ...]] = {
    REFUSED: ("text", "entry", "target", "dtype", "options"),
    "description": ("what",),
    "odd calls": ("kind",),
    "drift": ("kind",),
    "exact state": ("all",),
    "shared heads": ("outputs",),
    "splits": ("rows",),
    "membership": ("marks",),
    "membership of gradients": ("marks", "branch"),
    "rows": ("row",),
    "linear in v": ("split",),
    "shift of phi": ("shift",),
    "strides": ("layouts",),
    "NaN surfaces": ("tensor", "at", "value"),
    "relu at NaN": ("tensor",),
}
"""Names in `params`, by property; the others have none. What they must hold is for the property to say."""


def fault(case: Case) -> str:
    """What is wrong, in one line; "" where the case can be used."""
    spec = load()
    if case.op not in spec.operations:
        return f"no operation {case.op!r} in specification {spec.version}"
    unknown = [label for label in case.clauses if label not in spec.clauses]
    if unknown:
        return f"clauses: no clause {unknown[0]!r} in specification {spec.version}"
    known = PARAMS.get(case.property_name, ())
    odd = [name for name in case.params if name not in known]
    if odd:
        takes = f"expected {', '.join(known)}" if known else "which takes none"
        return f"params: {odd[0]!r} is none of the property {case.property_name!r}, {takes}"
    if case.property_name == "description" and case.params.get("what") == "describe":
        return _no_answer(case)  # asks for describe() alone
    try:
        call = validate(case.op, case.tensors, case.attrs)
    except SpecError as error:
        if case.property_name != REFUSED:
            return f"not a valid call: {error}"
        if case.params.get("text") != str(error):
            text = case.params.get("text")
            return f"params: text: the shared validation refuses this call with {str(error)!r}, not {text!r}"
        return _no_answer(case)
    if case.property_name == REFUSED:
        return "a case of bad input, yet the call is valid"
    return _answer(case, call)


def _no_answer(case: Case) -> str:
    stored = [*(f"expected.{n}" for n in case.expected), *(f"budget.{n}" for n in case.budget)]
    return f"{stored[0]}: the case has no outputs to compare" if stored else ""


def _answer(case: Case, call: Call) -> str:
    shapes = call.output_shapes()
    double = np.dtype("float64")
    integers = {o.name for o in call.operation.outputs if o.dtype == "int32"}
    groups: tuple[tuple[str, dict[str, np.ndarray]], ...] = (("expected", case.expected), ("budget", case.budget))
    for kind, group in groups:
        for name, x in group.items():
            if name not in shapes:
                return f"{kind}.{name} is no output of the call, expected one of {', '.join(shapes)}"
            # Float64 holds every int32, and the files of earlier versions have it for cache_length.
            wanted = (np.dtype("int32"), double) if name in integers else (double,)
            if x.shape != shapes[name] or x.dtype not in wanted:
                return f"{kind}.{name} is {_told(x.dtype, x.shape)}, expected {_told(wanted[0], shapes[name])}"
            if kind == "budget" and not (x >= 0).all():
                return f"budget.{name} holds a negative number or NaN"
            if kind == "expected" and name in integers and not _int32(x):
                return f"expected.{name} holds what no int32 is"
    return ""


def _int32(x: np.ndarray) -> bool:
    wide = x.astype(np.float64)
    return bool(((wide == np.trunc(wide)) & (np.abs(wide) < 2**31)).all())


def _told(dtype: Any, shape: tuple[int, ...]) -> str:
    return f"{dtype}{list(shape)}"
