"""The conformance adapter of the Triton kernels: NumPy in, NumPy out, on the GPU or under Triton's interpreter."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from rattention.spec import Result, Unsupported, load, validate
from rattention.torch.adapter import VERSION, run_operations


class TritonBackend:
    """`torch-triton`: every operation and its `.vjp` through the kernels, or not at all.

    On a machine with a CUDA or ROCm device the kernels run there. Elsewhere they run under Triton's interpreter if
    TRITON_INTERPRET=1 is set before Triton is first imported; if not, the adapter is refused.
    """

    def describe(self) -> dict[str, Any]:
        _refuse_without_a_device()
        from rattention.torch.triton.operations import KERNELS

        spec = load()
        return {
            "name": "torch-triton",
            "version": VERSION,
            "spec_version": spec.version,
            "operations": list(spec.operations),
            "dtypes": list(spec.storage_dtypes),
            "capabilities": list(spec.capabilities),
            "tile_sizes": {"T": [16, 32, 64], "window": [32, 64], "D": [16, 32, 64]},
            "limits": {"D": 256, "Dv": 256},
            "kernels": list(KERNELS),
            "cost": "interpreted" if os.environ.get("TRITON_INTERPRET") == "1" else "compiled",
        }

    def run(self, op: str, tensors: Mapping[str, np.ndarray], attrs: Mapping[str, Any]) -> Result:
        call = validate(op, tensors, attrs)
        _refuse_without_a_device()
        from rattention.torch.triton import operations
        from rattention.torch.triton.launch import recording
        from rattention.torch.triton.tiles import INTERPRET

        device = "cpu" if INTERPRET.value else "cuda"
        with recording() as launches:
            outputs = run_operations(operations, call, tensors, device)
        return Result(outputs, path="triton", kernels=list(dict.fromkeys(x.name for x in launches)))


def _refuse_without_a_device() -> None:
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        raise Unsupported("no CUDA or ROCm device here; TRITON_INTERPRET=1 runs the kernels on the CPU")


backend = TritonBackend()
