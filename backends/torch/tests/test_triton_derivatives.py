"""The Triton kernels under torch.func, and the refusal of what they have no kernel for, on every route to it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rattention.spec import Unsupported
from torch import Tensor
from torch.autograd import forward_ad

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from rattention import torch as rt

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# PyTorch's own forward mode compiles its decompositions with torch.jit.script when it is first used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

B, T, HQ, HKV, D = 1, 5, 2, 1, 8


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


K, V, Q = normal(1, B, T, HKV, D), normal(2, B, T, HKV, D), normal(3, B, T, HQ, D)
GAINS = normal(4, HQ, D), normal(5, HQ, D)


def extend(q: Tensor, impl: str) -> Tensor:
    cache = rt.Cache.empty(B, HKV, D, window=1, device=DEVICE)
    return rt.rattention_extend(q, K, V, *GAINS, cache, window=1, impl=impl)[0]


OPERATIONS: dict[str, Callable[[Tensor, str], Any]] = {
    "feature_map": lambda q, impl: rt.feature_map(q, impl=impl),
    "rms_mix": lambda q, impl: rt.rms_mix(q, q.square(), *GAINS, impl=impl),
    "sliding_window_attention": lambda q, impl: rt.sliding_window_attention(q, K, V, window=1, impl=impl),
    "residual_linear_attention": lambda q, impl: rt.residual_linear_attention(q, K, V, window=1, impl=impl),
    "rattention": lambda q, impl: rt.rattention(q, K, V, *GAINS, window=1, impl=impl),
    "rattention_extend": extend,
}


def scalar(op: str, impl: str = "triton") -> Callable[[Tensor], Tensor]:
    return lambda q: OPERATIONS[op](q, impl).square().sum()


@pytest.mark.parametrize("op", OPERATIONS)
def test_functional_gradients_alone_batched_and_per_sample(op: str):
    f, eager = scalar(op), scalar(op, "eager")
    close: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}
    want = torch.func.grad(eager)(Q)
    torch.testing.assert_close(torch.func.grad(f)(Q), want, **close)
    many = torch.stack([Q, 2 * Q, -Q], 1)
    torch.testing.assert_close(
        torch.func.vmap(f, in_dims=1)(many), torch.func.vmap(eager, in_dims=1)(many), rtol=1e-4, atol=1e-3
    )
    got = torch.func.vmap(torch.func.grad(f), in_dims=1)(many)
    torch.testing.assert_close(got, torch.func.vmap(torch.func.grad(eager), in_dims=1)(many), **close)
    back = torch.func.vjp(f, Q)[1]
    torch.testing.assert_close(back(torch.ones((), device=DEVICE))[0], want, **close)


def test_per_sample_gradients_of_the_weights():
    """Each element of the axis has weight gradients of its own."""
    rows = torch.stack([Q, 2 * Q])

    def loss(impl: str) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda w, q: rt.rattention(q, K, V, w, GAINS[1], window=1, impl=impl).square().sum()  # pyright: ignore

    got, want = (
        torch.func.vmap(torch.func.grad(loss(i)), in_dims=(None, 0))(GAINS[0], rows) for i in ("triton", "eager")
    )
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_a_jacobian():
    got, want = (
        torch.func.jacrev(lambda q, i=i: OPERATIONS["rattention"](q, i)[0, -1, 0])(Q) for i in ("triton", "eager")
    )
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def create_graph(f: Callable[[Tensor], Tensor]) -> None:
    leaf = Q.clone().requires_grad_()
    (g,) = torch.autograd.grad(f(leaf), leaf, create_graph=True)
    torch.autograd.grad(g.sum(), leaf)


def penalty(f: Callable[[Tensor], Tensor]) -> None:
    leaf = Q.clone().requires_grad_()
    (g,) = torch.autograd.grad(f(leaf), leaf, create_graph=True)
    g.square().sum().backward()


def dual(f: Callable[[Tensor], Tensor]) -> None:
    with forward_ad.dual_level():
        f(forward_ad.make_dual(Q, torch.ones_like(Q)))


ROUTES: dict[str, Callable[[Callable[[Tensor], Tensor]], Any]] = {
    "create_graph": create_graph,
    "gradient penalty": penalty,
    "grad of grad": lambda f: torch.func.grad(lambda q: torch.func.grad(f)(q).sum())(Q),
    "hessian": lambda f: torch.func.hessian(f)(Q),
    "jacrev of jacrev": lambda f: torch.func.jacrev(torch.func.jacrev(f))(Q),
    "functional.hessian": lambda f: torch.autograd.functional.hessian(f, Q),
    "functional.vhp": lambda f: torch.autograd.functional.vhp(f, Q, Q),
    "functional.hvp": lambda f: torch.autograd.functional.hvp(f, Q, Q),
    "functional.jvp": lambda f: torch.autograd.functional.jvp(f, Q, Q),
    "jvp": lambda f: torch.func.jvp(f, (Q,), (Q,)),
    "dual numbers": dual,
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("op", OPERATIONS)
def test_no_second_derivative_and_no_forward_mode_in_silence(op: str, route: str):
    with pytest.raises(
        Unsupported, match=r"the Triton kernels have no (second derivative|forward mode); impl='eager' has"
    ):
        ROUTES[route](scalar(op))


def test_compiled_transformations_are_right_or_refuse():
    f = scalar("rattention")
    compiled = torch.compile(torch.func.grad(f), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(Q), torch.func.grad(f)(Q))
    twice = torch.compile(lambda q: torch.func.grad(lambda x: torch.func.grad(f)(x).sum())(q), backend="aot_eager")
    with pytest.raises(Exception, match="no second derivative"):
        twice(Q)
    graph = torch.compile(f, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        graph(Q)
        with forward_ad.dual_level(), pytest.raises(Exception, match="forward mode through a compiled graph"):
            graph(forward_ad.make_dual(Q, Q))


def test_vmap_over_nothing():
    f = scalar("rattention")
    assert torch.func.vmap(f)(Q[None][:0]).shape == (0,)
