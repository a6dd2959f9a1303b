"""The `onnx` backend: each call as a graph of standard operators, run by the onnx package's reference evaluator.

An oracle from outside: the softmax branch, the linear recurrence, the norms and the rotation are the evaluator's,
written by other people from another specification. Gradients have no ONNX form and are refused.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator
from rattention.conformance.oracles import onnx_operations
from rattention.spec import Call, Result, Unsupported, dtype_name, load, validate

KEPT = 256


class OnnxBackend:
    """Graphs are kept by signature: the operation, its attributes, the tensors given, and every size but B and T."""

    def __init__(self) -> None:
        self.evaluators: OrderedDict[Any, ReferenceEvaluator] = OrderedDict()

    def describe(self) -> dict[str, Any]:
        spec = load()
        return {
            "name": "onnx",
            "version": onnx.__version__,
            "spec_version": spec.version,
            "operations": [name for name, op in spec.operations.items() if not op.is_vjp],
            "dtypes": list(spec.storage_dtypes),
            "capabilities": ["segments", "rope", "positions", "scales", "memory", "initial_state", "cache", "ragged"],
            "tile_sizes": {},
            "limits": {},
        }

    def run(self, op: str, tensors: Mapping[str, np.ndarray], attrs: Mapping[str, Any]) -> Result:
        given = {name: np.asarray(t) for name, t in tensors.items() if t is not None}
        call = validate(op, given, attrs, host={n: t for n, t in given.items() if t.dtype == np.int32})
        if call.operation.is_vjp:
            raise Unsupported("ONNX has no gradients of Attention and LinearAttention")
        evaluator = self.evaluator(call, {name: dtype_name(t) for name, t in given.items()})
        with np.errstate(all="ignore"):
            values = evaluator.run(None, {name: np.ascontiguousarray(t) for name, t in given.items()})
        assert isinstance(values, list)
        outputs = {o.name: np.array(x) for o, x in zip(call.operation.outputs, values, strict=True)}
        return Result(outputs, path="onnx.reference", kernels=[])

    def evaluator(self, call: Call, dtypes: dict[str, str]) -> ReferenceEvaluator:
        sizes = tuple(sorted((d, n) for d, n in call.dims.items() if d not in ("B", "T", "M", "Wnext")))
        key = (call.operation.name, tuple(call.attributes.items()), tuple(sorted(dtypes.items())), sizes)
        if key in self.evaluators:
            self.evaluators.move_to_end(key)
        else:
            self.evaluators[key] = ReferenceEvaluator(onnx_operations.model(call, dtypes))
            if len(self.evaluators) > KEPT:
                self.evaluators.popitem(last=False)
        return self.evaluators[key]


backend = OnnxBackend()
