"""The layer: names, generation against the parallel form, padding, dtypes."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from rattention import torch as rt
from rattention.torch.nn import RAttention

HIDDEN, W = 24, 5


def layer(**options: Any) -> RAttention:
    torch.manual_seed(3)
    options = {"value_dim": 5, "window": W} | options
    made = RAttention(HIDDEN, 4, 2, 6, **options).double()
    with torch.no_grad():
        for p in made.parameters():
            p.normal_(0.3, 0.5)
    return made


FULL = {"qk_norm": True, "qk_scale": True, "memory": True, "bias": True}


def test_the_state_dict_has_plain_names_and_torch_linear_layout():
    shapes = {k: tuple(x.shape) for k, x in layer(**FULL).state_dict().items()}
    assert shapes == {
        "q_proj.weight": (24, HIDDEN),
        "q_proj.bias": (24,),
        "k_proj.weight": (12, HIDDEN),
        "k_proj.bias": (12,),
        "v_proj.weight": (10, HIDDEN),
        "v_proj.bias": (10,),
        "o_proj.weight": (HIDDEN, 20),
        "o_proj.bias": (HIDDEN,),
        "swa_weight": (4, 5),
        "rla_weight": (4, 5),
        "q_norm.weight": (6,),
        "k_norm.weight": (6,),
        "q_scale": (6,),
        "k_scale": (6,),
        "memory": (4, 12, 5),
    }
    bare = layer()
    names = {"q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight", "swa_weight", "rla_weight"}
    assert set(bare.state_dict()) == names
    bare(torch.randn(1, 7, HIDDEN).double())
    assert set(copy.deepcopy(bare).state_dict()) == names


@pytest.mark.parametrize("options", [{}, FULL, {"rope_theta": None}, {"window": -1}, {"window": None}, {"window": 0}])
def test_generation_equals_the_parallel_form_on_rows_of_different_lengths(options):  # EXT-1, EXT-2
    """Three rows past three windows: ragged prompts in two pieces, then steps, one row pausing now and then."""
    model = layer(**options)
    lengths = [31, 22, 27]
    x = torch.randn(3, max(lengths), HIDDEN, dtype=torch.float64)
    want = model(x)
    cache = model.new_cache(3)
    seen = [0, 0, 0]
    got = torch.full_like(want, torch.nan)

    def feed(counts: list[int]) -> None:
        T = max(counts)
        tokens = torch.full((3, T, HIDDEN), torch.nan, dtype=torch.float64)
        for b, n in enumerate(counts):
            tokens[b, :n] = x[b, seen[b] : seen[b] + n]
        if T == 1:
            y = model.step(tokens[:, 0], cache, active=torch.tensor(counts))[:, None]
        else:
            y = model.prefill(tokens, cache, lengths=torch.tensor(counts, dtype=torch.int32))
        for b, n in enumerate(counts):
            got[b, seen[b] : seen[b] + n] = y[b, :n]
            seen[b] += n

    feed([7, 0, 12])
    feed([3, 9, 2])
    for turn in itertools.count():
        counts = [int(seen[b] < lengths[b] and (b != 1 or turn % 3 != 0)) for b in range(3)]
        if not any(seen[b] < lengths[b] for b in range(3)):
            break
        if any(counts):
            feed(counts)
    assert cache.length.tolist() == lengths
    for b, n in enumerate(lengths):
        torch.testing.assert_close(got[b, :n], want[b, :n], rtol=1e-11, atol=1e-11)


def test_a_reset_row_starts_afresh_and_the_others_go_on():  # TRAPS 20: a recycled slot
    model = layer(**FULL)
    x = torch.randn(2, 40, HIDDEN, dtype=torch.float64)
    cache = model.new_cache(2)
    model.prefill(x[:, :20], cache)
    cache.reset(1)
    assert cache.length.tolist() == [20, 0]
    got = model.prefill(x[:, 20:], cache)
    torch.testing.assert_close(got[0], model(x)[0, 20:], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(got[1:], model(x[1:, 20:]), rtol=1e-11, atol=1e-11)
    cache.reset()
    assert cache.length.tolist() == [0, 0]
    assert not any(x.any() for x in cache.tensors)


def test_packed_documents_equal_separate_ones():  # SEG-1 .. SEG-3
    model = layer()
    x = torch.randn(1, 30, HIDDEN, dtype=torch.float64)
    ids = torch.tensor([[0] * 3 + [4] * 12 + [9] * 11 + [0] * 4], dtype=torch.int32)
    y = model(x, segment_ids=ids)
    torch.testing.assert_close(y[:, 3:15], model(x[:, 3:15]), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(y[:, 15:26], model(x[:, 15:26]), rtol=1e-11, atol=1e-11)
    assert not y[:, :3].any()
    shifted = model(x, positions=torch.arange(5, 35, dtype=torch.int32)[None], max_position=34)
    torch.testing.assert_close(shifted, model(x), rtol=1e-4, atol=1e-5)  # rotation is relative, in a float32 table
    at = torch.arange(30, dtype=torch.int32)[None]
    assert torch.equal(model(x, positions=at), model(x))
    assert not torch.allclose(model(x, positions=2 * at, max_position=58), model(x), rtol=1e-4, atol=1e-5)


def test_bfloat16_weights_and_autocast():
    model = layer(**FULL).to(torch.bfloat16)
    x = torch.randn(2, 17, HIDDEN, dtype=torch.bfloat16)
    y = model(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    cache = model.new_cache(2)
    assert cache.tensors.k.dtype == torch.bfloat16
    assert cache.tensors.state.dtype == torch.float32
    wide = layer(**FULL).float()
    with torch.autocast("cpu", torch.bfloat16):
        y = wide(x.float())
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in wide.parameters())


def test_a_table_made_in_inference_serves_training():
    model = layer()
    with torch.inference_mode():
        model(torch.randn(1, 9, HIDDEN, dtype=torch.float64))
    model(torch.randn(1, 9, HIDDEN, dtype=torch.float64)).sum().backward()
    table = model._rotary(9, torch.device("cpu"))
    cos, sin = rt.rope_table(torch.arange(9, dtype=torch.int32), head_dim=6)
    assert torch.equal(table["rope_cos"][:9], cos)
    assert torch.equal(table["rope_sin"][:9], sin)


def test_gradient_flows_through_generation():  # GRAD-4
    model = layer()
    x = torch.randn(2, 18, HIDDEN, dtype=torch.float64)
    whole = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    cache = model.new_cache(2)
    pieces = torch.cat([model.prefill(x[:, i : i + 6], cache) for i in (0, 6, 12)], 1)
    for a, b in zip(whole, torch.autograd.grad(pieces.square().sum(), list(model.parameters())), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
