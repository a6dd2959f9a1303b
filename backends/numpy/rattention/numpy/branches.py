"""The pieces of the mechanism in quadratic form: each a formula of the spec and its transposed derivative.

Written against an array namespace `xp` (`exact.py` or `bounded.py`). Shapes inside: queries [B, Hkv, G, T, D], keys
[B, Hkv, 1, S, D] and values [B, Hkv, 1, S, Dv] (query head h = n G + g reads kv head n = h // G: SWA-4, RLA-8), masks
[B, 1, 1, T, S]. Broadcasting over the axis G is the sharing of a kv head; its transpose is a sum over G (GRAD-3).
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = Any


def transpose(x: Array) -> Array:
    return x.swapaxes(-1, -2)


def tokens_of_group(x: Array) -> Array:
    """[B, Hkv, G, T, X] -> [B, Hkv, 1, T G, X]: the query heads of a group as more tokens.

    A gradient of what they share is then one sum over tokens and heads, which may be taken in any order (chapter 10).
    """
    B, N, G, T, X = x.shape
    return x.swapaxes(2, 3).reshape(B, N, 1, T * G, X)


def heads_of_group(x: Array, group: int) -> Array:
    """The way back of `tokens_of_group`."""
    B, N, _, rows, X = x.shape
    return x.reshape(B, N, rows // group, group, X).swapaxes(2, 3)


def tokens_of_batch(x: Array) -> Array:
    """[B, Hkv, G, T, X] -> [Hkv, G, B T, X]."""
    B, N, G, T, X = x.shape
    return x.swapaxes(0, 1).swapaxes(1, 2).reshape(N, G, B * T, X)


def rows_of_group(mask: np.ndarray, group: int) -> np.ndarray:
    """[B, 1, 1, T, S] -> [B, 1, 1, T G, S]."""
    return np.repeat(mask, group, -2)


# ------------------------------------------------------------------------------------------------ feature map


def feature_map(xp: Any, x: Array, kind: str) -> Array:
    if kind == "softmax":  # FM-1
        return xp.concat([xp.softmax(x), xp.softmax(-x)], -1)
    if kind == "relu":  # FM-2; NaN is not <= 0, so it passes (NUM-5)
        return xp.concat([xp.where(~(xp.values(x) <= 0), x), xp.where(~(xp.values(x) >= 0), -x)], -1)
    return x  # FM-3


def feature_map_vjp(xp: Any, x: Array, kind: str, d_phi: Array) -> Array:
    if kind == "identity":
        return d_phi
    half = x.shape[-1]
    plus, minus = d_phi[..., :half], d_phi[..., half:]
    if kind == "relu":
        return xp.where(xp.values(x) > 0, plus) - xp.where(xp.values(x) < 0, minus)
    return softmax_vjp(xp, xp.softmax(x), plus) - softmax_vjp(xp, xp.softmax(-x), minus)


def softmax_vjp(xp: Any, p: Array, d_p: Array) -> Array:
    """p (d_p - sum p d_p)."""
    return p * (d_p - xp.sum(p * d_p, -1, keepdims=True))


# ------------------------------------------------------------------------------------------------ rotary embedding


def rotate(xp: Any, x: Array, cos: Array, sin: Array) -> Array:
    """Rotate the pairs (j, j + D/2) by the angle of the token's position (ROPE-3). Its transpose is rotate(-sin)."""
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    return xp.concat([a * cos - b * sin, b * cos + a * sin], -1)


# ------------------------------------------------------------------------------------------------ softmax branch


def window_attention(xp: Any, q: Array, k: Array, v: Array, window: np.ndarray, scale: float) -> tuple[Array, Array]:
    """out_t = sum over the window of p_ti v_i, p = softmax(scale <q_t, k_i>) (SWA-1 to SWA-6).

    Returns out, and p as a backward pass has it.
    """
    scores = xp.matmul(q, transpose(k)) * scale
    p = xp.softmax(scores, window)
    return xp.matmul(p, v, window), xp.recomputed(p, scores, window)


def window_attention_vjp(
    xp: Any, q: Array, k: Array, v: Array, window: np.ndarray, scale: float, out: Array, p: Array, d_out: Array
) -> tuple[Array, Array, Array]:
    """d_q, d_k, d_v. With d_p = d_out v^T: d_s = p (d_p - <d_out, out>), since sum_i p_i d_p_i = <d_out, out>."""
    group = q.shape[2]
    back = np.swapaxes(rows_of_group(window, group), -1, -2)
    d_v = xp.matmul(transpose(tokens_of_group(p)), tokens_of_group(d_out), back)
    d_p = xp.matmul(d_out, transpose(v))
    delta = xp.shared(xp.inner(d_out, out), window.sum(-1, keepdims=True))
    d_s = xp.where(window, p * (d_p - delta)) * scale
    d_q = xp.matmul(d_s, k, window)
    d_k = xp.matmul(transpose(tokens_of_group(d_s)), tokens_of_group(q), back)
    return d_q, d_k, d_v


# ------------------------------------------------------------------------------------------------ linear branch


