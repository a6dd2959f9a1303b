"""Derivatives beyond the first, and forward mode, of the eager form: right on every route that PyTorch has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from rattention import torch as rt
from torch import Tensor
from torch.autograd import forward_ad

# PyTorch's own forward mode compiles its decompositions with torch.jit.script when it is first used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

B, T, HQ, HKV, D, DV = 2, 6, 2, 1, 4, 3


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def qkv(T: int = T, B: int = B, Hq: int = HQ, Hkv: int = HKV) -> dict[str, Tensor]:
    return {"q": normal(1, B, T, Hq, D), "k": normal(2, B, T, Hkv, D), "v": normal(3, B, T, Hkv, DV)}


def gains(Hq: int = HQ) -> dict[str, Tensor]:
    return {"swa_weight": normal(4, Hq, DV), "rla_weight": normal(5, Hq, DV)}


def carried(F: int = 2 * D) -> dict[str, Tensor]:
    return {"q_scale": normal(6, D), "k_scale": normal(7, D), "initial_state": normal(8, B, HKV, F, DV)}


def memory(F: int = 2 * D) -> dict[str, Tensor]:
    return {"memory": normal(9, HQ, F, DV)}


def table(rows: int = 20) -> dict[str, Tensor]:
    cos, sin = rt.rope_table(torch.arange(rows, dtype=torch.int32), head_dim=D)
    return {"rope_cos": cos, "rope_sin": sin}


def segments() -> dict[str, Tensor]:
    return {"segment_ids": torch.tensor([[0, 3, 3, 3, 1, 1], [2, 2, 2, 2, 0, 0]], dtype=torch.int32)}


def positions() -> dict[str, Tensor]:
    return {"positions": torch.tensor([[4, 0, 9, 2, 2, 7], [1, 2, 3, 5, 8, 13]], dtype=torch.int32)}


FINAL = {"return_final_state": True}
CALLS: dict[str, tuple[Callable[..., Any], dict[str, Tensor], dict[str, Any]]] = {
    "feature_map softmax": (rt.feature_map, {"x": normal(1, B, T, HQ, D)}, {}),
    "feature_map relu": (rt.feature_map, {"x": normal(1, B, T, HQ, D)}, {"feature_map": "relu"}),
    "softmax branch": (rt.sliding_window_attention, qkv(), {"window": 2}),
    "softmax branch, everything": (
        rt.sliding_window_attention,
        qkv(),
        {"window": 2, "scale": 0.7, **table(), **segments(), **positions()},
    ),
    "softmax branch, full": (rt.sliding_window_attention, qkv(), {"window": None}),
    "softmax branch, own token": (rt.sliding_window_attention, qkv(), {"window": 0, **segments()}),
    "linear branch": (rt.residual_linear_attention, qkv(), {"window": 2, **FINAL}),
    "linear branch, everything": (
        rt.residual_linear_attention,
        qkv() | carried() | memory(),
        {"window": 1, **segments(), **FINAL},
    ),
    "linear branch, inclusive": (
        rt.residual_linear_attention,
        qkv() | carried(),
        {"window": -1, "feature_map": "relu", **FINAL},
    ),
    "linear branch, state alone": (rt.residual_linear_attention, qkv() | carried(), {"window": None, **FINAL}),
    "mix": (rt.rms_mix, {"swa": normal(1, B, T, HQ, DV), "rla": normal(2, B, T, HQ, DV)} | gains(), {"eps": 0.1}),
    "both": (rt.rattention, qkv() | gains(), {"window": 2, **FINAL}),
    "both, tables": (rt.rattention, qkv() | gains(), {"window": 2, **table(), **FINAL}),
    "both, segments and state": (rt.rattention, qkv() | gains() | carried(), {"window": 1, **segments(), **FINAL}),
    "both, everything": (
        rt.rattention,
        qkv() | gains() | carried() | memory(),
        {"window": 1, **table(), **segments(), **positions(), **FINAL},
    ),
    "both, identity": (
        rt.rattention,
        qkv() | gains() | carried(D) | memory(D),
        {"window": 2, "feature_map": "identity", "eps": 0.1, **FINAL},
    ),
    "both, no window": (rt.rattention, qkv() | gains(), {"window": -1, "eps": 0.1, **FINAL}),
}


@pytest.mark.parametrize("name", CALLS)
def test_second_derivatives_of_every_operation_and_option(name: str):
    f, tensors, rest = CALLS[name]
    names = list(tensors)
    leaves = [x.clone().requires_grad_() for x in tensors.values()]
    g = lambda *args: f(**dict(zip(names, args, strict=True)), **rest)  # noqa: E731
    # Cotangents that are absent are many more calls: once for an operation is enough.
    once = name in ("softmax branch", "linear branch", "mix", "both")
    assert torch.autograd.gradgradcheck(g, leaves, fast_mode=True, check_undefined_grad=once)


@pytest.mark.parametrize("with_memory", [False, True])
@pytest.mark.parametrize("window", [4, None])
def test_second_derivatives_of_a_continuation(window: int | None, with_memory: bool):
    tensors = qkv(T=3) | gains() | {k: x for k, x in carried().items() if k != "initial_state"}
    tensors |= memory() if with_memory else {}
    cache = [normal(10, B, 4, HKV, D), normal(11, B, 4, HKV, DV), normal(12, B, HKV, 2 * D, DV)]
    length = torch.tensor([2, 4 if window is None else 9], dtype=torch.int32)
    lengths = torch.tensor([3, 2], dtype=torch.int32)
    names = list(tensors)

    def f(k: Tensor, v: Tensor, state: Tensor, *args: Tensor):
        named: dict[str, Any] = dict(zip(names, args, strict=True)) | table()
        cache = rt.Cache(k, v, state, length)
        out, after = rt.rattention_extend(**named, cache=cache, lengths=lengths, window=window)
        return out, after.k, after.v, after.state

    leaves = [x.clone().requires_grad_() for x in (*cache, *tensors.values())]
    assert torch.autograd.gradgradcheck(f, leaves, fast_mode=True, check_undefined_grad=False)


def product(f: Callable[[dict[str, Tensor]], tuple[Tensor, ...]], tensors: dict[str, Tensor]) -> list[Tensor]:
    """The Hessian of a scalar of the outputs, times a fixed direction."""
    leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    loss = torch.stack([x.square().sum() for x in f(leaves)]).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
    along = torch.stack([(g * normal(20 + i, *g.shape)).sum() for i, g in enumerate(grads)]).sum()
    return list(torch.autograd.grad(along, list(leaves.values())))


@pytest.mark.parametrize("op", ["sliding_window_attention", "residual_linear_attention", "rattention"])
def test_over_many_chunks_it_is_that_of_the_dense_form(op: str, oracle: Any):
    """150 tokens are several chunks of both branches; documents end inside of them."""
    Hq, Hkv, n = 4, 2, 150
    tensors = qkv(n, 1, Hq, Hkv)
    tensors |= gains(Hq) if op == "rattention" else {}
    tensors |= {"initial_state": normal(8, 1, Hkv, 2 * D, DV)} if op != "sliding_window_attention" else {}
    ids = torch.tensor([[7] * 80 + [0] * 3 + [8] * 50 + [9] * 17], dtype=torch.int32)
    final = FINAL if op != "sliding_window_attention" else {}

    def eager(t: dict[str, Tensor]) -> tuple[Tensor, ...]:
        out = getattr(rt, op)(**t, segment_ids=ids, window=20, **final)
        return out if isinstance(out, tuple) else (out,)

    got = product(eager, tensors)
    want = product(lambda t: oracle(op, t | {"segment_ids": ids}, {"window": 20}), tensors)
    for name, a, b in zip(tensors, got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


def scalar(with_memory: bool) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    t = qkv(B=1, T=5) | gains() | (memory() if with_memory else {})
    q = t.pop("q")
    return lambda q: rt.rattention(q, **t, window=1, **table()).square().sum(), q  # pyright: ignore


@pytest.mark.parametrize("with_memory", [False, True])
def test_every_route_gives_the_same_hessian(with_memory: bool):
    f, q = scalar(with_memory)
    want = torch.autograd.functional.hessian(f, q)
    assert isinstance(want, Tensor)
    assert want.abs().max() > 1e-2
    close: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(torch.func.hessian(f)(q), want, **close)
    torch.testing.assert_close(torch.func.jacrev(torch.func.jacrev(f))(q), want, **close)
    v = normal(30, *q.shape)
    along = torch.einsum("abcdefgh,efgh->abcd", want, v)
    torch.testing.assert_close(torch.func.jvp(torch.func.grad(f), (q,), (v,))[1], along, **close)
    torch.testing.assert_close(torch.func.grad(lambda x: (torch.func.grad(f)(x) * v).sum())(q), along, **close)
    torch.testing.assert_close(torch.autograd.functional.vhp(f, q, v)[1], along, **close)
    many = torch.func.vmap(lambda x: torch.func.grad(lambda y: (torch.func.grad(f)(y) * v).sum())(x))
    torch.testing.assert_close(many(torch.stack([q, q]))[1], along, **close)


@pytest.mark.parametrize("with_memory", [False, True])
def test_forward_mode_agrees_with_reverse_mode(with_memory: bool):
    f, q = scalar(with_memory)
    v = normal(30, *q.shape)
    want = (torch.func.grad(f)(q) * v).sum()
    torch.testing.assert_close(torch.func.jvp(f, (q,), (v,))[1], want)
    with forward_ad.dual_level():
        torch.testing.assert_close(forward_ad.unpack_dual(f(forward_ad.make_dual(q, v))).tangent, want)
    rows = torch.func.vmap(lambda v: torch.func.jvp(f, (q,), (v,))[1])(torch.stack([v, 2 * v]))
    torch.testing.assert_close(rows, torch.stack([want, 2 * want]))


def test_third_derivatives():
    f, q = scalar(False)
    v = normal(30, *q.shape)

    def along(g: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: (torch.func.grad(g)(x) * v).sum()

    third, step = along(along(along(f)))(q), 1e-5
    second = along(along(f))
    torch.testing.assert_close(third, (second(q + step * v) - second(q - step * v)) / (2 * step), rtol=1e-6, atol=1e-8)


def test_a_gradient_penalty_trains():
    """The penalty of a Wasserstein critic: the norm of a gradient is itself differentiated, by plain `backward`."""
    f, q = scalar(False)
    leaf = q.clone().requires_grad_()
    (g,) = torch.autograd.grad(f(leaf), leaf, create_graph=True)
    (g.norm() - 1).square().backward()
    step, v = 1e-6, normal(31, *q.shape)

    def penalty(x: Tensor) -> Tensor:
        return (torch.func.grad(f)(x).norm() - 1).square()

    assert leaf.grad is not None
    slope = (penalty(q + step * v) - penalty(q - step * v)) / (2 * step)
    torch.testing.assert_close((leaf.grad * v).sum(), slope, rtol=1e-5, atol=1e-7)


def test_a_step_of_meta_learning_reaches_the_weights():
    """The inner step is a gradient step on the gains; the outer gradient runs through it."""
    t = qkv() | gains()

    def outer(swa_weight: Tensor) -> Tensor:
        def inner(w: Tensor) -> Tensor:
            return rt.rattention(**(t | {"swa_weight": w}), window=1).square().mean()  # pyright: ignore

        return inner(swa_weight - 0.5 * torch.func.grad(inner)(swa_weight))

    w, step, v = t["swa_weight"], 1e-6, normal(32, HQ, DV)
    got = (torch.func.grad(outer)(w) * v).sum()
    torch.testing.assert_close(got, (outer(w + step * v) - outer(w - step * v)) / (2 * step), rtol=1e-6, atol=1e-9)


def test_a_compiled_call_is_right_or_refuses():
    f, q = scalar(False)
    v = normal(30, *q.shape)
    hessian_product = lambda x: torch.func.grad(lambda y: (torch.func.grad(f)(y) * v).sum())(x)  # noqa: E731
    compiled = torch.compile(hessian_product, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(q), hessian_product(q))

    graph = torch.compile(f, backend="aot_eager", fullgraph=True)
    leaf = q.clone().requires_grad_()
    (g,) = torch.autograd.grad(graph(leaf), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        torch.autograd.grad(g.sum(), leaf)
    with torch.no_grad():
        graph(q)
        with forward_ad.dual_level(), pytest.raises(Exception, match="forward mode through a compiled graph"):
            graph(forward_ad.make_dual(q, v))


def test_a_first_derivative_does_not_pay_for_the_second(monkeypatch: pytest.MonkeyPatch):
    """Neither `backward` nor `create_graph` computes anything twice until a second derivative is asked for."""
    from rattention.torch.eager import composed

    def never(*args: Any) -> Any:
        raise AssertionError("the composed form ran for a first derivative")

    for name in ("band", "scan", "mix", "fused"):
        monkeypatch.setattr(composed, name, never)
    for with_memory in (False, True):
        f, q = scalar(with_memory)
        torch.func.grad(f)(q)
        leaf = q.clone().requires_grad_()
        torch.autograd.grad(f(leaf), leaf, create_graph=True)
        with pytest.raises(AssertionError, match="composed form"):
            torch.autograd.functional.hessian(f, q)
