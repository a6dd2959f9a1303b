"""The layer on the Triton kernels by way of the public functions: generation, the eager form, transformations."""

import copy
import os
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from rattention.torch.nn import RAttention
from rattention.torch.triton.launch import recording

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HIDDEN, W = 16, 4
FULL: dict[str, Any] = {"qk_norm": True, "qk_scale": True, "memory": True}


def layer(impl: str = "triton", **options: Any) -> RAttention:
    torch.manual_seed(3)
    given: dict[str, Any] = {"value_dim": 5, "window": W, "impl": impl} | options
    made = RAttention(HIDDEN, 2, 1, 6, **given).to(DEVICE)
    with torch.no_grad():
        for p in made.parameters():
            p.normal_(0.3, 0.5)
    return made


def hidden(B: int, T: int) -> torch.Tensor:
    return torch.randn(B, T, HIDDEN, generator=torch.Generator().manual_seed(4)).to(DEVICE)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.detach().abs().max()))


@pytest.mark.parametrize("options", [FULL, {"window": -1, "rope_theta": None}])
def test_kernels_and_eager_give_the_same_layer(options: dict[str, Any]):
    """Outputs and the gradients of every parameter."""
    x = hidden(2, 21)
    fused, plain = layer(**options), layer("eager", **options)
    results = []
    for model in (fused, plain):
        with recording() as launches:
            y = model(x)
        grads = torch.autograd.grad(y.square().sum(), list(model.parameters()))
        results.append((y, *grads))
        assert ("attend" in {x.name for x in launches}) == (model is fused)
    for a, b in zip(*results, strict=True):
        close(a, b)


def test_generation_equals_the_parallel_form_and_a_reset_row_starts_afresh():
    """Two rows of different lengths past three windows: a ragged prompt, then steps while one row waits now and then;
    after that row 1 is reset and goes on with a new sequence (TRAPS 20)."""
    model = layer(**FULL)
    lengths = [3 * W + 7, 3 * W + 3]
    x = hidden(2, max(lengths))
    with torch.no_grad():
        want = model(x)
        cache = model.new_cache(2)
        got = torch.zeros_like(want)
        prompt = [9, 5]
        y = model.prefill(x[:, :9], cache, lengths=torch.tensor(prompt, dtype=torch.int32, device=DEVICE))
        at = [0, 0]
        for b in range(2):
            got[b, : prompt[b]] = y[b, : prompt[b]]
            at[b] = prompt[b]
        turn = 0
        while at != lengths:
            active = [at[b] < lengths[b] and not (b == 1 and turn % 3 == 1) for b in range(2)]
            tokens = torch.stack([x[b, min(at[b], lengths[b] - 1)] for b in range(2)])
            with recording() as launches:
                y = model.step(tokens, cache, active=torch.tensor(active, device=DEVICE))
            assert launches[0].name == "decode"
            for b in range(2):
                if active[b]:
                    got[b, at[b]] = y[b]
                    at[b] += 1
            turn += 1
        assert cache.length.tolist() == lengths
        for b, n in enumerate(lengths):
            close(got[b, :n], want[b, :n])
        cache.reset(1)
        fresh = model.prefill(x[:, :6], cache)
        close(fresh[1], want[1, :6])


def test_the_public_function_compiles_checkpoints_and_casts():
    """fullgraph compilation, activation checkpointing and autocast of the layer on the kernels."""
    model = layer()
    x = hidden(1, 13)
    parameters = list(model.parameters())
    want = torch.autograd.grad(model(x).square().sum(), parameters)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(x).square().sum(), list(compiled.parameters()))
    for a, b in zip(got, want, strict=True):
        close(a, b)
    again = checkpoint(model, x, use_reentrant=False)
    assert isinstance(again, torch.Tensor)
    for a, b in zip(torch.autograd.grad(again.square().sum(), parameters), want, strict=True):
        assert torch.equal(a, b)
    with torch.autocast(DEVICE, torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    for p, g in zip(parameters, torch.autograd.grad(y.float().square().sum(), parameters), strict=True):
        assert g.dtype == p.dtype
        assert g.isfinite().all()
