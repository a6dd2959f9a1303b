"""The operations of the specification on the operators of this package: the mapping that dispatch looks in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from rattention.spec import Unsupported
from rattention.torch.triton import operators
from rattention.torch.triton.plan import LARGEST_HEAD_DIM
from rattention.torch.triton.tiles import INTERPRET
from rattention.torch.triton.transforms import call
from torch import Tensor

KERNELS = (
    "attend", "carry_gradients", "carry_states", "combine", "decode", "feature_map", "feature_map_grad", "key_grad",
    "local_states", "mix", "mix_grad", "output_grad", "query_grad", "residue_grad", "rope_table", "rotate_keys",
)  # fmt: skip
"""Names of all kernels, as the record of launches gives them."""

STORAGE = (torch.float32, torch.bfloat16, torch.float16)


def available(device: torch.device) -> str:
    """Empty where the kernels run on tensors of `device`, else the reason why not."""
    if device.type == "cuda":
        return "TRITON_INTERPRET=1 was set when the kernels were imported" if INTERPRET.value else ""
    if device.type == "cpu" and INTERPRET.value:
        return ""
    hint = "; on a CPU set TRITON_INTERPRET=1 before they are imported" if device.type == "cpu" else ""
    return f"the Triton kernels run on CUDA and ROCm tensors, these are on {device.type}{hint}"


def _check(*tensors: Tensor | None) -> None:
    x = next(t for t in tensors if t is not None)
    reason = available(x.device)
    if not reason and x.dtype.is_floating_point and x.dtype not in STORAGE:
        reason = f"the Triton kernels hold float32, bfloat16 and float16, not {str(x.dtype).removeprefix('torch.')}"
    if reason:
        raise Unsupported(reason)
    if x.ndim == 4:
        _fits(max(t.shape[-1] for t in tensors if t is not None))


def _fits(head_dim: int) -> None:
    if head_dim > LARGEST_HEAD_DIM:
        raise Unsupported(f"the Triton kernels hold head dims up to {LARGEST_HEAD_DIM}")


def _cast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast, float32 tensors of storage dtype become the autocast dtype, as for PyTorch's own attention."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    to = torch.get_autocast_dtype(device)
    return tuple(x.to(to) if x.dtype in STORAGE else x for x in tensors)


def _weights(like: Tensor, *tensors: Tensor | None) -> tuple[Any, ...]:
    """Weights in float32 or the dtype of `like`: autocast upstream may have made them the other 16-bit dtype."""
    allowed = (torch.float32, like.dtype)
    return tuple(x if x is None or x.dtype in allowed else x.to(torch.float32) for x in tensors)


def feature_map(x: Tensor, *, feature_map: str, reduced: bool = False) -> tuple[Tensor]:
    _check(x)
    return (call(operators.feature_map, x, feature_map),)


def rope_table(positions: Tensor, *, head_dim: int, theta: float, reduced: bool = False) -> tuple[Tensor, Tensor]:
    _check(positions)
    _fits(head_dim)  # no kernel could use a wider table
    return operators.rope_table(positions, head_dim, theta)


def sliding_window_attention(
    q: Tensor, k: Tensor, v: Tensor, *, rope_cos: Tensor | None = None, rope_sin: Tensor | None = None,
    positions: Tensor | None = None, segment_ids: Tensor | None = None, window: int | None, scale: float | None,
    reduced: bool = False,
) -> tuple[Tensor]:  # fmt: skip
    _check(q, k, v)
    q, k, v = _cast(q, k, v)
    out, _, _ = call(
        operators.attention,
        q, k, v, None, None, *_weights(q, rope_cos, rope_sin), positions, segment_ids, None, None, None, None,
        window, scale, "identity", 1e-6, "soft", reduced,
    )  # fmt: skip
    return (out,)


def residual_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, *, q_scale: Tensor | None = None, k_scale: Tensor | None = None,
    memory: Tensor | None = None, initial_state: Tensor | None = None, segment_ids: Tensor | None = None,
    window: int | None, feature_map: str, reduced: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _check(q, k, v)
    q, k, v = _cast(q, k, v)
    out, final, _ = call(
        operators.attention,
        q, k, v, None, None, None, None, None, segment_ids, *_weights(q, q_scale, k_scale), memory,
        initial_state, window, None, feature_map, 1e-6, "linear", reduced,
    )  # fmt: skip
    return out, final


def rms_mix(
    swa: Tensor, rla: Tensor, swa_weight: Tensor, rla_weight: Tensor, *, eps: float, reduced: bool = False
) -> tuple[Tensor]:
    _check(swa, rla)
    return (call(operators.rms_mix, swa, rla, swa_weight, rla_weight, eps),)


def rattention(
    q: Tensor, k: Tensor, v: Tensor, swa_weight: Tensor, rla_weight: Tensor, *, rope_cos: Tensor | None = None,
    rope_sin: Tensor | None = None, positions: Tensor | None = None, segment_ids: Tensor | None = None,
    q_scale: Tensor | None = None, k_scale: Tensor | None = None, memory: Tensor | None = None,
    initial_state: Tensor | None = None, window: int | None, scale: float | None, feature_map: str, eps: float,
    reduced: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _check(q, k, v)
    q, k, v = _cast(q, k, v)
    swa_weight, rla_weight, rope_cos, rope_sin, q_scale, k_scale = _weights(
        q, swa_weight, rla_weight, rope_cos, rope_sin, q_scale, k_scale
    )
    out, final, _ = call(
        operators.attention,
        q, k, v, swa_weight, rla_weight, rope_cos, rope_sin, positions, segment_ids, q_scale, k_scale, memory,
        initial_state, window, scale, feature_map, eps, "mix", reduced,
    )  # fmt: skip
    return out, final


def rattention_extend(
    q: Tensor, k: Tensor, v: Tensor, swa_weight: Tensor, rla_weight: Tensor, cache_k: Tensor, cache_v: Tensor,
    cache_state: Tensor, cache_length: Tensor, *, lengths: Tensor | None = None, rope_cos: Tensor | None = None,
    rope_sin: Tensor | None = None, q_scale: Tensor | None = None, k_scale: Tensor | None = None,
    memory: Tensor | None = None, window: int | None, scale: float | None, feature_map: str, eps: float,
    reduced: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    _check(q, k, v)
    q, k, v, cache_k, cache_v = _cast(q, k, v, cache_k, cache_v)
    swa_weight, rla_weight, rope_cos, rope_sin, q_scale, k_scale = _weights(
        q, swa_weight, rla_weight, rope_cos, rope_sin, q_scale, k_scale
    )
    return call(
        operators.extend,
        q, k, v, swa_weight, rla_weight, cache_k, cache_v, cache_state, cache_length, lengths, rope_cos, rope_sin,
        q_scale, k_scale, memory, window, scale, feature_map, eps, reduced,
    )  # fmt: skip


operations: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    f.__name__: f
    for f in (
        feature_map,
        rope_table,
        sliding_window_attention,
        residual_linear_attention,
        rms_mix,
        rattention,
        rattention_extend,
    )
}
