"""Every operation and option under the settings of careful users, eager and differentiated, both implementations.

Strict dtype promotion, no rank promotion, no implicit transfer, and a stop at the first NaN: all at once, since each
speaks up for itself. What a call computes is compared elsewhere; here it must be what it is without the settings.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import checkify
from rattention import jax as rj
from rattention.jax import xla
from rattention.jax.nn import RAttention
from rattention.jax.pallas import watch

B, HQ, HKV, D, DV = 2, 4, 2, 8, 6
WEIGHTS = ("swa_weight", "rla_weight", "q_scale", "k_scale", "rope_cos", "rope_sin")


@contextlib.contextmanager
def careful() -> Iterator[None]:
    with (
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
        jax.transfer_guard("disallow"),
        jax.debug_nans(True),
    ):
        yield


def inputs(T: int, dtype: Any, weights: Any, *, M: int | None = None, W: int = 5, F: int = 2 * D) -> dict[str, Any]:
    """Every tensor that any operation takes. Documents with padding in the first row, one document in the second."""
    rng = np.random.default_rng(T)
    shapes = {"q": (B, T, HQ, D), "k": (B, T, HKV, D), "v": (B, T, HKV, DV)}
    shapes |= {"swa": (B, T, HQ, DV), "rla": (B, T, HQ, DV)}
    shapes |= {"cache_k": (B, W, HKV, D), "cache_v": (B, W, HKV, DV)}
    found = {name: jnp.asarray(rng.standard_normal(shape), dtype) for name, shape in shapes.items()}
    small = {"swa_weight": (HQ, DV), "rla_weight": (HQ, DV), "q_scale": (D,), "k_scale": (D,)}
    angle = rng.uniform(-3, 3, (M or T + 10, D // 2))
    tables = {"rope_cos": np.cos(angle), "rope_sin": np.sin(angle)}
    small = {name: rng.standard_normal(shape) for name, shape in small.items()} | tables
    found |= {name: jnp.asarray(x, weights) for name, x in small.items()}
    states = {"memory": (HQ, F, DV), "initial_state": (B, HKV, F, DV), "cache_state": (B, HKV, F, DV)}
    found |= {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in states.items()}
    ids = np.ones((B, T), np.int32)
    ids[0, : T // 4], ids[0, T // 4 : T // 2], ids[0, -T // 5 :] = 0, 7, 0
    positions = rng.integers(0, T, (B, T))
    integers = {"segment_ids": ids, "positions": positions, "cache_length": [1, 9], "lengths": [T, T // 2]}
    return found | {name: jnp.asarray(np.asarray(x, np.int32)) for name, x in integers.items()}


def call(op: str, tensors: dict[str, Any], attrs: dict[str, Any]) -> Any:
    if op == "rattention_extend":
        cache = rj.Cache(*(tensors[f"cache_{name}"] for name in ("k", "v", "state", "length")))
        tensors = {n: x for n, x in tensors.items() if not n.startswith("cache_")} | {"cache": cache}
    return getattr(rj, op)(**tensors, **attrs)


QKV = ("q", "k", "v")
GAINS = ("swa_weight", "rla_weight")
ROPE = ("rope_cos", "rope_sin")
LINEAR = ("q_scale", "k_scale", "memory", "initial_state")
CACHE = ("cache_k", "cache_v", "cache_state", "cache_length")
EXTEND = (*QKV, *GAINS, *CACHE, *ROPE, "q_scale", "k_scale", "memory")
CASES: dict[str, tuple[str, int, tuple[str, ...], dict[str, Any]]] = {
    "everything": ("rattention", 20, (*QKV, *GAINS, *ROPE, "positions", "segment_ids", *LINEAR), {"window": 5}),
    "scan": ("rattention", 130, (*QKV, *GAINS, *ROPE, "segment_ids", *LINEAR), {"window": 5}),
    "plain": ("rattention", 130, (*QKV, *GAINS), {"window": 70, "scale": 0.3, "return_final_state": True}),
    "full": ("rattention", 20, (*QKV, *GAINS, *ROPE, "segment_ids", *LINEAR), {"window": None}),
    "linear": ("rattention", 20, (*QKV, *GAINS, *ROPE, "segment_ids"), {"window": -1, "feature_map": "relu"}),
    "softmax branch": ("sliding_window_attention", 20, (*QKV, *ROPE, "positions", "segment_ids"), {"window": 3}),
    "linear branch": ("residual_linear_attention", 20, (*QKV, *LINEAR, "segment_ids"), {"window": 3}),
    "decode": ("rattention_extend", 1, (*EXTEND, "lengths"), {"window": 5}),
    "prefill": ("rattention_extend", 20, (*EXTEND, "lengths"), {"window": 5}),
    "long prefill": ("rattention_extend", 130, EXTEND, {"window": 5}),
    "feature map": ("feature_map", 20, ("x",), {"feature_map": "softmax"}),
    "mix": ("rms_mix", 20, ("swa", "rla", *GAINS), {}),
}
NARROW = ("everything", "linear branch", "decode", "mix")


def drawn(name: str, dtype: Any, weights: Any) -> tuple[str, dict[str, Any], dict[str, Any]]:
    op, T, names, attrs = CASES[name]
    tensors = inputs(T, dtype, weights)
    tensors["x"] = tensors["q"]
    return op, {n: tensors[n] for n in names}, attrs


def gradient(op: str, attrs: dict[str, Any]) -> Callable[..., Any]:
    """Of a loss of all outputs, in every floating-point tensor but the rotary table."""

    def of(moving: dict[str, Any], fixed: dict[str, Any]) -> Any:
        def loss(moving: dict[str, Any]) -> jax.Array:
            outputs = call(op, moving | fixed, attrs)
            parts = [x.astype(jnp.float32) for x in jax.tree.leaves(outputs) if x.dtype != jnp.int32]
            return sum((jnp.sum(jnp.sin(x)) for x in parts), jnp.float32(0))

        return jax.grad(loss)(moving)

    return of


def parted(tensors: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Those with a gradient, and the others."""
    moving = {n: x for n, x in tensors.items() if jnp.issubdtype(x.dtype, jnp.floating) and n not in ROPE}
    return moving, {n: x for n, x in tensors.items() if n not in moving}


