"""The public functions as a JAX user calls them: jit, vmap, grad, checkpoint, donation, 64-bit mode, refusals."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rattention.jax import (
    Cache,
    SpecError,
    Unsupported,
    feature_map,
    rattention,
    rattention_extend,
    residual_linear_attention,
    rms_mix,
    rope_table,
    sliding_window_attention,
)

rng = np.random.default_rng(7)
B, T, HQ, HKV, D, DV, W = 2, 150, 4, 2, 8, 6, 9


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


@pytest.fixture
def qkvw() -> tuple[jax.Array, ...]:
    return normal(B, T, HQ, D), normal(B, T, HKV, D), normal(B, T, HKV, DV), normal(HQ, DV), normal(HQ, DV)


def close(x: jax.Array, y: jax.Array, tolerance: float = 2e-5) -> None:
    """Same computation in another arrangement: equal up to float32 rounding of the largest element."""
    np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * max(float(jnp.abs(y).max()), 1))


def test_the_parts_compose_to_the_whole(qkvw) -> None:
    q, k, v, a, b = qkvw
    cos, sin = rope_table(np.arange(T, dtype=np.int32), head_dim=D)
    out, state = rattention(q, k, v, a, b, cos, sin, window=W, return_final_state=True)
    swa = sliding_window_attention(q, k, v, cos, sin, window=W)
    rla, state2 = residual_linear_attention(q, k, v, window=W, return_final_state=True)
    close(rms_mix(swa, rla, a, b), out)
    close(state, state2)
    folded = feature_map(k[:, : T - W])
    close(jnp.einsum("bthf,bthv->bhfv", folded, v[:, : T - W], precision="highest"), state)


def test_jit_vmap_grad_checkpoint(qkvw) -> None:
    def loss(*args: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(rattention(*args, window=W)))

    every = (0, 1, 2, 3, 4)
    plain = jax.grad(loss, argnums=every)(*qkvw)
    compiled = jax.jit(jax.grad(loss, argnums=every))
    for other in (compiled, jax.jit(jax.grad(jax.checkpoint(loss), argnums=every))):
        jax.tree.map(close, other(*qkvw), plain)
    stacked = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), qkvw)
    mapped = jax.jit(jax.vmap(jax.grad(loss, argnums=every)))(*stacked)
    jax.tree.map(lambda x, y: close(x[0], y), mapped, plain)
    jax.tree.map(lambda x, y: close(x[1], y), mapped, compiled(*(2 * x for x in qkvw)))


def test_the_gradient_of_a_long_call_is_that_of_its_split(qkvw) -> None:
    """The scan's own derivative against automatic differentiation of single-chunk calls joined by the cache."""

    def whole(*args: jax.Array) -> jax.Array:
        out, state = rattention(*args, window=W, return_final_state=True)
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(state))

    def split(q, k, v, a, b):
        cache, total = Cache.empty(B, HKV, D, DV, window=W), 0.0
        for at in range(0, T, 50):
            part = slice(at, at + 50)
            out, cache = rattention_extend(q[:, part], k[:, part], v[:, part], a, b, cache, window=W)
            total += jnp.sum(jnp.sin(out))
        return total + jnp.sum(jnp.cos(cache.state))

    jax.tree.map(
        close, jax.grad(whole, argnums=(0, 1, 2, 3, 4))(*qkvw), jax.grad(split, argnums=(0, 1, 2, 3, 4))(*qkvw)
    )


def test_float64_when_enabled(qkvw) -> None:
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x), jnp.float64) for x in qkvw]
        out, state = rattention(*wide, window=W, return_final_state=True)
        assert (out.dtype, state.dtype) == (jnp.float64, jnp.float64)

        def f(q: jax.Array) -> jax.Array:
            return jnp.sum(jnp.sin(rattention(q, *wide[1:], window=W)))

        step = 1e-6 * jnp.asarray(rng.standard_normal(wide[0].shape))
        numeric = (f(wide[0] + step) - f(wide[0] - step)) / 2
        np.testing.assert_allclose(jnp.vdot(jax.grad(f)(wide[0]), step), numeric, rtol=1e-6)
    with pytest.raises(SpecError, match="ERR-4"):
        rattention(*(np.asarray(x, np.float64) for x in qkvw), window=W)


