"""RAttention over a mesh: batch, heads and the sequence itself split between devices."""

from rattention.jax.sharded.api import rattention

__all__ = ["rattention"]
