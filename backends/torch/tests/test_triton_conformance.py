"""The Triton kernels under the interpreter against the reference's error budget, clause by clause.

Without a GPU the kernels run on CPU tensors: TRITON_INTERPRET must be set before they are imported.
"""

import os
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from rattention.numpy import budget
from rattention.torch.triton_adapter import backend

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}


def case(op, *, seed=0, B=1, T=70, Hq=2, Hkv=1, D=16, Dv=16, window: int | None = 20, dtype="float32",
         feature_map="softmax", options=(), segments=None, held=0, cached=None, lengths=None):  # fmt: skip
    """Tensors and attributes of one call; inert elements hold NaN. `segments`: (padding, length) pairs per row."""
    rng = np.random.default_rng(seed)
    storage = DTYPES[dtype]
    base = op.removesuffix(".vjp")
    F = D if feature_map == "identity" else 2 * D

    def normal(*shape, to=DTYPES["float32"]):
        return rng.standard_normal(shape).astype(to)

    t = {
        "q": normal(B, T, Hq, D, to=storage),
        "k": normal(B, T, Hkv, D, to=storage),
        "v": (0.3 + normal(B, T, Hkv, Dv)).astype(storage),
    }
    attrs: dict[str, Any] = {"window": window}
    if base != "sliding_window_attention":
        attrs["feature_map"] = feature_map
    if base in ("rattention", "rattention_extend"):
        t |= {"swa_weight": normal(Hq, Dv), "rla_weight": normal(Hq, Dv, to=storage)}
    if "rope" in options:
        angle = rng.uniform(0, 6, (T + 200, D // 2))
        t |= {"rope_cos": np.cos(angle).astype(np.float32), "rope_sin": np.sin(angle).astype(np.float32)}
    if "positions" in options:
        t["positions"] = rng.integers(0, T + 200, (B, T)).astype(np.int32)
    if "scales" in options:
        t |= {"q_scale": normal(D), "k_scale": normal(D)}
    if "memory" in options:
        t["memory"] = normal(Hq, F, Dv)
    if "initial_state" in options:
        t["initial_state"] = normal(B, Hkv, F, Dv)
    if segments is not None:
        ids = np.zeros((B, T), np.int32)
        for b, row in enumerate(segments):
            at = 0
            for i, (padding, length) in enumerate(row):
                ids[b, at + padding : at + padding + length] = 7 - i
                at += padding + length
        t["segment_ids"] = ids
        for name in ("q", "k", "v"):
            t[name][ids == 0] = np.nan
    if base == "rattention_extend":
        W = held if window is None else max(window, 0)
        seen = np.array(cached, np.int32)
        t |= {"cache_k": normal(B, W, Hkv, D, to=storage), "cache_v": normal(B, W, Hkv, Dv, to=storage)}
        t |= {"cache_state": normal(B, Hkv, F, Dv), "cache_length": seen}
        for b in range(B):
            for name in ("cache_k", "cache_v"):
                t[name][b, : max(W - seen[b], 0)] = np.nan
        if lengths is not None:
            t["lengths"] = np.array(lengths, np.int32)
            for b in range(B):
                for name in ("q", "k", "v"):
                    t[name][b, lengths[b] :] = np.nan
    if op.endswith(".vjp"):
        t["d_out"] = normal(B, T, Hq, Dv, to=storage)
        if base in ("rattention", "residual_linear_attention"):
            t["d_final_state"] = normal(B, Hkv, F, Dv)
        if base == "rattention_extend":
            kept = t["cache_k"].shape[1] + (T if window is None else 0)
            t |= {"d_cache_k": normal(B, kept, Hkv, D, to=storage), "d_cache_v": normal(B, kept, Hkv, Dv, to=storage)}
            t["d_cache_state"] = normal(B, Hkv, F, Dv)
    return t, attrs


def judge(op, tensors, attrs, kernel):
    """Every output within its budget, NaN where the formulas make NaN, and `kernel` among those launched."""
    before = {name: x.tobytes() for name, x in tensors.items()}
    got = backend.run(op, tensors, attrs)
    assert {name: x.tobytes() for name, x in tensors.items()} == before, "an input was modified"
    assert kernel in got.metadata["kernels"]
    assert set(got.metadata["kernels"]) <= set(backend.describe()["kernels"])
    for name, (value, allowed) in budget.evaluate(op, tensors, attrs).items():
        x = got[name].astype(np.float64)
        assert np.array_equal(np.isnan(x), np.isnan(value)), f"{name}: NaN in the wrong places"
        wrong = np.abs(x - value) > allowed
        assert not wrong.any(), (
            f"{name}: {wrong.sum()} of {wrong.size} outside the budget, first {np.argwhere(wrong)[0]}"
        )


ALL = ("rope", "scales", "memory", "initial_state")
TWO = [[(5, 30), (0, 20), (3, 9)], [(0, 0), (40, 30)]]


@pytest.mark.parametrize("window", [-1, 0, 20, 33, 69, 200, None])
@pytest.mark.parametrize("vjp", ["", ".vjp"])
def test_every_window(window, vjp):
    """SWA-1, SWA-5, SWA-6, RLA-1, RLA-4, RLA-5, RLA-6, RLA-9, RAT-1, RAT-2, GRAD-1, GRAD-2."""
    judge("rattention" + vjp, *case("rattention" + vjp, window=window, options=ALL), "query_grad" if vjp else "attend")


@pytest.mark.parametrize("window", [-1, 0, 13, None])
@pytest.mark.parametrize("vjp", ["", ".vjp"])
def test_segments_and_padding(window, vjp):
    """SEG-1 .. SEG-8, GRAD-5: padding holds NaN on either side and between segments."""
    op = "rattention" + vjp
    made = case(op, B=2, window=window, segments=TWO, options=("rope", "initial_state"))
    judge(op, *made, "query_grad" if vjp else "attend")


@pytest.mark.parametrize(
    ("D", "Dv", "Hq", "Hkv", "feature_map", "dtype"),
    [
        (7, 5, 3, 3, "relu", "float32"),
        (24, 20, 6, 2, "identity", "bfloat16"),
        (80, 130, 3, 1, "softmax", "float16"),
        (256, 256, 2, 2, "softmax", "bfloat16"),
        (1, 1, 8, 1, "softmax", "float32"),
    ],
)
@pytest.mark.parametrize("vjp", ["", ".vjp"])
def test_shapes_maps_and_dtypes(D, Dv, Hq, Hkv, feature_map, dtype, vjp):
    """SWA-4, RLA-8, FM-1 .. FM-5, RAT-3, GRAD-3, NUM-1, NUM-2: head dims off the powers of two, groups of any size."""
    op = "rattention" + vjp
    options = ("scales", "initial_state") + (("rope", "positions") if D % 2 == 0 else ())
    made = case(op, T=40, D=D, Dv=Dv, Hq=Hq, Hkv=Hkv, window=5, feature_map=feature_map, dtype=dtype, options=options)
    judge(op, *made, "query_grad" if vjp else "attend")


@pytest.mark.parametrize("vjp", ["", ".vjp"])
def test_the_state_of_float16_passes_its_range(vjp):
    """NUM-3, RLA-2: a state beyond 65504 with a normalised output that float16 holds."""
    op = "rattention" + vjp
    tensors, attrs = case(op, T=150, window=10, dtype="float16", feature_map="relu")
    tensors["k"] = (tensors["k"] * 30).astype(np.float16)
    tensors["v"] = (tensors["v"] * 300).astype(np.float16)
    judge(op, tensors, attrs, "local_states")


@pytest.mark.parametrize("op", ["rattention", "rattention.vjp", "rattention_extend"])
def test_rotation_may_lengthen_float16_past_its_range(op):
    """SWA-3, ROPE-3: channels near 65504, whose rotated pairs reach sqrt(2) times as far."""
    tensors, attrs = case(
        op, T=6 if "extend" not in op else 1, window=2, dtype="float16", options=("rope",), cached=[9]
    )
    for name in ("q", "k", "cache_k"):
        if name in tensors:
            tensors[name] = (6e4 * np.sign(tensors[name].astype(np.float32))).astype(np.float16)
    turned = np.full_like(tensors["rope_cos"], np.sqrt(0.5))
    tensors |= {"rope_cos": turned, "rope_sin": turned}
    attrs["scale"] = 1e-9
    judge(op, tensors, attrs, "query_grad" if "vjp" in op else "decode" if "extend" in op else "attend")


@pytest.mark.parametrize("op", ["sliding_window_attention", "residual_linear_attention"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vjp", ["", ".vjp"])
def test_single_branches(op, dtype, vjp):
    """SWA-2, SWA-3, RLA-2, RLA-3, RLA-7."""
    options = ("rope",) if op.startswith("s") else ("scales", "memory", "initial_state")
    made = case(op + vjp, dtype=dtype, options=options, segments=[[(3, 60)]])
    judge(op + vjp, *made, "query_grad" if vjp else "attend")


@pytest.mark.parametrize("window", [9, 0, -1, None])
@pytest.mark.parametrize("vjp", ["", ".vjp"])
def test_continuation(window, vjp):
    """EXT-3 .. EXT-11, GRAD-4: rows of different ages, one of them without new tokens, NaN in unused slots."""
    op = "rattention_extend" + vjp
    cached = [3, 0, 5] if window is None else [3, 0, 40]
    made = case(op, B=3, T=20, window=window, held=5, cached=cached, lengths=[20, 7, 0], options=("rope", "scales"))
    judge(op, *made, "query_grad" if vjp else "attend")


@pytest.mark.parametrize("window", [70, 1, 0, -1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_decode(window, dtype):
    """EXT-5, EXT-8: one token per row through the decode kernel."""
    made = case("rattention_extend", B=3, T=1, Hq=6, Hkv=2, window=window, dtype=dtype, cached=[200, 40, 0],
                lengths=[1, 1, 0], options=("rope", "memory"))  # fmt: skip
    judge("rattention_extend", *made, "decode")


@pytest.mark.parametrize("feature_map", ["softmax", "relu", "identity"])
def test_feature_map(feature_map):
    """FM-1 .. FM-5."""
    rng = np.random.default_rng(0)
    x = (30 * rng.standard_normal((2, 5, 3, 10))).astype(np.float32)
    d = rng.standard_normal((2, 5, 3, 10 if feature_map == "identity" else 20)).astype(np.float32)
    judge("feature_map", {"x": x}, {"feature_map": feature_map}, "feature_map")
    judge("feature_map.vjp", {"x": x, "d_out": d}, {"feature_map": feature_map}, "feature_map_grad")


def test_rms_mix():
    """MIX-1 .. MIX-3: a row of zeros included."""
    rng = np.random.default_rng(0)
    swa, rla, d = (rng.standard_normal((2, 70, 3, 10)).astype(np.float32) for _ in range(3))
    swa[0, 0] = 0
    weights = {f"{name}_weight": rng.standard_normal((3, 10)).astype(np.float32) for name in ("swa", "rla")}
    judge("rms_mix", {"swa": swa, "rla": rla, **weights}, {}, "mix")
    judge("rms_mix.vjp", {"swa": swa, "rla": rla, **weights, "d_out": d}, {}, "mix_grad")


def test_rope_table():
    """ROPE-1, ROPE-2: positions whose angle float32 could not hold."""
    positions = np.array([0, 1, 5, 100, 100_000, 2**31 - 1], np.int32)
    judge("rope_table", {"positions": positions}, {"head_dim": 12}, "rope_table")


@pytest.mark.parametrize("op", ["rattention", "rattention.vjp"])
@pytest.mark.parametrize(("B", "T"), [(0, 5), (2, 0)])
def test_nothing_to_do(op, B, T):
    """ERR-12: shapes and dtypes as ever; final_state is initial_state."""
    tensors, attrs = case(op, B=B, T=T, options=ALL)
    got = backend.run(op, tensors, attrs)
    for name, (value, _) in budget.evaluate(op, tensors, attrs).items():
        assert got[name].shape == value.shape
        np.testing.assert_array_equal(got[name].astype(np.float64), value)


def test_reruns_are_bit_equal():
    """NUM-4."""
    tensors, attrs = case("rattention.vjp", B=2, Hq=4, Hkv=2, window=11, dtype="bfloat16", options=ALL)
    one, two = (backend.run("rattention.vjp", tensors, attrs) for _ in range(2))
    for name in one:
        assert one[name].tobytes() == two[name].tobytes(), name
