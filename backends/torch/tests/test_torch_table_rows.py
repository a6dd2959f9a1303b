"""Positions and the rotary table: NaN past it where positions are not read, tables sized by what a layer is given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rattention import torch as rt
from rattention.spec import SpecError
from rattention.torch.eager import maps
from rattention.torch.nn import RAttention
from torch import Tensor

B, T, HQ, HKV, D, ROWS = 2, 12, 4, 2, 4, 9


def inputs(dtype: torch.dtype = torch.float64, T: int = T) -> dict[str, Any]:
    make = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make, dtype=torch.float64).to(dtype)

    tokens = {"q": normal(B, T, HQ, D), "k": normal(B, T, HKV, D), "v": normal(B, T, HKV, D)}
    return tokens | {"swa_weight": normal(HQ, D), "rla_weight": normal(HQ, D)}


def table(rows: int) -> dict[str, Any]:
    cos, sin = rt.rope_table(torch.arange(rows, dtype=torch.int32), head_dim=D)
    return {"rope_cos": cos, "rope_sin": sin}


def functions(op: str, t: dict[str, Tensor], **given: Any) -> Tensor:
    t = t if op == "rattention" else {n: t[n] for n in "qkv"}
    out = getattr(rt, op)(**t, **given)
    assert isinstance(out, Tensor)
    return out


def readers(positions: Tensor, ids: Tensor, rows: int, window: int | None) -> Tensor:
    """`[B, T]`: live tokens without a row, and those that see one in their window and document, token by token."""
    unknown = torch.zeros_like(positions, dtype=torch.bool)
    for b in range(positions.shape[0]):
        for t in range(positions.shape[1]):
            near = range(0 if window is None else max(0, t - max(window, 0)), t + 1)
            seen = [i for i in near if ids[b, i] == ids[b, t] and ids[b, t] != 0]
            unknown[b, t] = any(not 0 <= int(positions[b, i]) < rows for i in seen)
    return unknown


def unread(f: Any, *tensors: Tensor) -> Any:
    """`f` where no value of `tensors` can be read: under vmap over one more axis of size 1."""
    return torch.func.vmap(f)(*(x[None] for x in tensors))


IDS = torch.tensor([[1] * 5 + [2] * 7, [0] * 2 + [3] * 8 + [4] + [0]], dtype=torch.int32)
POSITIONS = torch.tensor(
    [[0, 1, 2, 30, 4, 0, -1, 2, 3, 4, 5, 6], [99, -7, 0, 1, 8, 9, 2, 3, 4, 5, 2**31 - 1, 50]], dtype=torch.int32
)


@pytest.mark.parametrize("window", [-1, 0, 2, 100, None])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("op", ["rattention", "sliding_window_attention"])
def test_a_position_without_a_row_gives_nan_to_its_readers_alone(op, packed, window):  # ERR-16
    """The others, and every gradient that does not come from an unknown token, are those of a longer table."""
    t = inputs()
    ids = IDS if packed else torch.ones_like(IDS)
    unknown = readers(POSITIONS, ids, ROWS, window)
    outside = (POSITIONS < 0) | (POSITIONS >= ROWS)
    reach = torch.where(outside, 0, POSITIONS)  # any row for those that only unknown tokens read
    cotangent = torch.randn(B, T, HQ, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    cotangent[unknown] = 0
    fixed: dict[str, Any] = {"window": window, **table(ROWS)}

    def call(positions: Tensor, segment_ids: Tensor, t: dict[str, Tensor]) -> Tensor:
        return functions(op, t, positions=positions, segment_ids=segment_ids if packed else None, **fixed)

    leaves = {n: x.clone().requires_grad_() for n, x in t.items() if op == "rattention" or n in "qkv"}
    out = unread(lambda p, s: call(p, s, leaves), POSITIONS, ids)[0]
    want = call(reach, ids, leaves)
    assert out[unknown].isnan().all()
    assert torch.equal(out[~unknown], want[~unknown])
    if packed:
        assert not out[ids == 0].any()
    got = torch.autograd.grad(out, list(leaves.values()), cotangent)
    for name, a, b in zip(leaves, got, torch.autograd.grad(want, list(leaves.values()), cotangent), strict=True):
        assert torch.equal(a, b), name
    with pytest.raises(SpecError, match=r"positions: .*ERR-9"):
        call(POSITIONS, ids, t)


def test_a_document_longer_than_the_table():  # ERR-16, positions by default
    t, ids = inputs(), torch.tensor([[1] * 2 + [2] * 10, [3] * 8 + [0] * 4], dtype=torch.int32)
    out = unread(lambda s: functions("rattention", t, segment_ids=s, window=2, **table(ROWS)), ids)[0]
    want = functions("rattention", t, segment_ids=ids, window=2, **table(T))
    past = torch.zeros_like(ids, dtype=torch.bool)
    past[0, 2 + ROWS :] = True
    assert out[past].isnan().all()
    assert torch.equal(out[~past], want[~past])


def test_an_empty_batch_needs_no_rows():  # ERR-12
    t = {n: x[:0] if n in "qkv" else x for n, x in inputs().items()}
    ids = torch.zeros(0, T, dtype=torch.int32)
    for given in ({}, {"segment_ids": ids}, {"positions": ids}, {"positions": ids, "segment_ids": ids}):
        assert functions("rattention", t, window=2, **given, **table(3)).shape == (0, T, HQ, D)


@pytest.mark.parametrize("how", ["compile", "vmap"])
def test_an_empty_table_serves_padding_alone(how):
    t, ids = inputs(), torch.zeros(B, T, dtype=torch.int32)
    ids[1, 3] = 7

    def call(ids: Tensor) -> Tensor:
        return functions("rattention", t, segment_ids=ids, window=2, **table(0))

    out = unread(call, ids)[0] if how == "vmap" else torch.compile(call, fullgraph=True, backend="aot_eager")(ids)
    assert out[1, 3].isnan().all()
    assert not out[ids == 0].any()


def test_no_index_error_in_a_compiled_graph():
    t = inputs(torch.float32)
    f = torch.compile(
        lambda p: functions("sliding_window_attention", t, positions=p, window=2, **table(ROWS)),
        fullgraph=True,
        backend="aot_eager",
    )
    assert torch.equal(f(POSITIONS).isnan().any((2, 3)), readers(POSITIONS, torch.ones_like(IDS), ROWS, 2))


@pytest.mark.parametrize("window", [-1, 0, 3, None])
@pytest.mark.parametrize("ragged", [True, False])
def test_a_continuation_past_the_table(window, ragged):  # ERR-16; a row without new tokens reads nothing
    t, W = inputs(T=4), 5 if window is None else max(window, 0)
    cache = rt.Cache.empty(B, HKV, D, window=window, dtype=torch.float64)
    length = torch.tensor([ROWS - 2, min(W, 3) if window is None else 3], dtype=torch.int32)
    if window is None:
        length = torch.tensor([5, 3], dtype=torch.int32)
    k, v = (torch.randn(B, W, HKV, D, dtype=torch.float64) for _ in "kv")
    rows = int(length[0]) + 2
    lengths = torch.tensor([4, 2] if ragged else [4, 4], dtype=torch.int32)
    leaves = {n: x.clone().requires_grad_() for n, x in (t | {"cache_k": k, "cache_v": v}).items()}

    def call(length: Tensor, lengths: Tensor, M: int) -> tuple[Tensor, ...]:
        given: dict[str, Any] = {n: x for n, x in leaves.items() if not n.startswith("cache")}
        before = rt.Cache(leaves["cache_k"], leaves["cache_v"], cache.state, length)
        more: dict[str, Any] = {"lengths": lengths} if ragged else {}
        out, after = rt.rattention_extend(**given, cache=before, window=window, **more, **table(M))
        return out, *after

    out, *after = unread(lambda n, m: call(n, m, rows), length, lengths)
    want, *kept = call(length, lengths, 40)
    for a, b in zip(after, kept, strict=True):
        assert torch.equal(a[0], b)
    past = (length[:, None] + torch.arange(4) >= rows) & (torch.arange(4) < lengths[:, None])
    assert past.tolist() == [[False, False, True, True], [False] * 4]
    assert out[0][past].isnan().all()
    assert torch.equal(out[0][~past], want[~past])
    cotangent = torch.randn_like(want)
    cotangent[past] = 0
    got = torch.autograd.grad(out[0], list(leaves.values()), cotangent, allow_unused=True)
    expected = torch.autograd.grad(want, list(leaves.values()), cotangent, allow_unused=True)
    for name, a, b in zip(leaves, got, expected, strict=True):
        assert (a is None and b is None) or torch.equal(a, b), name
    with pytest.raises(SpecError, match=r"rope_cos: .*ERR-9"):
        call(length, lengths, rows)


def test_a_row_that_waits_may_stand_past_the_table():
    """Nobody reads its keys: no NaN comes of them, not in gradients either."""
    t = inputs(T=2)
    k = torch.randn(B, 3, HKV, D, dtype=torch.float64, requires_grad=True)
    cache = rt.Cache.empty(B, HKV, D, window=3, dtype=torch.float64)
    length, lengths = torch.tensor([2, 500], dtype=torch.int32), torch.tensor([2, 0], dtype=torch.int32)

    def call(n: Tensor, m: Tensor) -> Tensor:
        before = rt.Cache(k, cache.v, cache.state, n)
        return rt.rattention_extend(**t, cache=before, lengths=m, window=3, **table(4))[0]

    out = unread(call, length, lengths)[0]
    assert torch.equal(out, call(length, lengths))
    assert out.isfinite().all()
    (grad,) = torch.autograd.grad(out.square().sum(), k)
    assert grad.isfinite().all()
    assert not grad[1].any()


def layer(**options: Any) -> RAttention:
    torch.manual_seed(0)
    given: dict[str, Any] = {"window": 3} | options
    return RAttention(16, 2, 1, 8, **given)


def direct(model: RAttention, x: Tensor, rows: int, **given: Any) -> Tensor:
    """The layer by the functions, with a table of `rows` rows."""
    q, k, v = model._project(x)
    cos, sin = rt.rope_table(torch.arange(rows, dtype=torch.int32), head_dim=8)
    weights: dict[str, Any] = {"swa_weight": model.swa_weight, "rla_weight": model.rla_weight}
    out = rt.rattention(q, k, v, **weights, rope_cos=cos, rope_sin=sin, window=3, **given)
    assert isinstance(out, Tensor)
    return model.o_proj(out.flatten(2))


def test_a_layer_sizes_its_table_by_the_positions():
    x, at = torch.randn(1, 6, 16), torch.tensor([[0, 300, 7, 4000, 12, 900]], dtype=torch.int32)
    want = direct(layer(), x, 4001, positions=at)
    assert torch.equal(layer()(x, positions=at), want)
    assert torch.equal(layer()(x, positions=at, max_position=9), want)  # what is read is not guessed
    ids = torch.tensor([[1, 1, 1, 0, 2, 2]], dtype=torch.int32)
    far = torch.where(ids == 0, 2**31 - 1, at)  # padding may say anything; only live tokens size the table
    model = layer()
    assert torch.equal(
        model(x, positions=far.int(), segment_ids=ids), direct(model, x, 901, positions=at, segment_ids=ids)
    )
    assert model._table is not None
    assert model._table[0].shape[0] < 2000
    with pytest.raises(SpecError, match=r"positions: expected rows 0 <= positions .* got -1 .*ERR-9"):
        model(x, positions=at - 1)


@pytest.mark.parametrize("how", ["compile", "vmap"])
def test_a_layer_refuses_to_guess_where_positions_cannot_be_read(how):
    model, x = layer(), torch.randn(1, 6, 16)
    at = torch.tensor([[0, 300, 7, 4000, 12, 900]], dtype=torch.int32)

    def call(p: Tensor, **given: int) -> Tensor:
        def f(p: Tensor) -> Tensor:
            return model(x, positions=p, **given)

        return unread(f, p)[0] if how == "vmap" else torch.compile(f, fullgraph=True, backend="aot_eager")(p)

    with pytest.raises(Exception, match=r"max_position: expected the largest of positions.*got None"):
        call(at)
    torch.testing.assert_close(call(at, max_position=4000), direct(model, x, 4001, positions=at))
    model = layer()  # whose table is not yet longer
    short = call(at, max_position=900)
    assert short[0].isnan().any(1).tolist() == [False, False, False, True, True, True]


@pytest.mark.parametrize(
    ("positions", "text"),
    [
        (torch.zeros(2, 10, dtype=torch.int64), r"dtype int32, got int64 \(ERR-4\)"),
        (torch.zeros(2, 10), r"dtype int32, got float32 \(ERR-4\)"),
        (torch.zeros(10, dtype=torch.int32), r"shape \[B=2, T=10\], got \[10\] \(ERR-2\)"),
        (torch.zeros(2, 9, dtype=torch.int32), r"shape \[B=2, T=10\], got \[2, 9\] \(ERR-3\)"),
        (
            torch.full((2, 10), 2**31 - 1, dtype=torch.int32),
            r"positions below 134217728, for the table, got 2147483647",
        ),
    ],
)
def test_positions_are_looked_at_before_they_size_a_table(positions, text):
    with pytest.raises(SpecError, match=rf"^RAttention: positions: expected {text}"):
        layer()(torch.randn(2, 10, 16), positions=positions)


@pytest.mark.parametrize("wrong", [True, 5.0, "5", [5], -1, 2**27, 10**30, torch.tensor(5.0)])
def test_a_largest_position_that_is_none_is_refused(wrong):
    at = torch.zeros(2, 10, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"max_position: expected an? (int|position)"):
        layer()(torch.randn(2, 10, 16), positions=at, max_position=wrong)
    assert layer()(torch.randn(2, 10, 16), positions=at, max_position=torch.tensor(5)).shape == (2, 10, 16)


def test_a_changed_base_makes_a_new_table():
    model, x = layer(), torch.randn(1, 6, 16)
    model(x)
    model.rope_theta = 100.0
    assert torch.equal(model(x), layer(rope_theta=100.0)(x))


def test_tables_without_float64_on_the_device(monkeypatch):
    """As on MPS: the CPU computes the table, bit by bit the same, and only float32 reaches the device."""
    at = torch.arange(300, dtype=torch.int32)
    want = rt.rope_table(at, head_dim=6, theta=500.0)
    made = []
    arange = torch.arange
    monkeypatch.setattr(torch, "arange", lambda *a, **k: made.append(k) or arange(*a, **k))
    monkeypatch.setattr(maps, "WITH_FLOAT64", ("cpu",))
    assert all(torch.equal(a, b) for a, b in zip(rt.rope_table(at, head_dim=6, theta=500.0), want, strict=True))
    monkeypatch.undo()
    assert [k["device"].type for k in made if k.get("dtype") == torch.float64] == ["cpu"]
    assert {"mps", "xpu", "npu"}.isdisjoint(maps.WITH_FLOAT64)
