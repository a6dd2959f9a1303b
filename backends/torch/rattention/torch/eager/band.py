"""Softmax attention over a band: each query sees the last `window` + 1 keys (SWA-1 .. SWA-6).

Heads are flat: N = B * Hkv, and the G query heads of a group are rows of one tile, so keys and values are never
repeated. Query i of `q [N, T, G, D]` sits at key `P + i` of `k [N, P + T, D]`: P keys come before the first query (the
cache). Forward, per chunk of C queries: scores of `C*G` rows against the `C + window` keys in reach, mask, softmax,
product with the values. Backward does the same again and keeps nothing but inputs: memory is linear in T.

Groups separate documents: query i sees key j only where `group_q[n, i] == group_k[n, j]`. Callers give padding tokens
a group of their own and zeros for contents, so that every row sees at least itself and softmax never sees an empty row.
"""

from __future__ import annotations

from typing import Any

import torch
from rattention.torch.eager.batching import merge_into_heads
from rattention.torch.eager.chunks import band_chunk, full_precision, heads_at_once, spans
from torch import Tensor

NEG_INF = float("-inf")


def band_attention(
    q: Tensor, k: Tensor, v: Tensor, group_q: Tensor | None, group_k: Tensor | None, window: int, reduced: bool = False
) -> Tensor:
    """Softmax over the band, differentiable in q, k and v.

    Args:
        q: `[N, T, G, D]`, scaled already. k: `[N, P + T, D]`. v: `[N, P + T, Dv]`. One dtype.
        group_q, group_k: `[N, T]` and `[N, P + T]` integers, both or neither.
        window: tokens seen before the own one; -1 gives exact zeros.
        reduced: float32 products may use the reduced precision that PyTorch is set to.

    Returns:
        `[N, T, G, Dv]`.
    """
    return _Band.apply(q, k, v, group_q, group_k, window, reduced)  # pyright: ignore[reportReturnType]


class _Band(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Tensor:
        return band_forward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:5])
        ctx.window, ctx.reduced = inputs[5:]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return (*band_backward(d_out, *ctx.saved_tensors, ctx.window, ctx.reduced), None, None, None, None)


class _Tiles:
    """The walk over chunks: for each, the query rows, the keys in reach, and the mask between them."""

    def __init__(self, q: Tensor, k: Tensor, group_q: Tensor | None, group_k: Tensor | None, window: int):
        self.N, self.T, self.G, _ = q.shape
        self.P = k.shape[1] - self.T
        self.window = min(window, k.shape[1])
        self.group_q, self.group_k = group_q, group_k
        self.chunk = min(band_chunk(self.G, self.window), max(self.T, 1))
        self.reach = min(self.chunk + self.window, k.shape[1])
        self.heads = heads_at_once(self.N, self.chunk * self.G * self.reach)
        steps = torch.arange(self.chunk + 1, device=q.device)
        # Row r, column c of a square tile: below the diagonal a key has left the window, above it is to come.
        self.gone = steps[:, None] > steps
        self.to_come = steps[:, None] < steps

    def __iter__(self):
        for n0, n1 in spans(0, self.N, self.heads):
            for t0, t1 in spans(0, self.T, self.chunk):
                yield slice(n0, n1), slice(t0, t1), slice(max(0, self.P + t0 - self.window), self.P + t1)

    def buffer(self, like: Tensor) -> Tensor:
        return like.new_empty(self.heads * self.chunk * self.G * self.reach)

    def view(self, buffer: Tensor, n: slice, t: slice, j: slice) -> Tensor:
        shape = (n.stop - n.start, (t.stop - t.start) * self.G, j.stop - j.start)
        return buffer[: shape[0] * shape[1] * shape[2]].view(shape)

    def mask(self, scores: Tensor, n: slice, t: slice, j: slice) -> None:
        """Put -inf where row and column do not see each other. Whole tiles inside the window need no mask."""
        C, L = t.stop - t.start, j.stop - j.start
        tile = scores.view(scores.shape[0], C, self.G, L)
        own = self.P + t.start - j.start  # column of the first query's own key
        late = L - own - 1  # columns past it
        if late > 0:
            tile[..., own + 1 :].masked_fill_(self.to_come[:C, None, 1 : late + 1], NEG_INF)
        first = own - self.window  # column where the first row's window begins; negative where keys run out
        width = first + C - 1
        if width > 0:
            tile[..., :width].masked_fill_(self.gone[:C, None, -first : width - first], NEG_INF)
        if self.group_q is not None and self.group_k is not None:
            apart = self.group_q[n, t, None] != self.group_k[n, None, j]
            tile.masked_fill_(apart[:, :, None], NEG_INF)


