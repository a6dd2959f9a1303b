"""Cases on disk: one safetensors file per case, the same for a stored vector, a captured activation and a failure.

Tensors are named `in.<name>`, `expected.<name>` and `budget.<name>`. The metadata entry `rattention` is a JSON object
with the keys format, op, attrs, clauses, note, source, seed, property and params; `manifest.json` beside a set of files
lists them. See docs/vectors.md. Anyone may have written such a file: what is wrong with it is one `CaseError`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from rattention.conformance import jsontext, tensorfile, wellformed
from rattention.conformance.case import Case, from_json, to_json
from rattention.conformance.wire import schema

FORMAT = 1
KEY = "rattention"
MANIFEST = "manifest.json"


class CaseError(ValueError):
    """A file that cannot be used as a case or as a manifest: one line that names it and says what is wrong."""

    def __init__(self, path: str | Path, reason: str):
        super().__init__(f"{path}: {' '.join(reason.split())}")


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
    """Read one case, whatever it calls.

    Raises:
        CaseError: the file cannot be read, or is no case of a format that this version reads.
    """
    try:
        return _parse_case(_read(path))
    except (ValueError, RecursionError) as error:
        raise CaseError(path, _why(error)) from None


def load_valid(path: str | Path) -> Case:
    """Read one case that a backend is to be judged on.

    Raises:
        CaseError: as `load_case`; or the call is not valid, or what is stored beside it does not fit its outputs.
    """
    case = load_case(path)
    wrong = wellformed.fault(case)
    if wrong:
        raise CaseError(path, wrong)
    return case


def _parse_case(raw: bytes) -> Case:
    tensors, metadata = tensorfile.parse(raw)
    if KEY not in metadata:
        raise ValueError(f"a safetensors file, but not a case: it has no metadata entry {KEY!r}")
    about = _described("case", "metadata", metadata[KEY])
    groups: dict[str, dict[str, Any]] = {"in": {}, "expected": {}, "budget": {}}
    for full, array in tensors.items():
        kind, _, name = full.partition(".")
        if kind not in groups or not name:
            raise ValueError(f"tensor {full!r} is none of in.NAME, expected.NAME, budget.NAME")
        groups[kind][name] = array
    seed = about.get("seed")
    return Case(
        op=about["op"],
        tensors=groups["in"],
        attrs=from_json(about["attrs"]),
        note=about.get("note", ""),
        seed=None if seed is None else int(seed),
        clauses=tuple(about.get("clauses", ())),
        source=about.get("source", ""),
        property_name=about.get("property", "agreement"),
        params=from_json(about.get("params", {})),
        expected=groups["expected"],
        budget=groups["budget"],
    )


def _read(path: str | Path) -> bytes:
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise ValueError("not a file")  # a folder, or a device that would be read for ever
        return Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror or error}") from None


def _described(name: str, what: str, text: str) -> dict[str, Any]:
    """A JSON text that keeps to the schema `name`, of a format that this version reads."""
    try:
        about = jsontext.parse(text)
    except ValueError as error:
        raise ValueError(f"{what} is not JSON: {error}") from None
    number = about.get("format") if isinstance(about, dict) else None
    if number is not None and (isinstance(number, bool) or number != FORMAT):
        raise ValueError(f"{name} format {number!r}; this version reads format {FORMAT}")
    wrong = schema.fault(name, about)
    if wrong:
        raise ValueError(f"{what}: {wrong}")
    return about


def _why(error: Exception) -> str:
    return "nested too deep" if isinstance(error, RecursionError) else str(error)


def set_files(cases: Mapping[str, Case], about: Mapping[str, Any] | None = None) -> dict[str, bytes]:
    """File name to content of a set: `cases` (name to case), and their manifest at the end.

    `about` adds keys to the manifest: what the set is, licence, how to make it again.
    """
    files: dict[str, bytes] = {}
    entries = []
    for name, case in cases.items():
        data = files[f"{name}.safetensors"] = case_bytes(case)
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
    return {**files, MANIFEST: text.encode("utf-8")}


def save_set(folder: str | Path, cases: Mapping[str, Case], about: Mapping[str, Any] | None = None) -> Path:
    """Write the files of `set_files` into `folder`; returns the manifest."""
    for name, data in set_files(cases, about).items():
        tensorfile.write_bytes(Path(folder) / name, data)
    return Path(folder) / MANIFEST


def list_set(path: str | Path) -> list[Path]:
    """Files of a set: `path` is a manifest, a folder with or without one, or a single case.

    Raises:
        CaseError: the manifest is malformed or says of a file what is not so, a case beside it is not listed, or there
            is no case at all.
    """
    path = Path(path)
    if path.is_dir():
        path = path / MANIFEST if (path / MANIFEST).exists() else path
    if path.is_dir() and path.name != MANIFEST:
        files = sorted(path.rglob("*.safetensors"))
    elif path.suffix == ".json":
        files = _listed(path, read_manifest(path)["cases"])
    else:
        files = [path]
    if not files:
        raise CaseError(path, "no cases there")
    return files


def read_manifest(path: Path) -> dict[str, Any]:
    """A manifest as it stands.

    Raises:
        CaseError: it cannot be read, or is malformed.
    """
    try:
        return _described("manifest", "manifest", _read(path).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CaseError(path, _why(error)) from None


def _listed(manifest: Path, entries: list[dict[str, Any]]) -> list[Path]:
    """The files of a manifest, each once, and no case in its folder left out."""
    files: dict[Path, Path] = {}
    for entry in entries:
        file = _entry(manifest, entry)
        if file.resolve() in files:
            raise CaseError(manifest, f"{entry['file']} is listed twice")
        files[file.resolve()] = file
    for file in sorted(manifest.parent.rglob("*.safetensors")):
        if file.resolve() not in files:
            raise CaseError(manifest, f"{file.relative_to(manifest.parent)} lies in its folder and is not listed")
    return list(files.values())


def _entry(manifest: Path, entry: Mapping[str, Any]) -> Path:
    """The file of one entry, which must be what the entry says of it."""
    name = entry["file"]
    place = PurePosixPath(name)
    if place.is_absolute() or ".." in place.parts:
        raise CaseError(manifest, f"{name} leads out of its folder")
    file = manifest.parent / name
    try:
        data = _read(file)
    except ValueError as error:
        raise CaseError(manifest, f"{name} is listed but missing: {error}") from None
    if "sha256" in entry and hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise CaseError(manifest, f"{name} differs from its checksum")
    said = {key: entry[key] for key in ("op", "clauses", "note", "source") if key in entry}
    if said:
        try:
            case = _parse_case(data)
        except (ValueError, RecursionError) as error:
            raise CaseError(file, _why(error)) from None
        held = {"op": case.op, "clauses": list(case.clauses), "note": case.note, "source": case.source}
        wrong = next((key for key, value in said.items() if held[key] != value), "")
        if wrong:
            raise CaseError(manifest, f"{name}: {wrong} is {held[wrong]!r} in the file, {said[wrong]!r} here")
    return file


def load_set(path: str | Path) -> Iterable[tuple[Path, Case]]:
    """Every case of a set, one at a time."""
    for file in list_set(path):
        yield file, load_case(file)
