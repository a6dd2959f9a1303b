"""The package: wheel and sdist are built, and the wheel works in an empty environment, without the checkout."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
ROOTS = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["dev-mode-dirs"]
PARTS = ["spec", "numpy", "torch", "jax", "conformance"]


def run(*command: str | Path, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a command in `cwd`; no variable of Python's own is passed on, PYTHONPATH above all."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}{done.stderr}"
    return done


def build(kind: str, source: Path, out: Path) -> Path:
    run(sys.executable, "-m", "hatchling", "build", "--target", kind, "--directory", out, cwd=source)
    (archive,) = out.iterdir()
    return archive


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("hatchling is not installed (extra: dev)")
    return tmp_path_factory.mktemp("package")


@pytest.fixture(scope="module")
def wheel(folder: Path) -> Path:
    return build("wheel", ROOT, folder / "wheel")


def environment(place: Path, what: str | Path) -> Path:
    """The interpreter of a new environment that holds `what` and nothing else; pip runs from outside it."""
    run(sys.executable, "-m", "venv", "--without-pip", place, cwd=place.parent)
    python = place / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", what, cwd=place.parent)
    return python


@pytest.fixture(scope="module")
def bare(wheel: Path, folder: Path) -> Path:
    """The wheel with what every installation has: NumPy and ml_dtypes."""
    return environment(folder / "bare", wheel)


@pytest.fixture(scope="module")
def complete(wheel: Path, folder: Path) -> Path:
    """The wheel with its extra `conformance`."""
    return environment(folder / "complete", f"{wheel}[conformance]")


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_wheel_has_every_file_of_the_package_and_no_other(wheel: Path):
    expected = {
        file.relative_to(ROOT / root).as_posix()
        for root in ROOTS
        for file in (ROOT / root / "rattention").rglob("*")
        if file.is_file() and file.suffix != ".pyc"
    }
    data = [ROOT / "spec" / "operations.toml", *(ROOT / "spec" / "vectors").iterdir()]
    expected |= {
        f"rattention/{file.relative_to(ROOT).as_posix()}" for file in data if file.is_file() and file.suffix != ".py"
    }
    files = contents(wheel)
    assert {name for name in files if ".dist-info/" not in name} == expected
    for part in PARTS:  # a namespace package has no marker of its own: each part needs one
        assert f"rattention/{part}/py.typed" in files
    assert wheel.stat().st_size < 12e6


def test_the_sdist_builds_the_same_wheel(wheel: Path, folder: Path):
    archive = build("sdist", ROOT, folder / "sdist")
    with tarfile.open(archive) as tar:
        tar.extractall(folder / "unpacked", filter="data")
    (source,) = (folder / "unpacked").iterdir()
    assert contents(build("wheel", source, folder / "again")) == contents(wheel)


def test_the_wheel_alone_has_the_reference_and_names_the_extra_of_what_is_missing(bare: Path, tmp_path: Path):
    script = """
import importlib, sys
import rattention
import rattention.numpy
for place in rattention.__path__:
    assert place.startswith(sys.prefix), place
for part, package in (("torch", "torch"), ("torch.nn", "torch"), ("jax", "jax"), ("jax.nn", "jax")):
    try:
        importlib.import_module(f"rattention.{part}")
    except ModuleNotFoundError as error:
        assert error.name == package, error
        assert f"install rattention with its extra {package}" in str(error), error
    else:
        raise AssertionError(part)
"""
    run(bare, "-c", script, cwd=tmp_path)
    done = run(bare.with_name("rattention"), "ops", cwd=tmp_path, code=2)
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "install rattention with its extra conformance" in line


def test_the_command_works_without_the_checkout(complete: Path, tmp_path: Path):
    rattention = complete.with_name("rattention")
    run(sys.executable, "-m", "pip", "--python", complete, "check", cwd=tmp_path)
    version = run(rattention, "--version", cwd=tmp_path).stdout
    assert PYPROJECT["project"]["version"] in version
    assert "rattention_extend" in run(rattention, "ops", cwd=tmp_path).stdout

    stored = json.loads((ROOT / "spec" / "vectors" / "manifest.json").read_text(encoding="utf-8"))["cases"]
    checked = run(rattention, "vectors", "check", "numpy", cwd=tmp_path).stdout
    assert f"{len(stored)} of {len(stored)} cases conform" in checked

    run(rattention, "conform", "numpy", "--profile", "smoke", "--seed", "1", "--report", "report", cwd=tmp_path)
    report = json.loads((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))
    assert report["conforming"]
    assert report["properties"]["stored vectors"]["passed"]  # smoke runs a few of them
    for name in ("junit.xml", "report.html"):
        assert (tmp_path / "report" / name).is_file()


@pytest.mark.parametrize("part", ["torch", "jax"])
def test_the_backends_of_the_wheel_run(bare: Path, tmp_path: Path, part: str):
    """With the framework of the environment that runs the tests; its own copy of rattention must stay out of it."""
    framework = importlib.util.find_spec(part)
    if framework is None or framework.origin is None:
        pytest.skip(f"{part} is not installed")
    script = f"""
import sys
sys.path.append({str(Path(framework.origin).parents[1])!r})
import numpy as np
import rattention.{part}.nn
from rattention.{part}.adapter import backend
for name, module in list(sys.modules.items()):
    if name.startswith("rattention.") and getattr(module, "__file__", None):
        assert module.__file__.startswith(sys.prefix), module.__file__
x = np.ones((1, 2, 1, 4), np.float32)
print(backend.run("feature_map", {{"x": x}}, {{"feature_map": "relu"}})["out"].shape)
"""
    assert run(bare, "-c", script, cwd=tmp_path).stdout.strip() == "(1, 2, 1, 8)"


def test_a_type_checker_sees_the_types(bare: Path, tmp_path: Path):
    """mypy takes nothing from a package without py.typed; with types it also finds a wrong call."""
    if importlib.util.find_spec("mypy") is None:
        pytest.skip("mypy is not installed (extra: dev)")
    lines = [
        *(f"from rattention.{part} import rms_mix as {part}" for part in ("numpy", "torch", "jax")),
        "from rattention.spec import Operation",
        "from rattention.conformance.vectors import load_case",
        *(f"reveal_type({name})" for name in ("numpy", "torch", "jax", "Operation", "load_case")),
        "numpy(no_such_argument=1)",
    ]
    (tmp_path / "user.py").write_text("\n".join(lines) + "\n", encoding="utf-8")
    command = (sys.executable, "-m", "mypy", "--python-executable", bare, "user.py")
    found = run(*command, cwd=tmp_path, code=1).stdout.splitlines()
    assert [
        line for line in found if "error:" in line and 'Unexpected keyword argument "no_such_argument"' not in line
    ] == []
    revealed = [line for line in found if "Revealed type is" in line]
    assert len(revealed) == 5
    for line in revealed:
        assert 'Revealed type is "def (' in line, line
