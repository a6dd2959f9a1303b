"""The Triton kernels where numbers are hard: great scores, sums in another order, positions without a table row."""

import os
from typing import Any

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from rattention.numpy import budget
from rattention.torch.triton import Ring, operators, step
from rattention.torch.triton.tiles import INTERPRET
from rattention.torch.triton_adapter import backend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
interpreted = pytest.mark.skipif(
    not INTERPRET.value, reason="a GPU fixes the order of its sums; the interpreter's is ours"
)


@pytest.fixture
def any_order(monkeypatch):
    """Each matrix product of the interpreter adds its terms one by one, in an order of its own."""
    from triton.runtime import interpreter

    rng = np.random.default_rng(11)

    def dot(self, a, b, d, precision, imprecise):
        total = np.zeros(d.data.shape, np.float32)
        for j in rng.permutation(a.data.shape[-1]):
            total = total + a.data[..., :, j, None].astype(np.float32) * b.data[..., None, j, :].astype(np.float32)
        return interpreter.TensorHandle(total + d.data, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)


def great(op: str, dtype: Any, size: float, window: int | None, T: int = 17, D: int = 12) -> dict[str, np.ndarray]:
    """A call whose scores are of the order of size^2."""
    rng = np.random.default_rng(3)
    B, Hq, Hkv, Dv, W = 2, 4, 2, 8, 5 if window is None else window
    t = {
        "q": rng.uniform(0.5, 1, (B, T, Hq, D)) * rng.choice([-size, size], (B, T, Hq, D)),
        "k": rng.uniform(0.5, 1, (B, T, Hkv, D)) * rng.choice([-size, size], (B, T, Hkv, D)),
        "v": rng.standard_normal((B, T, Hkv, Dv)),
        "d_out": rng.standard_normal((B, T, Hq, Dv)),
    }
    if op.startswith("rattention_extend"):
        t["cache_k"] = rng.uniform(0.5, 1, (B, W, Hkv, D)) * rng.choice([-size, size], (B, W, Hkv, D))
        t["cache_v"] = rng.standard_normal((B, W, Hkv, Dv))
    t = {name: x.astype(dtype) for name, x in t.items()}
    if op.startswith("rattention"):
        t["swa_weight"], t["rla_weight"] = (rng.standard_normal((Hq, Dv)).astype(np.float32) for _ in range(2))
    if "cache_k" in t:
        t["cache_state"] = rng.standard_normal((B, Hkv, 2 * D, Dv)).astype(np.float32)
        t["cache_length"] = np.array([3, W], np.int32)
        for name in ("cache_k", "cache_v"):
            t[name][0, : max(W - 3, 0)] = 0
    return t


@interpreted
@pytest.mark.parametrize(("dtype", "size"), [(np.float32, 1e15), (np.float16, 6e4)], ids=["float32", "float16"])
@pytest.mark.parametrize("window", [0, 4, None])
@pytest.mark.parametrize("op", ["sliding_window_attention", "rattention", "rattention_extend"])
def test_gradients_at_great_scores_in_any_order_of_sums(op, window, dtype, size, any_order):
    """SWA-3, GRAD-1: weights of the backward kernels are at most 1 and sum to 1, however their scores are rounded."""
    op = f"{op}.vjp"
    tensors = great(op, dtype, size, window)
    got = backend.run(op, tensors, {"window": window})
    for name, (value, allowed) in budget.evaluate(op, tensors, {"window": window}).items():
        x = got[name].astype(np.float64)
        wrong = ~((np.abs(x - value) <= allowed) | np.isinf(allowed)) | np.isnan(x)
        assert not wrong.any(), f"{name}: {wrong.sum()} of {wrong.size}, first {np.argwhere(wrong)[0]}: {x[wrong][0]}"


@pytest.mark.parametrize("mode", ["soft", "mix"])
@pytest.mark.parametrize("towards", [-np.inf, np.inf], ids=["below", "above"])
def test_a_saved_sum_that_is_a_rounding_off(mode, towards):
    """SWA-3: one unit in the last place of a log-sum-exp of 1e30 is more than any exponent holds."""
    t = {n: torch.from_numpy(x).to(DEVICE) for n, x in great("rattention.vjp", np.float32, 1e15, None).items()}
    weights = (None, None) if mode == "soft" else (t["swa_weight"], t["rla_weight"])
    tensors: tuple[Any, ...] = (t["q"], t["k"], t["v"], *weights, *[None] * 8)
    rest: tuple[Any, ...] = (None, None, "softmax", 1e-6, mode, False)
    _, _, stats = operators.attention(*tensors, *rest)
    stats[0] = torch.nextafter(stats[0], torch.tensor(towards, dtype=torch.float32, device=DEVICE))
    dq, dk, dv, *_ = operators.attention_grad(*tensors, stats, t["d_out"], None, *rest)
    assert dq.isfinite().all()
    assert dk.isfinite().all()
    if mode == "soft":  # a sum of cotangents with weights of at most 1
        most = t["d_out"].abs().sum(1).unflatten(1, (2, 2)).sum(2)
        assert (dv.abs() <= most[:, None] * (1 + 1e-5)).all()


# ------------------------------------------------------------------------------------------ positions without a row


