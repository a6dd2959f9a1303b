"""Layers for flax.nnx models."""

from rattention.jax.nn.cache import GenerationCache
from rattention.jax.nn.layer import RAttention
from rattention.jax.nn.weights import load_state_dict, state_dict

__all__ = ["GenerationCache", "RAttention", "load_state_dict", "state_dict"]
