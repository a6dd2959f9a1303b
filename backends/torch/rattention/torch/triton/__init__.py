"""The fused Triton kernels: one pass over keys and values for both branches, both norms and the mix.

`operations` has every operation of the specification under its name, with the tensors and attributes of
operations.toml by keyword and all outputs as a tuple, differentiable by autograd. They run on CUDA and ROCm tensors,
and, where the environment variable TRITON_INTERPRET is 1 when this package is first imported, on CPU tensors through
Triton's interpreter. Anything else is refused with `Unsupported`.

    tiles, rotary, features     device functions shared by all kernels
    states                      phase one: states at chunk borders
    attention                   phase two: the fused output kernel
    query_grad, key_grad        the backward pass
    decode, ring                one token at a time
    plan, forward, backward, continuation       the order in which kernels run
    config, launch, aot         frozen configurations, the record of launches, ahead-of-time compilation
    operators                   torch.library operators
"""

from rattention.torch.triton.operations import KERNELS, available, operations
from rattention.torch.triton.ring import Ring, step

__all__ = ["KERNELS", "Ring", "available", "operations", "step"]
