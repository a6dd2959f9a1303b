"""The eager kernels once more, composed of PyTorch operations that can be differentiated any number of times.

The kernels of `band`, `scan`, `mix` and `fused` write into buffers and have a backward pass of their own: PyTorch
cannot look inside, so it cannot differentiate that backward pass. What lies beyond the first derivative (Hessian
products, gradient penalties, meta-learning, forward mode) is taken from the functions here instead; `derivatives` says
how. They take the arguments of the kernels, walk over the same kind of chunks, and mean the same. What autograd keeps
of them is linear in T.
"""

from __future__ import annotations

import torch
from rattention.torch.eager.chunks import band_chunk, scan_chunk, spans
from rattention.torch.eager.groups import groups_of
from rattention.torch.eager.maps import phi
from torch import Tensor

Optional = Tensor | None


def band(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Optional,
    sin: Optional,
    group_q: Optional,
    group_k: Optional,
    window: int,
    scale: float,
) -> Tensor:
    """Softmax attention over a band, `[B, T, Hq, Dv]`; arguments as in `band.band_attention` (SWA-1, SWA-2, SWA-3)."""
    B, T, Hq, D = q.shape
    Hkv, J = k.shape[1:3]
    G, P, Dv = Hq // Hkv, J - T, v.shape[3]
    if window < 0 or T == 0:
        return q.new_zeros(B, T, Hq, Dv)
    window = min(window, J)
    if cos is not None and sin is not None:
        c, s = cos[:, :, None], sin[:, :, None]
        one, two = q.chunk(2, -1)
        q = torch.cat((one * c - two * s, two * c + one * s), -1)
    rows = (q * scale).reshape(B, T, Hkv, G, D).permute(0, 2, 1, 3, 4)  # [B, Hkv, T, G, D]
    outs = []
    for t0, t1 in spans(0, T, band_chunk(G, window)):
        j0, j1 = max(0, P + t0 - window), P + t1
        age = torch.arange(P + t0, P + t1, device=q.device)[:, None] - torch.arange(j0, j1, device=q.device)
        seen = ((age >= 0) & (age <= window))[None]
        if group_q is not None and group_k is not None:
            seen = seen & (group_q[:, t0:t1, None] == group_k[:, None, j0:j1])
        scores = torch.einsum("bhtgd,bhjd->bhtgj", rows[:, :, t0:t1], k[:, :, j0:j1])
        weights = torch.where(seen[:, None, :, None], scores, float("-inf")).softmax(-1)
        outs.append(torch.einsum("bhtgj,bhjd->bhtgd", weights, v[:, :, j0:j1]))
    return torch.cat(outs, 2).permute(0, 2, 1, 3, 4).reshape(B, T, Hq, Dv)


def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Optional,
    group_q: Optional,
    group_k: Optional,
    alive: Optional,
    inclusive: bool,
    feature_map: str,
) -> tuple[Tensor, Tensor]:
    """Linear attention over keys that lag behind, `[B, T, Hq, Dv]`, and the state after the last key; arguments as in
    `scan.linear_scan` (RLA-1, RLA-2, RLA-6, SEG-2)."""
    B, T, Hq, D = q.shape
    Hkv, J = k.shape[1:3]
    G, lead, Dv = Hq // Hkv, T - J, v.shape[3]
    f = phi(q.reshape(B, T, Hkv, G, D).permute(0, 2, 1, 3, 4), feature_map)  # [B, Hkv, T, G, F]
    x = phi(k, feature_map)
    S = q.new_zeros(B, Hkv, f.shape[4], Dv) if state is None else state
    groups = groups_of(group_q, group_k, alive)

    def select(condition: Tensor, value: Tensor) -> Tensor:
        """Zero what the condition `[B, n]` does not hold for, along axis 2 of `value`."""
        shape = (condition.shape[0], 1, condition.shape[1], *(1,) * (value.ndim - 3))
        return torch.where(condition.reshape(shape), value, 0)

    def recall(t0: int, t1: int, before: int) -> Tensor:
        read = torch.einsum("bhtgf,bhfd->bhtgd", f[:, :, t0:t1], S)
        return read if groups is None else select(groups.q[:, t0:t1] == groups.alive[:, before, None], read)

    outs = [q.new_zeros(B, Hkv, lead, G, Dv) if state is None else recall(0, lead, 0)]
    for j0, j1 in spans(0, J, scan_chunk(G)):
        t0, t1 = j0 + lead, j1 + lead
        step = torch.arange(j1 - j0, device=q.device)
        reads = (step[:, None] >= step if inclusive else step[:, None] > step)[None]
        if groups is not None:
            reads = reads & (groups.q[:, t0:t1, None] == groups.k[:, None, j0:j1])
        tile = torch.einsum("bhtgf,bhjf->bhtgj", f[:, :, t0:t1], x[:, :, j0:j1])
        tile = torch.where(reads[:, None, :, None], tile, 0)
        outs.append(torch.einsum("bhtgj,bhjd->bhtgd", tile, v[:, :, j0:j1]) + recall(t0, t1, j0))
        folded = x[:, :, j0:j1]
        if groups is not None:
            folded = select(groups.k[:, j0:j1] == groups.alive[:, j1, None], folded)
            S = torch.where((groups.alive[:, j0] == groups.alive[:, j1])[:, None, None, None], S, 0)
        S = S + torch.einsum("bhjf,bhjd->bhfd", folded, v[:, :, j0:j1])
    return torch.cat(outs, 2).permute(0, 2, 1, 3, 4).reshape(B, T, Hq, Dv), S


def mix(swa: Tensor, rla: Tensor, swa_weight: Tensor, rla_weight: Tensor, eps: float) -> Tensor:
    """The weighted sum of both norms, `[B, T, Hq, Dv]`; weights `[B, Hq, Dv]` (MIX-1, MIX-2)."""
    swa = swa * torch.rsqrt(swa.square().mean(-1, keepdim=True) + eps)
    rla = rla * torch.rsqrt(rla.square().mean(-1, keepdim=True) + eps)
    return swa * swa_weight[:, None] + rla * rla_weight[:, None]


def fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key: Optional,
    q_scale: Optional,
    state: Optional,
    swa_weight: Tensor,
    rla_weight: Tensor,
    cos: Optional,
    sin: Optional,
    band_q: Optional,
    band_k: Optional,
    scan_q: Optional,
    scan_k: Optional,
    alive: Optional,
    keys: int,
    window: int,
    scale: float,
    inclusive: bool,
    feature_map: str,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Both branches and their mix, `[B, T, Hq, Dv]`, and the final state; arguments as in `fused.Inputs`."""
    swa = band(q, k, v, cos, sin, band_q, band_k, window, scale)
    q = q if q_scale is None else q * q_scale[:, None, None]
    key = k[:, :, :keys] if key is None else key
    rla, final = scan(q, key, v[:, :, :keys], state, scan_q, scan_k, alive, inclusive, feature_map)
    return mix(swa, rla, swa_weight, rla_weight, eps), final
