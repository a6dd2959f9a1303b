"""`rattention_extend`: a cache and new tokens as one row of tokens, and what leaves the ring.

Cache and new tokens stand side by side as W + T slots; slot j of row b has position cache_length - W + j, and the slots
that hold a token form one segment of each row. So continuation is the attention of T queries over W + T keys with the
segment's bounds, the cached state as its initial state, and final_state as the next cached state: the same kernels as
the forward pass. A single token takes the decode kernel instead, which touches the ring and the state once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from rattention.torch.triton.backward import backward
from rattention.torch.triton.forward import forward
from rattention.torch.triton.plan import Plan
from rattention.torch.triton.ring import step_canonical
from torch import Tensor


class Continuation(NamedTuple):
    """Tensors and attributes of one `rattention_extend`, in the order of the operator."""

    q: Tensor
    k: Tensor
    v: Tensor
    swa_weight: Tensor
    rla_weight: Tensor
    cache_k: Tensor
    cache_v: Tensor
    cache_state: Tensor
    cache_length: Tensor
    lengths: Tensor | None
    rope_cos: Tensor | None
    rope_sin: Tensor | None
    q_scale: Tensor | None
    k_scale: Tensor | None
    memory: Tensor | None
    window: int | None
    scale: float | None
    feature_map: str
    eps: float
    reduced: bool

    @property
    def T(self) -> int:
        return self.q.shape[1]

    @property
    def W(self) -> int:
        return self.cache_k.shape[1]

    @property
    def kept(self) -> int:
        """Slots of the next cache."""
        return self.W if self.window is not None else self.W + self.T

    def new(self) -> Tensor:
        """Real new tokens of each row [B]."""
        return torch.full_like(self.cache_length, self.T) if self.lengths is None else self.lengths

    def live(self) -> Tensor:
        """[B, W + T]: slots that hold a token."""
        slots = torch.arange(self.W + self.T, device=self.q.device)
        filled = self.cache_length.clamp(max=self.W)
        return (slots >= self.W - filled[:, None]) & (slots < self.W + self.new()[:, None])

    def source(self) -> Tensor:
        """[B, kept]: which of the W + T slots each slot of the next cache holds; negative for none."""
        index = torch.arange(self.kept, device=self.q.device) + (self.W - self.kept)
        return index + self.new()[:, None]

    def shifted(self) -> tuple[Tensor, Tensor]:
        """cache_k and cache_v after the new tokens."""
        live, source = self.live(), self.source()
        k, v = (torch.cat(pair, 1) for pair in ((self.cache_k, self.k), (self.cache_v, self.v)))
        return _gather(k, live, source), _gather(v, live, source)


def _plan(c: Continuation, live: Tensor) -> Plan:
    k, v = (torch.cat((old, new), 1) for old, new in ((c.cache_k, c.k), (c.cache_v, c.v)))
    positions = None
    if c.rope_cos is not None:
        slots = torch.arange(c.W + c.T, dtype=torch.int32, device=c.q.device) - c.W
        positions = torch.where(live, c.cache_length[:, None] + slots, 0).to(torch.int32)
    return Plan(
        c.q, k, v, c.window, c.scale, c.feature_map, c.eps, "mix", c.reduced, c.swa_weight, c.rla_weight, c.rope_cos,
        c.rope_sin, positions, live.to(torch.int32), c.q_scale, c.k_scale, c.memory, c.cache_state,
    )  # fmt: skip


def _gather(x: Tensor, live: Tensor, source: Tensor) -> Tensor:
    """Slots `source` of x [B, W + T, H, C]; zero where there is none or it holds no token (EXT-4, EXT-9)."""
    index = source.clamp(min=0)
    full = index[:, :, None, None].expand(*index.shape, *x.shape[2:])
    valid = (source >= 0) & live.gather(1, index)
    return torch.where(valid[:, :, None, None], x.gather(1, full), 0)


def _scatter(d: Tensor, x: Tensor, source: Tensor) -> Tensor:
    """The transpose of `_gather`: x [B, W + T, H, C] float32 plus d at `source`. Each slot has at most one taker."""
    width = x.shape[1]
    slots = torch.arange(width, device=x.device)
    taker = slots - source[:, :1]  # `source` is consecutive
    valid = (taker >= 0) & (taker < source.shape[1])
    index = taker.clamp(0, max(source.shape[1] - 1, 0))[:, :, None, None].expand(-1, -1, *x.shape[2:])
    return x + torch.where(valid[:, :, None, None], d.gather(1, index).to(x.dtype), 0)


def extend_forward(c: Continuation) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out, cache_k, cache_v, cache_state, cache_length."""
    if c.T == 1 and c.window is not None and c.q.shape[0] > 0:
        return step_canonical(c)
    live = c.live()
    plan = _plan(c, live)
    out, state, _ = forward(plan)
    source = c.source()
    k, v = (_gather(x, live, source) for x in (plan.k, plan.v))
    return out, k, v, state, c.cache_length + c.new()


def extend_backward(
    c: Continuation, d_out: Tensor, d_cache_k: Tensor | None, d_cache_v: Tensor | None, d_state: Tensor | None
) -> Any:
    """Gradients of q, k, v, swa_weight, rla_weight, cache_k, cache_v, cache_state, q_scale, k_scale, memory."""
    live = c.live()
    plan = _plan(c, live)
    _, _, stats = forward(plan)
    g = backward(plan, stats, d_out, d_state, torch.float32)
    source = c.source()
    split = []
    for d, total in ((d_cache_k, g["k"]), (d_cache_v, g["v"])):
        if d is not None and source.shape[1] > 0:
            total = _scatter(d, total, source)
        total = torch.where(live[:, :, None, None], total, 0).to(c.q.dtype)
        split.append((total[:, : c.W].clone(), total[:, c.W :].clone()))
    (dck, dk), (dcv, dv) = split
    absent = [
        g[name] if name in g else c.q.new_empty(0, dtype=torch.float32) for name in ("q_scale", "k_scale", "memory")
    ]
    return (g["q"], dk, dv, g["swa_weight"], g["rla_weight"], dck, dcv, g["initial_state"], *absent)
