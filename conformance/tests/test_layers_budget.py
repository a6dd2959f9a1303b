"""Both layers, Torch and JAX, within the reference's error budget: forward, gradients, generation; float32, bfloat16.

The projections are given weights that only select: the hidden state of a token is its queries, keys and values side by
side, and the output is the operation's. Nothing is rounded on the way, so that the layer can be held to the
operation's budget, element by element.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from rattention.numpy import budget, rope_table

torch = pytest.importorskip("torch", reason="torch is not installed")
jax = pytest.importorskip("jax", reason="jax is not installed")
nnx = pytest.importorskip("flax.nnx", reason="flax is not installed")

from rattention.jax import nn as jax_nn  # noqa: E402
from rattention.torch import nn as torch_nn  # noqa: E402

HQ, HKV, D, DV, W = 4, 2, 6, 5, 4
SIZES = {"q": HQ * D, "k": HKV * D, "v": HKV * DV}
HIDDEN = sum(SIZES.values())
SHAPES = {"q": (HQ, D), "k": (HKV, D), "v": (HKV, DV)}
OPTIONS: dict[str, Any] = {"window": W, "qk_scale": True, "memory": True}
SIDE = ("swa_weight", "rla_weight", "q_scale", "k_scale", "memory")

Arrays = dict[str, np.ndarray]


def weights(rng: np.random.Generator, dtype: Any) -> Arrays:
    """A state dict: selecting projections, random parameters of the operation."""
    eye = np.eye(HIDDEN, dtype=dtype)
    found, at = {}, 0
    for name, size in SIZES.items():
        found[f"{name}_proj.weight"] = eye[at : at + size]
        at += size
    found["o_proj.weight"] = np.ascontiguousarray(eye[:, : HQ * DV])
    for name in ("swa_weight", "rla_weight"):
        found[name] = rng.standard_normal((HQ, DV)).astype(dtype)
    for name in ("q_scale", "k_scale"):
        found[name] = rng.standard_normal(D).astype(dtype)
    return found | {"memory": rng.standard_normal((HQ, 2 * D, DV)).astype(np.float32)}


def split(x: np.ndarray) -> Arrays:
    """q, k, v out of hidden states `[B, T, hidden]`, or their gradients out of that of the hidden states."""
    parts = np.split(x, np.cumsum(list(SIZES.values()))[:-1], axis=-1)
    return {name: part.reshape(*x.shape[:2], *SHAPES[name]) for name, part in zip(SIZES, parts, strict=True)}


def to_torch(x: np.ndarray) -> Any:
    x = np.ascontiguousarray(x)
    return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16) if x.dtype.itemsize == 2 else torch.from_numpy(x)


def to_numpy(x: Any) -> np.ndarray:
    if not isinstance(x, torch.Tensor):
        return np.asarray(x)
    x = x.detach()
    return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if x.dtype == torch.bfloat16 else x.numpy()


class Torch:
    def __init__(self, given: Arrays, dtype: Any):
        storage = {np.dtype("float32"): torch.float32, np.dtype("bfloat16"): torch.bfloat16}[np.dtype(dtype)]
        self.layer = torch_nn.RAttention(HIDDEN, HQ, HKV, D, DV, **OPTIONS, dtype=storage)
        self.layer.load_state_dict({name: to_torch(x) for name, x in given.items()})
        self.cache: Any = None

    def gradients(self, x: np.ndarray, ids: np.ndarray, d: np.ndarray) -> tuple[Any, Any, dict[str, Any]]:
        leaf = to_torch(x).requires_grad_()
        y = self.layer(leaf, segment_ids=to_torch(ids))
        y.backward(to_torch(d))
        return y, leaf.grad, {name: p.grad for name, p in self.layer.named_parameters()}

    def prefill(self, x: np.ndarray, lengths: np.ndarray) -> tuple[Any, Any]:
        if self.cache is None:
            self.cache = self.layer.new_cache(x.shape[0])
        with torch.no_grad():
            y = self.layer.prefill(to_torch(x), self.cache, lengths=to_torch(lengths))
        return y, self.cache.tensors


class Jax:
    def __init__(self, given: Arrays, dtype: Any):
        made: dict[str, Any] = {"param_dtype": dtype, "rngs": nnx.Rngs(0)}
        self.layer = jax_nn.RAttention(HIDDEN, HQ, HKV, D, DV, **OPTIONS, **made)
        jax_nn.load_state_dict(self.layer, given)
        self.cache: Any = None

    def gradients(self, x: np.ndarray, ids: np.ndarray, d: np.ndarray) -> tuple[Any, Any, dict[str, Any]]:
        graph, state = nnx.split(self.layer)

        @jax.jit
        def run(state: Any, x: Any) -> Any:
            y, pull = jax.vjp(lambda state, x: nnx.merge(graph, state)(x, segment_ids=ids), state, x)
            return y, *pull(jax.numpy.asarray(d))

        y, d_state, d_x = run(state, x)
        return y, d_x, {".".join(map(str, path)): g[...] for path, g in nnx.to_flat_state(d_state)}

    def prefill(self, x: np.ndarray, lengths: np.ndarray) -> tuple[Any, Any]:
        if self.cache is None:
            self.cache = self.layer.new_cache(x.shape[0], max_length=16)
        run = nnx.jit(lambda layer, x, cache, lengths: layer.prefill(x, cache, lengths=lengths))
        y, self.cache = run(self.layer, x, self.cache, lengths)
        return y, self.cache.tensors


def within(found: Arrays, expected: dict[str, tuple[np.ndarray, np.ndarray]], dtype: Any) -> None:
    assert set(found) == set(expected)
    for name, (value, allowed) in expected.items():
        assert found[name].dtype == (np.float32 if name.endswith(("memory", "state")) else dtype), name
        excess = np.abs(found[name].astype(np.float64).reshape(value.shape) - value) - allowed
        assert np.all(excess <= 0), f"{name} is off by {excess.max()} more than its budget"


@pytest.fixture(params=[Torch, Jax])
def framework(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(params=[np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> Any:
    return request.param


def table(rows: int) -> Arrays:
    return dict(zip(("rope_cos", "rope_sin"), rope_table(np.arange(rows, dtype=np.int32), head_dim=D), strict=True))


def test_forward_and_gradients(framework: Any, dtype: Any) -> None:
    rng = np.random.default_rng(4)
    given = weights(rng, dtype)
    x = rng.standard_normal((2, 27, HIDDEN)).astype(dtype)
    ids = np.array([[3] * 9 + [8] * 15 + [0] * 3, [0] * 2 + [1] * 25], np.int32)
    d_out = rng.standard_normal((2, 27, HQ, DV)).astype(dtype)
    d = np.zeros((2, 27, HIDDEN), dtype)
    d[..., : HQ * DV] = d_out.reshape(2, 27, HQ * DV)
    y, d_x, d_weights = framework(given, dtype).gradients(x, ids, d)

    tensors = split(x) | {name: given[name] for name in SIDE} | table(27) | {"segment_ids": ids}
    out = {"out": to_numpy(y)[..., : HQ * DV]}
    expected = budget.evaluate("rattention", tensors, {"window": W})
    within(out, {"out": expected["out"]}, dtype)
    found = {f"d_{name}": part for name, part in split(to_numpy(d_x)).items()}
    found |= {f"d_{name}": to_numpy(d_weights[name]) for name in SIDE}
    within(found, budget.evaluate("rattention.vjp", tensors | {"d_out": d_out}, {"window": W}), dtype)


def test_generation(framework: Any, dtype: Any) -> None:
    """Ragged prompts, then two more calls, each against the reference from the cache that the layer had before."""
    rng = np.random.default_rng(5)
    given = weights(rng, dtype)
    model = framework(given, dtype)
    cache = {
        "cache_k": np.zeros((3, W, HKV, D), dtype),
        "cache_v": np.zeros((3, W, HKV, DV), dtype),
        "cache_state": np.zeros((3, HKV, 2 * D, DV), np.float32),
        "cache_length": np.zeros(3, np.int32),
    }
    for tokens, lengths in ((9, [9, 2, 6]), (1, [1, 1, 0]), (1, [1, 1, 1])):
        x = rng.standard_normal((3, tokens, HIDDEN)).astype(dtype)
        real = np.array(lengths, np.int32)
        y, after = model.prefill(x, real)
        tensors = split(x) | {name: given[name] for name in SIDE} | table(16) | cache | {"lengths": real}
        expected = budget.evaluate("rattention_extend", tensors, {"window": W})
        cache = {name: to_numpy(part).copy() for name, part in zip(cache, after, strict=True)}
        np.testing.assert_array_equal(cache["cache_length"], expected.pop("cache_length")[0])
        found = {"out": to_numpy(y)[..., : HQ * DV]} | {n: c for n, c in cache.items() if n != "cache_length"}
        within(found, expected, dtype)
