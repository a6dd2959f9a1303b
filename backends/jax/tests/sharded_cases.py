"""Sharded against the reference on 8 forced host devices; a program, run by test_jax_sharded.py in its own process."""

from __future__ import annotations

import sys
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rattention.jax import sharded
from rattention.numpy import budget

rng = np.random.default_rng(5)
AXES = ("data", "sequence", "model")
B, T, HQ, HKV, D, DV = 2, 32, 4, 2, 6, 5
COTANGENTS = ("d_out", "d_final_state")


def inputs() -> dict[str, np.ndarray]:
    shapes = {"q": (B, T, HQ, D), "k": (B, T, HKV, D), "v": (B, T, HKV, DV), "swa_weight": (HQ, DV)}
    shapes |= {"rla_weight": (HQ, DV), "q_scale": (D,), "k_scale": (D,), "memory": (HQ, 2 * D, DV)}
    shapes |= {"initial_state": (B, HKV, 2 * D, DV), "d_out": (B, T, HQ, DV), "d_final_state": (B, HKV, 2 * D, DV)}
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    angle = rng.uniform(-3, 3, (T, D // 2))
    return tensors | {"rope_cos": np.cos(angle).astype(np.float32), "rope_sin": np.sin(angle).astype(np.float32)}


def worst_share(mesh_shape: tuple[int, ...], window: int, tensors: dict[str, np.ndarray]) -> float:
    """Largest error of outputs and gradients, as a share of the reference's budget."""
    mesh = Mesh(np.array(jax.devices()[: np.prod(mesh_shape)]).reshape(mesh_shape), AXES)
    spec = PartitionSpec(*AXES)
    fixed: dict[str, Any] = {name: tensors[name] for name in ("rope_cos", "rope_sin")}
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
    tensors = inputs()
    # Batch, sequence and heads together; the sequence alone; and the window inside a shard, over several, over all.
    for mesh_shape, window in (
        ((2, 2, 2), 5),
        ((1, 8, 1), 11),
        ((1, 4, 2), 8),
        ((2, 4, 1), -1),
        ((1, 8, 1), 0),
        ((1, 4, 1), 40),
    ):
        share = worst_share(mesh_shape, window, tensors)
        print(f"mesh {mesh_shape} window {window}: worst share of the budget {share:.3f}")
        assert share <= 1, "sharded differs from the reference"
    # The comparison sees what a wrong implementation loses.
    for name, broken in (
        ("halo", lambda x, slots, axis, devices: x[:, :1].repeat(slots, 1) * 0),
        ("exclusive_sum", lambda x, axis, devices: 0 * x),
    ):
        whole = getattr(sharded, name)
        setattr(sharded, name, broken)
        share = worst_share((1, 4, 2), 3, tensors)
        setattr(sharded, name, whole)
        print(f"without {name}: worst share of the budget {share:.3g}")
        assert share > 10, f"a missing {name} was not noticed"


if __name__ == "__main__":
    sys.exit(main())
