"""The operations as functions for people: same names, tensors and attributes as in the spec.

Tensors come by position or keyword, attributes by keyword; None stands for an absent optional tensor. Every function
takes NumPy arrays of float32, float16, bfloat16 (`ml_dtypes.bfloat16`) or float64, computes in float64 and rounds each
output once to the dtype of the storage tensors (states to float32, or float64 in a float64 call). Inputs are never
modified. A call that breaks a constraint raises `rattention.spec.SpecError`, which names the argument and the clause.

Letters: B batch, T tokens, Hq query heads, Hkv key/value heads (query head h reads h // (Hq / Hkv)), D key dim, Dv
value dim, F feature dim, w the window, M rows of a rotary table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from rattention.numpy import recurrent
from rattention.numpy.storage import DTYPES, round_once
from rattention.spec import dtype_name, validate

Tensor = np.ndarray


@dataclass(frozen=True)
class Cache:
    """What `rattention_extend` carries from call to call, in the canonical form of the spec (EXT-3, EXT-4).

    Attributes:
        k: [B, W, Hkv, D] keys of the last W tokens, before rotary embedding, newest last, zero-filled on the left.
        v: [B, W, Hkv, Dv] their values.
        state: [B, Hkv, F, Dv] float32, the state of all tokens that have left the W slots.
        length: [B] int32, tokens seen by each row.

    W = max(w, 0); for window None the cache holds every token and W grows by T with each call.
    """

    k: Tensor
    v: Tensor
    state: Tensor
    length: Tensor

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
        dtype: Any = np.float32,
    ) -> Cache:
        """The cache before any token: zero slots, zero state, length 0.

        Args:
            batch, num_kv_heads, head_dim, value_dim: B, Hkv, D and Dv (D unless given).
            window: w of the calls to come.
            feature_map: phi of the calls to come; sets F = 2D for softmax and relu, D for identity.
            dtype: storage dtype of keys and values.
        """
        dv = head_dim if value_dim is None else value_dim
        slots = 0 if window is None else max(window, 0)
        features = head_dim if feature_map == "identity" else 2 * head_dim
        wide = np.float64 if np.dtype(dtype) == np.float64 else np.float32
        return cls(
            k=np.zeros((batch, slots, num_kv_heads, head_dim), dtype),
            v=np.zeros((batch, slots, num_kv_heads, dv), dtype),
            state=np.zeros((batch, num_kv_heads, features, dv), wide),
            length=np.zeros(batch, np.int32),
        )


def _call(op: str, tensors: dict[str, Any], attrs: dict[str, Any]) -> dict[str, Tensor]:
    call = validate(op, tensors, attrs, extra_dtypes=("float64",), array=("a numpy.ndarray", np.ndarray))
    given = {name: np.asarray(x) for name, x in tensors.items() if x is not None}  # subclasses compute otherwise
    dtypes = call.output_dtypes({name: dtype_name(x) for name, x in given.items()})
    if call.storage == "float64":
        dtypes = {n: d if d not in DTYPES else "float64" for n, d in dtypes.items()}
    return {n: round_once(x, dtypes[n]) for n, x in recurrent.run(op, given, attrs).items()}


def feature_map(x: Tensor, *, feature_map: str = "softmax") -> Tensor:
    """phi(x), the feature map of the linear branch (FM-1 to FM-6).

    Args:
        x: [B, T, H, D].
        feature_map: `softmax`: concat(softmax(x), softmax(-x)) over D; `relu`: concat(relu(x), relu(-x)); `identity`.

    Returns:
        [B, T, H, F], F = 2D for softmax and relu, D for identity.
    """
    return _call("feature_map", {"x": x}, {"feature_map": feature_map})["out"]


def rope_table(positions: Tensor, *, head_dim: int, theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    """Rotary cosines and sines of position * theta^(-2j/D), j = 0 .. D/2-1, computed in float64 (ROPE-1, ROPE-2).

    Args:
        positions: [M] int32, in tokens.
        head_dim: D, even.
        theta: base of the frequencies.

    Returns:
        rope_cos and rope_sin, each [M, D/2] float32.
    """
    out = _call("rope_table", {"positions": positions}, {"head_dim": head_dim, "theta": theta})
    return out["rope_cos"], out["rope_sin"]


def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rope_cos: Tensor | None = None,
    rope_sin: Tensor | None = None,
    positions: Tensor | None = None,
    segment_ids: Tensor | None = None,
    *,
    window: int | None,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention over tokens t-w .. t, the softmax branch of RAttention (SWA-1 to SWA-6).

    Args:
        q: [B, T, Hq, D].
        k: [B, T, Hkv, D].
        v: [B, T, Hkv, Dv].
        rope_cos, rope_sin: [M, D/2] rotary tables; both or neither.
        positions: [B, T] int32 rows of the tables; default: index within the segment.
        segment_ids: [B, T] int32; equal ids are one document, 0 is padding.
        window: w >= -1, or None for full causal attention; -1 gives zeros.
        scale: factor on the scores, default 1/sqrt(D).

    Returns:
        [B, T, Hq, Dv].
    """
    tensors = {"q": q, "k": k, "v": v, "rope_cos": rope_cos, "rope_sin": rope_sin, "positions": positions}
    tensors["segment_ids"] = segment_ids
    return _call("sliding_window_attention", tensors, {"window": window, "scale": scale})["out"]


