"""What the compiled XLA form stores: linear in T with a small factor, keys and values once per kv head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from rattention.jax import rattention

B, HQ, HKV, D, DV, W = 1, 6, 2, 10, 14, 70  # G = 3; no size below equals 3 or 6 by accident


def function(grad: bool) -> Callable[..., Any]:
    def forward(*args: jax.Array) -> Any:
        return rattention(*args, window=W)

    if not grad:
        return forward
    return jax.grad(lambda *args: forward(*args).sum(), argnums=(0, 1, 2, 3, 4))


def arguments(T: int) -> list[jax.ShapeDtypeStruct]:
    shapes = (B, T, HQ, D), (B, T, HKV, D), (B, T, HKV, DV), (HQ, DV), (HQ, DV)
    return [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]


def shapes_of(jaxpr: Any) -> Iterator[tuple[int, ...]]:
    """The shape of every intermediate array, those inside loops and calls too."""
    for equation in jaxpr.eqns:
        yield from (v.aval.shape for v in equation.outvars)
        for parameter in equation.params.values():
            for inner in parameter if isinstance(parameter, tuple | list) else (parameter,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from shapes_of(inner)


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "gradient"])
def test_keys_and_values_are_not_repeated_for_query_heads(grad: bool) -> None:
    T, chunk = 200, 64
    of_keys = {W + chunk, W + 4 * chunk}  # keys of one chunk's window, and of the whole row with its border
    found = {
        shape
        for shape in shapes_of(jax.make_jaxpr(function(grad))(*arguments(T)).jaxpr)
        if of_keys & set(shape) and {D, DV, D // 2, 2 * D} & set(shape)
    }
    assert any(W + chunk in shape and D in shape for shape in found), "the test no longer knows the sizes"
    assert any(W + 4 * chunk in shape and DV in shape for shape in found), "the test no longer knows the sizes"
    assert not [shape for shape in found if HQ in shape or HQ // HKV in shape]


@pytest.mark.parametrize(("grad", "most"), [(False, 1.5), (True, 2.5)], ids=["forward", "gradient"])
def test_memory_per_token_is_a_few_times_the_inputs(grad: bool, most: float) -> None:
    """From T to 4T, temporary memory grows by less than `most` times the bytes of q, k and v: neither scores nor
    features of all tokens are kept, and states by the gradient alone, one per chunk of 64."""

    def temporary(T: int) -> int:
        analysis = jax.jit(function(grad)).lower(*arguments(T)).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    per_token = (temporary(2048) - temporary(512)) / 1536
    assert per_token < most * 4 * (HQ * D + HKV * (D + DV))
