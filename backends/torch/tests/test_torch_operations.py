"""Every operation of the eager form, forward and gradients, against the dense oracle in float64."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from rattention import torch as rt
from rattention.spec import load
from rattention.torch.eager import chunks, fused, mix
from rattention.torch.eager.operations import EAGER
from torch import Tensor

PER_OPERATION = 24


def close(got: Tensor, want: Tensor, what: str) -> None:
    """Float64 rounding alone: sums of a few hundred terms of order one."""
    assert got.shape == want.shape, what
    assert got.dtype == want.dtype, what
    error = (got - want).abs().max().item() if got.numel() else 0.0
    size = want.abs().max().item() if want.numel() else 0.0
    assert error <= 1e-11 * (1 + size), f"{what}: {error} of {size}"


def segments(draw: random.Random, T: int) -> list[int]:
    """Documents of any length with padding before, between and behind."""
    fresh = draw.sample(range(1, 10 * T + 10), T)
    ids: list[int] = []
    while len(ids) < T:
        ids += [draw.choice([0, fresh.pop()])] * draw.randint(1, max(T // 2, 1))
    return ids[:T]


def example(op: str, draw: random.Random) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A random valid call in float64: any window, head ratio, odd sizes, each optional tensor half of the time."""
    make = torch.Generator().manual_seed(draw.randrange(2**31))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make, dtype=torch.float64) + 0.25

    B, T = draw.choice([1, 2, 3]), draw.choice([1, 2, 5, 17, 64, 65, 140, 270])
    Hkv, G, D, Dv = draw.choice([1, 2, 3]), draw.choice([1, 2, 3, 8]), draw.choice([2, 4, 6]), draw.choice([1, 3, 8])
    fm = draw.choice(["softmax", "relu", "identity"])
    window = draw.choice([-1, 0, 1, 3, 16, T - 1, T, T + 1, 63, 64, 1000, None])
    F = D if fm == "identity" else 2 * D
    if op == "feature_map":
        return {"x": normal(B, T, Hkv, D)}, {"feature_map": fm}
    weights = {"swa_weight": normal(Hkv * G, Dv), "rla_weight": normal(Hkv * G, Dv)}
    if op == "rms_mix":
        swa = normal(B, T, Hkv * G, Dv)
        swa[:, : T // 2] = 0
        return {"swa": swa, "rla": normal(B, T, Hkv * G, Dv)} | weights, {"eps": draw.choice([1e-6, 1e-3])}
    t = {"q": normal(B, T, Hkv * G, D), "k": normal(B, T, Hkv, D), "v": normal(B, T, Hkv, Dv)}
    a: dict[str, Any] = {"window": window}
    names = {x.name for x in load().operations[op].tensors}
    if "swa_weight" in names:
        t |= weights
    if "feature_map" in load().operations[op].attribute:
        a["feature_map"] = fm
    if "scale" in load().operations[op].attribute:
        a["scale"] = draw.choice([None, 0.7, -0.3, 0.0])
    optional = {
        "q_scale": normal(D),
        "k_scale": normal(D),
        "memory": normal(Hkv * G, F, Dv),
        "initial_state": normal(B, Hkv, F, Dv),
        "segment_ids": torch.tensor([segments(draw, T) for _ in range(B)], dtype=torch.int32),
        "lengths": torch.tensor([draw.randint(0, T) for _ in range(B)], dtype=torch.int32),
    }
    t |= {k: x for k, x in optional.items() if k in names and draw.random() < 0.5}
    if op == "rattention_extend":
        W = draw.choice([0, 3, 40]) if window is None else max(window, 0)
        top = W if window is None else 2 * W + 3
        t |= {"cache_k": normal(B, W, Hkv, D), "cache_v": normal(B, W, Hkv, Dv), "cache_state": normal(B, Hkv, F, Dv)}
        t["cache_length"] = torch.tensor([draw.randint(0, top) for _ in range(B)], dtype=torch.int32)
    if "rope_cos" in names and draw.random() < 0.6:
        angle = torch.rand(T + 2100, D // 2, generator=make, dtype=torch.float64) * 6
        t |= {"rope_cos": angle.cos(), "rope_sin": angle.sin()}
        if "positions" in names and draw.random() < 0.5:
            t["positions"] = torch.randint(0, T + 50, (B, T), generator=make, dtype=torch.int32)
    return t, a


def call(op: str, t: dict[str, Tensor], a: dict[str, Any]) -> tuple[Tensor, ...]:
    """The public function, all outputs as a flat tuple."""
    t = dict(t)
    if op == "rattention_extend":
        cache = rt.Cache(*(t.pop(f"cache_{x}") for x in ("k", "v", "state", "length")))
        out, after = rt.rattention_extend(cache=cache, **t, **a)
        return (out, *after)
    if op in ("rattention", "residual_linear_attention"):
        a = a | {"return_final_state": True}
    out = getattr(rt, op)(**t, **a)
    return out if isinstance(out, tuple) else (out,)


@pytest.mark.parametrize("tiles", ["default", "tiny"])
@pytest.mark.parametrize("op", [op for op in EAGER if op != "rope_table"])
def test_forward_and_gradients_agree_with_dense_masks(op, tiles, oracle, monkeypatch):
    if tiles == "tiny":  # many segments, one head at a time: what only long or wide inputs would do otherwise
        for module in (chunks, fused, mix):
            monkeypatch.setattr(module, "TILE", 8)
    draw = random.Random(f"{tiles} {op}")
    spec = load().operations[op]
    for i in range(PER_OPERATION):
        t, a = example(op, draw)
        leaves = [x for x in spec.tensors if x.differentiable and x.name in t]
        for x in leaves:
            t[x.name].requires_grad_()
        got, want = call(op, t, a), oracle(op, t, a)
        what = f"{op} #{i} {a} { {k: tuple(x.shape) for k, x in t.items()} }"
        for o, x, y in zip(spec.outputs, got, want, strict=True):
            close(x.detach(), y.detach(), f"{what} {o.name}")
        pairs = [(x, y) for x, y in zip(got, want, strict=True) if x.is_floating_point() and y.requires_grad]
        cotangents = [torch.randn(x.shape, dtype=x.dtype) for x, _ in pairs]
        inputs = [t[x.name] for x in leaves]
        if not pairs:
            continue
        d_got = torch.autograd.grad([x for x, _ in pairs], inputs, cotangents, allow_unused=True)
        d_want = torch.autograd.grad([y for _, y in pairs], inputs, cotangents, allow_unused=True)
        for x, g, w in zip(leaves, d_got, d_want, strict=True):
            zero = torch.zeros_like(t[x.name])
            close(zero if g is None else g, zero if w is None else w, f"{what} d_{x.name}")
