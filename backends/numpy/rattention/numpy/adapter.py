"""The backend `numpy`: the recurrent form in float64, each output rounded once to its dtype."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from rattention.numpy import recurrent
from rattention.numpy.storage import round_once
from rattention.spec import Result, dtype_name, load, validate


class NumpyBackend:
    """See `rattention.spec.Backend`."""

    def describe(self) -> dict[str, Any]:
        spec = load()
        return {
            "name": "numpy",
            "version": np.__version__,
            "spec_version": spec.version,
            "operations": list(spec.operations),
            "dtypes": list(spec.storage_dtypes),
            "capabilities": list(spec.capabilities),
            "tile_sizes": {"T": [], "window": [], "D": []},
            "limits": {},
        }

    def run(self, op: str, tensors: Mapping[str, np.ndarray], attrs: Mapping[str, Any]) -> Result:
        """Run one operation, or its `.vjp`.

        Raises:
            SpecError: the call is invalid; float64 tensors are (ERR-4).
        """
        call = validate(op, tensors, attrs, array=("a numpy.ndarray", np.ndarray))
        given = {name: np.asarray(x) for name, x in tensors.items() if x is not None}
        dtypes = call.output_dtypes({name: dtype_name(x) for name, x in given.items()})
        values = recurrent.run(op, given, attrs)
        return Result({n: round_once(x, dtypes[n]) for n, x in values.items()}, path="recurrent", kernels=[])


backend = NumpyBackend()
