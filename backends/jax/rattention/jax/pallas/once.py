"""Kernels are not differentiated by JAX: their gradient is a kernel, whose own derivative there is not.

JAX would try to differentiate a `pallas_call`, and fail in an assertion. So the operands of every kernel pass through
an identity that refuses a tangent. It adds nothing to a compiled program.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from rattention.spec import Unsupported

_LEFT_OUT: contextvars.ContextVar[bool] = contextvars.ContextVar("left_out", default=False)


def once(kernel: str, operands: Any) -> Any:
    """The same operands, of the kernel or operation of that name.

    Raises:
        Unsupported: when a derivative is taken of what the kernel computes. The first derivative of an operation does
            not ask for it: it runs the kernels by rules of its own. The second does, in either mode.
    """
    return operands if _LEFT_OUT.get() else _identity(kernel, operands)


@contextlib.contextmanager
def left_out() -> Iterator[None]:
    """For the text of a traced program, which is then that of the kernels alone: trace nothing else inside."""
    jax.clear_caches()  # a trace from before would serve inside, and one from inside after it
    token = _LEFT_OUT.set(True)
    try:
        yield
    finally:
        _LEFT_OUT.reset(token)
        jax.clear_caches()


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _identity(kernel: str, operands: Any) -> Any:
    return operands


def _derivative(kernel: str, primals: Any, tangents: Any) -> Any:
    pairs = zip(jax.tree.leaves(primals[0]), jax.tree.leaves(tangents[0], is_leaf=_is_zero), strict=True)
    if any(jnp.issubdtype(x.dtype, jnp.floating) and not _is_zero(t) for x, t in pairs):
        raise Unsupported(
            f"{kernel}: the Pallas kernels have first derivatives alone, in reverse mode; impl='xla' has second ones"
        )
    return primals[0], tangents[0]


def _is_zero(t: Any) -> bool:
    return isinstance(t, SymbolicZero)


_identity.defjvp(_derivative, symbolic_zeros=True)
