"""RAttention as a layer."""

from __future__ import annotations

from typing import Any

import torch
from rattention.torch.arguments import plain
from rattention.torch.cache import Cache
from rattention.torch.functions import rattention, rattention_extend, rope_table
from rattention.torch.nn.cache import GenerationCache
from torch import Tensor, nn


class RAttention(nn.Module):
    """Sliding-window softmax attention plus residual linear attention, from hidden states to hidden states.

        y = o_proj(rattention(qk_norm(q_proj(x)), qk_norm(k_proj(x)), v_proj(x), ...))

    Args:
        hidden_size: width of input and output.
        num_heads, num_kv_heads: Hq and Hkv, Hq a multiple of Hkv.
        head_dim, value_dim: D and Dv, Dv = D unless given.
        window: tokens that softmax sees besides the own one; a Hugging Face `sliding_window` less 1. -1 and None as in
            `rattention`.
        feature_map: "softmax", "relu" or "identity".
        eps: of the RMS norms of both branches, and of qk-norm.
        qk_norm: normalise q and k per head, before both branches.
        qk_scale: learn factors on q and k before the feature map.
        memory: learn a constant state per query head.
        rope_theta: base of the rotary embedding of the softmax branch; None for none.
        bias: biases in the four projections.
        impl: "eager", "triton" or None, as in `rattention`.

    Parameters, under these names in the state dict; `[out, in]` as in `nn.Linear`:
        q_proj.weight `[Hq*D, hidden]`, k_proj.weight `[Hkv*D, hidden]`, v_proj.weight `[Hkv*Dv, hidden]`,
        o_proj.weight `[hidden, Hq*Dv]` (and q_proj.bias, .. with `bias`),
        swa_weight `[Hq, Dv]`, rla_weight `[Hq, Dv]` (ones at the start),
        q_norm.weight, k_norm.weight `[D]` (ones; with `qk_norm`),
        q_scale, k_scale `[D]` (ones; with `qk_scale`),
        memory `[Hq, F, Dv]` float32 (zeros; with `memory`).

    Source: RAttention, arXiv 2506.15545.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        *,
        window: int | None,
        feature_map: str = "softmax",
        eps: float = 1e-6,
        qk_norm: bool = False,
        qk_scale: bool = False,
        memory: bool = False,
        rope_theta: float | None = 10000.0,
        bias: bool = False,
        impl: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        value_dim = head_dim if value_dim is None else value_dim
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_dim, self.value_dim = head_dim, value_dim
        self.window, self.feature_map, self.eps = window, feature_map, eps
        self.rope_theta, self.impl = rope_theta, impl
        where = {"device": device, "dtype": dtype}
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=bias, **where)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias, **where)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * value_dim, bias=bias, **where)
        self.o_proj = nn.Linear(num_heads * value_dim, hidden_size, bias=bias, **where)
        self.q_norm = nn.RMSNorm(head_dim, eps=eps, **where) if qk_norm else None
        self.k_norm = nn.RMSNorm(head_dim, eps=eps, **where) if qk_norm else None
        self.swa_weight = nn.Parameter(torch.ones(num_heads, value_dim, **where))
        self.rla_weight = nn.Parameter(torch.ones(num_heads, value_dim, **where))
        self.q_scale = nn.Parameter(torch.ones(head_dim, **where)) if qk_scale else None
        self.k_scale = nn.Parameter(torch.ones(head_dim, **where)) if qk_scale else None
        features = head_dim if feature_map == "identity" else 2 * head_dim
        shape = (num_heads, features, value_dim)
        self.memory = nn.Parameter(torch.zeros(shape, device=device, dtype=torch.float32)) if memory else None
        self._table: tuple[Tensor, Tensor] | None = None

    def forward(
        self,
        x: Tensor,
        *,
        segment_ids: Tensor | None = None,
        positions: Tensor | None = None,
        max_position: int | None = None,
    ) -> Tensor:
        """`x [B, T, hidden]` -> `[B, T, hidden]`.

        Args:
            segment_ids: `[B, T]` int32, packed documents; 0 is padding, whose output is o_proj of zeros.
            positions: `[B, T]` int32 for the rotary embedding; default: index within the segment.
            max_position: largest value in `positions`, default T - 1.
        """
        q, k, v = self._project(x)
        rows = x.shape[1] if max_position is None else max_position + 1
        out = rattention(
            q,
            k,
            v,
            **self._weights(),
            **self._rotary(rows, x.device),
            positions=positions,
            segment_ids=segment_ids,
            window=self.window,
            feature_map=self.feature_map,
            eps=self.eps,
            impl=self.impl,
        )
        assert isinstance(out, Tensor)
        return self.o_proj(out.flatten(2))

    def new_cache(
        self, batch: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> GenerationCache:
        """An empty cache for `batch` sequences; dtype and device are those of the projections unless given."""
        weight = self.k_proj.weight
        cache = Cache.empty(
            batch,
            window=self.window,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            value_dim=self.value_dim,
            feature_map=self.feature_map,
            dtype=weight.dtype if dtype is None else dtype,
            device=weight.device if device is None else device,
        )
        return GenerationCache(cache)

    def prefill(self, x: Tensor, cache: GenerationCache, *, lengths: Tensor | None = None) -> Tensor:
        """Continue the sequences in `cache` by `x [B, T, hidden]` and update it: a prompt, or a piece of one.

        `lengths [B]` int32 says how many of the T tokens of each row are real: the rest is ignored, wherever the row
        stands. A row with length 0 waits.
        """
        q, k, v = self._project(x)
        out, after = rattention_extend(
            q,
            k,
            v,
            cache=cache.tensors,
            lengths=lengths,
            **self._weights(),
            **self._rotary(cache.limit + x.shape[1], x.device),
            window=self.window,
            feature_map=self.feature_map,
            eps=self.eps,
            impl=self.impl,
        )
        cache.update(after, x.shape[1])
        return self.o_proj(out.flatten(2))

    def step(self, x: Tensor, cache: GenerationCache, *, active: Tensor | None = None) -> Tensor:
        """One token per row: `x [B, hidden]` -> `[B, hidden]`. Rows where `active [B]` is false or 0 wait."""
        lengths = None if active is None else active.to(torch.int32)
        return self.prefill(x[:, None], cache, lengths=lengths)[:, 0]

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = self.q_proj(x).unflatten(-1, (self.num_heads, self.head_dim))
        k = self.k_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim))
        v = self.v_proj(x).unflatten(-1, (self.num_kv_heads, self.value_dim))
        if self.q_norm is not None and self.k_norm is not None:
            # Under autocast the projections are 16-bit and the norms are not: q, k and v share one storage dtype again.
            q = self.q_norm(q.to(self.q_norm.weight.dtype)).to(v.dtype)
            k = self.k_norm(k.to(self.k_norm.weight.dtype)).to(v.dtype)
        return q, k, v

    def _weights(self) -> dict[str, Any]:
        memory = None if self.memory is None else self.memory.float()
        weights = {"swa_weight": self.swa_weight, "rla_weight": self.rla_weight}
        return weights | {"q_scale": self.q_scale, "k_scale": self.k_scale, "memory": memory}

    def _rotary(self, rows: int, device: torch.device) -> dict[str, Any]:
        """Tables with at least `rows` rows, kept for the next call. No buffers: `.to(dtype)` must not round them."""
        if self.rope_theta is None:
            return {}
        table = self._table
        if table is None or table[0].shape[0] < rows or table[0].device != device:
            # Twice the rows needed, so that generation does not ask again at every token.
            count = rows if torch.compiler.is_compiling() else max(256, 2 * rows)
            with torch.inference_mode(False):  # or a later training step could not save the table for backward
                positions = torch.arange(count, dtype=torch.int32, device=device)
                table = rope_table(positions, head_dim=self.head_dim, theta=self.rope_theta)
            if plain(table[0]):
                self._table = table
        return {"rope_cos": table[0], "rope_sin": table[1]}
