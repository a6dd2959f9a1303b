"""Dtypes and layouts between the public functions and the eager kernels."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(storage: torch.dtype) -> torch.dtype:
    """float32 for every storage dtype of the specification (FM-4, NUM-3); float64 stays, for gradient checks."""
    return torch.float64 if storage == torch.float64 else torch.float32


def by_heads(x: Tensor) -> Tensor:
    """`[B, J, H, D]` -> `[B, H, J, D]`, contiguous: what a tile takes is then one block of memory per head."""
    return x.transpose(1, 2).contiguous()


def keep(live: Tensor, x: Tensor) -> Tensor:
    """Zero the tokens `[B, T]` of `x [B, T, ...]` that are not live. A selection: what they hold, NaN too, is gone, and
    so is whatever gradient comes back for them (SEG-5, GRAD-5)."""
    return torch.where(live.reshape(*live.shape, *(1,) * (x.ndim - 2)), x, 0)
