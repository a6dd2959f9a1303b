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
from jax.sharding import Mesh, NamedSharding, PartitionSpec
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
    jax.clear_caches()  # which hold the call as the careful interpreter runs it
    report["checkpoint"] = worst(jax.jit(lambda *x: gradients(jax.checkpoint(attend), *x))(*ARGS), expected)
    watch.interpreter = careful
    jax.clear_caches()

    stacked = tuple(jnp.stack([x, 0.5 * x]) for x in ARGS)
    mapped = jax.jit(jax.vmap(lambda *x: gradients(attend, *x)))(*stacked)
    report["vmap, first"] = worst(tuple(x[0] for x in mapped), expected)
    half = gradients(lambda *x: attend(*x, impl="xla"), *(0.5 * x for x in ARGS))
    report["vmap, second"] = worst(tuple(x[1] for x in mapped), half)

    mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("batch", "heads"))
    qkv = PartitionSpec("batch", None, "heads")
    gain = PartitionSpec("heads")
    shard = jax.shard_map(attend, mesh=mesh, in_specs=(qkv, qkv, qkv, gain, gain), out_specs=qkv)
    report["shard_map"] = worst(jax.jit(lambda *x: gradients(shard, *x))(*ARGS), expected)

    # Over explicit axes the call itself is what shard_map would split.
    mesh = jax.make_mesh((2, 2), ("batch", "heads"))
    specs = (qkv, qkv, qkv, gain, PartitionSpec())
    placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(ARGS, specs, strict=True)]
    with jax.set_mesh(mesh):
        found = jax.jit(lambda *x: gradients(attend, *x))(*placed)
    assert found[0].sharding.is_equivalent_to(NamedSharding(mesh, qkv), 4)
    report["explicit axes"] = worst(found, expected)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
