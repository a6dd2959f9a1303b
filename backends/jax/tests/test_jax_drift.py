"""A long generation: the state after 32k decoded tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rattention.jax import Cache, rattention_extend

TOKENS, HQ, HKV, D, W = 32_768, 2, 1, 8, 7


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_state_does_not_drift(dtype: type) -> None:
    """32k single-token steps, values with a mean, against float64: the state stays within 1e-4 (NUM-3)."""
    rng = np.random.default_rng(3)
    k = jnp.asarray(rng.standard_normal((TOKENS, 1, 1, HKV, D)), dtype)
    v = jnp.asarray(0.5 + rng.standard_normal((TOKENS, 1, 1, HKV, D)), dtype)
    q, weight = jnp.ones((1, 1, HQ, D), dtype), jnp.ones((HQ, D))

    @jax.jit
    def generate(k: jax.Array, v: jax.Array) -> Cache:
        def step(cache: Cache, token: tuple[jax.Array, jax.Array]) -> tuple[Cache, None]:
            # The carry has the same shapes at every step: no step can cost more than the first.
            new_k, new_v = token
            return rattention_extend(q, new_k, new_v, weight, weight, cache, window=W)[1], None

        cache = Cache.empty(1, HKV, D, window=W, dtype=dtype)
        return jax.lax.scan(step, cache, (k, v))[0]

    cache = generate(k, v)
    wide_k, wide_v = (np.asarray(x, np.float64)[: TOKENS - W, 0, 0, 0] for x in (k, v))
    both = np.exp(np.stack([wide_k, -wide_k], 1))
    features = (both / both.sum(-1, keepdims=True)).reshape(TOKENS - W, 2 * D)
    exact = features.T @ wide_v
    error = np.linalg.norm(np.asarray(cache.state[0, 0], np.float64) - exact) / np.linalg.norm(exact)
    assert error < 1e-4, f"relative error {error:.2e} after {TOKENS} tokens"
    assert int(cache.length[0]) == TOKENS
    np.testing.assert_array_equal(cache.k[0, :, 0], k[-W:, 0, 0, 0])
