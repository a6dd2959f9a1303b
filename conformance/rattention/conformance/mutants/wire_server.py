"""The eager form as a program that speaks the wire protocol (chapter 12), rightly or wrongly."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from rattention.conformance import tensorfile
from rattention.conformance.case import from_json
from rattention.conformance.mutants.port import Port
from rattention.spec import SpecError, Unsupported


def serve(how: str = "") -> None:
    """Answer requests on stdin until `stop`; `how` names a fault of `wire.py`, "" for none."""
    port, count = Port(), 0
    for line in sys.stdin:
        request = json.loads(line)
        if request["cmd"] == "stop":
            return
        if request["cmd"] == "start":
            _say({"reply": "describe", "protocol": 1, "describe": port.describe()})
            continue
        count += 1
        if how == "crash" and count % 3 == 0:
            os._exit(3)
        if how == "garbage" and count % 3 == 0:
            sys.stdout.write("Segmentation fault (core dumped)\n")
            sys.stdout.flush()
            os._exit(0)
        reply = _run(port, request, how)
        if how == "chatter":
            sys.stdout.write(f"step {count} done\n")
        _say(reply)
        if how == "twice":
            _say(reply)


def _run(port: Port, request: dict[str, Any], how: str) -> dict[str, Any]:
    identity = {"id": request["id"] - (how == "order")}
    tensors, _ = tensorfile.read(request["tensors"])
    try:
        outputs = port.run(request["op"], tensors, from_json(request["attrs"]))
    except Unsupported as refusal:
        return {"reply": "unsupported", **identity, "reason": refusal.reason}
    except SpecError as error:
        return {"reply": "error", **identity, "message": str(error)}
    if how == "names":
        outputs = {f"output{i}": x for i, x in enumerate(outputs.values())}
    if how != "nothing":
        tensorfile.write(request["outputs"], outputs)
    return {"reply": "result", **identity, "metadata": {"path": "eager", "kernels": []}}


def _say(reply: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(reply) + "\n")
    sys.stdout.flush()
