"""The pass over chunks, with its own derivative.

Forward: a scan carries the state; each step slices the keys and values of its window out of the whole arrays.
Backward: a second scan from the last chunk to the first recomputes each chunk from its saved state and adds the
gradient of its window into one buffer in place. Differentiating the first scan instead would add a whole array of
gradients per step, quadratic in T, and save every chunk's scores.

Saved between the two: the inputs and one state per chunk.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from rattention.jax.xla.chunk import run_chunk
from rattention.jax.xla.plan import Plan

Arrays = dict[str, Any]


def run_chunks(
    plan: Plan, state: Any, chunked: Arrays, windowed: Arrays, params: Arrays, ints: Arrays
) -> tuple[jax.Array, Any]:
    """Run all chunks in order.

    Args:
        plan: the cut.
        state: `[b, h, F, Dv]` or None.
        chunked: differentiable arrays `[chunks, ...]`, one slice per step (`qs`, `qf`, `kf`).
        windowed: differentiable arrays `[b, h, prefix + chunks * C, ...]`, of which a step sees `span` (`ks`, `v`);
            with the softmax branch absent a step sees its own C.
        params: differentiable arrays that every step sees whole.
        ints: not differentiable: `steps`, a dict of `[chunks, ...]` arrays, and `whole`.

    Returns:
        outputs `[chunks, b, h, g, C, Dv]`, and the state after the last chunk.
    """
    if plan.chunks == 1:
        one = jax.tree.map(lambda x: x[0], (chunked, ints["steps"]))
        window = {k: _slice(plan, x, 0) for k, x in windowed.items()}
        state, out = run_chunk(plan, state, one[0] | window | params, _ints(plan, ints, one[1], 0))
        return out[None], state
    return _scan(plan, state, chunked, windowed, params, ints)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(plan, state, chunked, windowed, params, ints):
    out, state, _ = _forward(plan, state, chunked, windowed, params, ints)
    return out, state


def _forward(plan, state, chunked, windowed, params, ints):
    def step(carry, x):
        index, data, step_ints = x
        window = {k: _slice(plan, a, index * plan.chunk) for k, a in windowed.items()}
        after, out = run_chunk(plan, carry, data | window | params, _ints(plan, ints, step_ints, index))
        return after, (out, carry)

    xs = (jnp.arange(plan.chunks, dtype=jnp.int32), chunked, ints["steps"])
    after, (out, states) = lax.scan(step, state, xs)
    return out, after, states


def _scan_fwd(plan, state, chunked, windowed, params, ints):
    out, after, states = _forward(plan, state, chunked, windowed, params, ints)
    return (out, after), (states, chunked, windowed, params, ints)


def _scan_bwd(plan, saved, cotangents):
    states, chunked, windowed, params, ints = saved
    d_out, d_state = cotangents

    def step(carry, x):
        d_state, d_windowed, d_params = carry
        index, state, data, step_ints, d_out = x
        at = index * plan.chunk
        window = {k: _slice(plan, a, at) for k, a in windowed.items()}

        def chunk(state, data, window, params):
            return run_chunk(plan, state, data | window | params, _ints(plan, ints, step_ints, index))

        _, pull = jax.vjp(chunk, state, data, window, params)
        d_state, d_data, d_window, d_step = pull((d_state, d_out))
        d_windowed = {k: _add_slice(plan, d_windowed[k], d_window[k], at) for k in d_windowed}
        d_params = jax.tree.map(jnp.add, d_params, d_step)
        return (d_state, d_windowed, d_params), d_data

    zeros = jax.tree.map(jnp.zeros_like, (windowed, params))
    xs = (jnp.arange(plan.chunks, dtype=jnp.int32), states, chunked, ints["steps"], d_out)
    (d_state, d_windowed, d_params), d_chunked = lax.scan(step, (d_state, *zeros), xs, reverse=True)
    return d_state, d_chunked, d_windowed, d_params, None


_scan.defvjp(_scan_fwd, _scan_bwd)


def _width(plan: Plan) -> int:
    return plan.span if plan.softmax else plan.chunk


def _slice(plan: Plan, x: jax.Array, at: Any) -> jax.Array:
    if _width(plan) == x.shape[2]:
        return x
    return lax.dynamic_slice_in_dim(x, at, _width(plan), axis=2)


def _add_slice(plan: Plan, total: jax.Array, part: jax.Array, at: Any) -> jax.Array:
    if part.shape == total.shape:
        return total + part
    part = part + lax.dynamic_slice_in_dim(total, at, part.shape[2], axis=2)
    return lax.dynamic_update_slice_in_dim(total, part, at, axis=2)


def _ints(plan: Plan, ints: Arrays, step: Arrays, index: Any) -> Arrays:
    found = ints["whole"] | step | {"index": index}
    if plan.segmented and plan.softmax and not plan.full:
        found["order_k"] = lax.dynamic_slice_in_dim(found["order_k"], index * plan.chunk, plan.span, axis=1)
    elif plan.segmented and plan.linear:
        found["order_k"] = lax.dynamic_slice_in_dim(found["order_k"], index * plan.chunk, plan.chunk, axis=1)
    return found
