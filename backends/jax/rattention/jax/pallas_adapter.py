"""The Pallas kernels behind the backend contract (chapter 12). Without a TPU they are interpreted, races detected."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu
from rattention.jax import pallas
from rattention.jax.adapter import Adapter
from rattention.jax.pallas import calls, config, decode, ops, watch
from rattention.spec import UNREAD, Call, Result, Unsupported, load, validate


class PallasAdapter(Adapter):
    """`jax-pallas`. What has no kernel is refused; the metadata names the kernels that ran, as they report it."""

    name = "jax-pallas"
    path = "pallas"
    implementation: Any = pallas

    def describe(self) -> dict[str, Any]:
        operations = [op for op in load().operations if op.removesuffix(".vjp") in ops.OPERATIONS]
        chunk = self.settings().chunk
        sizes = sorted({chunk, chunk * self.settings().blocks})
        found = super().describe() | {"operations": operations, "dtypes": list(ops.DTYPES)}
        found["tile_sizes"] = {"T": [decode.LONGEST, *sizes], "window": sizes, "D": [64, 128, 256]}
        return found | {"kernels": list(calls.KERNELS), "cost": "interpreted" if interpreted() else "compiled"}

    def settings(self) -> Any:
        return config.INTERPRETED if interpreted() else config.Config()

    def run(self, op: str, tensors: Mapping[str, Any], attrs: Mapping[str, Any]) -> Result:
        given = {name: t for name, t in tensors.items() if t is not None}
        call = validate(op, given, attrs)
        reason = ops.unsupported(call, given)
        if reason is not None:
            raise Unsupported(reason)
        static = tuple((name, value) for name, value in call.attributes.items() if name not in self.operands)
        numbers = {name: call.attributes[name] for name in self.operands if name in call.attributes}
        signature = tuple((name, x.shape, str(x.dtype)) for name, x in sorted(given.items()))
        program = _program(op, static, signature, tuple(name for name, x in numbers.items() if x is None))
        try:
            with watch.watching() as seen:
                results = program.compiled(dict(given), {name: x for name, x in numbers.items() if x is not None})
                outputs = {name: np.array(x) for name, x in results.items()}
        except BaseException:
            # A kernel that raised leaves the interpreter's memory behind, and the next would start in it.
            pltpu.reset_tpu_interpret_mode_state()
            raise
        if seen.racy:
            raise RuntimeError(f"{op}: the interpreter found a race in {', '.join(seen.ran)}")
        kernels = seen.ran if interpreted() else program.kernels
        return Result(outputs, path=self.path, kernels=list(kernels))


def interpreted() -> bool:
    return jax.default_backend() != "tpu"


@functools.cache
def fast_to_compile() -> dict[str, Any]:
    """Compiler options for interpreted programs: many small operations between callbacks, each of which runs a few
    times. Compiling them well costs more than it gives; the emitters of fusions alone take a third of the time."""
    known: dict[str, Any] = {"xla_backend_optimization_level": 0}
    wanted = known | {"xla_cpu_use_fusion_emitters": False}
    try:
        jax.jit(lambda: 0, compiler_options=wanted).lower().compile()
    except jax.errors.JaxRuntimeError:  # an XLA without this option
        return known
    return wanted


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled operation, and the kernels that were built into it."""

    compiled: Any
    kernels: tuple[str, ...]


@functools.cache
def _program(
    op: str, static: tuple[tuple[str, Any], ...], signature: tuple[tuple[str, tuple[int, ...], str], ...], none: tuple
) -> Program:
    """One operation or its derivative, compiled for one signature; numbers such as scale stay operands of it."""
    spec = load().operations[op.removesuffix(".vjp")]
    shapes = {name: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for name, shape, dtype in signature}
    operands = [n for n in PallasAdapter.operands if n in spec.attribute and n not in none]

    def forward(tensors: dict[str, Any], numbers: dict[str, Any]) -> dict[str, Any]:
        call: Call = validate(spec.name, tensors, dict(static), host=UNREAD)
        call = dataclasses.replace(call, attributes=call.attributes | dict(static) | numbers)
        return ops.run(call, tensors)

    def gradients(tensors: dict[str, Any], numbers: dict[str, Any]) -> dict[str, Any]:
        wanted = {t.name: tensors[t.name] for t in spec.tensors if t.differentiable and t.name in tensors}
        fixed = {t.name: tensors[t.name] for t in spec.tensors if t.name in tensors and not t.differentiable}
        names = [o.name for o in spec.outputs if o.differentiable]

        def floats(inputs: dict[str, Any]) -> dict[str, Any]:
            outputs = forward(inputs | fixed, numbers)
            return {name: outputs[name] for name in names}

        outputs, pull = jax.vjp(floats, wanted)
        (found,) = pull({n: tensors.get(f"d_{n}", jnp.zeros_like(outputs[n])) for n in names})
        return {f"d_{name}": g for name, g in found.items()}

    options = fast_to_compile() if interpreted() else None
    jitted = jax.jit(gradients if op.endswith(".vjp") else forward, compiler_options=options)
    with watch.watching() as seen:
        compiled = jitted.lower(shapes, {n: jax.ShapeDtypeStruct((), jnp.float32) for n in operands}).compile()
    numbers_of = {n: jnp.float32 for n in operands}

    def run(tensors: dict[str, Any], numbers: dict[str, Any]) -> Any:
        return compiled(tensors, {n: numbers_of[n](x) for n, x in numbers.items()})

    return Program(run, tuple(seen.traced))


backend = PallasAdapter()