def table(rows: int, D: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.arange(rows, device=DEVICE)[:, None] * 0.3 ** torch.arange(D // 2, device=DEVICE)
    return angle.cos(), angle.sin()


def inputs(B: int, T: int, Hq: int = 2, Hkv: int = 1, D: int = 8) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(5)
    shapes = {"q": (B, T, Hq, D), "k": (B, T, Hkv, D), "v": (B, T, Hkv, D), "swa": (Hq, D), "rla": (Hq, D)}
    return {n: torch.randn(s, generator=g).to(DEVICE).requires_grad_() for n, s in shapes.items()}


def attend(x: dict[str, torch.Tensor], rows: int, positions=None, ids=None, window: int | None = 4) -> torch.Tensor:
    return operators.attention(
        x["q"], x["k"], x["v"], x["swa"], x["rla"], *table(rows), positions, ids, None, None, None, None,
        window, None, "softmax", 1e-6, "mix", False,
    )[0]  # fmt: skip


@pytest.mark.parametrize("bad", [20, 10**6, 2**31 - 1, -1, -(2**31)])
@pytest.mark.parametrize("window", [0, 4, None])
def test_a_position_without_a_row_gives_nan(window, bad):
    """ERR-16: NaN in the token's output and in each that reads its key; the other batch row and padding stay."""
    B, T, at = 2, 12, 5
    x = inputs(B, T)
    positions = torch.arange(T, dtype=torch.int32, device=DEVICE).repeat(B, 1)
    positions[0, at] = bad
    ids = torch.ones(B, T, dtype=torch.int32, device=DEVICE)
    ids[:, -2:] = 0
    positions[:, -2:] = bad  # of padding: nobody reads it
    out = attend(x, 20, positions, ids, window)
    readers = torch.arange(T, device=DEVICE)
    reads = (readers >= at) & (readers - at <= (T if window is None else window)) & (readers < T - 2)
    nan = out.isnan()
    assert nan[0, reads].all()
    assert not nan[0, :at].any()
    assert not nan[1].any()
    assert not out[:, -2:].any()
    out.backward(torch.ones_like(out))
    for name in ("q", "k", "v"):
        d = x[name].grad
        assert d is not None
        assert d[0, at].isnan().any() or name == "v"
        assert not d[1].isnan().any()
        assert not d[:, -2:].any(), "padding has gradient 0 (GRAD-5)"


@pytest.mark.parametrize("packed", [False, True])
def test_a_table_shorter_than_the_sequence_gives_nan(packed):
    """ERR-16 for positions that are the index of a token."""
    T, rows = 12, 5
    ids = torch.tensor([[3] * 4 + [2] * 8], dtype=torch.int32, device=DEVICE) if packed else None
    nan = attend(inputs(1, T), rows, None, ids, window=2).isnan().all(-1).all(-1)[0]
    index = torch.arange(T, device=DEVICE)
    own = torch.where(index < 4, index, index - 4) if packed else index
    assert torch.equal(nan, own >= rows)


def held(B: int, W: int, D: int = 8) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(6)
    return {
        "k": torch.randn(B, W, 1, D, generator=g).to(DEVICE),
        "v": torch.randn(B, W, 1, D, generator=g).to(DEVICE),
        "state": torch.randn(B, 1, 2 * D, D, generator=g).to(DEVICE),
        "length": torch.tensor([4, 9], dtype=torch.int32, device=DEVICE),
    }


@pytest.mark.parametrize("T", [1, 3])
def test_extend_past_the_table_gives_nan(T):
    """ERR-16: the rows of a batch are of different ages; a row without new tokens is exactly 0."""
    x, c, W = inputs(2, T), held(2, 4), 4
    run = lambda rows, lengths: operators.extend(  # noqa: E731
        x["q"], x["k"], x["v"], x["swa"], x["rla"], c["k"], c["v"], c["state"], c["length"], lengths, *table(rows),
        None, None, None, W, None, "softmax", 1e-6, False,
    )  # fmt: skip
    out, _, _, state, _ = run(9, None)
    assert not out[0].isnan().any()
    assert out[1].isnan().all()
    assert not state.isnan().any(), "the state holds unrotated keys"
    out, *_ = run(9, torch.tensor([T, 0], dtype=torch.int32, device=DEVICE))
    assert not out[0].isnan().any()
    assert not out[1].any()


def test_a_ring_past_its_table_gives_nan():
    """ERR-16 in place: NaN from the first position without a row on, and 0 for a row that waits."""
    x, c, W = inputs(2, 1), held(2, 4), 4
    ring = Ring.from_canonical(c["k"], c["v"], c["state"], c["length"])
    cos, sin = table(10)
    found = []
    with torch.no_grad():
        for active in ((1, 1), (1, 1), (1, 0)):
            out = step(
                ring, x["q"], x["k"], x["v"], x["swa"], x["rla"], window=W, rope_cos=cos, rope_sin=sin,
                active=torch.tensor(active, dtype=torch.int32, device=DEVICE),
            )  # fmt: skip
            found.append(out)
    assert [y.isnan().all(-1).all(-1)[:, 0].tolist() for y in found] == [[False, False], [False, True], [False, False]]
    assert not found[2][1].any()


def test_vmap_and_compile_keep_the_nan():
    """ERR-16 where the values of positions cannot be looked at."""
    x = {n: t.detach() for n, t in inputs(1, 6).items()}
    positions = torch.tensor([[0, 1, 2, 30, 4, 5]], dtype=torch.int32, device=DEVICE)
    run = torch.compile(lambda p: attend(x, 6, p, window=1), backend="aot_eager", fullgraph=True)
    assert run(positions).isnan().all(-1).all(-1)[0].tolist() == [False, False, False, True, True, False]