def test_second_derivatives(qkvw) -> None:
    """Through the scan's own derivative: reverse over reverse and forward over reverse, against differences."""
    with jax.enable_x64(True):
        q, *others = (jnp.asarray(np.asarray(x[:1]), jnp.float64) for x in qkvw[:3])
        weights = [jnp.asarray(np.asarray(x), jnp.float64) for x in qkvw[3:]]
        gradient = jax.grad(lambda q: jnp.sum(jnp.sin(rattention(q, *others, *weights, window=W))))
        u = jnp.asarray(rng.standard_normal(q.shape))

        @jax.jit
        def products(q: jax.Array) -> Any:
            first, forward = jax.jvp(gradient, (q,), (u,))
            return first, forward, jax.grad(lambda q: jnp.vdot(gradient(q), u))(q)

        _, forward, reverse = products(q)
        numeric = (products(q + 1e-6 * u)[0] - products(q - 1e-6 * u)[0]) / 2e-6
        scale = float(jnp.abs(numeric).max())
        np.testing.assert_allclose(forward, numeric, rtol=0, atol=1e-7 * scale)
        np.testing.assert_allclose(reverse, forward, rtol=0, atol=1e-11 * scale)
        with pytest.raises(TypeError, match="forward-mode"):
            jax.jvp(lambda q: rattention(q, *others, *weights, window=W), (q,), (u,))


def test_decode_with_a_donated_cache(qkvw) -> None:
    q, k, v, a, b = qkvw
    expected, state = rattention(q, k, v, a, b, window=W, return_final_state=True)
    step = jax.jit(lambda cache, q, k, v: rattention_extend(q, k, v, a, b, cache, window=W), donate_argnums=0)
    cache, outs = Cache.empty(B, HKV, D, DV, window=W), []
    for t in range(60):
        old = cache
        out, cache = step(cache, q[:, t : t + 1], k[:, t : t + 1], v[:, t : t + 1])
        outs.append(out)
        assert old.k.is_deleted()
        assert old.state.is_deleted()
    close(jnp.concatenate(outs, 1), expected[:, :60])
    _, cache = rattention_extend(q[:, 60:], k[:, 60:], v[:, 60:], a, b, cache, window=W)
    close(cache.state, state)
    np.testing.assert_array_equal(cache.length, [T, T])


def test_a_decoded_token_costs_the_same_anywhere() -> None:
    """Nothing in the compiled step has a size that depends on the tokens before it: its shapes are those of the cache,
    and its operation count is that of w + 1 scores and one state."""

    def flops(window: int) -> Any:
        cache = Cache.empty(1, HKV, D, DV, window=window)
        shapes = (1, 1, HQ, D), (1, 1, HKV, D), (1, 1, HKV, DV), (HQ, DV), (HQ, DV)
        args = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
        step = jax.jit(lambda cache, *x: rattention_extend(*x, cache=cache, window=window))
        return step.lower(cache, *args).compile().cost_analysis()["flops"]  # pyright: ignore[reportOptionalSubscript]

    one, two, four = flops(64), flops(128), flops(256)
    assert (four - two) == pytest.approx(2 * (two - one), rel=0.05)


def test_values_are_checked_where_they_can_be_read(qkvw) -> None:
    torn = np.ones((B, T), np.int32)
    torn[0, 5] = 2
    with pytest.raises(SpecError, match="ERR-8"):
        rattention(*qkvw, segment_ids=torn, window=W)
    with pytest.raises(SpecError, match="ERR-8"):
        rattention(*qkvw, segment_ids=jnp.asarray(torn), window=W)
    with pytest.raises(Unsupported, match="segment_ids"):
        jax.jit(lambda ids: rattention(*qkvw, segment_ids=ids, window=W, check_values=True))(torn)
    with pytest.raises(SpecError, match="ERR-4"):  # not cut down to int32 in silence
        rattention(*qkvw, segment_ids=np.ones((B, T), np.int64), window=W)


def test_refusals(qkvw) -> None:
    with pytest.raises(SpecError, match="ERR-5"):
        rattention(*qkvw, window=W, impl="cuda")
    with pytest.raises(Unsupported, match="64"):
        jax.jit(lambda p: rope_table(p, head_dim=8))(jnp.arange(3, dtype=jnp.int32))


def test_the_jax_backend_needs_no_other() -> None:
    """Functions, layer, sharding and adapter import and run where Torch and the other backends are missing."""
    code = (
        "import sys\n"
        "for name in ('torch', 'triton', 'rattention.numpy', 'rattention.torch', 'rattention.conformance'):\n"
        "    sys.modules[name] = None\n"
        "import rattention.jax.nn, rattention.jax.sharded\n"
        "from rattention.jax.adapter import backend\n"
        "import numpy as np\n"
        "out = backend.run('feature_map', {'x': np.ones((1, 2, 1, 2), np.float32)}, {})['out']\n"
        "assert out.shape == (1, 2, 1, 4) and abs(out[0, 0, 0, 0] - 0.5) < 1e-6\n"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)
