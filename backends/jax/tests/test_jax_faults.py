"""Calls that once got a wrong number or an error without a name: constants, caches, ranges and settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import checkify
from jax.sharding import Mesh, PartitionSpec
from rattention.jax import Cache, rattention, rattention_extend, rope_table, sharded
from rattention.jax.nn import GenerationCache, RAttention, load_state_dict, state_dict
from rattention.spec import SpecError, Unsupported

B, HQ, HKV, D, W = 2, 2, 1, 4, 3
HIDDEN = 8
rng = np.random.default_rng(5)


def drawn(tokens: int) -> dict[str, Any]:
    heads = {"q": HQ, "k": HKV, "v": HKV}
    made = {name: rng.standard_normal((B, tokens, h, D)) for name, h in heads.items()}
    made |= {name: 1 + 0.3 * rng.standard_normal((HQ, D)) for name in ("swa_weight", "rla_weight")}
    return {name: jnp.asarray(x, jnp.float32) for name, x in made.items()}


def table(tokens: int) -> dict[str, Any]:
    return dict(zip(("rope_cos", "rope_sin"), rope_table(np.arange(tokens, dtype=np.int32), head_dim=D), strict=True))


def layer(**options: Any) -> RAttention:
    given: dict[str, Any] = {"window": W, "rngs": nnx.Rngs(0)} | options
    return RAttention(HIDDEN, HQ, HKV, D, **given)


ROTARY, PLAIN = layer(), layer(rope_theta=None)
X = jnp.asarray(rng.standard_normal((B, 6, HIDDEN)), jnp.float32)
MESH = Mesh(np.array(jax.devices()[:1]), ("sequence",))
SPLIT = PartitionSpec(None, "sequence")


def forward(tensors: dict[str, Any], table: dict[str, Any]) -> jax.Array:
    return rattention(**tensors, **table, window=W)


def extend(tensors: dict[str, Any], table: dict[str, Any]) -> jax.Array:
    return rattention_extend(**tensors, **table, cache=Cache.empty(B, HKV, D, window=W), window=W)[0]


def split(tensors: dict[str, Any], table: dict[str, Any]) -> jax.Array:
    return sharded.rattention(**tensors, **table, mesh=MESH, spec=SPLIT, window=W)


def loss(call: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    return lambda tensors, table: jnp.sum(jnp.sin(call(tensors, table)))


@pytest.mark.parametrize("tokens", [6, 100])
@pytest.mark.parametrize("call", [forward, extend, split])
def test_the_gradient_of_a_rotary_table_is_refused(call: Any, tokens: int) -> None:
    """Short calls answered with the gradient, long ones with zeros."""
    tensors, rope = drawn(tokens), table(tokens)
    for transform in (jax.grad(loss(call), argnums=1), jax.jit(jax.grad(loss(call), argnums=1))):
        with pytest.raises(Unsupported, match=r"rattention\w*: rope_cos asks for a gradient.*stop_gradient"):
            transform(tensors, rope)

    def learned(frequencies: jax.Array) -> jax.Array:
        angles = jnp.arange(tokens)[:, None] * frequencies
        return loss(call)(tensors, {"rope_cos": jnp.cos(angles), "rope_sin": jnp.sin(angles)})

    frequencies = jnp.ones((D // 2,))
    with pytest.raises(Unsupported, match="rope_cos"):
        jax.jvp(learned, (frequencies,), (frequencies,))


def test_the_kernels_refuse_it_too() -> None:
    def loss(rope: dict[str, Any]) -> jax.Array:
        return jnp.sum(rattention(**drawn(6), **rope, window=W, impl="pallas"))

    with pytest.raises(Unsupported, match="rope_cos asks for a gradient"):
        jax.eval_shape(jax.grad(loss), table(6))


@pytest.mark.parametrize("tokens", [6, 100])
def test_other_derivatives_do_not_meet_the_table(tokens: int) -> None:
    """They are traced, not run: what they compute is for other tests, here nothing must be refused."""
    tensors, rope = drawn(tokens), table(tokens)
    once = loss(forward)

    def carried(tensors: dict[str, Any], rope: dict[str, Any]) -> jax.Array:
        def body(carry: Any, _: None) -> Any:
            total, tensors, rope = carry
            return (total + once(tensors, rope), tensors, rope), None

        return jax.lax.scan(body, (jnp.zeros(()), tensors, rope), length=2)[0][0]

    def stopped(tensors: dict[str, Any], rope: dict[str, Any]) -> jax.Array:
        return once(tensors, jax.tree.map(lambda x: jax.lax.stop_gradient(x * tensors["q"].sum()), rope))

    def second(tensors: dict[str, Any], rope: dict[str, Any]) -> Any:
        return jax.jvp(lambda t: jax.grad(once)(t, rope), (tensors,), (tensors,))[1]

    def again(tensors: dict[str, Any], rope: dict[str, Any]) -> Any:
        return jax.grad(lambda t: jnp.sum(jax.grad(once)(t, rope)["q"]))(tensors)

    shapes = jax.eval_shape(lambda t: t, tensors)
    gradients = [jax.grad(f) for f in (once, jax.checkpoint(once), jax.checkpoint(jax.jit(once)), carried, stopped)]
    for f in (*gradients, second, again):
        assert jax.eval_shape(f, tensors, rope) == shapes
    rows = jax.eval_shape(jax.vmap(jax.grad(once), in_axes=(None, 0)), tensors, jax.tree.map(lambda x: x[None], rope))
    assert rows["q"].shape == (1, *shapes["q"].shape)
    assert jax.jit(once).lower(tensors, rope).as_text().count("custom") == 0


def test_a_cache_of_another_layer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cache: .* with a rotary table, got none"):
        ROTARY.prefill(X, PLAIN.new_cache(B))
    with pytest.raises(ValueError, match=r"cache: .* no rotary table: rope_theta is None, got both halves"):
        jax.eval_shape(PLAIN.step, X[:, 0], ROTARY.new_cache(B, max_length=9))
    cache = ROTARY.new_cache(B, max_length=9)
    for wrong in (None, cache.tensors, tuple(cache), GenerationCache(tuple(cache.tensors))):  # pyright: ignore[reportArgumentType]
        with pytest.raises(TypeError, match="cache: expected a GenerationCache"):
            ROTARY.prefill(X, wrong)  # pyright: ignore[reportArgumentType]
    for wrong in (None, cache, tuple(cache.tensors)):
        with pytest.raises(SpecError, match=r"cache: expected a rattention.jax.Cache, got .* \(ERR-14\)"):
            rattention_extend(**drawn(6), cache=wrong, window=W)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"window": -5}, "window"),
        ({"window": True}, "window"),
        ({"window": 3.5}, "window"),
        ({"feature_map": "Softmax"}, "feature_map"),
        ({"dtype": jnp.int32}, "dtype"),
        ({"dtype": jnp.float8_e4m3fn}, "dtype"),
        ({"dtype": "bf16"}, "dtype"),
        ({"dtype": jnp.float64}, "dtype"),
        ({"dtype": None}, "dtype"),
        ({"batch": -1}, "batch"),
        ({"batch": 2.0}, "batch"),
        ({"head_dim": 0}, "head_dim"),
    ],
)
def test_an_empty_cache_is_checked(given: dict[str, Any], name: str) -> None:
    sizes: dict[str, Any] = {"batch": B, "num_kv_heads": HKV, "head_dim": D, "window": W}
    with pytest.raises(ValueError, match=f"{name}: expected"):
        Cache.empty(**sizes | given)
    if name == "dtype" and given[name] is not None:
        with pytest.raises(ValueError, match="dtype: expected"):
            PLAIN.new_cache(B, **given)
        with pytest.raises(ValueError, match="param_dtype: expected"):
            layer(param_dtype=given[name])


def test_reset_takes_indices_or_a_mask_not_both() -> None:
    cache = PLAIN.new_cache(3)
    for rows in ([True, 0, 2], [0, np.True_, 1], (jnp.array(True), 1, 1)):
        with pytest.raises(TypeError, match=r"reset: rows: .* a list of both"):
            cache.reset(rows)
    assert cache.reset([True, False, True]).length.shape == (3,)


def test_precision_is_a_name() -> None:
    tensors = drawn(6)
    calls: list[Callable[[Any], Any]] = [
        lambda p: rattention(**tensors, window=W, precision=p),
        lambda p: sharded.rattention(**tensors, mesh=MESH, spec=SPLIT, window=W, precision=p),
        lambda p: layer(precision=p),
    ]
    for call in calls:
        for wrong in ("typo", True, 1, ["high"], ("high", "high")):
            with pytest.raises(ValueError, match="precision: expected default, high, highest"):
                call(wrong)
        call("HIGHEST")


def test_what_a_split_call_takes() -> None:
    tensors = drawn(6)
    with pytest.raises(TypeError, match=r"mesh: expected a jax.sharding.Mesh, got builtins.list"):
        sharded.rattention(**tensors, mesh=list(MESH.devices), spec=SPLIT, window=W)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"spec: expected a jax.sharding.PartitionSpec, got builtins.str"):
        sharded.rattention(**tensors, mesh=MESH, spec="sequence", window=W)  # pyright: ignore[reportArgumentType]


def test_a_window_may_be_longer_than_an_int32() -> None:
    tensors, rope = drawn(6), table(6)
    positions = np.tile(np.arange(6, dtype=np.int32), (B, 1))
    expected = rattention(**tensors, **rope, window=6)
    found = sharded.rattention(**tensors, **rope, mesh=MESH, spec=SPLIT, window=2**40)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    traced = jax.jit(lambda p: rattention(**tensors, **rope, positions=p, window=2**40))(positions)
    np.testing.assert_allclose(traced, expected, atol=1e-5)


def test_index_checks_pass_a_decode_step() -> None:
    checked = checkify.checkify(jax.jit(lambda x, c: ROTARY.step(x, c)), errors=checkify.index_checks)
    error, _ = checked(X[:, 0], ROTARY.new_cache(B, max_length=9))
    error.throw()
    ids = np.array([[1, 1, 2, 2, 0, 0], [0, 1, 1, 1, 1, 1]], np.int32)
    packed = checkify.checkify(
        jax.jit(lambda x, i, p: ROTARY(x, segment_ids=i, positions=p, max_position=8)), errors=checkify.index_checks
    )
    error, _ = packed(X, ids, np.where(ids == 0, -7, np.arange(6, dtype=np.int32)))
    error.throw()


def test_what_padding_holds_does_not_reach_the_weights() -> None:
    ids = np.array([[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]], np.int32)
    bad = jnp.where(jnp.asarray(ids == 0)[..., None], jnp.nan, X)
    lengths = np.array([4, 6], np.int32)
    late = X.at[0, 4:].set(jnp.inf)
    graph, state = nnx.split(layer(qk_norm=True, bias=True))

    @jax.jit
    def packed(state: Any, x: Any) -> Any:
        return jax.grad(lambda s: jnp.sum(jnp.sin(nnx.merge(graph, s)(x, segment_ids=ids))))(state)

    @jax.jit
    def ragged(state: Any, x: Any) -> Any:
        def loss(state: Any) -> jax.Array:
            model = nnx.merge(graph, state)
            return jnp.sum(jnp.sin(model.prefill(x, model.new_cache(B, max_length=9), lengths=lengths)[0]))

        return jax.grad(loss)(state)

    for f, dirty in ((packed, bad), (ragged, late)):
        jax.tree.map(np.testing.assert_array_equal, f(state, dirty), f(state, X))


def test_weights_are_arrays_of_floats() -> None:
    weights = state_dict(PLAIN)
    with pytest.raises(TypeError, match=r"q_proj.weight: expected a jax.Array or numpy.ndarray, got builtins.list"):
        load_state_dict(PLAIN, weights | {"q_proj.weight": weights["q_proj.weight"].tolist()})
    for dtype in (np.complex64, np.int32):
        with pytest.raises(TypeError, match=r"q_proj.weight: expected a floating-point dtype"):
            load_state_dict(PLAIN, weights | {"q_proj.weight": np.ones((HQ * D, HIDDEN), dtype)})
    with pytest.raises(TypeError, match=r"rngs: expected flax.nnx.Rngs, got builtins.NoneType"):
        layer(rngs=None)


def test_weights_keep_their_split() -> None:
    mesh = jax.make_mesh((1,), ("model",))
    made = layer()
    sharding = jax.sharding.NamedSharding(mesh, PartitionSpec("model"))
    made.q_proj.weight.set_value(jax.device_put(made.q_proj.weight[...], sharding))
    weights = {name: 2 * x for name, x in state_dict(made).items()}
    load_state_dict(made, weights)
    assert made.q_proj.weight[...].sharding == sharding
    np.testing.assert_array_equal(made.q_proj.weight[...], weights["q_proj.weight"])
