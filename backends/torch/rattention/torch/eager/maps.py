"""The maps of single tokens: feature maps and rotary embedding. Plain PyTorch, any dtype."""

from __future__ import annotations

import torch
from torch import Tensor

WITH_FLOAT64 = ("cpu", "cuda", "meta")
"""Device types of which every device has float64. MPS and NPUs have none, XPUs have it on some models."""


def phi(x: Tensor, feature_map: str) -> Tensor:
    """`[..., D]` -> `[..., F]` in the dtype of `x` (FM-1 .. FM-3)."""
    if feature_map == "softmax":
        return torch.cat((torch.softmax(x, -1), torch.softmax(-x, -1)), -1)
    if feature_map == "relu":
        return torch.cat((_relu(x), _relu(-x)), -1)
    return x


def _relu(x: Tensor) -> Tensor:
    """max(x, 0), which keeps NaN; its derivative is 1 for x > 0 and 0 otherwise (FM-6).

    The derivative of `torch.relu` lets the cotangent pass at NaN, so NaN comes from a copy that has none.
    """
    return torch.where(x.isnan(), x.detach(), torch.relu(x))


def features(head_dim: int, feature_map: str) -> int:
    """F for D."""
    return head_dim if feature_map == "identity" else 2 * head_dim


def phi_backward(x: Tensor, out: Tensor, d_out: Tensor, feature_map: str) -> Tensor:
    """Gradient of `x [..., D]`, given `out = phi(x)` and its cotangent `[..., F]`. That of relu at 0 is 0 (FM-6)."""
    if feature_map == "identity":
        return d_out
    D = x.shape[-1]
    one, two = d_out[..., :D], d_out[..., D:]
    if feature_map == "relu":
        return torch.where(x > 0, one, torch.where(x < 0, -two, 0))
    backward = torch.ops.aten._softmax_backward_data
    plus = backward(one.contiguous(), out[..., :D].contiguous(), -1, x.dtype)
    return plus.sub_(backward(two.contiguous(), out[..., D:].contiguous(), -1, x.dtype))


def rotary_table(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of position * theta^(-2j/D), `[M, D/2]` float32, computed in float64 (ROPE-1, ROPE-2).

    On a device without float64 the CPU computes the table.
    """
    device = positions.device
    where = device if device.type in WITH_FLOAT64 else torch.device("cpu")
    j = torch.arange(head_dim // 2, dtype=torch.float64, device=where)
    angles = positions.to(where).to(torch.float64)[:, None] * theta ** (-2.0 * j / head_dim)
    return angles.cos().to(torch.float32).to(device), angles.sin().to(torch.float32).to(device)


def table_rows(
    cos: Tensor, sin: Tensor, positions: Tensor | None, B: int, T: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Rows of the table for each token, `[B, T, D/2]`. Without `positions`, token t takes row t.

    A position outside the table takes the nearest row, and any row serves a token that is not live: no index is ever
    out of bounds. Callers replace what comes of the first by NaN (ERR-16).
    """
    if positions is None:
        shape = (B, T, cos.shape[1])
        if cos.shape[0] < T:  # legal in an empty batch alone: the shapes have been compared
            return cos.new_empty(shape, dtype=dtype), sin.new_empty(shape, dtype=dtype)
        return cos[:T].to(dtype).expand(shape), sin[:T].to(dtype).expand(shape)
    if cos.shape[0] == 0:
        cos, sin = cos.new_ones(1, cos.shape[1]), sin.new_zeros(1, sin.shape[1])
    index = positions.long().clamp(0, cos.shape[0] - 1)
    return cos[index].to(dtype), sin[index].to(dtype)


def rotate(x: Tensor, table: tuple[Tensor, Tensor] | None) -> Tensor:
    """Rotate the half-split pairs (j, j + D/2) of `x [B, T, H, D]` by increasing angle (ROPE-3)."""
    if table is None:
        return x
    cos, sin = (x[:, :, None] for x in table)
    one, two = x.chunk(2, -1)
    return torch.cat((one * cos - two * sin, two * cos + one * sin), -1)
