"""RAttention as a layer."""

from __future__ import annotations

from typing import Any

import torch
from rattention.spec import SpecError
from rattention.torch.arguments import is_empty_shell, plain
from rattention.torch.cache import Cache, storage_dtype
from rattention.torch.functions import rattention, rattention_extend, rope_table
from rattention.torch.nn import checks
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
        self.hidden_size = hidden_size = checks.size("hidden_size", hidden_size)
        self.num_heads = num_heads = checks.size("num_heads", num_heads)
        self.num_kv_heads = num_kv_heads = checks.size("num_kv_heads", num_kv_heads)
        self.head_dim = head_dim = checks.size("head_dim", head_dim)
        self.value_dim = value_dim = head_dim if value_dim is None else checks.size("value_dim", value_dim)
        checks.flags(qk_norm=qk_norm, qk_scale=qk_scale, memory=memory, bias=bias)
        self.window, self.feature_map, self.eps, self.rope_theta = checks.attributes(
            num_heads, num_kv_heads, head_dim, window, feature_map, eps, rope_theta, impl
        )
        self.impl = impl
        if dtype is not None:
            storage_dtype(checks.LAYER, dtype)
        where = {"device": device, "dtype": dtype}
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=bias, **where)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias, **where)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * value_dim, bias=bias, **where)
        self.o_proj = nn.Linear(num_heads * value_dim, hidden_size, bias=bias, **where)
        self.q_norm = nn.RMSNorm(head_dim, eps=self.eps, **where) if qk_norm else None
        self.k_norm = nn.RMSNorm(head_dim, eps=self.eps, **where) if qk_norm else None
        self.swa_weight = nn.Parameter(torch.empty(num_heads, value_dim, **where))
        self.rla_weight = nn.Parameter(torch.empty(num_heads, value_dim, **where))
        self.q_scale = nn.Parameter(torch.empty(head_dim, **where)) if qk_scale else None
        self.k_scale = nn.Parameter(torch.empty(head_dim, **where)) if qk_scale else None
        shape = (num_heads, head_dim if feature_map == "identity" else 2 * head_dim, value_dim)
        wide = torch.promote_types(self.swa_weight.dtype, torch.float32)
        self.memory = nn.Parameter(torch.empty(shape, device=device, dtype=wide)) if memory else None
        self._table: tuple[Tensor, Tensor, float] | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the parameters that the layer itself owns: gains and scales to 1, the memory to 0.

        The projections and norms have a `reset_parameters` of their own, as PyTorch's layers do.
        """
        for gain in (self.swa_weight, self.rla_weight, self.q_scale, self.k_scale):
            if gain is not None:
                nn.init.ones_(gain)
        if self.memory is not None:
            nn.init.zeros_(self.memory)

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
            max_position: the largest of `positions`. Needed where these cannot be read at no cost, on a device and
                while they are traced; a live token beyond the table then gets NaN (ERR-16).

        Raises:
            SpecError: a call that breaks the specification, or parameters on another device than `x` (ERR-15).
            ValueError: no `max_position` where it is needed.
        """
        checks.hidden_states(x, ("B", "T", "hidden"), self.hidden_size)
        checks.tensor("positions", positions)
        checks.tensor("segment_ids", segment_ids)
        checks.parameters_beside(self, x)
        q, k, v = self._project(x)
        rotary = {}
        if self.rope_theta is not None:
            needed = checks.table_rows(x, positions, segment_ids, max_position)
            rotary = self._rotary(needed, x.device, keep=not is_empty_shell(x))
        out = rattention(
            q,
            k,
            v,
            **self._weights(q.dtype),
            **rotary,
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
        """An empty cache for `batch` sequences.

        Args:
            dtype: storage dtype, which the cache then keeps. By default it is that of autocast or else of the gains,
                and the first call changes it to that of q, k and v: they may come from quantised projections.
            device: that of the gains unless given.

        Raises:
            SpecError: `batch` is no int >= 0 (ERR-5), or `dtype` no storage dtype (ERR-4).
        """
        gain = self.swa_weight
        where = gain.device if device is None else torch.device(device)
        cache = Cache.empty(
            batch,
            window=self.window,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            value_dim=self.value_dim,
            feature_map=self.feature_map,
            dtype=_computes_in(gain.dtype, where) if dtype is None else dtype,
            device=where,
        )
        return GenerationCache(cache, limit=0, adopts_dtype=dtype is None)

    def prefill(self, x: Tensor, cache: GenerationCache, *, lengths: Tensor | None = None) -> Tensor:
        """Continue the sequences in `cache` by `x [B, T, hidden]` and update it: a prompt, or a piece of one.

        `lengths [B]` int32 says how many of the T tokens of each row are real: the rest is ignored, wherever the row
        stands. A row with length 0 waits.

        Raises:
            SpecError: a call that breaks the specification, parameters or a cache on another device than `x` (ERR-15),
                or a cache that holds another storage dtype than this call computes in (ERR-4).
            Unsupported: a call inside of a backward pass, as activation checkpointing makes it; a cache from outside of
                `vmap`; a cache from inference mode where gradients are needed. The cache stays as it was.
        """
        checks.hidden_states(x, ("B", "T", "hidden"), self.hidden_size)
        checks.tensor("lengths", lengths)
        if not isinstance(cache, GenerationCache):
            got = type(cache).__qualname__
            raise SpecError(checks.LAYER, "cache", "a GenerationCache, as new_cache makes it", got, "ERR-14")
        checks.parameters_beside(self, x)
        cache.refuse_recomputation()
        q, k, v = self._project(x)
        weights = self._weights(q.dtype)
        cache.refuse_gradients(q, k, v, *weights.values())
        past = cache.adopt(q)
        rotary = {}
        if self.rope_theta is not None:
            has = 0 if self._table is None else self._table[0].shape[0]
            # Twice the rows needed, so that generation does not ask again at every token.
            needed = cache.rows_for(x.shape[1], has)
            rotary = self._rotary(needed, x.device, spare=needed, keep=not is_empty_shell(x))
        out, after = rattention_extend(
            q,
            k,
            v,
            cache=past,
            lengths=lengths,
            **weights,
            **rotary,
            window=self.window,
            feature_map=self.feature_map,
            eps=self.eps,
            impl=self.impl,
        )
        y = self.o_proj(out.flatten(2))  # before the update: if it fails, the cache has not moved
        cache.update(after, x.shape[1], ragged=lengths is not None, grows=self.window is None)
        return y

    def step(self, x: Tensor, cache: GenerationCache, *, active: Tensor | None = None) -> Tensor:
        """One token per row: `x [B, hidden]` -> `[B, hidden]`. Rows where `active [B]` is false or 0 wait."""
        checks.hidden_states(x, ("B", "hidden"), self.hidden_size)
        checks.mask("active", active, x)
        lengths = None if active is None else (active != 0).to(torch.int32)
        return self.prefill(x[:, None], cache, lengths=lengths)[:, 0]

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v in one storage dtype, that of v: o_proj goes on from it."""
        q = self.q_proj(x).unflatten(-1, (self.num_heads, self.head_dim))
        k = self.k_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim))
        v = self.v_proj(x).unflatten(-1, (self.num_kv_heads, self.value_dim))
        q, k = _normed(self.q_norm, q), _normed(self.k_norm, k)
        # Under autocast the projections are 16-bit and the norms are not; quantised layers and adapters differ too.
        return q.to(v.dtype), k.to(v.dtype), v

    def _weights(self, storage: torch.dtype) -> dict[str, Any]:
        """The layer's own parameters, in dtypes that go with q, k, v of `storage`."""
        weights: dict[str, Any] = {}
        for name in ("swa_weight", "rla_weight", "q_scale", "k_scale"):
            weights[name] = weight = getattr(self, name)
            if weight is not None and weight.dtype not in (torch.float32, storage):
                weights[name] = weight.to(torch.float32)  # say float16 beside bfloat16 of autocast
        wide = torch.float64 if storage == torch.float64 else torch.float32
        return weights | {"memory": None if self.memory is None else self.memory.to(wide)}

    def _rotary(self, rows: int, device: torch.device, *, spare: int = 0, keep: bool = True) -> dict[str, Any]:
        """Tables with at least `rows` rows, and with `spare` more if they are new. No buffers: `.to(dtype)` must not
        round them. With `keep` the last table serves again, and a new one is kept for the next call."""
        theta = self.rope_theta
        assert theta is not None
        table = self._table if keep else None
        if table is None or table[0].shape[0] < rows or table[0].device != device or table[2] != theta:
            count = rows if torch.compiler.is_compiling() else max(256, rows + spare)
            with torch.inference_mode(False):  # or a later training step could not save the table for backward
                positions = torch.arange(count, dtype=torch.int32, device=device)
                table = (*rope_table(positions, head_dim=self.head_dim, theta=theta), theta)
            if keep and plain(table[0]):
                self._table = table
        return {"rope_cos": table[0], "rope_sin": table[1]}


def _normed(norm: nn.Module | None, x: Tensor) -> Tensor:
    """`x` through a norm, in the dtype of its weight where it has a floating one."""
    if norm is None:
        return x
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, Tensor):
        weight = next(norm.parameters(), None)
    return norm(x.to(weight.dtype) if weight is not None and weight.is_floating_point() else x)


def _computes_in(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of products of tensors of `dtype`: autocast's where it is on, except for float64."""
    kind = device.type
    on = dtype != torch.float64 and torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else dtype
