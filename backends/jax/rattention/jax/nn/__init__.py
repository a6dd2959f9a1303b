"""Layers for flax.nnx models."""

from importlib.util import find_spec

if find_spec("flax") is None:
    raise ModuleNotFoundError("rattention.jax.nn needs Flax: install rattention with its extra jax", name="flax")

from rattention.jax.nn.cache import GenerationCache
from rattention.jax.nn.layer import RAttention
from rattention.jax.nn.weights import load_state_dict, state_dict

__all__ = ["GenerationCache", "RAttention", "load_state_dict", "state_dict"]
