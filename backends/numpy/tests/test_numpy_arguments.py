"""The reference takes NumPy arrays and nothing else: no list is converted and no mask is dropped (ERR-14)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from rattention import numpy as reference
from rattention.spec import SpecError


def tensors() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    x = {name: rng.standard_normal((2, 6, 2, 4)).astype(np.float32) for name in ("q", "k", "v")}
    return x | {name: np.ones((2, 4), np.float32) for name in ("swa_weight", "rla_weight")}


class Foreign:
    """An array of another library: it has a shape and a dtype, and NumPy could convert it."""

    def __init__(self, x: np.ndarray):
        self.shape, self.dtype, self.x = x.shape, x.dtype, x

    def __array__(self, *args: Any, **options: Any) -> np.ndarray:
        return self.x


@pytest.mark.parametrize("name", ["q", "k", "v", "swa_weight", "rla_weight"])
@pytest.mark.parametrize(
    ("spoil", "got"),
    [
        (np.ndarray.tolist, "builtins.list"),
        (lambda x: np.ma.masked_less(x, 0.5), "numpy.ma.MaskedArray"),
        (Foreign, "Foreign"),
    ],
    ids=["list", "masked array", "foreign array"],
)
def test_refused_by_name(name: str, spoil: Any, got: str):
    given = tensors()
    given[name] = spoil(given[name])
    with pytest.raises(SpecError, match=rf"^rattention: {name}: expected a numpy.ndarray, got .*{got} \(ERR-14\)$"):
        reference.rattention(**given, window=2)


def test_a_masked_array_of_ids_is_refused():
    ids = np.ma.ones((2, 6), np.int32)
    with pytest.raises(SpecError, match=r"segment_ids: expected a numpy\.ndarray"):
        reference.rattention(**tensors(), segment_ids=ids, window=2)


def test_a_subclass_computes_as_a_plain_array_does():
    """`*` of a numpy.matrix is a matrix product; the reference must not inherit that."""
    given = tensors()
    plain = reference.rattention(**given, window=2)
    given |= {name: given[name].view(np.matrix) for name in ("swa_weight", "rla_weight")}
    got = reference.rattention(**given, window=2)
    assert type(got) is np.ndarray
    np.testing.assert_array_equal(got, plain)
