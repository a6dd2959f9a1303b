"""The elementwise parts: feature maps, rotary embedding, RMS norms and their mix. Plain PyTorch, any dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def phi(x: Tensor, feature_map: str) -> Tensor:
    """`[..., D]` -> `[..., F]` in the dtype of `x` (FM-1 .. FM-3)."""
    if feature_map == "softmax":
        return torch.cat((torch.softmax(x, -1), torch.softmax(-x, -1)), -1)
    if feature_map == "relu":
        return torch.cat((torch.relu(x), torch.relu(-x)), -1)
    return x


def rotary_table(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of position * theta^(-2j/D), `[M, D/2]` float32, computed in float64 (ROPE-1, ROPE-2)."""
    j = torch.arange(head_dim // 2, dtype=torch.float64, device=positions.device)
    angles = positions.to(torch.float64)[:, None] * theta ** (-2.0 * j / head_dim)
    return angles.cos().to(torch.float32), angles.sin().to(torch.float32)


def table_rows(cos: Tensor, sin: Tensor, positions: Tensor | None, T: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows of the table for each token, `[B or 1, T, 1, D/2]`. Without `positions`, token t takes row t.

    Callers bring positions of inert tokens into the table; a table without rows serves when no token is live.
    """
    if positions is None:
        return cos[None, :T, None].to(dtype), sin[None, :T, None].to(dtype)
    if cos.shape[0] == 0:
        cos, sin = cos.new_ones(1, cos.shape[1]), sin.new_zeros(1, sin.shape[1])
    index = positions.long()
    return cos[index][:, :, None].to(dtype), sin[index][:, :, None].to(dtype)


def rotate(x: Tensor, table: tuple[Tensor, Tensor] | None) -> Tensor:
    """Rotate the half-split pairs (j, j + D/2) of `x [B, T, H, D]` by increasing angle (ROPE-3)."""
    if table is None:
        return x
    cos, sin = table
    one, two = x.chunk(2, -1)
    return torch.cat((one * cos - two * sin, two * cos + one * sin), -1)


def rms(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last axis (MIX-2). A row of zeros stays zero with finite gradients (MIX-3)."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def mix(swa: Tensor, rla: Tensor, swa_weight: Tensor, rla_weight: Tensor, eps: float) -> Tensor:
    """swa_weight * rms(swa) + rla_weight * rms(rla) over `[..., Hq, Dv]` (MIX-1)."""
    return swa_weight * rms(swa, eps) + rla_weight * rms(rla, eps)
