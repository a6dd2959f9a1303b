"""NaN in live tokens: demanded where the sets tie an output to it, left free where a sum has no term."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from rattention.conformance.case import Case
from rattention.conformance.context import Context, Moot
from rattention.conformance.properties.numerics import check_nan
from rattention.conformance.strategies import make_plan
from rattention.numpy.adapter import backend as honest


class Fill:
    """The reference, except that NaN outputs become `value`, and zeros too where `also_zeros`."""

    def __init__(self, value: float | None, *, zeros_too: bool = False):
        self.value, self.zeros_too = value, zeros_too

    def describe(self) -> dict[str, Any]:
        return dict(honest.describe())

    def run(self, op: str, tensors: Any, attrs: Any) -> dict[str, np.ndarray]:
        out = dict(honest.run(op, tensors, attrs))
        if self.value is None:
            return out
        for name, x in out.items():
            if x.dtype.kind != "i":
                bad = np.isnan(x) | ((x == 0) & self.zeros_too)
                out[name] = np.where(bad, np.asarray(self.value, x.dtype), x).astype(x.dtype)
        return out


SELECTS, HIDES, MULTIPLIES = Fill(None), Fill(0.0), Fill(np.nan, zeros_too=True)


def case(op: str, T: int, window: int | None, name: str, at: tuple[int, int, int, int], **more: Any) -> Case:
    rng = np.random.default_rng(3)
    t = {n: rng.standard_normal((1, T, 1, 2)).astype(np.float32) for n in ("q", "k", "v")}
    if op.endswith(".vjp"):
        t["d_out"] = rng.standard_normal((1, T, 1, 2)).astype(np.float32)
    t |= more
    t[name][at] = np.nan
    params = {"tensor": name, "at": list(at), "value": float("nan")}
    return Case(op, t, {"window": window}, clauses=("NUM-5",), property_name="NaN surfaces", params=params)


def verdict(backend: Fill, it: Case) -> int:
    plan = make_plan("quick", 0, backend.describe())
    with np.errstate(all="ignore"):
        return len(check_nan(Context(backend, backend.describe(), plan), it))


FREE = [
    ("residual_linear_attention.vjp", 1, 1, "k", (0, 0, 0, 0)),  # nobody reads the token
    ("residual_linear_attention.vjp", 3, 1, "q", (0, 1, 0, 0)),  # a query with nothing behind its window
    ("residual_linear_attention", 3, 1, "q", (0, 1, 0, 0)),
    ("residual_linear_attention.vjp", 3, None, "k", (0, 1, 0, 1)),
    ("sliding_window_attention", 3, -1, "q", (0, 2, 0, 0)),
    ("sliding_window_attention.vjp", 3, -1, "d_out", (0, 2, 0, 0)),
]


@pytest.mark.parametrize("arguments", FREE, ids=[f"{a[0]}-{a[3]}-{a[2]}" for a in FREE])
def test_both_answers_are_right_where_a_sum_has_no_term(arguments):
    for backend in (SELECTS, HIDES, MULTIPLIES):
        with pytest.raises(Moot):  # no answer is wrong, and the case is not counted
            verdict(backend, case(*arguments))


BOUND = [
    ("residual_linear_attention.vjp", 3, 1, "k", (0, 0, 0, 0)),  # token 2 reads token 0
    ("residual_linear_attention", 3, 1, "v", (0, 0, 0, 0)),
    ("sliding_window_attention", 3, 1, "q", (0, 0, 0, 0)),
    ("sliding_window_attention.vjp", 3, 1, "d_out", (0, 2, 0, 0)),
]


@pytest.mark.parametrize("arguments", BOUND, ids=[f"{a[0]}-{a[3]}-{a[2]}" for a in BOUND])
def test_a_hidden_nan_is_a_fault_where_it_is_read(arguments):
    assert not verdict(SELECTS, case(*arguments))
    assert not verdict(MULTIPLIES, case(*arguments))
    assert verdict(HIDES, case(*arguments))


def test_a_state_gives_every_query_something_to_read():
    state = np.ones((1, 1, 4, 2), np.float32)
    it = case("residual_linear_attention", 2, 1, "q", (0, 0, 0, 0), initial_state=state)
    assert not verdict(SELECTS, it)
    assert verdict(HIDES, it)
