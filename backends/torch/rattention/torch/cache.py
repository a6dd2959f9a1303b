"""The cache of `rattention_extend`: the last tokens of each row, and one state for all tokens before them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Cache(NamedTuple):
    """What a sequence leaves behind, in the canonical form of the specification (EXT-3 .. EXT-6, EXT-10).

    A tuple, so it passes through `torch.compile`, `torch.func` transforms and pytree utilities as it is.
    """

    k: Tensor
    """`[B, W, Hkv, D]` in storage dtype: keys of the last W = max(window, 0) tokens before rotary embedding, newest
    last, zero-filled on the left. With window None every token so far has a slot."""

    v: Tensor
    """`[B, W, Hkv, Dv]`: their values."""

    state: Tensor
    """`[B, Hkv, F, Dv]` float32: sum of phi(k)^T v over all older tokens."""

    length: Tensor
    """`[B]` int32: tokens seen so far, row by row."""

    @classmethod
    def empty(
        cls,
        batch: int,
        num_kv_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        *,
        window: int | None,
        feature_map: str = "softmax",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Cache:
        """A cache that has seen nothing. `value_dim` defaults to `head_dim`."""
        Dv = head_dim if value_dim is None else value_dim
        F = head_dim if feature_map == "identity" else 2 * head_dim
        W = 0 if window is None else max(window, 0)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return cls(
            torch.zeros(batch, W, num_kv_heads, head_dim, dtype=dtype, device=device),
            torch.zeros(batch, W, num_kv_heads, Dv, dtype=dtype, device=device),
            torch.zeros(batch, num_kv_heads, F, Dv, dtype=wide, device=device),
            torch.zeros(batch, dtype=torch.int32, device=device),
        )
