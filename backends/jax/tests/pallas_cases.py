"""`impl="pallas"` under the transformations of JAX, against the XLA form, on 4 forced host devices; one line of JSON.

A program, run by test_pallas_transforms.py in its own process: the number of devices is fixed when JAX starts.
"""

from __future__ import annotations

import json
import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from rattention.jax import rattention
from rattention.jax.pallas import watch

B, T, HQ, HKV, D, W = 2, 40, 4, 2, 8, 9
rng = np.random.default_rng(5)


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


ARGS = (normal(B, T, HQ, D), normal(B, T, HKV, D), normal(B, T, HKV, D), normal(HQ, D), normal(HQ, D))
COTANGENT = normal(B, T, HQ, D)


def attend(*args: jax.Array, impl: str = "pallas") -> jax.Array:
    return rattention(*args, window=W, impl=impl)


def gradients(f, *args: jax.Array, cotangent: jax.Array = COTANGENT) -> tuple[jax.Array, ...]:
    out, pull = jax.vjp(f, *args)
    return (out, *pull(cotangent))


def worst(found: tuple, expected: tuple) -> float:
    """Largest difference, as a share of the largest element of what is compared."""
    shares = [float(jnp.max(jnp.abs(x - y)) / jnp.max(jnp.abs(y))) for x, y in zip(found, expected, strict=True)]
    return max(shares)


def main() -> None:
    expected = gradients(lambda *x: attend(*x, impl="xla"), *ARGS)
    report = {"jit": worst(jax.jit(lambda *x: gradients(attend, *x))(*ARGS), expected)}
    # The TPU interpreter's callbacks are effects, which checkpoint refuses; the plain interpreter has none.
    careful, watch.interpreter = watch.interpreter, lambda name: True
    report["checkpoint"] = worst(jax.jit(lambda *x: gradients(jax.checkpoint(attend), *x))(*ARGS), expected)
    watch.interpreter = careful

    stacked = tuple(jnp.stack([x, 0.5 * x]) for x in ARGS)
    mapped = jax.jit(jax.vmap(lambda *x: gradients(attend, *x)))(*stacked)
    report["vmap, first"] = worst(tuple(x[0] for x in mapped), expected)
    half = gradients(lambda *x: attend(*x, impl="xla"), *(0.5 * x for x in ARGS))
    report["vmap, second"] = worst(tuple(x[1] for x in mapped), half)

    mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("batch", "heads"))
    qkv = PartitionSpec("batch", None, "heads")
    gain = PartitionSpec("heads")
    shard = jax.shard_map(attend, mesh=mesh, in_specs=(qkv, qkv, qkv, gain, gain), out_specs=qkv, check_vma=False)
    report["shard_map"] = worst(jax.jit(lambda *x: gradients(shard, *x))(*ARGS), expected)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
