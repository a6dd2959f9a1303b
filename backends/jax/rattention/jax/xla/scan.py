"""The pass over chunks, with its own derivative.

Forward: a scan carries the state; each step slices the keys and values of its window out of the whole arrays.
Backward: a second scan from the last chunk to the first recomputes each chunk from its saved state and adds the
gradient of its window into one float32 buffer in place. Differentiating the first scan instead would add a whole array
of gradients per step, quadratic in T, and save every chunk's scores.

Saved between the two: the inputs and one state per chunk.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from rattention.jax.meshes import sum_to, vary, varying
from rattention.jax.xla.chunk import run_chunk
from rattention.jax.xla.parts import wide
from rattention.jax.xla.plan import Plan

Arrays = dict[str, Any]


def run_chunks(
    plan: Plan, state: Any, q: jax.Array, windowed: Arrays, params: Arrays, fixed: Arrays
) -> tuple[jax.Array, Any]:
    """Run all chunks in order.

    Args:
        plan: the cut.
        state: `[B, Hkv, F, Dv]` or None.
        q: `[chunks, B, C, Hq, D]`.
        windowed: `k`, `v` `[B, prefix + chunks * C, Hkv, ...]`, of which a step sees `plan.width` tokens.
        params: differentiable arrays that every step sees whole.
        fixed: not differentiable: dicts `steps` of arrays `[chunks, ...]`, `windowed` of arrays like the above, and
            `whole`.

    Returns:
        outputs `[chunks, B, C, Hq, Dv]`, and the state after the last chunk.
    """
    if plan.chunks == 1:
        first, steps = jax.tree.map(lambda x: x[0], (q, fixed["steps"]))
        data = {"q": first} | _windows(plan, windowed, 0) | params
        state, out = run_chunk(plan, state, data, _fixed(plan, fixed, steps, 0))
        return out[None], state
    # The state leaves the scan with the mesh axes of what is folded into it, so it must enter with them.
    folded = {name: x for name, x in params.items() if name == "k_scale"}
    state = vary(state, varying(state, windowed, folded, fixed))
    return _scan(plan, state, q, windowed, params, fixed)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(plan, state, q, windowed, params, fixed):
    out, state, _ = _forward(plan, state, q, windowed, params, fixed)
    return out, state


def _forward(plan, state, q, windowed, params, fixed):
    def step(carry, x):
        index, q, steps = x
        data = {"q": q} | _windows(plan, windowed, index) | params
        after, out = run_chunk(plan, carry, data, _fixed(plan, fixed, steps, index))
        return vary(after, varying(carry)), (out, carry)

    xs = (jnp.arange(plan.chunks, dtype=jnp.int32), q, fixed["steps"])
    after, (out, states) = lax.scan(step, state, xs)
    return out, after, states


def _scan_fwd(plan, state, q, windowed, params, fixed):
    out, after, states = _forward(plan, state, q, windowed, params, fixed)
    return (out, after), (states, q, windowed, params, fixed)


def _scan_bwd(plan, saved, cotangents):
    # Every cotangent is summed over the scan on each device, and over the devices that share its primal once, at the
    # end: inside the scan all arrays vary over the same mesh axes.
    primals = saved
    saved, cotangents = vary((saved, cotangents), varying(saved, cotangents))
    states, q, windowed, params, fixed = saved
    d_out, d_state = cotangents

    def step(carry, x):
        d_state, d_windowed, d_params = carry
        index, state, q, steps, d_out = x
        window = {name: wide(part) for name, part in _windows(plan, windowed, index).items()}

        def chunk(state, q, window, params):
            return run_chunk(plan, state, {"q": q} | window | params, _fixed(plan, fixed, steps, index))

        _, pull = jax.vjp(chunk, state, q, window, jax.tree.map(wide, params))
        d_state, d_q, d_window, d_step = pull((d_state, d_out))
        d_windowed = {name: _add(plan, total, d_window[name], index) for name, total in d_windowed.items()}
        return (d_state, d_windowed, jax.tree.map(jnp.add, d_params, d_step)), d_q

    zeros = jax.tree.map(lambda x: jnp.zeros_like(wide(x)), (windowed, params))
    xs = (jnp.arange(plan.chunks, dtype=jnp.int32), states, q, fixed["steps"], d_out)
    (d_state, d_windowed, d_params), d_q = lax.scan(step, (d_state, *zeros), xs, reverse=True)
    d_windowed, d_params = jax.tree.map(lambda g, x: g.astype(x.dtype), (d_windowed, d_params), (windowed, params))
    gradients = d_state, d_q, d_windowed, d_params
    return *sum_to(gradients, primals[:4]), None


_scan.defvjp(_scan_fwd, _scan_bwd)


def _windows(plan: Plan, arrays: Arrays, index: Any) -> Arrays:
    """What the step `index` sees of arrays `[B, prefix + chunks * C, ...]`."""
    return {
        name: x if x.shape[1] == plan.width else lax.dynamic_slice_in_dim(x, index * plan.chunk, plan.width, axis=1)
        for name, x in arrays.items()
    }


def _add(plan: Plan, total: jax.Array, part: jax.Array, index: Any) -> jax.Array:
    if part.shape == total.shape:
        return total + part
    at = index * plan.chunk
    part = part + lax.dynamic_slice_in_dim(total, at, plan.width, axis=1)
    return lax.dynamic_update_slice_in_dim(total, part, at, axis=1)


def _fixed(plan: Plan, fixed: Arrays, steps: Arrays, index: Any) -> Arrays:
    return fixed["whole"] | steps | _windows(plan, fixed["windowed"], index) | {"index": index}
