"""What a mesh asks of a function: arrays that vary over its manual axes, and axes whose splits are part of a type.

Inside `jax.shard_map` the type of an array says over which mesh axes it differs from device to device. The carry of a
scan must enter and leave with one type, and a cotangent must have that of its primal; `vary` and `sum_to` see to that.
Over explicit axes the type of an array also says how it is split, and every reshape or product must be told how its
result is. `without_explicit_axes` leaves these choices to the compiler and states the split of the results alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from rattention.spec import Call


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


def without_explicit_axes(run: Callable[..., Any], arrays: tuple[Any, ...], outputs: Any) -> Any:
    """`run(*arrays)`; over explicit axes by the compiler's own partitioning.

    Args:
        outputs: how the results are split: a tree like theirs of `Split`.
    """
    mesh, axes = explicit_axes(arrays)
    if not axes:
        return run(*arrays)
    shardings = jax.tree.map(
        lambda x: NamedSharding(mesh, x.spec(mesh)), outputs, is_leaf=lambda x: isinstance(x, Split)
    )
    return jax.sharding.auto_axes(run, axes=axes, out_sharding=shardings)(*arrays)


def together(arrays: Any) -> Any:
    """The same arrays. If one is on explicit axes, those that nobody has put there are whole on each device.

    A compiled program does so by itself, but it then gives back gradients of no mesh, which do not add up with others
    where a mesh is set. So this is done before the program, where the derivative sees it. Without a mesh in context an
    array cannot be split anew, but it can be put on the mesh of one that is there: an eager call that nothing
    differentiates needs no `jax.set_mesh`.
    """
    mesh, axes = explicit_axes(arrays)
    if not axes:
        return arrays
    there = _devices_of(mesh, arrays) if jax.sharding.get_abstract_mesh().empty else None

    def put(x: Any) -> Any:
        if jax.typeof(x).sharding.mesh == mesh or not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        if there is not None:
            return jax.device_put(x, NamedSharding(there, PartitionSpec()))
        return jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec()))

    return jax.tree.map(put, arrays)


def _devices_of(mesh: Any, arrays: Any) -> Any:
    """The mesh of devices behind the abstract `mesh`: that of the first array with values on it; None if all are
    traced."""
    for x in jax.tree.leaves(arrays):
        if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer) and jax.typeof(x).sharding.mesh == mesh:
            return x.sharding.mesh  # pyright: ignore[reportAttributeAccessIssue]
    return None


class Split(NamedTuple):
    """The mesh axes wished for each dimension of an array, None for none, and its sizes."""

    entries: tuple[Any, ...]
    sizes: tuple[int, ...]

    def spec(self, mesh: Any) -> PartitionSpec:
        """The wishes that can be met: whose axes divide the dimension and split no other before it."""
        found, used = [], set()
        for entry, size in zip(self.entries, self.sizes, strict=True):
            names = () if entry is None else entry if isinstance(entry, tuple) else (entry,)
            fits = not used.intersection(names) and size % math.prod(mesh.shape[name] for name in names) == 0
            found.append(entry if fits else None)
            used.update(names if fits else ())
        return PartitionSpec(*found)


def entries(x: Any) -> tuple[Any, ...]:
    """The mesh axes of each dimension of an array, as its type names them."""
    return tuple(jax.typeof(x).sharding.spec)


def on_each_device(run: Callable[[Any], Any], call: Call, tensors: dict[str, Any]) -> Any:
    """`run(tensors)`; over explicit axes by each device on its own part of batch and heads, the rest gathered."""
    mesh, axes = explicit_axes(tensors)
    if not axes:
        return run(tensors)
    wished = _wished(call, tensors)
    heads = Split((wished["Hq"],), (math.gcd(call.dims["Hq"], call.dims["Hkv"]),)).spec(mesh)[0]
    batch = Split((heads, wished["B"]), (call.dims["Hq"], call.dims["B"])).spec(mesh)[1]
    split = {"B": batch, "Hq": heads, "Hkv": heads}
    specs = {
        t.name: PartitionSpec(*(split.get(d) for d in t.shape)) for t in call.operation.tensors if t.name in tensors
    }
    given = {name: jax.sharding.reshard(x, NamedSharding(mesh, specs[name])) for name, x in tensors.items()}
    outputs = {o.name: PartitionSpec(*(split.get(d) for d in o.shape)) for o in call.operation.outputs}
    mapped = jax.shard_map(run, mesh=mesh, in_specs=(specs,), out_specs=outputs, axis_names=set(axes))
    return mapped(given)


def like_inputs(call: Call, tensors: Mapping[str, Any]) -> dict[str, Split]:
    """Outputs of a call: each dimension is split as in the first tensor that splits it."""
    wished = _wished(call, tensors)
    wished["Wnext"] = wished.get("W")
    return {
        o.name: Split(tuple(wished.get(d) for d in o.shape), tuple(call.dims[d] for d in o.shape))
        for o in call.operation.outputs
    }


def _wished(call: Call, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The mesh axes of each dimension symbol."""
    wished: dict[str, Any] = {}
    for tensor in call.operation.tensors:
        if tensor.name in tensors:
            for symbol, entry in zip(tensor.shape, entries(tensors[tensor.name]), strict=True):
                wished.setdefault(symbol, entry)
                wished[symbol] = wished[symbol] or entry
    return wished
