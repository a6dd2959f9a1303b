"""Operations on arrays split over 4 forced host devices, against the same calls on one; one line of JSON.

A program, run by test_jax_meshes.py in its own process: the number of devices is fixed when JAX starts. `shard_map`
keeps its defaults, so that JAX checks over which mesh axes each value varies, and `jax.make_mesh` its own, axes whose
splits are part of the type of an array. Batch and heads are split, alone or together.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from rattention.jax import sharded
from rattention.jax.nn import RAttention
from rattention.spec import SpecError, load


def neighbour(name: str) -> ModuleType:
    """A module of this folder, which is no package."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


settings = neighbour("test_jax_settings")
SPLITS = {"batch": {"B": "x"}, "heads": {"Hq": "y", "Hkv": "y", "H": "y"}}
SPLITS["both"] = SPLITS["batch"] | SPLITS["heads"]


NAMES = ("everything", "scan", "softmax branch", "linear branch", "decode", "long prefill", "feature map", "mix")


def specs(op: str, names: Any, split: str) -> dict[str, PartitionSpec]:
    shapes = {t.name: t.shape for t in load().operations[op].tensors}
    return {n: PartitionSpec(*(SPLITS[split].get(d) for d in shapes[n])) for n in names}


def flat(op: str, outputs: Any) -> dict[str, jax.Array]:
    """Outputs by their names in the specification."""
    found = jax.tree.leaves(outputs)
    return dict(zip([o.name for o in load().operations[op].outputs], found, strict=True))


def run(op: str, attrs: dict[str, Any]) -> Callable[..., Any]:
    """Outputs by name, all that there are."""
    more = {"return_final_state": True} if op in ("rattention", "residual_linear_attention") else {}
    return lambda tensors: flat(op, settings.call(op, tensors, attrs | more))


def both_ways(f: Callable[..., Any]) -> Callable[..., Any]:
    """Outputs, and gradients of a loss of them."""

    def loss(moving: dict[str, Any], fixed: dict[str, Any]) -> Any:
        outputs = f(moving | fixed)
        return sum(jnp.sum(jnp.sin(x)) for x in outputs.values() if x.dtype != jnp.int32), outputs

    return jax.jit(lambda tensors: jax.grad(loss, has_aux=True)(*settings.parted(tensors)))


def worst(found: Any, expected: Any) -> float:
    """Largest difference, as a share of the largest element of each array that is compared."""
    shares = jax.tree.map(
        lambda x, y: float(np.max(np.abs(np.asarray(x, np.float64) - y), initial=0) / max(np.max(np.abs(y)), 1)),
        found,
        jax.tree.map(lambda y: np.asarray(y, np.float64), expected),
    )
    return max(jax.tree.leaves(shares))


def functions() -> dict[str, float]:
    report = {}
    auto = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    explicit = jax.make_mesh((2, 2), ("x", "y"))
    assert set(explicit.axis_types) == {AxisType.Explicit}
    for name in NAMES:
        op, tensors, attrs = settings.drawn(name, "float32", "float32")
        expected = both_ways(run(op, attrs))(tensors)
        for split in ("both", "heads") if name == "decode" else ("both",):
            given = specs(op, tensors, split)
            shapes = {o.name: o.shape for o in load().operations[op].outputs}
            out = {n: PartitionSpec(*(SPLITS[split].get(d) for d in shape)) for n, shape in shapes.items()}
            mapped = jax.shard_map(run(op, attrs), mesh=auto, in_specs=(given,), out_specs=out)
            report[f"{name}, {split}, shard_map"] = worst(both_ways(mapped)(tensors), expected)
            placed = {n: jax.device_put(x, NamedSharding(explicit, given[n])) for n, x in tensors.items()}
            with jax.set_mesh(explicit):
                found = both_ways(run(op, attrs))(placed)
            for n, x in found[1].items():
                assert x.sharding.is_equivalent_to(NamedSharding(explicit, out[n]), x.ndim), (name, n, x.sharding)
            report[f"{name}, {split}, explicit"] = worst(found, expected)
    return report


def training() -> dict[str, float]:
    """Gradients taken inside shard_map: those of replicated weights are summed over the devices."""
    op, tensors, attrs = settings.drawn("scan", "float32", "float32")
    expected = both_ways(run(op, attrs))(tensors)[0]
    given = specs(op, tensors, "both")
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    moving, _ = settings.parted(tensors)
    inside = jax.shard_map(
        lambda tensors: both_ways(run(op, attrs))(tensors)[0],
        mesh=mesh,
        in_specs=(given,),
        out_specs={n: given[n] for n in moving},
    )
    return {"gradient inside shard_map": worst(jax.jit(inside)(tensors), expected)}


