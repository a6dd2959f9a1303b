"""Where the clause that a fault breaks stands in "the likeliest first", written to benchmarks/results/diagnosis.json.

    python benchmarks/diagnosis.py [FAULT ...] [--profile smoke] [--seed 12] [--workers 2] [--keep]

Faults of one line are planted in a plain port, one at a time (the lists in diagnosed/). Each names
the clause that a reader would say it breaks. The run counts in how many cases that clause heads the list of failing
ones, and in how many it is among the first three. `--keep` leaves out the faults that the output file holds already.
Named faults are shown with everything that a report would say of them, and nothing is written.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING, Any

from provenance import commit, save, versions

if TYPE_CHECKING:
    from diagnosed.fault import Fault
    from rattention.conformance.oracle import Oracle

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "diagnosis.json"
PATHS = [str(ROOT / p) for p in ("spec", "backends/numpy", "conformance", "benchmarks")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("faults", nargs="*")
    parser.add_argument("--profile", default="smoke", choices=["smoke", "quick", "full"])
    parser.add_argument("--seed", type=int, default=12)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--keep", action="store_true", help="leave out the faults that the output file holds")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    # Worker processes import the suite too.
    sys.path[:0] = PATHS
    os.environ["PYTHONPATH"] = os.pathsep.join([*PATHS, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")  # one core per worker
    if options.faults:
        return show(options.faults, options.profile, options.seed)

    from rattention.conformance.workers import end_with_parent
    from rich.progress import track

    told: list[dict[str, Any]] = []
    if options.keep and options.output.exists():
        before = json.loads(options.output.read_text(encoding="utf-8"))
        if (before["profile"], before["seed"]) != (options.profile, options.seed):
            parser.error(f"{options.output} is of another profile or seed, nothing of it can be kept")
        told = before["rows"]
    held = {row["fault"] for row in told}
    names = [(list_name, id) for list_name, found in lists().items() for id in found if id not in held]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, context, end_with_parent) as pool:
        waiting = [pool.submit(one, *name, options.profile, options.seed) for name in names]
        for done in track(as_completed(waiting), "faults", len(waiting)):
            told.append(done.result())
            write(told, options.profile, options.seed, options.output)
    for list_name, figures in summarise(told).items():
        print(f"{list_name}: {figures['head']} of {figures['faults']} at the head, {figures['three']} among three")
    return 0


def lists() -> dict[str, dict[str, Fault]]:
    """The lists by name, in the order of the table."""
    from diagnosed.first import FIRST
    from diagnosed.second import SECOND
    from diagnosed.third import THIRD

    return {"first": FIRST, "second": SECOND, "third": THIRD}


_ORACLE: dict[str, Oracle] = {}


def report_on(fault: Fault, profile: str, seed: int) -> dict[str, Any]:
    """The report of a run against the port with the fault; runs of one process share the reference's answers."""
    from rattention.conformance import reporting
    from rattention.conformance.oracle import Oracle
    from rattention.conformance.runner import Settings, conform

    oracle = _ORACLE.setdefault("one", Oracle(2**30))
    outcome = conform(fault.id, Settings(profile, seed), backend=fault.backend(), oracle=oracle)
    return reporting.summarise(outcome)


def one(list_name: str, id: str, profile: str, seed: int) -> dict[str, Any]:
    """One fault and where its clause stands: 1 is the head, 0 is nowhere."""
    from rattention.conformance.reporting.summary import failing

    fault, begin = lists()[list_name][id], time.perf_counter()
    report = report_on(fault, profile, seed)
    ranked = failing(report["clauses"])
    return {
        "fault": id,
        "list": list_name,
        "title": fault.title,
        "clauses": list(fault.clauses),
        "place": next((n + 1 for n, label in enumerate(ranked) if label in fault.clauses), 0),
        "first three": ranked[:3],
        "failed": report["cases"]["failed"],
        "seconds": round(time.perf_counter() - begin, 1),
    }


def show(names: Iterable[str], profile: str, seed: int) -> int:
    """What a report says of each named fault, on the terminal."""
    from rattention.conformance.reporting.console import print_outcome
    from rich.console import Console

    every = {id: fault for found in lists().values() for id, fault in found.items()}
    unknown = [name for name in names if name not in every]
    if unknown:
        print(f"no such fault: {', '.join(unknown)}; there are {', '.join(every)}", file=sys.stderr)
        return 2
    for name in names:
        fault = every[name]
        print(f"\n{name}: {fault.title} Breaks {' or '.join(fault.clauses)}.\n- {fault.old}\n+ {fault.new}\n")
        print_outcome(Console(), report_on(fault, profile, seed))
    return 0


def summarise(told: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Per list: faults, those that failed a case, those whose clause is at the head and among the first three."""
    return {
        list_name: {
            "faults": len(mine),
            "found": sum(row["failed"] > 0 for row in mine),
            "head": sum(row["place"] == 1 for row in mine),
            "three": sum(1 <= row["place"] <= 3 for row in mine),
        }
        for list_name in lists()
        if (mine := [row for row in told if row["list"] == list_name])
    }


def write(told: list[dict[str, Any]], profile: str, seed: int, path: Path) -> None:
    """Everything in the order of the lists."""
    order = [id for found in lists().values() for id in found]
    rows = sorted((row for row in told if row["fault"] in order), key=lambda row: order.index(row["fault"]))
    summary = {
        "commit": commit(),
        "versions": versions("numpy", "ml_dtypes"),
        "profile": profile,
        "seed": seed,
        "summary": summarise(rows),
        "rows": rows,
    }
    save(summary, path)


if __name__ == "__main__":
    sys.exit(main())
