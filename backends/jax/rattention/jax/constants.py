"""Tensors of a call that are constants: the rotary table.

The derivative of a call does not follow its rotary table (chapter 3). A caller who asks for that gradient, as one who
learns the frequencies, would get zeros, so the question itself is refused. The rule below belongs to an identity: it
adds nothing to a compiled program, and it is asked only where a transformation differentiates what goes through it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from rattention.spec import Operation, Unsupported


def constants(op: Operation, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The same arrays. Differentiating one that the specification does not call differentiable is refused.

    Raises:
        Unsupported: when a derivative is taken with respect to such an array, or to what it was computed from.
    """
    fixed = {t.name for t in op.tensors if not t.differentiable}
    return {
        name: _constant(op.name, name, x) if name in fixed and jnp.issubdtype(x.dtype, jnp.floating) else x
        for name, x in arrays.items()
    }


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _constant(op: str, name: str, x: jax.Array) -> jax.Array:
    return x


def _derivative(op: str, name: str, primals: Any, tangents: Any) -> Any:
    if not isinstance(tangents[0], SymbolicZero):
        raise Unsupported(
            f"{op}: {name} asks for a gradient; rotary tables are constants (chapter 3): use jax.lax.stop_gradient"
        )
    return primals[0], tangents[0]


_constant.defjvp(_derivative, symbolic_zeros=True)
