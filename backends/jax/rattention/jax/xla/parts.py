"""The pieces without a sequence: feature map, RMS norm, mix, rotation. All work in float32 (or float64)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def wide(x: jax.Array) -> jax.Array:
    """float32, or float64 for float64. Widening an input once, before both branches read it, also makes gradients of
    shared heads and of both branches add up in float32 before their one rounding (GRAD-3)."""
    return x.astype(wide_dtype(x.dtype))


def wide_dtype(dtype: Any) -> Any:
    """Where a storage dtype computes. Spelled out: under strict promotion JAX promotes none of these pairs."""
    return jnp.dtype(jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32)


def per_channel(x: jax.Array, weight: jax.Array) -> jax.Array:
    """`x [..., D]` times `weight [D]`, of equal rank."""
    return x * weight.reshape((1,) * (x.ndim - 1) + weight.shape)


def phi(x: jax.Array, feature_map: str) -> jax.Array:
    """phi(x) over the last axis: `[..., D]` to `[..., F]` (FM-1 .. FM-3)."""
    if feature_map == "identity":
        return x
    both = jnp.stack([x, -x], axis=-2)  # [..., 2, D]: both halves of phi are one operation
    # The library's relu keeps NaN (NUM-5), and its derivative is 1 for x > 0 and 0 otherwise (FM-6).
    both = jax.nn.softmax(both, axis=-1) if feature_map == "softmax" else jax.nn.relu(both)
    return both.reshape(*x.shape[:-1], 2 * x.shape[-1])


@jax.custom_jvp
def rms_normalise(x: jax.Array, eps: jax.Array) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) over the last axis (MIX-2)."""
    return x * _reciprocal_rms(x, eps)


@rms_normalise.defjvp
def _rms_normalise_jvp(primals, tangents):
    # Written out because differentiating rsqrt forms (mean(x^2) + eps)^(-3/2), which overflows float32 on a row of
    # zeros with a small eps (MIX-3). eps is an attribute: it has no derivative.
    x, eps = primals
    dx, _ = tangents
    r = _reciprocal_rms(x, eps)
    y = x * r
    return y, (dx - y * jnp.mean(y * dx, axis=-1, keepdims=True)) * r


def _reciprocal_rms(x: jax.Array, eps: jax.Array) -> jax.Array:
    # An eps below the smallest normal number would vanish and divide zero by zero.
    floor = jnp.maximum(jnp.asarray(eps, x.dtype), jnp.finfo(x.dtype).tiny)
    return jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + floor)


def mix(swa: jax.Array, rla: jax.Array, swa_weight: jax.Array, rla_weight: jax.Array, eps: jax.Array) -> jax.Array:
    """swa_weight * rms(swa) + rla_weight * rms(rla) (MIX-1); weights have the rank of the branches."""
    return swa_weight * rms_normalise(swa, eps) + rla_weight * rms_normalise(rla, eps)


def rotate(x: jax.Array, rows: jax.Array) -> jax.Array:
    """Rotate `x [..., D]` by the cosines and sines `rows [..., 2, D/2]` of its tokens (ROPE-3)."""
    pairs = x.reshape(*x.shape[:-1], 2, x.shape[-1] // 2)
    turned = jnp.concatenate([-pairs[..., 1:, :], pairs[..., :1, :]], axis=-2)
    return (pairs * rows[..., :1, :] + turned * rows[..., 1:, :]).reshape(x.shape)
