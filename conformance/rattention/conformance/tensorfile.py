"""Named arrays in one safetensors file, bfloat16 included.

The format is an 8-byte little-endian header length, a JSON header, and the raw little-endian data. The safetensors
package reads it, so that a malformed file is refused by the rules of the format. It is written here rather than through
the package, whose NumPy side has no bfloat16, and whose byte order of entries and metadata is not fixed: the same
arrays must give the same bytes.
"""

from __future__ import annotations

import json
import os
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
from rattention.conformance import jsontext

CODES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
NAMES = {dtype: code for code, dtype in CODES.items()}


def dump(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> bytes:
    """The bytes of a safetensors file; equal arguments give equal bytes."""
    header: dict[str, Any] = {"__metadata__": dict(sorted((metadata or {}).items()))}
    parts: list[bytes] = []
    offset = 0
    # Wide dtypes first keeps every tensor aligned to its own element size.
    for name, array in sorted(tensors.items(), key=lambda kv: (-np.asarray(kv[1]).dtype.itemsize, kv[0])):
        data = np.ascontiguousarray(array)
        if data.dtype not in NAMES:
            raise TypeError(f"tensor {name!r}: no safetensors code for dtype {data.dtype}")
        raw = data.tobytes()
        header[name] = {
            "dtype": NAMES[data.dtype],
            "shape": list(np.shape(array)),
            "data_offsets": [offset, offset + len(raw)],
        }
        offset += len(raw)
        parts.append(raw)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return b"".join([struct.pack("<Q", len(text)), text, *parts])


def parse(raw: bytes) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Arrays (fresh, writable) and metadata of a safetensors file.

    Raises:
        ValueError: the bytes are not a safetensors file.
    """
    tensors = {}
    try:
        entries = safetensors.deserialize(raw)
        (size,) = struct.unpack_from("<Q", raw)
        header = raw[8 : 8 + size].decode("utf-8")
        # What the rules of the format forbid and the package accepts: white space around the header other than spaces
        # behind it, and a name that comes twice, which jsontext refuses. It does not hand out the metadata either.
        if not (header.startswith("{") and header.rstrip(" ").endswith("}")):
            raise ValueError("the header must begin with { and may end with spaces alone")
        metadata = jsontext.parse(header).get("__metadata__") or {}
        for name, entry in entries:
            if entry["dtype"] not in CODES:
                known = ", ".join(CODES)
                raise ValueError(f"tensor {name!r} has dtype {entry['dtype']}, expected one of {known}")
            flat = np.frombuffer(bytes(entry["data"]), CODES[entry["dtype"]])
            tensors[name] = flat.reshape(entry["shape"]).copy()
    except (safetensors.SafetensorError, ValueError, OverflowError) as fault:
        raise ValueError(f"not a safetensors file: {_reason(fault)}") from fault
    return tensors, metadata


def _reason(fault: Exception) -> str:
    text = " ".join(str(fault).split()).removeprefix("Error while deserializing: ")
    return text if len(text) <= 300 else f"{text[:300]}..."


def write(path: str | Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> Path:
    """Write to a temporary name beside `path`, then move it there: a reader never sees half a file."""
    return write_bytes(path, dump(tensors, metadata))


def write_bytes(path: str | Path, data: bytes) -> Path:
    """Create or replace `path` in one step."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(data)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return path


def read(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Arrays and metadata of a file written by anyone.

    Raises:
        ValueError: the file is not safetensors.
    """
    return parse(Path(path).read_bytes())
