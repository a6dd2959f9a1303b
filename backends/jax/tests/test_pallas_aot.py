"""Kernels compiled by the TPU compiler without a TPU: a fast part built anew, the whole matrix from its record."""

import importlib.util
import itertools
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from rattention.jax.pallas import calls, config

ROOT = Path(__file__).resolve().parents[3]
RESULTS = ROOT / "benchmarks" / "results"
KINDS = ("forward", "backward", "decode")
DIMS = (64, 128, 256)

if importlib.util.find_spec("libtpu") is None:
    pytest.skip("libtpu, the TPU compiler, is not installed", allow_module_level=True)


def read(name: str) -> list[dict]:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))["results"]


def environment() -> dict[str, str]:
    """For a process of its own: this one's flags are for the CPU's compiler."""
    path = os.pathsep.join(str(ROOT / p) for p in ("spec", "backends/jax"))
    kept = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return kept | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}


def python(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], env=environment(), capture_output=True, text=True, check=False)


def script(name: str, *arguments: str) -> subprocess.CompletedProcess:
    return python(str(ROOT / "benchmarks" / name), *arguments)


def test_a_layer_holds_no_copies_and_exports(tmp_path: Path) -> None:
    out = tmp_path / "aot.json"
    only = ["--generations", "v5e", "--dims", "128", "--kinds", "forward"]
    done = script("tpu_aot.py", *only, "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    (layer,) = json.loads(out.read_text())["results"]
    assert layer["kernels"] == ["rattention_forward"]
    assert layer["exported_for"] == ["tpu"]


SMALL = """
import jax, jax.numpy as jnp
from rattention.jax.pallas import aot
from rattention.jax.pallas.config import Config

settings = Config(blocks=1, heads=1, backward_heads=1)
small = {"T": 256, "Hq": 1, "Hkv": 1}
forward, (given,) = aot.program("forward", 128, "bfloat16", settings, 127, **small)
backward, (given, d_out) = aot.program("backward", 128, "bfloat16", settings, 127, **small)

def stack(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((2, *x.shape), x.dtype), tree)

def again(given):
    return jnp.sum(jax.checkpoint(forward)(given).astype(jnp.float32))

def built(f, *args):
    return "rattention_backward" in aot.compile_for("v5e", f, *args).as_text()

x = jax.ShapeDtypeStruct((1, 1024, 4, 128), jnp.bfloat16)
copied = aot.moves(aot.compile_for("v5e", lambda x: jnp.swapaxes(x, 1, 2), x), x)
print(built(jax.vmap(backward), stack(given), stack(d_out)), built(jax.grad(again), given), len(copied) > 0)
"""


def test_transformed_programs_build_and_a_copy_is_seen() -> None:
    """vmap of the gradient; the gradient under checkpoint; and the search for copies on a program that must move."""
    done = python("-c", SMALL)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-3:] == ["True", "True", "True"]


def test_the_schedule_is_deterministic(tmp_path: Path) -> None:
    """One decode kernel measured again gives the record's bundles; with another compiler only the build is checked."""
    out = tmp_path / "schedule.json"
    only = ["--generations", "v6e", "--dims", "128", "--dtypes", "bfloat16", "--kinds", "decode"]
    done = script("tpu_schedule.py", *only, "--out", str(out))
    assert done.returncode == 0, done.stderr[-2000:]
    document = json.loads(out.read_text())
    (new,) = document["results"]
    assert "error" not in new, new["error"]
    record = json.loads((RESULTS / "tpu_schedule.json").read_text(encoding="utf-8"))
    if record["versions"] == document["versions"]:
        keys = {k: new[k] for k in ("what", "mode", "generation", "kind", "D", "dtype")}
        (old,) = [r for r in record["results"] if all(r.get(k) == v for k, v in keys.items())]
        assert new["kernels"] == old["kernels"]


@pytest.mark.parametrize("generation", config.GENERATIONS)
def test_the_recorded_matrix(generation: str) -> None:
    """Kernels in today's default configuration build within the on-chip memory of the generation."""
    rows = [r for r in read("tpu_schedule.json") if r["what"] == "ours" and r["mode"] == "mix" and not r.get("rope")]
    for D, dtype, kind in itertools.product(DIMS, ("bfloat16", "float32"), KINDS):
        wanted = {"generation": generation, "D": D, "dtype": dtype, "kind": kind}
        found = [r for r in rows if all(r[k] == v for k, v in wanted.items())]
        assert len(found) == 1, wanted
        (row,) = found
        assert "error" not in row, row
        settings = config.default(generation, D, dtype)
        assert row["config"] == calls.shown(settings), wanted
        names = ["rattention_forward"] * (kind == "backward") + [f"rattention_{kind}"]
        assert list(row["kernels"]) == names
        assert settings.vmem is not None
        assert all(part["vmem_bytes"] < settings.vmem for part in row["kernels"].values()), row


def test_the_recorded_layers() -> None:
    """No layer of the record moves q, k, v or a gradient of them."""
    rows = {(r["generation"], r["D"], r["kind"]): r for r in read("tpu_aot.json")}
    assert set(rows) == set(itertools.product(config.GENERATIONS, DIMS, ("forward", "train")))
    for row in rows.values():
        assert row["moves"] == [], row
        assert row["exported_for"] == ["tpu"]


DIGESTS = """
import json, sys
import tpu_schedule
jobs = [{"what": "ours", "mode": "mix", "generation": "v5p", "kind": kind, "D": 128, "dtype": "bfloat16"}
        for kind in ("forward", "backward", "decode")]
print(json.dumps([tpu_schedule.versions(), *(job | {"program": tpu_schedule.program(job)} for job in jobs)]))
"""


def test_the_record_is_of_todays_kernels() -> None:
    """The programs of three kernels are those that were measured; under another JAX only that all rows name theirs."""
    record = json.loads((RESULTS / "tpu_schedule.json").read_text(encoding="utf-8"))
    assert [r for r in record["results"] if not r.get("program") or "dirty" in r["commit"]] == []
    done = python("-c", f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r})\n{DIGESTS}")
    assert done.returncode == 0, done.stderr[-2000:]
    versions, *programs = json.loads(done.stdout.splitlines()[-1])
    for wanted in programs if versions == record["versions"] else []:
        assert [r for r in record["results"] if all(r.get(k) == v for k, v in wanted.items())], wanted


def test_the_targets_of_the_record() -> None:
    """v5p, D 128, bfloat16, w 511: at most 6 bundles per token and query head forward, 24 with the backward."""
    rows = [r for r in read("tpu_schedule.json") if (r["generation"], r["D"], r["dtype"]) == ("v5p", 128, "bfloat16")]
    figures = {r["kind"]: r["bundles_per_token_head"] for r in rows if r["what"] == "ours" and r["mode"] == "mix"
               and not r.get("rope")}  # fmt: skip
    assert figures["forward"] <= 6
    assert figures["backward"] <= 24


def test_the_page_shows_the_record() -> None:
    module = SimpleNamespace(**runpy.run_path(str(ROOT / "benchmarks" / "tpu_schedule.py")))
    text = module.PAGE.read_text(encoding="utf-8")
    assert module.page(text, json.loads(module.RESULTS.read_text(encoding="utf-8"))) == text
