"""JSON as RFC 8259 has it, read from files that anyone may have written: what is not that is one ValueError."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn


def parse(text: str) -> Any:
    """The value of a JSON text.

    Python's own reader takes more than JSON: NaN and Infinity, a number such as 1e999 for infinity, and of a name that
    comes twice it keeps the last value. Here these are errors.

    Raises:
        ValueError: the text is no JSON, names one key of an object twice, or is nested too deep.
    """
    try:
        return json.loads(text, parse_constant=_constant, parse_float=_float, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("nested too deep") from None


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {text[:40]} is too large for a float")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} comes twice")
    return found
