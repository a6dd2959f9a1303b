"""The XLA form behind the backend contract: NumPy in, NumPy out (chapter 12)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rattention.jax import xla
from rattention.jax.table import rope_table
from rattention.jax.xla.plan import CHUNK
from rattention.spec import UNREAD, Call, Result, Unsupported, load, validate


class Adapter:
    """A backend out of an implementation module of `rattention.jax.dispatch`."""

    name = "jax"
    path = "xla"
    implementation: Any = xla
    # Attributes that are operands of the compiled program, so that other values reuse it.
    operands: tuple[str, ...] = ("scale", "eps")
    # A conformance run compiles hundreds of programs to run each a few times on small arrays. The passes over the
    # program, which decide its arithmetic, stay as for everyone; the optimiser of the machine code is left out.
    compiler_options: tuple[tuple[str, Any], ...] = (("xla_backend_optimization_level", 0),)

    def describe(self) -> dict[str, Any]:
        spec = load()
        return {
            "name": self.name,
            "version": jax.__version__,
            "spec_version": spec.version,
            "operations": list(spec.operations),
            "dtypes": list(spec.storage_dtypes),
            "capabilities": list(spec.capabilities),
            "tile_sizes": {"T": [CHUNK], "window": [CHUNK], "D": []},
            "limits": {},
            "cost": "compiled",
        }

    def kernels(self, call: Call) -> list[str]:
        """Names of the kernels that a call runs."""
        return []

    def run(self, op: str, tensors: Mapping[str, Any], attrs: Mapping[str, Any]) -> Result:
        given = {name: t for name, t in tensors.items() if t is not None}
        call = validate(op, given, attrs)
        if op == "rope_table":
            outputs = dict(
                zip(("rope_cos", "rope_sin"), rope_table(given["positions"], **call.attributes), strict=True)
            )
        else:
            outputs = self.compute(call, given)
        return Result({name: np.array(x) for name, x in outputs.items()}, path=self.path, kernels=self.kernels(call))

    def compute(self, call: Call, given: Mapping[str, Any]) -> Mapping[str, Any]:
        reason = self.implementation.unsupported(call, given, None)
        if reason is not None:
            raise Unsupported(reason)
        attrs = call.attributes
        static = tuple((name, value) for name, value in attrs.items() if name not in self.operands)
        numbers = {name: attrs[name] for name in self.operands if name in attrs}
        # NumPy arrays of any stride go in as they are: jit copies them to the device.
        program = _program(self.implementation, call.operation.name, static, self.compiler_options)
        return program(dict(given), numbers)


@functools.cache
def _program(
    implementation: Any,
    op: str,
    static: tuple[tuple[str, Any], ...],
    compiler_options: tuple[tuple[str, Any], ...],
) -> Callable[..., Any]:
    """The jitted operation, or its derivative; jit compiles it once per set of tensors, shapes and dtypes."""
    forward_op = op.removesuffix(".vjp")

    def forward(tensors: dict[str, Any], numbers: dict[str, Any]) -> dict[str, Any]:
        call = validate(forward_op, tensors, dict(static), host=UNREAD)
        call = dataclasses.replace(call, attributes=call.attributes | dict(static) | numbers)
        return implementation.run(call, tensors, None)

    def gradients(tensors: dict[str, Any], numbers: dict[str, Any]) -> dict[str, Any]:
        spec = load().operations[forward_op]
        wanted = [t.name for t in spec.tensors if t.differentiable and t.name in tensors]
        fixed = {t.name: tensors[t.name] for t in spec.tensors if t.name in tensors and not t.differentiable}
        names = [o.name for o in spec.outputs if o.differentiable]

        def differentiable_part(inputs: dict[str, Any]) -> dict[str, Any]:
            outputs = forward(inputs | fixed, numbers)
            return {name: outputs[name] for name in names}

        outputs, pull = jax.vjp(differentiable_part, {name: tensors[name] for name in wanted})
        cotangents = {
            n: jnp.asarray(tensors[f"d_{n}"]) if f"d_{n}" in tensors else jnp.zeros_like(outputs[n]) for n in names
        }
        (found,) = pull(cotangents)
        return {f"d_{name}": g for name, g in found.items()}

    return jax.jit(gradients if op.endswith(".vjp") else forward, compiler_options=dict(compiler_options))


backend = Adapter()
