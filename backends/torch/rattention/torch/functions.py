"""The public functions: one per operation of the specification, tensors and attributes under its names.

Layout of every tensor: `[B, T, H, D]`. Storage dtype of q, k, v: float32, bfloat16 or float16, one for the call
(float64 too, for gradient checks); states and memory are float32, weights, scales and tables float32 or storage. `out`
has the storage dtype. All functions work under autograd, `torch.compile(fullgraph=True)`, `torch.func.vmap` and
`torch.func.grad`, never modify their inputs and return tensors that share no memory with them.

Common arguments:
    impl: "eager" (chunked PyTorch, any device), "triton" (fused kernels, CUDA and ROCm), or None for the best of the
        two that this installation and these tensors allow.
    precision: None or "float32" keeps float32 products in full float32 whatever PyTorch is set to; "tf32" leaves
        reduced-precision passes to PyTorch's own setting.
    check_values: look at the values of integer tensors too when they live on a device (this synchronises).

Values of positions that are not looked at give NaN where the rotary table has no row for them (ERR-16).

Common errors: `rattention.spec.SpecError`, a ValueError, for a call that breaks the specification (ERR-1 .. ERR-11),
for what is no tensor (ERR-14) and for tensors on two devices (ERR-15). `rattention.spec.Unsupported` for a valid call
that the chosen implementation lacks, for DTensors, and for `check_values` where values cannot be read. Attributes are
numbers: a tensor in their place that requires grad, or that is traced, is refused (ERR-5).

On the `meta` device and on fake tensors the outputs have their shapes, and nothing is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from rattention.spec import SpecError
from rattention.torch.arguments import check, reduced
from rattention.torch.cache import Cache
from rattention.torch.dispatch import choose
from rattention.torch.eager.chunks import no_autocast
from torch import Tensor


def _call(
    operation: str,
    tensors: dict[str, Tensor | None],
    attributes: dict[str, Any],
    impl: str | None = None,
    precision: str | None = None,
    check_values: bool = False,
) -> tuple[Tensor, ...]:
    call = check(operation, tensors, attributes, check_values)
    first = next(t for t in tensors.values() if t is not None)
    run = choose(impl, operation, first)
    with no_autocast(first.device):  # dtypes are the specification's, not autocast's
        return run(**tensors, **call.attributes, reduced=reduced(precision))


# Under torch.compile a call is one node of the graph: validation runs once, in Python, while the graph is traced.
_traced_call: Callable[..., tuple[Tensor, ...]] = torch.compiler.allow_in_graph(_call)  # pyright: ignore


def feature_map(x: Tensor, *, feature_map: str = "softmax", impl: str | None = None) -> Tensor:
    """phi(x), the feature map of the linear branch, in float32 and rounded once (FM-1 .. FM-5).

    Args:
        x: `[B, T, H, D]`.
        feature_map: "softmax": concat(softmax(x), softmax(-x)); "relu": concat(relu(x), relu(-x)); "identity": x.

    Returns:
        `[B, T, H, F]`, F = 2D, or D for "identity".
    """
    return _traced_call("feature_map", {"x": x}, {"feature_map": feature_map}, impl)[0]


def rope_table(positions: Tensor, *, head_dim: int, theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    """Rotary cosines and sines of `position * theta^(-2j/D)`, computed in float64 and rounded once (ROPE-1, ROPE-2).

    Args:
        positions: `[M]` int32, the positions to tabulate.
        head_dim: D, even.
        theta: base of the frequencies, > 0.

    Returns:
        `rope_cos` and `rope_sin`, `[M, D/2]` float32.
    """
    cos, sin = _traced_call("rope_table", {"positions": positions}, {"head_dim": head_dim, "theta": theta}, "eager")
    return cos, sin


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
    impl: str | None = None,
    precision: str | None = None,
    check_values: bool = False,
) -> Tensor:
    """Softmax attention over the window: token t sees tokens t-w .. t (SWA-1 .. SWA-6).

    Args:
        q, k, v: `[B, T, Hq, D]`, `[B, T, Hkv, D]`, `[B, T, Hkv, Dv]`; query head h reads key/value head h // (Hq/Hkv).
        rope_cos, rope_sin: `[M, D/2]`; q and k are rotated by row `positions[b, t]`.
        positions: `[B, T]` int32; default: index within the segment.
        segment_ids: `[B, T]` int32; nothing crosses between ids, 0 is padding and gets output 0.
        window: w >= 0 tokens besides the own one; -1 for none at all (output 0); None for full causal attention.
        scale: factor on the scores, default 1/sqrt(D).

    Returns:
        `[B, T, Hq, Dv]`.
    """
    tensors = dict(q=q, k=k, v=v, rope_cos=rope_cos, rope_sin=rope_sin, positions=positions, segment_ids=segment_ids)
    attributes = {"window": window, "scale": scale}
    return _traced_call("sliding_window_attention", tensors, attributes, impl, precision, check_values)[0]


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
    impl: str | None = None,
    precision: str | None = None,
    check_values: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Linear attention over the tokens that left the window: token t reads tokens i <= t-w-1 (RLA-1 .. RLA-9).

    out_t = phi(q_t * q_scale) (initial_state + memory_h + sum_i phi(k_i * k_scale)^T v_i): no denominator, no rotation.

    Args:
        q, k, v, segment_ids, window: as in `sliding_window_attention`. Window -1 reads i <= t; None reads no token.
        q_scale, k_scale: `[D]`, factors before phi.
        memory: `[Hq, F, Dv]` float32, read by every token of its head, never carried.
        initial_state: `[B, Hkv, F, Dv]` float32, the state carried into the call.
        feature_map: "softmax", "relu" or "identity".

    Returns:
        `[B, T, Hq, Dv]`; with `return_final_state` also the state `[B, Hkv, F, Dv]` float32 of all tokens
        i < T - max(w, 0).
    """
    tensors = dict(
        q=q,
        k=k,
        v=v,
        q_scale=q_scale,
        k_scale=k_scale,
        memory=memory,
        initial_state=initial_state,
        segment_ids=segment_ids,
    )
    attributes = {"window": window, "feature_map": feature_map}
    out, state = _traced_call("residual_linear_attention", tensors, attributes, impl, precision, check_values)
    return (out, state) if return_final_state else out


