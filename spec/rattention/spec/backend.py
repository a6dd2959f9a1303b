"""The contract between a backend and whoever runs it (chapter 12)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np


class Result(dict[str, np.ndarray]):
    """The outputs of one run, with `metadata` saying how they were made (BCK-4).

    `metadata["path"]` is the path taken, such as "eager" or "triton"; `metadata["kernels"]` lists the kernels launched.
    A plain dict is a result without metadata.
    """

    def __init__(self, outputs: Mapping[str, np.ndarray], **metadata: Any):
        super().__init__(outputs)
        self.metadata: dict[str, Any] = metadata


@runtime_checkable
class Backend(Protocol):
    """What the conformance suite, and any other client, needs of an implementation."""

    def describe(self) -> dict[str, Any]:
        """Keys: name, version, spec_version, operations (list), dtypes (list), capabilities (list of str),
        tile_sizes (dict of lists: sizes of T, window and D at which the code changes path), limits (dict)."""
        ...

    def run(self, op: str, tensors: Mapping[str, np.ndarray], attrs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Run one operation, or its `.vjp`, on NumPy arrays (ml_dtypes for bfloat16).

        Raises:
            SpecError: the call is invalid (BCK-5).
            Unsupported: the call is valid and this backend lacks it (BCK-3).
        """
        ...
