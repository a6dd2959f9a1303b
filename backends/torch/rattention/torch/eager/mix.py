"""The RMS norms of both branches and their weighted sum, a chunk of tokens at a time (MIX-1 .. MIX-3).

    out = swa_weight * n(swa) + rla_weight * n(rla),  n(x) = x r(x),  r(x) = 1 / sqrt(mean(x^2) + eps)

Backward, with g = weight * d_out and m = mean(g * n(x)):  dx = r (g - n(x) m),  d_weight = sum of d_out * n(x).
A row of zeros has r = 1 / sqrt(eps): finite, and so are its gradients.
"""

from __future__ import annotations

import torch
from rattention.torch.eager import composed
from rattention.torch.eager.batching import merge_into_batch
from rattention.torch.eager.chunks import TILE, spans
from rattention.torch.eager.kernel import Kernel
from rattention.torch.tangents import refuse_tangents
from torch import Tensor


def mix(swa: Tensor, rla: Tensor, swa_weight: Tensor, rla_weight: Tensor, eps: float) -> Tensor:
    """`swa`, `rla` `[B, T, Hq, Dv]` and weights `[Hq, Dv]`, one dtype -> `[B, T, Hq, Dv]`, differentiable in all."""
    batch = (swa.shape[0], *swa_weight.shape)
    return _KERNEL(swa, rla, swa_weight.expand(batch), rla_weight.expand(batch), eps)


def _chunks(x: Tensor):
    """Chunks of one batch row that leave room for a few temporaries in the cache of a core."""
    step = max(1, TILE // 4 // max(x.shape[2] * x.shape[3], 1))
    for b in range(x.shape[0]):
        for t0, t1 in spans(0, x.shape[1], step):
            yield b, slice(t0, t1)


def _norm(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """n(x) and r(x)."""
    r = torch.rsqrt(x.square().mean(-1, keepdim=True).add_(eps))
    return x * r, r


def fill_mix(out: Tensor, swa: Tensor, rla: Tensor, swa_weight: Tensor, rla_weight: Tensor, eps: float) -> None:
    """Write the mix into `out [B, T, Hq, Dv]`; weights `[B, Hq, Dv]`."""
    for b, t in _chunks(swa):
        s, r = _norm(swa[b, t], eps)[0], _norm(rla[b, t], eps)[0]
        torch.mul(s, swa_weight[b], out=out[b, t])
        out[b, t].addcmul_(r, rla_weight[b])


@torch.library.custom_op("rattention::mix_forward", mutates_args=())
def mix_forward(swa: Tensor, rla: Tensor, swa_weight: Tensor, rla_weight: Tensor, eps: float) -> Tensor:
    refuse_tangents()
    out = swa.new_empty(swa.shape)
    fill_mix(out, swa, rla, swa_weight, rla_weight, eps)
    return out


@mix_forward.register_fake
def _(swa, rla, swa_weight, rla_weight, eps):
    return swa.new_empty(swa.shape)


def fill_mix_backward(
    d_swa: Tensor,
    d_rla: Tensor,
    d_swa_weight: Tensor,
    d_rla_weight: Tensor,
    d_out: Tensor,
    swa: Tensor,
    rla: Tensor,
    swa_weight: Tensor,
    rla_weight: Tensor,
    eps: float,
) -> None:
    """Write the gradients of the branches and add those of the weights."""
    for b, t in _chunks(swa):
        d = d_out[b, t]
        for x, weight, d_x, d_weight in (
            (swa, swa_weight, d_swa, d_swa_weight),
            (rla, rla_weight, d_rla, d_rla_weight),
        ):
            n, r = _norm(x[b, t], eps)
            p = d * n
            d_weight[b] += p.sum(0)
            m = p.mul_(weight[b]).mean(-1, keepdim=True)
            torch.mul(d, weight[b], out=d_x[b, t])
            d_x[b, t].addcmul_(n, m, value=-1).mul_(r)


@torch.library.custom_op("rattention::mix_backward", mutates_args=())
def mix_backward(
    d_out: Tensor, swa: Tensor, rla: Tensor, swa_weight: Tensor, rla_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_swa, d_rla = swa.new_empty(swa.shape), rla.new_empty(rla.shape)
    d_weights = swa_weight.new_zeros(swa_weight.shape), rla_weight.new_zeros(rla_weight.shape)
    fill_mix_backward(d_swa, d_rla, *d_weights, d_out, swa, rla, swa_weight, rla_weight, eps)
    return d_swa, d_rla, *d_weights


@mix_backward.register_fake
def _(d_out, swa, rla, swa_weight, rla_weight, eps):
    return tuple(x.new_empty(x.shape) for x in (swa, rla, swa_weight, rla_weight))


mix_forward.register_vmap(merge_into_batch(mix_forward))
mix_backward.register_vmap(merge_into_batch(mix_backward))

_KERNEL = Kernel(
    mix_forward, mix_backward, lambda *args: (composed.mix(*args),), inputs=4, constants=0, outputs=1, attributes=1
)
