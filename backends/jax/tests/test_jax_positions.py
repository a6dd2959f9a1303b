"""Positions without a row in the rotary table on a traced path: NaN where they are read, nothing changed elsewhere
(ERR-16)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import checkify
from rattention.jax import Cache, SpecError, rattention, rattention_extend, rope_table, sliding_window_attention
from rattention.jax.nn import RAttention

rng = np.random.default_rng(3)
B, T, HQ, HKV, D, W = 2, 24, 4, 2, 8, 3


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


Q, K, V, GAIN = normal(B, T, HQ, D), normal(B, T, HKV, D), normal(B, T, HKV, D), normal(HQ, D)
COS, SIN = rope_table(np.arange(T, dtype=np.int32), head_dim=D)


def whole(q: Any, k: Any, v: Any, positions: Any, ids: Any, impl: str, window: int | None = W) -> jax.Array:
    more: dict[str, Any] = {"positions": positions, "segment_ids": ids, "window": window, "impl": impl}
    return rattention(q, k, v, GAIN, GAIN, COS, SIN, **more)


def branch(q: Any, k: Any, v: Any, positions: Any, ids: Any, impl: str, window: int | None = W) -> jax.Array:
    more: dict[str, Any] = {"positions": positions, "segment_ids": ids, "window": window, "impl": impl}
    return sliding_window_attention(q, k, v, COS, SIN, **more)


def nan_tokens(x: jax.Array) -> np.ndarray:
    """`[B, T]`: tokens that hold a NaN, which must then be NaN alone."""
    nan = np.isnan(np.asarray(x)).reshape(*x.shape[:2], -1)
    np.testing.assert_array_equal(np.any(nan, axis=-1), np.all(nan, axis=-1))
    return np.asarray(np.any(nan, axis=-1))


def expected_tokens(bad: np.ndarray, ids: np.ndarray, window: int | None) -> np.ndarray:
    """By a loop: tokens that attend to a live one without a row."""
    found = np.zeros((B, T), bool)
    for b in range(B):
        for t in range(T):
            for i in range(0 if window is None else max(t - max(window, 0), 0), t + 1):
                found[b, t] |= ids[b, t] != 0 and ids[b, i] == ids[b, t] and bad[b, i]
    return found


@pytest.mark.parametrize(
    ("f", "impl", "window"),
    [(whole, "xla", W), (whole, "xla", None), (whole, "xla", -1), (branch, "xla", W), (whole, "pallas", W)],
)
def test_explicit_positions(f: Callable[..., jax.Array], impl: str, window: int | None) -> None:
    positions = np.tile(np.arange(T, dtype=np.int32), (B, 1))
    ids = np.ones((B, T), np.int32)
    ids[0, 10:], ids[1, :4] = 2, 0
    good = positions.copy()
    positions[0, 5], positions[1, 2], positions[1, 12] = T, 10**6, -1  # [1, 2] is padding
    bad = positions != good
    bad[1, 2] = False

    @jax.jit
    def run(q: Any, k: Any, v: Any, positions: Any, cotangent: Any) -> Any:
        out, pull = jax.vjp(lambda q, k, v: f(q, k, v, positions, ids, impl, window), q, k, v)
        return out, pull(cotangent)

    want = expected_tokens(bad, ids, window)
    cotangent = np.asarray(normal(B, T, HQ, D))
    out, (d_q, d_k, d_v) = run(Q, K, V, positions, cotangent)
    np.testing.assert_array_equal(nan_tokens(out), want)
    assert not np.asarray(out)[1, :4].any(), "padding is 0 whatever its position"
    np.testing.assert_array_equal(nan_tokens(d_q), bad)
    # What is not NaN is what it is without those tokens: their outputs lead nowhere.
    clean, gradients = run(Q, K, V, good, np.where(want[..., None, None], 0, cotangent))
    hidden = want[..., None, None]
    np.testing.assert_allclose(np.where(hidden, 0, out), np.where(hidden, 0, clean), atol=1e-6)
    for found, other in zip((jnp.where(bad[..., None, None], 0, d_q), d_k, d_v), gradients, strict=True):
        other = np.where(bad[..., None, None], 0, other) if found.shape == d_q.shape else np.asarray(other)
        np.testing.assert_allclose(found, other, atol=2e-5)


def test_a_document_longer_than_the_table() -> None:
    ids = np.ones((B, T), np.int32)
    ids[0, 12:] = 2
    short: dict[str, Any] = {"rope_cos": COS[:14], "rope_sin": SIN[:14]}
    out = jax.jit(lambda ids: rattention(Q, K, V, GAIN, GAIN, **short, segment_ids=ids, window=W))(ids)
    np.testing.assert_array_equal(nan_tokens(out), [[False] * T, [False] * 14 + [True] * 10])
    enough = rattention(Q, K, V, GAIN, GAIN, COS, SIN, segment_ids=ids, window=W)
    np.testing.assert_allclose(out[0], enough[0], atol=1e-6)


@pytest.mark.parametrize(("impl", "new"), [("xla", 1), ("xla", 6), ("pallas", 1)])
def test_a_continuation_past_the_table(impl: str, new: int) -> None:
    """Rows near and past the end, one of them waiting; the cache is right in all."""
    short: dict[str, Any] = {"rope_cos": COS[:16], "rope_sin": SIN[:16]}
    seen, lengths = np.array([13, 16], np.int32), np.array([new, new // 2], np.int32)
    cache = Cache.empty(B, HKV, D, window=W)._replace(k=K[:, :W], v=V[:, :W], length=seen)

    @jax.jit
    def step(cache: Cache, lengths: Any) -> Any:
        given = (Q[:, :new], K[:, :new], V[:, :new], GAIN, GAIN, cache)
        return rattention_extend(*given, lengths=lengths, **short, window=W, impl=impl)

    out, after = step(cache, lengths)
    position = seen[:, None] + np.arange(new)
    live = np.arange(new) < lengths[:, None]
    np.testing.assert_array_equal(nan_tokens(out), live & (position >= 16))
    assert not np.asarray(out)[~live].any()
    np.testing.assert_array_equal(after.length, seen + lengths)
    assert all(np.isfinite(x).all() for x in after)


def test_in_time_nothing_is_nan_and_checkify_sees_what_is() -> None:
    """No step of an ordinary call makes a NaN, and the one that stands for a missing row is found where it is made."""
    checked = checkify.checkify(lambda p: whole(Q, K, V, p, None, "xla"), errors=checkify.nan_checks)
    positions = jnp.tile(jnp.arange(T, dtype=jnp.int32), (B, 1))
    jax.jit(checked)(positions)[0].throw()
    with pytest.raises(checkify.JaxRuntimeError, match="nan"):
        jax.jit(checked)(positions + 1)[0].throw()


def test_concrete_positions_are_refused() -> None:
    with pytest.raises(SpecError, match="ERR-9"):
        whole(Q, K, V, jnp.full((B, T), T, jnp.int32), None, "xla")


def test_the_layer_sizes_its_table_from_the_positions() -> None:
    layer = RAttention(16, HQ, HKV, D, window=W, rngs=nnx.Rngs(0))
    x = normal(B, 10, 16)
    far = np.tile(np.arange(300, 310, dtype=np.int32), (B, 1))
    # A rotation of queries and keys by one more angle changes no score: far positions are as good as near ones.
    np.testing.assert_allclose(layer(x, positions=far), layer(x), atol=2e-4)
    np.testing.assert_allclose(layer(x, positions=jnp.asarray(far)), layer(x), atol=2e-4)
    padded = far.copy()
    padded[:, 0] = 2**30  # the position of padding is nobody's business
    ids = np.ones((B, 10), np.int32)
    ids[:, 0] = 0
    assert np.isfinite(layer(x, positions=padded, segment_ids=ids)).all()
    with pytest.raises(ValueError, match="max_position: expected the largest of the positions"):
        jax.jit(lambda p: layer(x, positions=p))(far)
    traced = jax.jit(lambda p, most: layer(x, positions=p, max_position=most), static_argnums=1)
    np.testing.assert_allclose(traced(far, 309), layer(x), atol=2e-4)
    assert nan_tokens(traced(far, 308)).tolist() == [[False] * 9 + [True]] * B
    with pytest.raises(SpecError, match="ERR-9"):
        layer(x, positions=far, max_position=308)
    outside: list[Any] = [-1, 2.5, True]
    for wrong in outside:
        with pytest.raises(ValueError, match="max_position: expected an int >= 0"):
            layer(x, positions=far, max_position=wrong)


def test_generation_past_max_length() -> None:
    """NaN in a compiled step, refused in an eager one; rows that are reset go on."""
    layer = RAttention(16, HQ, HKV, D, window=W, rngs=nnx.Rngs(0))
    x = normal(B, 12, 16)
    step = nnx.jit(lambda layer, x, cache: layer.step(x, cache))
    cache, wrong = layer.new_cache(B, max_length=8), []
    for t in range(12):
        y, cache = step(layer, x[:, t], cache)
        wrong.append(np.isnan(np.asarray(y)).all(-1))
        cache = cache.reset([1]) if t == 5 else cache
    np.testing.assert_array_equal(np.array(wrong).T, [[False] * 8 + [True] * 4, [False] * 12])
    with pytest.raises(SpecError, match="ERR-9"):
        layer.step(x[:, 0], cache)
    assert cache.rope_cos is not None
    assert cache.rope_cos.shape == (1, 8, D // 2)
