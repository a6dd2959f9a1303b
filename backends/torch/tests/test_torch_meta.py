"""Meta and fake tensors: outputs have their shapes, nothing is computed, and nothing of it stays in a layer."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from rattention import torch as rt
from rattention.spec import Unsupported, load
from rattention.torch.nn import GenerationCache, RAttention
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

OPERATIONS = [op.name for op in load().operations.values() if not op.is_vjp]
FULL: dict[str, Any] = {"qk_norm": True, "qk_scale": True, "memory": True, "bias": True}


def layer(**options: Any) -> RAttention:
    torch.manual_seed(0)
    return RAttention(16, 2, 1, 8, window=3, **(FULL | options))


def gradients(op: str, tensors: dict[str, Tensor], outputs: tuple[Tensor, ...]) -> list[Tensor]:
    leaves = [tensors[t.name] for t in load().operations[op].tensors if t.differentiable and t.name in tensors]
    total = sum(x.sum() for x in outputs if x.requires_grad)
    return list(torch.autograd.grad(total, leaves, allow_unused=True)) if isinstance(total, Tensor) else []


@pytest.mark.parametrize("impl", [None, "eager", "triton"])
@pytest.mark.parametrize("op", OPERATIONS)
def test_functions_and_their_gradients_on_meta(op, impl, valid_calls, public):
    tensors, attributes = valid_calls[op]
    learns = {t.name for t in load().operations[op].tensors if t.differentiable}
    want = public(op, tensors, attributes)
    if op != "rope_table":
        attributes = attributes | {"impl": impl}
    shells = {n: x.to("meta").requires_grad_(n in learns) for n, x in tensors.items()}
    got = public(op, shells, attributes)
    assert [(x.shape, x.dtype, x.device.type) for x in got] == [(x.shape, x.dtype, "meta") for x in want]
    names = [n for n in shells if n in learns]
    for name, g in zip(names, gradients(op, shells, got), strict=bool(names)):
        assert g is None or (g.shape, g.device.type) == (shells[name].shape, "meta")


def test_an_unknown_implementation_is_refused_on_meta_too():
    with pytest.raises(ValueError, match="impl: expected one of eager, triton"):
        rt.feature_map(torch.empty(1, 1, 1, 1, device="meta"), impl="cuda")


@pytest.mark.parametrize("op", OPERATIONS)
def test_functions_on_fake_tensors(op, valid_calls, public):
    tensors, attributes = valid_calls[op]
    want = public(op, tensors, attributes)
    with FakeTensorMode() as mode:
        got = public(op, {n: mode.from_tensor(x) for n, x in tensors.items()}, attributes)
    assert all(isinstance(x, FakeTensor) for x in got)
    assert [(x.shape, x.dtype, x.device) for x in got] == [(x.shape, x.dtype, x.device) for x in want]


def use(model: RAttention) -> list[Tensor]:
    """Everything a layer does."""
    x = torch.randn(2, 9, 16)
    some, ids = torch.ones(2, dtype=torch.int32), torch.ones(2, 9, dtype=torch.int32)
    cache = model.new_cache(2)
    outs = [model(x), model(x, segment_ids=ids), model(x, positions=ids, segment_ids=ids), model(x, positions=ids)]
    outs += [model.prefill(x, cache, lengths=some), model.prefill(x, cache), model.step(x[:, 0], cache, active=some)]
    torch.autograd.backward([y.sum() for y in outs])
    cache.reset(1)
    cache.reset([True, False])
    cache.reset()
    assert cache.limit == 0
    again = GenerationCache(rt.Cache.empty(2, 1, 8, window=3))
    again.tensors = cache.tensors
    return [*outs, *cache.tensors, *again.tensors, *(p.grad for p in model.parameters() if p.grad is not None)]


SHAPES = [tuple(x.shape) for x in use(layer())]


def test_a_layer_on_meta_and_then_with_values():
    with torch.device("meta"):
        model = layer()
        outs = use(model)
    assert [tuple(x.shape) for x in outs] == SHAPES
    assert {x.device.type for x in outs} == {"meta"}
    model.to_empty(device="cpu")
    for p in model.parameters():
        p.data.fill_(torch.nan)  # what empty memory may hold
    for module in model.modules():
        if list(module.parameters(recurse=False)):
            module.reset_parameters()  # pyright: ignore[reportCallIssue]
    x = torch.randn(2, 9, 16)
    y = model(x)
    assert y.isfinite().all()
    torch.testing.assert_close(model.prefill(x, model.new_cache(2)), y)
    ones = [p for n, p in model.named_parameters() if n.endswith(("scale", "weight")) and "proj" not in n]
    assert len(ones) == 6
    assert all(torch.equal(p, torch.ones_like(p)) for p in ones)
    assert model.memory is not None
    assert not model.memory.any()


def test_a_layer_under_fake_tensors():
    with FakeTensorMode():
        model = layer()
        outs = use(model)
    assert all(isinstance(x, FakeTensor) for x in outs)
    assert [tuple(x.shape) for x in outs] == SHAPES
    assert model._table is None


def test_fake_inputs_leave_a_real_layer_usable():
    model, x = layer(), torch.randn(2, 9, 16)
    want = model(x)
    for used in (model, layer()):
        with FakeTensorMode() as mode:
            parameters: dict[str, Tensor] = {n: mode.from_tensor(p) for n, p in used.named_parameters()}
            y = torch.func.functional_call(used, parameters, (mode.from_tensor(x),))
        assert isinstance(y, FakeTensor)
        assert torch.equal(used(x), want)


def test_the_functions_allocate_nothing_on_meta():
    """A sequence whose keys alone would take 2 TiB."""
    x = torch.empty(1, 2**30, 4, 128, dtype=torch.bfloat16, device="meta")
    gain = torch.empty(4, 128, device="meta")
    assert isinstance(y := rt.rattention(x, x, x, gain, gain, window=511), Tensor)
    assert y.shape == x.shape


def test_a_cache_on_meta_has_shapes_and_starts_empty():
    cache = rt.Cache.empty(2, 1, 8, window=3, device="meta")
    assert [x.device.type for x in cache] == ["meta"] * 4
    assert GenerationCache(cache).limit == 0


def test_a_cache_and_a_whole_generation_in_one_graph():
    model = layer()

    def generate(x: Tensor) -> tuple[Tensor, Tensor]:
        cache = model.new_cache(x.shape[0])
        y = model.prefill(x[:, :6], cache)
        cache.reset(0)
        return y, model.step(x[:, 6], cache)

    x = torch.randn(2, 7, 16)
    with torch.no_grad():
        for got, want in zip(torch.compile(generate, fullgraph=True, backend="aot_eager")(x), generate(x), strict=True):
            torch.testing.assert_close(got, want)


def test_a_layer_survives_export_copies_pickles_and_skipped_initialisation():
    model, x = layer(), torch.randn(2, 9, 16)
    program = torch.export.export(model, (x,), strict=False)
    assert model._table is None or type(model._table[0]) is Tensor
    want = model(x)
    torch.testing.assert_close(program.module()(x), want)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), want)
    bare = torch.nn.utils.skip_init(RAttention, 16, 2, 1, 8, window=3, **FULL)
    bare.load_state_dict(model.state_dict())
    assert torch.equal(bare(x), want)
    with torch.device("meta"):
        assigned = layer()
        assigned(x.to("meta"))
    assigned.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(assigned(x), want)


@pytest.mark.parametrize("how", ["meta", "fake", "vmap", "compile"])
def test_values_that_cannot_be_read_are_not_checked_in_silence(how, valid_calls, public):
    """`check_values=True` is a promise: where it cannot be kept, it is refused."""
    tensors, attributes = valid_calls["rattention"]
    attributes = attributes | {"check_values": True}
    public("rattention", tensors, attributes)

    def call(ids: Tensor) -> Tensor:
        return public("rattention", tensors | {"segment_ids": ids}, attributes)[0]

    ids = tensors["segment_ids"]
    reason = "check_values=True needs the values of (segment_ids|positions), which is traced or has none"
    if how == "meta":
        with pytest.raises(Unsupported, match=reason):
            public("rattention", {n: x.to("meta") for n, x in tensors.items()}, attributes)
    elif how == "fake":
        with FakeTensorMode() as mode, pytest.raises(Unsupported, match=reason):
            public("rattention", {n: mode.from_tensor(x) for n, x in tensors.items()}, attributes)
    elif how == "vmap":
        with pytest.raises(Unsupported, match=reason):
            torch.func.vmap(call)(torch.stack([ids, ids]))
    else:
        with pytest.raises(Exception, match=reason):
            torch.compile(call, fullgraph=True, backend="aot_eager")(ids)
