"""What tests share: one valid call of every operation, and a dense oracle for the eager form.

The oracle has explicit masks, goes one row and one document at a time, in float64, and gets its gradients by autograd.
"""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    # Triton decides at its first import whether it interprets, and torch.compile imports it too.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from rattention import torch as rt


def phi(x: Tensor, name: str) -> Tensor:
    if name == "softmax":
        return torch.cat([x.softmax(-1), (-x).softmax(-1)], -1)
    return torch.cat([x.clamp(min=0), (-x).clamp(min=0)], -1) if name == "relu" else x


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x [T, H, D]`, tables `[T, D/2]`: complex multiplication of the half-split pairs."""
    half = x.shape[-1] // 2
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.complex(cos, sin)[:, None]
    return torch.cat([turned.real, turned.imag], -1)


def one_document(t: dict[str, Any], a: dict[str, Any], state: Tensor, queries: int) -> tuple[Tensor, Tensor, Tensor]:
    """`q [Tq, Hq, D]` are the last `queries` tokens of `k`, `v`. Returns both branches and the final state."""
    q, k, v, w = t["q"], t["k"], t["v"], a["window"]
    T, Hkv, _ = k.shape
    G, Dv = q.shape[1] // Hkv, v.shape[2]
    if q.shape[0] == 0 and T == 0:
        return q.new_zeros(0, q.shape[1], Dv), q.new_zeros(0, q.shape[1], Dv), state
    k_heads, v_heads = k.repeat_interleave(G, 1), v.repeat_interleave(G, 1)
    age = torch.arange(T - queries, T)[:, None] - torch.arange(T)
    width = T if w is None else w
    inside, outside = (age >= 0) & (age <= width), age > width
    if w == -1:
        inside, outside = torch.zeros_like(inside), age >= 0
    qr, kr = q, k_heads
    if t.get("cos") is not None:
        qr, kr = rotate(q, t["cos"][T - queries :], t["sin"][T - queries :]), rotate(k_heads, t["cos"], t["sin"])
    scale = 1 / math.sqrt(q.shape[2]) if a["scale"] is None else a["scale"]
    scores = torch.einsum("thd,ihd->thi", qr, kr) * scale
    if w == -1:
        swa = torch.zeros(queries, q.shape[1], Dv, dtype=q.dtype)
    else:
        swa = torch.einsum("thi,ihd->thd", scores.masked_fill(~inside[:, None], -math.inf).softmax(-1), v_heads)
    qs = q if t.get("q_scale") is None else q * t["q_scale"]
    ks = k_heads if t.get("k_scale") is None else k_heads * t["k_scale"]
    fq, fk = phi(qs, a["feature_map"]), phi(ks, a["feature_map"])
    read = torch.einsum("thf,ihf->thi", fq, fk) * outside[:, None]
    base = state.repeat_interleave(G, 0)
    if t.get("memory") is not None:
        base = base + t["memory"]
    rla = torch.einsum("thi,ihd->thd", read, v_heads) + torch.einsum("thf,hfd->thd", fq, base)
    kept = 0 if w is None else max(T - max(w, 0), 0)
    final = state + torch.einsum("ihf,ihd->hfd", fk[:kept, ::G], v[:kept])
    return swa, rla, final


def rms(x: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


DEFAULTS = {"scale": None, "feature_map": "softmax", "eps": 1e-6}


def dense(op: str, t: dict[str, Tensor], attrs: dict[str, Any]) -> tuple[Tensor, ...]:
    """The outputs of `op` in the order of operations.toml, for float64 tensors."""
    a = DEFAULTS | attrs
    if op == "feature_map":
        return (phi(t["x"], a["feature_map"]),)
    if op == "rms_mix":
        return (t["swa_weight"] * rms(t["swa"], a["eps"]) + t["rla_weight"] * rms(t["rla"], a["eps"]),)
    if op == "rattention_extend":
        return dense_extend(t, a)
    q, v = t["q"], t["v"]
    B, T, Hq, _ = q.shape
    F = q.shape[3] * (1 if a["feature_map"] == "identity" else 2)
    ids = t["segment_ids"] if t.get("segment_ids") is not None else torch.ones(B, T, dtype=torch.int32)
    swa, rla, finals = [], [], []
    for b in range(B):
        carried = torch.zeros(t["k"].shape[2], F, v.shape[3], dtype=q.dtype)
        final = carried if t.get("initial_state") is None else t["initial_state"][b]
        swa_row = [torch.zeros(Hq, v.shape[3], dtype=q.dtype)] * T
        rla_row = list(swa_row)
        for n, document in enumerate(x for x in dict.fromkeys(ids[b].tolist()) if x != 0):
            at = (ids[b] == document).nonzero()[:, 0]
            part = {x: t[x][b, at] for x in "qkv"} | {x: t.get(x) for x in ("q_scale", "k_scale", "memory")}
            if t.get("rope_cos") is not None:
                rows = torch.arange(len(at)) if t.get("positions") is None else t["positions"][b, at].long()
                part |= {"cos": t["rope_cos"][rows], "sin": t["rope_sin"][rows]}
            s, r, final = one_document(part, a, final if n == 0 else carried, len(at))
            for i, token in enumerate(at.tolist()):
                swa_row[token], rla_row[token] = s[i], r[i]
        swa += swa_row
        rla += rla_row
        finals.append(final)
    shape = (B, T, Hq, v.shape[3])
    s = torch.stack(swa).view(shape) if swa else q.new_zeros(shape)
    r = torch.stack(rla).view(shape) if rla else q.new_zeros(shape)
    state = torch.stack(finals) if finals else q.new_zeros(0, t["k"].shape[2], F, v.shape[3])
    if op == "sliding_window_attention":
        return (s,)
    if op == "residual_linear_attention":
        return r, state
    return t["swa_weight"] * rms(s, a["eps"]) + t["rla_weight"] * rms(r, a["eps"]), state


def dense_extend(t: dict[str, Tensor], a: dict[str, Any]) -> tuple[Tensor, ...]:
    q, W = t["q"], t["cache_k"].shape[1]
    B, T = q.shape[:2]
    after = W if a["window"] is not None else W + T
    outs: list[list[Tensor]] = [[], [], [], []]
    totals = []
    for b in range(B):
        seen = int(t["cache_length"][b])
        new = T if t.get("lengths") is None else int(t["lengths"][b])
        n = min(seen, W)
        part: dict[str, Any] = {x: t.get(x) for x in ("q_scale", "k_scale", "memory")}
        part["q"] = q[b, :new]
        for x in "kv":
            part[x] = torch.cat([t[f"cache_{x}"][b, W - n :], t[x][b, :new]])
        if t.get("rope_cos") is not None and new:
            rows = torch.arange(seen - n, seen + new)
            part |= {"cos": t["rope_cos"][rows], "sin": t["rope_sin"][rows]}
        s, r, state = one_document(part, a, t["cache_state"][b], new)
        out = t["swa_weight"] * rms(s, a["eps"]) + t["rla_weight"] * rms(r, a["eps"])
        outs[0].append(torch.cat([out, out.new_zeros(T - new, *out.shape[1:])]))
        for i, x in ((1, "k"), (2, "v")):
            newest = part[x][max(0, n + new - after) :]
            outs[i].append(torch.cat([newest.new_zeros(after - len(newest), *newest.shape[1:]), newest]))
        outs[3].append(state)
        totals.append(seen + new)
    return (*(torch.stack(x) for x in outs), torch.tensor(totals, dtype=torch.int32))


@pytest.fixture
def oracle():
    """`oracle(op, tensors, attrs)`: the outputs of one operation by explicit masks, in float64."""
    return dense


def every_call() -> dict[str, tuple[dict[str, Tensor], dict[str, Any]]]:
    """One valid float32 call of each operation with all its optional tensors, under the names of operations.toml."""
    B, T, Hq, Hkv, D, Dv, w = 2, 6, 4, 2, 4, 3, 2
    make = torch.Generator().manual_seed(11)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make)

    def ints(*rows: list[int]) -> Tensor:
        return torch.tensor(rows, dtype=torch.int32)

    qkv = {"q": normal(B, T, Hq, D), "k": normal(B, T, Hkv, D), "v": normal(B, T, Hkv, Dv)}
    weights = {"swa_weight": normal(Hq, Dv), "rla_weight": normal(Hq, Dv)}
    table = {"rope_cos": normal(12, D // 2), "rope_sin": normal(12, D // 2)}
    scales = {"q_scale": normal(D), "k_scale": normal(D), "memory": normal(Hq, 2 * D, Dv)}
    ids = {"segment_ids": ints([1, 1, 2, 2, 2, 0], [0, 3, 3, 3, 3, 3])}
    positions = {"positions": ints([0, 1, 0, 1, 2, 0], [0, 5, 6, 7, 8, 9])}
    state = {"initial_state": normal(B, Hkv, 2 * D, Dv)}
    cache = {
        "cache_k": normal(B, w, Hkv, D),
        "cache_v": normal(B, w, Hkv, Dv),
        "cache_state": normal(B, Hkv, 2 * D, Dv),
    }
    cache |= {"cache_length": torch.tensor([4, 1], dtype=torch.int32)}
    return {
        "feature_map": ({"x": normal(B, T, Hq, D)}, {}),
        "rope_table": ({"positions": torch.arange(5, dtype=torch.int32)}, {"head_dim": D}),
        "sliding_window_attention": (qkv | table | positions | ids, {"window": w}),
        "residual_linear_attention": (qkv | scales | state | ids, {"window": w}),
        "rms_mix": ({"swa": normal(B, T, Hq, Dv), "rla": normal(B, T, Hq, Dv)} | weights, {}),
        "rattention": (qkv | weights | table | positions | ids | scales | state, {"window": w}),
        "rattention_extend": (
            qkv | weights | cache | table | scales | {"lengths": torch.tensor([6, 3], dtype=torch.int32)},
            {"window": w},
        ),
    }


def public_call(op: str, tensors: dict[str, Any], attributes: dict[str, Any]) -> tuple[Any, ...]:
    """Call the public function of an operation, the tensors by their names in operations.toml; all outputs, flat."""
    given = dict(tensors)
    if op == "rattention_extend":
        cache = rt.Cache(*(given.pop(f"cache_{x}") for x in ("k", "v", "state", "length")))
        out, after = rt.rattention_extend(cache=cache, **given, **attributes)
        return (out, *after)
    if op in ("rattention", "residual_linear_attention"):
        attributes = attributes | {"return_final_state": True}
    out = getattr(rt, op)(**given, **attributes)
    return out if isinstance(out, tuple) else (out,)


@pytest.fixture
def valid_calls():
    """`valid_calls[op]`: tensors and attributes of one valid call of each operation."""
    return every_call()


@pytest.fixture
def public():
    """`public(op, tensors, attributes)`: all outputs of the public function."""
    return public_call
