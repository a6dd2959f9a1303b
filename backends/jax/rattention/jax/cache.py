"""The cache of a generation: a ring of the last tokens and the state of all before them."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from rattention.jax import arguments
from rattention.jax.xla.parts import wide_dtype
from rattention.spec import validate


class Cache(NamedTuple):
    """What `rattention_extend` carries from call to call. A pytree: pass it through jit, donate it, scan over it.

    With W = max(window, 0) slots (for window None one per token so far):

    Attributes:
        k: `[B, W, Hkv, D]` keys before rotary embedding, ordered by position, newest last, zeros on the left.
        v: `[B, W, Hkv, Dv]` values, likewise.
        state: `[B, Hkv, F, Dv]` float32, the state of all tokens older than the slots.
        length: `[B]` int32, tokens seen so far in each row.
    """

    k: jax.Array
    v: jax.Array
    state: jax.Array
    length: jax.Array

    @classmethod
    def empty(
        cls,
        batch: int,
        num_kv_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        *,
        window: int | None,
        feature_map: str = "softmax",
        dtype: Any = jnp.float32,
    ) -> Cache:
        """A cache that has seen no token.

        Raises:
            ValueError: a size that is no int >= 1 (a batch >= 0), or a dtype that no call can have; it is named.
            SpecError: window or feature_map out of its domain (ERR-5).
        """
        value_dim = head_dim if value_dim is None else value_dim
        arguments.sizes(0, batch=batch)
        arguments.sizes(num_kv_heads=num_kv_heads, head_dim=head_dim, value_dim=value_dim)
        dtype = arguments.storage_dtype("dtype", dtype)
        tensors: dict[str, Any] = dict.fromkeys(("q", "k", "v"), jax.ShapeDtypeStruct((1, 1, 1, 1), jnp.float32))
        attributes = {"window": window, "feature_map": feature_map}
        window = validate("residual_linear_attention", tensors, attributes).attributes["window"]
        slots = max(window or 0, 0)
        features = head_dim if feature_map == "identity" else 2 * head_dim
        return _empty(batch, slots, num_kv_heads, head_dim, value_dim, features, dtype)


@functools.partial(jax.jit, static_argnums=range(7))
def _empty(batch: int, slots: int, heads: int, dim: int, value_dim: int, features: int, dtype: Any) -> Cache:
    """Made on the device: a zero that comes from the host would be a transfer."""
    return Cache(
        jnp.zeros((batch, slots, heads, dim), dtype),
        jnp.zeros((batch, slots, heads, value_dim), dtype),
        jnp.zeros((batch, heads, features, value_dim), wide_dtype(dtype)),
        jnp.zeros((batch,), jnp.int32),
    )
