"""The benchmarks of the kernels where there is no GPU: counts, masks, tables, a dry run of every line."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

ROOT = Path(__file__).resolve().parents[3]
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


def test_the_page_shows_the_records(module):
    tables = module("triton_tables")
    text = tables.PAGE.read_text(encoding="utf-8")
    assert tables.page(text) == text, "python benchmarks/triton_tables.py"
    assert {m[1] for m in tables.MARK.findall(text)} == {"counts", "ratios", "aot-64", "aot-128", "aot-all"}


def test_the_counts_are_those_of_the_configurations_as_they_stand(module):
    recorded = json.loads((BENCHMARKS / "results" / "triton_counts.json").read_text(encoding="utf-8"))
    assert module("gpu_counts").report() == recorded, "python benchmarks/gpu_counts.py"


def test_no_kernel_is_counted_below_the_floor(module):
    kernels = module("gpu_counts").report()["kernels"]
    for part in ("forward", "backward"):
        for what in ("memory", "operations", "exponentials"):
            assert kernels[part][what] >= kernels[f"{part}, least"][what]


def test_operations_of_a_window_are_counted_in_whole_blocks(module):
    """T 4 blocks, a window of two blocks: rows of blocks see 1, 2, 3, 3 of them."""
    pairs = 9 * 128 * 128 / 512
    assert module("gpu_counts").flex(256, 512, 64, 32) == {"forward": pairs * 192, "backward": pairs * 512}


@pytest.mark.parametrize(("total", "T"), [(1, 256), (64, 640), (128, 512), (129, 512), (200, 700), (512, 512)])
def test_block_masks_from_arithmetic(module, total, T):
    """The same blocks, partial and whole, as PyTorch finds from the mask itself."""
    from torch.nn.attention.flex_attention import create_block_mask

    ours = module("gpu_rivals").block_mask(total, T, torch.device("cpu"))
    exact = create_block_mask(ours.mask_mod, None, None, T, T, device="cpu")
    assert torch.equal(ours.to_dense(), exact.to_dense())
    whole = torch.zeros_like(exact.to_dense())
    for mask in (ours, exact):
        assert mask.full_kv_num_blocks is not None
        assert mask.full_kv_indices is not None
        dense = torch.zeros_like(whole)
        for row, n in enumerate(mask.full_kv_num_blocks[0, 0].tolist()):
            dense[0, 0, row, mask.full_kv_indices[0, 0, row, :n].long()] = 1
        whole = dense if mask is ours else whole - dense
    tail = T % 128 != 0  # the last blocks reach past T: never whole to PyTorch, and past T nothing is read
    assert not whole[:, :, : T // 128 if tail else None].any()


def test_a_dry_run_runs_every_part(tmp_path):
    out = tmp_path / "gpu.json"
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--dry-run", "--out", str(out)]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(out.read_text(encoding="utf-8"))
    assert report["dry_run"] is True
    assert report["agreement"][0]["agrees"] is True
    assert report["agreement"][0]["reruns_equal"] is True
    ms = report["prefill"][0]["ms"]
    assert set(ms) >= {"rattention", "flex 64", "flex 16", "sdpa causal", "unfused", "two kernels"}
    assert all(x["forward"] for x in ms.values()), ms
    assert report["decode"][0]["ms"] > 0
    assert out.with_suffix(".png").stat().st_size > 10_000


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_it_stops_at_once():
    done = subprocess.run([sys.executable, str(BENCHMARKS / "gpu.py"), "--check"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip() == "benchmarks/gpu.py: no CUDA or ROCm device here, nothing was measured"
