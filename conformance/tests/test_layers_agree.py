"""The Torch layer and the JAX layer with the same weights: forward, gradients, generation.

In float64, where rounding is no excuse: what differs by more than 1e-9 differs in meaning.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
jax = pytest.importorskip("jax", reason="jax is not installed")
nnx = pytest.importorskip("flax.nnx", reason="flax is not installed")

from rattention.jax import nn as jax_nn  # noqa: E402
from rattention.torch import nn as torch_nn  # noqa: E402
from safetensors.numpy import load_file, save_file  # noqa: E402
from safetensors.torch import load_file as load_torch_file  # noqa: E402
from safetensors.torch import save_file as save_torch_file  # noqa: E402

HIDDEN, HEADS, KV_HEADS, DIM = 20, 6, 2, 4
LAYERS: dict[str, dict[str, Any]] = {
    "everything": {"window": 5, "value_dim": 3, "qk_norm": True, "qk_scale": True, "memory": True, "bias": True},
    "plain": {"window": 4},
    "no rotary": {"window": 0, "rope_theta": None, "feature_map": "relu"},
    "linear alone": {"window": -1, "feature_map": "identity", "memory": True},
    "other eps": {"window": 3, "eps": 1e-2, "qk_norm": True, "rope_theta": 500.0},
}


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


@pytest.fixture(params=LAYERS, ids=lambda name: name.replace(" ", "-"))
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Any]:
    """A Torch layer with random weights, and a JAX layer that read them from a file."""
    options = LAYERS[request.param]
    torch.manual_seed(1)
    one = torch_nn.RAttention(HIDDEN, HEADS, KV_HEADS, DIM, **options).double()
    with torch.no_grad():
        for p in one.parameters():
            p.normal_(0.2, 0.6)
        if one.memory is not None:  # which the Torch layer holds in float32 whatever its other parameters are
            one.memory.copy_(one.memory.float())
    save_torch_file(one.state_dict(), tmp_path / "layer.safetensors")
    made: dict[str, Any] = {"param_dtype": np.float64, "rngs": nnx.Rngs(0)}
    other = jax_nn.RAttention(HIDDEN, HEADS, KV_HEADS, DIM, **options, **made)
    jax_nn.load_state_dict(other, load_file(tmp_path / "layer.safetensors"))
    return one, other


def same(x: Any, y: Any) -> None:
    x = x.detach().numpy() if isinstance(x, torch.Tensor) else np.asarray(x)
    y = np.asarray(y)
    assert x.dtype == y.dtype == np.float64
    np.testing.assert_allclose(x, y, rtol=0, atol=1e-9 * max(np.abs(x).max(), 1))


def test_weights_travel_both_ways(pair: tuple[Any, Any], tmp_path: Path) -> None:
    one, other = pair
    save_file(jax_nn.state_dict(other), tmp_path / "back.safetensors")
    back = load_torch_file(tmp_path / "back.safetensors")
    assert set(back) == set(one.state_dict())
    for name, x in one.state_dict().items():
        assert torch.equal(back[name], x), name
    one.load_state_dict(back)


def test_forward_and_gradients(pair: tuple[Any, Any]) -> None:
    one, other = pair
    rng = np.random.default_rng(2)
    x, d = rng.standard_normal((2, 2, 33, HIDDEN))
    ids = np.zeros((2, 33), np.int32)
    ids[0, :14], ids[0, 14:30] = 4, 2
    ids[1, 5:] = 9
    leaf = torch.tensor(x, requires_grad=True)
    y = one(leaf, segment_ids=torch.tensor(ids))
    y.backward(torch.tensor(d))

    graph, state = nnx.split(other)

    @jax.jit
    def run(state: Any, x: Any) -> Any:
        y, pull = jax.vjp(lambda state, x: nnx.merge(graph, state)(x, segment_ids=ids), state, x)
        return y, *pull(jax.numpy.asarray(d))

    z, d_model, d_x = run(state, x)
    same(y, z)
    same(leaf.grad, d_x)
    gradients = {".".join(map(str, path)): g[...] for path, g in nnx.to_flat_state(d_model)}
    assert set(gradients) == {name for name, _ in one.named_parameters()}
    for name, p in one.named_parameters():
        if name == "memory":  # its gradient has passed through float32
            np.testing.assert_allclose(p.grad.numpy(), gradients[name].astype(np.float32), rtol=1e-6, atol=1e-9)
        else:
            same(p.grad, gradients[name])


def test_generation(pair: tuple[Any, Any]) -> None:
    """Ragged prompts, steps with a pause, a row started over, and on."""
    one, other = pair
    rng = np.random.default_rng(3)
    cache, there = one.new_cache(3), other.new_cache(3, max_length=40)
    prompt, lengths = rng.standard_normal((3, 9, HIDDEN)), np.array([9, 2, 6], np.int32)
    step = nnx.jit(lambda model, x, cache, active: model.step(x, cache, active=active))
    with torch.no_grad():
        y = one.prefill(torch.tensor(prompt), cache, lengths=torch.tensor(lengths))
        z, there = other.prefill(prompt, there, lengths=lengths)
        same(y, z)
        for turn in range(12):
            if turn == 7:
                cache.reset([1])
                there = there.reset([1])
            x, active = rng.standard_normal((3, HIDDEN)), np.array([True, turn % 3 != 0, True])
            y = one.step(torch.tensor(x), cache, active=torch.tensor(active))
            z, there = step(other, x, there, active)
            same(y, z)
    np.testing.assert_array_equal(cache.length.numpy(), there.length)
    for x, y in zip(cache.tensors[:3], there.tensors[:3], strict=True):
        same(x, y) if x.numel() else None
