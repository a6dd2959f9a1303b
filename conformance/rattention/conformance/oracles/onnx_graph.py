"""A small builder of ONNX graphs: nodes are written as calls, constants as Python values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 27  # the first with LinearAttention; Attention has its window since 25
TYPES = {
    "float32": TensorProto.FLOAT,
    "bfloat16": TensorProto.BFLOAT16,
    "float16": TensorProto.FLOAT16,
    "int32": TensorProto.INT32,
}


class Graph:
    """Collects nodes; every value is known by its name."""

    def __init__(self, name: str):
        self.name = name
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[tuple[Any, ...], str] = {}
        self.initializers: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []

    def input(self, name: str, dtype: str, shape: Sequence[str | int]) -> str:
        """A graph input; symbols of the specification stay symbolic."""
        self.inputs.append(helper.make_tensor_value_info(name, TYPES[dtype], list(shape)))
        return name

    def output(self, value: str, name: str, dtype: str, shape: Sequence[str | int]) -> None:
        """Cast `value` to the output's dtype and publish it."""
        self.nodes.append(helper.make_node("Cast", [value], [f"out.{name}"], to=TYPES[dtype]))
        self.outputs.append(helper.make_tensor_value_info(f"out.{name}", TYPES[dtype], list(shape)))

    def __call__(self, op: str, *inputs: Any, results: int = 1, **attributes: Any) -> Any:
        """One node. Inputs that are not names become constants; None is an absent optional input."""
        names = ["" if x is None else x if isinstance(x, str) else self.constant(x) for x in inputs]
        made = [f"v{len(self.nodes)}" + (f".{i}" if i else "") for i in range(results)]
        self.nodes.append(helper.make_node(op, names, made, **attributes))
        return made[0] if results == 1 else made

    def constant(self, value: Any) -> str:
        """A constant: int lists are int64, floats float32, arrays themselves."""
        if isinstance(value, np.ndarray):
            array = value
        elif isinstance(value, bool):
            array = np.array(value)
        else:
            flat = value if isinstance(value, list | tuple) else [value]
            array = np.array(value, np.float32 if any(isinstance(x, float) for x in flat) else np.int64)
        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self.constants:
            self.constants[key] = f"c{len(self.constants)}"
            self.initializers.append(numpy_helper.from_array(array, self.constants[key]))
        return self.constants[key]

    # -------------------------------------------------------------------------------------------- idioms

    def cast(self, x: str, to: int) -> str:
        return self("Cast", x, to=to)

    def float(self, x: str) -> str:
        return self.cast(x, TensorProto.FLOAT)

    def size(self, x: str, axis: int) -> str:
        """Length of an axis as a scalar."""
        return self("Gather", self("Shape", x), axis, axis=0)

    def range(self, stop: str) -> str:
        return self("Range", 0, stop, 1)

    def slice(self, x: str, start: int, stop: int | None, axis: int) -> str:
        return self("Slice", x, [start], [2**62 if stop is None else stop], [axis])

    def either(self, condition: str, x: Any, y: Any) -> str:
        return self("Where", condition, x, y)

    def heads_first(self, x: str) -> str:
        """[B, T, H, X] <-> [B, H, T, X]."""
        return self("Transpose", x, perm=[0, 2, 1, 3])

    def pack(self, x: str) -> str:
        """[B, T, H, X] -> [B, T, H X]. Shapes are spelled out, since -1 cannot stand in an empty tensor."""
        shape = self("Shape", x)
        lead = self("Slice", shape, [0], [2], [0])
        width = self("Mul", self("Slice", shape, [2], [3], [0]), self("Slice", shape, [3], [4], [0]))
        return self("Reshape", x, self("Concat", lead, width, axis=0), allowzero=1)

    def unpack(self, x: str, heads: int) -> str:
        """[B, T, H X] -> [B, T, H, X]."""
        shape = self("Shape", x)
        lead = self("Slice", shape, [0], [2], [0])
        width = self("Div", self("Slice", shape, [2], [3], [0]), [heads])
        return self("Reshape", x, self("Concat", lead, [heads], width, axis=0), allowzero=1)

    def model(self) -> onnx.ModelProto:
        graph = helper.make_graph(self.nodes, self.name, self.inputs, self.outputs, self.initializers)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
        model.producer_name = "rattention"
        return model