@pytest.mark.parametrize(
    ("name", "dtype", "weights", "impl"),
    [
        *((name, "float32", "float32", "xla") for name in CASES),
        *((name, "bfloat16", "float32", "xla") for name in NARROW),
        ("scan", "float16", "float16", "xla"),
        ("everything", "float32", "float32", "pallas"),
        ("decode", "bfloat16", "float32", "pallas"),
    ],
)
def test_functions(name: str, dtype: str, weights: str, impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The TPU interpreter calls back into Python, which is a transfer; the plain one computes the same kernels without.
    monkeypatch.setattr(watch, "interpreter", lambda name: True)
    op, tensors, attrs = drawn(name, dtype, weights)
    attrs = attrs | {"impl": impl}
    compiled, parts = jax.jit(gradient(op, attrs)), parted(tensors)
    with careful():
        found = call(op, tensors, attrs), compiled(*parts)
    for x in jax.tree.leaves(found):
        assert not jnp.isnan(x).any()


@pytest.mark.parametrize("name", ["everything", "scan", "full", "prefill"])
def test_no_step_makes_a_nan(name: str) -> None:
    """Not even one that a later step drops, which is what stops a user who looks for a NaN of his own. A row is all
    padding, or waits."""
    op, tensors, attrs = drawn(name, "float32", "float32")
    for integers in ("segment_ids", "lengths"):
        if integers in tensors:
            tensors[integers] = tensors[integers].at[1].set(0)
    error, _ = jax.jit(checkify.checkify(gradient(op, attrs), errors=checkify.nan_checks))(*parted(tensors))
    error.throw()


def test_the_layer() -> None:
    """Made, called, differentiated, and stepped eagerly, with activations of the parameters' dtype and of another."""
    options: dict[str, Any] = {"qk_norm": True, "qk_scale": True, "memory": True, "bias": True}
    layer = RAttention(16, HQ, HKV, D, window=5, **options, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((B, 9, 16)), jnp.float32)
    active = jnp.array([True, False])
    positions, half = jnp.tile(jnp.arange(9, dtype=jnp.int32), (B, 1)), x.astype(jnp.bfloat16)
    with careful():
        y = layer(x, positions=positions)
        assert layer(half).dtype == jnp.float32, "the dtype that holds those of activations and parameters"
        cache = layer.new_cache(B, max_length=40)
        _, cache = layer.prefill(half, cache)
        z, cache = layer.step(jnp.squeeze(jax.lax.slice_in_dim(x, 0, 1, axis=1), 1), cache, active=active)
        cache = cache.reset(active)
        cache = cache.reset([1])
        grads = nnx.jit(nnx.grad(lambda layer, x: jnp.sum(layer(x))))(layer, x)
    assert cache.length.tolist() == [0, 0]
    for found in jax.tree.leaves((y, z, grads)):
        assert jnp.isfinite(found).all()


def test_wide_mode_changes_nothing() -> None:
    """With 64 bits switched on float32 calls stay what they are: no index or constant widens them."""
    op, tensors, attrs = drawn("everything", "float32", "float32")
    expected = call(op, tensors, attrs)
    with jax.enable_x64(True), careful():
        found = call(op, tensors, attrs)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, expected)


def test_nothing_traced_leaks() -> None:
    op, tensors, attrs = drawn("scan", "float32", "float32")
    with jax.checking_leaks():
        jax.make_jaxpr(gradient(op, attrs))(*parted(tensors))


def test_eager_calls_share_their_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs are kept by attributes and shapes: a call with other numbers in the same tensors traces nothing."""
    op, tensors, attrs = drawn("decode", "float32", "float32")
    call(op, tensors, attrs)
    traced: list[Any] = []
    monkeypatch.setattr(xla, "run", lambda *args: traced.append(args))
    for seen in range(3):
        lengths = jnp.full((B,), seen, jnp.int32)
        call(op, tensors | {"cache_length": lengths, "q": tensors["q"] + seen}, attrs)
    assert not traced
