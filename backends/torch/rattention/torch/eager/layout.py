"""Between the public layout `[B, T, H, D]` and the flat heads `[N, T, ...]`, N = B * Hkv, of the eager kernels.

Query head h reads key/value head h // G (SWA-4, RLA-8): the G heads of a group lie side by side, so splitting the head
axis into `[Hkv, G]` is a view.
"""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(storage: torch.dtype) -> torch.dtype:
    """float32 for every storage dtype of the specification (FM-4, NUM-3); float64 stays, for gradient checks."""
    return torch.float64 if storage == torch.float64 else torch.float32


def query_heads(x: Tensor, kv_heads: int) -> Tensor:
    """`[B, T, Hq, D]` -> `[N, T, G, D]`."""
    B, T, Hq, D = x.shape
    G = Hq // kv_heads
    return x.reshape(B, T, kv_heads, G, D).transpose(1, 2).reshape(B * kv_heads, T, G, D)


def key_heads(x: Tensor) -> Tensor:
    """`[B, J, Hkv, D]` -> `[N, J, D]`."""
    B, J, Hkv, D = x.shape
    return x.transpose(1, 2).reshape(B * Hkv, J, D)


def public(x: Tensor, kv_heads: int) -> Tensor:
    """`[N, T, G, D]` -> `[B, T, Hq, D]`, a view where it can be."""
    N, T, G, D = x.shape
    B = N // kv_heads
    return x.reshape(B, kv_heads, T, G, D).transpose(1, 2).reshape(B, T, kv_heads * G, D)


def per_head(x: Tensor, kv_heads: int) -> Tensor:
    """`[B, J]` -> `[N, J]`: what holds for a row holds for each of its heads."""
    B, J = x.shape
    return x[:, None].expand(B, kv_heads, J).reshape(B * kv_heads, J)


def keep(live: Tensor, x: Tensor) -> Tensor:
    """Zero the tokens `[B, T]` of `x [B, T, ...]` that are not live. A selection: what they hold, NaN too, is gone, and
    so is whatever gradient comes back for them (SEG-5, GRAD-5)."""
    return torch.where(live.reshape(*live.shape, *(1,) * (x.ndim - 2)), x, 0)
