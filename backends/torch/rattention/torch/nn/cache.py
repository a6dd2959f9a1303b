"""The cache of a layer in generation: a `Cache` that is updated in place, row by row."""

from __future__ import annotations

import torch
from rattention.torch.cache import Cache
from torch import Tensor


class GenerationCache:
    """What one layer remembers of a batch of sequences. Each row has its own length; a finished row can be reset.

    Attributes:
        tensors: the canonical `rattention.torch.Cache`.
        limit: an upper bound on the length of every row, kept on the host so that no call has to read a device.
    """

    def __init__(self, tensors: Cache):
        self.tensors = tensors
        self.limit = int(tensors.length.max()) if tensors.length.numel() else 0

    @property
    def length(self) -> Tensor:
        """`[B]` int32: tokens seen so far in each row."""
        return self.tensors.length

    def update(self, tensors: Cache, tokens: int) -> None:
        """Take the cache after a call with at most `tokens` new tokens per row."""
        self.tensors, self.limit = tensors, self.limit + tokens

    def reset(self, rows: int | list[int] | Tensor | None = None) -> None:
        """Forget everything in `rows` (indices or a `[B]` bool mask; default all), so that they start new sequences."""
        batch = self.tensors.length.shape[0]
        gone = torch.zeros(batch, dtype=torch.bool, device=self.tensors.length.device)
        gone[slice(None) if rows is None else rows] = True
        k, v, state, length = (torch.where(gone.view(-1, *(1,) * (x.ndim - 1)), 0, x) for x in self.tensors)
        self.tensors = Cache(k, v, state, length)
        if rows is None:
            self.limit = 0
