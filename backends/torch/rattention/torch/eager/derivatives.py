"""Derivatives of the eager kernels beyond the first, and forward mode.

A kernel is an `autograd.Function` whose backward pass is another kernel. That second kernel is an `autograd.Function`
too, and its own backward pass is here: it differentiates `composed`, the same mathematics in PyTorch operations. So a
first derivative costs what the kernels cost, a second derivative is right under every route (`create_graph`,
`torch.func`, gradient penalties), and so is every further one, because nothing in it is opaque.

Functions take and return tuples of tensors in which None stands for a tensor that the call does not have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Optional = Tensor | None
Function = Callable[..., tuple[Tensor, ...]]


def pullback(f: Function, primals: Sequence[Optional], cotangents: Sequence[Optional]) -> tuple[Optional, ...]:
    """Cotangents of the outputs of `f` at `primals`, pulled back to the primals. None for a primal that is None."""
    g, present = _present(f, primals)
    outputs, back = _vjp(g, *present)
    found = iter(back(_filled(cotangents, outputs)))
    return tuple(None if x is None else next(found) for x in primals)


def pushforward(f: Function, primals: Sequence[Optional], tangents: Sequence[Optional]) -> tuple[Tensor, ...]:
    """Tangents of the primals, pushed to the outputs of `f`.

    `f` is pulled back twice: the pullback is linear in the cotangents, and its own pullback is the pushforward. So
    this works wherever reverse mode does, inside a forward mode of the caller too.
    """
    g, present = _present(f, primals)
    outputs, back = _vjp(g, *present)
    _, forward = _vjp(lambda *d: back(d), *(torch.zeros_like(x) for x in outputs))
    return forward(_filled([t for x, t in zip(primals, tangents, strict=True) if x is not None], present))


def pullback_of(f: Function, outputs: int) -> Function:
    """The pullback of `f` as a function of its own: first the cotangents of the outputs, then the primals. It returns
    the gradients of the primals that are there."""
    return lambda *args: tuple(x for x in pullback(f, args[outputs:], args[:outputs]) if x is not None)


def _vjp(f: Function, *primals: Tensor) -> tuple[tuple[Tensor, ...], Callable[..., tuple[Tensor, ...]]]:
    if torch._C._are_functorch_transforms_active():
        outputs, back, *_ = torch.func.vjp(f, *primals)
        return outputs, back
    # Plain autograd where the caller uses plain autograd: torch.func refuses to work under the saved-tensor hooks of
    # activation checkpointing and save_on_cpu, and it cannot keep the graph of a batch of cotangents.
    further = torch.is_grad_enabled()
    with torch.enable_grad():
        inner = [x.view_as(x) if further and x.requires_grad else x.detach().requires_grad_() for x in primals]
        outputs = f(*inner)

    def back(cotangents: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        further = torch.is_grad_enabled()
        return torch.autograd.grad(
            outputs, inner, cotangents, retain_graph=True, create_graph=further, materialize_grads=True
        )

    return outputs, back


def _present(f: Function, primals: Sequence[Optional]) -> tuple[Function, list[Tensor]]:
    """`f` as a function of the primals that are there."""
    at = [i for i, x in enumerate(primals) if x is not None]

    def g(*given: Tensor) -> tuple[Tensor, ...]:
        every: list[Optional] = [None] * len(primals)
        for i, x in zip(at, given, strict=True):
            every[i] = x
        return f(*every)

    return g, [primals[i] for i in at]  # pyright: ignore[reportReturnType]


def _filled(given: Sequence[Optional], like: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Zeros where nothing is given: a cotangent or tangent that is absent is zero (GRAD-6)."""
    return tuple(torch.zeros_like(x) if t is None else t for t, x in zip(given, like, strict=True))
