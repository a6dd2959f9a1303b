"""The analytic vjp against central differences in float64, for every differentiable input of every operation (GRAD-1).

One random direction per input: the slope of <cotangents, outputs> along it must equal <gradient, direction>. Inert
tokens and slots are moved too, so a gradient that ignores or invents them is found (GRAD-5).
"""

from __future__ import annotations

import numpy as np
import pytest
from rattention.numpy import quadratic, recurrent
from rattention.spec import load

STEP = 1e-5
CASES = 25

VJPS = [name for name in load().operations if name.endswith(".vjp")]


@pytest.mark.parametrize("op", VJPS)
def test_vjp_equals_central_differences(op, draw_call):
    rng = np.random.default_rng(abs(hash_of(op)))
    base = load().operations[op.removesuffix(".vjp")]
    checked = set()
    for case in range(CASES):
        call = draw_call(rng, op, options=0.7)
        inputs = {n: x for n, x in call.tensors.items() if n in base.tensor}
        cotangents = {n.removeprefix("d_"): x for n, x in call.tensors.items() if n not in base.tensor}
        gradients = quadratic.run(op, call.tensors, call.attrs)

        def inner(tensors, cotangents=cotangents, call=call):
            outputs = quadratic.run(base.name, tensors, call.attrs)
            return sum(float(np.sum(outputs[n] * c)) for n, c in cotangents.items())

        scale = max([1.0] + [float(np.abs(g).sum()) for g in gradients.values()])
        for t in base.tensors:
            if not t.differentiable or t.name not in inputs or not inputs[t.name].size:
                continue
            x = inputs[t.name]
            direction = rng.choice([-1.0, 1.0], x.shape)
            # Fourth-order central difference: the step may stay large, so that cancellation costs little.
            f = [inner({**inputs, t.name: x + s * STEP * direction}) for s in (2, 1, -1, -2)]
            slope = (-f[0] + 8 * f[1] - 8 * f[2] + f[3]) / (12 * STEP)
            exact = float(np.sum(gradients[f"d_{t.name}"] * direction))
            assert abs(slope - exact) < 1e-7 * scale, (case, t.name, slope, exact, call.attrs)
            checked.add(t.name)
    assert checked == {t.name for t in base.tensors if t.differentiable}


def hash_of(name: str) -> int:
    """A seed that does not depend on the interpreter's hash seed."""
    return int.from_bytes(name.encode()[:8].ljust(8), "little") % 2**31


@pytest.mark.parametrize("form", [quadratic.run, recurrent.run])
def test_relu_has_slope_zero_at_zero(form):
    """FM-6, in both halves of the map."""
    x = np.array([[[[0.0, 1.0, -1.0]]]])
    d = np.arange(1.0, 7.0).reshape(1, 1, 1, 6)
    out = form("feature_map.vjp", {"x": x, "d_out": d}, {"feature_map": "relu"})["d_x"]
    np.testing.assert_array_equal(out, [[[[0.0, 2.0, -6.0]]]])


@pytest.mark.parametrize("form", [quadratic.run, recurrent.run])
def test_gradients_of_a_row_of_zeros_are_finite(form):
    """MIX-3: a token with nothing behind its window enters the norm as zeros."""
    rng = np.random.default_rng(3)
    swa, d_out = rng.standard_normal((2, 1, 2, 1, 4))
    zero, weight = np.zeros((1, 2, 1, 4)), np.ones((1, 4))
    tensors = {"swa": swa, "rla": zero, "swa_weight": weight, "rla_weight": weight, "d_out": d_out}
    out = form("rms_mix.vjp", tensors, {"eps": 1e-6})
    np.testing.assert_allclose(out["d_rla"], d_out / 1e-3, rtol=1e-14)
    np.testing.assert_array_equal(out["d_rla_weight"], 0)
