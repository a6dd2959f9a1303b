"""The shared validation: what it accepts, what it refuses, with which text, and in which order."""

from __future__ import annotations

import math
from typing import Any, cast

import ml_dtypes
import numpy as np
import pytest
from rattention.spec import UNREAD, SpecError, load, validate

SPEC = load()
SIZES = {"B": 2, "T": 5, "Hq": 6, "Hkv": 3, "H": 3, "D": 8, "D/2": 4, "Dv": 4, "F": 16, "M": 7, "W": 2}


def valid_call(name: str, storage: Any = np.float32) -> tuple[dict[str, Any], dict[str, Any]]:
    """A call of `name` with every optional tensor, window 2."""
    op = SPEC.operations[name]
    dtypes = {"storage": storage, "weight": storage, "float32": np.float32, "int32": np.int32}
    sizes = SIZES | {"Wnext": SIZES["W"]}
    tensors: dict[str, Any] = {t.name: np.zeros([sizes[d] for d in t.shape], dtypes[t.dtype]) for t in op.tensors}
    if "segment_ids" in tensors:
        tensors["segment_ids"][:] = [0, 4, 4, 1, 0]
    attrs: dict[str, Any] = {"window": 2, "head_dim": SIZES["D"]}
    return tensors, {a: attrs[a] for a in attrs if a in op.attribute}


def check(name: str, tensors: dict[str, Any], attrs: dict[str, Any], **kw: Any):
    return validate(name, tensors, attrs, **kw)


def refusal(name: str, tensors: dict[str, Any], attrs: dict[str, Any], **kw: Any) -> SpecError:
    with pytest.raises(SpecError) as info:
        check(name, tensors, attrs, **kw)
    return info.value


