"""Layers for PyTorch models."""

from rattention.torch.nn.cache import GenerationCache
from rattention.torch.nn.layer import RAttention

__all__ = ["GenerationCache", "RAttention"]
