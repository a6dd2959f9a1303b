"""Softmax attention over a band: each query sees the last `window` + 1 keys (SWA-1 .. SWA-6).

Query i of `q [B, T, Hq, D]` sits at key `P + i` of `k [B, Hkv, P + T, D]`: P keys come before the first query (the
cache). Forward, per chunk of C queries: rotate and scale them, scores of `C*G` rows against the `C + window` keys in
reach, mask, softmax, product with the values. Backward does the same again and keeps nothing but inputs: memory is
linear in T, and all that is not input or output stays in the cache of a core.

Groups separate documents: query i sees key j only where `group_q[b, i] == group_k[b, j]`. Callers give padding tokens
a group of their own and zeros for contents, so that every row sees at least itself and softmax never sees an empty row.
"""

from __future__ import annotations

import torch
from rattention.torch.eager import composed
from rattention.torch.eager.batching import Block, as_rows, blocks, flat, merge_into_batch, of_heads, put_rows, rows
from rattention.torch.eager.chunks import band_chunk, full_precision, heads_at_once, spans
from rattention.torch.eager.kernel import Kernel
from rattention.torch.tangents import refuse_tangents
from torch import Tensor

NEG_INF = float("-inf")


def band_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    group_q: Tensor | None,
    group_k: Tensor | None,
    window: int,
    scale: float,
    reduced: bool = False,
) -> Tensor:
    """Softmax over the band, differentiable in q, k and v.

    Args:
        q: `[B, T, Hq, D]`, unrotated. k: `[B, Hkv, P + T, D]`, rotated. v: `[B, Hkv, P + T, Dv]`. One dtype.
        cos, sin: `[B, T, D/2]`, rotation of the queries; both or neither.
        group_q, group_k: `[B, T]` and `[B, P + T]` integers or bools, both or neither.
        window: tokens seen before the own one; -1 gives exact zeros.
        scale: factor on the scores.
        reduced: float32 products may use the reduced precision that PyTorch is set to.

    Returns:
        `[B, T, Hq, Dv]`.
    """
    return _KERNEL(q, k, v, cos, sin, group_q, group_k, window, scale, reduced)


class _Tiles:
    """The walk over chunks: for each, the query rows, the keys in reach, and the mask between them."""

    def __init__(self, q: Tensor, k: Tensor, group_q: Tensor | None, group_k: Tensor | None, window: int):
        self.B, self.T = q.shape[:2]
        self.Hkv, J = k.shape[1:3]
        self.G, self.P = q.shape[2] // self.Hkv, J - self.T
        self.window = min(window, J)
        self.group_q, self.group_k = group_q, group_k
        self.chunk = min(band_chunk(self.G, self.window), max(self.T, 1))
        self.reach = min(self.chunk + self.window, J)
        self.heads = heads_at_once(self.B * self.Hkv, self.chunk * self.G * self.reach)
        steps = torch.arange(self.chunk + 1, device=q.device)
        # Row r, column c of a square tile: below the diagonal a key has left the window, above it is to come.
        self.gone = steps[:, None] > steps
        self.to_come = steps[:, None] < steps

    def __iter__(self):
        for at in blocks(self.B, self.Hkv, self.heads):
            for t0, t1 in spans(0, self.T, self.chunk):
                yield at, slice(t0, t1), slice(max(0, self.P + t0 - self.window), self.P + t1)

    def buffer(self, like: Tensor) -> Tensor:
        return like.new_empty(self.heads * self.chunk * self.G * self.reach)

    def view(self, buffer: Tensor, at: Block, t: slice, j: slice) -> Tensor:
        n = (at.b.stop - at.b.start) * (at.h.stop - at.h.start)
        shape = (n, (t.stop - t.start) * self.G, j.stop - j.start)
        return buffer[: shape[0] * shape[1] * shape[2]].view(shape)

    def mask(self, scores: Tensor, at: Block, t: slice, j: slice) -> None:
        """Put -inf where row and column do not see each other. Columns that every row sees need no mask."""
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
            apart = self.group_q[at.b, t, None] != self.group_k[at.b, None, j]
            tile.unflatten(0, (apart.shape[0], -1)).masked_fill_(apart[:, None, :, None], NEG_INF)


