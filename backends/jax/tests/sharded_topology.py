"""The sharded program compiled for a v5e 4x4 slice: which collectives it holds, as one line of JSON.

A program, run by test_jax_sharded.py in its own process. Needs libtpu, no TPU.
"""

from __future__ import annotations

import collections
import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rattention.jax import sharded

B, T, HQ, HKV, D, WINDOW = 2, 4096, 8, 2, 64, 255
SIZES = {"f32": 4, "bf16": 2, "s32": 4, "pred": 1}
COLLECTIVES = "collective-permute|all-reduce|all-gather|all-to-all|reduce-scatter"


def collectives(text: str) -> list[tuple[str, int]]:
    """Name and bytes of each collective of a compiled program; an asynchronous pair counts once."""
    found = []
    for line in text.splitlines():
        match = re.search(rf" = (.*?) ({COLLECTIVES})(-start)?\(", line)
        if match:
            shapes = re.findall(r"(\w+)\[([\d,]*)\]", match.group(1))
            sizes = [SIZES.get(kind, 0) * int(np.prod([int(n) for n in dims.split(",") if n])) for kind, dims in shapes]
            found.append((match.group(2), max(sizes)))
    return found


def main() -> None:
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4")
    mesh = Mesh(np.array(topology.devices).reshape(2, 4, 2), ("data", "sequence", "model"))
    spec = PartitionSpec("data", "sequence", "model")

    def struct(shape: tuple[int, ...], dtype: Any, *names: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*names)))

    args = [struct((B, T, heads, D), jnp.bfloat16, *spec) for heads in (HQ, HKV, HKV)]
    args += [struct((HQ, D), jnp.float32, "model") for _ in range(2)]
    ids = struct((B, T), jnp.int32, "data")

    def forward(*args: jax.Array, **more: jax.Array) -> Any:
        split: dict[str, Any] = {"mesh": mesh, "spec": spec}
        return sharded.rattention(*args, **more, **split, window=WINDOW, return_final_state=True, impl="xla")

    def loss(*args: jax.Array, **more: jax.Array) -> jax.Array:
        return jnp.sum(forward(*args, **more)[0].astype(jnp.float32) ** 2)

    backward = jax.grad(loss, argnums=(0, 1, 2, 3, 4))
    listed: dict[str, Any] = {}
    for name, f, more in (
        ("forward", forward, {}),
        ("backward", backward, {}),
        ("backward with segments", backward, {"segment_ids": ids}),
    ):
        text = jax.jit(f).trace(*args, **more).lower(lowering_platforms=("tpu",)).compile().as_text() or ""
        found = collectives(text)
        listed[name] = dict(collections.Counter(kind for kind, _ in found))
        if name == "forward":
            listed["largest_permute_bytes"] = max(size for kind, size in found if kind == "collective-permute")
    listed["halo_or_state_bytes"] = (B // 2) * (HKV // 2) * max(WINDOW * D * 2, 2 * D * D * 4)
    print(json.dumps(listed))


if __name__ == "__main__":
    main()
