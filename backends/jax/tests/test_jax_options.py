"""Options of a layer: numbers in any wrapping become Python's, flags are bools, projections may have a state."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rattention.jax.nn import RAttention
from rattention.spec import SpecError

HIDDEN = 8
X = jnp.asarray(np.random.default_rng(1).standard_normal((2, 6, HIDDEN)), jnp.float32)


def layer(**options: Any) -> RAttention:
    given: dict[str, Any] = {"window": 3, "qk_norm": True, "rngs": nnx.Rngs(0)} | options
    return RAttention(HIDDEN, 2, 1, 4, **given)


@pytest.mark.parametrize("wrap", [jnp.asarray, np.asarray, lambda x: np.asarray(x)[()]], ids=["jax", "array", "scalar"])
def test_numbers_are_python_numbers(wrap: Any) -> None:
    """An array among the static parts of a module cannot be traced through, or be hashed."""
    made = layer(window=wrap(3), eps=wrap(1e-6), rope_theta=wrap(1e4))
    assert [type(x) for x in (made.window, made.eps, made.rope_theta)] == [int, float, float]
    y = nnx.jit(lambda m, x: m(x))(made, X)
    # Two programs, in float32: eps and theta came as float32 too, and 1e-6 rounds there.
    np.testing.assert_allclose(y, nnx.jit(lambda m, x: m(x))(layer(), X), atol=1e-5)


def test_a_traced_number_is_refused_when_the_layer_is_made() -> None:
    for name in ("window", "eps", "rope_theta"):
        with pytest.raises(SpecError, match=r"a traced array; attributes are Python values \(ERR-5\)"):
            jax.eval_shape(lambda x, name=name: nnx.state(layer(**{name: x})), 3.0)


@pytest.mark.parametrize("flag", ["qk_norm", "qk_scale", "memory", "bias"])
def test_flags_are_bools(flag: str) -> None:
    for wrong in ("no", "False", 0, 1, 0.0, None, np.True_, jnp.asarray(True)):
        with pytest.raises(SpecError, match=rf"RAttention: {flag}: expected True or False, got .* \(ERR-5\)"):
            layer(**{flag: wrong})


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.float4_e2m1fn])
def test_activations_of_few_bits_are_refused(dtype: Any) -> None:
    made = layer()
    cache = made.new_cache(2, max_length=8)
    for call in (made, lambda x: made.prefill(x, cache), lambda x: made.step(x[:, 0], cache)):
        for x in (X.astype(dtype), np.asarray(X.astype(dtype))):
            with pytest.raises(SpecError, match=r"RAttention: x: expected a floating-point .*, got float\d\w+ \(ERR-4"):
                call(x)


def test_ragged_rows_are_refused_by_name() -> None:
    cache = layer().new_cache(3, max_length=8)
    for rows in ([[0], [1, 2]], [0, [1]], [[[0], [1, 2]]]):
        with pytest.raises(TypeError, match="reset: rows: expected indices or a bool mask, got lists of different"):
            cache.reset(rows)
    assert cache.reset([np.array(0), jnp.array(-1)]).length.shape == (3,)


def test_a_projection_with_a_state_knows_its_dtype() -> None:
    class Dropped(nnx.Module):
        def __init__(self, projection: Any, rngs: nnx.Rngs):
            self.projection, self.dropout = projection, nnx.Dropout(0.1, rngs=rngs)

        def __call__(self, x: Any) -> jax.Array:
            return self.dropout(self.projection(x))

    made = layer()
    made.k_proj = Dropped(made.k_proj, nnx.Rngs(dropout=0))  # pyright: ignore[reportAttributeAccessIssue]
    counts = jax.tree.map(np.asarray, nnx.state(made, nnx.RngCount))
    cache = made.new_cache(2, max_length=8)
    assert cache.tensors.k.dtype == jnp.float32
    jax.tree.map(np.testing.assert_array_equal, nnx.state(made, nnx.RngCount), counts)
    assert made.prefill(X, cache)[0].shape == X.shape
    plain = layer()
    plain.k_proj = lambda x: jnp.zeros((*x.shape[:2], 4), x.dtype)  # pyright: ignore[reportAttributeAccessIssue]
    assert plain.new_cache(2, max_length=8, dtype=None).tensors.k.dtype == jnp.float32
