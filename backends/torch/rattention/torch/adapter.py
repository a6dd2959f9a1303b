"""The conformance adapter of the eager form: NumPy in, NumPy out, on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import torch
from rattention.spec import Call, Result, load, validate
from rattention.torch.eager.operations import EAGER
from torch import Tensor

VERSION = "0.1.0"


def to_torch(x: np.ndarray) -> Tensor:
    """A tensor of the array's dtype in memory of its own (ERR-13)."""
    x = np.array(x, order="C")
    if x.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def to_numpy(x: Tensor) -> np.ndarray:
    """An array of the tensor's dtype in memory of its own."""
    x = x.detach().cpu().contiguous()
    if x.dtype == torch.bfloat16:
        return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16).copy()
    return x.numpy().copy()


def run_operations(
    functions: Mapping[str, Callable[..., tuple[Tensor, ...]]],
    call: Call,
    tensors: Mapping[str, Any],
    device: str = "cpu",
) -> dict[str, np.ndarray]:
    """Run a validated call, or its transposed derivative through autograd, with an implementation of the operations."""
    given = {k: to_torch(x).to(device) for k, x in tensors.items() if x is not None}
    op = call.operation
    if not op.is_vjp:
        with torch.no_grad():
            outputs = functions[op.name](**given, **call.attributes)
        names = [o.name for o in op.outputs]
        return {name: to_numpy(x) for name, x in zip(names, outputs, strict=True)}

    forward = load().operations[op.name.removesuffix(".vjp")]
    wanted = [t.name for t in forward.tensors if t.differentiable and t.name in given]
    inputs = {t.name: given[t.name] for t in forward.tensors if t.name in given}
    for name in wanted:
        inputs[name].requires_grad_()
    outputs = functions[forward.name](**inputs, **call.attributes)
    # An absent cotangent is zero (GRAD-6); an output that no input reaches passes nothing back.
    pairs = [
        (x, given[f"d_{o.name}"])
        for o, x in zip(forward.outputs, outputs, strict=True)
        if f"d_{o.name}" in given and x.requires_grad
    ]
    grads = torch.autograd.grad(
        [x for x, _ in pairs], [inputs[n] for n in wanted], [d for _, d in pairs], allow_unused=True
    )
    return {
        f"d_{name}": to_numpy(torch.zeros_like(inputs[name]) if g is None else g)
        for name, g in zip(wanted, grads, strict=True)
    }


class EagerBackend:
    """`torch`: every operation and its `.vjp`, through the chunked eager form."""

    def describe(self) -> dict[str, Any]:
        spec = load()
        return {
            "name": "torch",
            "version": VERSION,
            "spec_version": spec.version,
            "operations": list(spec.operations),
            "dtypes": list(spec.storage_dtypes),
            "capabilities": list(spec.capabilities),
            "tile_sizes": {"T": [16, 32, 64, 128], "window": [64, 128], "D": [64]},
            "limits": {},
        }

    def run(self, op: str, tensors: Mapping[str, np.ndarray], attrs: Mapping[str, Any]) -> Result:
        call = validate(op, tensors, attrs)
        return Result(run_operations(EAGER, call, tensors), path="eager", kernels=[])


backend = EagerBackend()