@torch.library.custom_op("rattention::band_forward", mutates_args=())
def band_forward(
    q: Tensor, k: Tensor, v: Tensor, group_q: Tensor | None, group_k: Tensor | None, window: int, reduced: bool
) -> Tensor:
    N, T, G, D = q.shape
    Dv = v.shape[-1]
    if window < 0:
        return q.new_zeros(N, T, G, Dv)
    tiles = _Tiles(q, k, group_q, group_k, window)
    rows, out = q.reshape(N, T * G, D), q.new_empty(N, T * G, Dv)
    scores, weights = tiles.buffer(q), tiles.buffer(q)
    with full_precision(q.device, reduced):
        for n, t, j in tiles:
            r = slice(t.start * G, t.stop * G)
            s, p = tiles.view(scores, n, t, j), tiles.view(weights, n, t, j)
            torch.bmm(rows[n, r], k[n, j].transpose(1, 2), out=s)
            tiles.mask(s, n, t, j)
            torch.softmax(s, -1, out=p)
            out[n, r] = torch.bmm(p, v[n, j])
    return out.view(N, T, G, Dv)


@band_forward.register_fake
def _(q, k, v, group_q, group_k, window, reduced):
    return q.new_empty(*q.shape[:3], v.shape[-1])


@torch.library.custom_op("rattention::band_backward", mutates_args=())
def band_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group_q: Tensor | None,
    group_k: Tensor | None,
    window: int,
    reduced: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    N, T, G, D = q.shape
    Dv = v.shape[-1]
    d_q, d_k, d_v = q.new_zeros(N, T * G, D), k.new_zeros(k.shape), v.new_zeros(v.shape)
    if window < 0:
        return d_q.view(N, T, G, D), d_k, d_v
    tiles = _Tiles(q, k, group_q, group_k, window)
    rows, d_rows = q.reshape(N, T * G, D), d_out.reshape(N, T * G, Dv)
    scores, weights, d_scores = tiles.buffer(q), tiles.buffer(q), tiles.buffer(q)
    with full_precision(q.device, reduced):
        for n, t, j in tiles:
            r = slice(t.start * G, t.stop * G)
            s, p = tiles.view(scores, n, t, j), tiles.view(weights, n, t, j)
            torch.bmm(rows[n, r], k[n, j].transpose(1, 2), out=s)
            tiles.mask(s, n, t, j)
            torch.softmax(s, -1, out=p)
            d_v[n, j].baddbmm_(p.transpose(1, 2), d_rows[n, r])
            d_p, d_s = torch.bmm(d_rows[n, r], v[n, j].transpose(1, 2), out=s), tiles.view(d_scores, n, t, j)
            torch.ops.aten._softmax_backward_data.out(d_p, p, -1, p.dtype, grad_input=d_s)
            d_q[n, r] = torch.bmm(d_s, k[n, j])
            d_k[n, j].baddbmm_(d_s.transpose(1, 2), rows[n, r])
    return d_q.view(N, T, G, D), d_k, d_v


@band_backward.register_fake
def _(d_out, q, k, v, group_q, group_k, window, reduced):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


band_forward.register_vmap(merge_into_heads(band_forward))
band_backward.register_vmap(merge_into_heads(band_backward))
