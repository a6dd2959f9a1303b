"""What must not leak, and what must not be hidden: padding, unused slots, tokens past lengths, NaN in live tokens."""

from __future__ import annotations

import numpy as np
import pytest
from rattention.numpy import quadratic, recurrent

FORMS = [quadratic.run, recurrent.run]
SEQUENCES = ["sliding_window_attention", "residual_linear_attention", "rattention", "rattention_extend"]


def dead_entries(call) -> dict[str, np.ndarray]:
    """For each tensor, the entries along [B, T] or [B, W] that are inert."""
    t = call.tensors
    dead = {}
    if "cache_length" in t:
        W, T = t["cache_k"].shape[1], t["q"].shape[1]
        lengths = t.get("lengths", np.full(len(t["q"]), T))
        unused = np.arange(W)[::-1] >= t["cache_length"][:, None]
        dead |= {n: unused for n in ("cache_k", "cache_v")}
        past = np.arange(T) >= lengths[:, None]
        # A slot of the next cache that holds nothing has a cotangent, and it is inert as well.
        for n in ("d_cache_k", "d_cache_v"):
            if n in t:
                held = np.minimum(t["cache_length"], W) + lengths
                dead[n] = np.arange(t[n].shape[1])[::-1] >= held[:, None]
    elif "segment_ids" in t:
        past = t["segment_ids"] == 0
    else:
        return {}
    return dead | {n: past for n in ("q", "k", "v", "d_out") if n in t}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("op", SEQUENCES + [f"{s}.vjp" for s in SEQUENCES])
def test_inert_entries_change_nothing(op, form, draw_call):
    """SEG-4, SEG-5, EXT-7, EXT-9, GRAD-5: NaN, inf and numbers there give the same bits as zeros."""
    rng = np.random.default_rng(11)
    poisoned = 0
    for _ in range(60):
        call = draw_call(rng, op, options=0.8)
        clean, dirty = dict(call.tensors), dict(call.tensors)
        for name, where in dead_entries(call).items():
            x = call.tensors[name]
            mask = where.reshape(where.shape + (1,) * (x.ndim - 2))
            clean[name] = np.where(mask, 0.0, x)
            dirty[name] = np.where(mask, rng.choice([np.nan, np.inf, -np.inf, 1e30], x.shape), x)
            poisoned += int(where.sum())
        if "positions" in call.tensors and "segment_ids" in call.tensors:
            padding = call.tensors["segment_ids"] == 0
            dirty["positions"] = np.where(padding, -7, call.tensors["positions"]).astype(np.int32)
        expected, got = form(op, clean, call.attrs), form(op, dirty, call.attrs)
        for name, x in expected.items():
            np.testing.assert_array_equal(got[name], x, err_msg=name)
            assert np.isfinite(x).all()
        for name, where in dead_entries(call).items():
            if f"d_{name}" in got:
                assert (got[f"d_{name}"][where] == 0).all()
    assert poisoned > 100


@pytest.mark.parametrize("form", FORMS)
def test_nan_in_a_live_token_surfaces_where_it_is_read_and_nowhere_else(form):
    """NUM-5, NUM-6 in their strictest reading: the reference makes NaN exactly what the formulas make NaN."""
    rng = np.random.default_rng(5)
    B, T, N, G, D, Dv, w = 2, 9, 2, 2, 4, 3, 2
    q, k, v = (rng.standard_normal((B, T, h, d)) for h, d in ((N * G, D), (N, D), (N, Dv)))
    ids = np.tile(np.array([1, 1, 1, 1, 1, 0, 2, 2, 2], np.int32), (B, 1))
    weight = np.ones((N * G, Dv))
    tensors = {"q": q, "k": k, "v": v, "segment_ids": ids}
    gains = {"swa_weight": weight, "rla_weight": weight}

    def nan_of(op, name, at, attrs, extra):
        x = tensors[name].copy()
        x[at] = np.nan
        return np.isnan(form(op, {**tensors, **extra, name: x}, attrs)["out"])

    for op, extra, attrs in (
        ("sliding_window_attention", {}, {"window": w}),
        ("residual_linear_attention", {}, {"window": w}),
        ("rattention", gains, {"window": w}),
    ):
        # Token 1 of row 1: as a query it is its own, and with nothing behind its window the linear branch is 0 (RLA-7);
        # as a key or value it is read by the rest of its segment.
        expected = np.zeros((B, T, N * G, Dv), bool)
        expected[1, 1, 3] = op != "residual_linear_attention"
        np.testing.assert_array_equal(nan_of(op, "q", (1, 1, 3, 0), attrs, extra), expected)
        reads = {"sliding_window_attention": slice(1, 1 + w + 1), "residual_linear_attention": slice(1 + w + 1, 5)}
        expected = np.zeros((B, T, N * G, Dv), bool)
        expected[1, reads.get(op, slice(1, 5)), G:] = True
        np.testing.assert_array_equal(nan_of(op, "k", (1, 1, 1, 0), attrs, extra), expected)
        if op != "rattention":  # through the norm one channel reaches all
            expected[..., 1:] = False
        np.testing.assert_array_equal(nan_of(op, "v", (1, 1, 1, 0), attrs, extra), expected)


@pytest.mark.parametrize("op", SEQUENCES)
def test_both_forms_agree_where_values_are_nan(op, draw_call):
    rng = np.random.default_rng(23)
    found = 0
    for _ in range(60):
        call = draw_call(rng, op)
        name = str(rng.choice(["q", "k", "v"]))
        x = call.tensors[name].copy()
        if not x.size:
            continue
        x.reshape(-1)[rng.integers(0, x.size)] = np.nan
        with np.errstate(all="ignore"):
            one = quadratic.run(op, {**call.tensors, name: x}, call.attrs)
            other = recurrent.run(op, {**call.tensors, name: x}, call.attrs)
        for n in one:
            np.testing.assert_array_equal(np.isnan(one[n]), np.isnan(other[n]), err_msg=f"{n} {call.attrs}")
            found += int(np.isnan(one[n]).any())
    assert found > 10
