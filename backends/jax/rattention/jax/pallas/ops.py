"""The operations of the contract on the kernels: one custom_vjp core, and what each operation asks of it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from rattention.jax.pallas import calls, layout
from rattention.jax.pallas.plan import Plan


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def core(p: Plan, given: dict[str, Any], fixed: dict[str, Any]) -> dict[str, Any]:
    """`out [B, T, Hq*Dv]` and, if `p.final`, `final_state [B, Hkv, F, Dv]`, of canonical operands (layout)."""
    return calls.run_forward(p, given | fixed, save=False)


def _core_forward(p: Plan, given: dict[str, Any], fixed: dict[str, Any]) -> tuple[Any, Any]:
    results = calls.run_forward(p, given | fixed, save=True)
    outputs = {name: results.pop(name) for name in ("out", "final_state") if name in results}
    return outputs, (given, fixed, results)


def _core_backward(p: Plan, saved: Any, cotangents: dict[str, Any]) -> tuple[Any, Any]:
    given, fixed, results = saved
    gradients = calls.run_backward(p, given, fixed, results, cotangents)
    return gradients, None


core.defvjp(_core_forward, _core_backward)


MODES = {"rattention": "mix", "sliding_window_attention": "swa", "residual_linear_attention": "rla"}


def whole(call: Any, tensors: Mapping[str, Any], exact: bool, config: Any, interpret: bool) -> dict[str, Any]:
    """`rattention` or one of its branches, over a whole sequence."""
    mode = MODES[call.operation.name]
    attrs = call.attributes
    dims = {name: call.dims[name] for name in ("B", "T", "Hq", "Hkv", "D", "Dv")}
    present = {name: name in tensors for name in ("q_scale", "k_scale", "memory")}
    present |= {"rope": "rope_cos" in tensors, "initial": "initial_state" in tensors}
    present |= {"segments": "segment_ids" in tensors}
    p = layout.make(dims, call.storage, mode, attrs, present, mode != "swa", 0, exact, config, interpret)
    results = core(p, layout.differentiable(p, tensors), layout.steering(p, tensors, scale_of(attrs, dims), attrs))
    out = {"out": unflat(p, results["out"])}
    if p.final:
        out["final_state"] = layout.state_out(p, results["final_state"])
    return out


def scale_of(attrs: Mapping[str, Any], dims: Mapping[str, int]) -> Any:
    scale = attrs.get("scale")
    return dims["D"] ** -0.5 if scale is None else scale


def unflat(p: Plan, x: Any) -> Any:
    """[B, T, Hq*Dvp] as [B, T, Hq, Dv]."""
    return layout.cut_channels(x.reshape(*x.shape[:2], p.q_heads, p.value_dim), 3, p.true_value_dim, False)
