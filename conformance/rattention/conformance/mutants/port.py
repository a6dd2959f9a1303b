"""The backend around the eager form, and the catalogue's registry."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from rattention.conformance.mutants.eager import Arrays, Form
from rattention.spec import Call, Result, dtype_name, load, validate

DTYPES: dict[str, Any] = {
    "float32": np.float32,
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
    "int32": np.int32,
}


class Port:
    """A backend made of the eager form. Contract mutants override its methods."""

    form: type[Form] = Form
    name = "eager-float32"

    def describe(self) -> dict[str, Any]:
        spec = load()
        return {
            "name": self.name,
            "version": "1",
            "spec_version": spec.version,
            "operations": list(spec.operations),
            "dtypes": list(spec.storage_dtypes),
            "capabilities": list(spec.capabilities),
            "tile_sizes": {"T": [64], "window": [64], "D": [16]},
            "limits": {},
        }

    def run(self, op: str, tensors: Mapping[str, np.ndarray], attrs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        call = self.check(op, tensors, attrs)
        given = {name: t for name, t in tensors.items() if t is not None}
        with np.errstate(all="ignore"):  # NaN and inf are inputs like others here
            outputs = self.compute(call, given)
            return self.pack(call, given, outputs)

    def check(self, op: str, tensors: Mapping[str, Any], attrs: Mapping[str, Any]) -> Call:
        return validate(op, tensors, attrs)

    def compute(self, call: Call, tensors: Arrays) -> Arrays:
        return self.form(call, tensors).run()

    def pack(self, call: Call, tensors: Arrays, outputs: Arrays) -> dict[str, np.ndarray]:
        """Round once to the dtype of each output (BCK-2)."""
        dtypes = call.output_dtypes({name: dtype_name(t) for name, t in tensors.items()})
        packed = {n: np.array(outputs[n]).astype(DTYPES[dtypes[n]]) for n in call.output_shapes()}
        return Result(packed, path="eager", kernels=[])


@dataclass(frozen=True)
class Mutant:
    """One wrong implementation: what it does, the clauses it breaks, where such a fault was seen, and how to make it.

    `kind` is the class of fault, such as "gradient" or "past size"; `make` returns a fresh backend.
    """

    id: str
    title: str
    clauses: tuple[str, ...]
    source: str
    kind: str
    make: Callable[[], Any]


CATALOGUE: dict[str, Mutant] = {}


def plant(clauses: str, kind: str, source: str) -> Callable[[type], type]:
    """Register a mutated `Form`, or a backend class. Its id is the class name in kebab case, its title the docstring.

    Args:
        clauses: the labels it breaks, separated by blanks, the plainest breach first.
        kind: class of fault.
        source: `TRAPS n` names a fault seen in public code, listed in docs/traps.md; otherwise a rationale.
    """

    def register(cls: type) -> type:
        name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", cls.__name__).lower()
        if name in CATALOGUE:
            raise ValueError(f"two mutants are called {name}")
        labels = tuple(clauses.split())
        unknown = set(labels) - set(load().clauses)
        if unknown:
            raise ValueError(f"{name} cites unknown clauses {sorted(unknown)}")
        port: Any = type(cls.__name__, (Port,), {"form": cls}) if issubclass(cls, Form) else cls
        title = (cls.__doc__ or "").strip().splitlines()[0]

        def make() -> Any:
            backend = port()
            backend.name = f"mutant:{name}"
            return backend

        CATALOGUE[name] = Mutant(name, title, labels, source, kind, make)
        return cls

    return register
