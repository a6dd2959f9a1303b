"""RAttention as a flax.nnx layer."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rattention.jax.api import rattention, rattention_extend
from rattention.jax.cache import Cache
from rattention.jax.nn.cache import GenerationCache
from rattention.jax.table import rope_table


class Projection(nnx.Module):
    """y = x weight^T + bias, `weight [out, in]` as in `torch.nn.Linear`, so that weights move between frameworks as
    they are. Starts uniform in +-1/sqrt(in), the bias at 0."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool, dtype: Any, rngs: nnx.Rngs):
        bound = 1 / np.sqrt(inputs)
        self.weight = nnx.Param(jax.random.uniform(rngs.params(), (outputs, inputs), dtype, -bound, bound))
        self.bias = nnx.Param(jnp.zeros((outputs,), dtype)) if bias else None

    def __call__(self, x: Any) -> jax.Array:
        y = jnp.einsum("...i,oi->...o", x, self.weight[...])
        return y if self.bias is None else y + self.bias[...]


class HeadNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in float32 inside."""

    def __init__(self, channels: int, *, eps: float, dtype: Any):
        self.weight = nnx.Param(jnp.ones((channels,), dtype))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (normed * self.weight[...]).astype(x.dtype)


class RAttention(nnx.Module):
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
        impl, precision: as in `rattention`; the projections follow `jax.default_matmul_precision`.
        param_dtype: of all parameters but `memory`.
        rngs: `flax.nnx.Rngs` with a `params` stream.

    Parameters, by their path in the module; `[out, in]`:
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
        precision: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        value_dim = head_dim if value_dim is None else value_dim
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_dim, self.value_dim = head_dim, value_dim
        self.window, self.feature_map, self.eps = window, feature_map, eps
        self.rope_theta, self.impl, self.precision = rope_theta, impl, precision
        made: dict[str, Any] = {"bias": bias, "dtype": param_dtype, "rngs": rngs}
        self.q_proj = Projection(hidden_size, num_heads * head_dim, **made)
        self.k_proj = Projection(hidden_size, num_kv_heads * head_dim, **made)
        self.v_proj = Projection(hidden_size, num_kv_heads * value_dim, **made)
        self.o_proj = Projection(num_heads * value_dim, hidden_size, **made)
        self.q_norm = HeadNorm(head_dim, eps=eps, dtype=param_dtype) if qk_norm else None
        self.k_norm = HeadNorm(head_dim, eps=eps, dtype=param_dtype) if qk_norm else None
        self.swa_weight = nnx.Param(jnp.ones((num_heads, value_dim), param_dtype))
        self.rla_weight = nnx.Param(jnp.ones((num_heads, value_dim), param_dtype))
        self.q_scale = nnx.Param(jnp.ones((head_dim,), param_dtype)) if qk_scale else None
        self.k_scale = nnx.Param(jnp.ones((head_dim,), param_dtype)) if qk_scale else None
        features = head_dim if feature_map == "identity" else 2 * head_dim
        wide = jnp.promote_types(param_dtype, jnp.float32)
        self.memory = nnx.Param(jnp.zeros((num_heads, features, value_dim), wide)) if memory else None

    def __call__(
        self,
        x: Any,
        *,
        segment_ids: Any = None,
        positions: Any = None,
        max_position: int | None = None,
    ) -> jax.Array:
        """`x [B, T, hidden]` to `[B, T, hidden]`.

        Args:
            segment_ids: `[B, T]` int32, packed documents; 0 is padding, whose output is o_proj of zeros.
            positions: `[B, T]` int32 for the rotary embedding; default: index within the segment.
            max_position: largest value in `positions`, default T - 1.
        """
        q, k, v = self._project(x)
        cos, sin = self._table(x.shape[1] if max_position is None else max_position + 1)
        out = rattention(
            q,
            k,
            v,
            rope_cos=cos,
            rope_sin=sin,
            positions=positions,
            segment_ids=segment_ids,
            **self._weights(q.dtype),
            **self._options(),
        )
        return self.o_proj(_merge_heads(out))

    def new_cache(self, batch: int, *, max_length: int | None = None, dtype: Any = None) -> GenerationCache:
        """An empty cache for `batch` sequences.

        Args:
            max_length: tokens, prompt included, that a row may reach: the rows of the rotary table. The cache itself
                does not grow with it. Not needed without rotary embedding.
            dtype: storage dtype, that of the projections unless given.

        Raises:
            ValueError: `max_length` is missing in a layer with rotary embedding.
        """
        if self.rope_theta is not None and max_length is None:
            raise ValueError("max_length: expected the largest sequence length, for the rotary table, got None")
        cache = Cache.empty(
            batch,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            value_dim=self.value_dim,
            window=self.window,
            feature_map=self.feature_map,
            dtype=self.k_proj.weight.dtype if dtype is None else dtype,
        )
        return GenerationCache(cache, *self._table(max_length or 0))

    def prefill(self, x: Any, cache: GenerationCache, *, lengths: Any = None) -> tuple[jax.Array, GenerationCache]:
        """Continue the sequences in `cache` by `x [B, T, hidden]`: a prompt, or a piece of one.

        `lengths [B]` int32 says how many of the T tokens of each row are real: the rest is ignored. A row with length
        0 waits. Returns `[B, T, hidden]` and the new cache.
        """
        q, k, v = self._project(x)
        out, after = rattention_extend(
            q,
            k,
            v,
            cache=cache.tensors,
            lengths=lengths,
            rope_cos=cache.rope_cos,
            rope_sin=cache.rope_sin,
            **self._weights(q.dtype),
            **self._options(),
        )
        return self.o_proj(_merge_heads(out)), cache._replace(tensors=after)

    def step(self, x: Any, cache: GenerationCache, *, active: Any = None) -> tuple[jax.Array, GenerationCache]:
        """One token per row: `x [B, hidden]` to `[B, hidden]`, and the new cache. Rows where `active [B]` is false
        wait."""
        lengths = None if active is None else jnp.asarray(active).astype(jnp.int32)
        y, cache = self.prefill(x[:, None], cache, lengths=lengths)
        return y[:, 0], cache

    def _project(self, x: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        q = self.q_proj(x).reshape(*x.shape[:2], self.num_heads, self.head_dim)
        k = self.k_proj(x).reshape(*x.shape[:2], self.num_kv_heads, self.head_dim)
        v = self.v_proj(x).reshape(*x.shape[:2], self.num_kv_heads, self.value_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def _weights(self, storage: Any) -> dict[str, Any]:
        weights = {}
        for name in ("swa_weight", "rla_weight", "q_scale", "k_scale"):
            param = getattr(self, name)
            if param is not None:
                value = param[...]
                # The operations take weights in float32 or in the storage dtype of the call.
                weights[name] = value if value.dtype in (jnp.float32, storage) else value.astype(storage)
        return weights | {"memory": None if self.memory is None else self.memory[...]}

    def _options(self) -> dict[str, Any]:
        return {
            "window": self.window,
            "feature_map": self.feature_map,
            "eps": self.eps,
            "impl": self.impl,
            "precision": self.precision,
        }

    def _table(self, rows: int) -> tuple[jax.Array | None, jax.Array | None]:
        if self.rope_theta is None:
            return None, None
        return rope_table(np.arange(rows, dtype=np.int32), head_dim=self.head_dim, theta=self.rope_theta)


def _merge_heads(x: jax.Array) -> jax.Array:
    return x.reshape(*x.shape[:2], x.shape[2] * x.shape[3])
