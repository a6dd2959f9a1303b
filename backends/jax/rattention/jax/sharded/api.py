"""The public function: how a call is split over a mesh, and what cannot be.

Batch and heads need no communication. Along a split sequence each device continues the tokens of those before it
(`sharded.sequence`). Traffic per device: w tokens of k and v, and 1 + log2(n) states, however long the sequence. The
derivative is the transpose of all this, made by JAX: the halo's gradient travels back, the scan runs the other way.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from rattention.jax import arguments, dispatch
from rattention.jax.constants import constants
from rattention.jax.missing import without_row
from rattention.jax.sharded.sequence import documents, on_one_device, one_row
from rattention.jax.xla.plan import named_precision
from rattention.spec import Call, Unsupported

BY_ROW = ("positions", "segment_ids")
"""Integers that every device along the sequence gets whole, 4 bytes per token: who sees what follows without a message.
"""


def rattention(
    q: Any,
    k: Any,
    v: Any,
    swa_weight: Any,
    rla_weight: Any,
    rope_cos: Any = None,
    rope_sin: Any = None,
    positions: Any = None,
    segment_ids: Any = None,
    q_scale: Any = None,
    k_scale: Any = None,
    memory: Any = None,
    initial_state: Any = None,
    *,
    mesh: Mesh | AbstractMesh,
    spec: PartitionSpec,
    window: int | None,
    scale: float | None = None,
    feature_map: str = "softmax",
    eps: float = 1e-6,
    return_final_state: bool = False,
    impl: str | None = None,
    precision: object = None,
    check_values: bool = False,
) -> Any:
    """`rattention.jax.rattention` of global arrays, computed by all devices of a mesh.

    Args:
        mesh: the devices.
        spec: how q, k, v and out `[B, T, H, D]` are split, such as `PartitionSpec("data", "sequence", "model")`;
            None or absent entries are not split. Heads are split in contiguous blocks, query and kv heads alike.
        segment_ids, positions: split by batch alone, also where the sequence is: every device along it gets whole rows.
        impl: as in `rattention.jax.rattention`; a split sequence with segment_ids or positions is for "xla" alone.
        the others: as in `rattention.jax.rattention`.

    Returns:
        `out`, split by `spec`; with `return_final_state` the pair of it and the state, split by batch and heads.

    Raises:
        TypeError: `mesh` is no mesh, or `spec` no PartitionSpec.
        SpecError, ValueError: as `rattention.jax.rattention`.
        Unsupported: an axis that cannot be split so: D, sizes that the mesh does not divide, a sequence over several
            mesh axes, or one with window None (every token needs all others).
    """
    if not isinstance(mesh, Mesh | AbstractMesh):
        raise TypeError(f"mesh: expected a jax.sharding.Mesh, got {arguments.kind(mesh)}")
    if not isinstance(spec, PartitionSpec):
        raise TypeError(f"spec: expected a jax.sharding.PartitionSpec, got {arguments.kind(spec)}")
    precision = named_precision(precision)
    tensors = {
        "q": q,
        "k": k,
        "v": v,
        "swa_weight": swa_weight,
        "rla_weight": rla_weight,
        "rope_cos": rope_cos,
        "rope_sin": rope_sin,
        "positions": positions,
        "segment_ids": segment_ids,
        "q_scale": q_scale,
        "k_scale": k_scale,
        "memory": memory,
        "initial_state": initial_state,
    }
    attrs = {"window": window, "scale": scale, "feature_map": feature_map, "eps": eps}
    call, arrays, seen = dispatch.check("rattention", tensors, attrs, check_values=check_values)
    _, sequence, _ = _axes(call, mesh, spec)
    if sequence is None or not call.dims["T"] or not any(name in arrays for name in BY_ROW):
        dispatch.choose(call, arrays, impl, precision)
    elif impl == "pallas":
        raise Unsupported("a split sequence with segment_ids or positions: the kernels have no such entry")
    else:
        dispatch.choose(call, arrays, impl or "xla", precision)  # which refuses what it does not know
    if window is not None:  # no window reaches further than the sequence, and no larger number has to fit an int32
        call.attributes["window"] = min(call.attributes["window"], call.dims["T"])
    static = tuple(sorted(call.attributes.items()))
    outputs = _program(mesh, spec, static, impl, precision, seen, arrays)
    return (outputs["out"], outputs["final_state"]) if return_final_state else outputs["out"]


@functools.partial(jax.jit, static_argnums=range(6))
def _program(
    mesh: Mesh | AbstractMesh,
    spec: PartitionSpec,
    static: Any,
    impl: Any,
    precision: Any,
    rows_exist: bool,
    arrays: Any,
) -> dict[str, jax.Array]:
    """One compiled program, kept like those of `dispatch.compute`."""
    call, arrays, _ = dispatch.check("rattention", arrays, dict(static))
    arrays = constants(call.operation, arrays)
    batch, sequence, heads = _axes(call, mesh, spec)
    state_spec = PartitionSpec(batch, heads)
    tokens = PartitionSpec(batch, sequence, heads)
    specs = dict.fromkeys(("swa_weight", "rla_weight", "memory"), PartitionSpec(heads))
    specs |= dict.fromkeys("qkv", tokens) | {"initial_state": state_spec}
    specs |= dict.fromkeys(BY_ROW, PartitionSpec(batch))
    specs = {name: specs.get(name, PartitionSpec()) for name in arrays}
    local: Any = functools.partial(_whole_sequence, impl=impl, rows_exist=rows_exist)
    if sequence is not None and call.dims["T"]:
        local = functools.partial(one_row, impl=impl)
        if any(name in arrays for name in BY_ROW):
            local = functools.partial(documents, missing=None if rows_exist else functools.partial(without_row, call))
        local = functools.partial(local, axis=sequence, devices=mesh.shape[sequence])

    if AxisType.Explicit in mesh.axis_types:
        # There the split of an array is part of its type, and must be that of `specs` before shard_map.
        arrays = {name: jax.sharding.reshard(x, _explicit(mesh, specs[name])) for name, x in arrays.items()}
    out, state = jax.shard_map(
        functools.partial(local, attrs=call.attributes, precision=precision),
        mesh=mesh,
        in_specs=(specs,),
        out_specs=(tokens, state_spec),
    )(arrays)
    return {"out": out, "final_state": state}


def _explicit(mesh: Mesh | AbstractMesh, spec: PartitionSpec) -> NamedSharding:
    """The part of a split that the type of an array tells: that over explicit axes."""
    explicit = {n for n, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit}
    entries = []
    for entry in spec:
        names = () if entry is None else entry if isinstance(entry, tuple) else (entry,)
        entries.append(tuple(name for name in names if name in explicit) or None)
    return NamedSharding(mesh, PartitionSpec(*entries))


def _axes(call: Call, mesh: Mesh | AbstractMesh, spec: PartitionSpec) -> tuple[Any, Any, Any]:
    """Mesh axes of batch, sequence and heads.

    Raises:
        Unsupported: as `rattention`.
    """
    entries: list[Any] = [*spec, None, None, None, None][: max(len(spec), 4)]
    if len(entries) > 4 or entries[3] is not None:
        raise Unsupported(f"spec {spec}: only batch, sequence and heads of [B, T, H, D] can be split")
    batch, sequence, heads, _ = entries
    if isinstance(sequence, tuple):
        if len(sequence) > 1:
            raise Unsupported(f"spec {spec}: the sequence can be split over one mesh axis, not over {sequence}")
        sequence = sequence[0] if sequence else None
    dims = call.dims
    for axis, sizes in ((batch, ("B",)), (sequence, ("T",)), (heads, ("Hq", "Hkv"))):
        names = axis if isinstance(axis, tuple) else () if axis is None else (axis,)
        count = 1
        for name in names:
            if name not in mesh.shape:
                raise Unsupported(f"spec {spec}: the mesh has no axis {name!r}, only {tuple(mesh.shape)}")
            count *= mesh.shape[name]
        for size in sizes:
            if dims[size] % count:
                raise Unsupported(f"spec {spec}: {size}={dims[size]} does not divide into {count} equal shards")
    if sequence is not None and call.attributes["window"] is None:
        raise Unsupported("window None: every token reads all before it, a split sequence would gather them all")
    return batch, sequence, heads


def _whole_sequence(
    tensors: dict[str, Any], *, attrs: dict[str, Any], impl: str | None, precision: object, rows_exist: bool
) -> tuple[jax.Array, jax.Array]:
    outputs = on_one_device("rattention", tensors, attrs, impl, precision, rows_exist)
    return outputs["out"], outputs["final_state"]
