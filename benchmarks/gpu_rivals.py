"""What the fused kernels are timed against: FlexAttention, scaled_dot_product_attention, the unfused compositions.

The unfused compositions make the two branches apart and join them with eager norms:

    unfused         FlexAttention 512, features in eager PyTorch, a chunked linear-attention kernel on those features:
                    our own linear branch with the identity map
    unfused, fla    the same with the kernel of flash-linear-attention, where its wheel is installed
    two kernels     FlexAttention 512, our own linear branch with the feature map inside: only the branches unfused
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from gpu_device import DEVICE, DRY, SHAPE
from rattention.torch.triton import operations
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK = 128


def block_mask(total: int, T: int, device: torch.device = DEVICE, block: int = BLOCK) -> BlockMask:
    """Causal window of `total` tokens, the own one included, from arithmetic: no mask of T x T is ever made."""

    def inside(b: Any, h: Any, q: Any, kv: Any) -> Any:
        return (q >= kv) & (q - kv < total)

    n = -(-T // block)
    i, j = torch.arange(n, device=device)[:, None], torch.arange(n, device=device)[None, :]
    nearest, farthest = (i - j - 1) * block + 1, (i - j + 1) * block - 1
    some = (farthest >= 0) & (nearest < total)
    whole = (nearest >= 0) & (farthest < total)

    def listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
        order = torch.argsort(chosen.to(torch.int8), dim=1, descending=True, stable=True)
        return chosen.sum(1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None]

    return BlockMask.from_kv_blocks(
        *listed(some & ~whole), *listed(whole), BLOCK_SIZE=block, mask_mod=inside, seq_lengths=(T, T)
    )


@cache
def compiled_flex() -> Callable[..., Any]:
    if DRY:
        return flex_attention
    torch._dynamo.config.recompile_limit = 64  # one graph per window, length and gradient mode; 8 by default
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


@cache
def flex(total: int, T: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """FlexAttention on [B, H, T, D] with a window of `total` tokens."""
    mask, run = block_mask(total, T), compiled_flex()
    return lambda q, k, v: run(q, k, v, block_mask=mask, enable_gqa=True)


def full_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def features(x: Tensor, scale: Tensor) -> Tensor:
    y = x.float() * scale
    return torch.cat((y.softmax(-1), (-y).softmax(-1)), -1).to(x.dtype)


def rms(x: Tensor, weight: Tensor) -> Tensor:
    y = x.float()
    return weight * (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6))


def own_linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return operations["residual_linear_attention"](q, k, v, window=-1, feature_map="identity")[0]


def fla_linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from fla.ops.linear_attn import chunk_linear_attn  # pyright: ignore[reportMissingImports]

    G = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(G, 2), v.repeat_interleave(G, 2)
    return chunk_linear_attn(q, k, v, scale=1.0, normalize=False)[0]


def late(x: Tensor) -> Tensor:
    """The residue starts window + 1 tokens late: `x` moved by as much along T, zeros before."""
    shift = SHAPE.window + 1
    return torch.nn.functional.pad(x[:, :-shift], (0, 0, 0, 0, shift, 0))


def windowed(x: dict[str, Tensor], T: int) -> Tensor:
    q, k, v = (x[n].transpose(1, 2) for n in "qkv")
    return flex(SHAPE.window + 1, T)(q, k, v).transpose(1, 2)


def joined(swa: Tensor, rla: Tensor, x: dict[str, Tensor]) -> Tensor:
    return (rms(swa, x["swa_weight"]) + rms(rla, x["rla_weight"])).to(x["q"].dtype)


def unfused(x: dict[str, Tensor], T: int, linear: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    fq, fk = features(x["q"], x["q_scale"]), features(x["k"], x["k_scale"])
    return joined(windowed(x, T), linear(fq, late(fk), late(x["v"])), x)


def two_kernels(x: dict[str, Tensor], T: int) -> Tensor:
    extra = {n: x[n] for n in ("q", "k", "v", "q_scale", "k_scale")}
    rla, _ = operations["residual_linear_attention"](**extra, window=SHAPE.window, feature_map="softmax")
    return joined(windowed(x, T), rla, x)


def compositions(T: int) -> dict[str, Callable[[dict[str, Tensor]], Tensor]]:
    """name -> function of the inputs of `rattention`, rotary tables aside."""
    found: dict[str, Callable[[dict[str, Tensor]], Tensor]] = {
        "unfused": lambda x: unfused(x, T, own_linear),
        "two kernels": lambda x: two_kernels(x, T),
    }
    if importlib.util.find_spec("fla") is not None:
        found["unfused, fla"] = lambda x: unfused(x, T, fla_linear)
    return found
