"""Runs of the suite against the honest backends under fresh seeds, written to benchmarks/results/false_alarms.json.

    python benchmarks/false_alarms.py                  # the campaign: every backend, at the profile of `make conform`
    python benchmarks/false_alarms.py --append         # goes on with one that was cut off
    python benchmarks/false_alarms.py BACKEND ... [--runs 20] [--profile full] [--seeds N ...]

Every run must end conforming: an alarm is a fault of the suite, of the reference or of the backend, and its cases are
kept under report/false-alarms. For each backend: the seeds, the verdicts, units, seconds, and the largest share of the
error budget that any run used, per operation and dtype. Exit code 1 where a run raised an alarm.

A worker takes a seed and runs backends that draw the same cases one after the other on it, so that they share the
reference's answers and budgets, which cost more than the backends themselves.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import secrets
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING, Any

from provenance import commit, save, versions

if TYPE_CHECKING:
    from rattention.conformance.oracle import Oracle

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "false_alarms.json"
PATHS = [str(ROOT / p) for p in ("spec", "backends/numpy", "backends/torch", "backends/jax", "conformance")]


CAMPAIGN = (
    (("numpy", "torch", "jax"), "quick", 10),
    (("onnx", "onnxruntime"), "quick", 20),
    (("torch-triton",), "smoke", 20),
    (("jax-pallas",), "smoke", 20),
)
"""Backends, the profile that `make conform` runs them at on a machine without an accelerator, and fresh seeds."""
ACCELERATORS = ("accel*", "vfio/*", "nvidia*", "kfd")
"""Under /dev; without one, kernels run under their interpreters, as `make conform` has them."""
ANSWERS = 4 * 2**30
"""Bytes of the reference's answers that a worker keeps: all those of a seed."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("backends", nargs="*", help="instead of the campaign over every backend")
    parser.add_argument("--runs", type=int, default=20, help="of the backends given")
    parser.add_argument("--profile", default="quick", choices=["smoke", "quick", "full"], help="of the backends given")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="*", help="of the backends given, instead of fresh ones")
    parser.add_argument("--append", action="store_true", help="keep the runs that the output file holds")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    # Worker processes import the suite too.
    sys.path[:0] = PATHS
    os.environ["PYTHONPATH"] = os.pathsep.join([*PATHS, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")  # one core per worker

    if not any(found for pattern in ACCELERATORS for found in Path("/dev").glob(pattern)):
        os.environ.setdefault("TRITON_INTERPRET", "1")
        os.environ.setdefault("JAX_PLATFORMS", "cpu")

    told: list[dict[str, Any]] = []
    if options.append and options.output.exists():
        told = json.loads(options.output.read_text(encoding="utf-8"))["runs"]
    if options.backends:
        seeds = options.seeds or [secrets.randbelow(2**31) for _ in range(options.runs)]
        jobs = [(tuple(options.backends), options.profile, seed) for seed in seeds]
    else:
        jobs = missing(told, commit())
    context = multiprocessing.get_context("spawn")  # a framework's threads do not survive a fork
    from rattention.conformance.workers import end_with_parent

    with ProcessPoolExecutor(options.workers, context, end_with_parent) as pool:
        waiting = [pool.submit(one_seed, list(backends), profile, seed) for backends, profile, seed in jobs]
        for number, done in enumerate(as_completed(waiting), 1):
            told += done.result()
            write(told, options.output)
            print(f"{number} of {len(jobs)} seeds done", flush=True)
    return 1 if any(not run["conforming"] for run in told) else 0


Job = tuple[tuple[str, ...], str, int]


def missing(told: list[dict[str, Any]], commit: str) -> list[Job]:
    """Fresh seeds for what the campaign lacks on this commit."""
    jobs: list[Job] = []
    for backends, profile, runs in CAMPAIGN:
        done = min(
            sum(run["backend"] == name and run["profile"] == profile and run["commit"] == commit for run in told)
            for name in backends
        )
        jobs += [(backends, profile, secrets.randbelow(2**31)) for _ in range(runs - done)]
    return jobs


def one_seed(backends: list[str], profile: str, seed: int) -> list[dict[str, Any]]:
    """A run of each backend on one seed."""
    from rattention.conformance.oracle import Oracle

    oracle = Oracle(ANSWERS)
    return [one(backend, profile, seed, oracle) for backend in backends]


def one(backend: str, profile: str, seed: int, oracle: Oracle) -> dict[str, Any]:
    """One run, and what it found."""
    from rattention.conformance import reporting
    from rattention.conformance.cli import default_vectors
    from rattention.conformance.runner import Settings, conform

    settings = Settings(profile, seed, vectors=tuple(default_vectors(profile)))
    outcome = conform(backend, settings, oracle=oracle)
    summary = reporting.summarise(outcome)
    alarms = [v["message"] for f in summary["failures"] for v in f["violations"]]
    if not outcome.conforming:
        folder = reporting.Folder(ROOT / "report" / "false-alarms" / f"{backend}-{profile}-{seed}")
        folder.write(reporting.case_files(outcome))
    shares = {
        op: {dtype: max(outputs.values()) for dtype, outputs in by_dtype.items()}
        for op, by_dtype in summary["budget"].items()
    }
    verdict = "conforming" if outcome.conforming else "ALARM"
    print(f"{backend:12} {profile:6} seed {seed:10} {verdict}, {summary['cases']['total']} units, "
          f"{outcome.seconds:.0f} s", flush=True)  # fmt: skip
    for alarm in alarms:
        print(f"    {alarm}", flush=True)
    return {
        "backend": backend,
        "profile": profile,
        "seed": seed,
        "conforming": outcome.conforming,
        "units": summary["cases"]["total"],
        "failed": summary["cases"]["failed"],
        "calls": summary["cases"]["calls"],
        "seconds": round(outcome.seconds, 1),
        "alarms": alarms,
        "commit": commit(),
        "shares": shares,
    }


def write(runs: list[dict[str, Any]], path: Path) -> None:
    """All runs, and per backend and profile what they add up to."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["backend"], run["profile"]), []).append(run)
    table = []
    for (backend, profile), mine in groups.items():
        worst: dict[str, dict[str, float]] = {}
        for run in mine:
            for op, cells in run["shares"].items():
                for dtype, share in cells.items():
                    cell = worst.setdefault(op, {})
                    cell[dtype] = max(cell.get(dtype, 0.0), share)
        table.append(
            {
                "backend": backend,
                "profile": profile,
                "runs": len(mine),
                "alarms": sum(not run["conforming"] for run in mine),
                "units": sum(run["units"] for run in mine),
                "seconds_median": statistics.median(run["seconds"] for run in mine),
                "largest_share": worst,
            }
        )
    summary = {
        "python": platform.python_version(),
        "versions": versions("numpy", "ml_dtypes", "torch", "triton", "jax", "jaxlib", "onnx", "onnxruntime"),
        "cpus": os.cpu_count(),
        "summary": table,
        "runs": runs,
    }
    save(summary, path)


if __name__ == "__main__":
    sys.exit(main())
