"""Split over devices: shard_map with its defaults, explicit axes, the layer, and split sequences."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EPSILON = 2.0**-23


@pytest.mark.parametrize("part", ["functions", "places", "training", "layers", "sequences", "mixed", "eager"])
def test_split_equals_whole(part: str) -> None:
    """Outputs and gradients; what differs is the order of float32 sums, over some hundred terms at most."""
    command = [sys.executable, "-W", "error", str(Path(__file__).with_name("mesh_cases.py")), part]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    report = json.loads(done.stdout)
    assert report
    assert all(difference < 50 * EPSILON for difference in report.values()), report
