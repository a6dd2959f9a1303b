"""Routes to derivatives on which PyTorch loses one without a word, or refuses what plain operations can do."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from rattention import torch as rt
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

# PyTorch's own forward mode compiles its decompositions with torch.jit.script when it is first used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

B, T, HQ, HKV, D, DV = 2, 6, 2, 1, 4, 3
CLOSE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-11}


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


K, V, GAINS, STATE = normal(2, B, T, HKV, D), normal(3, B, T, HKV, DV), normal(4, HQ, DV), normal(5, B, HKV, 2 * D, DV)
MEMORY = normal(6, HQ, 2 * D, DV)
PAST = rt.Cache(normal(7, B, 4, HKV, D), normal(8, B, 4, HKV, DV), STATE, torch.tensor([3, 9], dtype=torch.int32))
IDS = torch.tensor([[0, 3, 3, 3, 1, 1], [2, 2, 2, 2, 0, 0]], dtype=torch.int32)


OPERATIONS: dict[str, Callable[[Tensor], Any]] = {
    "feature_map": rt.feature_map,
    "softmax branch": lambda q: rt.sliding_window_attention(q, K, V, window=2, segment_ids=IDS),
    "linear branch": lambda q: rt.residual_linear_attention(q, K, V, window=1, initial_state=STATE),
    "mix": lambda q: rt.rms_mix(q, q.flip(1), GAINS[:, :1].expand(HQ, D), GAINS[:, 1:2].expand(HQ, D), eps=0.1),
    "both": lambda q: rt.rattention(q, K, V, GAINS, GAINS, window=2),
    "both, segments, state, memory": lambda q: rt.rattention(
        q, K, V, GAINS, GAINS, window=1, segment_ids=IDS, initial_state=STATE, memory=MEMORY
    ),
    "continuation": lambda q: rt.rattention_extend(q, K, V, GAINS, GAINS, PAST, window=4)[0],
}
Q, ALONG, ASIDE = normal(1, B, T, HQ, D), normal(20, B, T, HQ, D), normal(21, B, T, HQ, D)


def slope(f: Callable[[Tensor], Tensor], along: Tensor) -> Callable[[Tensor], Tensor]:
    """The derivative along a direction, by forward mode."""
    return lambda x: torch.func.jvp(f, (x,), (along,))[1]


def gradient(f: Callable[[Tensor], Tensor], along: Tensor) -> Callable[[Tensor], Tensor]:
    """The same by reverse mode."""
    return lambda x: (torch.func.grad(f)(x) * along).sum()


def scalar(name: str) -> Callable[[Tensor], Tensor]:
    return lambda q: OPERATIONS[name](q).pow(3).sum()


@pytest.mark.parametrize("name", OPERATIONS)
def test_forward_mode_inside_of_forward_mode(name):
    """PyTorch drops the outer tangent of every autograd.Function."""
    f = scalar(name)
    want = gradient(gradient(f, ALONG), ASIDE)(Q)
    torch.testing.assert_close(slope(slope(f, ALONG), ASIDE)(Q), want, **CLOSE)
    rows = torch.func.vmap(lambda d: slope(slope(f, d), ASIDE)(Q))(torch.stack([ALONG, 2 * ALONG]))
    torch.testing.assert_close(rows, torch.stack([want, 2 * want]), **CLOSE)


@pytest.mark.parametrize("order", ["ffr", "frf", "rff", "fff", "ffrf"])
def test_higher_derivatives_in_any_order_of_modes(order):
    f = want = scalar("both, segments, state, memory")
    for i, mode in enumerate(order):
        along = normal(30 + i, *Q.shape)
        f = (slope if mode == "f" else gradient)(f, along)
        want = gradient(want, along)
    torch.testing.assert_close(f(Q), want(Q), **CLOSE)


def of_few_tokens(n: int) -> Callable[[Tensor], Tensor]:
    """A scalar of the first `n` queries: of more, a whole Hessian takes long."""

    def f(q: Tensor) -> Tensor:
        out = rt.rattention(q, K[:, :n], V[:, :n], GAINS, GAINS, window=1)
        assert isinstance(out, Tensor)
        return out.pow(3).sum()

    return f


def test_a_hessian_by_forward_mode_alone():
    f, q = of_few_tokens(4), Q[:, :4]
    torch.testing.assert_close(torch.func.jacfwd(torch.func.jacfwd(f))(q), torch.func.hessian(f)(q), **CLOSE)


@pytest.mark.parametrize("how", ["is_grads_batched", "vmap"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_batch_of_gradients_keeps_its_graph(name, how):
    """The penalty of a Jacobian: its gradient was dropped, so that the penalty did nothing."""
    f = OPERATIONS[name]

    def penalty(batched: bool) -> Tensor:
        leaf = Q.clone().requires_grad_()
        out = f(leaf).flatten()
        some = torch.eye(out.numel(), dtype=out.dtype)[::7]

        def pulled(d: Tensor, **how: Any) -> Tensor:
            return torch.autograd.grad(out, leaf, d, create_graph=True, **how)[0]

        if not batched:
            rows = torch.stack([pulled(d) for d in some])
        elif how == "vmap":
            rows = torch.func.vmap(pulled)(some)
        else:
            rows = pulled(some, is_grads_batched=True)
        assert rows.requires_grad
        return torch.autograd.grad(rows.pow(2).sum(), leaf)[0]

    want = penalty(False)
    assert want.abs().max() > 1e-2
    torch.testing.assert_close(penalty(True), want, **CLOSE)


def test_a_vectorised_hessian_has_a_derivative():
    f = of_few_tokens(3)
    found = []
    for vectorize in (False, True):
        leaf = Q[:, :3].clone().requires_grad_()
        hessian = torch.autograd.functional.hessian(f, leaf, create_graph=True, vectorize=vectorize)
        found.append(torch.autograd.grad(hessian.pow(2).sum(), leaf)[0])  # pyright: ignore
    torch.testing.assert_close(found[1], found[0], **CLOSE)


def checkpointed(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    again = checkpoint(f, x, use_reentrant=False)
    assert isinstance(again, Tensor)
    return again


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("what", ["gradient", "product"])
@pytest.mark.parametrize("where", ["checkpoint", "save_on_cpu"])
def test_a_gradient_inside_of_what_saves_tensors_in_its_own_way(where, what, name):
    f = scalar(name)

    def inner(q: Tensor) -> Tensor:
        (g,) = torch.autograd.grad(f(q), q, create_graph=True)
        if what == "product":
            (g,) = torch.autograd.grad((g * ALONG).sum(), q, create_graph=True)
        return f(q) + g

    def outer(q: Tensor) -> Tensor:
        return checkpointed(inner, q) if where == "checkpoint" else inner(q)

    leaf = Q.clone().requires_grad_()
    (want,) = torch.autograd.grad(inner(leaf).pow(2).sum(), leaf)
    with torch.autograd.graph.save_on_cpu() if where == "save_on_cpu" else nullcontext():
        (got,) = torch.autograd.grad(outer(leaf).pow(2).sum(), leaf)
    torch.testing.assert_close(got, want, **CLOSE)


def test_forward_mode_where_tensors_are_saved_on_the_cpu():
    f = scalar("both")
    with torch.autograd.graph.save_on_cpu(), forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(Q, ALONG))).tangent
    torch.testing.assert_close(tangent, gradient(f, ALONG)(Q), **CLOSE)


@pytest.mark.parametrize("name", OPERATIONS)
def test_vmap_over_nothing(name):
    f, none = OPERATIONS[name], torch.zeros(0, *Q.shape, dtype=torch.float64)
    assert torch.func.vmap(f)(none).shape == (0, *f(Q).shape)
    assert torch.func.vmap(torch.func.grad(scalar(name)))(none).shape == none.shape
