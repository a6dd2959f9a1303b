"""The flax.nnx layer: names, generation against the parallel form, weights through files, transforms."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rattention.jax.nn import GenerationCache, RAttention, load_state_dict, state_dict
from rattention.spec import SpecError

HIDDEN, W = 24, 5
FULL: dict[str, Any] = {"qk_norm": True, "qk_scale": True, "memory": True, "bias": True}
rng = np.random.default_rng(11)


def layer(**options: Any) -> RAttention:
    given: dict[str, Any] = {"value_dim": 5, "window": W} | options
    made = RAttention(HIDDEN, 4, 2, 6, **given, rngs=nnx.Rngs(0))
    load_state_dict(made, {n: 0.3 + 0.5 * rng.standard_normal(x.shape) for n, x in state_dict(made).items()})
    return made


# Compiled: call by call, every small step of a layer is a program of its own.
forward = nnx.jit(lambda model, x, ids=None: model(x, segment_ids=ids))
prefill = nnx.jit(lambda model, x, cache, lengths=None: model.prefill(x, cache, lengths=lengths))
decode = nnx.jit(lambda model, x, cache, active: model.step(x, cache, active=active))


def close(x: Any, y: Any) -> None:
    np.testing.assert_allclose(x, y, rtol=0, atol=3e-5 * max(float(jnp.abs(jnp.asarray(y)).max()), 1))


def test_parameters_have_plain_names_and_out_in_layout() -> None:
    assert {n: x.shape for n, x in state_dict(layer(**FULL)).items()} == {
        "q_proj.weight": (24, HIDDEN),
        "q_proj.bias": (24,),
        "k_proj.weight": (12, HIDDEN),
        "k_proj.bias": (12,),
        "v_proj.weight": (10, HIDDEN),
        "v_proj.bias": (10,),
        "o_proj.weight": (HIDDEN, 20),
        "o_proj.bias": (HIDDEN,),
        "swa_weight": (4, 5),
        "rla_weight": (4, 5),
        "q_norm.weight": (6,),
        "k_norm.weight": (6,),
        "q_scale": (6,),
        "k_scale": (6,),
        "memory": (4, 12, 5),
    }
    names = {"q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight", "swa_weight", "rla_weight"}
    assert set(state_dict(layer())) == names


@pytest.mark.parametrize("options", [FULL, {"rope_theta": None}, {"window": None}])
def test_generation_equals_the_parallel_form_on_ragged_rows(options: dict[str, Any]) -> None:
    """Prompts of different lengths in two pieces, then steps, rows pausing; NaN wherever a token is not real."""
    model = layer(**options)
    lengths = [23, 14, 19]
    x = rng.standard_normal((3, max(lengths), HIDDEN)).astype(np.float32)
    want = forward(model, x)
    got, seen = np.full(want.shape, np.nan, np.float32), [0, 0, 0]
    cache = model.new_cache(3, max_length=max(lengths))

    def feed(counts: list[int], cache: GenerationCache) -> GenerationCache:
        tokens = np.full((3, max(counts), HIDDEN), np.nan, np.float32)
        for b, n in enumerate(counts):
            tokens[b, :n] = x[b, seen[b] : seen[b] + n]
        if max(counts) == 1 and options.get("window", W) is not None:
            y, cache = decode(model, tokens[:, 0], cache, np.array(counts, bool))
            y = y[:, None]
        else:
            y, cache = prefill(model, tokens, cache, np.array(counts, np.int32))
        for b, n in enumerate(counts):
            got[b, seen[b] : seen[b] + n] = y[b, :n]
            seen[b] += n
        return cache

    cache = feed([7, 0, 12], cache)
    cache = feed([3, 9, 1], cache)
    if options.get("window", W) is None:  # the cache grows: one more shape, one more program, with each call
        cache = feed([n - s for n, s in zip(lengths, seen, strict=True)], cache)
    for turn in itertools.count():
        if seen == lengths:
            break
        cache = feed(
            [int(s < n and (turn + b) % 3 != 0) for b, (s, n) in enumerate(zip(seen, lengths, strict=True))], cache
        )
    for b, n in enumerate(lengths):
        close(got[b, :n], want[b, :n])
    np.testing.assert_array_equal(cache.length, lengths)


def test_a_reset_row_starts_anew_and_leaves_the_others() -> None:
    model = layer(memory=True)
    x = rng.standard_normal((2, 9, HIDDEN)).astype(np.float32)
    _, cache = prefill(model, x, model.new_cache(2, max_length=32))
    assert np.abs(np.asarray(cache.tensors.state)).max() > 0
    mixed, after = prefill(model, x, cache.reset([0]))
    close(mixed[:1], forward(model, x[:1]))
    close(mixed[1:], forward(model, np.concatenate([x[1:], x[1:]], 1))[:, 9:])
    np.testing.assert_array_equal(after.length, [9, 18])
    for cleared in cache.reset().tensors:
        assert not np.asarray(cleared).any()


def test_the_table_bounds_the_length() -> None:
    model = layer()
    with pytest.raises(ValueError, match="max_length"):
        model.new_cache(1)
    x = np.zeros((1, 9, HIDDEN), np.float32)
    with pytest.raises(SpecError, match="ERR-9"):
        model.prefill(x, model.new_cache(1, max_length=8))


def test_padding_and_packing() -> None:
    model = layer(**FULL)
    x = rng.standard_normal((1, 20, HIDDEN)).astype(np.float32)
    ids = np.array([[0] * 2 + [5] * 8 + [3] * 7 + [0] * 3], np.int32)
    y = forward(model, x, ids)
    close(y[:, 2:10], forward(model, x[:, 2:10]))
    close(y[:, 10:17], forward(model, x[:, 10:17]))
    close(y[:, :2], np.broadcast_to(state_dict(model)["o_proj.bias"], (1, 2, HIDDEN)))


def test_weights_travel_through_safetensors(tmp_path) -> None:
    from safetensors.numpy import load_file, save_file

    class Block(nnx.Module):
        def __init__(self, dtype: Any, seed: int):
            options = FULL | {"param_dtype": dtype, "rngs": nnx.Rngs(seed)}
            self.layers = nnx.List([RAttention(HIDDEN, 4, 2, 6, window=W, **options) for _ in range(2)])

    for dtype in (jnp.float32, jnp.bfloat16):
        one, other = Block(dtype, 1), Block(dtype, 2)
        save_file(state_dict(one), tmp_path / "weights.safetensors")
        weights = load_file(tmp_path / "weights.safetensors")
        assert "layers.1.q_norm.weight" in weights
        assert weights["layers.0.memory"].dtype == np.float32
        load_state_dict(other, weights)
        x = jnp.asarray(rng.standard_normal((1, 8, HIDDEN)), dtype)
        found = forward(other.layers[1], x)
        np.testing.assert_array_equal(forward(one.layers[1], x), found)
        assert found.dtype == dtype
    with pytest.raises(ValueError, match=r"layers\.0\.memory"):
        load_state_dict(one, {n: x for n, x in weights.items() if n != "layers.0.memory"})
    with pytest.raises(ValueError, match=r"expected shape \[6\]"):
        load_state_dict(one, weights | {"layers.0.q_scale": np.ones(7, np.float32)})


def test_training_step_reaches_every_parameter() -> None:
    model = layer(**FULL)
    x = jnp.asarray(rng.standard_normal((2, 12, HIDDEN)), jnp.float32)
    grads = nnx.jit(nnx.grad(lambda model, x: jnp.mean(model(x) ** 2)))(model, x)
    flat = {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(grads)}
    assert set(flat) == set(state_dict(model))
    for name, leaf in flat.items():
        assert np.abs(np.asarray(leaf[...])).max() > 0, name


def test_generation_scans() -> None:
    """A generation loop as a program: the cache is a pytree of fixed shapes."""
    model = layer()
    x = jnp.asarray(rng.standard_normal((2, 15, HIDDEN)), jnp.float32)
    graph, state = nnx.split(model)

    @jax.jit
    def run(state: Any, x: jax.Array, cache: GenerationCache) -> jax.Array:
        def step(cache, token):
            y, cache = nnx.merge(graph, state).step(token, cache)
            return cache, y

        return jax.lax.scan(step, cache, x.swapaxes(0, 1))[1].swapaxes(0, 1)

    close(run(state, x, model.new_cache(2, max_length=15)), forward(model, x))
