"""What the public functions and the layer refuse, by name, and what they take."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rattention.jax import Cache, SpecError, rattention, rattention_extend, rope_table, sliding_window_attention
from rattention.jax.nn import GenerationCache, RAttention

B, T, HQ, HKV, D = 2, 6, 4, 2, 8


def tensors() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shapes = {"q": (B, T, HQ, D), "k": (B, T, HKV, D), "v": (B, T, HKV, D)}
    shapes |= {"swa_weight": (HQ, D), "rla_weight": (HQ, D)}
    return {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("name", ["q", "k", "v", "swa_weight", "rla_weight"])
@pytest.mark.parametrize(
    "spoil", [lambda x: x.tolist(), np.ma.masked_less, lambda x: 1.0], ids=["list", "mask", "number"]
)
def test_what_is_no_array_is_refused_by_name(name: str, spoil: Any) -> None:
    """Also inside jit, where a list would be a tree of tracers (ERR-14)."""
    given = tensors()
    x = np.asarray(given.pop(name))
    spoilt = spoil(x, 0) if spoil is np.ma.masked_less else spoil(x)
    wrong: dict[str, Any] = given | {name: spoilt}
    for run in (rattention, jax.jit(rattention, static_argnames="window")):
        if run is rattention or not isinstance(spoilt, np.ma.MaskedArray | float):
            with pytest.raises(
                SpecError, match=rf"rattention: {name}: expected a jax.Array or numpy.ndarray, got .*ERR-14"
            ):
                run(**wrong, window=2)


def test_lists_of_integers_are_refused() -> None:
    for name in ("segment_ids", "positions"):
        more: dict[str, Any] = {name: [[1] * T] * B}
        with pytest.raises(SpecError, match=f"{name}: expected a jax.Array or numpy.ndarray, got builtins.list"):
            rattention(**tensors(), **more, window=2)
    with pytest.raises(SpecError, match=r"lengths: expected a jax\.Array"):
        rattention_extend(**tensors(), cache=Cache.empty(B, HKV, D, window=2), lengths=[1, 2], window=2)
    with pytest.raises(SpecError, match=r"positions: expected a jax\.Array"):
        rope_table([0, 1, 2], head_dim=8)  # pyright: ignore[reportArgumentType]


def test_parameters_and_numpy_arrays_are_arrays() -> None:
    given = tensors()
    plain = rattention(**given, window=2)
    given |= {"q": np.asarray(given["q"]), "swa_weight": nnx.Param(given["swa_weight"])}
    np.testing.assert_array_equal(rattention(**given, window=2), plain)


def test_attributes_are_python_values() -> None:
    """A number in a JAX array is a number; a traced one has no gradient to give and is refused (ERR-5)."""
    given = tensors()
    plain = rattention(**given, window=2, scale=0.5)
    np.testing.assert_array_equal(rattention(**given, window=jnp.int32(2), scale=jnp.float32(0.5)), plain)
    for run in (jax.grad, jax.jit):
        with pytest.raises(
            SpecError,
            match=r"scale: expected 0, a float in the normal range of float32, or None, got a traced array.*ERR-5",
        ):
            run(lambda scale: jnp.sum(sliding_window_attention(*list(given.values())[:3], window=2, scale=scale)))(0.5)
    with pytest.raises(SpecError, match="window"):
        rattention(**given, window=jnp.array([2]))  # pyright: ignore[reportArgumentType]
    with pytest.raises(SpecError, match="scale"):
        rattention(**given, window=2, scale=jnp.bool_(True))


def layer(**options: Any) -> RAttention:
    given: dict[str, Any] = {"num_heads": HQ, "num_kv_heads": HKV, "head_dim": D, "window": 3} | options
    return RAttention(16, **given, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_heads": 0}, "num_heads: expected an int >= 1, got 0"),
        ({"num_kv_heads": 2.0}, "num_kv_heads: expected an int >= 1, got 2.0"),
        ({"head_dim": True}, "head_dim: expected an int >= 1, got True"),
        ({"value_dim": -3}, "value_dim: expected an int >= 1, got -3"),
        ({"num_kv_heads": 3}, "num_heads: expected a multiple of num_kv_heads=3, got 4"),
        ({"window": -2}, "window: expected an int from -1"),
        ({"window": 3.5}, "window: expected an int from -1"),
        ({"feature_map": "elu"}, "feature_map: expected one of"),
        ({"eps": 0.0}, "eps: expected a float > 0 in the normal range of float32"),
        ({"rope_theta": -1.0}, "theta: expected a float > 0 in the normal range of float32"),
        ({"head_dim": 7}, "head_dim: expected an even int"),
        ({"impl": "cuda"}, "impl: expected one of xla, pallas"),
        ({"precision": "most"}, "most"),
        ({"param_dtype": jnp.int8}, "param_dtype: expected a floating-point dtype"),
    ],
)
def test_a_layer_is_checked_when_it_is_made(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        layer(**options)


def test_an_odd_head_dim_needs_no_rotary_embedding() -> None:
    assert layer(head_dim=7, rope_theta=None)(jnp.ones((1, 2, 16))).shape == (1, 2, 16)


def test_activations_are_checked_by_name() -> None:
    model = layer()
    cache = model.new_cache(B, max_length=8)
    x = jnp.ones((B, 16))
    for wrong, error, text in (
        ([[[0.0] * 16]], TypeError, r"x: expected a jax.Array or numpy.ndarray \[B, T, 16\], got builtins.list"),
        (np.ma.ones((1, 2, 16)), TypeError, "got numpy.ma.MaskedArray"),
        (jnp.ones((1, 16)), ValueError, r"x: expected shape \[B, T, 16\], got \[1, 16\]"),
        (jnp.ones((1, 2, 15)), ValueError, r"got \[1, 2, 15\]"),
        (jnp.ones((1, 2, 16), jnp.int32), TypeError, "floating-point dtype, got int32"),
    ):
        with pytest.raises(error, match=text):
            model(wrong)
        with pytest.raises(error, match=text):
            model.prefill(wrong, cache)
    for wrong, error, text in (
        ([True, False], TypeError, "active: expected an array .* got list"),
        (jnp.ones(B, jnp.int32), TypeError, "got dtype int32"),
        (jnp.ones(3, bool), ValueError, r"active: expected shape \[B=2\], got \[3\]"),
    ):
        with pytest.raises(error, match=text):
            model.step(x, cache, active=wrong)
    sizes: list[dict[str, Any]] = [{"batch": 0}, {"max_length": 0}, {"max_length": 2.5}]
    for wrong in sizes:
        with pytest.raises(ValueError, match="expected an int >= 1"):
            model.new_cache(**{"batch": 1, "max_length": 8} | wrong)


class Quantised(nnx.Module):
    """A projection whose weight is int8, as quantisation libraries leave it."""

    def __init__(self, weight: jax.Array, named: str):
        self.scale = jnp.max(jnp.abs(weight)) / 127
        setattr(self, named, nnx.Param(jnp.round(weight / self.scale).astype(jnp.int8)))
        self.named = named

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ (getattr(self, self.named)[...].astype(x.dtype) * self.scale.astype(x.dtype)).T


@pytest.mark.parametrize("named", ["weight", "qweight"])
def test_generation_with_quantised_projections(named: str) -> None:
    model = layer()
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        setattr(model, name, Quantised(getattr(model, name).weight[...], named))
    x = jax.random.normal(jax.random.key(0), (B, T, 16))
    cache = model.new_cache(B, max_length=T)
    assert cache.tensors.k.dtype == jnp.float32
    y, _ = model.prefill(x, cache)
    np.testing.assert_allclose(y, model(x), atol=1e-5)


def test_a_cache_has_the_dtype_of_the_keys() -> None:
    x = jax.random.normal(jax.random.key(0), (B, T, 16))
    wide, narrow = layer(), layer(param_dtype=jnp.bfloat16, memory=True)
    for model, given, dtype in ((wide, x, None), (wide, x.astype(jnp.bfloat16), None), (narrow, x, jnp.float32)):
        y, _ = model.prefill(given, model.new_cache(B, max_length=T, dtype=dtype))
        np.testing.assert_allclose(y, model(given), atol=1e-5)
    assert narrow.new_cache(1, max_length=1).tensors.k.dtype == jnp.bfloat16
    with pytest.raises(SpecError, match="cache_k: expected dtype float32"):
        narrow.prefill(x, narrow.new_cache(B, max_length=T))
    cast = nnx.merge(nnx.graphdef(wide), jax.tree.map(lambda p: p.astype(jnp.bfloat16), nnx.state(layer())))
    assert cast.new_cache(1, max_length=1).tensors.k.dtype == jnp.bfloat16
    whole = nnx.merge(*[nnx.graphdef(narrow), jax.tree.map(lambda p: p.astype(jnp.bfloat16), nnx.state(narrow))])
    assert whole(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16, "memory too was cast, and is widened again"


def lengths_after(rows: Any) -> list[int]:
    seen = jnp.array([3, 4], jnp.int32)
    return GenerationCache(Cache.empty(2, 2, 8, window=3)._replace(length=seen)).reset(rows).length.tolist()


@pytest.mark.parametrize(
    ("rows", "left"),
    [
        (None, [0, 0]), ([], [3, 4]), ((), [3, 4]), (1, [3, 0]), (-2, [0, 4]), ([1], [3, 0]), ([-1, 0], [0, 0]),
        (np.array([], np.int64), [3, 4]), (np.int32(0), [0, 4]), (jnp.array([1]), [3, 0]), (jnp.array([], int), [3, 4]),
        ([True, False], [0, 4]), (np.array([False, True]), [3, 0]), (jnp.array([False, False]), [3, 4]),
    ],
)  # fmt: skip
def test_reset(rows: Any, left: list[int]) -> None:
    assert lengths_after(rows) == left


@pytest.mark.parametrize(
    ("rows", "error", "text"),
    [
        ([7], IndexError, "reset: rows: expected indices below the batch of B=2, got 7"),
        (2, IndexError, "got 2"),
        ([0, -3], IndexError, "got -3"),
        ([True], IndexError, "mask of shape"),
        (np.ones(3, bool), IndexError, "mask of shape"),
        (np.ones((2, 1), bool), IndexError, "mask of shape"),
        (True, IndexError, "mask of shape"),
        (1.0, TypeError, "float64"),
        (np.array([]), TypeError, "float64"),
        (jnp.array([0.0, 1.0]), TypeError, "float32"),
        ("0", TypeError, "indices or a bool mask"),
        (np.ma.array([0, 1], mask=[True, False]), TypeError, "masked array"),
    ],
)
def test_rows_that_cannot_be_reset(rows: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        lengths_after(rows)


def test_reset_inside_jit_takes_a_mask() -> None:
    cache = GenerationCache(Cache.empty(2, 2, 8, window=3)._replace(length=jnp.array([3, 4], jnp.int32)))
    reset = jax.jit(lambda cache, rows: cache.reset(rows).length, donate_argnums=())
    assert reset(cache, np.array([True, False])).tolist() == [0, 4]
    for rows in (np.array([1]), [1]):
        with pytest.raises(TypeError, match="traced"):
            reset(cache, rows)
