"""The captured activations: their stored answers are what the reference says today, in both of its forms."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from rattention.conformance import vectors
from rattention.numpy import quadratic, recurrent
from rattention.spec import load

FOLDER = Path(__file__).resolve().parents[2] / "spec" / "vectors"
FILES = vectors.list_set(FOLDER)  # checks every checksum of the manifest


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
@pytest.mark.parametrize("form", [quadratic, recurrent], ids=["quadratic", "recurrent"])
def test_stored_answers_are_the_reference(file, form):
    case = vectors.load_case(file)
    assert case.expected
    outputs = form.run(case.op, case.tensors, case.attrs)
    assert set(outputs) == set(case.expected)
    for name, expected in case.expected.items():
        got = np.asarray(outputs[name])
        assert got.shape == expected.shape
        assert np.isfinite(expected).all()
        # Both are float64; another BLAS may sum in another order.
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-10 * max(1.0, float(np.abs(expected).max())))


def test_the_set_covers_what_it_says():
    manifest = json.loads((FOLDER / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["package"]["license"]
    assert manifest["text"]["tokens"] == 512
    cases = [vectors.load_case(file) for file in FILES]
    stored = [case.tensors.get("q", case.tensors.get("x")) for case in cases]
    assert {str(t.dtype) for t in stored if t is not None} == set(load().storage_dtypes)
    assert {-1, 63, 64, 127, 511, None} <= {case.attrs.get("window", 0) for case in cases}
    assert {"sliding_window_attention", "residual_linear_attention", "rms_mix", "feature_map"} <= {c.op for c in cases}
    assert {"rattention", "rattention.vjp", "rattention_extend"} <= {c.op for c in cases}
    assert sum(file.stat().st_size for file in FILES) < 8.5e6


def test_data_are_not_random():
    """Real keys have strong means and outliers, which is why these vectors exist."""
    case = vectors.load_case(FOLDER / "rattention-w127.safetensors")
    k = case.tensors["k"][0].astype(np.float64)
    mean, spread = np.abs(k.mean(0)), k.std(0)
    assert (mean > spread).any()
    assert len(np.unique(k)) > 0.9 * k.size
