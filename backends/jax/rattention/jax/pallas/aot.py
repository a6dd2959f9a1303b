"""Compiling the kernels for a TPU that is not there: libtpu's compiler runs on any machine.

    JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 python -m rattention.jax.pallas.aot v5p forward 128 bfloat16 ...

compiles cases and prints one JSON line each; without arguments, the whole matrix. `benchmarks/tpu_schedule.py` reads
the compiler's schedule of the same programs.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from rattention.jax.pallas import config, ops
from rattention.jax.pallas.config import Config
from rattention.spec import validate

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
KINDS = ("forward", "backward", "decode")


def device(generation: str) -> Any:
    """One device of a generation, without hardware."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    found = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[generation])
    return found.devices[0]


def compile_for(generation: str, f: Callable[..., Any], *args: Any) -> Any:
    """`f` compiled for one device of a TPU generation; `args` are trees of ShapeDtypeStruct."""
    sharding = SingleDeviceSharding(device(generation))
    args = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), args)
    return jax.jit(f).trace(*args).lower(lowering_platforms=("tpu",)).compile()


def tensors(
    D: int, dtype: str, B: int = 1, T: int = 4096, Hq: int = 16, Hkv: int = 4, optional: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Abstract inputs of `rattention`, by default those of the speed target."""

    def of(*shape: int, as_: str = "float32") -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(as_))

    found = {
        "q": of(B, T, Hq, D, as_=dtype),
        "k": of(B, T, Hkv, D, as_=dtype),
        "v": of(B, T, Hkv, D, as_=dtype),
        "swa_weight": of(Hq, D),
        "rla_weight": of(Hq, D),
    }
    extra = {
        "rope_cos": of(T, D // 2),
        "rope_sin": of(T, D // 2),
        "segment_ids": of(B, T, as_="int32"),
        "q_scale": of(D),
        "k_scale": of(D),
        "memory": of(Hq, 2 * D, D),
        "initial_state": of(B, Hkv, 2 * D, D),
    }
    return found | {name: extra[name] for name in optional}


def program(
    kind: str, D: int, dtype: str, settings: Config, window: int = 511, mode: str = "mix", **sizes: Any
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A function of one kernel (backward: of two, the forward that saves and the backward) and abstract arguments."""
    if kind == "decode":
        given = tensors(D, dtype, **{"B": 8, **sizes, "T": 1})
        B, Hkv = given["k"].shape[0], given["k"].shape[2]
        given["cache_k"] = given["cache_v"] = jax.ShapeDtypeStruct((B, window, Hkv, D), jnp.dtype(dtype))
        given["cache_state"] = jax.ShapeDtypeStruct((B, Hkv, 2 * D, D), jnp.float32)
        given["cache_length"] = jax.ShapeDtypeStruct((B,), jnp.int32)
        call = validate("rattention_extend", given, {"window": window})
        return lambda given: ops.run(call, given, settings=settings, interpret=False), (given,)
    given = tensors(D, dtype, **sizes)
    op = {mode: op for op, mode in ops.MODES.items()}[mode]
    if mode != "mix":
        given = {n: x for n, x in given.items() if n not in ("swa_weight", "rla_weight")}
    call = validate(op, given, {"window": window})

    def forward(given: dict[str, Any]) -> Any:
        return ops.run(call, given, settings=settings, interpret=False)["out"]

    if kind == "forward":
        return forward, (given,)

    def backward(given: dict[str, Any], d_out: Any) -> Any:
        floats = {n: x for n, x in given.items() if n != "segment_ids" and not n.startswith("rope")}
        rest = {n: x for n, x in given.items() if n not in floats}
        return jax.vjp(lambda x: forward({**x, **rest}), floats)[1](d_out)[0]

    return backward, (given, given["q"])


def layer(settings: Config, B: int = 1, T: int = 2048, Hq: int = 16, Hkv: int = 4, D: int = 128, E: int = 1024) -> Any:
    """Projections, attention and output projection, and their gradient: where a copy of q, k or v would show."""
    call = validate("rattention", tensors(D, "bfloat16", B, T, Hq, Hkv), {"window": 511})

    def attend(x: Any, w: dict[str, Any]) -> Any:
        q = jnp.einsum("bte,ef->btf", x, w["q"]).reshape(B, T, Hq, D)
        k, v = (jnp.einsum("bte,ef->btf", x, w[n]).reshape(B, T, Hkv, D) for n in "kv")
        given = {"q": q, "k": k, "v": v, "swa_weight": w["swa"], "rla_weight": w["rla"]}
        out = ops.run(call, given, settings=settings, interpret=False)["out"]
        return jnp.einsum("btf,fe->bte", out.reshape(B, T, Hq * D), w["out"])

    def train(x: Any, w: dict[str, Any], d: Any) -> Any:
        out, pull = jax.vjp(attend, x, w)
        return out, pull(d)

    def of(*shape: int, dtype: Any = jnp.bfloat16) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    weights = {"q": of(E, Hq * D), "k": of(E, Hkv * D), "v": of(E, Hkv * D), "out": of(Hq * D, E)}
    weights |= {"swa": of(Hq, D, dtype=jnp.float32), "rla": of(Hq, D, dtype=jnp.float32)}
    return attend, train, (of(B, T, E), weights), (of(B, T, Hq * D), of(B, T, Hkv * D))


def moves(compiled: Any, *arrays: Any) -> list[str]:
    """Copies and transposes of arrays the size of one of `arrays` in the compiled program: lines of its text."""
    sizes = {math.prod(x.shape) for x in arrays}
    found = []
    for line in compiled.as_text().splitlines():
        match = re.search(r"= \(?\w+\[([\d,]+)\]\S* (copy|copy-start|transpose)\(", line)
        if match and math.prod(int(n) for n in match.group(1).split(",")) in sizes:
            found.append(line.strip()[:200])
    return found


def check(
    generation: str, kind: str, D: int, dtype: str, settings: Config | None = None, **sizes: Any
) -> dict[str, Any]:
    """Compile one case; what the compiler says of it. An error of the compiler propagates."""
    settings = settings or config.default(generation, D)
    f, args = program(kind, D, dtype, settings, **sizes)
    begun = time.time()
    compiled = compile_for(generation, f, *args)
    memory = compiled.memory_analysis()
    return {
        "generation": generation,
        "kind": kind,
        "D": D,
        "dtype": dtype,
        "seconds": round(time.time() - begun, 1),
        "temporary_bytes": memory.temp_size_in_bytes,
        "kernels": sorted(set(re.findall(r"(\w+_(?:forward|backward|decode))[.\d]* = ", compiled.as_text()))),
        "moves": moves(compiled, args[0]["q"], args[0]["k"]) if kind != "decode" else [],
    }


def matrix() -> list[tuple[str, str, int, str]]:
    """Every kernel and default configuration."""
    return list(itertools.product(TOPOLOGIES, KINDS, (64, 128, 256), ("bfloat16", "float32")))


def main(arguments: list[str]) -> None:
    cases = [tuple(arguments[i : i + 4]) for i in range(0, len(arguments), 4)] or matrix()
    for generation, kind, D, dtype in cases:
        print(json.dumps(check(generation, kind, int(D), dtype)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
