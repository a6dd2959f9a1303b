"""Sharded against the reference on 8 forced host devices; a program, run by test_jax_sharded.py in its own process."""

from __future__ import annotations

import sys
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rattention.jax import sharded
from rattention.jax.sharded import exchange
from rattention.numpy import budget

rng = np.random.default_rng(5)
AXES = ("data", "sequence", "model")
B, T, HQ, HKV, D, DV = 2, 32, 4, 2, 6, 5
FIXED = ("rope_cos", "rope_sin", "positions", "segment_ids")
COTANGENTS = ("d_out", "d_final_state")


def inputs() -> dict[str, np.ndarray]:
    shapes = {"q": (B, T, HQ, D), "k": (B, T, HKV, D), "v": (B, T, HKV, DV), "swa_weight": (HQ, DV)}
    shapes |= {"rla_weight": (HQ, DV), "q_scale": (D,), "k_scale": (D,), "memory": (HQ, 2 * D, DV)}
    shapes |= {"initial_state": (B, HKV, 2 * D, DV), "d_out": (B, T, HQ, DV), "d_final_state": (B, HKV, 2 * D, DV)}
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    angle = rng.uniform(-3, 3, (T, D // 2))
    return tensors | {"rope_cos": np.cos(angle).astype(np.float32), "rope_sin": np.sin(angle).astype(np.float32)}


def documents() -> dict[str, np.ndarray]:
    """Packed rows: borders and padding inside shards, at their edges and over several; what padding holds is NaN."""
    tensors = inputs()
    ids = np.array([[0] * 3 + [7] * 11 + [2] * 12 + [9] * 2 + [0] * 4, [0] * 9 + [4] * 20 + [0] + [1] * 2], np.int32)
    for name in "qkv":
        tensors[name][ids == 0] = np.nan
    return tensors | {"segment_ids": ids}


def placed() -> dict[str, np.ndarray]:
    """Explicit positions, and a row of padding alone."""
    ids = np.array([[5] * 30 + [0] * 2, [0] * T], np.int32)
    return inputs() | {"segment_ids": ids, "positions": rng.integers(0, T, (B, T)).astype(np.int32)}


def worst_share(mesh_shape: tuple[int, ...], window: int, tensors: dict[str, np.ndarray]) -> float:
    """Largest error of outputs and gradients, as a share of the reference's budget."""
    mesh = Mesh(np.array(jax.devices()[: np.prod(mesh_shape)]).reshape(mesh_shape), AXES)
    spec = PartitionSpec(*AXES)
    fixed: dict[str, Any] = {name: tensors[name] for name in FIXED if name in tensors}
    moving = {n: x for n, x in tensors.items() if n not in fixed and n not in COTANGENTS}
    moving |= {n: jax.device_put(moving[n], NamedSharding(mesh, spec)) for n in "qkv"}

    @jax.jit
    def run(moving: dict, cotangents: tuple) -> tuple:
        def call(moving: dict[str, Any]) -> tuple:
            return sharded.rattention(**moving, **fixed, mesh=mesh, spec=spec, window=window, return_final_state=True)

        outputs, pull = jax.vjp(call, moving)
        return outputs, pull(cotangents)[0]

    (out, state), gradients = run(moving, tuple(tensors[n] for n in COTANGENTS))
    assert out.sharding.is_equivalent_to(NamedSharding(mesh, spec), 4), out.sharding
    found = {"out": out, "final_state": state} | {f"d_{n}": g for n, g in gradients.items()}
    forward = {n: x for n, x in tensors.items() if n not in COTANGENTS}
    expected = budget.evaluate("rattention", forward, {"window": window})
    expected |= budget.evaluate("rattention.vjp", tensors, {"window": window})
    assert set(found) == set(expected)
    shares = []
    for name, (value, allowed) in expected.items():
        error = np.abs(np.asarray(found[name], np.float64) - value)
        shares.append(np.max(np.where(error == 0, 0, error / np.maximum(allowed, 1e-300))))
    return float(np.max(shares))


def main() -> None:
    # Batch, sequence and heads together; the sequence alone; and the window inside a shard, over several, over all.
    for make, mesh_shape, window in (
        (inputs, (2, 2, 2), 5),
        (inputs, (1, 8, 1), 11),
        (inputs, (1, 4, 2), 8),
        (inputs, (2, 4, 1), -1),
        (inputs, (1, 8, 1), 0),
        (inputs, (1, 4, 1), 40),
        (documents, (2, 2, 2), 5),
        (documents, (1, 8, 1), 1),
        (documents, (1, 4, 2), 11),
        (documents, (2, 4, 1), -1),
        (placed, (1, 8, 1), 2),
    ):
        share = worst_share(mesh_shape, window, make())
        print(f"{make.__name__}, mesh {mesh_shape}, window {window}: worst share of the budget {share:.3f}")
        assert share <= 1, "sharded differs from the reference"
    # The comparison sees what a wrong implementation loses.
    whole = exchange.exclusive_sum
    for make, name, broken in (
        (inputs, "halo", lambda x, slots, axis, devices: x[:, :1].repeat(slots, 1) * 0),
        (inputs, "exclusive_sum", lambda x, axis, devices: 0 * x),
        (documents, "exclusive_sum", lambda x, axis, devices, joined: whole(x, axis, devices)),
    ):
        kept = getattr(exchange, name)
        setattr(exchange, name, broken)
        share = worst_share((1, 4, 2), 3, make())
        setattr(exchange, name, kept)
        print(f"{make.__name__}, broken {name}: worst share of the budget {share:.3g}")
        assert share > 10, f"a broken {name} was not noticed"


if __name__ == "__main__":
    sys.exit(main())
