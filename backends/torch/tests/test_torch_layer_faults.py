"""What goes wrong around a layer: it fails in words that name the argument, and the cache stays as it was."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from rattention import torch as rt
from rattention.spec import SpecError, Unsupported
from rattention.torch.nn import GenerationCache, RAttention
from rattention.torch.nn import cache as cache_module
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

Wrong: Any = None  # for arguments of wrong types, which pyright would refuse


def layer(**options: Any) -> RAttention:
    torch.manual_seed(0)
    given: dict[str, Any] = {"window": 3} | options
    return RAttention(16, 4, 2, 8, **given)


def hidden(T: int = 10) -> Tensor:
    return torch.randn(2, T, 16, generator=torch.Generator().manual_seed(4))


def same(a: rt.Cache, b: rt.Cache) -> bool:
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ------------------------------------------------------------------------------------- when the cache is written to


@pytest.mark.parametrize("method", ["prefill", "step"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_cache_does_not_advance_when_a_checkpoint_runs_again(reentrant, method):
    model, x = layer(), hidden().requires_grad_()
    cache = model.new_cache(2)
    given = x if method == "prefill" else x[:, 0]
    y = checkpoint(lambda x: getattr(model, method)(x, cache), given, use_reentrant=reentrant)
    assert isinstance(y, Tensor)
    after = cache.length.tolist()
    with pytest.raises(Unsupported, match=r"RAttention: cache: a call inside of a backward pass.*checkpoint"):
        y.sum().backward()
    assert cache.length.tolist() == after


@pytest.mark.parametrize("last", ["write", "read"])
@pytest.mark.parametrize("how", ["set", "reset"])
def test_a_cache_is_not_used_by_hand_when_a_checkpoint_runs_again(how, last):
    """A function that is checkpointed reads the cache and writes it, without a method of the layer. Its second run may
    end before it writes: once every tensor that backward needs is there."""
    cache = layer().new_cache(2)

    def f(x: Tensor) -> Tensor:
        y = x.exp() * (1 + cache.tensors.state.sum() + cache.length.sum())
        if how == "reset":
            cache.reset(0)
        else:
            cache.tensors = cache.tensors._replace(state=cache.tensors.state + 1)
        return y.exp() if last == "write" else y

    y = checkpoint(f, hidden().requires_grad_(), use_reentrant=False)
    assert isinstance(y, Tensor)
    state = cache.tensors.state.clone()
    with pytest.raises(Unsupported, match=r"RAttention: cache: a call inside of a backward pass.*checkpoint"):
        y.sum().backward()
    assert torch.equal(cache.tensors.state, state)


def test_a_cache_that_stays_as_it_is_serves_inside_of_a_checkpoint():
    """A prefix that many continuations share."""
    model, x = layer(), hidden()
    with torch.no_grad():
        prefix = model.new_cache(2)
        model.prefill(x, prefix)

    def f(x: Tensor) -> Tensor:
        return x.exp() * prefix.tensors.state.sum() + prefix.length.sum()

    leaf = x.clone().requires_grad_()
    y = checkpoint(f, leaf, use_reentrant=False)
    assert isinstance(y, Tensor)
    (got,) = torch.autograd.grad(y.sum(), leaf)
    (want,) = torch.autograd.grad(f(leaf).sum(), leaf)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_cache_made_inside_of_a_checkpoint_has_right_gradients(reentrant):
    model = layer()

    def f(x: Tensor) -> Tensor:
        cache = model.new_cache(2)
        return torch.cat([model.prefill(x[:, :6], cache), model.prefill(x[:, 6:], cache)], 1)

    x, again = hidden().requires_grad_(), hidden().requires_grad_()
    y = checkpoint(f, x, use_reentrant=reentrant)
    assert isinstance(y, Tensor)
    y.square().sum().backward()
    model(again).square().sum().backward()
    torch.testing.assert_close(x.grad, again.grad, rtol=1e-4, atol=1e-5)


def test_an_output_projection_that_fails_leaves_the_cache():
    model, x = layer(), hidden()
    cache = model.new_cache(2)
    model.prefill(x, cache)
    before, limit = cache.tensors, cache.limit

    def fails(*_: Any) -> None:
        raise RuntimeError("out of memory")

    handle = model.o_proj.register_forward_pre_hook(fails)
    for call in (lambda: model.prefill(x, cache), lambda: model.step(x[:, 0], cache)):
        with pytest.raises(RuntimeError, match="out of memory"):
            call()
    assert same(cache.tensors, before)
    assert cache.limit == limit
    handle.remove()
    model.step(x[:, 0], cache)
    assert cache.length.tolist() == [11, 11]


def test_a_cache_from_outside_of_vmap_takes_no_batched_tensors():
    model, xs = layer(), torch.stack([hidden(), 2 * hidden()])
    cache = model.new_cache(2)
    before = cache.tensors
    named = "RAttention: cache: made outside of torch.func.vmap"
    masks = torch.tensor([[True, False], [False, True]])

    def resets(x: Tensor) -> Tensor:
        cache.reset(x)
        return x

    def sets(x: Tensor) -> Tensor:
        cache.tensors = before._replace(k=before.k + x[0, 0, 0])
        return x

    for call, given in (
        (lambda x: model.prefill(x, cache), xs),
        (lambda x: model.step(x[:, 0], cache), xs),
        (torch.func.vmap(lambda x: model.step(x, cache), in_dims=1), xs),
        (resets, masks),
        (sets, xs),
    ):
        with pytest.raises(Unsupported, match=named):
            torch.func.vmap(call)(given)
        assert cache.tensors is before
        assert cache.limit == 0
    model.prefill(hidden(), cache)
    assert cache.length.tolist() == [10, 10]


def test_a_cache_made_inside_of_vmap_serves():
    model, xs = layer(), torch.stack([hidden(), 2 * hidden()])

    def f(x: Tensor) -> Tensor:
        cache = model.new_cache(2)
        model.prefill(x[:, :9], cache)
        return model.step(x[:, 9], cache)

    torch.testing.assert_close(torch.func.vmap(f)(xs), torch.stack([model(x)[:, 9] for x in xs]), rtol=1e-4, atol=1e-5)


def test_a_cache_from_inference_mode_is_named_where_gradients_are_needed():
    model, x = layer(), hidden()
    with torch.inference_mode():
        cache = model.new_cache(2)
        model.prefill(x, cache)
    before = cache.tensors
    for call in (lambda: model.prefill(x, cache), lambda: model.step(x[:, 0], cache)):
        with pytest.raises(Unsupported, match=r"RAttention: cache: made or filled in torch.inference_mode"):
            call()
    assert cache.tensors is before
    with torch.no_grad():
        model.step(x[:, 0], cache)
    model.requires_grad_(False)
    model.step(x[:, 0], cache)
    assert cache.length.tolist() == [12, 12]


# --------------------------------------------------------------------------------------------- what a cache consists of


def test_a_cache_takes_tensors_as_its_constructor_does():
    model = layer()
    cache = model.new_cache(2)
    with torch.no_grad():
        model.prefill(hidden(), cache)
    before, limit = cache.tensors, cache.limit
    good = tuple(before)
    for wrong in (good, None, cache, list(good), before._replace(length=Wrong)):
        with pytest.raises(SpecError, match=r"GenerationCache: tensors.*: expected a .*, got .*\(ERR-14\)"):
            cache.tensors = wrong  # pyright: ignore[reportAttributeAccessIssue]
        assert cache.tensors is before
        assert cache.limit == limit
        with pytest.raises(SpecError, match=r"GenerationCache: tensors.*: expected a .*, got .*\(ERR-14\)"):
            GenerationCache(wrong)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("name", "change", "text"),
    [
        ("length", lambda t: t.tolist(), r"a torch.Tensor, got builtins.list \(ERR-14\)"),
        ("k", lambda t: t.numpy(), r"a torch.Tensor, got numpy.ndarray \(ERR-14\)"),
        ("length", lambda t: t[0], r"shape \[B\], got \[\] \(ERR-2\)"),
        ("k", lambda t: t[0], r"shape \[B, W, Hkv, D\], got \[3, 2, 8\] \(ERR-2\)"),
        ("state", lambda t: t[..., None], r"shape \[B, Hkv, F, Dv\], got .* \(ERR-2\)"),
        ("length", lambda t: t.long(), r"dtype int32, got int64 \(ERR-4\)"),
        ("length", lambda t: t.float(), r"dtype int32, got float32 \(ERR-4\)"),
        ("v", lambda t: t.int(), r"a floating dtype, got int32 \(ERR-4\)"),
        ("length", lambda t: t[:1], r"shape \[B\] with B=2, as k, got \[1\] \(ERR-3\)"),
    ],
)
def test_a_field_that_no_call_returns_is_refused(name, change, text):
    tensors = rt.Cache.empty(2, 2, 8, window=3)
    wrong = tensors._replace(**{name: change(getattr(tensors, name))})
    with pytest.raises(SpecError, match=rf"^GenerationCache: tensors.{name}: expected {text}"):
        GenerationCache(wrong, limit=0)


@pytest.mark.parametrize("limit", [True, 2.0, "5", -1, 4, torch.tensor(9)])
def test_a_limit_that_is_no_bound_is_refused(limit):
    tensors = rt.Cache.empty(2, 2, 8, window=3)._replace(length=torch.tensor([2, 5], dtype=torch.int32))
    with pytest.raises(SpecError, match=r"GenerationCache: limit: expected an int >= 5, the longest length, or None"):
        GenerationCache(tensors, limit=limit)
    assert GenerationCache(tensors, limit=5).limit == 5


EMPTY: dict[str, Any] = {"batch": 2, "num_kv_heads": 2, "head_dim": 8, "window": 3}


@pytest.mark.parametrize(
    ("name", "wrong", "text"),
    [("batch", x, r"an int >= 0, got .* \(ERR-5\)") for x in (2.0, True, "2", None, -1)]
    + [(n, x, r"an int >= 1, got") for n in ("num_kv_heads", "head_dim", "value_dim") for x in (0, 8.0, True, "8")]
    + [
        ("window", x, r"an int >= -1, or None, got .* \(ERR-5\)")
        for x in (-2, 3.5, True, "3", nn.Parameter(torch.ones(())))
    ]
    + [("feature_map", x, "one of softmax, relu, identity, got") for x in ("elu", None, 3, ["relu"])]
    + [
        ("dtype", x, r"dtype float32 .*, got .* \(ERR-4\)")
        for x in (torch.int32, torch.complex64, "float32", float, None)
    ],
)
def test_an_empty_cache_that_no_call_could_use_is_refused(name, wrong, text):
    with pytest.raises(SpecError, match=rf"^Cache.empty: {name}: expected {text}"):
        rt.Cache.empty(**(EMPTY | {name: wrong}))
    if name == "batch":
        with pytest.raises(SpecError, match=rf"batch: expected {text}"):
            layer().new_cache(wrong)


def test_an_empty_cache_wherever_it_is_made():
    number: Any = np.int64(2)
    want = [(2, 3, 2, 8), (2, 3, 2, 8), (2, 2, 16, 8), (2,)]
    made = torch.compile(lambda b: rt.Cache.empty(b, 2, 8, window=3), fullgraph=True, backend="aot_eager")
    for cache in (made(2), rt.Cache.empty(**EMPTY, device="meta"), rt.Cache.empty(number, 2, 8, window=3)):
        assert [tuple(t.shape) for t in cache] == want
    assert [made(b).k.shape[0] for b in (3, 4, 5)] == [3, 4, 5]
    with FakeTensorMode():
        assert [tuple(t.shape) for t in rt.Cache.empty(**EMPTY)] == want
        assert GenerationCache(rt.Cache.empty(**EMPTY)).limit == 0


# ---------------------------------------------------------------------------------------------------------------- reset


def test_a_copy_of_a_cache_is_its_own(monkeypatch):
    monkeypatch.setattr(cache_module, "on_host", lambda t: False)  # as on a device, where the lengths are not read
    cache = GenerationCache(rt.Cache.empty(2, 2, 8, window=3), limit=0)
    cache.update(cache.tensors._replace(length=cache.length + 9), 9)
    beam = copy.copy(cache)
    beam.reset(0)
    cache.reset(1)
    for one, length in ((beam, [0, 9]), (cache, [9, 0])):
        assert one.length.tolist() == length
        assert one.limit >= 9


@pytest.mark.parametrize(
    "rows",
    [
        torch.tensor([0, 1, 1], dtype=torch.uint8),
        np.array([0, 1, 1], np.uint8),
        list(torch.tensor([0, 1, 1], dtype=torch.uint8)),
        np.uint8(1),
        bytearray(b"\0\1\1"),
        {1: True},
        {1},
        {1: 2}.keys(),
        torch.tensor([1], device="meta"),
        torch.tensor([True] * 3, device="meta"),
        [torch.tensor(1, device="meta")],
    ],
)
def test_rows_with_two_meanings_or_none_are_refused(rows):
    cache = GenerationCache(rt.Cache.empty(3, 2, 8, window=3)._replace(length=torch.full((3,), 4, dtype=torch.int32)))
    with pytest.raises(TypeError, match="reset: rows: expected indices or a bool mask"):
        cache.reset(rows)
    assert cache.length.tolist() == [4, 4, 4]


def test_a_list_of_bools_in_tensors_is_a_mask():
    cache = GenerationCache(rt.Cache.empty(3, 2, 8, window=3)._replace(length=torch.full((3,), 4, dtype=torch.int32)))
    rows: Any = list(torch.tensor([False, True, True]))
    cache.reset(rows)
    assert cache.length.tolist() == [4, 0, 0]


def test_reset_on_meta():
    cache = layer(device="meta").new_cache(3)
    cache.reset(torch.ones(3, dtype=torch.bool, device="meta"))
    cache.reset([1])
    with pytest.raises(TypeError, match="reset: rows: expected a bool mask"):
        cache.reset(torch.ones(3, dtype=torch.int32, device="meta"))


@torch.no_grad()
@pytest.mark.parametrize("how", ["all rows", "row by row", "ragged", "unread"])
def test_a_server_without_a_window_does_not_grow(how, monkeypatch):
    """Every token has a slot there: the slots follow the longest row, not the clock."""
    if how == "unread":  # as on a device
        monkeypatch.setattr(cache_module, "on_host", lambda t: False)
    model, x = layer(window=None), hidden()
    want, cache = model(x), model.new_cache(2)
    for _ in range(4):
        lengths = torch.tensor([6, 2], dtype=torch.int32) if how == "ragged" else None
        model.prefill(x[:, :9], cache, lengths=lengths)
        assert cache.tensors.k.shape[1] == cache.limit == int(cache.length.max()) <= 9
        first, second = cache.length.tolist()
        y = model.step(torch.stack([x[0, first], x[1, second]]), cache)
        torch.testing.assert_close(y, torch.stack([want[0, first], want[1, second]]), rtol=1e-4, atol=1e-5)
        if how == "row by row":
            cache.reset(0)
            assert cache.tensors.k.shape[1] == 10
            cache.reset(1)
        else:
            cache.reset()
        assert cache.tensors.k.shape[1] == cache.tensors.v.shape[1] == 0
        assert cache.tensors.k.untyped_storage().nbytes() == 0


def test_the_slots_of_a_window_stay():
    model = layer(window=5)
    cache = model.new_cache(2)
    model.prefill(hidden(2), cache)
    cache.reset()
    assert cache.tensors.k.shape[1] == 5


# ------------------------------------------------------------------------------------------------- what calls are given


@pytest.mark.parametrize("norm", [None, nn.Identity(), nn.RMSNorm(8, elementwise_affine=False), nn.LayerNorm(8)])
@pytest.mark.parametrize("name", ["q_norm", "k_norm"])
def test_each_norm_can_be_another_one(name, norm):
    model, x = layer(qk_norm=True), hidden()
    other = "k_norm" if name == "q_norm" else "q_norm"
    setattr(model, name, norm)
    y = model(x)
    setattr(model, other, None)
    assert not torch.allclose(model(x), y, rtol=1e-3, atol=1e-4)  # the other one was in use
    setattr(model, name, None)
    bare = model(x)
    assert isinstance(norm, nn.Identity | None) or not torch.allclose(y, bare, rtol=1e-3, atol=1e-4)
    plain = layer(qk_norm=False)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(x), bare)


def calls_of(model: RAttention, x: Tensor):
    """Each method of a layer that takes hidden states."""
    yield lambda: model(x)
    yield lambda: model.prefill(x, model.new_cache(2))
    yield lambda: model.step(x[:, 0], model.new_cache(2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.complex64])
def test_hidden_states_of_another_dtype_are_named(dtype):
    for call in calls_of(layer(), hidden().to(dtype)):
        with pytest.raises(
            SpecError, match=r"RAttention: x: expected (a floating dtype|dtype float32, .*), got .*ERR-4"
        ):
            call()


def test_autocast_leaves_float64_alone():
    with torch.autocast("cpu", torch.bfloat16):
        for call in calls_of(layer(), hidden().double()):
            with pytest.raises(SpecError, match=r"RAttention: x: expected dtype float32, .*, got float64 \(ERR-4\)"):
                call()


@torch.no_grad()
def test_whoever_casts_gets_another_dtype():
    """Autocast, hooks, and projections of other classes."""
    model, x = layer(), hidden().to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        for call in calls_of(model, x):
            assert call().dtype == torch.bfloat16
    for name in ("q_proj", "k_proj", "v_proj"):
        getattr(model, name).register_forward_pre_hook(lambda module, given: (given[0].float(),))
    for call in calls_of(model, x):
        assert call().dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64, torch.float8_e5m2, "float32", float])
def test_a_layer_of_no_storage_dtype_is_refused(dtype):
    with pytest.raises(SpecError, match=r"^RAttention: dtype: expected dtype float32 or .*, got .*\(ERR-4\)"):
        layer(dtype=dtype)


@pytest.mark.parametrize(
    ("active", "text"),
    [
        (torch.ones(3, dtype=torch.bool), r"shape \[B=2\], got \[3\] \(ERR-3\)"),
        (torch.ones(2, 1, dtype=torch.bool), r"shape \[B=2\], got \[2, 1\] \(ERR-3\)"),
        (torch.ones((), dtype=torch.int32), r"shape \[B=2\], got \[\] \(ERR-3\)"),
        (torch.ones(2, dtype=torch.complex64), r"bools or integers \[B\], got complex64 \(ERR-4\)"),
        (torch.ones(2, dtype=torch.bool, device="meta"), r"device cpu, that of x, got meta \(ERR-15\)"),
    ],
)
def test_active_is_checked_by_its_name(active, text):
    model = layer()
    with pytest.raises(SpecError, match=rf"^RAttention: active: expected {text}"):
        model.step(hidden()[:, 0], model.new_cache(2), active=active)
