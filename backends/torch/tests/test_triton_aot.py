"""Ahead-of-time compilation without a GPU: a fast part built anew, the whole matrix from its record."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from rattention.torch.triton.aot import sources
from rattention.torch.triton.config import config_for
from rattention.torch.triton.launch import capturing
from rattention.torch.triton.ring import Ring, step

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "benchmarks" / "aot_triton.py"
RECORD = ROOT / "benchmarks" / "results" / "triton_aot.json"
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942", "gfx950")


def test_a_fast_part_builds_without_a_fault(tmp_path):
    """Compiles for two targets in a process of its own: this one may have imported the kernels for the interpreter."""
    out = tmp_path / "aot.json"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    only = ["--targets", "sm_90,gfx942", "--dims", "64", "--kernels", "key_grad,carry_states"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *only, "--out", str(out)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    built = {(r["kernel"], r["target"]): r for r in json.loads(out.read_text(encoding="utf-8"))["kernels"]}
    assert set(built) == {(k, t) for k in ("key_grad", "carry_states") for t in ("sm_90", "gfx942")}
    assert built["key_grad", "sm_90"]["matrix"]["wgmma"] > 0
    assert built["key_grad", "gfx942"]["matrix"]["mfma"] > 0


def test_the_record_is_of_the_kernels_as_they_stand():
    about = json.loads(RECORD.read_text(encoding="utf-8"))["about"]
    assert about["sources"] == sources(), "kernels or configurations changed: python benchmarks/aot_triton.py"


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("D", [64, 128])
def test_the_recorded_matrix(target, D):
    """No fault in bfloat16 on any target, for the configurations that the table has now."""
    rows = [
        r
        for r in json.loads(RECORD.read_text(encoding="utf-8"))["kernels"]
        if (r["target"], r["D"], r["dtype"], r["variant"]) == (target, D, "bfloat16", "default")
    ]
    tiles = {"local_states": "states", "rotate_keys": "states"}
    config = config_for(target, D, D, torch.bfloat16)
    seen = set()
    for row in rows:
        assert row["faults"] == [], row
        assert row["spills"] == 0, row
        seen.add(row["kernel"])
        name = str(tiles.get(row["kernel"], row["kernel"]))
        if hasattr(config, name):
            tile = getattr(config, name)
            assert (row["warps"], row["stages"]) == (tile.warps, tile.stages), row
    assert seen >= {"rotate_keys", "local_states", "carry_states", "attend", "output_grad", "query_grad",
                    "carry_gradients", "residue_grad", "key_grad", "decode", "combine"}  # fmt: skip


def test_capturing_runs_nothing():
    """A captured launch has the configuration of the device asked for, and meta tensors hold no memory."""
    with capturing("sm_90") as launches:
        slots = torch.empty(2, 6, 1, 64, device="meta", dtype=torch.bfloat16)
        length = torch.empty(2, dtype=torch.int32, device="meta")
        ring = Ring(slots, torch.empty_like(slots), torch.empty(2, 1, 128, 64, device="meta"), length)
        q, k = (torch.empty(2, 1, h, 64, device="meta", dtype=torch.bfloat16) for h in (4, 1))
        weight = torch.empty(4, 64, device="meta")
        out = step(ring, q, k, k, weight, weight, window=5)
    assert out.device.type == "meta"
    assert [x.name for x in launches] == ["decode", "combine"]
    assert launches[0].warps == config_for("sm_90", 64, 64, torch.bfloat16).decode.warps
