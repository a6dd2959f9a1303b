"""The port in plain C, through `exec:`: it conforms, and with a planted fault it fails and the clause is named."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from rattention.conformance import backends, vectors
from rattention.conformance.judge import compare
from rattention.conformance.reporting.summary import matrix
from rattention.conformance.runner import Outcome, Settings, conform
from rattention.numpy import budget
from rattention.spec import SpecError, Unsupported

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "conformance" / "ports" / "c" / "rattention_port.c"
COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
OPERATIONS = {
    "feature_map",
    "sliding_window_attention",
    "residual_linear_attention",
    "rms_mix",
    "rattention",
    "rattention_extend",
}

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C compiler (cc, gcc, clang) on PATH")


def build(folder: Path, *flags: str) -> str:
    """Compile with warnings as errors; returns what `conform` takes."""
    program = folder / "rattention_port"
    warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-misleading-indentation", "-Wno-unused-variable"]
    command = [str(COMPILER), "-O2", "-std=c11", *warnings, *flags, "-o", str(program), str(SOURCE), "-lm"]
    subprocess.run(command, check=True, timeout=120)
    return f"exec:{shlex.quote(str(program))}"


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    return build(tmp_path_factory.mktemp("port"))


def run(target: str, profile: str = "smoke", select: str = "") -> Outcome:
    return conform(target, Settings(profile, seed=7, select=select, workers=0))


def test_conforms(port):
    outcome = run(port)
    assert outcome.conforming, [f.violations[0].message for f in outcome.failures]
    passed = Counter(r.op for r in outcome.results if r.status == "pass")
    assert set(passed) >= OPERATIONS
    shown = {op: set(row.values()) for op, row in matrix(outcome).items()}
    assert {op for op, row in shown.items() if row == {"pass"}} == OPERATIONS
    assert {op for op, row in shown.items() if row == {"unsupported"}} == set(shown) - OPERATIONS


@pytest.mark.parametrize(
    ("fault", "clause", "select"),
    [
        (1, "SWA-1", "sliding_window_attention"),
        (2, "SWA-4", "sliding_window_attention"),
        (3, "NUM-3", ""),
        (4, "EXT-3", "rattention_extend"),
        (5, "MIX-2", ""),
    ],
    ids=["window", "heads", "state", "cache", "eps"],
)
def test_planted_fault_is_named(tmp_path, fault, clause, select):
    """The clause of the fault stands first in the report of at least one minimal case."""
    outcome = run(build(tmp_path, f"-DFAULT={fault}"), select=select)
    assert not outcome.conforming
    assert outcome.failures
    named = [v.clauses[0] for f in outcome.failures for v in f.violations]
    assert clause in named, Counter(named)


@pytest.mark.parametrize(
    "file", vectors.list_set(ROOT / "spec" / "vectors"), ids=lambda file: file.stem.removesuffix(".safetensors")
)
def test_activations(port, file):
    case = vectors.load_case(file)
    backend = backends.resolve(port)
    try:
        if case.is_vjp:
            with pytest.raises(Unsupported):
                backend.run(case.op, case.tensors, case.attrs)
            return
        got = backend.run(case.op, case.tensors, case.attrs)
    finally:
        backend.close()
    limits = budget.evaluate(case.op, case.tensors, case.attrs)
    violations, _ = compare(got, {n: (case.expected[n], limits[n][1]) for n in case.expected})
    assert not violations, violations[0].message


def test_bad_input_has_the_words_of_the_validation(port):
    backend = backends.resolve(port)
    try:
        with pytest.raises(SpecError, match="expected one of softmax, relu, identity"):
            backend.run("feature_map", {"x": np.ones((1, 1, 1, 2), np.float32)}, {"feature_map": "elu"})
    finally:
        backend.close()


def test_every_dtype_rounds_as_numpy(port):
    """Conversions in C against those of NumPy and ml_dtypes, over all 16-bit patterns."""
    import ml_dtypes

    backend = backends.resolve(port)
    try:
        for dtype in (np.float16, ml_dtypes.bfloat16):
            x = np.arange(2**16, dtype=np.uint16).view(dtype).reshape(1, -1, 1, 4)
            with np.errstate(invalid="ignore"):
                got = backend.run("feature_map", {"x": x}, {"feature_map": "relu"})["out"]
                wide = x.astype(np.float32)
                want = np.concatenate([np.maximum(wide, 0), np.maximum(-wide, 0)], -1).astype(dtype)
            np.testing.assert_array_equal(got.astype(np.float32), want.astype(np.float32))
    finally:
        backend.close()
