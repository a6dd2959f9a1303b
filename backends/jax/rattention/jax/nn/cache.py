"""The cache of a layer in generation: a `Cache` and the rotary table that its positions index."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from rattention.jax.cache import Cache


class GenerationCache(NamedTuple):
    """What one layer remembers of a batch of sequences, as a pytree: jit it, donate it, carry it through a scan.

    Attributes:
        tensors: the canonical `rattention.jax.Cache`.
        rope_cos, rope_sin: `[max_length, D/2]` float32; None without rotary embedding.
    """

    tensors: Cache
    rope_cos: jax.Array | None = None
    rope_sin: jax.Array | None = None

    @property
    def length(self) -> jax.Array:
        """`[B]` int32: tokens seen so far in each row."""
        return self.tensors.length

    def reset(self, rows: Any = None) -> GenerationCache:
        """The same cache with `rows` (indices or a `[B]` bool mask; default all) empty, to start new sequences."""
        gone = jnp.zeros(self.length.shape, bool).at[slice(None) if rows is None else jnp.asarray(rows)].set(True)
        cleared = (jnp.where(gone.reshape(-1, *(1,) * (x.ndim - 1)), 0, x).astype(x.dtype) for x in self.tensors)
        return self._replace(tensors=Cache(*cleared))
