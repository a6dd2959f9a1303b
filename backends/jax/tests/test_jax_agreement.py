"""The XLA form against the reference: every operation and gradient, with what the suite draws less often."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from rattention.jax.adapter import backend
from rattention.numpy import budget

rng = np.random.default_rng(20260724)


def normal(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return rng.standard_normal(shape).astype(dtype)


def check(op: str, tensors: dict, attrs: dict) -> None:
    """Every output within the budget of the reference, NaN nowhere."""
    expected = budget.evaluate(op, tensors, attrs)
    found = backend.run(op, tensors, attrs)
    assert set(found) == set(expected)
    for name, (value, allowed) in expected.items():
        got = found[name].astype(np.float64)
        assert got.shape == value.shape, name
        excess = np.abs(got - value) - allowed
        assert not np.any(np.isnan(got)), f"{name} holds NaN"
        assert np.all(excess <= 0), f"{op}: {name} is off by {excess.max()} more than its budget"


def with_cotangents(op: str, tensors: dict, attrs: dict) -> dict:
    outputs = backend.run(op, tensors, attrs)
    cotangents = {f"d_{n}": normal(*x.shape, dtype=x.dtype) for n, x in outputs.items() if x.dtype != np.int32}
    return tensors | cotangents


def both(op: str, tensors: dict, attrs: dict) -> None:
    check(op, tensors, attrs)
    check(f"{op}.vjp", with_cotangents(op, tensors, attrs), attrs)


def inputs(T: int, dtype: Any = np.float32, B: int = 2, Hkv: int = 2, G: int = 3, D: int = 8, Dv: int = 5) -> dict:
    Hq = Hkv * G
    angle = rng.uniform(-3, 3, (T + 4, D // 2))
    return {
        "q": normal(B, T, Hq, D, dtype=dtype),
        "k": normal(B, T, Hkv, D, dtype=dtype),
        "v": normal(B, T, Hkv, Dv, dtype=dtype),
        "swa_weight": normal(Hq, Dv),
        "rla_weight": normal(Hq, Dv, dtype=dtype),
        "rope_cos": np.cos(angle).astype(np.float32),
        "rope_sin": np.sin(angle).astype(np.float32),
        "q_scale": normal(D),
        "k_scale": normal(D, dtype=dtype),
        "memory": normal(Hq, 2 * D, Dv),
        "initial_state": normal(B, Hkv, 2 * D, Dv),
    }


# One chunk and several, window borders inside, at and past the chunk borders.
@pytest.mark.parametrize(
    ("T", "w"), [(21, 4), (21, -1), (21, 20), (21, 21), (21, None), (150, 0), (150, 70), (210, 130)]
)
def test_rattention(T: int, w: int | None) -> None:
    both("rattention", inputs(T), {"window": w})


@pytest.mark.parametrize(("T", "w"), [(30, 3), (170, 40), (150, -1), (20, None)])
def test_packed_documents_with_poisoned_padding(T: int, w: int | None) -> None:
    tensors = inputs(T, B=3)
    ids = np.zeros((3, T), np.int32)
    cuts = [T // 7, T // 3, T // 2, T - T // 9]
    ids[0, cuts[0] : cuts[1]], ids[0, cuts[1] : cuts[2]], ids[0, cuts[2] + 1 : cuts[3]] = 7, 2, 9
    ids[1] = 4
    for name in "qkv":
        tensors[name][ids == 0] = np.nan
    tensors["segment_ids"] = ids
    both("rattention", tensors, {"window": w})


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("feature_map", ["relu", "identity"])
def test_sixteen_bits(dtype: Any, feature_map: str) -> None:
    tensors = inputs(100, dtype, Dv=8)
    if feature_map == "identity":
        tensors |= {"memory": tensors["memory"][:, :8], "initial_state": tensors["initial_state"][:, :, :8]}
    both("rattention", tensors, {"window": 20, "feature_map": feature_map, "eps": 1e-5})


@pytest.mark.parametrize(("T", "w"), [(1, 5), (6, 3), (130, 9), (7, -1), (4, 0), (5, None)])
def test_extend_ragged_with_poisoned_slots(T: int, w: int | None) -> None:
    W = 6 if w is None else max(w, 0)
    tensors = inputs(T + 20, B=3)
    del tensors["initial_state"]
    for name in "qkv":
        tensors[name] = tensors[name][:, :T].copy()
    length = np.array([0, W // 2, W if w is None else W + 7], np.int32)
    lengths = np.array([T, T // 2, T], np.int32)
    tensors |= {"cache_k": normal(3, W, 2, 8), "cache_v": normal(3, W, 2, 5), "cache_state": normal(3, 2, 16, 5)}
    tensors |= {"cache_length": length, "lengths": lengths}
    for b in range(3):
        unused = W - min(int(length[b]), W)
        for name in ("cache_k", "cache_v"):
            tensors[name][b, :unused] = np.nan
        for name in "qkv":
            tensors[name][b, lengths[b] :] = np.nan
    both("rattention_extend", tensors, {"window": w})


def test_single_operations() -> None:
    t = inputs(90)
    both("feature_map", {"x": t["q"]}, {"feature_map": "softmax"})
    heads = {"swa": t["v"], "rla": t["v"][::-1], "swa_weight": t["swa_weight"][:2], "rla_weight": t["rla_weight"][2:4]}
    both("rms_mix", heads, {"eps": 1e-6})
    qkv = {n: t[n] for n in "qkv"}
    positions = rng.integers(0, 90, (2, 90)).astype(np.int32)
    rope = {"rope_cos": t["rope_cos"], "rope_sin": t["rope_sin"], "positions": positions}
    both("sliding_window_attention", qkv | rope, {"window": 33, "scale": -0.3})
    both("residual_linear_attention", qkv | {"initial_state": t["initial_state"]}, {"window": 7})
    check("rope_table", {"positions": np.array([0, 1, 2**31 - 1, -5], np.int32)}, {"head_dim": 8, "theta": 5e5})


def test_an_absent_cotangent_is_zero() -> None:
    tensors = with_cotangents("rattention", inputs(12), {"window": 2})
    del tensors["d_final_state"]
    check("rattention.vjp", tensors, {"window": 2})


def test_empty_dims() -> None:
    for B, T in ((0, 7), (2, 0), (0, 0)):
        tensors = inputs(T, B=B)
        both("rattention", tensors, {"window": 2})
        ids = np.zeros((B, T), np.int32)
        both("rattention", tensors | {"segment_ids": ids}, {"window": 2})


def test_inert_gradients_are_zero_under_nan_cotangents() -> None:
    tensors = inputs(20)
    ids = np.ones((2, 20), np.int32)
    ids[:, :5] = 0
    tensors["segment_ids"] = ids
    d_out, dead = normal(2, 20, 6, 5), ids[:, :, None, None] == 0
    tensors["d_out"] = np.where(dead, 0, d_out).astype(np.float32)
    clean = backend.run("rattention.vjp", tensors, {"window": 3})
    tensors["d_out"] = np.where(dead, np.nan, d_out).astype(np.float32)
    poisoned = backend.run("rattention.vjp", tensors, {"window": 3})
    for name in clean:
        np.testing.assert_array_equal(clean[name], poisoned[name], err_msg=name)
    for name in ("d_q", "d_k", "d_v"):
        assert not poisoned[name][:, :5].any()


def test_strided_and_read_only_inputs_change_nothing() -> None:
    tensors = inputs(15)
    plain = backend.run("rattention", tensors, {"window": 3})
    strange = {n: np.asfortranarray(x)[..., ::-1][..., ::-1] for n, x in tensors.items()}
    for x in strange.values():
        x.flags.writeable = False
    found = backend.run("rattention", strange, {"window": 3})
    for name, x in found.items():
        np.testing.assert_array_equal(x, plain[name])
        assert not any(np.shares_memory(x, y) for y in strange.values())
        assert x.flags.writeable
