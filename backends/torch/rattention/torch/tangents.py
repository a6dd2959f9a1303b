"""PyTorch's forward mode, where an operator of ours would drop the tangents without a word."""

from __future__ import annotations

import torch
from rattention.spec import Unsupported
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