def rms_mix(
    swa: Tensor,
    rla: Tensor,
    swa_weight: Tensor,
    rla_weight: Tensor,
    *,
    eps: float = 1e-6,
    impl: str | None = None,
) -> Tensor:
    """swa_weight * rms(swa) + rla_weight * rms(rla), rms(x) = x / sqrt(mean(x^2) + eps) (MIX-1 .. MIX-3).

    Args:
        swa, rla: `[B, T, Hq, Dv]`, the outputs of the two branches.
        swa_weight, rla_weight: `[Hq, Dv]`.

    Returns:
        `[B, T, Hq, Dv]`.
    """
    tensors: dict[str, Tensor | None] = dict(swa=swa, rla=rla, swa_weight=swa_weight, rla_weight=rla_weight)
    return _traced_call("rms_mix", tensors, {"eps": eps}, impl)[0]


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
    impl: str | None = None,
    precision: str | None = None,
    check_values: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Both branches from one q, k, v, RMS-normalised and mixed: each past token is read exactly once (RAT-1 .. RAT-4).

    The arguments are those of `sliding_window_attention`, `residual_linear_attention` and `rms_mix`.

    Returns:
        `[B, T, Hq, Dv]`; with `return_final_state` also the final state `[B, Hkv, F, Dv]` float32.

    Source: RAttention, arXiv 2506.15545.
    """
    tensors = dict(
        q=q,
        k=k,
        v=v,
        swa_weight=swa_weight,
        rla_weight=rla_weight,
        rope_cos=rope_cos,
        rope_sin=rope_sin,
        positions=positions,
        segment_ids=segment_ids,
        q_scale=q_scale,
        k_scale=k_scale,
        memory=memory,
        initial_state=initial_state,
    )
    attributes = {"window": window, "scale": scale, "feature_map": feature_map, "eps": eps}
    out, state = _traced_call("rattention", tensors, attributes, impl, precision, check_values)
    return (out, state) if return_final_state else out


def rattention_extend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    swa_weight: Tensor,
    rla_weight: Tensor,
    cache: Cache,
    *,
    lengths: Tensor | None = None,
    rope_cos: Tensor | None = None,
    rope_sin: Tensor | None = None,
    q_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
    memory: Tensor | None = None,
    window: int | None,
    scale: float | None = None,
    feature_map: str = "softmax",
    eps: float = 1e-6,
    impl: str | None = None,
    precision: str | None = None,
    check_values: bool = False,
) -> tuple[Tensor, Cache]:
    """Continue a sequence by T tokens: prefill, chunked prefill and decode are this one operation (EXT-1 .. EXT-11).

    Work per token and memory are those of the window and the state, O(w + F Dv), however long the past is.

    Args:
        q, k, v: the new tokens, as in `rattention`. Token i of row b has position `cache.length[b] + i`.
        cache: what came before; `Cache.empty(...)` at the start.
        lengths: `[B]` int32, how many of the T tokens are real in each row (default all). Outputs past them are 0.
        rope_cos, rope_sin: `[M, D/2]`, M at least the longest row after the call.

    Returns:
        `[B, T, Hq, Dv]`, and the cache after the new tokens.
    """
    if not isinstance(cache, Cache):
        raise SpecError("rattention_extend", "cache", "a rattention.torch.Cache", type(cache).__qualname__, "ERR-14")
    tensors = dict(
        q=q,
        k=k,
        v=v,
        swa_weight=swa_weight,
        rla_weight=rla_weight,
        cache_k=cache.k,
        cache_v=cache.v,
        cache_state=cache.state,
        cache_length=cache.length,
        lengths=lengths,
        rope_cos=rope_cos,
        rope_sin=rope_sin,
        q_scale=q_scale,
        k_scale=k_scale,
        memory=memory,
    )
    attributes = {"window": window, "scale": scale, "feature_map": feature_map, "eps": eps}
    out, *after = _traced_call("rattention_extend", tensors, attributes, impl, precision, check_values)
    return out, Cache(*after)
