"""From a public call to the implementation that runs it.

An implementation is a module with

    run(call, tensors, precision) -> dict of outputs       call: rattention.spec.Call, tensors: jax arrays by name
    unsupported(call, tensors, precision) -> str | None    why it cannot run this call; None where it can

`impl="xla"` is always there. `impl="pallas"` is the package `rattention.jax.pallas`, if installed: it is the choice of
`impl=None` on a TPU for the calls that it supports, and asked for by name it runs or refuses, never falls back.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from rattention.jax import xla
from rattention.spec import Call, SpecError, Unsupported, validate

INTEGERS = ("positions", "segment_ids", "cache_length", "lengths")


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
    """
    call, arrays = check(op, tensors, attrs, check_values=check_values)
    return choose(call, arrays, impl, precision).run(call, arrays, precision)


def check(
    op: str, tensors: Mapping[str, Any], attrs: Mapping[str, Any], *, check_values: bool = False
) -> tuple[Call, dict[str, jax.Array]]:
    """The validated call, and its tensors as JAX arrays."""
    given = {name: t for name, t in tensors.items() if t is not None}
    call = validate(op, given, attrs, host=_host(given, check_values), extra_dtypes=_extra_dtypes())
    return call, {name: jnp.asarray(t) for name, t in given.items()}


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


def _extra_dtypes() -> tuple[str, ...]:
    return ("float64",) if jax.config.jax_enable_x64 else ()  # pyright: ignore[reportAttributeAccessIssue]


def _host(given: Mapping[str, Any], check_values: bool) -> dict[str, np.ndarray]:
    """The integer tensors whose values can be read without waiting for a device."""
    found = {}
    for name in INTEGERS:
        t = given.get(name)
        if t is None:
            continue
        if isinstance(t, jax.core.Tracer):
            if check_values:
                raise Unsupported(f"check_values=True needs the values of {name}, which is traced")
        elif check_values or _on_host(t):
            found[name] = np.asarray(t)
    return found


def _on_host(t: Any) -> bool:
    if not isinstance(t, jax.Array):
        return True
    return t.is_fully_addressable and all(d.platform == "cpu" for d in t.devices())
