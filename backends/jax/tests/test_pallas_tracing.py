"""What tracing the Pallas kernels costs does not grow with the sequence; the sizes that a plan has in closed form."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import pytest
from rattention.jax.pallas import aot, calls, config
from rattention.jax.pallas.plan import Plan

SETTINGS = config.default("v5p", 128)


def equations(jaxpr: Any) -> int:
    """Equations of a jaxpr and of every one inside it, kernels included."""
    total = 0
    for equation in jaxpr.eqns:
        inner = [x for value in equation.params.values() for x in (value if isinstance(value, tuple) else (value,))]
        total += 1 + sum(equations(getattr(x, "jaxpr", x)) for x in inner if hasattr(getattr(x, "jaxpr", x), "eqns"))
    return total


def traced(T: int, window: int | None, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """Equations of the gradient at length T, and how often tracing it called a function of the grid's indices."""
    asked = 0
    block_spec = calls.pl.BlockSpec

    def counting(block: Any, index: Any, **more: Any) -> Any:
        def counted(*at: Any) -> Any:
            nonlocal asked
            asked += 1
            return index(*at)

        return block_spec(block, counted, **more)

    with monkeypatch.context() as patch:
        patch.setattr(calls.pl, "BlockSpec", counting)
        f, args = aot.program("backward", 128, "bfloat16", SETTINGS, T if window is None else window, T=T)
        return equations(jax.make_jaxpr(f)(*args).jaxpr), asked


@pytest.mark.parametrize("window", [511, None])
def test_tracing_does_not_walk_the_grid(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient at 2^16 tokens and at 2^13: the same equations, and index functions traced as often."""
    short, long = (traced(T, window, monkeypatch) for T in (2**13, 2**16))
    assert short == long
    assert 0 < short[1] < 200


def test_every_kernel_says_what_it_costs() -> None:
    """A cost that doubles with the sequence, and counts each product of a window of whole tiles."""
    found = {}
    for T in (4096, 8192):
        f, args = aot.program("backward", 128, "bfloat16", SETTINGS, 511, T=T)
        found[T] = [c["cost_estimate"] for c in kernels(jax.make_jaxpr(f)(*args).jaxpr)]
    for short, long in zip(found[4096], found[8192], strict=True):
        assert long.flops == 2 * short.flops
        assert long.transcendentals == 2 * short.transcendentals
        assert 1.9 < long.bytes_accessed / short.bytes_accessed <= 2
    forward, backward = found[4096]
    # Five tiles of keys by softmax, one by the linear branch, the state; the fold is shared by four heads.
    of_token = 128 * (5 * 256 + 256 + 128) + 256 * 128 + 256 * 128 // 4
    assert forward.flops == 4096 * 16 * 2 * of_token
    assert backward.flops == 3 * forward.flops


def kernels(jaxpr: Any) -> Any:
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation.params
            continue
        for inner in equation.params.values():
            if hasattr(getattr(inner, "jaxpr", inner), "eqns"):
                yield from kernels(getattr(inner, "jaxpr", inner))


@pytest.mark.parametrize("mode", ["mix", "swa", "rla"])
@pytest.mark.parametrize("C", [1, 4, 8])
def test_tiles_in_closed_form(mode: str, C: int) -> None:
    """Each tile against the distances of its keys and queries: inside the window, cut by it, or read as linear."""
    empty = dict.fromkeys(("rope", "q_scale", "k_scale", "memory", "initial", "segments", "final"), False)
    sizes = {"batch": 1, "q_heads": 1, "kv_heads": 1, "true_key_dim": 8, "true_value_dim": 8, "prefix": 0}
    plan = Plan(
        tokens=41, window=0, mode=mode, key_dim=8, value_dim=8, split=False, feature_map="softmax", dtype="float32",
        exact=True, interpret=True, config=config.Config(chunk=C, blocks=2), **sizes, **empty,
    )  # fmt: skip
    for window in range(-1, 45):
        p = dataclasses.replace(plan, window=min(window, 41))
        inner, cut, linear = [], [], []
        for r in range(p.R + 1):
            ages = {q - k - (r - p.R) * C for q in range(C) for k in range(C)}
            seen = {0 <= age <= p.window for age in ages} if p.softmax else {False}
            inner += [r] if seen == {True} else []
            cut += [r] if seen == {True, False} else []
            linear += [r] if p.folds and (r == 0 or max(ages) > p.window) else []
        assert (list(p.inner_tiles), list(p.softmax_tiles), list(p.linear_tiles)) == (inner, cut, linear), window
        assert p.loop[1] == 0 or p.loop[1] == inner[-1] + 1
        assert [*p.unrolled, *range(*p.loop)] == inner
