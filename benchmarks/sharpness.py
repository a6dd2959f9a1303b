"""The smallest relative error that quick reliably catches, per operation, output and dtype, written to
benchmarks/results/sharpness.json.

    python benchmarks/sharpness.py [--seeds 5]

The cases of the property "agreement" are answered by the reference, rounded once, an honest port. Two faults are then
planted into one output at a time: every element times 1 + d ("all"), or one element of each case, its largest, times
1 + d ("one"). A size d is caught under a seed if some case exceeds its budget; reliably caught is the smallest power of
two from which on every d is caught under every seed.
"""

from __future__ import annotations

import argparse
import os
import secrets
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from provenance import commit, save, versions

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "sharpness.json"
sys.path[:0] = [str(ROOT / p) for p in ("spec", "backends/numpy", "conformance")]

POWERS = list(range(-26, 2))
"""Exponents of the planted sizes."""


def caught(got: np.ndarray, value: np.ndarray, budget: np.ndarray, where: Any) -> list[bool]:
    """For each planted size, whether the output with the fault in the elements `where` exceeds its budget."""
    found = []
    for power in POWERS:
        wrong = got.astype(np.float64)
        wrong[where] *= 1 + 2.0**power
        with np.errstate(invalid="ignore", over="ignore"):
            stored = wrong.astype(np.float32).astype(got.dtype).astype(np.float64)
            found.append(bool((np.abs(stored - value)[where] > budget[where]).any()))
    return found


def one_seed(seed: int) -> dict[tuple[str, str, str, str], list[bool]]:
    """(operation, output, dtype, fault) to the sizes caught under this seed."""
    from rattention.conformance.context import storage_of
    from rattention.conformance.oracle import Oracle
    from rattention.conformance.properties import REGISTRY, make_case
    from rattention.conformance.strategies import make_plan
    from rattention.numpy.adapter import backend

    plan = make_plan("quick", seed, backend.describe())
    agreement, oracle = REGISTRY["agreement"], Oracle(0)
    seen: dict[tuple[str, str, str, str], list[bool]] = defaultdict(lambda: [False] * len(POWERS))
    for recipe in agreement.draw(plan):
        case = make_case(agreement, plan, recipe)
        assert case is not None
        outputs = backend.run(case.op, case.tensors, case.attrs)
        for name, (value, budget) in oracle.evaluate(case.op, case.tensors, case.attrs).items():
            got = outputs[name]
            if not got.size or got.dtype.kind == "i" or not np.isfinite(value).all():
                continue
            largest = np.unravel_index(np.argmax(np.abs(value)), value.shape)
            for fault, where in (("all", ...), ("one", largest)):
                key = (case.op, name, storage_of(case), fault)
                seen[key] = [a or b for a, b in zip(seen[key], caught(got, value, budget, where), strict=True)]
    return seen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    from rattention.spec import load

    seeds = [secrets.randbelow(2**31) for _ in range(options.seeds)]
    every: dict[tuple[str, str, str, str], list[bool]] = {}
    for seed in seeds:
        for key, sizes in one_seed(seed).items():
            before = every.get(key, [True] * len(POWERS))
            every[key] = [a and b for a, b in zip(before, sizes, strict=True)]
        print(f"seed {seed} done", flush=True)
    table: dict[str, dict[str, dict[str, dict[str, float | None]]]] = {}
    order = list(load().operations)
    for op, name, dtype, fault in sorted(every, key=lambda k: (order.index(k[0]), *k[1:])):
        sizes = every[op, name, dtype, fault]
        first = next((i for i in range(len(sizes)) if all(sizes[i:])), None)
        cell = table.setdefault(op, {}).setdefault(name, {}).setdefault(dtype, {})
        cell[fault] = None if first is None else 2.0 ** POWERS[first]
    told = {
        "commit": commit(),
        "versions": versions("numpy", "ml_dtypes"),
        "profile": "quick",
        "seeds": seeds,
        "smallest": table,
    }
    save(told, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
