"""Gradients of the Pallas kernels at great scores, whose sums round otherwise in each kernel."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from rattention.jax.pallas import Config, ops, softmax
from rattention.spec import validate

budget = pytest.importorskip("rattention.numpy.budget", reason="the reference's error budget is not built")


@pytest.fixture
def any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores add their channels in an order of its own for each product of tiles."""
    rng = np.random.default_rng(11)
    plain = softmax.dot

    def dot(p: Any, a: Any, b: Any, contract: tuple[int, int] = (1, 0)) -> Any:
        if contract == (1, 1):
            order = rng.permutation(a.shape[1]).tolist()
            a, b = (jnp.concatenate([x[:, j : j + 1] for j in order], axis=1) for x in (a, b))
        return plain(p, a, b, contract)

    monkeypatch.setattr(softmax, "dot", dot)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("window", [0, 7, None], ids=str)
def test_gradients_at_great_scores_in_any_order_of_sums(window: int | None, dtype: str, any_order: None) -> None:
    """SWA-3, GRAD-1: weights of the backward sum to 1 however its scores are rounded. The last window has tiles that
    are looped over."""
    rng = np.random.default_rng(3)
    T, Hq, D, Dv = 18, 1, 16, 8
    storage = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}[dtype]

    def great() -> np.ndarray:
        return rng.uniform(0.5, 1, (1, T, Hq, D)) * rng.choice([-1e15, 1e15], (1, T, Hq, D))

    tensors = {name: great().astype(storage) for name in ("q", "k")}
    tensors |= {name: rng.standard_normal((1, T, Hq, Dv)).astype(storage) for name in ("v", "d_out")}
    tensors |= {name: rng.standard_normal((Hq, Dv)).astype(np.float32) for name in ("swa_weight", "rla_weight")}
    attrs = {"window": window}
    expected = budget.evaluate("rattention.vjp", tensors, attrs)

    given = {name: jnp.asarray(x) for name, x in tensors.items()}
    d_out = given.pop("d_out")
    call = validate("rattention", given, attrs)
    settings = Config(chunk=4, blocks=1, heads=1, backward_heads=1, tiles=2)
    _, pull = jax.vjp(lambda x: ops.run(call, x, settings=settings, interpret=True)["out"], given)
    (found,) = pull(d_out)
    for name, (value, allowed) in expected.items():
        x = np.asarray(found[name.removeprefix("d_")]).astype(np.float64)
        wrong = ~((np.abs(x - value) <= allowed) | np.isinf(allowed)) | np.isnan(x)
        assert not wrong.any(), f"{name}: {wrong.sum()} of {wrong.size}, first {np.argwhere(wrong)[0]}: {x[wrong][0]}"
