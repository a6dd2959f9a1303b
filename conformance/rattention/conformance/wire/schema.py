"""The JSON schemas of both directions, as the specification publishes them."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jsonschema
import jsonschema.exceptions
import rattention.spec.operations as spec_operations

KINDS = {"request": "cmd", "reply": "reply"}
"""The key that says which of several messages this is."""


@functools.cache
def validator(name: str) -> Any:
    """Validator of `request`, `reply`, `case` or `manifest`."""
    folder = Path(spec_operations.__file__).parent / "schemas"
    schema = json.loads((folder / f"{name}.schema.json").read_text(encoding="utf-8"))
    return jsonschema.Draft202012Validator(schema)


def fault(name: str, message: Any) -> str:
    """What is wrong with a message, in one line that names the field; "" where nothing is."""
    whole = validator(name)
    errors = list(whole.iter_errors(message))
    if not errors:
        return ""
    if name in KINDS:  # against the one kind of message that it says it is: "is none of the four" helps nobody
        kinds = {one["properties"][KINDS[name]]["const"]: one for one in whole.schema["oneOf"]}
        if not isinstance(message, dict):
            return f"expected an object, got {_short(message)}"
        kind = message.get(KINDS[name])
        if not isinstance(kind, str) or kind not in kinds:
            got = _short(kind) if KINDS[name] in message else "nothing"
            return f"{KINDS[name]}: expected one of {', '.join(kinds)}, got {got}"
        errors = list(whole.evolve(schema={**kinds[kind], "$defs": whole.schema["$defs"]}).iter_errors(message))
    errors.sort(key=lambda e: list(map(str, e.absolute_path)))
    best = jsonschema.exceptions.best_match(errors) or errors[0]
    where = "/".join(str(p) for p in best.absolute_path)
    return f"{where + ': ' if where else ''}{_told(best)}"


def _told(error: Any) -> str:
    if error.validator in ("oneOf", "anyOf"):
        kinds = ", ".join(str(one.get("title", one.get("type", "?"))) for one in error.validator_value)
        return f"expected one of {kinds}; got {_short(error.instance)}"
    if error.validator in ("type", "enum", "const"):
        wanted = error.validator_value
        wanted = wanted if isinstance(wanted, list) else [wanted]
        return f"expected {' or '.join(map(str, wanted))}, got {_short(error.instance)}"
    return error.message[:200]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:80]}..."