def linear_attention(
    xp: Any, fq: Array, fk: Array, v: Array, behind: np.ndarray, carried: np.ndarray, state: Array, memory: Array
) -> Array:
    """out_t = phi(q_t) (S_init + M + sum over i behind the window of phi(k_i)^T v_i) (RLA-1, RLA-2, RLA-4, RLA-5).

    `carried [B, 1, 1, T, 1]` says which queries read `state` [B, Hkv, 1, F, Dv]; `memory` is [Hkv, G, F, Dv]. Either
    may be None.
    """
    weights = xp.matmul(fq, transpose(fk), regroup=True)
    out = xp.matmul(weights, v, behind)
    if state is not None:
        tokens = behind.sum(-1).max(-1, initial=0)[..., None, None]
        out = out + xp.where(carried, xp.matmul(fq, xp.carried(state, tokens)))
    if memory is not None:
        out = out + xp.matmul(fq, memory)
    return out


def linear_attention_vjp(
    xp: Any,
    fq: Array,
    fk: Array,
    v: Array,
    behind: np.ndarray,
    carried: np.ndarray,
    state: Array,
    memory: Array,
    d_out: Array,
) -> tuple[Array, Array, Array, Array, Array]:
    """d_fq, d_fk, d_v, d_state, d_memory; the last two None where the input is."""
    group = fq.shape[2]
    d_memory = None
    if memory is not None:  # shared by the batch, whose tokens are one sum as well
        d_fq_memory = xp.matmul(d_out, transpose(memory))
        d_memory = xp.matmul(transpose(tokens_of_batch(fq)), tokens_of_batch(d_out))
    fq, d_out, carried = tokens_of_group(fq), tokens_of_group(d_out), rows_of_group(carried, group)
    behind = rows_of_group(behind, group)
    back = np.swapaxes(behind, -1, -2)
    d_weights = xp.matmul(d_out, transpose(v), regroup=True)
    weights = xp.matmul(fq, transpose(fk), regroup=True)
    d_fq = xp.matmul(d_weights, fk, behind)
    d_fk = xp.matmul(transpose(d_weights), fq, back)
    d_v = xp.matmul(transpose(weights), d_out, back)
    d_state = None
    if state is not None:
        d_carried = xp.where(carried, d_out)
        tokens = behind.sum(-1).max(-1, initial=0)[..., None, None]
        d_fq = d_fq + xp.matmul(d_carried, transpose(xp.carried(state, tokens)))
        d_state = xp.matmul(transpose(xp.where(carried, fq)), d_carried)[:, :, 0]
    d_fq = heads_of_group(d_fq, group)
    if memory is not None:
        d_fq = d_fq + d_fq_memory
    return d_fq, d_fk, d_v, d_state, d_memory


def final_state(xp: Any, fk: Array, v: Array, folded: np.ndarray, keeps: np.ndarray, state: Array) -> Array:
    """S_init + sum of phi(k_i)^T v_i over the folded tokens, [B, Hkv, F, Dv] (RLA-6, RLA-9, SEG-7, EXT-5)."""
    chosen = folded[:, None, None, :, None]
    total = xp.matmul(transpose(xp.where(chosen, fk)), xp.where(chosen, v))[:, :, 0]
    if state is None:
        return total
    tokens = folded.sum(-1)[:, None, None, None]
    return total + xp.where(keeps[:, None, None, None], xp.carried(state[:, :, 0], tokens))


def final_state_vjp(
    xp: Any, fk: Array, v: Array, folded: np.ndarray, keeps: np.ndarray, d_final: Array, group: int
) -> tuple[Array, Array, Array]:
    """d_fk, d_v, d_state of `final_state`; `group` query heads share a state."""
    chosen = folded[:, None, None, :, None]
    # Backwards the recurrence starts from the cotangent of the state, and adds what each query of each head reads.
    d_final = xp.carried(d_final, folded.shape[-1] * group)
    d = d_final[:, :, None]
    d_fk = xp.where(chosen, xp.matmul(xp.where(chosen, v), transpose(d)))
    d_v = xp.where(chosen, xp.matmul(xp.where(chosen, fk), d))
    return d_fk, d_v, xp.where(keeps[:, None, None, None], d_final)


# ------------------------------------------------------------------------------------------------ norms and mix


def rms_mix(xp: Any, swa: Array, rla: Array, swa_weight: Array, rla_weight: Array, eps: float) -> Array:
    """swa_weight rms(swa) + rla_weight rms(rla) (MIX-1, MIX-2); a row of zeros gives exactly 0 (MIX-3)."""
    return swa_weight * xp.rms_norm(swa, eps)[0] + rla_weight * xp.rms_norm(rla, eps)[0]


def rms_mix_vjp(xp: Any, x: Array, weight: Array, eps: float, d_out: Array, contracted: bool) -> tuple[Array, Array]:
    """d_x and the per-token gradient of the weight for one branch: d_x = (w d - xn mean(w d xn)) / rms.

    `contracted`: d_x goes on into a product with the rows that x is made of.
    """
    normed, factor = xp.rms_norm(x, eps)
    d_normed = weight * d_out
    mean = xp.sum(d_normed * normed, -1, keepdims=True) * (1.0 / x.shape[-1])
    if contracted:
        mean = xp.shared(mean, x.shape[-1])
    return factor * (d_normed - normed * mean), d_out * normed
