"""RAttention as Pallas kernels for the TPU: one pass over keys and values, forward, backward and decode.

An implementation module of `rattention.jax.dispatch`: `run` and `unsupported`. Off TPU the kernels run in Pallas' TPU
interpreter, which checks races and uninitialised memory and is for testing.
"""

from rattention.jax.pallas.config import Config
from rattention.jax.pallas.ops import run, unsupported

__all__ = ["Config", "run", "unsupported"]
