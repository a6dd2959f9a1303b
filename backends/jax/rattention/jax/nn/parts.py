"""The pieces of the layer beside the operation: projections, norm of heads, heads of channels and back.

Each is one compiled program with a Python face, so that an eager layer moves nothing but its arguments.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rattention.jax.dispatch import places
from rattention.jax.meshes import Split, entries, together, without_explicit_axes
from rattention.jax.xla.parts import per_channel, wide
from rattention.spec import SpecError


class Projection(nnx.Module):
    """y = x weight^T + bias, `weight [out, in]` as in `torch.nn.Linear`, so that weights move between frameworks as
    they are. Starts uniform in +-1/sqrt(in), the bias at 0.

    `x` may have another dtype than the parameters: then all are widened to the dtype that can hold both, also where
    JAX itself would refuse (`jax_numpy_dtype_promotion="strict"`).
    """

    def __init__(self, inputs: int, outputs: int, *, bias: bool, dtype: Any, rngs: nnx.Rngs):
        bound = 1 / np.sqrt(inputs)
        self.weight = nnx.Param(jax.random.uniform(rngs.params(), (outputs, inputs), dtype, -bound, bound))
        self.bias = nnx.Param(jnp.zeros((outputs,), dtype)) if bias else None

    def __call__(self, x: Any) -> jax.Array:
        return _project(*_beside(x, self.weight[...], None if self.bias is None else self.bias[...]))


class HeadNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in float32 inside; returns the dtype of x."""

    def __init__(self, channels: int, *, eps: float, dtype: Any):
        self.weight = nnx.Param(jnp.ones((channels,), dtype))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        return _normalise(*_beside(x, self.weight[...])[:2], self.eps)


def _beside(x: Any, weight: Any, bias: Any = None) -> Any:
    """The three, on one mesh if one of them is.

    Raises:
        SpecError: their owner has put them on different devices (ERR-15).
    """
    given = {"x": x, "weight": weight, "bias": bias}
    found = places({name: y for name, y in given.items() if y is not None})
    if found:
        (owner, home), *others = found.items()
        odd, place = next((name, place) for name, place in others if place != home)
        raise SpecError("RAttention", odd, f"device {home}, that of {owner}", place, "ERR-15")
    return together((x, weight, bias))


@jax.jit
def _project(x: jax.Array, weight: jax.Array, bias: jax.Array | None) -> jax.Array:
    with jax.numpy_dtype_promotion("standard"):
        dtype = functools.reduce(jnp.promote_types, [y.dtype for y in (x, weight, bias) if y is not None])

    def product(x: jax.Array, weight: jax.Array, bias: jax.Array | None) -> jax.Array:
        y = jnp.einsum("...i,oi->...o", x.astype(dtype), weight.astype(dtype))
        return y if bias is None else y + bias.astype(dtype).reshape((1,) * (y.ndim - 1) + bias.shape)

    split = Split((*entries(x)[:-1], entries(weight)[0]), (*x.shape[:-1], weight.shape[0]))
    return without_explicit_axes(product, (x, weight, bias), split)


@functools.partial(jax.jit, static_argnames="eps")
def _normalise(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    def norm(x: jax.Array, weight: jax.Array) -> jax.Array:
        y = wide(x)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
        return per_channel(y, weight.astype(y.dtype)).astype(x.dtype)

    return without_explicit_axes(norm, (x, weight), Split(entries(x), x.shape))


@jax.jit
def without_padding(x: jax.Array, segment_ids: jax.Array | None, lengths: jax.Array | None) -> jax.Array:
    """`x [B, T, hidden]` with zeros in the tokens of id 0 or past `lengths [B]`.

    Their outputs do not count, but they meet the weights of the projections: a NaN there would reach the gradient of
    the weights, since 0 times NaN is NaN.
    """

    def select(x: jax.Array, segment_ids: jax.Array | None, lengths: jax.Array | None) -> jax.Array:
        if segment_ids is not None:
            x = jnp.where((segment_ids != 0)[:, :, None], x, jnp.zeros((), x.dtype))
        if lengths is not None:
            real = jnp.arange(x.shape[1], dtype=jnp.int32)[None] < lengths[:, None]
            x = jnp.where(real[:, :, None], x, jnp.zeros((), x.dtype))
        return x

    return without_explicit_axes(select, (x, segment_ids, lengths), Split(entries(x), x.shape))


@functools.partial(jax.jit, static_argnums=(1, 2))
def split_heads(x: jax.Array, heads: int, dim: int) -> jax.Array:
    """`[B, T, H * D]` to `[B, T, H, D]`."""
    shape = (*x.shape[:2], heads, dim)
    return without_explicit_axes(lambda x: x.reshape(shape), (x,), Split((*entries(x), None), shape))


@jax.jit
def merge_heads(x: jax.Array) -> jax.Array:
    """`[B, T, H, D]` to `[B, T, H * D]`."""
    shape = (*x.shape[:2], x.shape[2] * x.shape[3])
    return without_explicit_axes(lambda x: x.reshape(shape), (x,), Split(entries(x)[:3], shape))
