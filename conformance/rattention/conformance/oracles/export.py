"""The graphs as files: what `rattention vectors export` writes beside the cases."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx
from rattention.conformance.case import Case
from rattention.conformance.oracles import onnx_operations
from rattention.spec import dtype_name, load, validate


def graphs(cases: Iterable[Case]) -> dict[str, bytes]:
    """File name to content: one model per operation and set of optional inputs that occurs in `cases`, in float32.

    A model keeps the head counts, channel sizes, window and other attributes of the first case that needs it; batch and
    length are symbolic. Every model passes the checker.
    """
    files: dict[str, bytes] = {}
    written: set[tuple[str, ...]] = set()
    for case in cases:
        op = load().operations[case.op]
        storage = {str(t.dtype) for t in case.tensors.values() if t.dtype.kind != "i"}
        shapes = [t.shape for name, t in case.tensors.items() if name != "cache_k"]
        if op.is_vjp or storage > {"float32"} or any(0 in shape for shape in shapes):
            continue
        given = tuple(sorted(t.name for t in op.tensors if t.optional and t.name in case.tensors))
        key = (case.op, *given)
        if key in written:
            continue
        tensors = {name: np.asarray(t) for name, t in case.tensors.items()}
        model = onnx_operations.model(
            validate(case.op, tensors, case.attrs), {name: dtype_name(t) for name, t in tensors.items()}
        )
        model.doc_string = f"{op.summary}; attributes {dict(case.attrs)}"
        onnx.checker.check_model(model, full_check=True)
        number = sum(one[0] == case.op for one in written)
        files[f"{case.op}-{number:02d}.onnx"] = model.SerializeToString(deterministic=True)
        written.add(key)
    return files
