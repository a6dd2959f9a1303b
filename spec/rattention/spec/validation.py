"""One validation for every backend, driven by operations.toml, so that all refuse with the same text (BCK-5).

Order of the checks: tensor names, what is no array, attributes, devices, ranks, dtypes, shapes, constraints between
tensors, constraints on values. The first that fails is reported.
"""

from __future__ import annotations

import difflib
import enum
import functools
import operator
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from rattention.spec import constraints
from rattention.spec.errors import SpecError
from rattention.spec.operations import REQUIRED, Attribute, Operation, Tensor, load

SMALLEST = 2.0**-126
"""The smallest normal number of float32; what lies below it some hardware takes for 0."""
TOO_LARGE = 2.0**128 - 2.0**103
"""The smallest number that rounds to an infinity in float32."""

POSITIVE_DIMS = frozenset({"H", "Hq", "Hkv", "D", "Dv"})


class _Unread(enum.Enum):
    """One value of a type of its own, so that no array, None or False can stand in its place by accident."""

    UNREAD = "UNREAD"

    def __repr__(self) -> str:
        return "UNREAD"


UNREAD = _Unread.UNREAD
"""Says to `validate` that the values of an integer tensor, or of all of them, cannot be read where it is called."""


@dataclass(frozen=True)
class Call:
    """A validated call: the operation, its attributes with defaults filled in, size of each dimension symbol.

    `unread` names the integer tensors whose values were not looked at: ERR-8 to ERR-11 are unchecked for them.
    """

    operation: Operation
    attributes: dict[str, Any]
    dims: dict[str, int]
    given: frozenset[str]
    storage: str
    unread: tuple[str, ...] = ()

    def output_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every output this call has."""
        return {o.name: tuple(self.dims[d] for d in o.shape) for o in self.operation.outputs if self.has_output(o.name)}

    def has_output(self, name: str) -> bool:
        """False for the gradient of an input that was not given."""
        return not (self.operation.is_vjp and name.removeprefix("d_") not in self.given)

    def output_dtypes(self, input_dtypes: Mapping[str, str]) -> dict[str, str]:
        """Dtype of every output: storage, float32 or int32, and for gradients that of the input (GRAD-6)."""
        if self.operation.is_vjp:
            return {name: input_dtypes[name.removeprefix("d_")] for name in self.output_shapes()}
        return {o.name: self.storage if o.dtype == "storage" else o.dtype for o in self.operation.outputs}


def dtype_name(x: Any) -> str:
    """The dtype of a NumPy, Torch or JAX array by its common name, such as `bfloat16`."""
    return _name_of(x.dtype)


@functools.lru_cache(maxsize=256)
def _name_of(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")  # NumPy takes its time to spell one


def validate(
    operation: str,
    tensors: Mapping[str, Any],
    attributes: Mapping[str, Any],
    *,
    host: Mapping[str, np.ndarray | Literal[_Unread.UNREAD]] | Literal[_Unread.UNREAD] | None = None,
    extra_dtypes: tuple[str, ...] = (),
    array: tuple[str, type | tuple[type, ...]] | None = None,
    devices: Mapping[str, str] | None = None,
) -> Call:
    """Check one call and return it with defaults filled in and dimensions named.

    Args:
        operation: a name of operations.toml, `.vjp` included.
        tensors: arrays of any framework with `.shape` and `.dtype`; `None` stands for an absent optional.
        attributes: as given by the caller.
        host: where the values of integer tensors come from, which ERR-8 to ERR-11 need. Left out, they are read from
            `tensors`, and each must be a NumPy array. A library whose tensors are something else passes a NumPy copy
            of each by name, with `UNREAD` for one that cannot be read, such as a traced one. `UNREAD` in place of the
            mapping says that no values are looked at. `Call.unread` names what was not.
        extra_dtypes: storage dtypes accepted beyond the specification's, say float64 for a gradient check.
        array: what a library takes as a tensor, in words and as types, such as `("a torch.Tensor", torch.Tensor)`
            (ERR-14). Without it anything with a shape and a dtype is one. A NumPy masked array never is.
        devices: where each tensor lives, by the library's own name for the place (ERR-15).

    Raises:
        SpecError: the first broken constraint.
        TypeError: an integer tensor is no NumPy array, and `host` does not say what to do about it: a mistake of the
            caller's code, whatever the call.
    """
    op = load().operations.get(operation)
    if op is None:
        known = ", ".join(load().operations)
        raise SpecError(operation, "operation", f"one of {known}", repr(operation), "ERR-1")
    given = {name: t for name, t in tensors.items() if t is not None}
    _names(op, given)
    _arrays(op, given, array)
    attrs = _attributes(op, attributes)
    if devices:
        _devices(op, given, devices)
    for spec, t in _pairs(op, given):
        if len(t.shape) != len(spec.shape):
            raise SpecError(
                op.name,
                spec.name,
                f"rank {len(spec.shape)} {_brackets(spec.shape)}",
                f"rank {len(t.shape)} {_brackets(t.shape)}",
                "ERR-2",
            )
    storage = _dtypes(op, given, extra_dtypes)
    dims = _dims(op, given, attrs)
    constraints.check_shapes(op.name, given, attrs, dims)
    values, unread = _values(op, given, host)
    constraints.check_values(op.name, values, given, attrs, dims)
    return Call(op, attrs, dims, frozenset(given), storage, unread)


def _values(
    op: Operation, given: Mapping[str, Any], host: Mapping[str, Any] | _Unread | None
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """The integer tensors that can be looked at, as NumPy arrays, and the names of the others."""
    values: dict[str, np.ndarray] = {}
    unread: list[str] = []
    if op.name == "rope_table":  # any position can be tabulated: there is nothing to look at
        return values, ()
    for spec, t in _pairs(op, given):
        if spec.dtype != "int32":
            continue
        found = UNREAD if host is UNREAD else (host or {}).get(spec.name, t)
        if found is UNREAD:
            unread.append(spec.name)
        elif isinstance(found, np.ndarray):
            values[spec.name] = found
        else:
            kind = f"{type(found).__module__}.{type(found).__qualname__}"
            raise TypeError(
                f"validate: {op.name}: the values of {spec.name} are needed, and it is a {kind}: pass them as a NumPy "
                f"array, host={{{spec.name!r}: ...}}, or say host={{{spec.name!r}: UNREAD}}"
            )
    return values, tuple(unread)


def _pairs(op: Operation, given: Mapping[str, Any]) -> list[tuple[Tensor, Any]]:
    return [(t, given[t.name]) for t in op.tensors if t.name in given]


def _names(op: Operation, given: Mapping[str, Any]) -> None:
    known = op.tensor
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise SpecError(
                op.name, name, "one of the tensors " + ", ".join(known), f"an unknown tensor{hint}", "ERR-1"
            )
    for t in op.tensors:
        if not t.optional and t.name not in given:
            raise SpecError(op.name, t.name, f"a tensor {_brackets(t.shape)}", "none", "ERR-1")


def _arrays(op: Operation, given: Mapping[str, Any], array: tuple[str, type | tuple[type, ...]] | None) -> None:
    words, types = array or ("an array", object)
    for name, t in given.items():
        plain = hasattr(t, "shape") and hasattr(t, "dtype") and not _masked(t)
        if not plain or not isinstance(t, types):
            raise SpecError(op.name, name, words, f"{type(t).__module__}.{type(t).__qualname__}", "ERR-14")


def _masked(t: Any) -> bool:
    """Whether this is an array of `numpy.ma`, looked up by name: whoever has no NumPy array has no masked one."""
    ma = sys.modules.get("numpy.ma")
    return ma is not None and isinstance(t, ma.MaskedArray)


def _devices(op: Operation, given: Mapping[str, Any], devices: Mapping[str, str]) -> None:
    """Name the first tensor that is not where most tensors of the call are."""
    places = [(spec.name, devices[spec.name]) for spec, _ in _pairs(op, given) if spec.name in devices]
    count = Counter(place for _, place in places)
    if len(count) < 2:
        return
    # The place where most tensors are; among equals the one that the call names first.
    most = max(count.values())
    home = next(place for _, place in places if count[place] == most)
    owner = next(name for name, place in places if place == home)
    odd, place = next((name, place) for name, place in places if place != home)
    raise SpecError(op.name, odd, f"device {home}, that of {owner}", place, "ERR-15")


def _attributes(op: Operation, attributes: Mapping[str, Any]) -> dict[str, Any]:
    known = op.attribute
    for name in attributes:
        if name not in known:
            raise SpecError(op.name, name, "one of the attributes " + ", ".join(known), "an unknown attribute", "ERR-5")
    filled = {}
    for name, spec in known.items():
        if name not in attributes:
            if spec.default is REQUIRED:
                raise SpecError(op.name, name, spec.domain, "no value", "ERR-5")
            filled[name] = spec.default
        else:
            filled[name] = _attribute(op, spec, attributes[name])
    return filled


def _attribute(op: Operation, spec: Attribute, value: Any) -> Any:
    error = SpecError(op.name, spec.name, spec.domain, repr(value), "ERR-5")
    kind = spec.type.removesuffix(" or none")
    if value is None:
        if kind != spec.type:
            return None
        raise error
    if kind == "choice":
        if not isinstance(value, str) or value not in spec.choices:
            raise error
        return value
    if isinstance(value, str | bytes | bytearray | bool) or _holds_a_bool(value):
        raise error
    try:
        number = operator.index(value) if kind == "int" else float(value)
    except (TypeError, ValueError, OverflowError):
        raise error from None
    if kind != "int" and not _normal(number):
        raise error
    if spec.minimum is not None and number < spec.minimum:
        raise error
    if spec.maximum is not None and number > spec.maximum:
        raise error
    if spec.exclusive_minimum is not None and number <= spec.exclusive_minimum:
        raise error
    if spec.multiple_of is not None and number % spec.multiple_of:
        raise error
    return number


def _normal(number: float) -> bool:
    """Whether float32 holds the number, rounded, as 0 or a finite normal one. What flushes or overflows is none."""
    return number == 0 or SMALLEST <= abs(number) < TOO_LARGE


def _holds_a_bool(value: Any) -> bool:
    """Whether this is the bool of an array library, or an array of it, which Python would count as 0 or 1."""
    return str(getattr(value, "dtype", type(value).__name__)).rpartition(".")[2] in ("bool", "bool_")


def _dtypes(op: Operation, given: Mapping[str, Any], extra: tuple[str, ...]) -> str:
    allowed = load().storage_dtypes + extra
    pairs = _pairs(op, given)
    storage, owner = "float32", ""
    for spec, t in pairs:
        if spec.dtype != "storage":
            continue
        name = dtype_name(t)
        if name not in allowed:
            raise SpecError(op.name, spec.name, "dtype " + " or ".join(allowed), name, "ERR-4")
        if owner and name != storage:
            raise SpecError(op.name, spec.name, f"dtype {storage}, that of {owner}", name, "ERR-4")
        storage, owner = name, spec.name
    wide = ("float64",) if storage == "float64" else ()
    classes = {
        "weight": tuple(dict.fromkeys(("float32", storage))),
        "float32": ("float32", *wide),
        "int32": ("int32",),
    }
    for spec, t in pairs:
        name = dtype_name(t)
        if spec.dtype != "storage" and name not in classes[spec.dtype]:
            raise SpecError(op.name, spec.name, "dtype " + " or ".join(classes[spec.dtype]), name, "ERR-4")
    return storage


def _dims(op: Operation, given: Mapping[str, Any], attrs: Mapping[str, Any]) -> dict[str, int]:
    dims: dict[str, int] = {}
    if "head_dim" in attrs:
        dims["D"], dims["D/2"] = attrs["head_dim"], attrs["head_dim"] // 2
    if attrs.get("window") is not None:
        dims["W"] = max(attrs["window"], 0)
    for spec, t in _pairs(op, given):
        for axis, symbol in enumerate(spec.shape):
            size = t.shape[axis]  # not int(): a symbolic size stays symbolic
            if symbol in POSITIVE_DIMS and size < 1:
                raise SpecError(
                    op.name, spec.name, f"{symbol} >= 1 in {_brackets(spec.shape)}", _brackets(t.shape), "ERR-3"
                )
            if dims.setdefault(symbol, size) != size:
                raise SpecError(op.name, spec.name, f"shape {_named(spec.shape, dims)}", _brackets(t.shape), "ERR-3")
            if symbol == "D":
                dims["D/2"] = size // 2
                if "feature_map" in attrs:
                    dims["F"] = size if attrs["feature_map"] == "identity" else 2 * size
            if symbol == "W":
                dims["Wnext"] = size if attrs.get("window") is not None else size + dims["T"]
    return dims


def _brackets(shape: tuple[Any, ...]) -> str:
    return "[" + ", ".join(str(s) for s in shape) + "]"


def _named(shape: tuple[str, ...], dims: Mapping[str, int]) -> str:
    return "[" + ", ".join(f"{s}={dims[s]}" if s in dims else s for s in shape) + "]"
