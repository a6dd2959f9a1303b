"""Files that are no case or no manifest: exit code 2 and one line that names the file, never a verdict on a backend."""

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from rattention.conformance import vectors
from rattention.conformance.case import Case
from rattention.conformance.cli import app
from rattention.conformance.properties import REGISTRY, make_case
from rattention.conformance.replay import check_files
from rattention.conformance.runner import Settings, plan_units
from rattention.conformance.strategies import make_plan
from rattention.conformance.wellformed import PARAMS
from rattention.numpy.adapter import backend as honest
from typer.testing import CliRunner

ABOUT = {"format": 1, "op": "feature_map", "attrs": {}}
X = {"dtype": "F32", "shape": [1, 2, 1, 4], "data_offsets": [0, 32]}
ONES = np.ones(8, np.float32).tobytes()


def raw(header, data: bytes = ONES) -> bytes:
    """A safetensors file with this header, whatever it is."""
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(head)) + head + data


def about(**changes) -> bytes:
    """A case of feature_map with its metadata changed; a change to ... leaves the key out."""
    told = {k: v for k, v in (ABOUT | changes).items() if v is not ...}
    return described(json.dumps(told))


def described(text: str, **tensors) -> bytes:
    return raw({"__metadata__": {"rattention": text}, **(tensors or {"in.x": X})})


def x(**changes) -> bytes:
    """The same case with the entry of its tensor changed."""
    return described(json.dumps(ABOUT), **{"in.x": X | changes})


