"""What a backend says of itself, in a form that the suite can use whatever it says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rattention.conformance.told import shown, told

DEEPEST = 8
"""Levels of a description that are kept; the contract knows three."""


class Foreign(str):
    """Text in place of an object that a description should not hold: its class and what it shows of itself."""


def plain(value: Any, depth: int = 0) -> Any:
    """Mappings, lists, text, numbers, True, False and None as they are; anything else as `Foreign` text.

    A description is compared, sent to workers and written to reports, which not every object can be.
    """
    if value is None or isinstance(value, bool | Foreign):
        return value
    for kind in (int, float, str):
        if isinstance(value, kind):
            return value if type(value) is kind else kind(value)
    if depth < DEEPEST and isinstance(value, Mapping):
        return {key if type(key) is str else told(key): plain(x, depth + 1) for key, x in dict(value).items()}
    if depth < DEEPEST and isinstance(value, list | tuple):
        return [plain(x, depth + 1) for x in value]
    return Foreign(f"({type(value).__name__}) {shown(value)}")


def foreign(value: Any) -> str:
    """The first `Foreign` text in a description or a part of it; "" where there is none."""
    if isinstance(value, Foreign):
        return str(value)
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return next(filter(None, map(foreign, parts)), "")


def names(about: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """The names in a list of the description; none where that is no list."""
    found = about.get(key)
    return tuple(x for x in found if isinstance(x, str)) if isinstance(found, list | tuple) else ()


def limit_fault(bound: Any) -> str:
    """What is wrong with a limit, or "": it is a largest number, a list of what is allowed, or a table."""
    if isinstance(bound, list | tuple) or number(bound) is not None:
        return ""
    if not isinstance(bound, Mapping):
        return f"is {shown(bound)}, expected a number, a list or a table"
    for key, value in bound.items():
        if key not in ("minimum", "maximum", "multiple_of", "none"):
            return f"has the key {shown(key)}, expected minimum, maximum, multiple_of or none"
        if not (isinstance(value, bool) if key == "none" else number(value) is not None):
            return f"has {key} {shown(value)}"
    return ""


def number(value: Any) -> int | float | None:
    """The value where it is a number, which True is not."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
