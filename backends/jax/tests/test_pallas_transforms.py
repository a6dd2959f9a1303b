"""`impl="pallas"` as a JAX user calls it: jit, vmap, checkpoint, shard_map; XLA by default off TPU; refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from rattention.jax import Unsupported, feature_map, rattention
from rattention.jax.pallas import watch

ROOT = Path(__file__).resolve().parents[3]
EPSILON = float(np.finfo(np.float32).eps)


def test_transformations_agree_with_xla() -> None:
    """Outputs and gradients; what differs is the order of float32 sums over some fifty terms."""
    path = os.pathsep.join(str(ROOT / p) for p in ("spec", "backends/jax"))
    command = [sys.executable, "-W", "error", str(Path(__file__).with_name("pallas_cases.py"))]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    assert set(report) == {"jit", "checkpoint", "vmap, first", "vmap, second", "shard_map", "explicit axes"}
    assert all(difference < 50 * EPSILON for difference in report.values()), report


def test_xla_is_the_default_off_tpu() -> None:
    x = jnp.ones((1, 4, 1, 8))
    with watch.watching() as seen:
        rattention(x, x, x, x[0, 0], x[0, 0], window=1)
    assert seen.traced == []
    with watch.watching() as seen:
        rattention(x, x, x, x[0, 0], x[0, 0], window=1, impl="pallas").block_until_ready()
    assert seen.ran == ["rattention_forward"]


def test_refusals_name_the_reason() -> None:
    x = jnp.ones((1, 4, 1, 8), jnp.float16)
    with pytest.raises(Unsupported, match="float16"):
        rattention(x, x, x, x[0, 0], x[0, 0], window=1, impl="pallas")
    y = jnp.ones((1, 4, 1, 8))
    with pytest.raises(Unsupported, match="no Pallas kernel"):
        feature_map(y, impl="pallas")
    with pytest.raises(Unsupported, match="three-pass"):
        rattention(y, y, y, y[0, 0], y[0, 0], window=1, impl="pallas", precision="high")
