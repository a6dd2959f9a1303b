"""vmap for the eager kernels: their first axis is a batch of heads, so one more axis merges into it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def merge_into_heads(op: Callable[..., Any]) -> Callable[..., Any]:
    """The vmap rule for `op`, every tensor of which starts with N. Arguments without the axis are broadcast."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        size = info.batch_size

        def merge(x: Any, dim: int | None) -> Any:
            if not isinstance(x, Tensor):
                return x
            return (x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)

        def split(x: Tensor) -> Tensor:
            return x.unflatten(0, (size, x.shape[0] // max(size, 1)))

        out = op(*(merge(x, d) for x, d in zip(args, in_dims, strict=True)))
        return (split(out), 0) if isinstance(out, Tensor) else (tuple(map(split, out)), (0,) * len(out))

    return rule
