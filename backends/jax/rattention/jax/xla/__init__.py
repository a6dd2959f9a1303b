"""The plain JAX form: chunked, linear in T, differentiable, for every platform that XLA compiles for."""

from rattention.jax.xla.ops import run
from rattention.spec import Call


def unsupported(call: Call, tensors: object, precision: object) -> str | None:
    """Nothing: the XLA form has every operation."""
    return None


__all__ = ["run", "unsupported"]
