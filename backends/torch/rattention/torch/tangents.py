"""What PyTorch is doing around a call, where an operator of ours would lose derivatives without a word."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rattention.spec import Unsupported
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack, is_legacy_batchedtensor
from torch.autograd import forward_ad


def forward_mode() -> bool:
    """Whether forward mode is at work around the call, and nobody has taken the tangents off its tensors."""
    return forward_ad._current_level >= 0 and torch._C._is_fwd_grad_enabled()


def refuse_tangents() -> None:
    """For the body of an operator. It runs below autograd, where a tangent cannot even be looked for.

    An `autograd.Function` around the operator takes the tangents off and has a rule for them. So forward mode arrives
    here only where there is no such function: in a graph that was compiled before.

    Raises:
        Unsupported: forward mode is at work.
    """
    if forward_mode():
        raise Unsupported("forward mode through a compiled graph: call the function without torch.compile")


@torch.compiler.assume_constant_result
def nested_forward_mode() -> bool:
    """Whether forward mode is at work inside of forward mode: jvp of jvp, or jvp below a dual level.

    A graph that is compiled asks while it is traced; PyTorch guards it by the transformations it was traced under.
    """
    stack = get_interpreter_stack() or ()
    return sum(level.key() == TransformType.Jvp for level in stack) > 1


def batched_gradients(cotangents: Sequence[Tensor]) -> bool:
    """Whether one backward pass serves a batch of cotangents: `is_grads_batched`, or `vectorize` of a Jacobian."""
    return not torch.compiler.is_compiling() and any(map(is_legacy_batchedtensor, cotangents))
