"""RAttention in JAX: plain functions, chunked and differentiable in XLA, with Pallas kernels for the TPU."""

from importlib.util import find_spec

if find_spec("jax") is None:
    raise ModuleNotFoundError("rattention.jax needs JAX: install rattention with its extra jax", name="jax")

from rattention.jax.api import (
    feature_map,
    rattention,
    rattention_extend,
    residual_linear_attention,
    rms_mix,
    sliding_window_attention,
)
from rattention.jax.cache import Cache
from rattention.jax.table import rope_table
from rattention.spec import SpecError, Unsupported

__all__ = [
    "Cache",
    "SpecError",
    "Unsupported",
    "feature_map",
    "rattention",
    "rattention_extend",
    "residual_linear_attention",
    "rms_mix",
    "rope_table",
    "sliding_window_attention",
]
