"""The public functions under PyTorch's transformations: compile, vmap, grad, gradcheck, strides, dispatch, checks."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rattention import torch as rt
from rattention.spec import SpecError, Unsupported
from rattention.torch import arguments, dispatch
from rattention.torch.eager import band, fused, mix, scan
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

B, T, HQ, HKV, D, DV = 2, 12, 4, 2, 4, 3


def inputs(dtype: torch.dtype = torch.float64, B: int = B, T: int = T) -> dict[str, Any]:
    make = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make, dtype=torch.float64).to(dtype)

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "q": normal(B, T, HQ, D),
        "k": normal(B, T, HKV, D),
        "v": normal(B, T, HKV, DV),
        "swa_weight": normal(HQ, DV),
        "rla_weight": normal(HQ, DV),
        "q_scale": normal(D),
        "k_scale": normal(D),
        "memory": normal(HQ, 2 * D, DV).to(wide),
        "initial_state": normal(B, HKV, 2 * D, DV).to(wide),
    }


def constants() -> dict[str, Any]:
    cos, sin = rt.rope_table(torch.arange(40, dtype=torch.int32), head_dim=D)
    ids = torch.tensor([[0, 0] + [3] * 7 + [1] * 3, [2] * 9 + [5] + [0] * 2], dtype=torch.int32)
    return {"rope_cos": cos, "rope_sin": sin, "segment_ids": ids, "window": 2}


@pytest.mark.parametrize("memory", [True, False])
def test_gradcheck_of_every_differentiable_input(memory):
    t, fixed = inputs(B=1, T=9), constants()
    fixed["segment_ids"] = fixed["segment_ids"][:1, :9]
    if not memory:
        del t["memory"]
    names, tensors = zip(*t.items(), strict=True)

    def f(*args: Tensor):
        return rt.rattention(**dict(zip(names, args, strict=True)), **fixed, return_final_state=True)

    assert torch.autograd.gradcheck(f, [x.requires_grad_() for x in tensors])


def test_gradcheck_of_a_continuation():
    t = inputs(T=3)
    del t["memory"]
    cache = [torch.randn(B, 4, HKV, n, dtype=torch.float64) for n in (D, DV)] + [t.pop("initial_state")]
    length, lengths = torch.tensor([2, 30], dtype=torch.int32), torch.tensor([3, 2], dtype=torch.int32)
    names = list(t)

    def f(k: Tensor, v: Tensor, state: Tensor, *args: Tensor):
        named: dict[str, Any] = dict(zip(names, args, strict=True))
        out, after = rt.rattention_extend(**named, cache=rt.Cache(k, v, state, length), lengths=lengths, window=4)
        return out, after.k, after.v, after.state

    assert torch.autograd.gradcheck(f, [x.requires_grad_() for x in (*cache, *t.values())])


def loss(t: dict[str, Any], **extra: Any) -> Tensor:
    out, state = rt.rattention(**t, **extra, return_final_state=True)
    return out.square().sum() + (state * torch.arange(DV)).sum()


@pytest.mark.parametrize("memory", [True, False])
@pytest.mark.parametrize("output", [0, 1])
def test_the_gradient_of_one_output_alone(output, memory):
    """Through each transformation: what reaches backward for the other output, and for what it keeps, is no tensor."""
    t = inputs()
    fixed: dict[str, Any] = {**constants(), "return_final_state": True}
    fixed["segment_ids"] = fixed["segment_ids"][:1]
    if not memory:
        del t["memory"]
    names = [name for name in t if t[name].shape[0] == B and name != "memory"]
    rest = {name: x for name, x in t.items() if name not in names}

    def f(tensors: dict[str, Any]) -> Tensor:
        return rt.rattention(**tensors, **rest, **fixed)[output].square().sum()

    rows = [{name: t[name][b : b + 1].clone().requires_grad_() for name in names} for b in range(B)]
    want = [torch.autograd.grad(f(row), list(row.values()), allow_unused=True) for row in rows]
    stacked = {name: t[name][:, None] for name in names}
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for b, row in enumerate(rows):
        got = torch.autograd.grad(compiled(row), list(row.values()), allow_unused=True)
        for batched, alone, want_one in zip(
            torch.func.vmap(torch.func.grad(f))(stacked).values(), got, want[b], strict=True
        ):
            expected = torch.zeros_like(batched[b]) if want_one is None else want_one
            torch.testing.assert_close(batched[b], expected)
            torch.testing.assert_close(torch.zeros_like(expected) if alone is None else alone, expected)


@pytest.mark.parametrize("how", ["eager", "aot_eager"])
def test_compile_without_graph_breaks(how):
    fixed, t = constants(), inputs(torch.float32)
    want = torch.autograd.grad(loss({k: x.requires_grad_() for k, x in t.items()}, **fixed), list(t.values()))
    compiled = torch.compile(lambda t: loss(t, **fixed), fullgraph=True, backend=how)
    got = torch.autograd.grad(compiled(t), list(t.values()))
    for name, a, b in zip(t, got, want, strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")
    q = t["q"].detach()
    with pytest.raises(Exception, match=r"expected shape \[Hq=3, Dv=3\], got \[4, 3\] \(ERR-3\)"):
        torch.compile(lambda q: rt.rattention(**(t | {"q": q}), window=2), fullgraph=True, backend=how)(q[:, :, :3])


@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning:torch")
def test_compile_with_the_default_compiler():
    t = inputs(torch.float32)
    compiled = torch.compile(lambda q, k, v: rt.sliding_window_attention(q, k, v, window=2).square(), fullgraph=True)
    with torch.no_grad():
        got = compiled(t["q"], t["k"], t["v"])
        torch.testing.assert_close(got, rt.sliding_window_attention(t["q"], t["k"], t["v"], window=2).square())


def test_compile_generation():
    t = inputs(torch.float32)
    state = t.pop("initial_state")

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(q: Tensor, k: Tensor, v: Tensor, cache: rt.Cache):
        rest = {n: x for n, x in t.items() if n not in "qkv"}
        return rt.rattention_extend(q, k, v, **rest, cache=cache, window=3)

    cache = rt.Cache.empty(B, window=3, num_kv_heads=HKV, head_dim=D, value_dim=DV)._replace(state=state)
    outs = []
    for i in range(T):
        out, cache = step(t["q"][:, i : i + 1], t["k"][:, i : i + 1], t["v"][:, i : i + 1], cache)
        outs.append(out)
    want = rt.rattention(**t, initial_state=state, window=3)
    torch.testing.assert_close(torch.cat(outs, 1), want, rtol=1e-4, atol=1e-5)


def test_export_and_checkpointing_of_the_eager_form():
    fixed, t = constants(), inputs(torch.float32)
    fixed = {n: x for n, x in fixed.items() if n != "segment_ids"}

    class Module(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor):
            return rt.rattention(q, k, v, t["swa_weight"], t["rla_weight"], **fixed)

    qkv = tuple(t[n] for n in "qkv")
    program = torch.export.export(Module(), qkv)
    torch.testing.assert_close(program.module()(*qkv), Module()(*qkv))
    leaves = [x.requires_grad_() for x in qkv]
    want = torch.autograd.grad(Module()(*leaves).square().sum(), leaves)
    again = checkpoint(Module(), *leaves, use_reentrant=False)
    assert isinstance(again, Tensor)
    for a, b in zip(torch.autograd.grad(again.square().sum(), leaves), want, strict=True):
        assert torch.equal(a, b)


def test_checkpointing_the_linear_branch_of_the_eager_form():
    t = inputs(torch.float32)
    leaves = [t[n].requires_grad_() for n in "qkv"]

    def f(*qkv: Tensor):
        return rt.residual_linear_attention(*qkv, initial_state=t["initial_state"], window=2)

    want = f(*leaves)
    assert isinstance(want, Tensor)
    again = checkpoint(f, *leaves, use_reentrant=False)
    assert isinstance(again, Tensor)
    pairs = zip(*(torch.autograd.grad(y.square().sum(), leaves) for y in (again, want)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_compile_serves_many_lengths_with_few_graphs():
    counter = torch._dynamo.testing.CompileCounter()  # pyright: ignore[reportAttributeAccessIssue]
    compiled = torch.compile(lambda q, k, v: rt.sliding_window_attention(q, k, v, window=2), backend=counter)
    for n in (5, 6, 7, 9, 30):
        t = inputs(torch.float32, T=n)
        torch.testing.assert_close(
            compiled(t["q"], t["k"], t["v"]), rt.sliding_window_attention(t["q"], t["k"], t["v"], window=2)
        )
    assert counter.frame_count <= 2


def test_vmap_over_one_more_batch_dimension():
    fixed = constants()
    many = [{k: x + 0.1 * i for k, x in inputs().items()} for i in range(3)]
    stacked = {k: torch.stack([t[k] for t in many], dim=1) for k in many[0]}
    got = torch.func.vmap(lambda t: rt.rattention(**t, **fixed, return_final_state=True), in_dims=1)(stacked)
    for i, t in enumerate(many):
        for a, b in zip(got, rt.rattention(**t, **fixed, return_final_state=True), strict=True):
            torch.testing.assert_close(a[i], b, rtol=1e-12, atol=1e-12)
    ids = torch.stack([fixed.pop("segment_ids"), torch.ones(B, T, dtype=torch.int32)])
    got = torch.func.vmap(lambda ids: rt.rattention(**many[0], segment_ids=ids, **fixed))(ids)
    for i in range(2):
        want = rt.rattention(**many[0], segment_ids=ids[i], **fixed)
        assert isinstance(want, Tensor)
        torch.testing.assert_close(got[i], want, rtol=1e-12, atol=1e-12)


def test_functional_gradients_alone_and_per_sample():
    fixed, t = constants(), inputs()
    want = torch.autograd.grad(loss({k: x.requires_grad_() for k, x in t.items()}, **fixed), list(t.values()))
    t = {k: x.detach() for k, x in t.items()}
    got = torch.func.grad(lambda t: loss(t, **fixed))(t)
    for a, b in zip(got.values(), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)

    def one(weights: dict[str, Tensor], row: dict[str, Tensor], ids: Tensor) -> Tensor:
        return loss(weights | {k: x[None] for k, x in row.items()}, **(fixed | {"segment_ids": ids[None]}))

    batched = ("q", "k", "v", "initial_state")
    rows = {k: t.pop(k) for k in batched}
    per_sample = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0, 0))(t, rows, fixed["segment_ids"])
    total = dict(zip([*inputs()], want, strict=True))
    for k, g in per_sample.items():
        torch.testing.assert_close(g.sum(0), total[k], rtol=1e-12, atol=1e-12)


def test_strides_broadcasts_and_expanded_cotangents_change_nothing():  # NUM-7, TRAPS 13
    fixed, t = constants(), inputs(torch.float32)
    strided = {}
    for k, x in t.items():
        back = tuple(reversed(range(x.ndim)))
        strided[k] = torch.full((*x.shape[::-1], 2), torch.nan)[..., 1].copy_(x.permute(back)).permute(back)
        assert strided[k].stride() != x.stride()
    want, got = rt.rattention(**t, **fixed), rt.rattention(**strided, **fixed)
    assert isinstance(want, Tensor)
    assert isinstance(got, Tensor)
    assert torch.equal(got, want)
    heads = t["k"][:, :, :1].expand(B, T, HKV, D)
    flat = rt.rattention(**(t | {"k": heads}), **fixed)
    assert isinstance(flat, Tensor)
    assert torch.equal(flat, rt.rattention(**(t | {"k": heads.contiguous()}), **fixed))  # pyright: ignore
    t = {k: x.requires_grad_() for k, x in t.items()}
    out = rt.rattention(**t, **fixed)
    assert isinstance(out, Tensor)
    one = torch.autograd.grad(out.sum(), list(t.values()), retain_graph=True)
    two = torch.autograd.grad(out, list(t.values()), torch.ones_like(out))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_reruns_are_bit_equal():  # NUM-4
    fixed, t = constants(), inputs(torch.float32)
    runs = [
        torch.autograd.grad(loss({k: x.requires_grad_() for k, x in t.items()}, **fixed), list(t.values()))
        for _ in range(3)
    ]
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(again, runs[0], strict=True))


@pytest.mark.parametrize("window", [-1, 2, 100, None])
def test_branches_with_nothing_to_read_still_have_gradients(window):
    t = inputs(torch.float32)
    q, k, v = (t[n].requires_grad_() for n in "qkv")
    for out in (
        rt.sliding_window_attention(q, k, v, window=window),
        rt.residual_linear_attention(q, k, v, window=window),
    ):
        assert isinstance(out, Tensor)
        for g in torch.autograd.grad(out.sum(), (q, k, v)):
            assert g.isfinite().all()


def test_a_token_at_the_kink_of_relu_has_no_gradient():  # FM-6
    x = torch.zeros(1, 1, 1, 2, requires_grad=True)
    rt.feature_map(x, feature_map="relu").sum().backward()
    assert x.grad is not None
    assert not x.grad.any()


def test_outputs_share_no_memory_with_inputs():  # ERR-13
    x = torch.randn(1, 2, 1, 2)
    assert rt.feature_map(x, feature_map="identity").data_ptr() != x.data_ptr()
    t = inputs(torch.float32)
    cache = rt.Cache.empty(B, window=3, num_kv_heads=HKV, head_dim=D, value_dim=DV)
    state = t.pop("initial_state")
    for n in (0, 2):
        part = {k: x[:, :n] if k in "qkv" else x for k, x in t.items()}
        _, after = rt.rattention_extend(**part, cache=cache._replace(state=state), window=3)
        mine = {x.untyped_storage().data_ptr() for x in (*cache[:2], state, *t.values())}
        assert not mine & {x.untyped_storage().data_ptr() for x in after}
    _, final = rt.rattention(**t, initial_state=state, window=None, return_final_state=True)
    assert final.data_ptr() != state.data_ptr()


def test_values_are_checked_on_the_host_and_never_read_from_traced_tensors():
    t = inputs(torch.float32)
    torn = torch.tensor([[1] * 5 + [2] * 2 + [1] * 5] * 2, dtype=torch.int32)
    with pytest.raises(SpecError, match="ERR-8"):
        rt.rattention(**t, segment_ids=torn, window=2)
    rows = torch.func.vmap(lambda ids: rt.rattention(**t, segment_ids=ids, window=2))(torn[None])
    assert isinstance(rows, Tensor)
    assert rows.shape == (1, B, T, HQ, DV)
    assert arguments.plain(torch.nn.Parameter(torch.empty(1)))
    with FakeTensorMode():
        assert not arguments.plain(torch.empty(1))


def test_choice_of_implementation(monkeypatch):  # BCK-3
    t = inputs(torch.float32)
    with monkeypatch.context() as m:
        module = importlib.import_module("rattention.torch.triton.operations")
        m.setattr(module, "INTERPRET", SimpleNamespace(value=False))
        with pytest.raises(Unsupported, match=r"CUDA and ROCm tensors, these are on cpu; .* TRITON_INTERPRET=1"):
            rt.rattention(**t, window=2, impl="triton")
    with pytest.raises(ValueError, match="impl: expected one of eager, triton"):
        rt.rattention(**t, window=2, impl="cuda")
    with pytest.raises(ValueError, match="precision: expected one of"):
        rt.rattention(**t, window=2, precision="int8")
    assert dispatch.choose(None, "rattention", t["q"]) is dispatch.choose("eager", "rattention", t["q"])


def test_float32_products_ignore_a_program_wide_reduction_unless_asked(monkeypatch):  # NUM-2
    seen = []
    bmm = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda *a, **k: seen.append(torch.get_float32_matmul_precision()) or bmm(*a, **k))
    t = inputs(torch.float32)
    torch.set_float32_matmul_precision("high")
    try:
        loss({k: x.requires_grad_() for k, x in t.items()}, window=2).backward()
        assert set(seen) == {"highest"}
        assert torch.get_float32_matmul_precision() == "high"
        seen.clear()
        rt.rattention(**t, window=2, precision="tf32")
        assert set(seen) == {"high"}
    finally:
        torch.set_float32_matmul_precision("highest")


def test_the_custom_operators_are_well_formed():
    make = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make)

    ids = torch.randint(0, 2, (2, 9), generator=make, dtype=torch.int32).cumsum(1)
    q, k, v, d_out = normal(2, 9, 6, 4), normal(2, 2, 9, 4), normal(2, 2, 9, 5), normal(2, 9, 6, 5)
    args = (q, k, v, normal(2, 9, 2), normal(2, 9, 2), ids, ids, 3, 0.5, False)
    torch.library.opcheck(band.band_forward, args)
    torch.library.opcheck(band.band_backward, (d_out, *args))
    groups = (ids, ids[:, :7], torch.cat([ids[:, :1], ids[:, :7]], 1))
    for state in (normal(2, 2, 8, 5), None):
        args = (q, k[:, :, :7], v[:, :, :7], state)
        _, final, states = scan.scan_forward(*args, *groups, False, "softmax", False)
        torch.library.opcheck(scan.scan_forward, (*args, *groups, False, "softmax", False))
        torch.library.opcheck(scan.scan_backward, (d_out, final, *args, *groups, states, False, "softmax", False))
    for n, keep, own in ((9, True, True), (9, True, False), (9, False, True), (0, True, True)):
        some: dict[str, Any] = {"q": normal(2, n, 6, 4), "k": normal(2, 2, n, 4), "v": normal(2, 2, n, 5)}
        some |= {"key": some["k"][:, :, 3:] if own else None, "q_scale": normal(2, 4), "swa_weight": normal(2, 6, 5)}
        none: dict[str, Any] = dict.fromkeys(fused.Inputs._fields)
        attributes = (max(n - 3, 0), 3, 0.5, False, "relu", 1e-6, False)
        args = (*fused.Inputs(**(none | some | {"rla_weight": normal(2, 6, 5)})), *attributes)
        torch.library.opcheck(fused.fused_forward, (*args, keep))
        out, final, *kept = fused.fused_forward(*args, keep)
        if keep:
            torch.library.opcheck(fused.fused_backward, (out, final, *args[:15], *kept, *args[15:]))
    args = (normal(2, 9, 6, 5), normal(2, 9, 6, 5), normal(2, 6, 5), normal(6, 5).expand(2, 6, 5), 1e-6)
    torch.library.opcheck(mix.mix_forward, args)
    torch.library.opcheck(mix.mix_backward, (d_out, *args))
