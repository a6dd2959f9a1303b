"""The tensors of a failing case as text: small ones whole, of larger ones the part that is wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from rattention.conformance.case import Case
from rattention.conformance.context import Broken, Refused
from rattention.conformance.judge import Violation
from rattention.conformance.session import Session
from rattention.spec import SpecError, load

WHOLE = 64
"""Elements of a tensor that is shown whole."""
PART = 16
"""Elements of the last axis that are shown of a larger one."""


def tensor_lines(session: Session, case: Case, violations: Iterable[Violation]) -> list[str]:
    """Inputs and attributes of the call, and for each output what was expected, the error admitted, and what came.

    The backend is called once more, for a property may call it often and with other tensors than the case holds. It is
    not called where it crashed.
    """
    op = load().operations[case.op]
    lines = ["", "inputs"]
    for name in sorted(case.tensors, key=_order(op.tensor)):
        x = case.tensors[name]
        lines += _tensor(f"{name} {x.dtype}", x)
    lines += [f"  {name} = {case.attrs[name]!r}" for name in sorted(case.attrs, key=_order(op.attribute))]
    if case.params:
        lines += ["of the property", *(f"  {name} = {_cut(repr(value))}" for name, value in case.params.items())]
    got = {} if any(v.crash for v in violations) else _outputs(session, case)
    if not case.expected:
        try:
            case.answer(session.ctx.bounds(case.op, case.tensors, case.attrs))
        except (SpecError, ValueError, KeyError, IndexError):  # an invalid call has no outputs
            return lines
    expected, budget = case.expected, case.budget
    wrong = {v.output: v.index for v in violations if v.output}
    outputs = sorted({*expected, *got}, key=_order([o.name for o in op.outputs]))
    for name in sorted(outputs, key=lambda n: n not in wrong):
        lines.append(f"output {name}{', which is wrong' if name in wrong else ''}")
        if name in expected:
            lines += _tensor("expected", expected[name], wrong.get(name, ()))
        if name in budget:
            lines += _tensor("admitted error", budget[name], wrong.get(name, ()), "%.3g")
        if name in got:
            lines += _tensor(f"got {got[name].dtype}", got[name], wrong.get(name, ()))
    return lines


def _order(names: Iterable[str]) -> Callable[[str], tuple[int, str]]:
    """That of the specification: a file has its tensors in any order. What it does not know comes last."""
    known = list(names)
    return lambda name: (known.index(name) if name in known else len(known), name)


def _outputs(session: Session, case: Case) -> dict[str, np.ndarray]:
    try:
        return session.ctx.run(case.op, case.tensors, case.attrs)
    except (Refused, Broken, SpecError):
        return {}
    finally:
        session.ctx.violations = []


def _tensor(label: str, x: np.ndarray, at: tuple[int, ...] = (), digits: str = "") -> list[str]:
    """One tensor; of a large one the elements around `at`, or its range where no place in it is wrong."""
    head = f"  {label}{list(x.shape)}"
    if x.size <= WHOLE:
        return _block(f"{head} = ", x, digits)
    if len(at) != x.ndim or any(not 0 <= i < size for i, size in zip(at, x.shape, strict=True)):
        wide = x.astype(np.float64)
        finite = wide[np.isfinite(wide)]
        low, high = (finite.min(), finite.max()) if finite.size else (np.nan, np.nan)
        odd = x.size - finite.size
        return [f"{head} from {low:.6g} to {high:.6g}{f', {odd} elements are not finite' if odd else ''}"]
    first = max(0, min(at[-1] - PART // 2, x.shape[-1] - PART))
    part = x[at[:-1]][first : first + PART]
    place = ", ".join([*map(str, at[:-1]), f"{first}:{first + part.size}"])
    return _block(f"{head}, of it [{place}] = ", part, digits)


def _block(head: str, x: np.ndarray, digits: str) -> list[str]:
    """Every digit that the dtype has, unless `digits` says otherwise."""
    wide = x if x.dtype.kind in "iub" or x.dtype == np.float64 else x.astype(np.float32)
    formatter: Any = {"float_kind": lambda value: digits % value} if digits else None
    text = np.array2string(
        wide, separator=", ", threshold=WHOLE + 1, max_line_width=110, floatmode="unique", formatter=formatter
    )
    first, *rest = [line for line in text.splitlines() if line.strip()]
    return [head + first] if not rest else [head.rstrip(), *(f"    {line}" for line in (first, *rest))]


def _cut(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}..."
