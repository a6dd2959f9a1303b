"""A replay says what the report said, and shows the tensors: small ones whole, of large ones the part that is wrong."""

import re
from pathlib import Path

import faulty_ports as ports
import numpy as np
import pytest
from rattention.conformance import vectors
from rattention.conformance.cli import app
from rattention.conformance.shown import PART, WHOLE
from rattention.conformance.strategies import Recipe, build
from rattention.conformance.strategies.recover import recipe_of
from typer.testing import CliRunner

PORTS = Path(__file__).with_name("faulty_ports.py")


def call(*arguments):
    """Exit code and output."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    return result.exit_code, result.output


# Each with an operation on which it is wrong, and some words of the guess.
GUESSED = [
    ("tiled", "sliding_window_attention", "head order"),
    ("window", "sliding_window_attention.vjp", "window border"),
]


@pytest.mark.parametrize(("port", "op", "guess"), GUESSED)
def test_the_guess_is_that_of_the_report(port, op, guess, tmp_path):
    code, output = call("conform", f"{PORTS}:{port}", "--select", op, "--seed", "3", "--profile", "smoke",
                        "--workers", "1", "--report", tmp_path)  # fmt: skip
    assert code == 1
    blocks = [block for block in output.split("case: ")[1:] if "looks like: " + guess in " ".join(block.split())]
    assert blocks
    for block in blocks[:2]:
        told = re.findall(r"looks like: ([^)]*)\)", " ".join(block.split("rattention replay")[0].split()))
        line = next(line for line in block.splitlines() if line.startswith("rattention replay"))
        code, said = call(*line.split()[1:])
        assert code == 1
        assert re.findall(r"looks like: ([^)]*)\)", said) == told


def shown(said: str, label: str) -> np.ndarray:
    """The numbers that stand behind a label."""
    text = said[said.index(f"  {label}") :]
    text = text[: re.search(r"\n  \S|\n\S|\Z", text[2:]).start() + 2]  # type: ignore[union-attr]
    return np.array([float(x) for x in re.findall(r"-?\d+\.?\d*(?:e[+-]\d+)?", text[text.index("=") :])])


def test_small_tensors_are_whole(tmp_path):
    case = build(Recipe("rattention_extend", "bfloat16", T=2, window=2, fill="full", seed=4))
    file = vectors.save_case(tmp_path / "a.safetensors", case)
    code, said = call("replay", file, f"{PORTS}:counting")
    assert code == 1
    for name, x in case.tensors.items():
        assert x.size <= WHOLE
        np.testing.assert_array_equal(
            shown(said, f"{name} {x.dtype}[").astype(np.float32), x.astype(np.float32).ravel()
        )
    length = int(case.tensors["cache_length"][0])
    assert f"output cache_length, which is wrong\n  expected[1] = [{length + 2}]\n" in said
    assert f"got int32[1] = [{length + 3}]" in said
    honest = ports.honest.run(case.op, case.tensors, case.attrs)["cache_k"]
    np.testing.assert_array_equal(shown(said[said.index("output cache_k") :], "got").astype(np.float32), honest.ravel())
    assert said.index("output cache_length") < said.index("output out")  # what is wrong comes first
    assert said.index("\n  q bfloat16") < said.index("\n  k bfloat16") < said.index("\n  cache_length int32")


def test_of_large_ones_the_part_that_is_wrong(tmp_path):
    case = build(Recipe("rattention_extend", "float32", B=3, T=40, Hkv=2, D=16, Dv=32, window=9, fill="full", seed=4))
    file = vectors.save_case(tmp_path / "a.safetensors", case)
    code, said = call("replay", file, f"{PORTS}:late")
    assert code == 1
    assert len(said.splitlines()) < 100
    assert re.search(r"\n  q float32\[3, 40, 2, 16\] from -\d", said)
    at = re.search(r"first at \[(\d+), (\d+), (\d+), (\d+)\]", said)
    assert at is not None
    b, t, h, d = map(int, at.groups())
    honest = ports.honest.run(case.op, case.tensors, case.attrs)["out"]
    first = max(0, min(d - PART // 2, honest.shape[3] - PART))
    honest[1, 30:, 1, 20:] += 1
    place = f"of it [{b}, {t}, {h}, {first}:{first + PART}]"
    assert said.count(place) == 3  # expected, admitted, got
    got = shown(said[said.index("output out") :], "got").astype(np.float32)
    np.testing.assert_array_equal(got, honest[b, t, h, first : first + PART])


def test_a_pass_is_one_line(tmp_path):
    file = vectors.save_case(tmp_path / "a.safetensors", build(Recipe("rms_mix", T=2)))
    assert call("replay", file, "numpy") == (0, "pass  a.safetensors  rms_mix\n")


OPTIONS = ("rope", "segments", "poison", "q_scale", "memory", "initial_state")


@pytest.mark.parametrize("options", [(), OPTIONS, ("rope", "positions")])
def test_a_recipe_comes_back_from_its_case(options):
    """All that a diagnosis may ask of it; how the values were drawn is not in a case."""
    recipe = Recipe("rattention", "float16", B=2, T=9, Hkv=2, G=3, D=4, Dv=5, window=3, feature_map="relu", scale=0.5,
                    eps=1e-3, options=options, layout="mixed", weights="storage", seed=8)  # fmt: skip
    back = recipe_of(build(recipe))
    assert set(back.options) == set(options)
    for name in ("op", "dtype", "B", "T", "Hkv", "G", "D", "Dv", "window", "feature_map", "scale", "eps", "weights"):
        assert getattr(back, name) == getattr(recipe, name), name
