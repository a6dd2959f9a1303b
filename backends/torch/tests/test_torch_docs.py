"""The examples of docs/torch.md run, and the CPU benchmark runs at a small size."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]
EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "docs/torch.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example(number):
    torch.manual_seed(number)
    exec(compile(EXAMPLES[number], f"docs/torch.md example {number}", "exec"), {})


def test_the_guide_has_examples():
    assert len(EXAMPLES) >= 4


def test_the_cpu_benchmark_runs_small(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    benchmark = importlib.import_module("cpu")
    threads = torch.get_num_threads()
    small = ["--tokens", "600", "--decode", "530", "--repetitions", "1", "--only", "torch", "--threads", str(threads)]
    benchmark.main([*small, "--out", str(tmp_path / "cpu.json")])
    result = json.loads((tmp_path / "cpu.json").read_text())
    assert set(result["torch"]["ratios"]) == {
        "forward: over sdpa",
        "forward: 4T over T",
        "forward+backward: over sdpa",
        "forward+backward: 4T over T",
    }
    assert 0 < result["torch"]["decode"]["state relative error"] < 1e-5  # 19 tokens in the state, float32
