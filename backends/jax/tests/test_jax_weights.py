"""Weights into and out of modules: abstract ones, under a transfer guard, and all or nothing."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rattention.jax.nn import RAttention, load_state_dict, state_dict

HIDDEN = 8
X = jnp.asarray(np.random.default_rng(1).standard_normal((2, 6, HIDDEN)), jnp.float32)


def made(dtype: Any = jnp.float32) -> RAttention:
    options: dict[str, Any] = {"qk_norm": True, "memory": True, "bias": True, "param_dtype": dtype}
    return RAttention(HIDDEN, 2, 1, 4, window=2, **options, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_an_abstract_module_is_filled(dtype: Any) -> None:
    """Flax's way to restore without making weights first."""
    weights = state_dict(made(dtype))
    layer = nnx.eval_shape(lambda: made(dtype))
    with pytest.raises(ValueError, match=r"k_norm.weight: expected an array, got none: .* of nnx.eval_shape"):
        state_dict(layer)
    load_state_dict(layer, weights)
    for name, found in state_dict(layer).items():
        assert found.dtype == weights[name].dtype
        np.testing.assert_array_equal(found, weights[name])
    x = X.astype(dtype)
    np.testing.assert_array_equal(nnx.jit(lambda m, x: m(x))(layer, x), nnx.jit(lambda m, x: m(x))(made(dtype), x))
    half = nnx.eval_shape(lambda: made(dtype))
    with pytest.raises(ValueError, match=r"q_norm.weight: expected shape \[4\], got \[5\]"):
        load_state_dict(half, weights | {"q_norm.weight": np.ones(5, np.float32)})


def test_an_abstract_module_knows_its_cache() -> None:
    cache = nnx.eval_shape(made).new_cache(2, max_length=8)
    assert cache.tensors.k.dtype == jnp.float32


def test_loading_moves_weights_explicitly() -> None:
    weights = state_dict(made(jnp.bfloat16))
    layer, placed = made(), made()
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    nnx.update(placed, jax.device_put(nnx.state(placed), one))
    with jax.transfer_guard("disallow"):
        for module in (layer, placed):
            load_state_dict(module, weights)
            load_state_dict(module, {name: x.astype(np.float64) for name, x in weights.items()})
            found = state_dict(module)
    for name, x in found.items():
        assert x.dtype == np.float32
        np.testing.assert_array_equal(x, weights[name].astype(np.float32))
    assert placed.q_proj.weight[...].committed


def test_where_loading_fails_nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that runs out of memory half way, say."""
    layer = made()
    before, put, count = state_dict(layer), jax.device_put, 0

    def failing(*given: Any, **more: Any) -> Any:
        nonlocal count
        count += 1
        if count > 3:
            raise RuntimeError("RESOURCE_EXHAUSTED")
        return put(*given, **more)

    monkeypatch.setattr(jax, "device_put", failing)
    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
        load_state_dict(layer, {name: 0 * x + 7 for name, x in before.items()})
    monkeypatch.undo()
    for name, x in state_dict(layer).items():
        np.testing.assert_array_equal(x, before[name])


def test_weights_do_not_follow_the_array_that_they_came_from() -> None:
    layer = made()
    weights = {name: x.copy() for name, x in state_dict(layer).items()}
    load_state_dict(layer, weights)
    weights["swa_weight"][:] = 9
    assert (np.asarray(layer.swa_weight[...]) == 1).all()
