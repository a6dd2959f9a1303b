"""The eager form as a program that speaks the wire protocol (chapter 12), rightly or wrongly."""

from __future__ import annotations

import json
import os
import struct
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
from rattention.conformance import tensorfile
from rattention.conformance.case import from_json
from rattention.conformance.mutants.port import Port
from rattention.spec import SpecError, Unsupported


def serve(how: str = "") -> None:
    """Answer requests on stdin until `stop`; `how` names a fault of `wire.py`, "" for none."""
    port, count = Port(), 0
    for line in sys.stdin:
        request = json.loads(line)
        if request["cmd"] == "stop" and how != "deaf":
            _stop(how)
            return
        if request["cmd"] == "stop":
            continue
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
        if how == "hang" and count % 3 == 0:
            continue
        reply = _run(port, request, how)
        if how == "chatter":
            sys.stdout.write(f"step {count} done\n")
            sys.stdout.flush()
        _say(reply, how)
        if how == "twice":
            _say(reply)


def _stop(how: str) -> None:
    if how == "farewell":
        sys.stdout.write("bye\n")
    if how == "status":
        sys.exit(1)


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
    if how == "padding":
        data = tensorfile.dump(outputs)
        tensorfile.write_bytes(request["outputs"], data + b"\0" * (64 - len(data) % 64))
    elif how == "holes":
        tensorfile.write_bytes(request["outputs"], _with_holes(outputs))
    elif how != "nothing":
        tensorfile.write(request["outputs"], outputs)
    seconds = {"seconds": float("nan")} if how == "nan" else {}
    return {"reply": "result", **identity, "metadata": {"path": "eager", "kernels": [], **seconds}}


def _with_holes(outputs: Mapping[str, np.ndarray]) -> bytes:
    header, data = {}, b""
    for name, x in outputs.items():
        begin = -(-len(data) // 64) * 64
        data = data.ljust(begin, b"\0") + x.tobytes()
        code = tensorfile.NAMES[x.dtype]
        header[name] = {"dtype": code, "shape": list(x.shape), "data_offsets": [begin, len(data)]}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def _say(reply: dict[str, Any], how: str = "") -> None:
    line = json.dumps(reply).encode()
    if how == "keys" and "id" in reply:
        line = line.replace(b'{"reply"', b'{"id": 0, "reply"')
    if how == "latin":
        line = line.replace(b"}", ', "by": "Ren\u00e9"}'.encode("latin-1"), 1)
    sys.stdout.buffer.write(line + (b"" if how == "newline" else b"\n"))
    sys.stdout.buffer.flush()
