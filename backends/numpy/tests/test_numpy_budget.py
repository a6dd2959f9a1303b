"""The error budget: honest machines stay inside it, planted faults do not, and it is 0 where bits must be equal.

The honest machine is `emulated.Space`: float32 with operands of matrix products rounded to storage, in several orders
of summation. The faults are planted in the same machine, so that nothing but the fault can cause the failure.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from rattention.numpy import budget, emulated, quadratic
from rattention.spec import load

OPERATIONS = [name for name in load().operations if name != "rope_table"]
DTYPES = ["float32", "bfloat16", "float16"]
HONEST = {
    "blocked": {},
    "term by term": {"sequential": True},
    "state first": {"folded": True, "saved": True},
    "other scale": {"folded": True, "stretch": 0.66},
}


def shares(evaluated, got) -> dict[str, float]:
    """Largest |got - value| / budget of each output; 0 / 0 is 0, and anything over a budget of 0 is infinite."""
    worst = {}
    for name, (value, allowed) in evaluated.items():
        off = np.abs(got[name].astype(np.float64) - value)
        off = np.where(np.isinf(allowed) | (got[name].astype(np.float64) == value), 0.0, off)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.where(off > 0, off / np.where(np.isinf(allowed), 1.0, allowed), 0.0)
        worst[name] = float(ratio.max(initial=0.0))
    return worst


def restructure(rng, call) -> str:
    """Give the float tensors of a call a structure that real data have and random data have not."""
    kind = str(rng.choice(["random", "constant", "ramp", "halves", "repeated", "large", "small", "shifted", "sparse"]))
    for name, x in call.tensors.items():
        if x.dtype.kind in "iu" or name.startswith("rope"):
            continue
        f = x.astype(np.float64)
        along = np.arange(f.shape[1])[None, :, None, None] if f.ndim == 4 else None
        if kind == "constant" and f.ndim == 4 and f.shape[1]:
            f = np.broadcast_to(f[:, :1], f.shape)
        elif kind == "ramp" and along is not None:
            f = 0.1 * f + along / max(f.shape[1], 1) - 0.5
        elif kind == "halves" and along is not None:
            f = np.abs(f) * np.where(along < f.shape[1] // 2, 1, -1)
        elif kind == "repeated" and f.ndim == 4 and f.shape[1]:
            f = f[:, np.arange(f.shape[1]) % min(3, f.shape[1])]
        elif kind == "large" and name in ("q", "k", "x", "cache_k"):
            f = 20 * f
        elif kind == "small":
            f = 1e-3 * f
        elif kind == "shifted":
            f = f + 2
        elif kind == "sparse":
            f = f * (rng.random(f.shape) < 0.1)
        call.tensors[name] = f.astype(x.dtype)
    return kind


@pytest.mark.parametrize("machine", list(HONEST))
@pytest.mark.parametrize("dtype", DTYPES)
def test_honest_machines_stay_inside_the_budget(dtype, machine, draw_call):
    """NUM-1: random and structured data, short and long, every operation and vjp."""
    rng = np.random.default_rng([DTYPES.index(dtype), list(HONEST).index(machine), 1])
    for case in range(3 * len(OPERATIONS)):
        op = OPERATIONS[case % len(OPERATIONS)]
        call = draw_call(rng, op, dtype, tokens=[None, None, 65][case // len(OPERATIONS)])
        kind = restructure(rng, call)
        got = emulated.run(op, call.tensors, call.attrs, **HONEST[machine])
        for name, share in shares(budget.evaluate(op, call.tensors, call.attrs), got).items():
            assert share <= 1, (case, op, name, kind, share, call.attrs)


def test_values_are_those_of_the_quadratic_form(draw_call):
    rng = np.random.default_rng(47)
    for op in load().operations:
        call = draw_call(rng, op, "float32", tokens=7)
        exact = quadratic.run(op, call.tensors, call.attrs)
        for name, (value, allowed) in budget.evaluate(op, call.tensors, call.attrs).items():
            np.testing.assert_array_equal(value, exact[name])
            assert value.shape == allowed.shape
            assert (allowed >= 0).all()


def plain(op: str, dtype, T: int, D: int, window: int = 16) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """One row of random tokens, four query heads on two kv heads."""
    rng = np.random.default_rng(53)
    q, k, v = (rng.standard_normal((1, T, h, D)).astype(dtype) for h in (4, 2, 2))
    tensors = {"q": q, "k": k, "v": v}
    if op.startswith("rattention"):
        tensors |= {n: np.ones((4, D), np.float32) for n in ("swa_weight", "rla_weight")}
    if op.endswith(".vjp"):
        tensors["d_out"] = rng.standard_normal(q.shape).astype(dtype)
    return tensors, {"window": window}


BRANCHES = ["sliding_window_attention", "residual_linear_attention", "rattention"]


@pytest.mark.parametrize("op", BRANCHES + [f"{b}.vjp" for b in BRANCHES])
@pytest.mark.parametrize("passes", ["tf32", "bfloat16"])
def test_reduced_passes_in_float32_exceed_the_budget(op, passes):
    """NUM-2, on short and on long sequences, in every output that a matrix product makes."""
    for T, D in ((32, 16), (256, 64)):
        tensors, attrs = plain(op, np.float32, T, D)
        evaluated = budget.evaluate(op, tensors, attrs)
        assert max(shares(evaluated, emulated.run(op, tensors, attrs)).values()) < 0.5
        assert min(shares(evaluated, emulated.run(op, tensors, attrs, operands=passes)).values()) > 2


def test_a_state_in_16_bits_exceeds_the_budget():
    """NUM-3: in the state that is carried away, and, after the mean over F, in the outputs that read it."""
    tensors, attrs = plain("residual_linear_attention", ml_dtypes.bfloat16, 256, 16, window=-1)
    tensors["v"] = (tensors["v"].astype(np.float64) + 0.5).astype(ml_dtypes.bfloat16)
    evaluated = budget.evaluate("residual_linear_attention", tensors, attrs)
    honest = emulated.run("residual_linear_attention", tensors, attrs, folded=True)
    assert max(shares(evaluated, honest).values()) < 0.8
    narrow = emulated.run("residual_linear_attention", tensors, attrs, state="bfloat16")
    assert shares(evaluated, narrow)["out"] > 1

    phi = emulated.run("feature_map", {"x": tensors["k"]}, {})["out"].astype(np.float32)
    state = np.zeros((1, 2, 32, 16), np.float32)
    for i in range(256):
        step = state + phi[:, i, :, :, None] * tensors["v"][:, i, :, None].astype(np.float32)
        state = step.astype(ml_dtypes.bfloat16).astype(np.float32)
    assert shares({"final_state": evaluated["final_state"]}, {"final_state": state})["final_state"] > 2


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_eps_outside_the_root_exceeds_the_budget(dtype):
    """MIX-2. The eps is large, so that the fault is one of the formula and not of the last digits."""
    tensors, attrs = plain("rattention", dtype, 64, 32)
    attrs["eps"] = 1e-3
    evaluated = budget.evaluate("rattention", tensors, attrs)
    assert shares(evaluated, emulated.run("rattention", tensors, attrs, inner_eps=False))["out"] > 2


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("op", BRANCHES)
@pytest.mark.parametrize("T", [32, 300])
def test_a_window_off_by_one_exceeds_the_budget(op, dtype, T):
    """SWA-1, RLA-1."""
    tensors, attrs = plain(op, dtype, T, 32)
    evaluated = budget.evaluate(op, tensors, attrs)
    for wrong in (15, 17):
        assert shares(evaluated, emulated.run(op, tensors, {"window": wrong}))["out"] > 2


def test_budget_is_zero_where_bits_must_be_equal(draw_call):
    """Copies into the next cache, outputs of padding and of branches with nothing to read, inert gradients, lengths."""
    rng = np.random.default_rng(59)
    tensors, attrs = plain("residual_linear_attention", ml_dtypes.bfloat16, 20, 8)
    value, allowed = budget.evaluate("residual_linear_attention", tensors, attrs)["out"]
    assert (value[:, :17] == 0).all()
    assert (allowed[:, :17] == 0).all()
    assert (allowed[:, 17:] > 0).all()
    call = draw_call(rng, "rattention_extend", "bfloat16", tokens=6, options=1.0)
    evaluated = budget.evaluate(call.op, call.tensors, call.attrs)
    for name in ("cache_k", "cache_v", "cache_length"):
        assert (evaluated[name][1] == 0).all()
    past = np.arange(6) >= call.tensors["lengths"][:, None]
    assert (evaluated["out"][1][past] == 0).all()
    call = draw_call(rng, "rattention.vjp", "float32", tokens=9, options=1.0)
    padding = call.tensors["segment_ids"] == 0
    for name, (value, allowed) in budget.evaluate(call.op, call.tensors, call.attrs).items():
        if name in ("d_q", "d_k", "d_v"):
            assert (value[padding] == 0).all()
            assert (allowed[padding] == 0).all()


def test_rotary_table_may_be_one_ulp_off():
    """ROPE-2: the neighbour of the rounded value passes, the one after it does not; float32 angles do not."""
    positions = np.array([0, 1, 77, 4095], np.int32)
    evaluated = budget.evaluate("rope_table", {"positions": positions}, {"head_dim": 64})
    value, allowed = evaluated["rope_cos"]
    near = value.astype(np.float32)
    assert (np.abs(near - value) <= allowed).all()
    beyond = np.nextafter(np.nextafter(near, np.float32(9)), np.float32(9))
    assert (np.abs(beyond - value) > allowed).all()
    angle = positions.astype(np.float32)[:, None] * np.float32(10000.0) ** (-np.arange(32, dtype=np.float32) / 32)
    assert (np.abs(np.cos(angle) - value) > allowed).any()


def test_logits_of_any_size_leave_the_weights_inside_their_hull():
    """SWA-3: with huge scores the order of tokens may flip, but an output stays a mean of values."""
    rng = np.random.default_rng(61)
    tensors, attrs = plain("sliding_window_attention", ml_dtypes.bfloat16, 12, 8)
    angle = rng.uniform(0, 6, (12, 4))
    tensors |= {"rope_cos": np.cos(angle).astype(np.float32), "rope_sin": np.sin(angle).astype(np.float32)}
    for factor in (1e2, 1e4, 1e8):
        scaled = {**tensors, "q": (tensors["q"].astype(np.float64) * factor).astype(ml_dtypes.bfloat16)}
        value, allowed = budget.evaluate("sliding_window_attention", scaled, attrs)["out"]
        assert np.isfinite(value).all()
        assert (allowed < 20 * np.abs(tensors["v"].astype(np.float64)).max()).all()
        got = emulated.run("sliding_window_attention", scaled, attrs)
        assert shares({"out": (value, allowed)}, got)["out"] <= 1


def test_overflow_of_the_output_dtype():
    """Where every number within the budget overflows the value is infinite; at the edge anything passes."""
    x = np.full((1, 1, 1, 4), 2.0, np.float16)
    weight = np.array([[40000.0, 32752.0, 1.0, 60000.0]], np.float32)
    tensors = {"swa": x, "rla": x, "swa_weight": weight, "rla_weight": weight}
    value, allowed = budget.evaluate("rms_mix", tensors, {"eps": 1e-6})["out"]
    assert np.isinf(value[0, 0, 0, [0, 3]]).all()
    assert (allowed[0, 0, 0, [0, 3]] == 0).all()
    assert np.isinf(allowed[0, 0, 0, 1])
    assert 0 < allowed[0, 0, 0, 2] < 0.01


def test_nan_is_expected_where_the_formulas_make_it():
    """NUM-5: and the budget of other elements does not suffer."""
    tensors, attrs = plain("rattention", np.float32, 12, 8, window=2)
    clean = budget.evaluate("rattention", tensors, attrs)["out"]
    k = tensors["k"].copy()
    k[0, 5, 1, 0] = np.nan
    value, allowed = budget.evaluate("rattention", {**tensors, "k": k}, attrs)["out"]
    assert np.isnan(value[0, 5:, 2:]).all()
    np.testing.assert_array_equal(value[0, :, :2], clean[0][0, :, :2])
    np.testing.assert_array_equal(allowed[0, :5], clean[1][0, :5])


def test_large_calls_are_evaluated_in_pieces(monkeypatch, draw_call):
    """The same values, and budgets no smaller: pieces of a shared gradient add up as if their errors were coherent."""
    rng = np.random.default_rng(67)
    for op in ("rattention", "rattention.vjp", "rattention_extend.vjp"):
        call = draw_call(rng, op, "float32", tokens=11, options=1.0)
        whole = budget.evaluate(op, call.tensors, call.attrs)
        monkeypatch.setattr(budget, "PIECE", 1)
        pieces = budget.evaluate(op, call.tensors, call.attrs)
        monkeypatch.undo()
        for name, (value, allowed) in whole.items():
            scale = np.abs(value).max(initial=1.0)
            np.testing.assert_allclose(pieces[name][0], value, rtol=0, atol=1e-13 * scale)
            np.testing.assert_array_less(0.3 * allowed, pieces[name][1] + 1e-300)


def test_a_weight_whose_complement_underflows_has_a_budget():
    """The gap of two logits is far beyond exp's range, and still within what float32 may be off: either may win."""
    q = np.array([[1, 1], [1e15, -1e15 * (1 + 2.0**-23)]], np.float32)[None, :, None]
    k = np.array([[0, 0], [1e15, 1e15]], np.float32)[None, :, None]
    v = np.array([[1], [3]], np.float32)[None, :, None]
    value, limit = budget.evaluate("sliding_window_attention", {"q": q, "k": k, "v": v}, {"window": 1})["out"]
    assert value[0, 1, 0, 0] == 1
    assert limit[0, 1, 0, 0] >= 2
    alone, limit = budget.evaluate("sliding_window_attention", {"q": q, "k": k, "v": v}, {"window": 0})["out"]
    assert alone[0, 1, 0, 0] == 3
    assert limit[0, 1, 0, 0] < 1e-5
