"""The JSON schemas of both directions, as the specification publishes them."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jsonschema
import jsonschema.exceptions
import rattention.spec.operations as spec_operations


@functools.cache
def validator(name: str) -> Any:
    """Validator of `request` or `reply`."""
    folder = Path(spec_operations.__file__).parent / "schemas"
    schema = json.loads((folder / f"{name}.schema.json").read_text(encoding="utf-8"))
    return jsonschema.Draft202012Validator(schema)


def fault(name: str, message: Any) -> str:
    """What is wrong with a message, in one line; "" where nothing is."""
    errors = sorted(validator(name).iter_errors(message), key=lambda e: list(map(str, e.absolute_path)))
    if not errors:
        return ""
    best = jsonschema.exceptions.best_match(errors) or errors[0]
    where = "/".join(str(p) for p in best.absolute_path)
    return f"{where + ': ' if where else ''}{best.message[:200]}"
