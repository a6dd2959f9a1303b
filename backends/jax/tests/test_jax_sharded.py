"""Sharding over batch, sequence and heads: equal to the reference, compiled for a topology, refused where wrong."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from rattention.jax import Unsupported, sharded

HERE = Path(__file__).parent
TABLE = {name: np.ones((8, 1), np.float32) for name in ("rope_cos", "rope_sin")}


def run(script: str, **env: str) -> str:
    """A program in a process of its own: the number of devices is fixed once JAX has started."""
    found = subprocess.run(
        [sys.executable, str(HERE / script)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu", **env},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout + found.stderr[-4000:]
    return found.stdout


def test_sharded_equals_the_reference_and_a_missing_part_is_seen() -> None:
    """Halo, states, segments, positions; the process compares outputs and gradients with the reference's budget."""
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    print(run("sharded_cases.py", XLA_FLAGS=flags))


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_the_tpu_program_moves_only_halo_and_states() -> None:
    """Compiled for a 4x4 slice of v5e, forward and backward: halo and state travel by collective-permute, gradients of
    shared weights by all-reduce; nothing gathers a sequence."""
    # Compiling needs no TPU of one's own: tests beside this one may use the library too.
    alone = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "XLA_FLAGS": ""}
    listed = json.loads(run("sharded_topology.py", **alone).splitlines()[-1])
    for name in ("forward", "backward", "backward with segments"):
        assert set(listed[name]) == {"collective-permute", "all-reduce"}, name
    # Two halos (k, v) and 1 + log2(4) hops of the state, over a sequence axis of 4; at most each is split in two.
    assert 3 <= listed["forward"]["collective-permute"] <= 10
    assert listed["largest_permute_bytes"] <= listed["halo_or_state_bytes"]


@pytest.fixture
def tensors() -> dict[str, np.ndarray]:
    ones = np.ones((2, 8, 4, 2), np.float32)
    return {"q": ones, "k": ones[:, :, :2], "v": ones[:, :, :2], "swa_weight": ones[0, 0], "rla_weight": ones[0, 0]}


@pytest.mark.parametrize(
    ("spec", "change", "match"),
    [
        (PartitionSpec(None, None, None, "x"), {}, "only batch, sequence and heads"),
        (PartitionSpec(None, ("x", "y")), {}, "one mesh axis"),
        (PartitionSpec("z"), {}, "no axis 'z'"),
        (PartitionSpec(None, "x"), {"window": None}, "window None"),
        (PartitionSpec(None, "x"), {"segment_ids": np.ones((2, 8), np.int32), "impl": "pallas"}, "segment_ids"),
        (PartitionSpec(None, "x"), {"positions": np.zeros((2, 8), np.int32), **TABLE, "impl": "pallas"}, "positions"),
    ],
)
def test_what_cannot_be_split_is_refused(tensors, spec, change, match) -> None:
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("x", "y"))
    with pytest.raises(Unsupported, match=match):
        sharded.rattention(**tensors, **({"window": 1} | change), mesh=mesh, spec=spec)


def test_uneven_shards_are_refused(tensors) -> None:
    mesh = jax.sharding.AbstractMesh((3,), ("x",))
    for spec, what in ((("x",), "B=2"), ((None, "x"), "T=8"), ((None, None, "x"), "Hq=4")):
        with pytest.raises(Unsupported, match=f"{what} does not divide"):
            sharded.rattention(**tensors, window=1, mesh=mesh, spec=PartitionSpec(*spec))


def test_nothing_to_split(tensors) -> None:
    """Empty batches and sequences divide into any number of shards; the state passes through."""
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("x", "y"))
    state = np.ones((2, 2, 4, 2), np.float32)
    empty = tensors | {name: tensors[name][:, :0] for name in "qkv"}
    for more in ({}, {"segment_ids": np.ones((2, 0), np.int32)}):
        given = empty | more | {"initial_state": state}
        split = {"mesh": mesh, "spec": PartitionSpec("x", "y"), "window": 1, "return_final_state": True}
        out, after = sharded.rattention(**given, **split)
        assert out.shape == (2, 0, 4, 2)
        np.testing.assert_array_equal(after, state)