def _queries(q: Tensor, cos: Tensor | None, sin: Tensor | None, scale: float, at: Block, t: slice, G: int) -> Tensor:
    """Rows of a chunk, rotated and scaled."""
    part = of_heads(q, at, t, G)
    if cos is not None and sin is not None:
        part = _turn(part, cos[at.b, t], sin[at.b, t])
    return as_rows(part) * scale


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `x [b, C, h, G, D]` by tables `[b, C, D/2]` (ROPE-3)."""
    cos, sin = cos[:, :, None, None], sin[:, :, None, None]
    one, two = x.chunk(2, -1)
    return torch.cat((one * cos - two * sin, two * cos + one * sin), -1)


def fill_band(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    group_q: Tensor | None,
    group_k: Tensor | None,
    window: int,
    scale: float,
    reduced: bool,
) -> None:
    """Write the forward pass into `out [B, T, Hq, Dv]`."""
    if window < 0:
        out.zero_()
        return
    tiles = _Tiles(q, k, group_q, group_k, window)
    scores, weights = tiles.buffer(q), tiles.buffer(q)
    with full_precision(q.device, reduced):
        for at, t, j in tiles:
            s, p = tiles.view(scores, at, t, j), tiles.view(weights, at, t, j)
            torch.bmm(_queries(q, cos, sin, scale, at, t, tiles.G), flat(k, at, j).transpose(1, 2), out=s)
            tiles.mask(s, at, t, j)
            torch.softmax(s, -1, out=p)
            put_rows(out, torch.bmm(p, flat(v, at, j)), at, t, tiles.G)


@torch.library.custom_op("rattention::band_forward", mutates_args=())
def band_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    group_q: Tensor | None,
    group_k: Tensor | None,
    window: int,
    scale: float,
    reduced: bool,
) -> Tensor:
    refuse_tangents()
    out = q.new_empty(*q.shape[:3], v.shape[3])
    fill_band(out, q, k, v, cos, sin, group_q, group_k, window, scale, reduced)
    return out


@band_forward.register_fake
def _(q, k, v, cos, sin, group_q, group_k, window, scale, reduced):
    return q.new_empty(*q.shape[:3], v.shape[3])


def fill_band_backward(
    d_q: Tensor,
    d_k: Tensor,
    d_v: Tensor,
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    group_q: Tensor | None,
    group_k: Tensor | None,
    window: int,
    scale: float,
    reduced: bool,
) -> None:
    """Write the gradient of q, and add those of k and v."""
    if window < 0:
        d_q.zero_()
        return
    tiles = _Tiles(q, k, group_q, group_k, window)
    scores, weights, d_scores = tiles.buffer(q), tiles.buffer(q), tiles.buffer(q)
    with full_precision(q.device, reduced):
        for at, t, j in tiles:
            s, p, d_s = (tiles.view(x, at, t, j) for x in (scores, weights, d_scores))
            x, y = flat(k, at, j), flat(v, at, j)
            queries, d_rows = _queries(q, cos, sin, scale, at, t, tiles.G), rows(d_out, at, t, tiles.G)
            torch.bmm(queries, x.transpose(1, 2), out=s)
            tiles.mask(s, at, t, j)
            torch.softmax(s, -1, out=p)
            flat(d_v, at, j).baddbmm_(p.transpose(1, 2), d_rows)
            d_p = torch.bmm(d_rows, y.transpose(1, 2), out=s)
            torch.ops.aten._softmax_backward_data.out(d_p, p, -1, p.dtype, grad_input=d_s)
            flat(d_k, at, j).baddbmm_(d_s.transpose(1, 2), queries)
            put_rows(d_q, torch.bmm(d_s, x).mul_(scale), at, t, tiles.G)
            if cos is not None and sin is not None:
                part = of_heads(d_q, at, t, tiles.G)
                part.copy_(_turn(part, cos[at.b, t], -sin[at.b, t]))


@torch.library.custom_op("rattention::band_backward", mutates_args=())
def band_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    group_q: Tensor | None,
    group_k: Tensor | None,
    window: int,
    scale: float,
    reduced: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    d_q, d_k, d_v = q.new_empty(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    fill_band_backward(d_q, d_k, d_v, d_out, q, k, v, cos, sin, group_q, group_k, window, scale, reduced)
    return d_q, d_k, d_v


@band_backward.register_fake
def _(d_out, q, k, v, cos, sin, group_q, group_k, window, scale, reduced):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


band_forward.register_vmap(merge_into_batch(band_forward))
band_backward.register_vmap(merge_into_batch(band_backward))

_KERNEL = Kernel(
    band_forward,
    band_backward,
    lambda *args: (composed.band(*args[:-1]),),
    inputs=3,
    constants=4,
    outputs=1,
    attributes=3,
)