def places() -> dict[str, float]:
    """Arrays that their owner has put on two devices are refused by name (ERR-15); JAX moves those that nobody put."""
    op, tensors, attrs = settings.drawn("decode", "float32", "float32")
    expected = run(op, attrs)(tensors)
    placed = {n: jax.device_put(x, jax.devices()[1]) if n in "qkv" else x for n, x in tensors.items()}
    moved = worst(run(op, attrs)(placed), expected)
    placed["memory"] = jax.device_put(tensors["memory"], jax.devices()[2])
    with pytest.raises(SpecError, match=r"memory: expected device cpu:1, that of q, got cpu:2 \(ERR-15\)"):
        run(op, attrs)(placed)
    return {"placed": moved}


def layers() -> dict[str, float]:
    report = {}
    mesh = jax.make_mesh((2, 2), ("x", "y"))
    x = np.random.default_rng(0).standard_normal((2, 20, 24)).astype(np.float32)
    options: dict[str, Any] = {"window": 5, "qk_norm": True, "qk_scale": True, "memory": True, "bias": True}
    layer = RAttention(24, 4, 2, 8, **options, rngs=nnx.Rngs(0))
    graph, state = nnx.split(layer)

    def train(state: Any, x: Any) -> Any:
        return jax.grad(lambda state, x: (jnp.sum(jnp.sin(nnx.merge(graph, state)(x))), 0.0)[0])(state, x)

    def generate(state: Any, x: Any, cache: Any) -> Any:
        model = nnx.merge(graph, state)
        y, cache = model.prefill(x, cache)
        z, cache = model.step(x[:, 0], cache.reset(jnp.array([True, False])))
        return y, z, cache.tensors

    cache = layer.new_cache(2, max_length=64)
    expected = layer(x), jax.jit(train)(state, x), jax.jit(generate)(state, x, cache)

    def place(path: Any, param: Any) -> Any:
        # As tensor parallelism does: heads of the projections, and the input of the last one.
        name = ".".join(str(getattr(p, "key", getattr(p, "name", p))) for p in path)
        heads = any(part in name for part in ("_proj", "_weight", "memory")) and "o_proj" not in name
        spec = PartitionSpec("y") if heads else PartitionSpec(None, "y") if "o_proj.weight" in name else PartitionSpec()
        return jax.device_put(param, NamedSharding(mesh, spec))

    split = jax.tree_util.tree_map_with_path(place, state)
    for name, spec in (("batch", PartitionSpec("x")), ("hidden", PartitionSpec("x", None, "y"))):
        given = jax.device_put(x, NamedSharding(mesh, spec))
        with jax.set_mesh(mesh):
            caches = jax.tree.map(lambda t: jax.device_put(t, NamedSharding(mesh, PartitionSpec())), cache)
            batch = jax.tree.map(lambda t: jax.device_put(t, NamedSharding(mesh, PartitionSpec("x"))), cache.tensors)
            caches = caches._replace(tensors=batch)
            found = (
                nnx.merge(graph, split)(given),
                jax.jit(train)(split, given),
                jax.jit(generate)(split, given, caches),
            )
        report[f"layer, {name}"] = worst(found, expected)
    return report


def split_sequences() -> dict[str, float]:
    """`rattention.jax.sharded` over explicit axes, with and without a mesh in context."""
    report = {}
    mesh = jax.make_mesh((1, 2, 2), ("data", "sequence", "model"))
    spec = PartitionSpec("data", "sequence", "model")
    for name in ("everything", "scan"):
        op, tensors, attrs = settings.drawn(name, "float32", "float32")
        attrs = attrs | {"return_final_state": True}

        def whole(tensors: dict[str, Any], attrs: dict[str, Any] = attrs) -> Any:
            return flat("rattention", sharded.rattention(**tensors, **attrs, mesh=mesh, spec=spec))

        expected = both_ways(run(op, attrs))(tensors)
        report[f"sharded, {name}"] = worst(jax.jit(whole)(tensors), expected[1])
        with jax.set_mesh(mesh):
            placed = {n: jax.device_put(x, NamedSharding(mesh, PartitionSpec())) for n, x in tensors.items()}
            report[f"sharded, {name}, set_mesh"] = worst(both_ways(whole)(placed), expected)
    return report


