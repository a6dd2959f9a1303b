"""The branches on tensors in the compute dtype, alone or in one pass: from the public layout to the kernels."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from rattention.torch.eager.band import band_attention
from rattention.torch.eager.fused import Inputs, fused
from rattention.torch.eager.groups import Groups
from rattention.torch.eager.layout import by_heads
from rattention.torch.eager.maps import rotate
from rattention.torch.eager.mix import mix
from rattention.torch.eager.scan import linear_scan
from torch import Tensor

Pair = tuple[Tensor, Tensor] | None


class Softmax(NamedTuple):
    """What the softmax branch needs besides q, k, v. There may be keys before the first query."""

    q_table: Pair
    """cos and sin for each query, `[B, T, D/2]`."""

    k_table: Pair
    """cos and sin for each key."""

    groups: Pair
    """Documents of queries and keys."""

    window: int | None
    scale: float | None

    def numbers(self, q: Tensor, k: Tensor) -> tuple[int, float]:
        """Window and scale; a window longer than the keys is as good as that."""
        keys = k.shape[1]
        scale = 1 / math.sqrt(q.shape[3]) if self.scale is None else self.scale
        return keys if self.window is None else min(self.window, keys), scale


class Linear(NamedTuple):
    """What the linear branch needs besides q, k, v."""

    q_scale: Tensor | None
    k_scale: Tensor | None
    memory: Tensor | None
    state: Tensor | None
    keys: int
    """How many keys, from the first, are read at all; they lag behind the queries by T - keys."""

    groups: Groups | None
    inclusive: bool
    feature_map: str


def softmax_branch(q: Tensor, k: Tensor, v: Tensor, softmax: Softmax, reduced: bool) -> Tensor:
    """`[B, T, Hq, Dv]`."""
    tables, groups = softmax.q_table or (None, None), softmax.groups or (None, None)
    keys, values = by_heads(rotate(k, softmax.k_table)), by_heads(v)
    return band_attention(q, keys, values, *tables, *groups, *softmax.numbers(q, k), reduced)


def linear_branch(q: Tensor, k: Tensor, v: Tensor, linear: Linear, reduced: bool) -> tuple[Tensor, Tensor]:
    """`[B, T, Hq, Dv]` and the state after the last key, `[B, Hkv, F, Dv]`."""
    J, feature_map = linear.keys, linear.feature_map
    state = None if linear.state is None else linear.state.to(v.dtype)
    q, keys, values = _scaled(q, linear.q_scale), by_heads(_scaled(k[:, :J], linear.k_scale)), by_heads(v[:, :J])
    out, final = linear_scan(q, keys, values, state, linear.groups, linear.inclusive, feature_map, reduced)
    if linear.memory is not None:
        out = out + _recall(q, linear.memory.to(v.dtype), feature_map, reduced)
    return out, final


def both_branches(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    swa_weight: Tensor,
    rla_weight: Tensor,
    softmax: Softmax,
    linear: Linear,
    eps: float,
    reduced: bool,
) -> tuple[Tensor, Tensor]:
    """The mix of the branches, `[B, T, Hq, Dv]`, and the state: in one pass, or one by one where there is a memory.

    A memory is a state per query head; it breaks the tiles of the one pass, in which a group shares its state.
    """
    swa_weight, rla_weight = swa_weight.to(q.dtype), rla_weight.to(q.dtype)
    if linear.memory is not None:
        swa = softmax_branch(q, k, v, softmax, reduced)
        rla, final = linear_branch(q, k, v, linear, reduced)
        return mix(swa, rla, swa_weight, rla_weight, eps), final
    B, J = q.shape[0], linear.keys
    rotated = by_heads(rotate(k, softmax.k_table))
    shared = softmax.k_table is None and linear.k_scale is None
    key = None if shared else by_heads(_scaled(k[:, :J], linear.k_scale))
    inputs = Inputs(
        q,
        rotated,
        by_heads(v),
        key,
        None if linear.q_scale is None else linear.q_scale.to(q.dtype).expand(B, q.shape[3]),
        None if linear.state is None else linear.state.to(q.dtype),
        swa_weight.expand(B, *swa_weight.shape),
        rla_weight.expand(B, *rla_weight.shape),
        *(softmax.q_table or (None, None)),
        *(softmax.groups or (None, None)),
        *(linear.groups or (None, None, None)),
    )
    return fused(inputs, J, *softmax.numbers(q, k), linear.inclusive, linear.feature_map, eps, reduced)


def _scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    return x if scale is None else x * scale.to(x.dtype)


def _recall(q: Tensor, memory: Tensor, feature_map: str, reduced: bool) -> Tensor:
    """phi(q) M_h: a scan over no keys, with one batch row per query head and the whole batch as its queries."""
    B, T, Hq, D = q.shape
    x = q.permute(2, 0, 1, 3).reshape(Hq, B * T, 1, D)
    none = x.new_empty(Hq, 1, 0, D), x.new_empty(Hq, 1, 0, memory.shape[2])
    out, _ = linear_scan(x, *none, memory[:, None], None, False, feature_map, reduced)
    return torch.permute(out.view(Hq, B, T, memory.shape[2]), (1, 2, 0, 3))
