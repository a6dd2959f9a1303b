"""The cache of a layer: its dtype follows the computation, its limit the longest row, and what reset takes."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from rattention import torch as rt
from rattention.spec import SpecError
from rattention.torch.nn import GenerationCache, RAttention
from rattention.torch.nn import cache as cache_module
from torch import Tensor, nn

FULL: dict[str, Any] = {"qk_norm": True, "qk_scale": True, "memory": True}


def layer(**options: Any) -> RAttention:
    torch.manual_seed(0)
    given: dict[str, Any] = {"window": 3} | options
    return RAttention(16, 2, 1, 8, **given)


def hidden(T: int = 10, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, T, 16, generator=torch.Generator().manual_seed(4)).to(dtype)


def generates(model: RAttention, x: Tensor, cache: GenerationCache | None = None) -> GenerationCache:
    """A prompt and three steps agree with the parallel form."""
    cache = model.new_cache(2) if cache is None else cache
    want, n = model(x), x.shape[1] - 3
    got = [model.prefill(x[:, :n], cache)] + [model.step(x[:, t], cache)[:, None] for t in range(n, n + 3)]
    tolerance = 2e-2 if want.dtype in (torch.bfloat16, torch.float16) else 1e-4
    torch.testing.assert_close(torch.cat(got, 1), want, rtol=tolerance, atol=tolerance)
    return cache


# ------------------------------------------------------------------------------------------------------------ dtype


class Int8(nn.Module):
    """A linear layer whose weight is held in int8, as quantisation libraries have them."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.scale = float(linear.weight.detach().abs().max()) / 127
        self.weight = nn.Parameter((linear.weight / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight.to(x.dtype) * self.scale).T


class Adapter(nn.Module):
    """A frozen layer in 16 bits and a correction of low rank in float32, without an attribute `weight`."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.base = copy.deepcopy(linear).to(torch.bfloat16)
        self.down, self.up = (nn.Linear(a, b, bias=False) for a, b in ((16, 2), (2, linear.out_features)))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x.to(torch.bfloat16)) + self.up(self.down(x.float()))


@torch.no_grad()
def test_quantised_projections_generate():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch announces that its own quantisation will move
        dynamic = torch.ao.quantization.quantize_dynamic(layer(**FULL), {nn.Linear}, dtype=torch.qint8)
    cache = dynamic.new_cache(2)
    assert cache.tensors.k.dtype == torch.float32
    dynamic.prefill(hidden(), cache)
    int8 = layer(**FULL)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        setattr(int8, name, Int8(getattr(int8, name)))
    generates(int8, hidden())


@torch.no_grad()
def test_an_adapter_on_one_projection_generates():
    """q and k in float32 beside v in 16 bits: they meet in the dtype of v, and so does the cache."""
    for options in ({}, FULL):
        model = layer(**options)
        for name, module in {"q_proj": Adapter, "k_proj": Adapter, "v_proj": Narrow, "o_proj": Narrow}.items():
            setattr(model, name, module(getattr(model, name)))
        assert model.new_cache(2).tensors.k.dtype == torch.float32
        assert generates(model, hidden()).tensors.k.dtype == torch.bfloat16


class Narrow(nn.Module):
    """A layer that computes in bfloat16 whatever it is given."""

    def __init__(self, linear: nn.Module):
        super().__init__()
        self.linear = linear.to(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.to(torch.bfloat16))


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, FULL])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_generation_under_autocast(dtype, options):
    """Wherever the cache is made; float64 is left alone by autocast."""
    model, x = layer(**options).to(dtype), hidden(dtype=dtype)
    outside = model.new_cache(2)
    with torch.autocast("cpu", torch.bfloat16):
        storage = model.k_proj(x).dtype
        assert generates(model, x).tensors.k.dtype == storage
        assert generates(model, x, outside).tensors.k.dtype == storage
        inside = model.new_cache(2)
        assert inside.tensors.k.dtype == storage
    assert generates(model, x, inside).tensors.k.dtype == dtype
    assert inside.tensors.state.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@torch.no_grad()
def test_a_cache_with_tokens_keeps_its_dtype_and_says_so():
    model, x = layer(), hidden()
    cache = model.new_cache(2)
    with torch.autocast("cpu", torch.bfloat16):
        model.prefill(x, cache)
    with pytest.raises(SpecError, match=r"cache: expected storage dtype float32.*autocast.*got bfloat16 \(ERR-4\)"):
        model.step(x[:, 0], cache)
    assert cache.length.tolist() == [10, 10]
    cache.reset()
    assert generates(model, x, cache).tensors.k.dtype == torch.float32


@torch.no_grad()
def test_a_dtype_that_the_caller_chose_is_kept():
    model, x = layer(), hidden()
    cache = model.new_cache(2, dtype=torch.bfloat16)
    with pytest.raises(SpecError, match=r"cache: expected storage dtype float32.*got bfloat16 \(ERR-4\)"):
        model.prefill(x, cache)
    with torch.autocast("cpu", torch.bfloat16):
        generates(model, x, cache)


def test_a_float64_layer_is_float64_throughout():
    model = layer(**FULL).double()
    with torch.no_grad():
        for p in model.parameters(recurse=False):
            p.normal_(0.5, 0.5)
    x = torch.randn(1, 5, 16, dtype=torch.float64)
    for name in ("swa_weight", "rla_weight", "q_scale", "k_scale", "memory"):
        p = getattr(model, name).detach().clone().requires_grad_()
        assert torch.autograd.gradcheck(
            lambda p, name=name: torch.func.functional_call(model, {name: p}, (x,)), p, fast_mode=True
        ), name


# ------------------------------------------------------------------------------------------------------------ limit


@torch.no_grad()
@pytest.mark.parametrize("compiled", [False, True])
def test_a_server_that_never_restarts_keeps_its_table_small(compiled):
    """Rows are recycled, so the longest ever has 10 tokens; the limit and the table follow it, not the clock."""
    model, x = layer(), hidden(1)[:, 0]
    cache = model.new_cache(2)
    step = torch.compile(model.step, fullgraph=True, backend="aot_eager") if compiled else model.step
    limits = []
    for i in range(90):
        step(x, cache)
        limits.append(cache.limit)
        assert int(cache.length.max()) <= cache.limit
        if i % 10 == 9:
            cache.reset(0)
        if i % 10 == 4:
            cache.reset([1])
    assert max(limits) <= 10
    assert model._table is None or model._table[0].shape[0] <= 256


@torch.no_grad()
def test_a_row_that_waits_does_not_let_the_limit_run_on():
    model, x = layer(), hidden(1)[:, 0]
    cache = model.new_cache(2)
    for i in range(60):
        model.step(x, cache, active=torch.tensor([True, False]))
        if i % 10 == 9:
            cache.reset(0)
    assert cache.length.tolist() == [0, 0]
    assert cache.limit == 0


@pytest.fixture
def device(monkeypatch):
    """As if lengths lived on a device: the list grows by one entry for each time they are read."""
    reads: list[int] = []
    read = GenerationCache.read_lengths
    monkeypatch.setattr(cache_module, "on_host", lambda t: False)
    monkeypatch.setattr(GenerationCache, "read_lengths", lambda self: reads.append(1) or read(self))
    return reads


def test_the_limit_on_a_device_needs_no_reading_when_rows_are_recycled(device):
    cache = GenerationCache(rt.Cache.empty(3, 1, 8, window=3), limit=0)
    seen = [0, 0, 0]
    for i in range(200):
        cache.update(cache.tensors, 1)
        seen = [n + 1 for n in seen]
        if i % 7 == 6:
            row = (i // 7) % 3
            cache.reset(row)
            seen[row] = 0
        assert cache.limit >= max(seen)
        assert cache.limit == max(seen) or i < 20
    cache.reset()
    assert cache.limit == 0
    cache.reset([-1, 0])
    assert cache.limit == 0
    assert not device


def test_the_lengths_on_a_device_are_read_once_before_a_table_grows(device):
    """Only if rows waited: else the bound is exact, and reading would tell nothing."""
    cache = GenerationCache(rt.Cache.empty(2, 1, 8, window=3), limit=0)
    for _ in range(300):
        cache.update(cache.tensors, 1)
    assert cache.rows_for(1, rows=256) == 301
    cache.update(cache.tensors, 1, ragged=True)
    assert cache.rows_for(1, rows=512) == 302
    assert not device
    assert cache.rows_for(1, rows=256) == 1  # the lengths are 0 here
    assert len(device) == 1


def test_another_order_of_rows_keeps_the_bound():
    """Beams: rows are repeated and dropped by whoever generates."""
    model, x = layer(), hidden()
    with torch.no_grad():
        cache = model.new_cache(2)
        model.prefill(x, cache, lengths=torch.tensor([4, 7], dtype=torch.int32))
        cache.tensors = rt.Cache(*(t[[1, 1]] for t in cache.tensors))
        assert cache.limit == 7
        cache.tensors = rt.Cache(*(t[:0] for t in cache.tensors))
        assert cache.limit == 0


@torch.no_grad()
def test_a_compiled_decode_does_not_recompile_at_each_token():
    model, x = layer(), hidden(40)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    step = torch.compile(model.step, backend=counter, fullgraph=True)
    want, cache = model(x), model.new_cache(2)
    model.prefill(x[:, :10], cache)
    for t in range(10, 40):
        torch.testing.assert_close(step(x[:, t], cache), want[:, t], rtol=1e-4, atol=1e-5)
    assert counter.frame_count <= 3


# ------------------------------------------------------------------------------------------------------------ reset


def three() -> GenerationCache:
    """Rows of 3, 4 and 5 tokens."""
    cache = rt.Cache.empty(3, 1, 8, window=3)
    return GenerationCache(cache._replace(length=torch.tensor([3, 4, 5], dtype=torch.int32), k=cache.k + 1))


@pytest.mark.parametrize(
    ("rows", "left"),
    [
        (None, [0, 0, 0]),
        (1, [3, 0, 5]),
        (-1, [3, 4, 0]),
        (np.int64(2), [3, 4, 0]),
        (torch.tensor(2), [3, 4, 0]),
        ([], [3, 4, 5]),
        ((), [3, 4, 5]),
        (np.array([], int), [3, 4, 5]),
        (np.array([]), [3, 4, 5]),
        (torch.tensor([]), [3, 4, 5]),
        (torch.tensor([], dtype=torch.long), [3, 4, 5]),
        ([1], [3, 0, 5]),
        ([0, -1, 0], [0, 4, 0]),
        (range(2), [0, 0, 5]),
        (np.array([2, 0]), [0, 4, 0]),
        (torch.tensor([2, 0], dtype=torch.int32), [0, 4, 0]),
        ([torch.tensor(1)], [3, 0, 5]),
        ([False, True, True], [3, 0, 0]),
        ([False] * 3, [3, 4, 5]),
        ([True] * 3, [0, 0, 0]),
        (np.array([True, False, False]), [0, 4, 5]),
        ([np.True_, np.False_, np.False_], [0, 4, 5]),
        (torch.tensor([False, False, True]), [3, 4, 0]),
    ],
)
def test_rows_that_reset_takes(rows, left):
    cache = three()
    cache.reset(rows)
    assert cache.length.tolist() == left
    assert cache.limit == max(left)
    assert cache.tensors.k.any((1, 2, 3)).tolist() == [n > 0 for n in left]


@pytest.mark.parametrize(
    ("rows", "error", "text"),
    [
        (3, IndexError, "expected indices below the batch of B=3, got 3"),
        ([0, 7], IndexError, "expected indices below the batch of B=3, got 7"),
        (-4, IndexError, "expected indices below the batch of B=3, got -4"),
        (torch.tensor([5]), IndexError, "expected indices below the batch of B=3, got 5"),
        ([True, False], IndexError, r"expected a bool mask \[B=3\], got 2 entries"),
        (np.array([True] * 4), IndexError, r"expected a bool mask \[B=3\], got 4 entries"),
        (torch.zeros(0, dtype=torch.bool), IndexError, r"expected a bool mask \[B=3\], got 0 entries"),
        (1.0, TypeError, "expected indices or a bool mask .*, got float"),
        ([1.0], TypeError, "expected indices or a bool mask .*, got list"),
        (np.array([1.0]), TypeError, "expected indices or a bool mask .*, got float64"),
        (torch.tensor([1.0]), TypeError, "expected indices or a bool mask .*, got torch.float32"),
        (torch.ones(3, 1, dtype=torch.bool), TypeError, r"got torch.bool \[3, 1\]"),
        (np.ma.masked_array([0, 1], mask=[False, True]), TypeError, "expected indices or a bool mask"),
        (True, TypeError, "expected indices or a bool mask .*, got bool"),
        ([True, 0, 1], TypeError, "expected indices or a bool mask"),
        ("012", TypeError, "expected indices or a bool mask .*, got str"),
        ([[0], [1]], TypeError, "expected indices or a bool mask"),
        ([None], TypeError, "expected indices or a bool mask"),
        (torch.tensor([0]).to_sparse(), TypeError, "expected indices or a bool mask"),
        (torch.nested.nested_tensor([torch.tensor([0])], layout=torch.jagged), TypeError, "got a nested tensor"),
    ],
)
def test_rows_that_reset_refuses(rows, error, text):
    cache = three()
    with pytest.raises(error, match=rf"reset: rows: .*{text}"):
        cache.reset(rows)
    assert cache.length.tolist() == [3, 4, 5]


def test_reset_in_a_graph():
    def f(length: Tensor, rows: Tensor) -> Tensor:
        cache = GenerationCache(rt.Cache.empty(3, 1, 8, window=3)._replace(length=length), limit=9)
        cache.reset(rows)
        cache.reset([0])
        return cache.length

    f = torch.compile(f, fullgraph=True, backend="aot_eager")
    assert f(three().length, torch.tensor([False, True, False])).tolist() == [0, 0, 5]
    with pytest.raises(Exception, match=r"reset: rows: expected a bool mask \[B=3\] where rows are traced"):
        f(three().length, torch.tensor([0, 1]))


def test_a_limit_is_needed_where_lengths_cannot_be_read():
    with pytest.raises(ValueError, match="limit: expected the longest length, since lengths are traced, got None"):
        torch.func.vmap(lambda n: GenerationCache(rt.Cache.empty(3, 1, 8, window=3)._replace(length=n)).length)(
            torch.zeros(1, 3, dtype=torch.int32)
        )
    with pytest.raises(SpecError, match=r"GenerationCache: tensors: expected a rattention.torch.Cache, got tuple"):
        GenerationCache(tuple(three().tensors))  # pyright: ignore[reportArgumentType]
