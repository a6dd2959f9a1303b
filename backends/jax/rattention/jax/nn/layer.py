"""RAttention as a flax.nnx layer."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rattention.jax.api import rattention, rattention_extend
from rattention.jax.arguments import kind, sizes, storage_dtype
from rattention.jax.cache import Cache
from rattention.jax.nn import checks
from rattention.jax.nn.cache import GenerationCache, standing_for_batch
from rattention.jax.nn.parts import HeadNorm, Projection, merge_heads, split_heads, without_padding
from rattention.jax.table import rope_table
from rattention.jax.xla.parts import wide_dtype


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
        param_dtype: of all parameters but `memory`. Activations of another dtype are computed in the dtype that can
            hold both: bfloat16 ones in a float32 layer in float32.
        rngs: `flax.nnx.Rngs` with a `params` stream.

    Parameters, by their path in the module; `[out, in]`:
        q_proj.weight `[Hq*D, hidden]`, k_proj.weight `[Hkv*D, hidden]`, v_proj.weight `[Hkv*Dv, hidden]`,
        o_proj.weight `[hidden, Hq*Dv]` (and q_proj.bias, .. with `bias`),
        swa_weight `[Hq, Dv]`, rla_weight `[Hq, Dv]` (ones at the start),
        q_norm.weight, k_norm.weight `[D]` (ones; with `qk_norm`),
        q_scale, k_scale `[D]` (ones; with `qk_scale`),
        memory `[Hq, F, Dv]` float32 (zeros; with `memory`).

    Raises:
        ValueError: a size that is no positive int, num_heads that is no multiple of num_kv_heads, an unknown
            `precision`, a `param_dtype` that is none of float32, bfloat16, float16 (and float64 in 64-bit mode).
        TypeError: `rngs` is no `flax.nnx.Rngs`.
        SpecError: window, feature_map, eps, rope_theta or impl out of its domain, a flag that is no bool, head_dim odd
            with a rotary embedding (ERR-5). It is a ValueError too.

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
        sizes(
            hidden_size=hidden_size,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            value_dim=value_dim,
        )
        checks.flags(qk_norm=qk_norm, qk_scale=qk_scale, memory=memory, bias=bias)
        attributes = {"window": window, "feature_map": feature_map, "eps": eps}
        window, feature_map, eps, rope_theta = checks.options(
            num_heads, num_kv_heads, head_dim, attributes, rope_theta, impl, precision
        )
        param_dtype = storage_dtype("param_dtype", param_dtype)
        if not isinstance(rngs, nnx.Rngs):
            raise TypeError(f"rngs: expected flax.nnx.Rngs, got {kind(rngs)}")
        self.hidden_size = hidden_size
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
        shape = (num_heads, features, value_dim)
        self.memory = nnx.Param(jnp.zeros(shape, wide_dtype(param_dtype))) if memory else None

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
            max_position: largest value in `positions`: it sizes the rotary table. Found in them where they can be
                read, needed where they are traced. A real token beyond it is refused, or gets NaN if traced (ERR-16).

        Raises:
            TypeError, ValueError: `x` is no floating-point array `[B, T, hidden]`; positions are traced and
                `max_position` is missing.
            SpecError: as `rattention`; also an `x` of 8 bits or less (ERR-4), and weights that their owner has put on
                other devices than `x` (ERR-15).
        """
        x = checks.hidden_states(x, "B", "T", self.hidden_size)
        cos = sin = None
        if self.rope_theta is not None:
            cos, sin = self._table(checks.rows_of_table(x.shape[1], positions, segment_ids, max_position))
        q, k, v = self._project(without_padding(x, checks.integers(segment_ids, x.shape[:2]), None))
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
        return self.o_proj(merge_heads(out))

    def new_cache(self, batch: int, *, max_length: int | None = None, dtype: Any = None) -> GenerationCache:
        """An empty cache for `batch` sequences.

        Args:
            max_length: tokens, prompt included, that a row may reach: the rows of the rotary table. The cache itself
                does not grow with it. Not needed without rotary embedding. A token past it is refused, or gets NaN in
                a compiled step (ERR-16).
            dtype: storage dtype: that of the keys that `prefill` will compute. Default: what `k_proj` returns for
                hidden states of the dtype of its weight, or of `swa_weight` where it has no floating-point weight,
                as a quantised one. Give it for activations wider than the weights.

        Raises:
            ValueError: a size that is no positive int; a dtype that no call can have; `max_length` is missing in a
                layer with rotary embedding.
        """
        sizes(batch=batch)
        if self.rope_theta is not None and max_length is None:
            raise ValueError("max_length: expected the largest sequence length, for the rotary table, got None")
        if max_length is not None:
            sizes(max_length=max_length)
        cache = Cache.empty(
            batch,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            value_dim=self.value_dim,
            window=self.window,
            feature_map=self.feature_map,
            dtype=self._key_dtype() if dtype is None else dtype,
        )
        if self.rope_theta is None:
            return GenerationCache(cache)
        return GenerationCache(cache, *standing_for_batch(self._table(max_length or 0)))

    def prefill(self, x: Any, cache: GenerationCache, *, lengths: Any = None) -> tuple[jax.Array, GenerationCache]:
        """Continue the sequences in `cache` by `x [B, T, hidden]`: a prompt, or a piece of one.

        `lengths [B]` int32 says how many of the T tokens of each row are real: the rest is ignored. A row with length
        0 waits. Returns `[B, T, hidden]` and the new cache.

        Raises:
            TypeError, ValueError: `x` is no floating-point array `[B, T, hidden]`; `cache` is no GenerationCache, or
                has a rotary table where the layer has none or the other way round, or one of no batch axis or an
                empty one. (The base of its angles is not asked: a cache belongs to the layer that made it.)
            SpecError: as `rattention_extend` and a call of the layer; also a row that would pass the cache's
                `max_length`, where lengths can be read. Where they cannot, its tokens past it get NaN (ERR-16).
        """
        x = checks.hidden_states(x, "B", "T", self.hidden_size)
        checks.generation_cache(cache, self.rope_theta is not None)
        cos, sin = cache.table()
        q, k, v = self._project(without_padding(x, None, checks.integers(lengths, x.shape[:1])))
        out, after = rattention_extend(
            q,
            k,
            v,
            cache=cache.tensors,
            lengths=lengths,
            rope_cos=cos,
            rope_sin=sin,
            **self._weights(q.dtype),
            **self._options(),
        )
        return self.o_proj(merge_heads(out)), cache._replace(tensors=after)

    def step(self, x: Any, cache: GenerationCache, *, active: Any = None) -> tuple[jax.Array, GenerationCache]:
        """One token per row: `x [B, hidden]` to `[B, hidden]`, and the new cache. Rows where `active [B]` (bool) is
        false wait. Raises as `prefill`, and for an `active` of another dtype or shape."""
        x = checks.hidden_states(x, "B", self.hidden_size)
        lengths = None if active is None else checks.mask("active", active, x.shape[0]).astype(jnp.int32)
        y, cache = self.prefill(x[:, None], cache, lengths=lengths)
        return jnp.squeeze(y, axis=1), cache

    def _project(self, x: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        q = split_heads(self.q_proj(x), self.num_heads, self.head_dim)
        k = split_heads(self.k_proj(x), self.num_kv_heads, self.head_dim)
        v = split_heads(self.v_proj(x), self.num_kv_heads, self.value_dim)
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
        if self.memory is not None:
            # float32 also in a layer that was cast to 16 bits as a whole; float64 in a float64 call.
            weights["memory"] = self.memory[...].astype(wide_dtype(storage))
        return weights

    def _key_dtype(self) -> Any:
        weight = getattr(self.k_proj, "weight", None)
        dtype = getattr(weight, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            dtype = self.swa_weight.dtype
        x = jax.ShapeDtypeStruct((1, 1, self.hidden_size), dtype)
        if not isinstance(self.k_proj, nnx.Module):
            return jax.eval_shape(self.k_proj, x).dtype
        # Asked of a copy, since a projection may have a state that a call changes, as a dropout's. Shapes and dtypes
        # are enough for it: on which mesh the weights are is none of the question.
        graph, state = nnx.split(self.k_proj)
        state = jax.tree.map(lambda y: jax.ShapeDtypeStruct(y.shape, y.dtype), state)
        return jax.eval_shape(lambda state, x: nnx.merge(graph, state)(x), state, x).dtype

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