def residual_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
    memory: Tensor | None = None,
    initial_state: Tensor | None = None,
    segment_ids: Tensor | None = None,
    *,
    window: int | None,
    feature_map: str = "softmax",
    return_final_state: bool = False,
) -> Any:
    """Linear attention over the tokens that left the window, i <= t-w-1 (RLA-1 to RLA-9; arXiv 2506.15545).

    out_t = phi(q_t q_scale) (initial_state + memory + sum phi(k_i k_scale)^T v_i)

    Args:
        q, k, v: [B, T, Hq, D], [B, T, Hkv, D], [B, T, Hkv, Dv].
        q_scale, k_scale: [D].
        memory: [Hq, F, Dv] float32, a learned constant per query head, never carried.
        initial_state: [B, Hkv, F, Dv] float32, the state of what came before.
        segment_ids: [B, T] int32; equal ids are one document, 0 is padding.
        window: w >= -1, or None: no token reaches this branch.
        feature_map: phi; see `feature_map`.
        return_final_state: also return the state of all tokens i < T - max(w, 0).

    Returns:
        out [B, T, Hq, Dv], or (out, final_state [B, Hkv, F, Dv]).
    """
    tensors = {"q": q, "k": k, "v": v, "q_scale": q_scale, "k_scale": k_scale, "memory": memory}
    tensors |= {"initial_state": initial_state, "segment_ids": segment_ids}
    out = _call("residual_linear_attention", tensors, {"window": window, "feature_map": feature_map})
    return (out["out"], out["final_state"]) if return_final_state else out["out"]


def rms_mix(swa: Tensor, rla: Tensor, swa_weight: Tensor, rla_weight: Tensor, *, eps: float = 1e-6) -> Tensor:
    """swa_weight rms(swa) + rla_weight rms(rla), rms(x) = x / sqrt(mean(x^2) + eps) over Dv (MIX-1 to MIX-3).

    Args:
        swa, rla: [B, T, Hq, Dv], the outputs of the two branches.
        swa_weight, rla_weight: [Hq, Dv].
        eps: added to the mean square.

    Returns:
        [B, T, Hq, Dv].
    """
    tensors = {"swa": swa, "rla": rla, "swa_weight": swa_weight, "rla_weight": rla_weight}
    return _call("rms_mix", tensors, {"eps": eps})["out"]


def rattention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    swa_weight: Tensor,
    rla_weight: Tensor,
    rope_cos: Tensor | None = None,
    rope_sin: Tensor | None = None,
    positions: Tensor | None = None,
    segment_ids: Tensor | None = None,
    q_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
    memory: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    window: int | None,
    scale: float | None = None,
    feature_map: str = "softmax",
    eps: float = 1e-6,
    return_final_state: bool = False,
) -> Any:
    """RAttention: both branches from one q, k, v, normalised and mixed (RAT-1 to RAT-4; arXiv 2506.15545).

    Args:
        q, k, v: [B, T, Hq, D], [B, T, Hkv, D], [B, T, Hkv, Dv].
        swa_weight, rla_weight: [Hq, Dv], gains of the two norms.
        rope_cos, rope_sin: [M, D/2]; rotate q and k of the softmax branch alone.
        positions: [B, T] int32; default: index within the segment.
        segment_ids: [B, T] int32; equal ids are one document, 0 is padding, whose output is 0.
        q_scale, k_scale: [D], factors before phi.
        memory: [Hq, F, Dv] float32; initial_state: [B, Hkv, F, Dv] float32.
        window: w >= -1, or None: softmax reads the last w+1 tokens, the linear branch all before.
        scale, feature_map, eps: as in the branches and in `rms_mix`.
        return_final_state: also return the carried state.

    Returns:
        out [B, T, Hq, Dv], or (out, final_state [B, Hkv, F, Dv]).
    """
    tensors = {"q": q, "k": k, "v": v, "swa_weight": swa_weight, "rla_weight": rla_weight}
    tensors |= {"rope_cos": rope_cos, "rope_sin": rope_sin, "positions": positions, "segment_ids": segment_ids}
    tensors |= {"q_scale": q_scale, "k_scale": k_scale, "memory": memory, "initial_state": initial_state}
    attrs = {"window": window, "scale": scale, "feature_map": feature_map, "eps": eps}
    out = _call("rattention", tensors, attrs)
    return (out["out"], out["final_state"]) if return_final_state else out["out"]


def rattention_extend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    swa_weight: Tensor,
    rla_weight: Tensor,
    cache: Cache,
    lengths: Tensor | None = None,
    rope_cos: Tensor | None = None,
    rope_sin: Tensor | None = None,
    q_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
    memory: Tensor | None = None,
    *,
    window: int | None,
    scale: float | None = None,
    feature_map: str = "softmax",
    eps: float = 1e-6,
) -> tuple[Tensor, Cache]:
    """Continue a sequence by T tokens: prefill, chunked prefill and decode are this one operation (EXT-1 to EXT-11).

    Args:
        q, k, v, swa_weight, rla_weight, rope_cos, rope_sin, q_scale, k_scale, memory: as in `rattention`.
        cache: what the previous call returned, or `Cache.empty(...)`.
        lengths: [B] int32, new tokens of each row that are real; outputs past them are 0. Default T.
        window, scale, feature_map, eps: as in `rattention`, the same in every call of a sequence.

    Returns:
        out [B, T, Hq, Dv] and the next cache.
    """
    tensors = {"q": q, "k": k, "v": v, "swa_weight": swa_weight, "rla_weight": rla_weight}
    tensors |= {"cache_k": cache.k, "cache_v": cache.v, "cache_state": cache.state, "cache_length": cache.length}
    tensors |= {"lengths": lengths, "rope_cos": rope_cos, "rope_sin": rope_sin}
    tensors |= {"q_scale": q_scale, "k_scale": k_scale, "memory": memory}
    attrs = {"window": window, "scale": scale, "feature_map": feature_map, "eps": eps}
    out = _call("rattention_extend", tensors, attrs)
    return out["out"], Cache(out["cache_k"], out["cache_v"], out["cache_state"], out["cache_length"])
