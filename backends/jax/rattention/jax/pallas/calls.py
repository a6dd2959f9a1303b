"""The kernels as pallas_call: what each reference is, which block of which array it holds, and the scratch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import ManualAxisType
from rattention.jax.meshes import vary, varying
from rattention.jax.pallas import backward, cost, decode, forward, watch
from rattention.jax.pallas.config import Config
from rattention.jax.pallas.once import once
from rattention.jax.pallas.plan import Plan

F32 = jnp.float32
KERNELS = (
    *("rattention_forward", "rattention_backward", "rattention_decode"),
    *("swa_forward", "swa_backward", "rla_forward", "rla_backward"),
)
"""Every kernel by name, as profiles, schedules and `metadata["kernels"]` show it."""


def shown(settings: Config) -> dict[str, Any]:
    """A configuration as a plain dict."""
    return dataclasses.asdict(settings)


class Builder:
    """Collects the operands, results and scratch of one kernel by name."""

    def __init__(self, p: Plan, name: str, grid: tuple[int, ...]):
        self.p, self.name, self.grid = p, name, grid
        # A rolled backward is short of memory: a step waits for its blocks.
        self.single = p.rolled and name.endswith("backward")
        self.mode: dict[str, Any] = {"pipeline_mode": pl.Buffered(1)} if self.single and not p.interpret else {}
        self.arrays: list[Any] = []
        self.inputs: list[tuple[str, pl.BlockSpec]] = []
        self.outputs: list[tuple[str, pl.BlockSpec, jax.ShapeDtypeStruct]] = []
        self.scratch: list[tuple[str, Any]] = []

    def take(self, name: str, array: Any, block: tuple[int, ...], index: Callable[..., tuple[Any, ...]]) -> None:
        self.arrays.append(array)
        self.inputs.append((name, pl.BlockSpec(block, index, **self.mode)))

    def scalars(self, name: str, array: Any, rows: bool) -> None:
        """An array [B or 1, 1, K] of numbers that steer, in scalar memory."""
        self.arrays.append(array)
        index = (lambda b, *_: (b, 0, 0)) if rows else (lambda *_: (0, 0, 0))
        self.inputs.append((name, pl.BlockSpec((1, 1, array.shape[2]), index, memory_space=pltpu.SMEM)))

    def give(self, name: str, shape: tuple[int, ...], dtype: Any, block: tuple[int, ...], index: Any) -> None:
        self.outputs.append((name, pl.BlockSpec(block, index, **self.mode), jax.ShapeDtypeStruct(shape, dtype)))

    def keep(self, name: str, shape: tuple[int, ...], dtype: Any) -> None:
        self.scratch.append((name, pltpu.VMEM(shape, dtype)))

    def run(self, body: Callable[[Plan, SimpleNamespace], None], work: tuple[int, int]) -> dict[str, Any]:
        """The results by name; `work` is operations and exponentials, see `cost`."""
        names = [n for n, *_ in self.inputs] + [n for n, *_ in self.outputs] + [n for n, _ in self.scratch]
        p = self.p

        def kernel(*refs: Any) -> None:
            body(p, SimpleNamespace(**dict(zip(names, refs, strict=True))))

        watch.traced(self.name)
        # Inside shard_map: results differ between devices as soon as one operand does.
        axes = varying(self.arrays)
        kind: dict[str, Any] = {"manual_axis_type": ManualAxisType(varying=axes)} if axes else {}
        results = pl.pallas_call(
            kernel,
            grid=self.grid,
            in_specs=[spec for _, spec in self.inputs],
            out_specs=[spec for _, spec, _ in self.outputs],
            out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype, **kind) for *_, x in self.outputs],
            scratch_shapes=[shape for _, shape in self.scratch],
            compiler_params=pltpu.CompilerParams(
                # The interpreter does not extend this tuple by the axis that vmap puts in front; the compiler does.
                dimension_semantics=None if p.interpret else ("parallel", "parallel", "arbitrary")[: len(self.grid)],
                vmem_limit_bytes=p.config.vmem,
            ),
            cost_estimate=cost.estimate(work, [*self.arrays, *(shape for *_, shape in self.outputs)]),
            name=self.name,
            interpret=watch.interpreter(self.name) if p.interpret else False,
        )(*once(self.name, vary(self.arrays, axes)))
        return dict(zip([n for n, *_ in self.outputs], results, strict=True))


def run_forward(p: Plan, given: Mapping[str, Any], save: bool) -> dict[str, Any]:
    """`out [B, T, Hq*Dv]`, `final_state [B, Hkv, F, Dv]` if `p.final`, and for training `states`."""
    b = Builder(p, "rattention_forward" if p.mode == "mix" else f"{p.mode}_forward", (p.batch, p.groups, p.steps))
    shared_inputs(b, given, lambda s: s, lambda s: jnp.maximum(s - p.prefix, 0), lambda s: s)
    heads = p.together * p.G
    query = lambda b, h, s: (b, jnp.maximum(s - p.prefix, 0), h)  # noqa: E731
    b.give(
        "out", (p.batch, p.tokens, p.q_heads * p.value_dim), given["q"].dtype, (1, p.step, heads * p.value_dim), query
    )
    state_block = (1, p.together, p.F, p.value_dim)
    if p.final:
        b.give("final_state", (p.batch, p.kv_heads, p.F, p.value_dim), F32, state_block, lambda b, h, s: (b, h, 0, 0))
    if save and p.folds:
        shape = (p.batch, p.kv_heads, p.steps, p.value_dim, p.F)
        b.give("states", shape, F32, (1, p.together, 1, *shape[3:]), lambda b, h, s: (b, h, s, 0, 0))
    window_scratch(b, p.R + p.m, gradients=False)
    return b.run(forward.body, cost.forward(p))


def run_backward(
    p: Plan, given: Mapping[str, Any], fixed: Mapping[str, Any], saved: Mapping[str, Any], cotangents: Mapping[str, Any]
) -> dict[str, Any]:
    """Gradients of `given`, of its shapes and dtypes."""
    steps, heads = p.steps, p.together * p.G
    name = "rattention_backward" if p.mode == "mix" else f"{p.mode}_backward"
    b = Builder(p, name, (p.batch, p.groups, steps + p.back))
    arriving = lambda s: jnp.maximum(steps - 1 - s, 0)  # noqa: E731
    at_work = lambda s: jnp.minimum(steps - 1 - s + p.back, steps - 1)  # noqa: E731
    shared_inputs(b, {**given, **fixed}, arriving, at_work, at_work)
    query = lambda b, h, s: (b, at_work(s), h)  # noqa: E731
    whole = lambda b, h, s: (b, h, 0, 0)  # noqa: E731
    if p.rope:
        each = fixed["rope"].shape[0] > 1
        shape = (1, p.step, 2 * p.key_dim)
        b.take("k_rope", fixed["rope"], shape, lambda b, h, s: (b if each else 0, arriving(s), 0))
    b.take("d_out", cotangents["out"], (1, p.step, heads * p.value_dim), query)
    state_block = (1, p.together, p.F, p.value_dim)
    if p.final:
        b.take("d_final", cotangents["final_state"], state_block, whole)
    if p.folds:
        block = (1, p.together, 1, p.value_dim, p.F)
        b.take("states", saved["states"], block, lambda b, h, s: (b, h, at_work(s), 0, 0))

    b.give("d_q", given["q"].shape, given["q"].dtype, (1, p.step, heads * p.key_dim), query)
    b.give("d_k", given["k"].shape, given["k"].dtype, (1, p.step, p.together * p.key_dim), query)
    b.give("d_v", given["v"].shape, given["v"].dtype, (1, p.step, p.together * p.value_dim), query)
    small(b)
    if p.initial and p.mode != "swa":
        b.give("d_initial", given["initial"].shape, F32, state_block, whole)
    if p.memory and p.linear:
        shape = (p.batch, p.q_heads, p.F, p.value_dim)
        b.give("d_memory", shape, F32, (1, heads, p.F, p.value_dim), whole)
    window_scratch(b, (p.back + 1) * p.m, gradients=True)
    results = b.run(backward.body, cost.backward(p))

    gradients = {name: results[f"d_{name}"] for name in ("q", "k", "v")}
    for name in ("swa_weight", "rla_weight"):
        if name in given:
            found = results.get(f"d_{name}")
            gradients[name] = jnp.zeros_like(given[name]) if found is None else jnp.sum(found, axis=0).reshape(1, -1)
    for name in ("q_scale", "k_scale"):
        if name in given:
            found = results.get(f"d_{name}")
            gradients[name] = jnp.zeros_like(given[name]) if found is None else jnp.sum(found, axis=(0, 1))
    if "initial" in given:
        gradients["initial"] = results.get("d_initial", jnp.zeros_like(given["initial"]))
    if "memory" in given:
        found = results.get("d_memory")
        gradients["memory"] = jnp.zeros_like(given["memory"]) if found is None else jnp.sum(found, axis=0)
    return gradients


def small(b: Builder) -> None:
    """Gradients of gains and scales: summed on chip over the sequence, one row per (batch row, kv heads)."""
    p = b.p
    heads = p.together * p.G
    group = lambda b, h, s: (b, h, 0, 0)  # noqa: E731
    if p.mode == "mix":
        for name, there in (("swa", p.softmax), ("rla", p.linear)):
            if there:
                shape = (p.batch, p.groups, heads, p.value_dim)
                b.give(f"d_{name}_weight", shape, F32, (1, 1, heads, p.value_dim), group)
                b.keep(f"d_{name}_sum", (heads, p.value_dim, p.C), F32)
    for name, there in (("q_scale", p.q_scale and p.linear), ("k_scale", p.k_scale and bool(p.linear_tiles))):
        if there:
            b.give(f"d_{name}", (p.batch, p.groups, 1, p.key_dim), F32, (1, 1, 1, p.key_dim), group)
            b.keep(f"d_{name}_sum", (p.key_dim, p.C), F32)


def run_decode(p: Plan, given: Mapping[str, Any]) -> dict[str, Any]:
    """`out [B, T, Hq*Dv]` and `next_state [B, Hkv, F, Dv]`."""
    heads, slots = p.together * p.G, given["cache_k"].shape[1]
    b = Builder(p, "rattention_decode", (p.batch, p.groups))
    row = lambda b, h: (b, 0, h)  # noqa: E731
    for name, each in (("numbers", False), ("bounds", True)):
        b.scalars(name, given[name], each)
    b.take("q", given["q"], (1, p.tokens, heads * p.key_dim), row)
    for name, width in (("k", p.key_dim), ("v", p.value_dim)):
        b.take(name, given[name], (1, p.tokens, p.together * width), row)
        b.take(f"cache_{name}", given[f"cache_{name}"], (1, slots, p.together * width), row)
    state_block = (1, p.together, p.F, p.value_dim)
    b.take("state", given["initial"], state_block, lambda b, h: (b, h, 0, 0))
    for name in ("swa_weight", "rla_weight"):
        b.take(name, given[name], (1, heads * p.value_dim), lambda b, h: (0, h))
    if p.rope:
        b.take("old_rope", given["old_rope"], (1, slots, 2 * p.key_dim), lambda b, h: (b, 0, 0))
        b.take("rope", given["rope"], (1, p.tokens, 2 * p.key_dim), lambda b, h: (b, 0, 0))
    for name in ("q_scale", "k_scale"):
        if getattr(p, name):
            b.take(name, given[name], (1, p.key_dim), lambda b, h: (0, 0))
    if p.memory:
        b.take("memory", given["memory"], (heads, p.F, p.value_dim), lambda b, h: (h, 0, 0))
    shape = (p.batch, p.tokens, p.q_heads * p.value_dim)
    b.give("out", shape, given["q"].dtype, (1, p.tokens, heads * p.value_dim), row)
    b.give("next_state", given["initial"].shape, F32, state_block, lambda b, h: (b, h, 0, 0))
    return b.run(decode.body, cost.decoding(p, slots))


def shared_inputs(b: Builder, given: Mapping[str, Any], key_step: Any, query_step: Any, rope_step: Any) -> None:
    """Operands that forward and backward have in common; the functions map the grid's last index to steps."""
    p = b.p
    heads = p.together * p.G
    b.scalars("numbers", given["numbers"], False)
    b.scalars("limits", given["limits"], p.segments)
    b.take("q", given["q"], (1, p.step, heads * p.key_dim), lambda b, h, s: (b, query_step(s), h))
    b.take("k", given["k"], (1, p.step, p.together * p.key_dim), lambda b, h, s: (b, key_step(s), h))
    b.take("v", given["v"], (1, p.step, p.together * p.value_dim), lambda b, h, s: (b, key_step(s), h))
    if p.mode == "mix":
        for name in ("swa_weight", "rla_weight"):
            b.take(name, given[name], (1, heads * p.value_dim), lambda b, h, s: (0, h))
    if p.rope:
        each = given["rope"].shape[0] > 1
        b.take("rope", given["rope"], (1, p.step, 2 * p.key_dim), lambda b, h, s: (b if each else 0, rope_step(s), 0))
    if p.segments:
        b.scalars("owners", given["owners"], True)
        b.take("ids", given["ids"], (1, 1, p.step), lambda b, h, s: (b, 0, key_step(s)))
    for name in ("q_scale", "k_scale"):
        if getattr(p, name) and p.mode != "swa":
            b.take(name, given[name], (1, p.key_dim), lambda b, h, s: (0, 0))
    if p.initial and p.mode != "swa":
        block = (1, p.together, p.F, p.value_dim)
        b.take("initial", given["initial"], block, lambda b, h, s: (b, h, 0, 0))
    if p.memory:
        b.take("memory", given["memory"], (heads, p.F, p.value_dim), lambda b, h, s: (h, 0, 0))


