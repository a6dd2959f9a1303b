"""NUM-3: the state after 32,768 decoded tokens against float64; v has a mean of 0.5: a narrow state drifts most."""

import os
from typing import Any

import pytest
import torch
from rattention import torch as rt

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from rattention.torch.triton import Ring, operations, step

TOKENS, HQ, HKV, D, W = 32_768, 2, 1, 4, 3
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ATTRIBUTES: dict[str, Any] = {"window": W, "scale": None, "feature_map": "softmax", "eps": 1e-6}


def tokens(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    make = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(TOKENS, 1, 1, h, D, generator=make) for h in (HQ, HKV, HKV))
    return q.to(dtype), k.to(dtype), (v + 0.5).to(dtype)


def exact_state(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    k, v = k[:-W, 0, 0, 0].double(), v[:-W, 0, 0, 0].double()
    return torch.cat((k.softmax(-1), (-k).softmax(-1)), -1).T @ v


def error(state: torch.Tensor, exact: torch.Tensor) -> float:
    return float((state.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_eager_state_does_not_drift(dtype):
    q, k, v = tokens(dtype)
    cache = rt.Cache.empty(1, window=W, num_kv_heads=HKV, head_dim=D, dtype=dtype)
    weight = torch.ones(HQ, D)
    with torch.inference_mode():
        for i in range(TOKENS):
            _, cache = rt.rattention_extend(q[i], k[i], v[i], weight, weight, cache, window=W)
    assert int(cache.length) == TOKENS
    assert error(cache.state[0, 0], exact_state(k, v)) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_state_of_the_decode_kernel_does_not_drift(dtype):
    """32,768 interpreted launches would take minutes. A step of the kernel is one float32 multiplication and addition
    per element, bit for bit, which is shown at the start and at the end of the row; the steps between repeat it."""
    q, k, v = tokens(dtype)
    phi = operations["feature_map"](k[:, 0].transpose(0, 1).float().to(DEVICE), feature_map="softmax")[0][0, :, 0]
    enters = phi[:, :, None] * v[:, 0, 0, 0, None].float().to(DEVICE)
    weight = torch.ones(HQ, D, device=DEVICE)
    state = torch.zeros(2 * D, D, device=DEVICE)
    watched = {0, TOKENS - W - 4}  # where the kernel itself makes four steps
    for i in range(TOKENS - W):
        if i in watched:
            before: Any = [x[i : i + W, 0, 0, 0][None, :, None].to(DEVICE) for x in (k, v)]
            length = torch.tensor([i + W], dtype=torch.int32, device=DEVICE)
            canonical: Any = [*before, state[None, None].clone(), length]
            ring = Ring.from_canonical(*canonical)
            expected = state.clone()
            for j in range(i, i + 4):
                new = tuple(x[j + W].to(DEVICE) for x in (q, k, v))
                step(ring, new[0], new[1], new[2], weight, weight, window=W)
                _, *canonical = operations["rattention_extend"](*new, weight, weight, *canonical, **ATTRIBUTES)
                expected += enters[j]
                assert torch.equal(ring.state[0, 0], expected)
                assert torch.equal(canonical[2][0, 0], expected)
        state += enters[i]
    assert error(state.cpu(), exact_state(k, v)) < 1e-4
