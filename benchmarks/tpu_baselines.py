"""What the TPU kernels are compared with: splash attention, and linear attention in a kernel of its own.

Measured by `tpu_schedule.py` in the same run, by the same compiler and the same parser.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from rattention.jax.pallas import aot
from tpu_schedule import SHAPE, WINDOW, parse


def splash(job: dict[str, Any], folder: str) -> dict[str, Any]:
    """JAX's splash attention for a causal window of `tokens` tokens, itself included; backward: with its forward."""
    T, heads, D, block = job["T"], SHAPE["Hq"], job["D"], job["block"]
    mask = masks.MultiHeadMask([masks.LocalMask((T, T), (job["tokens"] - 1, 0), 0) for _ in range(heads)])
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    blocks = kernel.BlockSizes(**{f"block_{name}": block for name in names})
    attend = kernel.make_splash_mha(mask, block_sizes=blocks, head_shards=1, q_seq_shards=1)
    x = jax.ShapeDtypeStruct((heads, T, D), jnp.bfloat16)
    parts = ["splash_mha_fwd"]
    if job["kind"] == "forward":
        aot.compile_for(job["generation"], lambda q, k, v: attend(q, k, v), x, x, x)
    else:
        aot.compile_for(job["generation"], lambda q, k, v, d: jax.vjp(attend, q, k, v)[1](d), x, x, x, x)
        parts += ["splash_mha_dq", "splash_mha_dkv"]
    count = T // block
    # Visited (query block, key block) pairs of one head: those with an unmasked element.
    visited = sum(i >= j and (i - j - 1) * block + 1 < job["tokens"] for i in range(count) for j in range(count))
    found: dict[str, Any] = {"visited_blocks": visited, "kernels": {name: parse(folder, name) for name in parts}}
    bundles = sum(part["bundles"] for part in found["kernels"].values())
    found["bundles_per_token_head"] = round(bundles * visited / T, 3)
    return found


def linear(job: dict[str, Any], folder: str) -> dict[str, Any]:
    """Residual linear attention as a kernel without the softmax branch: the textbook's chunked form.

    One query head per grid step: phi of q and k, the state read, the masked products inside the chunk, the fold.
    Keys come shifted by w + 1 tokens, so that query t reads keys up to its own index.
    """
    T, heads, D, C = SHAPE["T"], SHAPE["Hq"], job["D"], job["block"]
    group = heads // SHAPE["Hkv"]

    def phi(x: Any) -> Any:
        halves = []
        for y in (x, -x):
            e = jnp.exp(y - jnp.max(y, axis=1, keepdims=True))
            halves.append(e / jnp.sum(e, axis=1, keepdims=True))
        return jnp.concatenate(halves, axis=1).astype(jnp.bfloat16)

    def dot(a: Any, b: Any, i: int, j: int) -> Any:
        return lax.dot_general(a, b, (((i,), (j,)), ((), ())), preferred_element_type=jnp.float32)

    def linear_forward(q: Any, k: Any, v: Any, out: Any, state: Any) -> None:
        @pl.when(pl.program_id(1) == 0)
        def _start() -> None:
            state[...] = jnp.zeros(state.shape, state.dtype)

        features, keys = phi(q[0].astype(jnp.float32)), phi(k[0].astype(jnp.float32))
        weight = dot(features, keys, 1, 1)
        row, column = (lax.broadcasted_iota(jnp.int32, (C, C), axis) for axis in (0, 1))
        weight = jnp.where(row >= column, weight, 0.0).astype(jnp.bfloat16)
        total = dot(features, state[...].astype(jnp.bfloat16), 1, 0) + dot(weight, v[0], 1, 0)
        out[0] = total.astype(out.dtype)
        state[...] += dot(keys, v[0], 0, 0)

    def attend(q: Any, k: Any, v: Any) -> Any:
        shifted = [jnp.pad(x, ((0, 0), (WINDOW + 1, 0), (0, 0)))[:, :T] for x in (k, v)]
        query = pl.BlockSpec((1, C, D), lambda h, c: (h, c, 0))
        key = pl.BlockSpec((1, C, D), lambda h, c: (lax.div(h, group), c, 0))
        return pl.pallas_call(
            linear_forward,
            grid=(heads, T // C),
            in_specs=[query, key, key],
            out_specs=query,
            out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
            scratch_shapes=[pltpu.VMEM((2 * D, D), jnp.float32)],
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
            name="linear_forward",
        )(q, *shifted)

    q = jax.ShapeDtypeStruct((heads, T, D), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((SHAPE["Hkv"], T, D), jnp.bfloat16)
    aot.compile_for(job["generation"], attend, q, k, k)
    figures = parse(folder, "linear_forward")
    return {"kernels": {"linear_forward": figures}, "bundles_per_token_head": round(figures["bundles"] / C, 3)}


MEASURES = {"splash": splash, "linear": linear}