def window_scratch(b: Builder, tiles: int, gradients: bool) -> None:
    """The window of tiles, the state, and what is derived from them per step."""
    p = b.p
    dtype = jnp.dtype(p.dtype)
    heads = p.together * p.G
    b.keep("k_tiles", (p.together, tiles, p.C, p.key_dim), dtype)
    if not (gradients and p.rolled):
        b.keep("v_tiles", (p.together, tiles, p.value_dim, p.C), dtype)
    if p.rope and (p.linear_tiles or p.final):
        b.keep("raw_tiles", (p.together, tiles, p.C, p.key_dim), dtype)
    if p.segments:
        b.keep("id_tiles", (1, tiles, 8, p.C), jnp.int32)
    if not gradients and (p.state or p.final):
        b.keep("state", (p.together, p.value_dim, p.F), F32)
    if p.state:
        b.keep("read_state", (p.together, p.m, p.value_dim, p.F), dtype)
    if p.linear_tiles:
        b.keep("features", (p.together, p.m, len(p.linear_tiles), p.C, p.F), dtype)
    if p.mode == "mix" and not (gradients and p.rolled):
        b.keep("swa_gain", (heads, p.value_dim, p.C), F32)
        b.keep("rla_gain", (heads, p.value_dim, p.C), F32)
    if p.q_scale:
        b.keep("q_column", (p.key_dim, p.C), F32)
    if p.k_scale:
        b.keep("k_column", (p.key_dim, p.C), F32)
    if p.memory and p.linear:
        b.keep("memory_t", (heads, p.value_dim, p.F), dtype)
    if not gradients:
        return
    b.keep("vn_tiles", (p.together, tiles, p.C, p.value_dim), dtype)
    b.keep("dv_sum", (p.together, tiles, p.C, p.value_dim), F32)
    b.keep("dk_sum", (p.together, tiles, p.C, p.key_dim), F32)
    if p.softmax and not p.rolled:
        b.keep("kt_tiles", (p.together, tiles, p.key_dim, p.C), dtype)
    if p.rope and p.linear_tiles:
        b.keep("dk_raw_sum", (p.together, tiles, p.C, p.key_dim), F32)
    if p.linear_tiles:
        b.keep("d_features", (p.together, p.m, len(p.linear_tiles), p.C, p.F), F32)
    if p.state:
        b.keep("d_state", (p.together, p.value_dim, p.F), F32)
    if p.memory and p.linear:
        b.keep("d_memory_sum", (heads, p.value_dim, p.F), F32)
