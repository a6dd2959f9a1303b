"""An eager kernel as a function that PyTorch can differentiate: once by its backward kernel, further by `composed`.

    outputs, kept = forward(inputs, constants, attributes)
    gradients of the inputs = backward(cotangents of the outputs, inputs, constants, kept, attributes)

Both kernels are `autograd.Function`s. The first calls the second in its backward pass; the second is differentiated
through `Kernel.composed`, which means the same as `forward` in PyTorch operations. So a first derivative costs what the
kernels cost, and second derivatives, Hessian products and forward mode are right on every route.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from rattention.torch.eager.chunks import full_precision
from rattention.torch.eager.derivatives import Function, pullback, pullback_of, pushforward
from rattention.torch.tangents import batched_gradients, nested_forward_mode
from torch import Tensor

Optional = Tensor | None


@dataclass(frozen=True)
class Kernel:
    """The parts of one kernel. Tensors come before attributes; None stands for a tensor that a call does not have.

    No tuple: `torch.func` would take it apart among the arguments.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    composed: Callable[..., tuple[Tensor, ...]]
    """The outputs from inputs, constants and attributes, all differentiable any number of times."""

    inputs: int
    """How many tensors have gradients; they are the first."""

    constants: int
    """How many tensors follow that have none."""

    outputs: int
    """How many outputs are differentiable; those behind them are what backward needs besides."""

    attributes: int
    """How many attributes the backward kernel takes, from the first."""

    def __call__(self, *args: Any) -> Any:
        if nested_forward_mode():  # PyTorch drops the outer tangents of every autograd.Function, without a word
            tensors = self.inputs + self.constants
            attributes = args[tensors : tensors + self.attributes]
            with self.precision(args[0], attributes):
                outputs = self.composed(*args[:tensors], *attributes)
            return outputs[0] if len(outputs) == 1 else outputs
        return _Forward.apply(self, *args)  # pyright: ignore[reportAbstractUsage]

    def of_inputs(self, constants: tuple[Any, ...], attributes: tuple[Any, ...]) -> Function:
        """`composed` as a function of the differentiable inputs alone."""
        return lambda *inputs: self.composed(*inputs, *constants, *attributes)

    def precision(self, like: Tensor, attributes: tuple[Any, ...]) -> AbstractContextManager[None]:
        """That of the kernels: the last attribute of a kernel with matrix products is `reduced`."""
        return full_precision(like.device, attributes[-1] is True)


class _Forward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(kernel: Kernel, *args: Any) -> Any:
        return kernel.forward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        kernel, *args = inputs
        outputs = (output,) if isinstance(output, Tensor) else output
        tensors = kernel.inputs + kernel.constants
        # What is kept for backward is not marked as not differentiable: vmap loses the marks, and then forward mode
        # fails. Nobody else sees those outputs, and jvp below gives them zeros.
        ctx.set_materialize_grads(False)  # zeros for what backward keeps would be as much memory again
        saved = (*args[:tensors], *outputs[kernel.outputs :])
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)  # the same: the rule that vmap generates keeps one list of batched axes for both
        ctx.kernel, ctx.given = kernel, len(args)
        ctx.attributes = tuple(args[tensors : tensors + kernel.attributes])
        ctx.shapes = [x.shape for x in outputs[: kernel.outputs]]

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        kernel, saved = ctx.kernel, ctx.saved_tensors  # once: activation checkpointing unpacks each tensor once
        filled = [
            saved[0].new_zeros(shape) if d is None else d for d, shape in zip(cotangents, ctx.shapes, strict=False)
        ]
        if torch.is_grad_enabled() and batched_gradients(filled):
            # What an autograd.Function returns here has no history once PyTorch takes the batch apart.
            f = kernel.of_inputs(saved[kernel.inputs : kernel.inputs + kernel.constants], ctx.attributes)
            with kernel.precision(saved[0], ctx.attributes):
                grads = pullback(f, saved[: kernel.inputs], filled)
        else:
            grads = _Backward.apply(kernel, *filled, *saved, *ctx.attributes)  # pyright: ignore[reportAbstractUsage]
        named = (None if x is None else g for x, g in zip(saved[: kernel.inputs], grads, strict=True))
        return (None, *named, *(None,) * (ctx.given - kernel.inputs))

    @staticmethod
    def jvp(ctx: Any, _: Any, *tangents: Any) -> Any:
        kernel, saved = ctx.kernel, ctx.saved_tensors
        f = kernel.of_inputs(saved[kernel.inputs : kernel.inputs + kernel.constants], ctx.attributes)
        with kernel.precision(saved[0], ctx.attributes):
            found = pushforward(f, saved[: kernel.inputs], tangents[: kernel.inputs])
        kept = (torch.zeros_like(x) for x in saved[kernel.inputs + kernel.constants :])
        return found[0] if len(saved) == kernel.inputs + kernel.constants and len(found) == 1 else (*found, *kept)


class _Backward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(kernel: Kernel, *args: Any) -> Any:
        return kernel.backward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        kernel, *args = inputs
        tensors = args[: len(args) - kernel.attributes]
        ctx.there = [x is not None for x in tensors[kernel.outputs : kernel.outputs + kernel.inputs]]
        ctx.shapes = [x.shape for x in output]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.kernel, ctx.attributes, ctx.given = kernel, tuple(args[len(tensors) :]), len(args)

    @staticmethod
    def _first(ctx: Any) -> tuple[Function, tuple[Optional, ...]]:
        """The gradient as a function of cotangents and inputs, and their values. What backward keeps follows from the
        inputs, so it is computed again and has no derivative of its own."""
        kernel, saved = ctx.kernel, ctx.saved_tensors  # once: activation checkpointing unpacks each tensor once
        count = kernel.outputs + kernel.inputs
        f = kernel.of_inputs(saved[count : count + kernel.constants], ctx.attributes)
        return pullback_of(f, kernel.outputs), saved[:count]

    @staticmethod
    def backward(ctx: Any, *directions: Any) -> Any:
        first, primals = _Backward._first(ctx)
        given = [d for d, there in zip(directions, ctx.there, strict=True) if there]
        with ctx.kernel.precision(primals[0], ctx.attributes):
            found = pullback(first, primals, given)
        return (None, *found, *(None,) * (ctx.given - len(found)))

    @staticmethod
    def jvp(ctx: Any, _: Any, *tangents: Any) -> Any:
        first, primals = _Backward._first(ctx)
        with ctx.kernel.precision(primals[0], ctx.attributes):
            found = iter(pushforward(first, primals, tangents[: len(primals)]))
        cotangent = primals[0]
        assert cotangent is not None
        pairs = zip(ctx.there, ctx.shapes, strict=True)
        return tuple(next(found) if there else cotangent.new_zeros(shape) for there, shape in pairs)
