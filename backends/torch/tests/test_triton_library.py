"""The Triton operators inside PyTorch: opcheck, torch.compile, torch.export, checkpointing, autocast, dispatch."""

import os
from typing import Any

import pytest
import torch
from rattention.spec import Unsupported
from torch.utils.checkpoint import checkpoint

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from rattention.torch.triton import Ring, available, operations, step
from rattention.torch.triton.launch import recording

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
B, T, HQ, HKV, D, WINDOW = 1, 20, 2, 1, 8, 5
ATTRIBUTES: dict[str, Any] = {"window": WINDOW, "scale": None, "feature_map": "softmax", "eps": 1e-6}


def tensors(T: int = T, dtype: torch.dtype = torch.float32, grad: bool = False) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int, to: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, generator=g).to(DEVICE, to).requires_grad_(grad)

    return {
        "q": normal(B, T, HQ, D, to=dtype),
        "k": normal(B, T, HKV, D, to=dtype),
        "v": normal(B, T, HKV, D, to=dtype),
        "swa_weight": normal(HQ, D),
        "rla_weight": normal(HQ, D),
    }


def cache(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return {
        "cache_k": torch.randn(B, WINDOW, HKV, D, generator=g).to(DEVICE, dtype),
        "cache_v": torch.randn(B, WINDOW, HKV, D, generator=g).to(DEVICE, dtype),
        "cache_state": torch.randn(B, HKV, 2 * D, D, generator=g).to(DEVICE),
        "cache_length": torch.full((B,), 9, dtype=torch.int32, device=DEVICE),
    }


def attention(q, k, v, swa_weight, rla_weight):
    return operations["rattention"](q, k, v, swa_weight, rla_weight, **ATTRIBUTES)


def extend(q, k, v, swa_weight, rla_weight, cache_k, cache_v, cache_state, cache_length):
    return operations["rattention_extend"](
        q, k, v, swa_weight, rla_weight, cache_k, cache_v, cache_state, cache_length, **ATTRIBUTES
    )


def test_opcheck_attention():
    """Schema, autograd registration, fake tensors and AOT dispatch with dynamic shapes."""
    x = tensors(grad=True)
    ids = torch.tensor([[0] * 3 + [1] * 9 + [2] * 8], dtype=torch.int32, device=DEVICE)
    full = (x["q"], x["k"], x["v"], x["swa_weight"], x["rla_weight"], None, None, None, ids, None, None, None, None)
    torch.library.opcheck(torch.ops.rattention.attention.default, (*full, WINDOW, None, "softmax", 1e-6, "mix", False))  # pyright: ignore[reportCallIssue]


def test_opcheck_extend():
    x, c = tensors(T=3, grad=True), cache()
    arguments = (*x.values(), *c.values(), None, None, None, None, None, None, WINDOW, None, "softmax", 1e-6, False)
    torch.library.opcheck(torch.ops.rattention.extend.default, arguments)  # pyright: ignore[reportCallIssue]


def test_opcheck_parts():
    x = tensors(grad=True)
    torch.library.opcheck(torch.ops.rattention.feature_map.default, (x["q"], "softmax"))
    mixed = (x["q"], x["q"].detach().clone().requires_grad_(), x["swa_weight"], x["rla_weight"], 1e-6)
    torch.library.opcheck(torch.ops.rattention.rms_mix.default, mixed)
    positions = torch.arange(5, dtype=torch.int32, device=DEVICE)
    torch.library.opcheck(torch.ops.rattention.rope_table.default, (positions, 8, 1e4))


def gradients(f, x: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    out = f(**x)
    out, state = out if isinstance(out, tuple) else (out, None)
    loss = out.float().square().sum() + (0 if state is None else state.sum())
    return [out.detach(), *torch.autograd.grad(loss, list(x.values()))]


def test_compiles_without_a_graph_break():
    """Forward and gradients of the compiled function are those of the plain one, bit for bit."""
    x = tensors(grad=True)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    for one, two in zip(gradients(attention, x), gradients(compiled, x), strict=True):
        assert torch.equal(one, two)


def test_exports():
    class Module(torch.nn.Module):
        def forward(self, q, k, v, swa_weight, rla_weight):
            return attention(q, k, v, swa_weight, rla_weight)[0]

    x = tuple(tensors().values())
    tokens = torch.export.Dim("tokens", min=2, max=512)
    shapes = ({1: tokens}, {1: tokens}, {1: tokens}, {}, {})
    program = torch.export.export(Module(), x, dynamic_shapes=shapes)
    assert "rattention.attention" in program.graph_module.code
    longer = tuple(tensors(T=33).values())
    assert torch.equal(program.module()(*longer), Module()(*longer))


def test_checkpointing_gives_the_same_gradients():
    x = tensors(grad=True)

    def again(**kwargs):
        return checkpoint(lambda *a: attention(*a)[0], *kwargs.values(), use_reentrant=False)

    for one, two in zip(gradients(lambda **a: attention(**a)[0], x), gradients(again, x), strict=True):
        assert torch.equal(one, two)


def test_autocast_casts_the_storage_alone():
    """q, k, v become bfloat16; weights and states stay float32; gradients come back in the dtype of the inputs."""
    x = tensors(grad=True)
    with torch.autocast(DEVICE, torch.bfloat16):
        out, state = attention(**x)
    assert out.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    lowered = {n: t.detach().bfloat16() if n in "qkv" else t.detach() for n, t in x.items()}
    assert torch.equal(out, attention(**lowered)[0])
    for name, g in zip(x, torch.autograd.grad(out.float().sum(), list(x.values())), strict=True):
        assert g.dtype == torch.float32, name


def test_only_the_state_asked_for():
    """A loss on final_state alone, and one on out alone: the absent cotangent is zero."""
    x = tensors(grad=True)
    d = torch.autograd.grad(attention(**x)[1].sum(), [x["k"], x["q"]])
    assert d[0].abs().sum() > 0
    assert d[1].abs().sum() == 0
    assert torch.autograd.grad(attention(**x)[0].sum(), x["q"])[0].abs().sum() > 0


@pytest.mark.parametrize("window", [WINDOW, 0, -1])
def test_the_ring_decodes_as_the_canonical_cache(window):
    """EXT-1: a moving head in place gives what the functional form gives, past three windows, rows of unlike ages."""
    attributes = {**ATTRIBUTES, "window": window}
    W = max(window, 0)
    g = torch.Generator().manual_seed(3)
    rows, count = 2, 3 * W + 4
    c = [
        torch.randn(rows, W, HKV, D, generator=g), torch.randn(rows, W, HKV, D, generator=g),
        torch.randn(rows, HKV, 2 * D, D, generator=g), torch.tensor([W + 3, 1], dtype=torch.int32),
    ]  # fmt: skip
    c = [x.to(DEVICE) for x in c]
    for x in c[:2]:
        x[1, : max(W - 1, 0)] = 0
    ring = Ring.from_canonical(*c)
    for one, two in zip(ring.canonical(), c, strict=True):
        assert torch.equal(one, two)
    weights = [torch.randn(HQ, D, generator=g).to(DEVICE) for _ in range(2)]
    for i in range(count):
        q = torch.randn(rows, 1, HQ, D, generator=g).to(DEVICE)
        k, v = (torch.randn(rows, 1, HKV, D, generator=g).to(DEVICE) for _ in range(2))
        lengths = torch.tensor([1, i % 2], dtype=torch.int32, device=DEVICE)
        want, *c = operations["rattention_extend"](q, k, v, *weights, *c, lengths=lengths, **attributes)
        with recording() as launches:
            got = step(ring, q, k, v, *weights, window=window, active=lengths)
        assert launches[0].name == "decode"
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * want.abs().max().item())
        for one, two in zip(ring.canonical(), c, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)


def test_what_it_lacks_it_refuses():
    """BCK-3: float64, and head dims past the largest tile."""
    x = tensors()
    with pytest.raises(Unsupported, match="float64"):
        attention(**{n: t.double() for n, t in x.items()})
    wide = torch.zeros(1, 2, 1, 300, device=DEVICE)
    weight = torch.zeros(1, 300, device=DEVICE)
    with pytest.raises(Unsupported, match="256"):
        attention(wide, wide, wide, weight, weight)
    assert available(torch.device("meta"))


def test_the_adapter_says_what_it_needs(monkeypatch):
    """BCK-3: without a device and without the interpreter it does not even describe itself, and says how it would."""
    from rattention.torch.triton_adapter import backend

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(Unsupported, match="TRITON_INTERPRET=1 runs the kernels on the CPU"):
        backend.describe()
    with pytest.raises(Unsupported, match="no CUDA or ROCm device here"):
        backend.run("feature_map", {"x": torch.ones(1, 1, 1, 2).numpy()}, {"feature_map": "relu"})
