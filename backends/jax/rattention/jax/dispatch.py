"""From a public call to the implementation that runs it.

An implementation is a module with

    run(call, tensors, precision) -> dict of outputs       call: rattention.spec.Call, tensors: jax arrays by name
    unsupported(call, tensors, precision) -> str | None    why it cannot run this call; None where it can

`impl="xla"` is always there. `impl="pallas"` is the package `rattention.jax.pallas`, if installed: it is the choice of
`impl=None` on a TPU for the calls that it supports, and asked for by name it runs or refuses, never falls back.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Mapping
from typing import Any

import jax
import jax.core
import numpy as np
from rattention.jax import meshes, missing, xla
from rattention.jax.constants import constants
from rattention.jax.xla.plan import named_precision
from rattention.spec import UNREAD, Call, SpecError, Unsupported, load, validate

INTEGERS = ("positions", "segment_ids", "cache_length", "lengths")
ARRAYS = (jax.Array, np.ndarray)
"""What a tensor can be (ERR-14); tracers are a jax.Array too."""


def run(
    op: str,
    tensors: Mapping[str, Any],
    attrs: Mapping[str, Any],
    *,
    impl: str | None = None,
    precision: object = None,
    check_values: bool = False,
) -> dict[str, jax.Array]:
    """Validate, choose and run one operation; outputs by name.

    Raises:
        SpecError: the call breaks a constraint of the specification.
        Unsupported: `impl="pallas"` and the kernels lack this call, or `check_values` with traced integers.
        ValueError: `precision` is none.
    """
    precision = named_precision(precision)
    call, arrays, seen = check(op, tensors, attrs, check_values=check_values)
    return compute(choose(call, arrays, impl, precision), call, arrays, precision, seen)


def check(
    op: str, tensors: Mapping[str, Any], attrs: Mapping[str, Any], *, check_values: bool = False
) -> tuple[Call, dict[str, jax.Array], bool]:
    """The validated call, its tensors as JAX arrays, and whether the values of all its integers were looked at."""
    given = {name: unwrapped(t) for name, t in tensors.items() if t is not None}
    attributes = {name: plain(op, name, value) for name, value in attrs.items()}
    readable = {name: t for name, t in given.items() if name in INTEGERS and isinstance(t, ARRAYS)}
    call = validate(
        op,
        given,
        attributes,
        host=_host(readable, check_values),
        extra_dtypes=extra_dtypes(),
        array=("a jax.Array or numpy.ndarray", ARRAYS),
        devices=places(given),
    )
    return call, {name: on_device(t) for name, t in given.items()}, not call.unread


def compute(
    implementation: Any, call: Call, arrays: dict[str, jax.Array], precision: object, rows_exist: bool
) -> dict[str, jax.Array]:
    """Run a validated call as one compiled program, so that an eager call moves nothing but its arguments.

    Programs are kept by operation, attributes, precision and the shapes and dtypes of the tensors.

    Args:
        implementation: the module that `choose` found.
        rows_exist: every token is known to have a row in the rotary table; otherwise those without get NaN (ERR-16).
    """
    static = tuple(sorted(call.attributes.items()))
    return _program(implementation, call.operation.name, static, precision, rows_exist, meshes.together(arrays))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _program(
    implementation: Any,
    op: str,
    static: tuple[tuple[str, Any], ...],
    precision: object,
    rows_exist: bool,
    arrays: dict[str, jax.Array],
) -> dict[str, jax.Array]:
    def local(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
        call = validate(op, arrays, dict(static), host=UNREAD, extra_dtypes=extra_dtypes())
        if rows_exist:
            return implementation.run(call, arrays, precision)
        return missing.run(lambda arrays: implementation.run(call, arrays, precision), call, arrays)

    call = validate(op, arrays, dict(static), host=UNREAD, extra_dtypes=extra_dtypes())
    arrays = constants(call.operation, arrays)
    if implementation is not xla:  # the compiler cannot partition a kernel
        return meshes.on_each_device(local, call, arrays)
    return meshes.without_explicit_axes(local, (arrays,), meshes.like_inputs(call, arrays))


def choose(call: Call, arrays: Mapping[str, Any], impl: str | None, precision: object) -> Any:
    """The implementation module for this call."""
    if impl not in (None, "xla", "pallas"):
        raise SpecError(call.operation.name, "impl", "one of xla, pallas, or None", repr(impl), "ERR-5")
    if impl == "xla" or (impl is None and jax.default_backend() != "tpu"):
        return xla
    pallas = _pallas()
    reason = "rattention.jax.pallas is not installed" if pallas is None else pallas.unsupported(call, arrays, precision)
    if reason is None:
        return pallas
    if impl == "pallas":
        raise Unsupported(reason)
    return xla


def _pallas() -> Any:
    if importlib.util.find_spec("rattention.jax.pallas") is None:
        return None
    return importlib.import_module("rattention.jax.pallas")


def extra_dtypes() -> tuple[str, ...]:
    """Storage dtypes beside those of the specification."""
    return ("float64",) if jax.config.jax_enable_x64 else ()  # pyright: ignore[reportAttributeAccessIssue]


def unwrapped(t: Any) -> Any:
    """The array of what holds one and says so, such as a flax.nnx.Param."""
    return t.__jax_array__() if not isinstance(t, ARRAYS) and hasattr(t, "__jax_array__") else t


def plain(op: str, name: str, value: Any) -> Any:
    """An attribute as a Python number, if it is an array with a value.

    Raises:
        SpecError: it is traced. Attributes are part of the compiled program and have no gradient (ERR-5).
    """
    value = unwrapped(value)
    if not isinstance(value, jax.Array):
        return value
    spec = load().operations[op].attribute.get(name)
    if isinstance(value, jax.core.Tracer) and spec is not None:
        raise SpecError(op, name, spec.domain, "a traced array; attributes are Python values", "ERR-5")
    return jax.device_get(value)[()] if value.ndim == 0 else value


def places(given: Mapping[str, Any]) -> dict[str, str]:
    """Where the arrays are that their owner has placed, if not all in one place. JAX itself moves the others."""
    found = {}
    for name, t in given.items():
        if isinstance(t, jax.Array) and not isinstance(t, jax.core.Tracer) and t.committed:
            found[name] = t.sharding.device_set
    if len({frozenset(places) for places in found.values()}) < 2:
        return {}
    return {name: ", ".join(sorted(f"{d.platform}:{d.id}" for d in places)) for name, places in found.items()}


def on_device(t: Any) -> jax.Array:
    """As a JAX array. The transfer is explicit: a transfer guard lets it pass."""
    return t if isinstance(t, jax.Array) else jax.device_put(t)


def _host(given: Mapping[str, Any], check_values: bool) -> dict[str, Any]:
    """The values of the integer tensors that can be read without waiting for a device; `UNREAD` for the others."""
    found: dict[str, Any] = dict.fromkeys(given, UNREAD)
    for name, t in given.items():
        if isinstance(t, jax.core.Tracer):
            if check_values:
                raise Unsupported(f"check_values=True needs the values of {name}, which is traced")
        elif check_values or _on_host(t):
            found[name] = np.asarray(jax.device_get(t))
    return found


def _on_host(t: Any) -> bool:
    if not isinstance(t, jax.Array):
        return True
    return t.is_fully_addressable and all(d.platform == "cpu" for d in t.devices())
