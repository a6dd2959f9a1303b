"""Everything in the place of a tensor is a plain tensor, on the device of the others: functions, layers, caches."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.utils.prune
from rattention import torch as rt
from rattention.spec import SpecError, Unsupported, load
from rattention.torch.nn import GenerationCache, RAttention
from torch import Tensor, nn

OPERATIONS = [op.name for op in load().operations.values() if not op.is_vjp]
FULL: dict[str, Any] = {"qk_norm": True, "qk_scale": True, "memory": True, "bias": True}
PLACES = [(op, t.name) for op in OPERATIONS for t in load().operations[op].tensors]


def layer(**options: Any) -> RAttention:
    torch.manual_seed(0)
    return RAttention(16, 2, 1, 8, window=3, **options)


@pytest.mark.parametrize(("op", "name"), [(op, name) for op, name in PLACES if len(load().operations[op].tensors) > 1])
def test_a_tensor_on_another_device_is_named(op, name, valid_calls, public):  # ERR-15
    tensors, attributes = valid_calls[op]
    public(op, tensors, attributes)
    moved = tensors | {name: tensors[name].to("meta")}
    with pytest.raises(SpecError, match=rf"^{op}: {name}: expected device cpu, that of \w+, got meta \(ERR-15\)$"):
        public(op, moved, attributes)
    rest = {n: x if n == name else x.to("meta") for n, x in tensors.items()}
    odd = "device meta" if len(tensors) > 2 else "device "
    with pytest.raises(SpecError, match=rf"^{op}: \w+: expected {odd}.*\(ERR-15\)$"):
        public(op, rest, attributes)


@pytest.mark.parametrize(("op", "name"), PLACES)
def test_what_is_no_tensor_is_refused_by_name(op, name, valid_calls, public):  # ERR-14
    tensors, attributes = valid_calls[op]
    array = tensors[name].numpy()
    for wrong in (array.tolist(), array, np.ma.masked_array(array), 1.0, "x"):
        got = f"{type(wrong).__module__}.{type(wrong).__qualname__}".replace(".", r"\.")
        with pytest.raises(SpecError, match=rf"^{op}: {name}: expected a torch.Tensor, got {got} \(ERR-14\)$"):
            public(op, tensors | {name: wrong}, attributes)


def test_tensors_that_are_no_dense_arrays_are_refused(valid_calls, public):  # ERR-14
    tensors, attributes = valid_calls["rms_mix"]
    x = tensors["swa"]
    with pytest.raises(SpecError, match=r"swa: expected a dense torch.Tensor, got layout torch.sparse_coo \(ERR-14\)"):
        public("rms_mix", tensors | {"swa": x.to_sparse()}, attributes)
    ragged = torch.nested.nested_tensor([x[0, :3], x[1]], layout=torch.jagged)
    with pytest.raises(SpecError, match=r"rla: expected a dense torch.Tensor, got a nested tensor \(ERR-14\)"):
        public("rms_mix", tensors | {"rla": ragged}, attributes)


@pytest.mark.filterwarnings("ignore:.*MaskedTensors.*:UserWarning")
def test_a_masked_tensor_is_refused(valid_calls, public):  # ERR-14
    tensors, attributes = valid_calls["feature_map"]
    x = torch.masked.as_masked_tensor(tensors["x"], tensors["x"] > 0)
    with pytest.raises(SpecError, match=r"x: expected a dense torch.Tensor, got a MaskedTensor \(ERR-14\)"):
        public("feature_map", {"x": x}, attributes)


def test_a_cache_of_another_kind_is_refused(valid_calls):
    tensors, _ = valid_calls["rattention_extend"]
    given: dict[str, Any] = {n: tensors[n] for n in ("q", "k", "v", "swa_weight", "rla_weight")}
    entries = tuple(tensors[f"cache_{n}"] for n in ("k", "v", "state", "length"))
    for wrong in (entries, GenerationCache(rt.Cache(*entries)), None):
        with pytest.raises(
            SpecError, match=r"rattention_extend: cache: expected a rattention.torch.Cache, got .*ERR-14"
        ):
            rt.rattention_extend(**given, cache=wrong, window=2)  # pyright: ignore[reportArgumentType]


def calls_of(model: RAttention, x: Tensor):
    """Each method of a layer that takes hidden states."""
    yield lambda: model(x)
    yield lambda: model.prefill(x, model.new_cache(2))
    yield lambda: model.step(x[:, 0], model.new_cache(2))


@pytest.mark.parametrize("name", [n for n, _ in layer(**FULL).named_parameters()])
def test_a_parameter_that_a_partial_load_left_on_meta_is_an_error(name):  # TRAPS 34: never memory that nobody wrote
    model = layer(**FULL)
    module, _, last = name.rpartition(".")
    owner = model.get_submodule(module)
    setattr(owner, last, nn.Parameter(getattr(owner, last).to("meta")))
    for call in calls_of(model, torch.randn(2, 5, 16)):
        with pytest.raises(
            SpecError, match=rf"RAttention: {name}: expected device cpu, that of x, got meta \(ERR-15\)"
        ):
            call()


def test_a_layer_and_its_input_on_two_devices():
    x = torch.randn(2, 5, 16)
    for model, given in ((layer(device="meta"), x), (layer(), x.to("meta"))):
        for call in calls_of(model, given):
            expected = r"RAttention: x: expected device \w+, that of all parameters, got \w+ \(ERR-15\)"
            with pytest.raises(SpecError, match=expected):
                call()


def test_a_cache_ids_positions_and_counts_on_another_device():
    model, x = layer(), torch.randn(2, 5, 16)
    counts = torch.ones(2, dtype=torch.int32, device="meta")
    tokens = torch.ones(2, 5, dtype=torch.int32, device="meta")
    with pytest.raises(SpecError, match=r"cache_k: expected device cpu, that of q, got meta \(ERR-15\)"):
        model.prefill(x, model.new_cache(2, device="meta"))
    for name in ("positions", "segment_ids"):
        with pytest.raises(SpecError, match=rf"{name}: expected device cpu, that of q, got meta \(ERR-15\)"):
            model(x, **{name: tokens}, max_position=4)
    with pytest.raises(SpecError, match=r"lengths: expected device cpu, that of q, got meta \(ERR-15\)"):
        model.prefill(x, model.new_cache(2), lengths=counts)
    with pytest.raises(SpecError, match=r"active: expected device cpu, that of x, got meta \(ERR-15\)"):
        model.step(x[:, 0], model.new_cache(2), active=counts)


def test_a_module_that_brings_its_own_weight_when_it_runs_is_left_alone():
    """Offloading keeps a weight on meta until a hook fetches it."""
    model, x = layer(), torch.randn(2, 5, 16)
    want = model(x)
    weight = model.q_proj.weight
    model.q_proj.weight = nn.Parameter(weight.to("meta"))
    model.q_proj.register_forward_pre_hook(lambda module, _: setattr(module, "weight", weight))
    assert torch.equal(model(x), want)


class Adapted(nn.Linear):
    """As adapters and quantised layers are: a forward of its own, parameters and buffers of its own."""

    gain: Tensor

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)
        self.down, self.up = nn.Parameter(torch.randn(2, inputs)), nn.Parameter(torch.randn(outputs, 2))
        self.register_buffer("gain", torch.ones(outputs))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.gain + input @ self.down.T @ self.up.T


@pytest.mark.parametrize("method", ["forward", "prefill"])
@pytest.mark.parametrize("tensor", ["weight", "down", "up", "gain"])
@pytest.mark.parametrize("projection", ["q_proj", "k_proj", "v_proj", "o_proj"])
def test_a_projection_of_any_class_that_was_left_on_meta_is_named(projection, tensor, method):
    model, x = layer(), torch.randn(2, 5, 16)
    replaced = Adapted(getattr(model, projection).in_features, getattr(model, projection).out_features)
    setattr(model, projection, replaced)
    call = model if method == "forward" else lambda x: model.prefill(x, model.new_cache(2))
    call(x)
    if tensor == "gain":
        replaced.gain = replaced.gain.to("meta")
    else:
        setattr(replaced, tensor, nn.Parameter(getattr(replaced, tensor).to("meta")))
    with pytest.raises(SpecError, match=rf"{projection}\.{tensor}: expected device cpu.*got meta \(ERR-15\)"):
        call(x)


def _normed(module: nn.Linear) -> None:
    nn.utils.parametrizations.weight_norm(module)
    module.get_submodule("parametrizations.weight").to("meta")


def _pruned(module: nn.Linear) -> None:
    torch.nn.utils.prune.l1_unstructured(module, "weight", 0.5)
    module.to("meta")


def _frozen(module: nn.Linear) -> None:
    weight = module.weight.detach().to("meta")
    del module.weight
    module.register_buffer("weight", weight)


def _watched(module: nn.Linear) -> None:
    module.to("meta").register_forward_pre_hook(lambda module, _: None)


@pytest.mark.parametrize("change", [_normed, _pruned, _frozen, _watched])
def test_a_weight_on_meta_is_found_behind_what_makes_or_watches_it(change):
    model, x = layer(), torch.randn(2, 5, 16)
    change(model.k_proj)
    for _ in range(2):
        with pytest.raises(SpecError, match=r"k_proj\.\S*weight\S*: expected device cpu.*got meta \(ERR-15\)"):
            model(x)


@pytest.fixture
def mesh():
    """A device mesh of this process alone."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = torch.distributed.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_distributed_tensors_are_refused_with_advice(mesh, valid_calls, public):
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    from torch.distributed.tensor import Replicate, distribute_tensor

    tensors, attributes = valid_calls["rms_mix"]
    spread = {n: distribute_tensor(x, mesh, [Replicate()]) for n, x in tensors.items()}
    with pytest.raises(Unsupported, match=r"rms_mix: swa is a DTensor.*to_local.*local_map"):
        public("rms_mix", spread, attributes)
    local = public("rms_mix", {n: x.to_local() for n, x in spread.items()}, attributes)[0]
    assert torch.equal(local, public("rms_mix", tensors, attributes)[0])

    x = torch.randn(2, 5, 16)
    model = layer()
    want = model(x)
    fully_shard(model, mesh=mesh)
    with torch.no_grad():
        with pytest.raises(Unsupported, match=r"swa_weight is a DTensor and x is not.*register_fsdp_forward_method"):
            model.prefill(x, model.new_cache(2))
        for method in ("prefill", "step"):
            register_fsdp_forward_method(model, method)
        cache = model.new_cache(2)
        assert torch.equal(model(x), want)
        torch.testing.assert_close(model.prefill(x[:, :4], cache), want[:, :4])
        torch.testing.assert_close(model.step(x[:, 4], cache), want[:, 4])
