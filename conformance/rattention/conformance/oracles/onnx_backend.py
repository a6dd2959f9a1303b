"""The backends `onnx` and `onnxruntime`: each call as a graph of standard operators, run by engines we did not write.

Oracles from outside: the softmax branch, the linear recurrence, the norms and the rotation are those of the onnx
package's reference evaluator, or of ONNX Runtime's CPU kernels, written by other people from another specification.
Gradients have no ONNX form and are refused.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

if find_spec("onnx") is None:
    raise ModuleNotFoundError("this backend needs ONNX: install rattention with its extra onnx", name="onnx")

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator
from rattention.conformance.oracles import onnx_operations
from rattention.spec import Call, Result, Unsupported, dtype_name, load, validate

KEPT = 256

Engine = Callable[[dict[str, np.ndarray]], list[np.ndarray]]


def reference_engine(model: onnx.ModelProto) -> Engine:
    """The onnx package's own evaluator, in NumPy."""
    evaluator = ReferenceEvaluator(model)

    def run(feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        values = evaluator.run(None, feeds)
        assert isinstance(values, list)
        return values

    return run


def runtime_engine(model: onnx.ModelProto) -> Engine:
    """ONNX Runtime on one CPU thread, so that reruns are bit-equal."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda feeds: [np.asarray(x) for x in session.run(None, feeds)]


class OnnxBackend:
    """Graphs are kept by signature: the operation, its attributes, the tensors given, and every size but B and T."""

    def __init__(
        self, name: str, engine: Callable[[onnx.ModelProto], Engine], dtypes: tuple[str, ...], cost: str
    ) -> None:
        self.name, self.engine, self.dtypes, self.cost = name, engine, dtypes, cost
        self.engines: OrderedDict[Any, Engine] = OrderedDict()

    def describe(self) -> dict[str, Any]:
        spec = load()
        return {
            "name": self.name,
            "version": onnx.__version__,
            "spec_version": spec.version,
            "operations": [name for name, op in spec.operations.items() if not op.is_vjp],
            "dtypes": list(self.dtypes),
            "capabilities": list(spec.capabilities),
            "tile_sizes": {"T": [], "window": [], "D": []},
            "cost": self.cost,
            "limits": {"T": {"minimum": 1}, "B": {"minimum": 1}},
        }

    def run(self, op: str, tensors: Mapping[str, np.ndarray], attrs: Mapping[str, Any]) -> Result:
        given = {name: np.asarray(t) for name, t in tensors.items() if t is not None}
        call = validate(op, given, attrs)
        if call.operation.is_vjp:
            raise Unsupported("ONNX has no gradients of Attention and LinearAttention")
        if 0 in (call.dims.get("B", 1), call.dims.get("T", 1)):
            raise Unsupported("the operators are not defined on no tokens or no rows")
        dtypes = {name: dtype_name(t) for name, t in given.items()}
        lacking = set(dtypes.values()) - {*self.dtypes, "int32"}
        if lacking:
            raise Unsupported(f"{self.name} takes no {' or '.join(sorted(lacking))} tensors from NumPy")
        with np.errstate(all="ignore"):
            values = self.prepared(call, dtypes)({name: np.ascontiguousarray(t) for name, t in given.items()})
        outputs = {o.name: np.array(x) for o, x in zip(call.operation.outputs, values, strict=True)}
        return Result(outputs, path=self.name, kernels=[])

    def prepared(self, call: Call, dtypes: dict[str, str]) -> Engine:
        sizes = tuple(sorted((d, n) for d, n in call.dims.items() if d not in ("B", "T", "M", "Wnext")))
        key = (call.operation.name, tuple(call.attributes.items()), tuple(sorted(dtypes.items())), sizes)
        if key in self.engines:
            self.engines.move_to_end(key)
        else:
            self.engines[key] = self.engine(onnx_operations.model(call, dtypes))
            if len(self.engines) > KEPT:
                self.engines.popitem(last=False)
        return self.engines[key]


backend = OnnxBackend("onnx", reference_engine, ("float32", "bfloat16", "float16"), "direct")
runtime = OnnxBackend("onnxruntime", runtime_engine, ("float32", "float16"), "compiled")
