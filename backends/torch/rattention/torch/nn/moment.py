"""When a cache was made, and where it may therefore be written to.

An object that is updated in place survives the pass or transformation in which it is updated. What is right for values
that are passed on can then be wrong without a word: a second run of the same code, or a tensor of `vmap` outside of it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from rattention.spec import Unsupported
from torch import Tensor
from torch._C._functorch import (
    get_unwrapped,
    is_batchedtensor,
    is_functorch_wrapped_tensor,
    maybe_current_level,
    maybe_get_level,
)


class Moment:
    """The backward pass and the transformations that are at work when this object is made."""

    def __init__(self):
        self._backward, self._level = _backward(), _level()

    def refuse_backward(self) -> None:
        """Refuse a write, or a read of what has changed, inside of a backward pass that is not the one of this moment.

        A compiled graph cannot ask where it runs. There the check is left out.
        """
        if _backward() not in (-1, self._backward):
            raise Unsupported(
                "RAttention: cache: a call inside of a backward pass, as activation checkpointing makes it to run the "
                "forward pass again. The cache has moved on since, so gradients would be wrong. Make the cache inside "
                "of the function that is checkpointed, or use it outside alone and hand in what its tensors were"
            )

    def refuse_batched(self, tensors: Iterable[Tensor]) -> None:
        """Refuse tensors with an axis of a `vmap` that began after this moment."""
        if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
            return
        if any(self._is_batched_later(t) for t in tensors):
            raise Unsupported(
                "RAttention: cache: made outside of torch.func.vmap and updated inside, where its tensors have one "
                "more axis. Make the cache inside of the function that vmap maps, or use the functional "
                "rattention_extend, which returns the cache"
            )

    def _is_batched_later(self, t: Tensor) -> bool:
        while is_functorch_wrapped_tensor(t):
            if is_batchedtensor(t) and maybe_get_level(t) > self._level:
                return True
            t = get_unwrapped(t)
        return False


def _backward() -> int:
    """Which backward pass this code runs in; -1 for none."""
    return -1 if torch.compiler.is_compiling() else torch._C._current_graph_task_id()


def _level() -> int:
    """How many transformations of `torch.func` are at work."""
    return 0 if torch.compiler.is_compiling() else maybe_current_level() or 0
