"""Ahead-of-time compilation: what a launch becomes on a device that is not here.

`compile_launch` builds one captured launch for a target and reads registers, spills, shared memory and matrix
instructions from the binary and its assembly. No GPU and no driver is needed.
"""

from __future__ import annotations

import ast
import hashlib
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from rattention.torch.triton.launch import Launch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}

SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10, "gfx950": 160 << 10}
"""Bytes of shared memory (LDS) that one block of each target may use."""

_MATRIX = {
    "wgmma": r"wgmma\.mma_async", "tcgen05": r"tcgen05\.mma", "mma": r"(?<!w)(?<!g)\bmma\.sync", "mfma": r"v_mfma_",
}  # fmt: skip
_POINTERS = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16", "int32": "*i32"}


KERNEL_SOURCES = (
    "attention", "config", "decode", "features", "key_grad", "output_grad", "query_grad", "residue_grad", "rotary",
    "states", "tiles",
)  # fmt: skip
"""Modules whose code decides what is built."""


def sources() -> str:
    """A digest of the kernels' code and configurations; comments, docstrings and layout do not enter it."""
    digest = hashlib.sha256()
    for name in KERNEL_SOURCES:
        tree = ast.parse((Path(__file__).parent / f"{name}.py").read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)):
                node.body = [x for x in node.body if not isinstance(getattr(x, "value", None), ast.Constant)
                             or not isinstance(x, ast.Expr)]  # fmt: skip
        digest.update(ast.unparse(tree).encode())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Binary:
    """What the compiler made of one kernel for one target."""

    kernel: str
    target: str
    registers: int
    spills: int
    """Vector registers (AMD; its scalar ones spill into those, not to memory) or bytes (NVIDIA) spilled to memory."""
    shared: int
    """Bytes of shared memory."""
    warps: int
    stages: int
    matrix: dict[str, int]
    """Matrix instructions in the assembly, by kind."""


def _signature(launch: Launch) -> tuple[dict[str, str], dict[Any, Any], dict[Any, Any]]:
    """Types, constants and alignment of the arguments, as a launch on the device would specialise them."""
    names = launch.kernel.arg_names
    fixed = {names[i] for i in range(len(names)) if launch.kernel.params[i].do_not_specialize}
    signature: dict[str, str] = {}
    constants: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}
    for i, (name, value) in enumerate(zip(names, launch.arguments, strict=False)):
        if value is None or (isinstance(value, int) and value == 1 and name not in fixed):
            signature[name] = "constexpr"
            constants[(i,)] = value
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and name not in fixed:
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = _POINTERS[str(value.dtype).removeprefix("torch.")]
            attributes[(i,)] = [["tt.divisibility", 16]]
    for name, value in launch.constants.items():
        signature[name] = "constexpr"
        constants[(names.index(name),)] = value
    return signature, constants, attributes


def _resources(compiled: Any, target: str) -> tuple[int, int]:
    """Registers and spills per thread."""
    if target.startswith("gfx"):
        text = compiled.asm["amdgcn"]
        return (
            max(int(n) for n in re.findall(r"\.vgpr_count:\s+(\d+)", text)),
            sum(int(n) for n in re.findall(r"\.vgpr_spill_count:\s+(\d+)", text)),
        )
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump reports no resources: {text!r}")
    return int(found[1]), int(found[2]) + int(found[3])


def compile_launch(launch: Launch, target: str) -> Binary:
    """Build one launch for `target` and measure it."""
    signature, constants, attributes = _signature(launch)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    text = compiled.asm["amdgcn" if target.startswith("gfx") else "ptx"]
    registers, spills = _resources(compiled, target)
    matrix = {kind: len(re.findall(pattern, text)) for kind, pattern in _MATRIX.items()}
    return Binary(
        launch.name, target, registers, spills, compiled.metadata.shared, launch.warps, launch.stages,
        {kind: n for kind, n in matrix.items() if n},
    )  # fmt: skip
