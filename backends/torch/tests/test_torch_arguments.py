"""What a call looks at and what it refuses, whatever is at work around it: closures, subclasses, tables, tracing."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from rattention.spec import SpecError, Unsupported
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from rattention import torch as rt

# PyTorch's own forward mode compiles its decompositions with torch.jit.script when it is first used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
B, T, HQ, HKV, D = 2, 6, 2, 1, 8


def call(**changes: Any) -> dict[str, Any]:
    make = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make).to(DEVICE)

    tensors = {"q": normal(B, T, HQ, D), "k": normal(B, T, HKV, D), "v": normal(B, T, HKV, D)}
    return tensors | {"swa_weight": normal(HQ, D), "rla_weight": normal(HQ, D), "window": 2} | changes


def table() -> dict[str, Tensor]:
    cos, sin = rt.rope_table(torch.arange(T, dtype=torch.int32, device=DEVICE), head_dim=D)
    return {"rope_cos": cos, "rope_sin": sin}


TORN = torch.tensor([[1, 1, 2, 2, 1, 1]] * B, dtype=torch.int32)


class Named(torch.Tensor):
    """A subclass that leaves dispatch alone."""


@pytest.mark.skipif(DEVICE == "cuda", reason="values of CUDA tensors are not looked at")
@pytest.mark.parametrize("transform", [torch.func.grad, lambda f: lambda q: torch.func.vmap(f)(q[None])])
def test_values_of_tensors_that_a_function_closes_over_are_looked_at(transform: Any):  # ERR-8
    t = call()
    q = t.pop("q")
    with pytest.raises(SpecError, match="ERR-8"):
        transform(lambda q: rt.rattention(q, **t, segment_ids=TORN).sum())(q)  # pyright: ignore


@pytest.mark.skipif(DEVICE == "cuda", reason="values of CUDA tensors are not looked at")
@pytest.mark.parametrize("kind", [lambda x: torch.nn.Parameter(x, requires_grad=False), lambda x: x.as_subclass(Named)])
def test_values_of_subclasses_are_looked_at(kind: Any):  # ERR-8
    for check_values in (False, True):
        with pytest.raises(SpecError, match="ERR-8"):
            rt.rattention(**call(segment_ids=kind(TORN)), check_values=check_values)
    ones = kind(torch.ones_like(TORN))
    assert torch.equal(rt.rattention(**call(segment_ids=ones), check_values=True), rt.rattention(**call()))  # pyright: ignore


@pytest.mark.parametrize("impl", ["eager", "triton"])
@pytest.mark.parametrize("name", ["rope_cos", "rope_sin"])
def test_a_table_that_asks_for_a_gradient_is_refused_on_every_route(name: str, impl: str):
    rows, t = table(), call()
    match = f"{name} asks for a gradient"

    def f(x: Tensor) -> Tensor:
        return rt.rattention(**t, **(rows | {name: x}), impl=impl).square().sum()  # pyright: ignore

    with pytest.raises(Unsupported, match=match):
        f(rows[name].clone().requires_grad_())
    with pytest.raises(Unsupported, match=match):
        torch.func.grad(f)(rows[name])
    with pytest.raises(Unsupported, match=match):
        torch.func.jvp(f, (rows[name],), (rows[name],))
    with pytest.raises(Exception, match=match):
        torch.compile(f, backend="aot_eager", fullgraph=True)(rows[name].clone().requires_grad_())
    with torch.no_grad():  # nobody asks
        f(rows[name].clone().requires_grad_())


def test_a_table_made_inside_a_transformation_is_a_constant():
    t = call()
    q = t.pop("q")
    torch.func.grad(lambda q: rt.rattention(q, **t, **table()).square().sum())(q)  # pyright: ignore


@pytest.mark.parametrize("window", [2**15, 2**31, 2**32 + 1, 2**53 - 1])
@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_a_window_beyond_every_length_is_full_attention(impl: str, window: int):  # SWA-6
    ids = torch.ones(B, T, dtype=torch.int32, device=DEVICE)
    got = rt.rattention(**call(window=window, segment_ids=ids), impl=impl)
    assert torch.equal(got, rt.rattention(**call(window=T, segment_ids=ids), impl=impl))  # pyright: ignore


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn])
def test_dtypes_that_are_no_numbers_of_ours_are_refused_by_name(dtype: torch.dtype):  # ERR-4
    q = call()["q"].to(dtype)
    q = q.requires_grad_() if dtype.is_complex else q
    with pytest.raises(SpecError, match=r"q: expected dtype .* \(ERR-4\)"):
        rt.rattention(**call(q=q))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*deprecated:DeprecationWarning")
def test_a_continuation_can_be_traced():
    t = call()
    window = t.pop("window")
    cache = rt.Cache.empty(B, HKV, D, window=window, device=DEVICE)

    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rest = {name: t[name] for name in ("swa_weight", "rla_weight")}
        return rt.rattention_extend(q, k, v, **rest, cache=cache, window=window)[0]

    traced = torch.jit.trace(f, (t["q"], t["k"], t["v"]))
    torch.testing.assert_close(traced(t["q"], t["k"], t["v"]), f(t["q"], t["k"], t["v"]))  # pyright: ignore
