"""What a layer refuses, by name: sizes and options when it is made, activations when it is called."""

from __future__ import annotations

from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from rattention.jax.arguments import kind
from rattention.jax.cache import Cache
from rattention.jax.dispatch import ARRAYS, choose, on_device, plain, unwrapped
from rattention.jax.nn.cache import GenerationCache
from rattention.jax.xla.plan import named_precision
from rattention.spec import SpecError, validate


def options(
    heads: int, kv_heads: int, dim: int, attributes: dict[str, Any], theta: float | None, impl: Any, precision: Any
) -> tuple[int | None, str, float, float | None]:
    """Window, feature map, eps and rope_theta as Python values, by which compiled programs of the layer are kept. What
    the operation would refuse at its first call is refused here.

    Raises:
        ValueError: a combination of heads, or a precision, that there is not.
        SpecError: an attribute out of its domain (ERR-5), an odd head_dim with a rotary embedding.
    """
    precision = named_precision(precision)
    if heads % kv_heads:
        raise ValueError(f"num_heads: expected a multiple of num_kv_heads={kv_heads}, got {heads}")
    shapes = {"q": (1, 1, heads, dim), "k": (1, 1, kv_heads, dim), "v": (1, 1, kv_heads, 1)}
    shapes |= {"swa_weight": (heads, 1), "rla_weight": (heads, 1)}
    tensors = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    attributes = {name: plain("rattention", name, value) for name, value in attributes.items()}
    call = validate("rattention", tensors, attributes)
    if theta is not None:
        positions = {"positions": jax.ShapeDtypeStruct((1,), jnp.int32)}
        numbers = {"head_dim": dim, "theta": plain("rope_table", "theta", theta)}
        theta = validate("rope_table", positions, numbers).attributes["theta"]
    if impl != "pallas":
        choose(call, tensors, impl, precision)
    return call.attributes["window"], call.attributes["feature_map"], call.attributes["eps"], theta


def flags(**values: Any) -> None:
    """Each of them True or False.

    Raises:
        SpecError: one is not (ERR-5): a size in its place, or a word, would pass for True.
    """
    for name, value in values.items():
        if not isinstance(value, bool):
            raise SpecError("RAttention", name, "True or False", repr(value), "ERR-5")


def hidden_states(x: Any, *shape: str | int) -> jax.Array:
    """`x` as a JAX array, if it has the rank and the last size of `shape` and a floating-point dtype.

    Raises:
        TypeError: no array, an array with a mask, or not of floating-point numbers.
        ValueError: another shape.
        SpecError: a floating-point dtype of 8 bits or less, in which no layer computes (ERR-4).
    """
    brackets = "[" + ", ".join(map(str, shape)) + "]"
    x = unwrapped(x)
    if not isinstance(x, ARRAYS) or isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"x: expected a jax.Array or numpy.ndarray {brackets}, got {kind(x)}")
    if x.ndim != len(shape) or x.shape[-1] != shape[-1]:
        raise ValueError(f"x: expected shape {brackets}, got {list(x.shape)}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x: expected a floating-point dtype, got {x.dtype}")
    if jnp.finfo(x.dtype).bits < 16:
        raise SpecError("RAttention", "x", "a floating-point dtype of 16 bits or more", str(x.dtype), "ERR-4")
    return on_device(x)


def generation_cache(cache: Any, rotary: bool) -> None:
    """`cache` can be one of a layer with (`rotary`) or without rotary embedding.

    Raises:
        TypeError: no GenerationCache, or half of its table is no array.
        ValueError: it has no rotary table for a layer that has one, or the other way round; a table without the axis
            that stands for the batch, or where nothing is left along it.
    """
    if not isinstance(cache, GenerationCache) or not isinstance(cache.tensors, Cache):
        got = f"one of {kind(cache.tensors)}" if isinstance(cache, GenerationCache) else kind(cache)
        raise TypeError(f"cache: expected a GenerationCache, from new_cache of this layer, got {got}")
    found = [x is not None for x in (cache.rope_cos, cache.rope_sin)]
    if found != [rotary, rotary]:
        expected = "a rotary table" if rotary else "no rotary table: rope_theta is None"
        got = "both halves" if all(found) else "one half of one" if any(found) else "none"
        raise ValueError(f"cache: expected a GenerationCache, from new_cache of this layer, with {expected}, got {got}")
    for name, half in (("rope_cos", cache.rope_cos), ("rope_sin", cache.rope_sin)) if rotary else ():
        half = unwrapped(half)
        if not isinstance(half, ARRAYS) or isinstance(half, np.ma.MaskedArray):
            raise TypeError(f"cache: {name}: expected a jax.Array or numpy.ndarray, got {kind(half)}")
        if half.ndim != 3 or half.shape[0] == 0:
            raise ValueError(
                f"cache: {name}: expected shape [1, max_length, D/2], or more alike along axis 0, got "
                f"{list(half.shape)}; to cut rows out of a cache, index them (t[rows]) or map over cache.tensors alone"
            )


def mask(name: str, given: Any, batch: int) -> jax.Array:
    """`given` as a JAX array, if it is a `[B]` bool mask.

    Raises:
        TypeError: no array of bools.
        ValueError: another shape.
    """
    if not isinstance(given, ARRAYS) or isinstance(given, np.ma.MaskedArray) or given.dtype != np.bool_:
        got = f"dtype {given.dtype}" if isinstance(given, ARRAYS) else type(given).__qualname__
        raise TypeError(f"{name}: expected an array [B={batch}] of bools, got {got}")
    if given.shape != (batch,):
        raise ValueError(f"{name}: expected shape [B={batch}], got {list(given.shape)}")
    return on_device(given)


def integers(given: Any, shape: tuple[int, ...]) -> jax.Array | None:
    """`given` as a JAX array of int32 and of `shape`; None if it is missing or something that the operation refuses."""
    given = unwrapped(given)
    if not isinstance(given, ARRAYS) or isinstance(given, np.ma.MaskedArray):
        return None
    return on_device(given) if given.dtype == np.int32 and given.shape == shape else None


def rows_of_table(length: int, positions: Any, segment_ids: Any, max_position: Any) -> int:
    """How many rows the rotary table of a forward over `length` tokens needs.

    Raises:
        ValueError: `max_position` is no int >= 0, or is missing where `positions` cannot be read.
    """
    if max_position is not None:
        if isinstance(max_position, bool) or not isinstance(max_position, int | np.integer) or max_position < 0:
            raise ValueError(f"max_position: expected an int >= 0, or None, got {max_position!r}")
        return int(max_position) + 1
    if not isinstance(positions, ARRAYS):  # none, or something that the operation refuses by name
        return length
    if not _readable(positions):
        raise ValueError("max_position: expected the largest of the positions, which cannot be read here, got None")
    values = np.asarray(jax.device_get(positions))
    if isinstance(segment_ids, ARRAYS) and _readable(segment_ids) and segment_ids.shape == values.shape:
        values = values[np.asarray(jax.device_get(segment_ids)) != 0]
    if values.dtype != np.int32:  # refused by the operation
        return length
    # A power of two, so that batches of about one length share a compiled program.
    return 1 << int(np.max(values, initial=0)).bit_length()


def _readable(x: Any) -> bool:
    if isinstance(x, jax.core.Tracer):
        return False
    return not isinstance(x, jax.Array) or x.is_fully_addressable
