"""The functions for people refuse every bad input of operations.toml in the words of the shared validation."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from rattention.conformance.badcalls import BadCall, bad_call, bad_names
from rattention.spec import UNREAD, SpecError, load, validate

OPERATIONS = [name for name in load().operations if not name.endswith(".vjp")]
CACHE = ("cache_k", "cache_v", "cache_state", "cache_length")
BY_SIGNATURE = ("missing-tensor", "unknown-tensor", "window-missing", "unknown-attribute")
"""Bad calls that Python refuses first: they do not fit the function's signature."""


def bad_calls(op: str) -> list[BadCall]:
    calls = [bad_call(op, "float32", 7, entry, target) for entry, target in bad_names(op)]
    return [call for call in calls if call is not None]


def refusal(call: BadCall, host: bool, extra: tuple[str, ...]) -> str | None:
    """What the shared validation says, with the values of integers or without."""
    values = None if host else UNREAD
    try:
        validate(call.op, call.tensors, call.attrs, host=values, extra_dtypes=extra)
    except SpecError as error:
        return str(error)
    return None


def arguments(module: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """Tensors as the function takes them: those of the cache in their container."""
    if not any(name in tensors for name in CACHE):
        return tensors
    cache = module.Cache(*(tensors.get(name) for name in CACHE))
    return {name: x for name, x in tensors.items() if name not in CACHE} | {"cache": cache}


def as_torch(x: np.ndarray) -> Any:
    import torch

    if x.dtype == np.dtype("bfloat16"):
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


BACKENDS: dict[str, tuple[Callable[[np.ndarray], Any], tuple[str, ...]]] = {
    "numpy": (lambda x: x, ("float64",)),
    "torch": (as_torch, ("float64",)),
    "jax": (lambda x: x, ()),  # whose float64 depends on a mode, off by default
}


@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_refused_in_the_same_words(backend: str, op: str) -> None:
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    module = importlib.import_module(f"rattention.{backend}")
    convert, extra = BACKENDS[backend]
    refused = 0
    for call in bad_calls(op):
        tensors = {name: convert(x) for name, x in call.tensors.items()}
        if call.entry in BY_SIGNATURE and not set(CACHE) & {call.target}:
            with pytest.raises(TypeError):
                getattr(module, op)(**arguments(module, tensors), **call.attrs)
            continue
        want = refusal(call, True, extra)
        if want is None:  # float64, where it is welcome
            assert extra, call
            continue
        with pytest.raises(SpecError) as error:
            getattr(module, op)(**arguments(module, tensors), **call.attrs)
        assert str(error.value) == want, (call.entry, call.target)
        refused += 1
    assert refused >= 5


@pytest.mark.parametrize("op", [op for op in OPERATIONS if op != "rope_table"])
def test_jax_refuses_the_same_while_tracing(op: str) -> None:
    jax = pytest.importorskip("jax", reason="jax is not installed")
    module = importlib.import_module("rattention.jax")
    refused = 0
    for call in bad_calls(op):
        want = refusal(call, False, ())
        kept = all(x.dtype not in (np.float64, np.int64) for x in call.tensors.values())  # which JAX narrows first
        if want is None or not kept or call.entry in BY_SIGNATURE:
            continue
        with pytest.raises(SpecError) as error:
            jax.eval_shape(
                lambda tensors, attrs=call.attrs: getattr(module, op)(**arguments(module, tensors), **attrs),
                call.tensors,
            )
        assert str(error.value) == want, (call.entry, call.target)
        refused += 1
    assert refused >= 5
