"""The cache of a layer in generation: a `Cache` and the rotary table that its positions index."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from rattention.jax.cache import Cache
from rattention.jax.dispatch import on_device, unwrapped
from rattention.jax.meshes import Split, entries, without_explicit_axes


class GenerationCache(NamedTuple):
    """What one layer remembers of a batch of sequences, as a pytree: jit it, donate it, carry it through a scan.

    Attributes:
        tensors: the canonical `rattention.jax.Cache`.
        rope_cos, rope_sin: `[1, max_length, D/2]` float32; None without rotary embedding.

    Every leaf starts with the batch, or with an axis that stands for it: one table serves all rows. So what is done to
    axis 0 of all leaves alike, as beam search does (`jax.tree.map(lambda t: t[rows], cache)`, repeats, reversals,
    concatenations), does it to rows. Of a table that has become several, `table` reads the first.
    """

    tensors: Cache
    rope_cos: jax.Array | None = None
    rope_sin: jax.Array | None = None

    @property
    def length(self) -> jax.Array:
        """`[B]` int32: tokens seen so far in each row."""
        return self.tensors.length

    def table(self) -> tuple[jax.Array | None, jax.Array | None]:
        """`rope_cos`, `rope_sin` `[max_length, D/2]`, as the operations take them; None without rotary embedding."""
        if self.rope_cos is None or self.rope_sin is None:
            return None, None
        return _first(tuple(on_device(unwrapped(x)) for x in (self.rope_cos, self.rope_sin)))

    def reset(self, rows: Any = None) -> GenerationCache:
        """The same cache with `rows` empty, to start new sequences.

        Args:
            rows: indices, negative ones counted from the end, or a `[B]` bool mask, as an int, a list or an array;
                default all. Inside a compiled function a mask.

        Raises:
            IndexError: an index that names no row, or a mask of another length.
            TypeError: neither ints nor bools, or traced indices, whose range cannot be checked.
        """
        return self._replace(tensors=_cleared(self.tensors, _mask(rows, self.length.shape[0])))


def _mask(rows: Any, batch: int) -> Any:
    """`rows` as a `[B]` bool array."""
    if rows is None:
        return jax.device_put(np.ones(batch, bool))
    if isinstance(rows, np.ma.MaskedArray):
        raise TypeError("reset: rows: expected indices or a bool mask, got a masked array")
    traced = isinstance(rows, jax.core.Tracer)
    if isinstance(rows, list | tuple):
        if any(isinstance(row, jax.core.Tracer) for row in rows):
            raise TypeError(
                "reset: rows: expected a traced bool mask, got traced indices, whose range cannot be checked"
            )
        try:
            values = [np.asarray(jax.device_get(row)) for row in rows]
            joined = np.array(values) if rows else np.array([], np.int64)
        except ValueError:  # NumPy's, of what has no shape
            raise TypeError(
                "reset: rows: expected indices or a bool mask, got lists of different lengths in a list"
            ) from None
        if len({value.dtype == np.bool_ for value in values}) > 1:  # NumPy would take a bool for the index 0 or 1
            raise TypeError("reset: rows: expected indices or a bool mask, got a list of both")
        rows = joined
    elif isinstance(rows, jax.Array) and not traced:
        rows = jax.device_get(rows)
    rows = rows if traced else np.asarray(rows)
    if rows.dtype == np.bool_:
        if rows.shape != (batch,):
            raise IndexError(f"reset: rows: expected a mask of shape [B={batch}], got {list(rows.shape)}")
        return rows if traced else jax.device_put(rows)
    if not np.issubdtype(rows.dtype, np.integer) or rows.ndim > 1:
        raise TypeError(f"reset: rows: expected indices or a bool mask, got {rows.dtype} of shape {list(rows.shape)}")
    if traced:
        raise TypeError("reset: rows: expected a traced bool mask, got traced indices, whose range cannot be checked")
    outside = rows[(rows < -batch) | (rows >= batch)]
    if outside.size:
        raise IndexError(f"reset: rows: expected indices below the batch of B={batch}, got {outside.flat[0]}")
    gone = np.zeros(batch, bool)
    gone[rows] = True
    return jax.device_put(gone)


@jax.jit
def standing_for_batch(tables: Any) -> Any:
    """`[1, ...]` of each array: the same for every row of the batch."""
    return jax.tree.map(lambda x: x[None], tables)


@jax.jit
def _first(tables: Any) -> Any:
    """Element 0 of each array, also of one whose axis 0 is split over explicit mesh axes."""

    def first(x: jax.Array) -> jax.Array:
        split = Split(entries(x)[1:], x.shape[1:])
        return without_explicit_axes(lambda x: jax.lax.index_in_dim(x, 0, keepdims=False), (x,), split)

    return jax.tree.map(first, tables)


@jax.jit
def _cleared(tensors: Cache, gone: jax.Array) -> Cache:
    """Zeros in the rows of `gone`."""

    def clear(tensors: Cache, gone: jax.Array) -> Cache:
        return Cache(*(jnp.where(gone.reshape(-1, *(1,) * (x.ndim - 1)), jnp.zeros_like(x), x) for x in tensors))

    split = jax.tree.map(lambda x: Split(entries(x), x.shape), tensors)
    return without_explicit_axes(clear, (tensors, gone), split)
