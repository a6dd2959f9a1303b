"""Cases on disk: one safetensors file per case, the same for a stored vector, a captured activation and a failure.

Tensors are named `in.<name>`, `expected.<name>` and `budget.<name>`. The metadata entry `rattention` is a JSON object
with the keys format, op, attrs, clauses, note, source, seed, property and params; `manifest.json` beside a set of files
lists them. See docs/vectors.md.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rattention.conformance import tensorfile
from rattention.conformance.case import Case, from_json, to_json

FORMAT = 1
KEY = "rattention"
MANIFEST = "manifest.json"


def case_bytes(case: Case) -> bytes:
    """The file of a case; equal cases give equal bytes."""
    about = {
        "format": FORMAT,
        "op": case.op,
        "attrs": to_json(case.attrs),
        "clauses": list(case.clauses),
        "note": case.note,
        "source": case.source,
        "seed": case.seed,
        "property": case.property_name,
        "params": to_json(case.params),
    }
    tensors = {
        f"{kind}.{name}": array
        for kind, group in (("in", case.tensors), ("expected", case.expected), ("budget", case.budget))
        for name, array in group.items()
    }
    return tensorfile.dump(tensors, {KEY: json.dumps(about, sort_keys=True, ensure_ascii=False, allow_nan=False)})


def save_case(path: str | Path, case: Case) -> Path:
    """Write one case in one step (temporary name, then move)."""
    return tensorfile.write_bytes(path, case_bytes(case))


def load_case(path: str | Path) -> Case:
    """Read one case.

    Raises:
        ValueError: the file is not a case of a format this version reads.
    """
    tensors, metadata = tensorfile.read(path)
    if KEY not in metadata:
        raise ValueError(f"{path}: a safetensors file, but not a case: it has no metadata entry {KEY!r}")
    about = json.loads(metadata[KEY])
    if about.get("format") != FORMAT:
        raise ValueError(f"{path}: case format {about.get('format')}; this version reads format {FORMAT}")
    groups: dict[str, dict[str, Any]] = {"in": {}, "expected": {}, "budget": {}}
    for full, array in tensors.items():
        kind, _, name = full.partition(".")
        if kind not in groups or not name:
            raise ValueError(f"{path}: tensor {full!r} is none of in.NAME, expected.NAME, budget.NAME")
        groups[kind][name] = array
    return Case(
        op=about["op"],
        tensors=groups["in"],
        attrs=from_json(about["attrs"]),
        note=about.get("note", ""),
        seed=about.get("seed"),
        clauses=tuple(about.get("clauses", ())),
        source=about.get("source", ""),
        property_name=about.get("property", "agreement"),
        params=from_json(about.get("params", {})),
        expected=groups["expected"],
        budget=groups["budget"],
    )


def save_set(folder: str | Path, cases: Mapping[str, Case], about: Mapping[str, Any] | None = None) -> Path:
    """Write `cases` (name to case) and their manifest into `folder`.

    `about` adds keys to the manifest: what the set is, licence, how to make it again.
    """
    folder = Path(folder)
    entries = []
    for name, case in cases.items():
        data = case_bytes(case)
        tensorfile.write_bytes(folder / f"{name}.safetensors", data)
        entries.append(
            {
                "file": f"{name}.safetensors",
                "op": case.op,
                "clauses": list(case.clauses),
                "note": case.note,
                "source": case.source,
                "sha256": hashlib.sha256(data).hexdigest(),
            }
        )
    manifest = {"format": FORMAT, **(about or {}), "cases": entries}
    text = json.dumps(to_json(manifest), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return tensorfile.write_bytes(folder / MANIFEST, text.encode("utf-8"))


def list_set(path: str | Path) -> list[Path]:
    """Files of a set: `path` is a manifest, a folder with or without one, or a single case.

    Raises:
        ValueError: a file listed in the manifest is missing or its checksum differs.
    """
    path = Path(path)
    if path.is_dir():
        path = path / MANIFEST if (path / MANIFEST).is_file() else path
    if path.is_dir():
        return sorted(path.rglob("*.safetensors"))
    if path.suffix != ".json":
        return [path]
    files = []
    for entry in json.loads(path.read_text(encoding="utf-8"))["cases"]:
        file = path.parent / entry["file"]
        if not file.is_file():
            raise ValueError(f"{path}: {entry['file']} is listed but missing")
        if "sha256" in entry and hashlib.sha256(file.read_bytes()).hexdigest() != entry["sha256"]:
            raise ValueError(f"{path}: {entry['file']} differs from its checksum")
        files.append(file)
    return files


def load_set(path: str | Path) -> Iterable[tuple[Path, Case]]:
    """Every case of a set, one at a time."""
    for file in list_set(path):
        yield file, load_case(file)
