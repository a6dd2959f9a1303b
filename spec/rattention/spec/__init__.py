"""The specification as data: operations, clauses, validation, and the backend contract."""

from rattention.spec.backend import Backend, Result
from rattention.spec.errors import SpecError, Unsupported
from rattention.spec.operations import REQUIRED, Attribute, BadInput, Operation, Spec, Tensor, load
from rattention.spec.validation import UNREAD, Call, dtype_name, validate

__all__ = [
    "REQUIRED",
    "UNREAD",
    "Attribute",
    "Backend",
    "BadInput",
    "Call",
    "Operation",
    "Result",
    "Spec",
    "SpecError",
    "Tensor",
    "Unsupported",
    "dtype_name",
    "load",
    "validate",
]
