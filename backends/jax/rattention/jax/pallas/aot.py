"""Compiling the kernels for a TPU that is not there: libtpu's compiler runs on any machine.

Programs of single kernels, whose schedules `benchmarks/tpu_schedule.py` reads, and of a layer, in whose compiled text
`benchmarks/tpu_aot.py` looks for copies. Run with JAX_PLATFORMS=cpu.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from rattention.jax.pallas import once, ops
from rattention.jax.pallas.config import Config
from rattention.spec import UNREAD, validate

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}


def device(generation: str) -> Any:
    """One device of a generation, without hardware."""
    # No metadata server to ask, and no chip that a second process could take.
    for name in ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
        os.environ.setdefault(name, "1")
    found = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[generation])
    return found.devices[0]


def compile_for(generation: str, f: Callable[..., Any], *args: Any) -> Any:
    """`f` compiled for one device of a TPU generation; `args` are trees of ShapeDtypeStruct."""
    sharding = SingleDeviceSharding(device(generation))
    args = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), args)
    return jax.jit(f).trace(*args).lower(lowering_platforms=("tpu",)).compile()


def digest(settings: Config, f: Callable[..., Any], *args: Any) -> str:
    """Names the program of `f` and its configuration: records made under one digest need not be made again. What a
    kernel is said to cost, and that it has no derivative, does not enter it: neither changes a kernel."""
    with once.left_out():
        text = f"{settings}\n{jax.make_jaxpr(f)(*args)}"
    text = re.sub(r"cost_estimate=\w+\(.*?\)", "cost_estimate=None", text)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


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
        call = validate("rattention_extend", given, {"window": window}, host=UNREAD)
        return lambda given: ops.run(call, given, settings=settings, interpret=False), (given,)
    given = tensors(D, dtype, **sizes)
    op = {mode: op for op, mode in ops.MODES.items()}[mode]
    if mode != "mix":
        given = {n: x for n, x in given.items() if n not in ("swa_weight", "rla_weight")}
    call = validate(op, given, {"window": window}, host=UNREAD)

    def forward(given: dict[str, Any]) -> Any:
        return ops.run(call, given, settings=settings, interpret=False)["out"]

    if kind == "forward":
        return forward, (given,)

    def backward(given: dict[str, Any], d_out: Any) -> Any:
        floats = {n: x for n, x in given.items() if n != "segment_ids" and not n.startswith("rope")}
        rest = {n: x for n, x in given.items() if n not in floats}
        out, pull = jax.vjp(lambda x: forward({**x, **rest}), floats)
        gradients = pull(d_out)[0]
        # The softmax branch saves nothing for its gradient, and a forward that nobody reads would not be built.
        return (out, gradients) if mode == "swa" else gradients

    return backward, (given, given["q"])


def layer(settings: Config, B: int = 1, T: int = 2048, Hq: int = 16, Hkv: int = 4, D: int = 128, E: int = 1024) -> Any:
    """Projections, attention and output projection, and their gradient: where a copy of q, k or v would show."""
    call = validate("rattention", tensors(D, "bfloat16", B, T, Hq, Hkv), {"window": 511}, host=UNREAD)

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


# A reshape that moves nothing is called bitcast in a compiled program.
MOVES = r"= \(?\w+\[([\d,]+)\]\S* (copy|copy-start|transpose|reshape)\("


def moves(compiled: Any, *arrays: Any) -> list[str]:
    """Instructions that only move an array the size of one of `arrays`: lines of the compiled program's text."""
    sizes = {math.prod(x.shape) for x in arrays}
    found = []
    for line in compiled.as_text().splitlines():
        match = re.search(MOVES, line)
        if match and math.prod(int(n) for n in match.group(1).split(",")) in sizes:
            found.append(line.strip()[:200])
    return found
