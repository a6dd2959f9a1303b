"""The operators under autograd and under `torch.func`: first derivatives, batches, and a refusal of what is beyond.

`torch.library` gives an operator a gradient, but not one that `torch.func` can use. So where a transformation of
`torch.func` is at work, an operator is called through an `autograd.Function` with the same rules. Elsewhere, and in a
graph that is compiled or exported, it is called as it is.

The kernels have no second derivative and no forward mode. Every route to one ends in `Unsupported`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from rattention.spec import Unsupported
from rattention.torch.tangents import forward_mode
from torch import Tensor

Operator = Any
"""What `torch.library.custom_op` makes."""


class _Rules(NamedTuple):
    setup: Callable[..., None]
    backward: Callable[..., Any]


_RULES: dict[Operator, _Rules] = {}
"""Registry of the operators, filled while `operators` is imported."""


def differentiable(operator: Operator, backward: Callable[..., Any], setup: Callable[..., None]) -> None:
    """Register the gradient of an operator, and that it runs once for each element of an axis of vmap."""
    operator.register_autograd(backward, setup_context=setup)
    operator.register_vmap(_one_by_one(operator))
    _RULES[operator] = _Rules(setup, backward)


def once_differentiable(operator: Operator) -> None:
    """Register an operator that computes gradients and has none itself."""
    differentiable(operator, _refuse_second, lambda ctx, inputs, output: None)


def call(operator: Operator, *args: Any) -> Any:
    """The operator on `args`, differentiable under autograd and `torch.func` alike."""
    # A graph holds the operator itself: torch.compile and torch.export bring their own autograd. Forward mode takes the
    # other way too, because `torch.library` would drop the tangents without a word.
    if torch.compiler.is_dynamo_compiling() or not (torch._C._are_functorch_transforms_active() or forward_mode()):
        return operator(*args)
    return _Transformed.apply(operator, *args)  # pyright: ignore[reportAbstractUsage]


class _Transformed(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(operator: Operator, *args: Any) -> Any:
        return operator(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.operator = inputs[0]
        _RULES[ctx.operator].setup(ctx, inputs[1:], output)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        return (None, *_RULES[ctx.operator].backward(ctx, *cotangents))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise Unsupported("the Triton kernels have no forward mode; impl='eager' has")


def _refuse_second(ctx: Any, *cotangents: Any) -> Any:
    raise Unsupported("the Triton kernels have no second derivative; impl='eager' has")


def _one_by_one(operator: Operator) -> Callable[..., Any]:
    """The vmap rule: one launch for each element. Weights may differ from element to element, so the axis cannot simply
    join the batch of the kernel."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        pairs = list(zip(args, in_dims, strict=True))
        if info.batch_size == 0:  # one element of zeros says what shapes there are none of
            outs = [operator(*(x if d is None else x.new_zeros(_without(x.shape, d)) for x, d in pairs))]
        else:
            outs = [operator(*(x if d is None else x.select(d, i) for x, d in pairs)) for i in range(info.batch_size)]
        if isinstance(outs[0], Tensor):
            return torch.stack(outs)[: info.batch_size], 0
        return tuple(torch.stack(x)[: info.batch_size] for x in zip(*outs, strict=True)), (0,) * len(outs[0])

    return rule


def _without(shape: torch.Size, dim: int) -> list[int]:
    return [n for i, n in enumerate(shape) if i != dim]
