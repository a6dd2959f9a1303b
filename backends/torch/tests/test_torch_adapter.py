"""The adapter: every operation and `.vjp`, each storage dtype, refusals, inert values, no aliasing."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from rattention.spec import SpecError, load
from rattention.torch.adapter import backend

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
B, T, HQ, HKV, D, DV, W = 3, 21, 4, 2, 6, 5, 4
SIZES = {"B": B, "T": T, "Hq": HQ, "Hkv": HKV, "H": HQ, "D": D, "D/2": D // 2, "Dv": DV, "F": 2 * D, "W": W, "M": 40}
ATTRS = {"window": W, "head_dim": D}


def example(op: str, dtype: str, seed: int = 0) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """A call with every tensor of `op`, cotangents included."""
    rng = np.random.default_rng(seed)
    spec = load().operations[op]
    t: dict[str, np.ndarray] = {}
    for x in spec.tensors:
        shape = tuple(SIZES[d] if d != "Wnext" else W for d in x.shape)
        wide = dtype if x.dtype == "storage" else "float32"
        t[x.name] = rng.normal(0.2, 1.0, shape).astype(DTYPES[wide])
    ids = np.zeros((B, T), np.int32)
    ids[0], ids[1, 3:9], ids[1, 9:], ids[2, 2:8] = 7, 1, 2, 5
    integers = {
        "segment_ids": ids,
        "positions": rng.integers(0, 40, t["positions"].shape).astype(np.int32) if "positions" in t else None,
        "cache_length": np.array([0, 2, 19], np.int32),
        "lengths": np.array([T, 0, 5], np.int32),
    }
    t |= {k: x for k, x in integers.items() if k in t and x is not None}
    return t, {k: x for k, x in ATTRS.items() if k in spec.attribute}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", list(load().operations))
def test_shapes_and_dtypes_are_those_of_the_contract(op, dtype):  # BCK-2, GRAD-6
    t, attrs = example(op, dtype)
    before = {k: x.copy() for k, x in t.items()}
    for x in t.values():
        x.flags.writeable = False
    got = backend.run(op, t, attrs)
    spec = load().operations[op]
    assert list(got) == [o.name for o in spec.outputs]
    for o in spec.outputs:
        owner = t.get(o.name.removeprefix("d_")) if spec.is_vjp else None
        want = owner.dtype if owner is not None else DTYPES.get(dtype if o.dtype == "storage" else o.dtype, np.int32)
        assert got[o.name].dtype == want, o.name
        if owner is not None:
            assert got[o.name].shape == owner.shape, o.name
        assert not any(np.shares_memory(got[o.name], x) for x in t.values())
        got[o.name].fill(0)
    for k, x in before.items():
        np.testing.assert_array_equal(x.view(np.uint8), t[k].view(np.uint8))
    assert got.metadata == {"path": "eager", "kernels": []}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("op", list(load().operations))
def test_16_bit_storage_is_the_float32_result_rounded_once(op, dtype):  # FM-4, RAT-3, GRAD-3, NUM-3
    t, attrs = example(op, dtype)
    wide = {k: x.astype(np.float32) if x.dtype == DTYPES[dtype] else x for k, x in t.items()}
    narrow, full = backend.run(op, t, attrs), backend.run(op, wide, attrs)
    for k, x in narrow.items():
        np.testing.assert_array_equal(x.astype(np.float32), full[k].astype(x.dtype).astype(np.float32), err_msg=k)


def poison(op: str, t: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """NaN and inf in all that is inert: padding, tokens past lengths, unused slots, and their cotangents."""
    t = {k: x.copy() for k, x in t.items()}
    for name, x in t.items():
        owner = name.removeprefix("d_")
        if owner in ("q", "k", "v", "out", "swa", "rla") and "segment_ids" in t:
            x[t["segment_ids"] == 0] = np.nan
        if owner in ("q", "k", "v", "out") and "lengths" in t:
            x[np.arange(T) >= t["lengths"][:, None]] = np.inf
        if name in ("cache_k", "cache_v"):
            x[np.arange(W) < W - t["cache_length"][:, None]] = np.nan
        if name in ("d_cache_k", "d_cache_v"):
            x[np.arange(W) < W - (t["cache_length"] + t["lengths"])[:, None]] = np.nan
        if name == "positions" and "segment_ids" in t:
            x[t["segment_ids"] == 0] = 2**31 - 1
    return t


@pytest.mark.parametrize("op", [op for op in load().operations if op.split(".")[0] not in ("rope_table", "rms_mix")])
def test_inert_tokens_and_slots_change_nothing_whatever_they_hold(op):  # SEG-5, EXT-7, EXT-9, GRAD-5
    t, attrs = example(op, "float32")
    clean, poisoned = backend.run(op, t, attrs), backend.run(op, poison(op, t), attrs)
    for k, x in clean.items():
        np.testing.assert_array_equal(poisoned[k], x, err_msg=k)
    for k, x in clean.items():
        if "segment_ids" in t and k.removeprefix("d_") in ("out", "q", "k", "v"):
            assert not x[t["segment_ids"] == 0].any(), k
        if "lengths" in t and k.removeprefix("d_") in ("out", "q", "k", "v"):
            assert not x[np.arange(T) >= t["lengths"][:, None]].any(), k


def test_absent_cotangents_are_zero_and_absent_inputs_have_no_gradient():  # GRAD-6
    t, attrs = example("rattention.vjp", "float32")
    zero = backend.run("rattention.vjp", t | {"d_final_state": np.zeros_like(t["d_final_state"])}, attrs)
    del t["d_final_state"]
    for k, x in backend.run("rattention.vjp", t, attrs).items():
        np.testing.assert_array_equal(x, zero[k])
    for name in ("memory", "initial_state", "q_scale"):
        del t[name]
    assert not {"d_memory", "d_initial_state", "d_q_scale"} & set(backend.run("rattention.vjp", t, attrs))


@pytest.mark.parametrize("op", ["rattention", "rattention.vjp", "rattention_extend", "rattention_extend.vjp"])
@pytest.mark.parametrize("empty", ["B", "T"])
@pytest.mark.parametrize("window", [-1, 0, W, 1000, None])
def test_empty_batches_and_sequences(op, empty, window):  # ERR-12
    t, attrs = example(op, "float32")
    spec = load().operations[op]
    slots = {"W": W if window is None else max(window, 0)}
    slots["Wnext"] = slots["W"] if window is not None else slots["W"] + (0 if empty == "T" else T)
    sizes = SIZES | slots | {empty: 0}
    for x in spec.tensors:
        full = np.resize(t[x.name], tuple(sizes[d] for d in x.shape))
        t[x.name] = full if x.dtype != "int32" else np.zeros_like(full)
    got = backend.run(op, t, attrs | {"window": window})
    for o in spec.outputs:
        assert got[o.name].shape == tuple(sizes[d] for d in o.shape), o.name
    if op == "rattention" and empty == "T":
        np.testing.assert_array_equal(got["final_state"], t["initial_state"])
    if op == "rattention_extend" and empty == "T":
        np.testing.assert_array_equal(got["cache_state"], t["cache_state"])


def test_a_refusal_is_the_error_of_the_shared_validation():  # BCK-5
    t, attrs = example("rattention", "float32")
    with pytest.raises(SpecError, match=r"window: expected an int from -1 to 2\^53 - 1, or None, got -2 \(ERR-5\)"):
        backend.run("rattention", t, attrs | {"window": -2})
    with pytest.raises(SpecError, match="ERR-8"):
        backend.run("rattention", t | {"segment_ids": np.tile(np.array([1, 2, 1], np.int32), (B, T // 3))}, attrs)


def test_the_torch_backend_needs_no_other_framework():
    code = (
        "import sys\n"
        "for name in ('jax', 'jaxlib', 'flax', 'rattention.numpy', 'rattention.jax', 'rattention.conformance'):\n"
        "    sys.modules[name] = None\n"
        "import rattention.torch, rattention.torch.nn, rattention.torch.adapter as a\n"
        "import numpy as np\n"
        "print(a.backend.run('feature_map', {'x': np.ones((1, 1, 1, 2), np.float32)}, {})['out'].tolist())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=_env(), check=False)
    assert done.stdout.strip() == "[[[[0.5, 0.5, 0.5, 0.5]]]]", done.stderr


def _env() -> dict[str, str]:
    import os

    return os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
