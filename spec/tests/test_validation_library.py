"""What the public functions of a library hold a call to, beyond `run`: plain arrays of the library, on one device."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from rattention.spec import SpecError, load, validate


def call(**changes: Any) -> dict[str, Any]:
    """Tensors of a valid call of `rattention`, with some of them replaced."""
    x, weight = np.zeros((2, 5, 2, 4), np.float32), np.ones((2, 4), np.float32)
    return {"q": x, "k": x, "v": x, "swa_weight": weight, "rla_weight": weight} | changes


def refusal(tensors: dict[str, Any], **options: Any) -> str:
    with pytest.raises(SpecError) as error:
        validate("rattention", tensors, {"window": 3}, **options)
    return str(error.value)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ([[1.0]], "builtins.list"),
        (1.0, "builtins.float"),
        ("k", "builtins.str"),
        (np.ma.zeros((2, 5, 2, 4), dtype=np.float32), "numpy.ma.MaskedArray"),
    ],
)
def test_what_is_no_array_is_refused_by_name(wrong: Any, named: str):  # ERR-14
    assert refusal(call(k=wrong)) == f"rattention: k: expected an array, got {named} (ERR-14)"


def test_a_mask_is_refused_even_if_it_hides_nothing():  # ERR-14
    assert "numpy.ma.MaskedArray" in refusal(call(v=np.ma.asarray(call()["v"])))


def test_a_library_says_what_it_takes():  # ERR-14
    class Own(np.ndarray):
        pass

    tensors = {name: x.view(Own) for name, x in call().items()}
    validate("rattention", tensors, {"window": 3}, array=("an Own", Own))
    tensors["rla_weight"] = np.ones((2, 4), np.float32)
    text = "rattention: rla_weight: expected an Own, got numpy.ndarray (ERR-14)"
    assert refusal(tensors, array=("an Own", Own)) == text


@pytest.mark.parametrize(
    ("places", "text"),
    [
        ({"rla_weight": "meta"}, "rla_weight: expected device cpu, that of q, got meta"),
        ({"q": "meta"}, "q: expected device cpu, that of k, got meta"),
        ({"q": "cuda:0", "k": "cuda:0", "v": "cuda:0"}, "swa_weight: expected device cuda:0, that of q, got cpu"),
        ({"v": "cuda:0", "swa_weight": "cuda:1"}, "v: expected device cpu, that of q, got cuda:0"),
    ],
)
def test_the_odd_device_is_named(places: dict[str, str], text: str):  # ERR-15
    devices = dict.fromkeys(call(), "cpu") | places
    assert refusal(call(), devices=devices) == f"rattention: {text} (ERR-15)"


def test_one_device_passes():
    validate("rattention", call(), {"window": 3}, devices=dict.fromkeys(call(), "cuda:1"))


def test_the_suite_is_not_asked_about_public_functions():
    spec = load()
    assert set(spec.library) < set(spec.clauses)
    assert set(spec.judged) == set(spec.clauses) - set(spec.library)