def changed(name: str, **changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """A valid call with tensors or attributes replaced, or dropped where the value is None."""
    tensors, attrs = valid_call(name)
    for key, value in changes.items():
        target = attrs if key in SPEC.operations[name].attribute else tensors
        target[key] = value
    return tensors, attrs


# ------------------------------------------------------------------------------------------------ what is accepted


@pytest.mark.parametrize("storage", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", SPEC.operations)
def test_valid_calls_pass_and_outputs_are_described(name: str, storage: Any):
    tensors, attrs = valid_call(name, storage)
    call = check(name, tensors, attrs)
    shapes = call.output_shapes()
    dtypes = call.output_dtypes({n: str(t.dtype) for n, t in tensors.items()})
    assert set(shapes) == set(dtypes) == {o.name for o in call.operation.outputs}
    if call.operation.is_vjp:  # GRAD-6
        for output, shape in shapes.items():
            source = tensors[output.removeprefix("d_")]
            assert shape == source.shape
            assert dtypes[output] == str(source.dtype)
    for attribute in call.operation.attributes:
        if attribute.name not in attrs:
            assert call.attributes[attribute.name] == attribute.default


def test_weights_may_be_float32_beside_16_bit_storage():
    tensors, attrs = valid_call("rattention", np.float16)
    tensors["swa_weight"] = tensors["swa_weight"].astype(np.float32)
    tensors["rope_cos"] = tensors["rope_cos"].astype(np.float32)
    assert check("rattention", tensors, attrs).storage == "float16"


def test_absent_optionals_may_be_none_and_their_gradients_are_not_outputs():
    tensors, attrs = changed("residual_linear_attention.vjp", memory=None, q_scale=None)
    assert set(check("residual_linear_attention.vjp", tensors, attrs).output_shapes()) == {
        "d_q",
        "d_k",
        "d_v",
        "d_k_scale",
        "d_initial_state",
    }


@pytest.mark.parametrize("axis", ["B", "T"])
def test_empty_batch_and_empty_sequence_pass(axis: str):  # ERR-12
    for name, op in SPEC.operations.items():
        tensors, attrs = valid_call(name)
        for t in op.tensors:
            if axis in t.shape:
                tensors[t.name] = np.take(tensors[t.name], [], axis=t.shape.index(axis))
        check(name, tensors, attrs)


@pytest.mark.parametrize("window", [-1, 0, 2, 10**9, np.int64(3), None])
def test_windows_in_the_domain(window: Any):
    tensors, attrs = changed("sliding_window_attention", window=window)
    assert check("sliding_window_attention", tensors, attrs).attributes["window"] == window


@pytest.mark.parametrize("scale", [None, 0, 0.0, -0.5, np.float32(2.0)])
def test_scales_in_the_domain(scale: Any):  # SWA-2: zero and negative ones included
    tensors, attrs = changed("sliding_window_attention", scale=scale)
    check("sliding_window_attention", tensors, attrs)


def test_window_none_takes_any_cache_and_returns_more_slots():  # EXT-10
    tensors, attrs = changed("rattention_extend", window=None)
    call = check("rattention_extend", tensors, attrs)
    assert call.output_shapes()["cache_k"] == (2, SIZES["W"] + SIZES["T"], 3, 8)


def test_negative_window_has_no_slots():  # EXT-10
    tensors, attrs = changed("rattention_extend", window=-1)
    error = refusal("rattention_extend", tensors, attrs)
    assert (error.argument, error.clause) == ("cache_k", "ERR-3")
    for name in ("cache_k", "cache_v"):
        tensors[name] = tensors[name][:, :0]
    check("rattention_extend", tensors, attrs)


def test_float64_storage_only_on_request():
    tensors, attrs = valid_call("rattention")
    wide = {n: t.astype(np.float64) if t.dtype == np.float32 else t for n, t in tensors.items()}
    assert refusal("rattention", wide, attrs).clause == "ERR-4"
    assert check("rattention", wide, attrs, extra_dtypes=("float64",)).storage == "float64"


# ------------------------------------------------------------------------------------------------ what is refused

X = np.zeros
REFUSED = [
    ("feature_map", {"x": None}, "x", "ERR-1", "feature_map: x: expected a tensor [B, T, H, D], got none (ERR-1)"),
    (
        "rms_mix",
        {"rla_wieght": X(3)},
        "rla_wieght",
        "ERR-1",
        "rms_mix: rla_wieght: expected one of the tensors swa, rla, swa_weight, rla_weight, "
        "got an unknown tensor (did you mean rla_weight?) (ERR-1)",
    ),
    (
        "rattention",
        {"memory": X((16, 4), np.float32)},
        "memory",
        "ERR-2",
        "rattention: memory: expected rank 3 [Hq, F, Dv], got rank 2 [16, 4] (ERR-2)",
    ),
    (
        "rattention",
        {"v": X((2, 5, 2, 4), np.float32)},
        "v",
        "ERR-3",
        "rattention: v: expected shape [B=2, T=5, Hkv=3, Dv], got [2, 5, 2, 4] (ERR-3)",
    ),
    (
        "feature_map",
        {"x": X((2, 5, 0, 8), np.float32)},
        "x",
        "ERR-3",
        "feature_map: x: expected H >= 1 in [B, T, H, D], got [2, 5, 0, 8] (ERR-3)",
    ),
    (
        "feature_map",
        {"x": X((2, 5, 1, 8), np.int32)},
        "x",
        "ERR-4",
        "feature_map: x: expected dtype float32 or bfloat16 or float16, got int32 (ERR-4)",
    ),
    (
        "rattention",
        {"v": X((2, 5, 3, 4), np.float16)},
        "v",
        "ERR-4",
        "rattention: v: expected dtype float32, that of k, got float16 (ERR-4)",
    ),
    (
        "rattention",
        {"initial_state": X((2, 3, 16, 4), ml_dtypes.bfloat16)},
        "initial_state",
        "ERR-4",
        "rattention: initial_state: expected dtype float32, got bfloat16 (ERR-4)",
    ),
    (
        "rattention",
        {"window": -2},
        "window",
        "ERR-5",
        "rattention: window: expected an int from -1 to 2^53 - 1, or None, got -2 (ERR-5)",
    ),
    (
        "rope_table",
        {"head_dim": 7},
        "head_dim",
        "ERR-5",
        "rope_table: head_dim: expected an even int >= 2, got 7 (ERR-5)",
    ),
    (
        "rattention",
        {"q": X((2, 5, 4, 8), np.float32), "swa_weight": X((4, 4), np.float32), "rla_weight": X((4, 4), np.float32)}
        | {"memory": None},
        "q",
        "ERR-6",
        "rattention: q: expected a multiple of Hkv=3 query heads, got Hq=4 (ERR-6)",
    ),
    (
        "rattention",
        {"rope_sin": None},
        "rope_sin",
        "ERR-7",
        "rattention: rope_sin: expected a tensor beside rope_cos, got none (ERR-7)",
    ),
    (
        "rattention",
        {"rope_cos": None, "rope_sin": None},
        "positions",
        "ERR-7",
        "rattention: positions: expected rope_cos and rope_sin beside it, got none (ERR-7)",
    ),
    (
        "rattention",
        {"segment_ids": np.array([[1, 1, 2, 2, 0], [0, 3, 3, 0, 3]], np.int32)},
        "segment_ids",
        "ERR-8",
        "rattention: segment_ids: expected equal ids to be contiguous, got id 3 again at [1, 4] (ERR-8)",
    ),
    (
        "rattention",
        {"segment_ids": np.array([[1, 1, -2, 2, 0], [0, 3, 3, 0, 0]], np.int32)},
        "segment_ids",
        "ERR-8",
        "rattention: segment_ids: expected ids >= 0, got -2 at [0, 2] (ERR-8)",
    ),
    (
        "rattention",
        {"positions": np.array([[0, 7, 1, 0, 0], [0, 0, 0, 0, 0]], np.int32)},
        "positions",
        "ERR-9",
        "rattention: positions: expected rows 0 <= positions < M=7, got 7 at [0, 1] (ERR-9)",
    ),
    (
        "sliding_window_attention",
        {
            "positions": None,
            "segment_ids": None,
            "rope_cos": X((4, 4), np.float32),
            "rope_sin": X((4, 4), np.float32),
        },
        "rope_cos",
        "ERR-9",
        "sliding_window_attention: rope_cos: expected a row for each of 5 positions, got M=4 (ERR-9)",
    ),
    (
        "rattention_extend",
        {"lengths": np.array([0, 6], np.int32)},
        "lengths",
        "ERR-10",
        "rattention_extend: lengths: expected 0 <= lengths <= T=5, got 6 at [1] (ERR-10)",
    ),
    (
        "rattention_extend",
        {"window": None, "cache_length": np.array([0, 3], np.int32)},
        "cache_length",
        "ERR-11",
        "rattention_extend: cache_length: expected 0 <= cache_length <= the W=2 slots of the cache, "
        "got 3 at [1] (ERR-11)",
    ),
]


@pytest.mark.parametrize(
    ("name", "changes", "argument", "clause", "text"), REFUSED, ids=[f"{r[3]}-{r[2]}" for r in REFUSED]
)
def test_refusals_and_their_texts(name: str, changes: dict[str, Any], argument: str, clause: str, text: str):
    error = refusal(name, *changed(name, **changes))
    assert str(error) == text
    assert (error.operation, error.argument, error.clause) == (name, argument, clause)
    assert str(error) == f"{name}: {argument}: expected {error.expected}, got {error.got} ({clause})"


def test_every_clause_that_refuses_by_value_or_shape_is_exercised_here():
    refused = {r[3] for r in REFUSED}
    assert refused == {f"ERR-{n}" for n in range(1, 12)}


def test_int32_room_for_new_tokens():  # ERR-11
    top = 2**31 - 1 - SIZES["T"]
    tensors, attrs = changed("rattention_extend", rope_cos=None, rope_sin=None)
    tensors["cache_length"][:] = top
    check("rattention_extend", tensors, attrs)
    tensors["cache_length"][1] = top + 1
    assert refusal("rattention_extend", tensors, attrs).clause == "ERR-11"


@pytest.mark.parametrize(
    ("attribute", "values"),
    [
        ("window", [-2, 3.0, 3.5, True, np.bool_(False), "4", float("nan"), float("inf")]),
        ("scale", [float("inf"), float("nan"), True, "1.0", b"1.0", np.array(True), 1j, 10**400]),
        ("eps", [0, 0.0, -1e-6, float("nan"), float("inf"), None, True, "1e-6", bytearray(b"1e-6")]),
        ("feature_map", ["elu", "Softmax", "", None, 3, b"softmax"]),
    ],
)
def test_attributes_outside_their_domain(attribute: str, values: list[Any]):
    for value in values:
        error = refusal("rattention", *changed("rattention", **{attribute: value}))
        assert (error.argument, error.clause, error.got) == (attribute, "ERR-5", repr(value))


def test_unknown_and_missing_attributes():
    tensors, attrs = valid_call("rattention")
    assert refusal("rattention", tensors, {**attrs, "dropout": 0.1}).argument == "dropout"
    assert refusal("rattention", tensors, {}).got == "no value"


def test_unknown_operation():
    error = refusal("ratention", {}, {})
    assert error.argument == "operation"
    assert error.got == "'ratention'"


def test_padding_may_stand_anywhere_but_inside_a_segment():
    for ids in ([0, 1, 1, 0, 2], [3, 3, 1, 1, 1], [0, 0, 0, 0, 0], [2, 0, 0, 0, 1]):
        check("rattention", *changed("rattention", segment_ids=np.array([ids, ids], np.int32)))


def test_positions_at_padding_are_not_checked():  # ERR-9: live tokens only
    tensors, attrs = valid_call("rattention")
    tensors["positions"][tensors["segment_ids"] == 0] = -5
    check("rattention", tensors, attrs)


def test_default_positions_need_rows_for_the_longest_segment_only():
    short = {n: np.zeros((2, 4), np.float32) for n in ("rope_cos", "rope_sin")}
    tensors, attrs = changed("rattention", positions=None, **short)
    check("rattention", tensors, attrs)  # segments of 2 and 1 tokens
    tensors["segment_ids"][:] = 1
    assert refusal("rattention", tensors, attrs).expected == "a row for each of 5 positions"


def test_positions_wait_for_the_ids_that_say_which_are_live():
    tensors, attrs = valid_call("rattention")
    tensors["positions"][tensors["segment_ids"] == 0] = -5
    call = validate("rattention", tensors, attrs, host={"segment_ids": UNREAD})
    assert call.unread == ("segment_ids",)


def test_table_that_is_too_short_for_its_shapes_needs_no_host_values():
    short = {n: np.zeros((4, 4), np.float32) for n in ("rope_cos", "rope_sin")}
    tensors, attrs = changed("rattention", positions=None, segment_ids=None, **short)
    with pytest.raises(SpecError, match=r"a row for each of 5 positions, got M=4 \(ERR-9\)"):
        validate("rattention", tensors, attrs, host=UNREAD)


def test_cached_rows_need_positions_up_to_their_new_length():
    tensors, attrs = valid_call("rattention_extend")
    tensors["cache_length"][:] = [3, 100]
    tensors["lengths"][:] = [4, 0]  # the long row has no new token, so it needs no row of the table
    check("rattention_extend", tensors, attrs)
    tensors["lengths"][:] = [5, 0]
    assert refusal("rattention_extend", tensors, attrs).got == "M=7"


def test_rows_that_are_needed_wait_for_the_lengths_that_say_so():
    tensors, attrs = valid_call("rattention_extend")
    tensors["cache_length"][:] = [3, 100]
    tensors["lengths"][:] = [4, 0]
    validate("rattention_extend", tensors, attrs, host={"lengths": UNREAD})


class Elsewhere:
    """An array of a library whose values are not on the host."""

    def __init__(self, x: np.ndarray):
        self.shape, self.dtype = x.shape, x.dtype


def spoilt() -> tuple[dict[str, Any], dict[str, Any]]:
    """A call whose values break ERR-8 and ERR-9."""
    tensors, attrs = valid_call("rattention")
    tensors["segment_ids"][:] = -1
    tensors["positions"][:] = 1000
    return tensors, attrs


def test_values_of_numpy_arrays_are_looked_at_without_being_asked():  # ERR-8
    with pytest.raises(SpecError, match=r"segment_ids: expected ids >= 0, got -1 at \[0, 0\] \(ERR-8\)"):
        validate("rattention", *spoilt())


def test_what_was_not_looked_at_is_said_and_named():
    call = validate("rattention", *spoilt(), host=UNREAD)
    assert call.unread == ("positions", "segment_ids")
    assert validate("rattention", *valid_call("rattention")).unread == ()


def test_values_elsewhere_must_be_passed_or_given_up_in_words():
    tensors, attrs = spoilt()
    ids = tensors["segment_ids"]
    tensors |= {name: Elsewhere(tensors[name]) for name in ("positions", "segment_ids")}
    with pytest.raises(TypeError, match=r"the values of positions are needed, and it is a .*Elsewhere: .*UNREAD"):
        validate("rattention", tensors, attrs)
    with pytest.raises(TypeError, match="the values of segment_ids are needed"):
        validate("rattention", tensors, attrs, host={"positions": UNREAD})
    with pytest.raises(TypeError, match=r"the values of positions are needed, and it is a builtins\.NoneType"):
        validate("rattention", tensors, attrs, host=cast(Any, {"positions": None, "segment_ids": UNREAD}))
    with pytest.raises(SpecError, match="ERR-8"):
        validate("rattention", tensors, attrs, host={"positions": UNREAD, "segment_ids": ids})
    assert validate("rattention", tensors, attrs, host=UNREAD).unread == ("positions", "segment_ids")


def test_any_position_can_be_tabulated():
    validate("rope_table", {"positions": Elsewhere(np.zeros(3, np.int32))}, {"head_dim": 4})


# ------------------------------------------------------------------------------------------------ order


def test_order_of_the_checks():
    """Faults of every stage at once; each repair uncovers the next, in the order of chapter 11."""
    tensors, attrs = valid_call("rattention")
    good = dict(tensors)
    tensors["mask"] = np.zeros(1)
    del tensors["v"]
    attrs["dropout"] = 0.0
    attrs["window"] = -5
    tensors["q"] = good["q"][0]
    tensors["k"] = good["k"].astype(np.int32)
    tensors["memory"] = good["memory"].astype(np.float16)
    tensors["rla_weight"] = good["rla_weight"][:, :3]
    tensors["rope_sin"] = None
    tensors["segment_ids"] = good["segment_ids"] - 9

    def expect(clause: str, argument: str) -> None:
        error = refusal("rattention", tensors, attrs)
        assert (error.clause, error.argument) == (clause, argument)

    expect("ERR-1", "mask")
    del tensors["mask"]
    expect("ERR-1", "v")
    tensors["v"] = good["v"]
    expect("ERR-5", "dropout")
    del attrs["dropout"]
    expect("ERR-5", "window")
    attrs["window"] = 2
    expect("ERR-2", "q")
    tensors["q"] = good["q"]
    expect("ERR-4", "k")
    tensors["k"] = good["k"]
    expect("ERR-4", "memory")
    tensors["memory"] = good["memory"]
    expect("ERR-3", "rla_weight")
    tensors["rla_weight"] = good["rla_weight"]
    expect("ERR-7", "rope_sin")
    tensors["rope_sin"] = good["rope_sin"]
    expect("ERR-8", "segment_ids")
    tensors["segment_ids"] = good["segment_ids"]
    check("rattention", tensors, attrs)


# ------------------------------------------------------------------------------------------------ floats

FLOAT32 = np.finfo(np.float32)


@pytest.mark.parametrize(
    "value", [0, 0.0, -0.0, 1, float(FLOAT32.max), -float(FLOAT32.max), float(FLOAT32.tiny), 3.4028235e38]
)
def test_a_scale_that_float32_holds(value):  # ERR-5
    tensors, attrs = valid_call("rattention")
    assert validate("rattention", tensors, attrs | {"scale": value}).attributes["scale"] == value


@pytest.mark.parametrize(
    "value", [1e39, -1e39, 3.4028236e38, 2.0**-127, -1e-50, 5e-324, 10**400, math.inf, -math.inf, math.nan]
)
def test_a_scale_that_float32_does_not_hold(value):  # ERR-5
    tensors, attrs = valid_call("rattention")
    error = refusal("rattention", tensors, attrs | {"scale": value})
    assert (error.argument, error.clause) == ("scale", "ERR-5")
    assert error.expected == "0, a float in the normal range of float32, or None"


@pytest.mark.parametrize(("op", "name"), [("rms_mix", "eps"), ("rope_table", "theta")])
@pytest.mark.parametrize("value", [1e39, 1e-50, 1e-40, 0.0, -1.0])
def test_eps_and_theta_are_positive_in_float32_too(op, name, value):  # ERR-5
    tensors, attrs = valid_call(op)
    error = refusal(op, tensors, attrs | {name: value})
    assert (error.argument, error.expected) == (name, "a float > 0 in the normal range of float32")


def test_what_is_held_is_what_float32_rounds_to_a_normal_number():  # ERR-5
    tensors, attrs = valid_call("rattention")
    top = 2.0**128 - 2.0**103  # halfway between the largest float32 and the next power of two
    for value in (np.nextafter(top, 0), top, FLOAT32.tiny, np.nextafter(float(FLOAT32.tiny), 0)):
        with np.errstate(over="ignore"):
            held = bool(np.isfinite(np.float32(value))) and value >= FLOAT32.tiny
        try:
            validate("rattention", tensors, attrs | {"scale": float(value)})
            taken = True
        except SpecError:
            taken = False
        assert taken == held, value
