"""What the eager kernels share: blocks of heads, rows of a tile, and the vmap rule.

Kernels read queries in the public layout `[B, T, Hq, D]` and keys and values as `[B, Hkv, J, D]`. A tile takes one
chunk of tokens and one block of heads as `[n, C*G, D]`: n flat key/value heads, and for each the C tokens x G query
heads of its group as rows, so keys and values are never repeated (SWA-4, RLA-8).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from rattention.torch.eager.chunks import spans
from torch import Tensor


class Block(NamedTuple):
    """Batch rows `b` and key/value heads `h`: all heads of some rows, or some heads of one row."""

    b: slice
    h: slice


def blocks(B: int, Hkv: int, heads: int) -> Iterator[Block]:
    """Cover B x Hkv with blocks of about `heads` flat heads."""
    for b0, b1 in spans(0, B, max(heads // Hkv, 1)):
        for h0, h1 in spans(0, Hkv, min(heads, Hkv)):
            yield Block(slice(b0, b1), slice(h0, h1))


def of_heads(x: Tensor, at: Block, t: slice, G: int) -> Tensor:
    """The tokens `t` of a block of `x [B, T, Hq, D]`, as a view `[b, C, h, G, D]`."""
    part = x[at.b, t, at.h.start * G : at.h.stop * G]
    return part.unflatten(2, (at.h.stop - at.h.start, G))


def rows(x: Tensor, at: Block, t: slice, G: int) -> Tensor:
    """The tokens `t` of a block of `x [B, T, Hq, D]`, as rows `[n, C*G, D]`."""
    return as_rows(of_heads(x, at, t, G))


def as_rows(part: Tensor) -> Tensor:
    """`[b, C, h, G, D]` -> `[n, C*G, D]`."""
    b, C, h, G, D = part.shape
    return part.transpose(1, 2).reshape(b * h, C * G, D)


def put_rows(out: Tensor, value: Tensor, at: Block, t: slice, G: int) -> None:
    """Write rows `[n, C*G, D]` to their place in `out [B, T, Hq, D]`."""
    part = of_heads(out, at, t, G).transpose(1, 2)
    part.copy_(value.view(part.shape))


def flat(x: Tensor, at: Block, j: slice | int) -> Tensor:
    """Keys `j` of a block of the contiguous `x [B, Hkv, J, ...]`, as a view `[n, L, ...]`."""
    return x[at.b, at.h, j].flatten(0, 1)


def merge_into_batch(op: Callable[..., Any]) -> Callable[..., Any]:
    """The vmap rule for `op`, every tensor of which starts with B: one more axis merges into it."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        size = info.batch_size
        if size == 0:  # one element of zeros says what shapes there are none of
            pairs = zip(args, in_dims, strict=True)
            one = op(*(x if d is None else x.new_zeros(x.movedim(d, 0).shape[1:]) for x, d in pairs))
            if isinstance(one, Tensor):
                return one.new_empty((0, *one.shape)), 0
            return tuple(x.new_empty((0, *x.shape)) for x in one), (0,) * len(one)

        def merge(x: Any, dim: int | None) -> Any:
            if not isinstance(x, Tensor):
                return x
            return (x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)

        def split(x: Tensor) -> Tensor:
            return x.unflatten(0, (size, x.shape[0] // size))

        out = op(*(merge(x, d) for x, d in zip(args, in_dims, strict=True)))
        return (split(out), 0) if isinstance(out, Tensor) else (tuple(map(split, out)), (0,) * len(out))

    return rule
