"""The quadratic and the recurrent form are two independent derivations of one semantics: they must agree.

The error of an output element is measured against the scale of its output: the largest absolute value in that output's
batch of the call, or 1 where that is larger. In float64 both forms lose about 1e-15 of it.
"""

from __future__ import annotations

import numpy as np
import pytest
from rattention.numpy import quadratic, recurrent

CASES_PER_GROUP = 100
GROUPS = 20


def disagreement(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    """Largest difference between two results, relative to the scale of each output."""
    assert one.keys() == other.keys()
    worst = 0.0
    for name, a in one.items():
        b = other[name]
        assert a.shape == b.shape, name
        assert a.dtype == b.dtype, name
        if a.size:
            assert np.isfinite(a).all(), name
            worst = max(worst, float(np.abs(a - b).max() / max(1.0, np.abs(a).max())))
    return worst


@pytest.mark.parametrize("group", range(GROUPS))
def test_both_forms_agree_on_random_calls(group, draw_call, operations):
    """2,000 calls over every operation and vjp: window from -1 to None, G 1 to 8, Dv != D, ragged segments, caches."""
    rng = np.random.default_rng([2506, 15545, group])
    for case in range(CASES_PER_GROUP):
        call = draw_call(rng, operations[(group * CASES_PER_GROUP + case) % len(operations)])
        error = disagreement(
            quadratic.run(call.op, call.tensors, call.attrs), recurrent.run(call.op, call.tensors, call.attrs)
        )
        assert error < 1e-12, (group, case, call.op, call.attrs, {n: t.shape for n, t in call.tensors.items()})
