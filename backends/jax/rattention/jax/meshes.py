"""What a mesh asks of a function: arrays that vary over its manual axes, and axes whose splits are part of a type.

Inside `jax.shard_map` the type of an array says over which mesh axes it differs from device to device. The carry of a
scan must enter and leave with one type, and a cotangent must have that of its primal; `vary` and `sum_to` see to that.
Over explicit axes the type of an array also says how it is split, and every reshape or product must be told how its
result is. `without_explicit_axes` leaves these choices to the compiler and states the split of the outputs alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from rattention.spec import Call

Arrays = dict[str, Any]


def varying(*trees: Any) -> frozenset[Any]:
    """The manual mesh axes over which any array of `trees` varies; none outside of `jax.shard_map`."""
    return frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(trees)))


def vary(tree: Any, axes: frozenset[Any]) -> Any:
    """The same arrays, typed as varying over `axes` too. The transpose is a sum over these axes."""

    def cast(x: Any) -> Any:
        missing = tuple(axes - varying(x))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree)


def sum_to(tree: Any, like: Any) -> Any:
    """Each array summed over the axes over which it varies and that of `like` does not: cotangents of `like`."""

    def total(x: Any, y: Any) -> Any:
        extra = tuple(varying(x) - varying(y))
        return lax.psum(x, extra) if extra else x

    return jax.tree.map(total, tree, like)


def explicit_axes(*trees: Any) -> tuple[Any, tuple[Any, ...]]:
    """The mesh of the arrays and its explicit axes, empty where there are none."""
    for x in jax.tree.leaves(trees):
        mesh = jax.typeof(x).sharding.mesh
        axes = tuple(n for n, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit)
        if axes:
            return mesh, axes
    return None, ()


def without_explicit_axes(run: Callable[[Arrays], Arrays], call: Call, tensors: Arrays) -> Arrays:
    """`run(tensors)`; over explicit axes with the compiler's own partitioning, outputs split as the inputs are."""
    mesh, axes = explicit_axes(tensors)
    if not axes:
        return run(tensors)
    splits = _splits(call, tensors)
    outputs = {o.name: tuple(o.shape) for o in call.operation.outputs}
    shardings = {name: NamedSharding(mesh, _spec(shape, splits, call, mesh)) for name, shape in outputs.items()}
    return jax.sharding.auto_axes(run, axes=axes, out_sharding=shardings)(tensors)


def _splits(call: Call, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The mesh axes of each dimension symbol, by the first tensor that splits it."""
    found: dict[str, Any] = {}
    for tensor in call.operation.tensors:
        if tensor.name in tensors:
            for symbol, entry in zip(tensor.shape, jax.typeof(tensors[tensor.name]).sharding.spec, strict=True):
                if entry is not None:
                    found.setdefault(symbol, entry)
    return found | ({"Wnext": found["W"]} if "W" in found else {})


def _spec(shape: tuple[str, ...], splits: Mapping[str, Any], call: Call, mesh: Any) -> PartitionSpec:
    """The split of an output: that of its dimensions, where it divides them and no axis comes twice."""
    entries, used = [], set()
    for symbol in shape:
        entry = splits.get(symbol)
        names = () if entry is None else entry if isinstance(entry, tuple) else (entry,)
        count = math.prod(mesh.shape[name] for name in names)
        fits = names and not used.intersection(names) and call.dims[symbol] % count == 0
        entries.append(entry if fits else None)
        used.update(names if fits else ())
    return PartitionSpec(*entries)
