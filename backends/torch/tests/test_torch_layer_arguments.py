"""Arguments of the layer: refused by name when it is made, and when it is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from rattention.spec import SpecError
from rattention.torch.nn import RAttention
from torch import Tensor, nn
from torch.autograd import forward_ad

GOOD: dict[str, Any] = {"hidden_size": 16, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "window": 3}


def layer(**options: Any) -> RAttention:
    torch.manual_seed(0)
    return RAttention(**(GOOD | options))


SIZES = ("hidden_size", "num_heads", "num_kv_heads", "head_dim", "value_dim")
NO_SIZES = (0, -4, 2.0, True, "8", [8], torch.tensor(8))
NUMBER = nn.Parameter(torch.tensor(0.5))


@pytest.mark.parametrize(
    ("name", "wrong", "expected"),
    [(name, x, "an int >= 1") for name in SIZES for x in NO_SIZES]
    + [(name, None, "an int >= 1") for name in SIZES if name != "value_dim"]
    + [("num_heads", 3, "a multiple of num_kv_heads=2"), ("num_kv_heads", 3, None)]
    + [("window", x, "an int from -1 to 2^53 - 1") for x in (-2, 3.5, True, "3", [3], NUMBER, torch.tensor(3.5))]
    + [("feature_map", x, "one of softmax, relu, identity") for x in ("elu", None, 3, torch.relu)]
    + [
        ("eps", x, "a float > 0 in the normal range of float32")
        for x in (0, -1e-6, 1e39, 1e-50, np.inf, np.nan, None, "1e-6", True, NUMBER)
    ]
    + [
        ("rope_theta", x, "a float > 0 in the normal range of float32")
        for x in (0, -1.0, 1e39, np.inf, np.nan, "1e4", True, NUMBER)
    ]
    + [("head_dim", 7, "an even size to rotate in pairs, or rope_theta=None")]
    + [(name, x, "True or False") for name in ("qk_norm", "qk_scale", "memory", "bias") for x in (16, None, "yes")],
)
def test_a_wrong_argument_is_refused_when_the_layer_is_made(name, wrong, expected):
    with pytest.raises(SpecError) as error:
        layer(**{name: wrong})
    text = str(error.value)
    assert text.startswith(f"RAttention: {name if expected else 'num_heads'}: expected {expected or 'a multiple of'}")
    assert ", got " in text


@pytest.mark.parametrize("impl", ["cuda", 3, ""])
def test_an_unknown_implementation_is_refused_when_the_layer_is_made(impl):
    with pytest.raises(ValueError, match="impl: expected one of eager, triton or None, got"):
        layer(impl=impl)


def test_what_is_as_good_as_a_number_serves():
    model = layer(num_heads=np.int64(4), window=torch.tensor(3), eps=np.float32(0.5), rope_theta=torch.tensor(100.0))
    assert (model.num_heads, model.window, model.eps, model.rope_theta) == (4, 3, 0.5, 100.0)
    assert {type(x) for x in (model.window, model.num_heads)} == {int}
    assert layer(head_dim=7, rope_theta=None)(torch.randn(1, 4, 16)).shape == (1, 4, 16)
    assert layer(window=-1).window == -1
    assert layer(window=None, impl="triton").window is None


def test_the_dtype_of_memory_is_never_narrow():
    made = [layer(memory=True, dtype=x).memory for x in (None, torch.bfloat16, torch.float64)]
    assert [m.dtype for m in made if m is not None] == [torch.float32, torch.float32, torch.float64]


@pytest.mark.parametrize("wrong", [[[1.0] * 16], np.zeros((2, 5, 16), np.float32), 3.0, None])
def test_hidden_states_that_are_no_tensor_are_refused(wrong):  # ERR-14
    model = layer()
    for call in (
        lambda: model(wrong),
        lambda: model.prefill(wrong, model.new_cache(2)),
        lambda: model.step(wrong, model.new_cache(2)),
    ):
        with pytest.raises(SpecError, match=r"RAttention: x: expected a torch.Tensor, got .*\(ERR-14\)"):
            call()


def test_hidden_states_of_another_shape_are_refused():
    model, x = layer(), torch.randn(2, 5, 16)
    for wrong in (x[0], x[:, :, :8], x[None]):
        with pytest.raises(SpecError, match=r"x: expected shape \[B, T, hidden=16\], got \["):
            model(wrong)
        with pytest.raises(SpecError, match=r"x: expected shape \[B, T, hidden=16\], got \["):
            model.prefill(wrong, model.new_cache(2))
    with pytest.raises(SpecError, match=r"x: expected shape \[B, hidden=16\], got \[2, 5, 16\]"):
        model.step(x, model.new_cache(2))


@pytest.mark.parametrize("wrong", [[[0] * 5] * 2, np.zeros((2, 5), np.int32), 0])
def test_integers_that_are_no_tensor_are_refused(wrong):  # ERR-14
    model, x = layer(), torch.randn(2, 5, 16)
    for name in ("positions", "segment_ids"):
        for rope in (layer(), layer(rope_theta=None)):
            with pytest.raises(SpecError, match=rf"RAttention: {name}: expected a torch.Tensor, got .*ERR-14"):
                rope(x, **{name: wrong})
    with pytest.raises(SpecError, match=r"RAttention: lengths: expected a torch.Tensor, got .*ERR-14"):
        model.prefill(x, model.new_cache(2), lengths=wrong)
    with pytest.raises(SpecError, match=r"RAttention: active: expected a torch.Tensor, got .*ERR-14"):
        model.step(x[:, 0], model.new_cache(2), active=wrong)


def test_active_is_a_mask():
    model, x = layer(), torch.randn(2, 16)
    with pytest.raises(SpecError, match=r"RAttention: active: expected bools or integers \[B\], got float32"):
        model.step(x, model.new_cache(2), active=torch.ones(2))
    cache = model.new_cache(2)
    model.step(x, cache, active=torch.tensor([0, 7]))
    assert cache.length.tolist() == [0, 1]


def test_a_cache_is_what_new_cache_makes():
    model, x = layer(), torch.randn(2, 5, 16)
    for wrong in (model.new_cache(2).tensors, None, {}):
        with pytest.raises(
            SpecError, match="RAttention: cache: expected a GenerationCache, as new_cache makes it, got"
        ):
            model.prefill(x, wrong)  # pyright: ignore[reportArgumentType]


ATTRIBUTES = [
    ("sliding_window_attention", "scale"),
    ("rattention", "scale"),
    ("rattention_extend", "scale"),
    ("rattention", "eps"),
    ("rms_mix", "eps"),
    ("rope_table", "theta"),
    ("rattention", "window"),
]


HOW = ("requires grad", "parameter", "no_grad", "grad", "vmap", "jvp", "dual", "meta", "compile")


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # PyTorch's own, on the first jvp
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(("op", "name"), ATTRIBUTES)
def test_a_tensor_that_could_learn_is_no_attribute(op, name, how, valid_calls, public):  # ERR-5
    """It would get no gradient, and whoever trains it would not be told."""
    tensors, attributes = valid_calls[op]

    def call(value: Tensor) -> Tensor:
        return public(op, tensors, attributes | {name: value})[0].sum()

    value = torch.tensor(2.0)
    refused = rf"{op}: {name}: expected .*, got a tensor of shape \[\] .*no gradient would reach it.*\(ERR-5\)"
    error = Exception if how == "compile" else SpecError
    with pytest.raises(error, match=refused):
        try_to_learn(how, call, value)


def try_to_learn(how: str, call: Callable[[Tensor], Tensor], value: Tensor) -> None:
    match how:
        case "requires grad":
            call(value.requires_grad_())
        case "parameter":
            call(nn.Parameter(value))
        case "no_grad":
            with torch.no_grad():
                call(nn.Parameter(value))
        case "grad":
            torch.func.grad(call)(value)
        case "vmap":
            torch.func.vmap(call)(value[None])
        case "jvp":
            torch.func.jvp(call, (value,), (value,))
        case "dual":
            with forward_ad.dual_level():
                call(forward_ad.make_dual(value, value))
        case "meta":
            call(value.to("meta"))
        case "compile":
            torch.compile(call, fullgraph=True, backend="aot_eager")(value)


def test_a_number_in_a_tensor_on_the_host_serves(valid_calls, public):
    tensors, attributes = valid_calls["rattention"]
    want = public("rattention", tensors, attributes | {"scale": 0.5})[0]
    assert torch.equal(public("rattention", tensors, attributes | {"scale": torch.tensor(0.5)})[0], want)
    with pytest.raises(SpecError, match=r"rattention: scale: expected .*, got a tensor of shape \[1\]"):
        public("rattention", tensors, attributes | {"scale": torch.tensor([0.5])})


def test_a_learnable_base_or_eps_of_a_layer_is_refused_at_the_call():
    x = torch.randn(1, 4, 16)
    for name, shown in (
        ("rope_theta", "rope_table: theta"),
        ("eps", "rattention: eps"),
        ("window", "rattention: window"),
    ):
        model = layer()
        delattr(model, name)
        setattr(model, name, nn.Parameter(torch.tensor(3.0)))
        with pytest.raises(SpecError, match=rf"{shown}: expected .*, got a tensor .*ERR-5"):
            model(x)


def test_the_parameters_of_its_own_are_set_by_reset_parameters():
    model = layer(qk_norm=True, qk_scale=True, memory=True)
    kept = model.q_proj.weight.clone()
    with torch.no_grad():
        for p in model.parameters(recurse=False):
            p.fill_(torch.nan)
    model.reset_parameters()
    for name in ("swa_weight", "rla_weight", "q_scale", "k_scale"):
        assert torch.equal(getattr(model, name), torch.ones_like(getattr(model, name)))
    assert model.memory is not None
    assert not model.memory.any()
    assert torch.equal(model.q_proj.weight, kept)
    assert isinstance(model(torch.randn(1, 4, 16)), Tensor)
