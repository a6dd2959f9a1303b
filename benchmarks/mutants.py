"""How surely the suite kills each mutant: the catalogue under fresh seeds, written to benchmarks/results/mutants.json.

    python benchmarks/mutants.py [--seeds 10] [--profile quick] [--workers 2] [--append]

For each mutant: in how many of the seeds it died, which tests killed it, and after how many cases (median, worst).
Exit code 1 where one died in fewer than nine tenths of the seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import statistics
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from provenance import commit, save, versions

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "mutants.json"
PATHS = [str(ROOT / p) for p in ("spec", "backends/numpy", "backends/torch", "backends/jax", "conformance")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--profile", default="quick")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--append", action="store_true", help="add to the seeds that the output file holds")
    options = parser.parse_args()
    sys.path[:0] = PATHS
    os.environ["PYTHONPATH"] = os.pathsep.join([*PATHS, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")  # one core per worker

    from rattention.conformance.mutants.runner import Death, run_mutants

    told: list[dict[str, Any]] = []
    commits: dict[str, str] = {}
    if options.append and options.output.exists():
        before = json.loads(options.output.read_text(encoding="utf-8"))
        told, commits = before["deaths"], before["commits"]
    seeds = list(dict.fromkeys(death["seed"] for death in told))
    for _ in range(options.seeds):
        seed = secrets.randbelow(2**31)
        found: list[Death] = run_mutants(options.profile, seed, workers=options.workers)
        told += [{"seed": seed, "mutant": d.mutant, "test": d.test, "cases": d.cases} for d in found]
        seeds.append(seed)
        commits[str(seed)] = commit()
        survivors = [d.mutant for d in found if not d.killed]
        print(f"seed {seed}: {len(found) - len(survivors)} of {len(found)} killed {' '.join(survivors)}", flush=True)
        summary = summarise(options.profile, seeds, told, commits)
        write(summary, options.output)
    if not seeds:
        return 0
    always, weak = summary["always_killed"], summary["weak"]
    print(f"{always} of {summary['mutants']} mutants died under every seed; weak: {', '.join(weak) or 'none'}")
    return 1 if weak else 0


def summarise(profile: str, seeds: list[int], told: list[dict[str, Any]], commits: dict[str, str]) -> dict[str, Any]:
    """Per mutant of the catalogue what all seeds add up to; mutants that left the catalogue are left out."""
    from rattention.conformance.mutants import CATALOGUE

    deaths: dict[str, list[dict[str, Any]]] = {name: [] for name in CATALOGUE}
    for death in told:
        if death["mutant"] in deaths:
            deaths[death["mutant"]].append(death)
    rows: list[dict[str, Any]] = []
    for name, mutant in CATALOGUE.items():
        killed = [d for d in deaths[name] if d["test"]]
        cases = [d["cases"] for d in killed] or [0]
        rows.append(
            {
                "mutant": name,
                "title": mutant.title,
                "class": mutant.kind,
                "breaks": list(mutant.clauses),
                "source": mutant.source,
                "killed": len(killed),
                "killed_by": dict(Counter(d["test"] for d in killed).most_common()),
                "median_cases": statistics.median(cases),
                "worst_cases": max(cases),
            }
        )
    return {
        "commits": commits,
        "versions": versions("numpy", "ml_dtypes"),
        "profile": profile,
        "seeds": seeds,
        "mutants": len(rows),
        "always_killed": sum(row["killed"] == len(seeds) for row in rows),
        "weak": [row["mutant"] for row in rows if 10 * row["killed"] < 9 * len(seeds)],
        "rows": rows,
        "deaths": told,
    }


def write(summary: dict[str, Any], path: Path) -> None:
    """Everything but the single deaths indented."""
    deaths = ",\n  ".join(json.dumps(death) for death in summary["deaths"])
    text = json.dumps(summary | {"deaths": []}, indent=1).replace('"deaths": []', f'"deaths": [\n  {deaths}\n ]')
    save(text, path)


if __name__ == "__main__":
    sys.exit(main())
