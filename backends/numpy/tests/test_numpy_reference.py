"""The reference as a package: public functions, adapter, cache laws, rounding, cost, imports."""

from __future__ import annotations

import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import rattention.numpy as ra
from rattention.numpy import adapter, quadratic, recurrent
from rattention.numpy.storage import round_once
from rattention.spec import SpecError, load

SEQUENCES = ["sliding_window_attention", "residual_linear_attention", "rattention", "rattention_extend"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("op", list(load().operations))
def test_adapter_returns_every_output_in_its_dtype_and_leaves_inputs_alone(op, dtype, draw_call):
    """BCK-2, GRAD-6, ERR-13, NUM-7; the outputs are the quadratic form rounded once."""
    rng = np.random.default_rng(17)
    for _ in range(4):
        call = draw_call(rng, op, dtype)
        before = {n: x.copy() for n, x in call.tensors.items()}
        for x in call.tensors.values():
            x.flags.writeable = False
        result = adapter.backend.run(op, call.tensors, call.attrs)
        checked = quadratic.check(op, call.tensors, call.attrs)
        shapes = checked.output_shapes()
        dtypes = checked.output_dtypes({n: str(x.dtype) for n, x in call.tensors.items()})
        assert {n: (x.shape, str(x.dtype)) for n, x in result.items()} == {n: (shapes[n], dtypes[n]) for n in shapes}
        for n, x in call.tensors.items():
            np.testing.assert_array_equal(x, before[n])
            assert not any(np.shares_memory(x, y) for y in result.values())
        exact = quadratic.run(op, call.tensors, call.attrs)
        for n, x in result.items():
            ulp = {"float32": 2**-23, "bfloat16": 2**-7, "float16": 2**-10}.get(dtypes[n], 0)
            error = np.abs(x.astype(np.float64) - exact[n])
            assert (error <= ulp * np.abs(exact[n]) + 1e-7).all()
        assert result.metadata == {"path": "recurrent", "kernels": []}


def test_adapter_refuses_float64():
    """ERR-4: wider storage is for derivatives by differences, not for the contract."""
    x = np.zeros((1, 1, 1, 2))
    with pytest.raises(SpecError, match="ERR-4"):
        adapter.backend.run("feature_map", {"x": x}, {})
    assert ra.feature_map(x).dtype == np.float64


def test_round_once_does_not_round_twice():
    """Just above the middle of two bfloat16 numbers, and closer to the middle than float32 can tell."""
    x = np.array([1 + 2.0**-8 + 2.0**-30, 1 + 2.0**-8, 1 + 2.0**-8 - 2.0**-30, -1 - 2.0**-8 - 2.0**-30, np.inf, 3.4e38])
    got = round_once(x, "bfloat16")
    expected = [1 + 2.0**-7, 1.0, 1.0, -1 - 2.0**-7, np.inf, np.float32(3.4e38).astype(ml_dtypes.bfloat16)]
    np.testing.assert_array_equal(got.astype(np.float64), np.array(expected, np.float64))
    assert x.astype(ml_dtypes.bfloat16)[0] == 1.0  # what the plain cast makes of it
    assert np.isnan(round_once(np.array(np.nan), "bfloat16").astype(np.float64))


def case(rng, B, T, window, N=2, G=2, D=4, Dv=3):
    """q, k, v, both weights and an empty cache."""
    q, k, v = (rng.standard_normal((B, T, h, d)) for h, d in ((N * G, D), (N, D), (N, Dv)))
    weights = rng.standard_normal((2, N * G, Dv))
    return q, k, v, weights, ra.Cache.empty(B, N, D, Dv, window=window, dtype=np.float64)


@pytest.mark.parametrize("window", [-1, 0, 1, 3, 7, 20, None])
def test_every_split_of_a_sequence_gives_the_same(window):
    """EXT-1, EXT-2, EXT-6, EXT-8: rows of different lengths, rotary positions running on."""
    rng = np.random.default_rng(29)
    T = 8
    q, k, v, (a, b), empty = case(rng, 2, T, window)
    cos, sin = (x.astype(np.float64) for x in ra.rope_table(np.arange(T, dtype=np.int32), head_dim=4))
    memory = rng.standard_normal((4, 8, 3))
    options = {"rope_cos": cos, "rope_sin": sin, "memory": memory, "window": window}
    whole, state = ra.rattention(q, k, v, a, b, **options, return_final_state=True)
    for splits in ([8], [1] * 8, [3, 0, 4, 1], [5, 3]):
        cache, outs, at = empty, [], 0
        for n in splits:
            s = slice(at, at + n)
            out, cache = ra.rattention_extend(q[:, s], k[:, s], v[:, s], a, b, cache, **options)
            outs.append(out)
            at += n
        np.testing.assert_allclose(np.concatenate(outs, 1), whole, rtol=0, atol=1e-13)
        np.testing.assert_allclose(cache.state, state, rtol=0, atol=1e-13)
        np.testing.assert_array_equal(cache.length, [T, T])
        slots = T if window is None else max(window, 0)
        kept = min(slots, T)
        np.testing.assert_array_equal(cache.k[:, slots - kept :], k[:, T - kept :])
        np.testing.assert_array_equal(cache.k[:, : slots - kept], 0)


def test_ragged_rows_advance_each_by_its_own_length():
    """EXT-6, EXT-7: two rows extended together equal each extended alone."""
    rng = np.random.default_rng(31)
    q, k, v, (a, b), cache = case(rng, 2, 6, 2)
    together = cache
    for lengths in ([6, 2], [0, 5], [3, 0]):
        n = np.array(lengths, np.int32)
        out, together = ra.rattention_extend(q, k, v, a, b, together, n, window=2)
        assert (out[1, lengths[1] :] == 0).all()
    for row, steps in ((0, (6, 0, 3)), (1, (2, 5, 0))):
        alone = ra.Cache.empty(1, 2, 4, 3, window=2, dtype=np.float64)
        r = slice(row, row + 1)
        for n in steps:
            _, alone = ra.rattention_extend(q[r, :n], k[r, :n], v[r, :n], a, b, alone, window=2)
        np.testing.assert_allclose(together.state[r], alone.state, rtol=0, atol=1e-14)
        np.testing.assert_array_equal(together.k[r], alone.k)
        assert together.length[row] == alone.length[0]


def test_cost_of_a_decoded_token_does_not_depend_on_what_came_before():
    """Every array that one step touches has the same shape at position 3 and at position 2^30."""
    rng = np.random.default_rng(37)
    q, k, v, (a, b), cache = case(rng, 1, 1, 5)

    def shapes(length: int) -> list[tuple[int, ...]]:
        tensors = {"q": q, "k": k, "v": v, "swa_weight": a, "rla_weight": b, "cache_k": cache.k, "cache_v": cache.v}
        tensors |= {"cache_state": cache.state, "cache_length": np.array([length], np.int32)}
        call = quadratic.check("rattention_extend", tensors, {"window": 5})
        s = recurrent.sequence(call, {n: np.asarray(x, np.float64) for n, x in tensors.items()})
        m = recurrent.Mechanism(s, s.state, None)
        m.begin(0)
        arrays = [x for x in vars(s).values() if isinstance(x, np.ndarray)] + [*m.window(0), m.read_state(0), m.state]
        return [x.shape for x in arrays]

    assert shapes(3) == shapes(2**30)


def test_padding_alone_returns_the_initial_state():
    """SEG-8, and SEG-7 where another segment is the last."""
    rng = np.random.default_rng(41)
    q, k, v, _, _ = case(rng, 2, 4, 1)
    initial = rng.standard_normal((2, 2, 8, 3))
    ids = np.array([[0, 0, 0, 0], [3, 0, 1, 0]], np.int32)
    for form in (quadratic.run, recurrent.run):
        tensors = {"q": q, "k": k, "v": v, "initial_state": initial, "segment_ids": ids}
        final = form("residual_linear_attention", tensors, {"window": 1})["final_state"]
        np.testing.assert_array_equal(final[0], initial[0])
        np.testing.assert_array_equal(final[1], 0)  # one token, still inside the ring


def test_window_beyond_int32_is_only_a_window():
    rng = np.random.default_rng(43)
    q, k, v, (a, b), _ = case(rng, 1, 5, 1)
    far = ra.rattention(q, k, v, a, b, window=2**40)
    np.testing.assert_allclose(far, ra.rattention(q, k, v, a, b, window=None), rtol=1e-14)


def test_import_loads_no_framework():
    code = (
        "import sys; import rattention.numpy, rattention.numpy.adapter, rattention.numpy.budget; "
        "loaded = {m.split('.')[0] for m in sys.modules}; "
        "assert not loaded & {'torch', 'jax', 'jaxlib', 'triton'}, loaded"
    )
    path = [p for p in sys.path if p]
    subprocess.run([sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}; {code}"], check=True)


@pytest.mark.parametrize("op", [o for o in load().operations if o.endswith(".vjp")])
def test_strides_change_no_bit(op, draw_call):
    """NUM-7 in float64 too: sums are taken in the order of the indices, not of the memory."""
    rng = np.random.default_rng(23)
    for _ in range(6):
        call = draw_call(rng, op, "float32")
        plain = recurrent.run(op, call.tensors, call.attrs)
        views = recurrent.run(op, {n: np.asfortranarray(x) for n, x in call.tensors.items()}, call.attrs)
        for name, x in plain.items():
            np.testing.assert_array_equal(views[name], x, err_msg=name)
