"""One case: a call of one operation as plain data, and what is known about its answer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rattention.spec import load


@dataclass
class Case:
    """A call, and what it is for.

    op, tensors, attrs: the arguments of `Backend.run`.
    expected, budget: value and largest admitted error of each output, float64 (int32 for integer outputs); empty when
        not evaluated.
    property_name, params: the property that judges the case and its own arguments; "agreement" compares outputs alone.
    clauses, note, source, seed: labels it checks, why it exists, where its data come from, the seed it was drawn with.
    """

    op: str
    tensors: dict[str, np.ndarray]
    attrs: dict[str, Any]
    note: str = ""
    seed: int | None = None
    clauses: tuple[str, ...] = ()
    source: str = "generated"
    property_name: str = "agreement"
    params: dict[str, Any] = field(default_factory=dict)
    expected: dict[str, np.ndarray] = field(default_factory=dict)
    budget: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def base_op(self) -> str:
        """The operation without `.vjp`."""
        return self.op.removesuffix(".vjp")

    @property
    def is_vjp(self) -> bool:
        return self.op.endswith(".vjp")

    def answer(self, bounds: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
        """Store value and budget of each output beside the inputs; what is stored already stays."""
        integers = {o.name for o in load().operations[self.op].outputs if o.dtype == "int32"}
        for name, (value, budget) in bounds.items():
            self.expected.setdefault(name, value.astype(np.int32) if name in integers else value)
            self.budget.setdefault(name, budget)


def to_json(value: Any) -> Any:
    """`value` as strict JSON: tuples become lists, and non-finite floats `{"float": "inf"}`."""
    if isinstance(value, Mapping):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    return value


def from_json(value: Any) -> Any:
    """The inverse of `to_json`, tuples aside.

    Raises:
        ValueError: an object `{"float": ...}` holds anything but "inf", "-inf" or "nan".
    """
    if isinstance(value, dict):
        if set(value) == {"float"}:
            if value["float"] not in ("inf", "-inf", "nan"):
                raise ValueError(f"{value!r} is none of the floats inf, -inf and nan")
            return float(value["float"])
        return {k: from_json(v) for k, v in value.items()}
    if isinstance(value, list):
        return [from_json(v) for v in value]
    return value
