"""RAttention over a mesh: batch, heads and the sequence itself split between devices.

Batch and heads need no communication. A sequence split over n devices, L = T/n tokens each, is one `rattention_extend`
per device, all at once: device d continues a sequence of d L tokens, and what it needs of them is small.

- The halo, the last w keys and values before its own: from the device before by `ppermute`; a window longer than a
  shard takes from several devices before, one hop each, only the part that is seen.
- The state of all tokens older than the halo. The L tokens that leave the window on device e add up to one
  contribution; the state of device d is the sum of those of the devices before it: an exclusive scan in
  1 + ceil(log2 n) hops of `[B, Hkv, F, Dv]`.

Traffic per device: w tokens of k and v, and log2(n) states, however long the sequence. The derivative is the
transpose of all this, made by JAX: the halo's gradient travels back, the scan runs the other way.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from rattention.jax import dispatch
from rattention.jax.xla.parts import phi, wide
from rattention.jax.xla.plan import as_precision
from rattention.spec import Call, Unsupported

Arrays = dict[str, Any]


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
        the others: as in `rattention.jax.rattention`.

    Returns:
        `out`, split by `spec`; with `return_final_state` the pair of it and the state, split by batch and heads.

    Raises:
        SpecError: the call breaks a constraint of the specification.
        Unsupported: an axis that cannot be split so: D, sizes that the mesh does not divide, or a sequence with
            window None (every token needs all others), segments, or explicit positions.
    """
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
    call, arrays = dispatch.check("rattention", tensors, attrs, check_values=check_values)
    axes = _axes(call, mesh, spec)
    batch, sequence, heads = axes
    state_spec = PartitionSpec(batch, heads)
    tokens = PartitionSpec(batch, sequence, heads)
    specs = dict.fromkeys(("swa_weight", "rla_weight", "memory"), PartitionSpec(heads))
    specs |= dict.fromkeys("qkv", tokens) | {"initial_state": state_spec}
    specs |= dict.fromkeys(("positions", "segment_ids"), PartitionSpec(batch))
    local = functools.partial(
        _sequence_shard if sequence is not None else _whole_sequence,
        axis=sequence,
        devices=1 if sequence is None else mesh.shape[sequence],
        attrs=call.attributes,
        impl=impl,
        precision=precision,
    )
    out, state = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=({name: specs.get(name, PartitionSpec()) for name in arrays},),
        out_specs=(tokens, state_spec),
        check_vma=False,
    )(arrays)
    return (out, state) if return_final_state else out


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
    if sequence is not None:
        if call.attributes["window"] is None:
            raise Unsupported("window None: every token reads all before it, a split sequence would gather them all")
        for name in ("segment_ids", "positions"):
            if name in call.given:
                raise Unsupported(f"{name} with a split sequence")
    return batch, sequence, heads


def _whole_sequence(
    tensors: Arrays, *, axis: None, devices: int, attrs: Arrays, impl: str | None, precision: object
) -> tuple[jax.Array, jax.Array]:
    outputs = dispatch.run("rattention", tensors, attrs, impl=impl, precision=precision)
    return outputs["out"], outputs["final_state"]


def _sequence_shard(
    tensors: Arrays, *, axis: str, devices: int, attrs: Arrays, impl: str | None, precision: object
) -> tuple[jax.Array, jax.Array]:
    """One device's tokens, as the continuation of those of the devices before it."""
    k, v = tensors["k"], tensors["v"]
    batch, length = k.shape[:2]
    slots = max(attrs["window"], 0)
    halo_k, halo_v = (halo(x, slots, axis, devices) for x in (k, v))
    place = lax.axis_index(axis)
    # Without a device before it, slots hold zeros; they are also marked unused by the length.
    seen = jnp.full((batch,), place * length, jnp.int32)
    added = _leaving(halo_k, halo_v, tensors, seen, attrs["feature_map"], as_precision(precision, str(k.dtype)))
    state = exclusive_sum(added, axis, devices)
    if "initial_state" in tensors:
        state = state + tensors["initial_state"]
    given = {name: x for name, x in tensors.items() if name != "initial_state"}
    cache = {"cache_k": halo_k, "cache_v": halo_v, "cache_state": state, "cache_length": seen}
    outputs = dispatch.run("rattention_extend", given | cache, attrs, impl=impl, precision=precision)
    final = jnp.where(place == devices - 1, outputs["cache_state"], 0)
    return outputs["out"], lax.psum(final, axis)


def halo(x: jax.Array, slots: int, axis: str, devices: int) -> jax.Array:
    """The last `slots` tokens before this device's own `x [B, L, ...]`: `[B, slots, ...]`, zeros before the start."""
    length = x.shape[1]
    parts = []
    for hop in range(1, devices):
        missing = slots - (hop - 1) * length
        if missing <= 0:
            break
        part = x[:, max(length - missing, 0) :]
        parts.insert(0, _shift(part, hop, axis, devices))
    filled = sum(part.shape[1] for part in parts)
    empty = jnp.zeros((x.shape[0], slots - filled, *x.shape[2:]), x.dtype)
    return jnp.concatenate([empty, *parts], axis=1)


def exclusive_sum(x: jax.Array, axis: str, devices: int) -> jax.Array:
    """The sum of `x` over the devices before this one, zeros on the first, in 1 + ceil(log2 n) hops."""
    total = _shift(x, 1, axis, devices)
    hop = 1
    while hop < devices - 1:
        total = total + _shift(total, hop, axis, devices)
        hop *= 2
    return total


def _shift(x: jax.Array, hop: int, axis: str, devices: int) -> jax.Array:
    """`x` of the device `hop` places before; zeros where there is none."""
    return lax.ppermute(x, axis, [(i, i + hop) for i in range(devices - hop)])


def _leaving(
    halo_k: jax.Array, halo_v: jax.Array, tensors: Arrays, seen: jax.Array, feature_map: str, precision: Any
) -> jax.Array:
    """phi(k)^T v of the L tokens that leave the window on this device, the oldest of halo and own."""
    length = tensors["k"].shape[1]
    k = wide(jnp.concatenate([halo_k, tensors["k"]], axis=1)[:, :length])
    v = wide(jnp.concatenate([halo_v, tensors["v"]], axis=1)[:, :length])
    if "k_scale" in tensors:
        k = k * wide(tensors["k_scale"])
    real = jnp.arange(length, dtype=jnp.int32) - halo_k.shape[1] >= -seen[:, None]
    features = jnp.where(real[:, :, None, None], phi(k, feature_map), 0)
    return jnp.einsum("bthf,bthv->bhfv", features, v, precision=precision, preferred_element_type=features.dtype)
