"""The case format: what is written is what is read, bit for bit, and by other readers."""

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from rattention.conformance import tensorfile, vectors
from rattention.conformance.case import Case


def example() -> Case:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 3, 2, 4)).astype(ml_dtypes.bfloat16)
    x[0, 1, 0, 2] = np.nan
    return Case(
        op="feature_map",
        tensors={"x": x, "empty": np.zeros((0, 3), np.int32), "scalar": np.float32(2)},  # type: ignore[dict-item]
        attrs={"feature_map": "softmax", "scale": float("inf"), "window": None},
        note="why",
        seed=7,
        clauses=("FM-1",),
        params={"splits": [1, 2]},
        expected={"out": rng.normal(size=(1, 3, 2, 8))},
        budget={"out": np.full((1, 3, 2, 8), 1e-3)},
    )


def test_round_trip_is_exact(tmp_path):
    case = example()
    file = vectors.save_case(tmp_path / "deep" / "a.safetensors", case)
    back = vectors.load_case(file)
    for group in ("tensors", "expected", "budget"):
        one, other = getattr(case, group), getattr(back, group)
        assert list(sorted(one)) == list(sorted(other))
        for name in one:
            assert np.asarray(one[name]).dtype == other[name].dtype
            assert np.asarray(one[name]).shape == other[name].shape
            assert np.asarray(one[name]).tobytes() == other[name].tobytes()
    assert (back.attrs, back.note, back.seed, back.clauses, back.params) == (
        case.attrs,
        case.note,
        case.seed,
        case.clauses,
        case.params,
    )
    assert vectors.case_bytes(case) == vectors.case_bytes(back) == file.read_bytes()


def test_the_safetensors_package_reads_it(tmp_path):
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.arange(3, dtype=np.int32)}
    tensorfile.write(tmp_path / "x.safetensors", arrays, {"k": "v"})
    read = safetensors.numpy.load_file(tmp_path / "x.safetensors")
    assert all(np.array_equal(arrays[k], read[k]) for k in arrays)
    safetensors.numpy.save_file(arrays, tmp_path / "y.safetensors", {"k": "w"})
    ours, metadata = tensorfile.read(tmp_path / "y.safetensors")
    assert metadata == {"k": "w"}
    assert all(np.array_equal(arrays[k], ours[k]) for k in arrays)


@pytest.mark.parametrize("raw", [b"", b"\x01", b"\xff" * 40, b"\x08" + b"\0" * 7 + b"not json"])
def test_garbage_is_refused(raw):
    with pytest.raises(ValueError, match="not a safetensors file"):
        tensorfile.parse(raw)


def test_a_set_is_checked_against_its_manifest(tmp_path):
    manifest = vectors.save_set(tmp_path / "set", {"one": example()}, {"licence": "Apache-2.0"})
    assert [f.name for f, _ in vectors.load_set(manifest)] == ["one.safetensors"]
    assert [f.name for f in vectors.list_set(tmp_path / "set")] == ["one.safetensors"]
    file = tmp_path / "set" / "one.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ValueError, match="checksum"):
        vectors.list_set(manifest)
    file.unlink()
    with pytest.raises(ValueError, match="missing"):
        vectors.list_set(manifest)
