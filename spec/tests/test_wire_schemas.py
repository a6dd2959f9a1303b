"""The schemas of the wire protocol accept the lines shown in chapter 12, and refuse what is not the protocol."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from rattention.spec import SpecError, load, validate

if importlib.util.find_spec("jsonschema") is None:
    pytest.skip("jsonschema is not installed", allow_module_level=True)
import jsonschema

CHAPTER = Path(__file__).resolve().parents[1] / "12-backend-contract.md"
SCHEMAS = resources.files("rattention.spec") / "schemas"
REQUEST, REPLY = (json.loads((SCHEMAS / f"{name}.schema.json").read_text()) for name in ("request", "reply"))


def lines() -> list[tuple[str, dict[str, Any]]]:
    """(direction, line) of the conversation in the chapter."""
    block = next(b for b in re.findall(r"```text\n(.*?)```", CHAPTER.read_text(), re.DOTALL) if b.startswith("->"))
    folded = re.sub(r"\n(?=\s)", " ", block)
    return [(line[:2], json.loads(line[3:])) for line in folded.strip().splitlines()]


def check(direction: str, line: dict[str, Any]) -> None:
    jsonschema.validate(line, REQUEST if direction == "->" else REPLY)


def test_schemas_are_schemas():
    for schema in (REQUEST, REPLY):
        jsonschema.Draft202012Validator.check_schema(schema)


def test_the_conversation_of_the_chapter_is_valid():
    conversation = lines()
    kinds = [line.get("cmd") or line["reply"] for _, line in conversation]
    assert set(kinds) == {"start", "run", "stop", "describe", "result", "unsupported", "error"}
    for direction, line in conversation:
        check(direction, line)
    assert conversation[0][1]["spec_version"] == load().version


def test_the_error_of_the_chapter_is_what_validation_says():
    import numpy as np

    line = next(line for _, line in lines() if line.get("reply") == "error")
    x = np.zeros((1, 1, 1, 2), np.float32)
    with pytest.raises(SpecError) as info:
        validate("sliding_window_attention", {"q": x, "k": x, "v": x}, {"window": 4, "scale": float("inf")})
    assert line["message"] == str(info.value)
    assert line["spec_error"] == {name: getattr(info.value, name) for name in line["spec_error"]}


@pytest.mark.parametrize(
    ("direction", "line"),
    [
        ("->", {"cmd": "begin"}),
        ("->", {"cmd": "run", "id": 1, "op": "rattention", "attrs": {}, "tensors": "/a"}),
        ("->", {"cmd": "run", "id": 0, "op": "rattention", "attrs": {}, "tensors": "/a", "outputs": "/b"}),
        ("->", {"cmd": "run", "id": 1, "op": "rattention", "attrs": {"eps": [1]}, "tensors": "/a", "outputs": "/b"}),
        ("<-", {"reply": "result"}),
        ("<-", {"reply": "unsupported", "id": 1, "reason": ""}),
        ("<-", {"reply": "error", "id": 1}),
        ("<-", {"reply": "describe", "protocol": 1, "describe": {"name": "x"}}),
        ("<-", {"id": 1}),
        ("<-", ["result", 1]),
    ],
)
def test_what_is_not_the_protocol_is_refused(direction: str, line: Any):
    with pytest.raises(jsonschema.ValidationError):
        check(direction, line)


@pytest.mark.parametrize("name", ["numpy", "torch", "jax"])
def test_descriptions_of_the_backends_fit_the_schema(name: str):
    for module in (name, f"rattention.{name}"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    about = importlib.import_module(f"rattention.{name}.adapter").backend.describe()
    jsonschema.validate(json.loads(json.dumps(about)), {**REPLY["$defs"]["description"], "$defs": REPLY["$defs"]})