def mixed() -> dict[str, float]:
    """Eager gradients where some arguments are on explicit axes and others nowhere; they add up with what is there.

    Also a split sequence over a mesh of both kinds of axes.
    """
    report = {}
    mesh = jax.make_mesh((2, 2), ("x", "y"))
    op, tensors, attrs = settings.drawn("everything", "float32", "float32")
    moving, fixed = settings.parted(tensors)

    def loss(moving: dict[str, Any]) -> Any:
        return sum(jnp.sum(jnp.sin(x)) for x in run(op, attrs)(moving | fixed).values())

    layer = RAttention(24, 4, 2, 8, window=5, qk_norm=True, bias=True, rngs=nnx.Rngs(0))
    graph, state = nnx.split(layer)
    x = jnp.ones((2, 20, 24))

    def train(state: Any) -> Any:
        return jnp.sum(jnp.sin(nnx.merge(graph, state)(x)))

    expected = jax.jit(jax.grad(loss))(moving), jax.jit(jax.grad(train))(state)
    with jax.set_mesh(mesh):
        placed = {n: jax.device_put(moving[n], NamedSharding(mesh, PartitionSpec("x"))) if n == "q" else moving[n]
                  for n in moving}  # fmt: skip
        found = jax.grad(loss)(placed), jax.grad(train)(state)
        used = jax.tree.map(lambda g: jnp.abs(g) * jnp.sign(g) + jnp.zeros(g.shape), found)
    report["mixed, functions"] = worst(used[0], expected[0])
    report["mixed, layer"] = worst(jax.tree.leaves(used[1]), jax.tree.leaves(expected[1]))

    both = jax.make_mesh((2, 2), ("data", "sequence"), axis_types=(AxisType.Explicit, AxisType.Auto))
    op, tensors, attrs = settings.drawn("scan", "float32", "float32")
    split = jax.jit(lambda t: sharded.rattention(**t, **attrs, mesh=both, spec=PartitionSpec(("data",), "sequence")))
    report["sharded, both kinds of axes"] = worst(split(tensors), run(op, attrs)(tensors)["out"])
    return report


def eager() -> dict[str, float]:
    """Eager calls with some arguments on explicit axes and others nowhere, and no mesh in context: of functions on both
    implementations, of a layer beside a batch on the mesh, and of a layer on the mesh beside an unplaced batch."""
    report = {}
    mesh = jax.make_mesh((2, 2), ("x", "y"))
    op, tensors, attrs = settings.drawn("everything", "float32", "float32")
    expected = run(op, attrs)(tensors)
    whole = NamedSharding(mesh, PartitionSpec("x"))
    for impl in ("xla", "pallas"):
        for kind in (jnp.asarray, np.asarray):
            given = {n: jax.device_put(x, whole) if n in "qkv" else kind(x) for n, x in tensors.items()}
            found = run(op, attrs | {"impl": impl})(given)
            assert found["out"].sharding.is_equivalent_to(whole, 4)
            report[f"{impl}, {kind.__module__}"] = worst(found, expected)

    def generate(layer: Any, x: Any) -> Any:
        y, cache = layer.prefill(x, layer.new_cache(2, max_length=32))
        z, cache = layer.step(x[:, 0], cache.reset([0]))
        return layer(x), y, z, cache.tensors

    layer = RAttention(24, 4, 2, 8, window=5, qk_norm=True, bias=True, memory=True, rngs=nnx.Rngs(0))
    graph, state = nnx.split(layer)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 20, 24)), jnp.float32)
    placed = nnx.merge(graph, jax.device_put(state, NamedSharding(mesh, PartitionSpec())))
    expected = generate(layer, x)
    with jax.transfer_guard("disallow"):
        report["layer, batch on the mesh"] = worst(layer(jax.device_put(x, whole)), expected[0])
    report["generation, batch on the mesh"] = worst(generate(layer, jax.device_put(x, whole)), expected)
    report["layer on the mesh"] = worst(generate(placed, x), expected)
    report["both on the mesh, cache nowhere"] = worst(generate(placed, jax.device_put(x, whole)), expected)
    report["layer on the mesh, closed over"] = worst(jax.jit(lambda x: placed(x))(x), expected[0])

    one = nnx.merge(graph, jax.device_put(state, jax.devices()[1]))
    calls: list[tuple[Any, Any]] = [(one, x), (one.q_proj, x), (one.q_norm, x[..., :8])]
    for call, given in calls:
        with pytest.raises(SpecError, match=r"weight: expected device cpu:0, .*, that of x, got cpu:1 \(ERR-15\)"):
            call(jax.device_put(given, whole))
    with pytest.raises(SpecError, match=r"weight: expected device cpu:2, that of x, got cpu:1 \(ERR-15\)"):
        one(jax.device_put(x, jax.devices()[2]))
    return report


PARTS = {"functions": functions, "places": places, "training": training, "layers": layers, "sequences": split_sequences}
PARTS |= {"mixed": mixed, "eager": eager}


if __name__ == "__main__":
    print(json.dumps(PARTS[sys.argv[1]]() if sys.argv[1:] else {k: v for f in PARTS.values() for k, v in f().items()}))
