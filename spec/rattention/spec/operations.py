"""operations.toml as typed objects: what each operation takes, returns and promises."""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REQUIRED = object()
"""Marks an attribute without a default."""


@dataclass(frozen=True)
class Tensor:
    """One tensor of an operation. `shape` is a tuple of dimension symbols, `dtype` a dtype class of operations.toml.

    `capability` is the one that a backend lists if it takes the tensor, "" where every backend does.
    """

    name: str
    shape: tuple[str, ...]
    dtype: str
    optional: bool = False
    differentiable: bool = False
    about: str = ""
    capability: str = ""


@dataclass(frozen=True)
class Attribute:
    """One attribute: its type, its domain in words and in numbers, and its default (`REQUIRED` where it has none)."""

    name: str
    type: str
    domain: str
    default: Any
    minimum: float | None = None
    maximum: float | None = None
    exclusive_minimum: float | None = None
    multiple_of: int | None = None
    choices: tuple[str, ...] = ()
    about: str = ""


@dataclass(frozen=True)
class Operation:
    """One operation: inputs in the order of the public function, attributes, outputs, and where the spec treats it."""

    name: str
    tensors: tuple[Tensor, ...]
    attributes: tuple[Attribute, ...]
    outputs: tuple[Tensor, ...]
    clauses: str
    chapter: str
    group: str
    summary: str

    @functools.cached_property
    def tensor(self) -> dict[str, Tensor]:
        return {t.name: t for t in self.tensors}

    @functools.cached_property
    def attribute(self) -> dict[str, Attribute]:
        return {a.name: a for a in self.attributes}

    @property
    def is_vjp(self) -> bool:
        return self.name.endswith(".vjp")


@dataclass(frozen=True)
class BadInput:
    """One way to make a call that every backend must refuse."""

    id: str
    clause: str
    on: str | tuple[str, ...]
    action: str
    tensors: tuple[str, ...] = ()
    name: str = ""
    argument: str = ""
    axis: int = 0
    index: int = 0
    value: Any = None


@dataclass(frozen=True)
class Spec:
    """The whole of operations.toml. `operations` holds every `op` and, where it has one, its `op.vjp`."""

    version: str
    storage_dtypes: tuple[str, ...]
    operations: dict[str, Operation]
    clauses: dict[str, str]
    bad_inputs: tuple[BadInput, ...]
    capabilities: dict[str, tuple[str, ...]]
    library: tuple[str, ...]
    """Clauses about the public functions of a library, which calls of `run` cannot show."""

    @functools.cached_property
    def judged(self) -> dict[str, str]:
        """The clauses that a conformance suite judges a backend by: all but those of `library`."""
        return {label: text for label, text in self.clauses.items() if label not in self.library}

    def needs(self, operation: str, given: Iterable[str]) -> set[str]:
        """Names of the capabilities that a call of an operation with the tensors `given` calls on (BCK-1)."""
        tensors = self.operations[operation].tensor
        return {tensors[name].capability for name in given if name in tensors} - {""}


def operations_file() -> Path:
    """Where operations.toml is: beside this module once installed from a wheel, in spec/ in a checkout."""
    here = Path(__file__).resolve()
    for candidate in (here.parent / "operations.toml", here.parents[2] / "operations.toml"):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError("operations.toml is missing: the installation of rattention.spec is incomplete")


@functools.cache
def load() -> Spec:
    """Read operations.toml once."""
    raw = tomllib.loads(operations_file().read_text(encoding="utf-8"))
    operations: dict[str, Operation] = {}
    for name, entry in raw["operations"].items():
        op = _operation(name, entry, raw)
        operations[name] = op
        if any(t.differentiable for t in op.tensors):
            operations[f"{name}.vjp"] = vjp_of(op)
    bad: tuple[BadInput, ...] = tuple(_bad_input(b) for b in raw["bad_inputs"])
    capabilities = {name: tuple(entry["tensors"]) for name, entry in raw["capabilities"].items()}
    library = tuple(raw["library"]["clauses"])
    storage = tuple(raw["storage_dtypes"])
    return Spec(raw["spec_version"], storage, operations, dict(raw["clauses"]), bad, capabilities, library)


def vjp_of(op: Operation) -> Operation:
    """The companion `op.vjp`: cotangents in, gradients out (GRAD-1, GRAD-6)."""
    cotangents = tuple(
        Tensor(f"d_{o.name}", o.shape, o.dtype, optional=o.name != "out", about=f"cotangent of {o.name}")
        for o in op.outputs
        if o.differentiable
    )
    gradients = tuple(
        Tensor(f"d_{t.name}", t.shape, t.dtype, optional=t.optional, about=f"gradient of {t.name}")
        for t in op.tensors
        if t.differentiable
    )
    return Operation(
        f"{op.name}.vjp",
        op.tensors + cotangents,
        op.attributes,
        gradients,
        "GRAD",
        "09-gradients.md",
        op.group,
        f"transposed derivative of {op.name}",
    )


def _bad_input(entry: dict[str, Any]) -> BadInput:
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()}
    return BadInput(**fields)


def _operation(name: str, entry: dict[str, Any], raw: dict[str, Any]) -> Operation:
    def tensor(key: str, optional: bool) -> Tensor:
        t = raw["tensors"][key]
        return Tensor(
            t.get("name", key),
            tuple(t["shape"].split()),
            t["dtype"],
            optional,
            t.get("differentiable", False),
            t["about"],
            # By its key: the positions that rope_table tabulates are no optional tensor of a call.
            next((name for name, entry in raw["capabilities"].items() if key in entry["tensors"]), ""),
        )

    def attribute(key: str, default: Any) -> Attribute:
        a = dict(raw["attributes"][key])
        a["choices"] = tuple(a.get("choices", ()))
        return Attribute(name=key, default={"required": REQUIRED, "none": None}.get(default, default), **a)

    def output(key: str) -> Tensor:
        o = raw["outputs"][key]
        shape = entry["out_shape"] if key == "out" else o["shape"]
        return Tensor(key, tuple(shape.split()), o["dtype"], differentiable=o.get("differentiable", False))

    return Operation(
        name=name,
        tensors=tuple(tensor(t, False) for t in entry["tensors"])
        + tuple(tensor(t, True) for t in entry.get("optional", [])),
        attributes=tuple(attribute(k, d) for k, d in entry["attributes"].items()),
        outputs=tuple(output(o) for o in entry["outputs"]),
        clauses=entry["clauses"],
        chapter=entry["chapter"],
        group=entry["group"],
        summary=entry["summary"],
    )
