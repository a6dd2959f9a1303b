"""The Pallas kernels in the TPU interpreter against the reference: values, gradients, poison, and what ran."""

from __future__ import annotations

from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from rattention.jax.pallas import Config, ops
from rattention.jax.pallas_adapter import backend, fast_to_compile
from rattention.spec import Unsupported, validate

budget = pytest.importorskip("rattention.numpy.budget", reason="the reference's error budget is not built")

rng = np.random.default_rng(20261123)


def normal(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return rng.standard_normal(shape).astype(dtype)


def inputs(T: int, dtype: Any = np.float32, B: int = 1, Hkv: int = 2, G: int = 2, D: int = 16, Dv: int = 8) -> dict:
    angle = rng.uniform(-3, 3, (T + 40, D // 2))
    return {
        "q": normal(B, T, Hkv * G, D, dtype=dtype),
        "k": normal(B, T, Hkv, D, dtype=dtype),
        "v": normal(B, T, Hkv, Dv, dtype=dtype),
        "swa_weight": normal(Hkv * G, Dv),
        "rla_weight": normal(Hkv * G, Dv, dtype=dtype),
        "rope_cos": np.cos(angle).astype(np.float32),
        "rope_sin": np.sin(angle).astype(np.float32),
        "q_scale": normal(D),
        "k_scale": normal(D, dtype=dtype),
        "memory": normal(Hkv * G, 2 * D, Dv),
        "initial_state": normal(B, Hkv, 2 * D, Dv),
    }


def within(expected: dict, found: dict) -> None:
    assert set(found) == set(expected)
    for name, (value, allowed) in expected.items():
        got = np.asarray(found[name]).astype(np.float64)
        assert got.shape == value.shape, name
        assert not np.any(np.isnan(got)), f"{name} holds NaN"
        excess = np.abs(got - value) - allowed
        assert np.all(excess <= 0), f"{name} is off by {excess.max()} more than its budget"


def check(op: str, tensors: dict, attrs: dict, kernels: list[str]) -> None:
    """Within the budget of the reference, by exactly these kernels; no race (the adapter raises on one)."""
    found = backend.run(op, tensors, attrs)
    within(budget.evaluate(op, tensors, validate(op, tensors, attrs).attributes), found)
    assert found.metadata["path"] == "pallas"
    assert found.metadata["kernels"] == kernels


def cotangents(op: str, tensors: dict, attrs: dict) -> dict:
    call = validate(op, tensors, attrs)
    dtypes = call.output_dtypes({name: str(x.dtype) for name, x in tensors.items()})
    shapes = call.output_shapes().items()
    names = [t.name for t in call.operation.outputs if t.differentiable]
    return tensors | {f"d_{n}": normal(*s, dtype=ml_dtypes.bfloat16 if dtypes[n] == "bfloat16" else dtypes[n])
                      for n, s in shapes if n in names}  # fmt: skip


@pytest.mark.parametrize(("T", "w"), [(70, 31), (70, 40), (40, -1), (33, 32), (40, None)])
def test_every_optional_tensor_at_window_borders(T: int, w: int | None) -> None:
    check("rattention", inputs(T), {"window": w}, ["rattention_forward"])


@pytest.mark.parametrize(("T", "w", "dtype"), [(70, 31, np.float32), (50, 20, ml_dtypes.bfloat16)])
def test_gradients(T: int, w: int, dtype: Any) -> None:
    tensors = cotangents("rattention", inputs(T, dtype), {"window": w})
    check("rattention.vjp", tensors, {"window": w}, ["rattention_forward", "rattention_backward"])


def test_packed_documents_with_poisoned_padding() -> None:
    T = 70
    tensors = inputs(T, B=3)
    ids = np.zeros((3, T), np.int32)
    ids[0, 10:23], ids[0, 23:35], ids[0, 36:63] = 7, 2, 9
    ids[1] = 4
    tensors["segment_ids"] = ids
    tensors = cotangents("rattention", tensors, {"window": 20})
    for name in ("q", "k", "v", "d_out"):
        tensors[name][ids == 0] = np.nan
    check("rattention.vjp", tensors, {"window": 20}, ["rattention_forward", "rattention_backward"])


def test_documents_in_an_endless_window_do_not_share_the_initial_state() -> None:
    """At window None no fold drops it: the final state of the last document is not the first one's (SEG-7)."""
    tensors = {n: x for n, x in inputs(50, B=2).items() if not n.startswith("rope")}
    ids = np.ones((2, 50), np.int32)
    ids[0, 20:] = 2
    tensors = cotangents("rattention", tensors | {"segment_ids": ids}, {"window": None})
    check("rattention.vjp", tensors, {"window": None}, ["rattention_forward", "rattention_backward"])


@pytest.mark.parametrize(
    ("T", "w", "kernel"),
    [(3, 11, "rattention_decode"), (1, 20, "rattention_decode"), (20, 20, "rattention_forward"),
     (5, -1, "rattention_forward"), (5, None, "rattention_forward")],
)  # fmt: skip
def test_extend_ragged_with_poisoned_slots(T: int, w: int | None, kernel: str) -> None:
    W = 9 if w is None else max(w, 0)
    tensors = inputs(T, B=3)
    del tensors["initial_state"]
    tensors |= {"cache_k": normal(3, W, 2, 16), "cache_v": normal(3, W, 2, 8), "cache_state": normal(3, 2, 32, 8)}
    tensors["cache_length"] = np.array([0, min(3, W) if w is None else 3, W if w is None else 25], np.int32)
    tensors["lengths"] = np.array([T, T // 2, T], np.int32)
    for b in range(3):
        for name in ("cache_k", "cache_v"):
            tensors[name][b, : W - min(int(tensors["cache_length"][b]), W)] = np.nan
        for name in "qkv":
            tensors[name][b, tensors["lengths"][b] :] = np.nan
    check("rattention_extend", tensors, {"window": w}, [kernel])
    if T == 3:
        tensors = cotangents("rattention_extend", tensors, {"window": w})
        kernels = [kernel, "rattention_forward", "rattention_backward"]
        check("rattention_extend.vjp", tensors, {"window": w}, kernels)


def test_single_branches() -> None:
    t = inputs(50)
    soft = {n: t[n] for n in ("q", "k", "v", "rope_cos", "rope_sin")}
    soft = cotangents("sliding_window_attention", soft, {"window": 15})
    check("sliding_window_attention.vjp", soft, {"window": 15}, ["swa_forward", "swa_backward"])
    lin = {n: t[n] for n in ("q", "k", "v", "q_scale", "initial_state")}
    lin = cotangents("residual_linear_attention", lin, {"window": 15, "feature_map": "relu"})
    check("residual_linear_attention.vjp", lin, {"window": 15, "feature_map": "relu"}, ["rla_forward", "rla_backward"])


@pytest.mark.parametrize(
    "config",
    [
        Config(chunk=16, blocks=2, heads=1, backward_heads=1, lag=2),  # state rebuilt inside a step, tasks staggered
        Config(chunk=16, blocks=2, rolled=True),  # query heads of the backward in a loop
        Config(chunk=16, blocks=1, rolled=True, tiles=2),  # a loop over the window in it
        Config(chunk=16, blocks=3, heads=2, backward_heads=2, tiles=2),  # the window in a loop, online softmax
    ],
)
def test_configurations_agree(config: Config) -> None:
    w = 31 if config.tiles > 2 else 90
    tensors = inputs(140 if w == 90 else 75)
    if not config.rolled or w == 90:
        tensors = {n: x for n, x in tensors.items() if n not in ("memory", "rope_cos", "rope_sin")}
    tensors = cotangents("rattention", tensors, {"window": w})
    primal = {n: x for n, x in tensors.items() if not n.startswith("d_")}
    call = validate("rattention", primal, {"window": w})

    def program(x: dict, d: dict) -> Any:
        out, pull = jax.vjp(lambda x: ops.run(call, x, settings=config), x)
        return out, pull(d)[0]

    fast = jax.jit(program, compiler_options=fast_to_compile())
    out, gradients = fast(primal, {n[2:]: x for n, x in tensors.items() if n.startswith("d_")})
    within(budget.evaluate("rattention", primal, call.attributes), out)
    found = {f"d_{n}": x for n, x in gradients.items() if not n.startswith("rope")}
    within(budget.evaluate("rattention.vjp", tensors, call.attributes), found)


def test_gradients_at_great_logits() -> None:
    """Logits of 1000, whose rounding is not that of the forward where they are made again."""
    tensors = inputs(40)
    for name in "qk":
        tensors[name] = tensors[name] * np.float32(25)
    tensors = cotangents("rattention", tensors, {"window": 9})
    check("rattention.vjp", tensors, {"window": 9}, ["rattention_forward", "rattention_backward"])


def test_gradients_at_vast_logits_are_finite() -> None:
    """Logits of 1e30, where the backward's scores and the forward's differ by more than an exponent holds."""
    tensors = {n: x for n, x in inputs(24, B=2).items() if not n.startswith("rope")}
    for name in "qk":
        tensors[name] = (np.round(tensors[name] * 2) * 5e14).astype(np.float32)
    angle = np.arange(24)[:, None] / 10.0 ** np.arange(8)
    tensors |= {"rope_cos": np.cos(angle).astype(np.float32), "rope_sin": np.sin(angle).astype(np.float32)}
    found = backend.run("rattention.vjp", cotangents("rattention", tensors, {"window": 5}), {"window": 5})
    assert {name: int(np.sum(~np.isfinite(x))) for name, x in found.items() if not np.all(np.isfinite(x))} == {}


def test_what_the_kernels_lack_is_refused() -> None:
    half = {n: x.astype(np.float16) if n in "qkv" else x for n, x in inputs(5).items() if n != "rla_weight"}
    half["rla_weight"] = half["swa_weight"]
    half["k_scale"] = half["q_scale"]
    with pytest.raises(Unsupported, match="float16"):
        backend.run("rattention", half, {"window": 2})
    with pytest.raises(Unsupported, match="no Pallas kernel"):
        backend.run("feature_map", {"x": inputs(5)["q"]}, {})
