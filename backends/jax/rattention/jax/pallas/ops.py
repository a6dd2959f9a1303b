"""The operations of the contract on the kernels: one differentiable core, and what each operation asks of it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from rattention.jax.meshes import sum_to
from rattention.jax.pallas import calls, config, extend, layout
from rattention.jax.pallas.config import Config
from rattention.jax.pallas.plan import Plan
from rattention.spec import Call

MODES = {"rattention": "mix", "sliding_window_attention": "swa", "residual_linear_attention": "rla"}
OPERATIONS = (*MODES, "rattention_extend")
DTYPES = ("float32", "bfloat16")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def core(p: Plan, given: dict[str, Any], fixed: dict[str, Any]) -> Any:
    """`out [B, T, Hq*Dv]` and, if `p.final`, `final_state [B, Hkv, F, Dv]`, of canonical operands (layout)."""
    return calls.run_forward(p, given | fixed, save=False)


def _core_forward(p: Plan, given: dict[str, Any], fixed: dict[str, Any]) -> tuple[Any, Any]:
    results = calls.run_forward(p, given | fixed, save=True)
    outputs = {name: results.pop(name) for name in ("out", "final_state") if name in results}
    return outputs, (given, fixed, results)


def _core_backward(p: Plan, saved: Any, cotangents: dict[str, Any]) -> tuple[Any, Any]:
    given, fixed, results = saved
    return sum_to(calls.run_backward(p, given, fixed, results, cotangents), given), None


core.defvjp(_core_forward, _core_backward)


def whole(call: Call, tensors: Mapping[str, Any], exact: bool, settings: Config, interpret: bool) -> dict[str, Any]:
    """`rattention` or one of its branches, over a whole sequence."""
    mode = MODES[call.operation.name]
    dims = {name: call.dims[name] for name in ("B", "T", "Hq", "Hkv", "D", "Dv")}
    present = {name: name in tensors for name in ("q_scale", "k_scale", "memory")}
    present |= {"rope": "rope_cos" in tensors, "initial": "initial_state" in tensors}
    present |= {"segments": "segment_ids" in tensors}
    p = layout.make(dims, call.storage, mode, call.attributes, present, mode != "swa", 0, exact, settings, interpret)
    fixed = layout.steering(p, tensors, layout.scale_of(call), call.attributes)
    results: Any = core(p, layout.differentiable(p, tensors), fixed)
    out = {"out": layout.unflat(p, results["out"])}
    if p.final:
        out["final_state"] = layout.state_out(p, results["final_state"])
    return out


def run(
    call: Call,
    tensors: Mapping[str, Any],
    precision: object = None,
    *,
    settings: Config | None = None,
    interpret: bool | None = None,
) -> dict[str, Any]:
    """Run one operation; outputs by name.

    `settings` and `interpret` default to the table of `config` for the TPU at hand, and to the interpreter where
    there is none.
    """
    interpret = jax.default_backend() != "tpu" if interpret is None else interpret
    if settings is None:
        plain = {"q", "k", "v", "swa_weight", "rla_weight"}
        more = call.operation.name != "rattention_extend" and not plain.issuperset(tensors)
        kind = jax.devices()[0].device_kind
        settings = config.INTERPRETED if interpret else config.of_device(kind, call, more)
    settings = config.fitted(settings, call.dims["T"] + call.dims.get("W", 0))
    tensors = {name: jnp.asarray(x) for name, x in tensors.items()}
    exact = precision in (None, "highest", "float32", jax.lax.Precision.HIGHEST)
    if 0 in (call.dims["B"], call.dims["T"]):
        return empty(call, tensors)
    if call.operation.name == "rattention_extend":
        return extend.run(core, call, tensors, exact, settings, interpret)
    return whole(call, tensors, exact, settings, interpret)


def empty(call: Call, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """No row or no token (ERR-12): nothing to launch."""
    shapes = call.output_shapes()
    found: dict[str, Any] = {"out": jnp.zeros(shapes["out"], tensors["q"].dtype)}
    if call.operation.name == "rattention_extend":
        found["cache_state"] = tensors["cache_state"]
        return found | extend.next_cache(call, tensors)
    if "final_state" in shapes:
        state = tensors.get("initial_state")
        found["final_state"] = jnp.zeros(shapes["final_state"], jnp.float32) if state is None else state
    return found


def unsupported(call: Call, tensors: Mapping[str, Any], precision: object = None) -> str | None:
    """Why the kernels cannot run this call; None where they can."""
    name = call.operation.name.removesuffix(".vjp")
    if name not in OPERATIONS:
        return f"{name} has no Pallas kernel of its own; impl='xla' computes it"
    if call.storage not in DTYPES:
        return f"Mosaic has no {call.storage} arithmetic on the TPU; use one of {', '.join(DTYPES)}"
    if precision in ("high", jax.lax.Precision.HIGH):
        return "Mosaic has no three-pass products; precision None or 'highest' is six passes, 'default' one"
    if precision not in (None, "default", "highest", "float32", *jax.lax.Precision):
        return f"precision {precision!r} is not one of None, 'default', 'highest'"
    return None
