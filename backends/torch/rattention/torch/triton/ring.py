"""Decoding by one token: the canonical cache, out of place, and a ring with a moving head, in place."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from rattention.torch.triton.decode import combine, decode
from rattention.torch.triton.launch import configuration, launch, target_kind
from rattention.torch.triton.plan import Plan, power_of_two
from torch import Tensor

PROGRAMS = 512
"""Programs wanted in flight: about four on each multiprocessor of the largest devices."""


class Ring(NamedTuple):
    """A cache for decoding in place: W + 1 slots, position p in slot p mod (W + 1), keys unrotated.

    `step` writes the new token over the one slot that no query reads any more. `canonical` gives the cache of the
    specification, `from_canonical` takes it.
    """

    k: Tensor
    """[B, W + 1, Hkv, D] storage."""
    v: Tensor
    """[B, W + 1, Hkv, Dv] storage."""
    state: Tensor
    """[B, Hkv, F, Dv] float32."""
    length: Tensor
    """[B] int32: tokens seen."""

    @classmethod
    def from_canonical(cls, k: Tensor, v: Tensor, state: Tensor, length: Tensor) -> Ring:
        """A ring of its own memory holding a canonical cache (window not None)."""
        W = k.shape[1]
        slots = torch.arange(W + 1, device=k.device)
        index = (slots - length[:, None]) % (W + 1) - 1  # slot s holds the position congruent to s; -1: the spare one
        index = index.clamp(min=0)[:, :, None, None]
        if W == 0:
            wide = [torch.zeros(x.shape[0], 1, *x.shape[2:], dtype=x.dtype, device=x.device) for x in (k, v)]
        else:
            wide = [x.gather(1, index.expand(-1, -1, *x.shape[2:])) for x in (k, v)]
        return cls(wide[0], wide[1], state.clone(), length.clone())

    def canonical(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """cache_k, cache_v, cache_state, cache_length as the specification has them, in memory of their own."""
        W = self.k.shape[1] - 1
        position = self.length[:, None] - W + torch.arange(W, device=self.k.device)
        index = (position % (W + 1))[:, :, None, None]
        k, v = (
            torch.where((position >= 0)[:, :, None, None], x.gather(1, index.expand(-1, -1, *x.shape[2:])), 0)
            for x in (self.k, self.v)
        )
        return k, v, self.state.clone(), self.length.clone()


def _splits(like: Tensor, heads: int, features: int) -> int:
    """Splits of one (row, head): a power of two, no more than the state has tiles."""
    if target_kind(like) == "interpreter":
        return 2
    splits = 1
    while splits < features and heads * splits < PROGRAMS:
        splits *= 2
    return splits


def _launch(
    q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, state: Tensor, next_state: Tensor, length: Tensor,
    active: Tensor | None, moving: bool, window: int, scale: float | None, feature_map: str, eps: float, reduced: bool,
    swa_weight: Tensor, rla_weight: Tensor, rope_cos: Tensor | None, rope_sin: Tensor | None, q_scale: Tensor | None,
    k_scale: Tensor | None, memory: Tensor | None,
) -> Tensor:  # fmt: skip
    B, _, Hq, D = q.shape
    Hkv, Dv = v.shape[2:]
    sizes = Plan(q, k, v, window, scale, feature_map, eps, "mix", reduced, rope_cos=rope_cos)
    config = configuration(q, D, Dv)
    G, W = Hq // Hkv, max(window, 0)
    R = power_of_two(G)
    # Blocks of at most 32 channels: a tile of the state is float32, and stands in registers beside its successor.
    DB = min(sizes.DB, 32)
    ND = sizes.ND * (sizes.DB // DB)
    NF = ND if feature_map == "identity" else 2 * ND
    splits = _splits(q, B * Hkv, NF)
    out = torch.empty(B, 1, Hq, Dv, dtype=q.dtype, device=q.device)
    partial = None
    if splits > 1:
        partial = torch.empty(B, Hkv, splits, R, 2 * sizes.DVP + 2, dtype=torch.float32, device=q.device)
    tile = config.decode
    optional = [None if x is None else x.contiguous() for x in (rope_cos, rope_sin, q_scale, k_scale, memory)]
    weights = [swa_weight.contiguous(), rla_weight.contiguous()]
    common = {
        "DV": Dv, "DVP": sizes.DVP, "R": R, "SPLITS": splits, "SOFT": window != -1, "HAS_ACTIVE": active is not None,
    }  # fmt: skip
    launch(
        decode, B * Hkv * splits,
        q.contiguous(), k.contiguous(), v.contiguous(), ring_k, ring_v, state, next_state, length, active, *weights,
        *optional, out, partial, W, ring_k.shape[1], Hkv, G, 0 if rope_cos is None else rope_cos.shape[0], splits,
        (1.0 / math.sqrt(D) if scale is None else scale) / math.log(2.0), eps,
        D=D, DB=DB, ND=ND, BN=tile.keys, MAP=feature_map, FOLD_FIRST=window == -1, MOVING=moving,
        HAS_MEMORY=memory is not None, HAS_ROPE=rope_cos is not None, HAS_Q_SCALE=q_scale is not None,
        HAS_K_SCALE=k_scale is not None, **sizes.precision, **common, warps=tile.warps, stages=tile.stages,
    )  # fmt: skip
    if splits > 1:
        launch(combine, B * Hkv, partial, active, *weights, out, Hkv, G, eps, **common, warps=4, stages=1)
    return out


def step(
    ring: Ring, q: Tensor, k: Tensor, v: Tensor, swa_weight: Tensor, rla_weight: Tensor, *, window: int,
    scale: float | None = None, feature_map: str = "softmax", eps: float = 1e-6, active: Tensor | None = None,
    rope_cos: Tensor | None = None, rope_sin: Tensor | None = None, q_scale: Tensor | None = None,
    k_scale: Tensor | None = None, memory: Tensor | None = None, reduced: bool = False,
) -> Tensor:  # fmt: skip
    """One token per row, in place: out [B, 1, Hq, Dv]; `ring` afterwards holds the token.

    q [B, 1, Hq, D], k [B, 1, Hkv, D], v [B, 1, Hkv, Dv]; `active` [B] int32 is 0 for rows that have no token.
    """
    out = _launch(
        q, k, v, ring.k, ring.v, ring.state, ring.state, ring.length, active, True, window, scale, feature_map, eps,
        reduced, swa_weight, rla_weight, rope_cos, rope_sin, q_scale, k_scale, memory,
    )  # fmt: skip
    ring.length.add_(1 if active is None else active)
    return out


def step_canonical(c: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One token per row from a canonical cache (a Continuation with T = 1): out and the next cache, all fresh."""
    next_state = torch.empty(c.cache_state.shape, dtype=torch.float32, device=c.q.device)
    out = _launch(
        c.q, c.k, c.v, c.cache_k.contiguous(), c.cache_v.contiguous(), c.cache_state.contiguous(), next_state,
        c.cache_length.contiguous(), None if c.lengths is None else c.lengths.contiguous(), False, c.window, c.scale,
        c.feature_map, c.eps, c.reduced, c.swa_weight, c.rla_weight, c.rope_cos, c.rope_sin, c.q_scale, c.k_scale,
        c.memory,
    )  # fmt: skip
    k, v = c.shifted()
    return out, k, v, next_state, c.cache_length + c.new()