def call(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    return result.exit_code, result.stdout, result.stderr


def refused(path, *arguments):
    """The one line on stderr about `path`."""
    code, out, err = call(*arguments)
    assert code == 2, (out, err)
    assert "FAIL" not in out
    assert len(err.splitlines()) == 1, err
    assert str(path) in err
    return err


DEEP = "[" * 100_000 + "]" * 100_000
FILES = {
    "empty": (b"", "header too small"),
    "half a length": (b"\1\2\3", "header too small"),
    "text": (b"this is no case, whatever its name says", "not a safetensors file"),
    "header length": (struct.pack("<Q", 2**62) + b"{}", "header too large"),
    "truncated header": (raw(ABOUT)[:30], "invalid header length"),
    "truncated data": (about()[:-1], "not fully covered"),
    "more data": (about() + b"\0", "not fully covered"),
    "header is a list": (raw([1]), "not a safetensors file"),
    "header is deep": (raw(DEEP.encode()), "not a safetensors file"),
    "header is not UTF-8": (raw(b'{"\xff": 1}'), "UTF-8"),
    "NaN in the header": (raw(b'{"in.x":{"dtype":"F32","shape":[NaN],"data_offsets":[0,32]}}'), "not a safetensors"),
    "a tensor twice": (
        raw(json.dumps({"in.x": X})[:-1].encode() + b"," + json.dumps({"in.x": X})[1:].encode()),
        "twice",
    ),
    "metadata is a list": (raw({"__metadata__": ["rattention"], "in.x": X}), "not a safetensors file"),
    "metadata is a number": (raw({"__metadata__": {"rattention": 3}, "in.x": X}), "not a safetensors file"),
    "no metadata": (raw({"in.x": X}), "no metadata entry"),
    "metadata of others": (raw({"__metadata__": {"format": "pt"}, "in.x": X}), "no metadata entry"),
    "negative shape": (x(shape=[-1, 2, 1, 4]), "-1"),
    "fractional shape": (x(shape=[1, 2, 1, 4.0]), "not a safetensors file"),
    "another size": (x(shape=[1, 2, 1, 5]), "not a safetensors file"),
    "huge and empty": (
        raw(
            {
                "__metadata__": {"rattention": json.dumps(ABOUT)},
                "in.x": X | {"shape": [0, 2**62, 2**62, 4], "data_offsets": [0, 0]},
            },
            b"",
        ),
        "not a safetensors file",
    ),
    "overflow": (x(shape=[2**62, 2**62, 1, 4]), "overflow"),
    "offsets past the end": (x(shape=[1, 2, 1, 8], data_offsets=[0, 64]), "not fully covered"),
    "offsets turned": (x(data_offsets=[32, 0]), "offset"),
    "overlap": (described(json.dumps(ABOUT), **{"in.x": X, "in.y": X}), "offset"),
    "a hole": (x(shape=[1, 1, 1, 4], data_offsets=[16, 32]), "offset"),
    "dtype unknown": (x(dtype="F33"), "F33"),
    "dtype of no case": (x(dtype="F8_E4M3", shape=[1, 8, 1, 4]), "F8_E4M3"),
    "dtype of no input": (x(dtype="F64", shape=[1, 1, 1, 4]), "float64"),
    "tensor without a group": (described(json.dumps(ABOUT), x=X), "none of in.NAME"),
    "tensor without a name": (described(json.dumps(ABOUT), **{"in.": X}), "none of in.NAME"),
    "tensor unknown": (described(json.dumps(ABOUT), **{"in.y": X}), "unknown tensor"),
    "tensor missing": (raw({"__metadata__": {"rattention": json.dumps(ABOUT)}}, b""), "x: expected a tensor"),
    "about is text": (described("hello"), "not JSON"),
    "about is a list": (described("[1]"), "expected object, got [1]"),
    "about is deep": (described(DEEP), "nested too deep"),
    "params are deep": (
        described('{"format": 1, "op": "rms_mix", "attrs": {}, "params": {"a": ' + DEEP + "}}"),
        "too deep",
    ),
    "NaN in about": (described('{"format": 1, "op": "feature_map", "attrs": {}, "params": {"a": NaN}}'), "NaN"),
    "1e999 in about": (described('{"format": 1, "op": "feature_map", "attrs": {}, "params": {"a": 1e999}}'), "1e999"),
    "a key twice": (described('{"format": 1, "op": "feature_map", "op": "rms_mix", "attrs": {}}'), "'op' comes twice"),
    "format 2": (about(format=2), "format 2; this version reads format 1"),
    "format true": (about(format=True), "format True"),
    "format text": (about(format="1"), "format '1'"),
    "no format": (about(format=...), "format"),
    "no op": (about(op=...), "op"),
    "no attrs": (about(attrs=...), "attrs"),
    "a key unknown": (about(propery="membership"), "propery"),
    "op unknown": (about(op="nonsense"), "nonsense"),
    "op a list": (about(op=["feature_map"]), "op"),
    "attrs null": (about(attrs=None), "attrs"),
    "attrs a list": (about(attrs=[1]), "attrs"),
    "attribute unknown": (about(attrs={"windw": 3}), "windw"),
    "attribute a list": (about(attrs={"feature_map": ["relu"]}), "attrs/feature_map"),
    "attribute no choice": (about(attrs={"feature_map": "elu"}), "elu"),
    "attribute no float": (about(attrs={"feature_map": {"float": "1.5"}}), "1.5"),
    "params a list": (about(params=[1]), "params"),
    "params no float": (about(params={"a": [{"float": 3}]}), "float"),
    "clauses a number": (about(clauses=3), "clauses"),
    "clauses of numbers": (about(clauses=[3]), "clauses/0"),
    "clause unknown": (about(clauses=["FM-1", "FM-one"]), "no clause 'FM-one'"),
    "clause twice": (about(clauses=["FM-1", "FM-1"]), "clauses"),
    "note a number": (about(note=3), "note"),
    "seed a fraction": (about(seed=1.5), "seed"),
    "property unknown": (about(property="nonsense"), "no property 'nonsense'"),
    "property a list": (about(property=["agreement"]), "property"),
    "property half a surrogate": (about(property="\ud800"), "no property"),
    "params missing": (about(property="membership"), "cannot judge it"),
    "params unknown": (about(property="rows", params={"row": 0, "rwo": 1}), "'rwo' is none of the property 'rows'"),
    "params of no property": (about(params={"row": 0}), "which takes none"),
    "params of no such value": (about(property="odd calls", params={"kind": "odd"}), "kind 'odd'"),
    "a layout unknown": (about(property="strides", params={"layouts": {"x": "diagonal"}}), "layout 'diagonal'"),
    "a row that is not there": (about(property="rows", params={"row": 3}), "cannot judge it"),
    "white space before the header": (struct.pack("<Q", 3) + b" {}", "must begin with {"),
    "a newline behind the header": (struct.pack("<Q", 3) + b"{}\n", "spaces alone"),
    "describe without params": (about(property="description"), "cannot judge it"),
    "bad input, yet good": (about(property="bad input", params={"text": "x", "entry": "x", "target": "x"}), "is valid"),
    "bad input, other words": (about(property="bad input", attrs={"feature_map": "elu"}), "refuses this call with"),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_malformed_case_is_refused_by_name(kind, tmp_path):
    data, said = FILES[kind]
    file = tmp_path / "the case.safetensors"
    file.write_bytes(data)
    assert said in refused(file, "replay", file, "numpy")
    assert said in refused(file, "vectors", "check", tmp_path, "numpy")
    # Before any backend is asked: this one does not even load.
    assert said in refused(file, "conform", "no-such-backend", "--profile", "smoke", "--vectors", file)


def test_what_is_no_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    Path("folder").mkdir()
    Path("loop").symlink_to("loop")
    for name in ("missing", "folder", "pipe", "loop", "/dev/zero"):
        refused(name, "replay", name, "numpy")
        refused(name, "vectors", "check", name, "numpy")
        refused(name, "conform", "numpy", "--profile", "smoke", "--vectors", name)


V = np.full((1, 2, 1, 8), 0.25)
STORED = {
    "another output": ({"final_state": V}, {}, "no output of the call"),
    "budget of another output": ({}, {"d_x": V}, "no output of the call"),
    "another shape": ({"out": V[:, :1]}, {}, "expected.out is float64[1, 1, 1, 8]"),
    "another dtype": ({"out": V.astype(np.float32)}, {}, "expected.out is float32"),
    "one budget for all": ({"out": V}, {"out": np.float64(1)}, "budget.out is float64[]"),
    "budget below 0": ({"out": V}, {"out": -V}, "negative"),
    "budget NaN": ({"out": V}, {"out": V * np.nan}, "NaN"),
}
LENGTHS = [0.5, np.nan, np.inf, 2.0**31]


@pytest.mark.parametrize("kind", STORED)
def test_an_answer_that_does_not_fit_the_call_is_refused(kind, tmp_path):
    expected, budget, said = STORED[kind]
    tensors = {"x": np.ones((1, 2, 1, 4), np.float32)}
    file = vectors.save_case(tmp_path / "a", Case("feature_map", tensors, {}, expected=expected, budget=budget))
    assert said in refused(file, "replay", file, "numpy")


@pytest.mark.parametrize("length", LENGTHS)
def test_a_number_that_no_integer_output_can_be_is_refused(length, tmp_path):
    """No backend could give such an answer: `cache_length` is int32, whatever dtype stores what is expected."""
    plan = make_plan("smoke", 0, honest.describe())
    recipe = next(r for r in REGISTRY["agreement"].draw(plan) if r.op == "rattention_extend")
    case = make_case(REGISTRY["agreement"], plan, recipe)
    assert case is not None
    stored = np.full(case.tensors["cache_length"].shape, 3.0)
    stored[0] = length
    case.expected = {"cache_length": stored}
    file = vectors.save_case(tmp_path / "a", case)
    assert "expected.cache_length holds what no int32 is" in refused(file, "replay", file, "numpy")


MANIFESTS = {
    "empty": b"",
    "a list": b"[]",
    "null": b"null",
    "not UTF-8": b"\xff\xfe",
    "deep": DEEP.encode(),
    "NaN": b'{"format": 1, "cases": NaN}',
    "no cases": b'{"format": 1}',
    "no format": b'{"cases": [{"file": "good"}]}',
    "format 2": b'{"format": 2, "cases": [{"file": "good"}]}',
    "cases a number": b'{"format": 1, "cases": 3}',
    "cases of numbers": b'{"format": 1, "cases": [3]}',
    "none": b'{"format": 1, "cases": []}',
    "no file": b'{"format": 1, "cases": [{}]}',
    "file a number": b'{"format": 1, "cases": [{"file": 3}]}',
    "file missing": b'{"format": 1, "cases": [{"file": "good"}, {"file": "missing"}]}',
    "file a folder": b'{"format": 1, "cases": [{"file": "."}]}',
    "file too long": b'{"format": 1, "cases": [{"file": "%s"}]}' % (b"a" * 5000),
    "file with NUL": b'{"format": 1, "cases": [{"file": "a\\u0000"}]}',
    "file outside": b'{"format": 1, "cases": [{"file": "../good"}]}',
    "file absolute": b'{"format": 1, "cases": [{"file": "/dev/null"}]}',
    "file twice": b'{"format": 1, "cases": [{"file": "good"}, {"file": "./good"}]}',
    "a key twice": b'{"format": 1, "cases": [{"file": "good"}], "cases": [{"file": "good"}]}',
    "an entry's key unknown": b'{"format": 1, "cases": [{"file": "good", "sha265": "00"}]}',
    "op of another": b'{"format": 1, "cases": [{"file": "good", "op": "rms_mix"}]}',
    "op unknown": b'{"format": 1, "cases": [{"file": "good", "op": "nonsense"}]}',
    "clauses of another": b'{"format": 1, "cases": [{"file": "good", "clauses": ["FM-1"]}]}',
    "note of another": b'{"format": 1, "cases": [{"file": "good", "note": "another"}]}',
    "source of another": b'{"format": 1, "cases": [{"file": "good", "source": "another"}]}',
    "checksum a number": b'{"format": 1, "cases": [{"file": "good", "sha256": 3}]}',
    "checksum short": b'{"format": 1, "cases": [{"file": "good", "sha256": "00"}]}',
    "checksum of another": b'{"format": 1, "cases": [{"file": "good", "sha256": "%s"}]}' % (b"0" * 64),
}


@pytest.mark.parametrize("kind", MANIFESTS)
def test_a_malformed_manifest_is_refused_by_name(kind, tmp_path):
    (tmp_path / "good").write_bytes(about())
    file = tmp_path / "manifest.json"
    file.write_bytes(MANIFESTS[kind])
    for path in (tmp_path, file):
        refused(file, "vectors", "check", path, "numpy")
        refused(file, "conform", "numpy", "--profile", "smoke", "--vectors", path)


def test_a_case_beside_a_manifest_is_not_passed_over(tmp_path):
    """Everything that is stored is judged; a file that was copied into a set has no checksum yet."""
    (tmp_path / "deep").mkdir()
    for name in ("listed", "deep/copied"):
        (tmp_path / f"{name}.safetensors").write_bytes(about())
    manifest = tmp_path / "manifest.json"
    manifest.write_text('{"format": 1, "cases": [{"file": "listed.safetensors"}]}')
    for path in (tmp_path, manifest):
        assert "copied.safetensors" in refused(manifest, "vectors", "check", path, "numpy")
    (tmp_path / "deep" / "copied.safetensors").unlink()
    assert call("vectors", "check", tmp_path, "numpy")[0] == 0


def test_a_case_that_is_named_twice_is_run_once(tmp_path):
    file = tmp_path / "a.safetensors"
    file.write_bytes(about())
    given = (str(tmp_path), str(file), str(tmp_path / "." / "a.safetensors"))
    plan = make_plan("smoke", 0, honest.describe(), given)
    assert len(list(REGISTRY["stored vectors"].draw(plan))) == 1


def test_the_names_of_params_are_those_that_the_suite_writes():
    """Of every property's cases at quick, the small ones."""
    plan = make_plan("quick", 4, honest.describe())
    found: dict[str, set[str]] = {}
    for unit in plan_units(plan, Settings("quick", 4)):
        if unit.property_name == "agreement" or (unit.recipe.T > 200 and unit.property_name != "drift"):
            continue
        case = make_case(REGISTRY[unit.property_name], plan, unit.recipe)
        if case is not None:
            found.setdefault(unit.property_name, set()).update(case.params)
    assert set(PARAMS) <= set(REGISTRY)
    for name, params in found.items():
        assert params <= set(PARAMS.get(name, ())), name


def test_a_set_with_one_malformed_case_judges_none(tmp_path):
    for name, data in (("a", about()), ("b", about(seed=1.5)), ("c", about())):
        (tmp_path / f"{name}.safetensors").write_bytes(data)
    code, out, err = call("vectors", "check", tmp_path, "numpy")
    assert (code, out) == (2, "")
    assert "b.safetensors" in err


def test_what_is_well_formed_is_judged(tmp_path):
    for number, data in enumerate(
        (about(), about(seed=10**30), about(clauses=["FM-1"], property="rows", params={"row": 0}))
    ):
        (tmp_path / f"{number}.safetensors").write_bytes(data)
    code, out, _ = call("vectors", "check", tmp_path, "numpy")
    assert code == 0
    assert "3 of 3 cases conform" in out


def test_every_case_that_the_suite_writes_is_one_that_it_reads(tmp_path):
    """Three cases of every property: the file is whole, and the reference passes it again."""
    plan = make_plan("smoke", 4, honest.describe())
    taken: dict[str, int] = dict.fromkeys(REGISTRY, 0)
    files = []
    for unit in plan_units(plan, Settings("smoke", 4)):
        case = make_case(REGISTRY[unit.property_name], plan, unit.recipe) if taken[unit.property_name] < 3 else None
        if case is not None and max((t.size for t in case.tensors.values()), default=0) < 4096:
            taken[unit.property_name] += 1
            files.append(vectors.save_case(tmp_path / f"{len(files)}.safetensors", case))
    check_files(files)
    # The one has cases of its own on disk alone, the other none in smoke.
    assert {name for name, count in taken.items() if not count} == {"stored vectors", "long sums"}
