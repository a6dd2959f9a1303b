"""How surely the suite kills each mutant: the catalogue under fresh seeds, written to benchmarks/results/mutants.json.

    python benchmarks/mutants.py [--seeds 10] [--profile quick] [--workers 2]

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

RESULTS = Path(__file__).resolve().parent / "results" / "mutants.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--profile", default="quick")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")  # one core per worker

    from rattention.conformance.mutants import CATALOGUE
    from rattention.conformance.mutants.runner import Death, run_mutants

    seeds = [secrets.randbelow(2**31) for _ in range(options.seeds)]
    deaths: dict[str, list[Death]] = {name: [] for name in CATALOGUE}
    for seed in seeds:
        found = run_mutants(options.profile, seed, workers=options.workers)
        for death in found:
            deaths[death.mutant].append(death)
        print(f"seed {seed}: {sum(d.killed for d in found)} of {len(found)} killed", flush=True)
    rows: list[dict[str, Any]] = []
    for name, mutant in CATALOGUE.items():
        killed = [d for d in deaths[name] if d.killed]
        cases = [d.cases for d in killed] or [0]
        rows.append(
            {
                "mutant": name,
                "title": mutant.title,
                "class": mutant.kind,
                "breaks": list(mutant.clauses),
                "source": mutant.source,
                "killed": len(killed),
                "killed_by": dict(Counter(d.test for d in killed).most_common()),
                "median_cases": statistics.median(cases),
                "worst_cases": max(cases),
            }
        )
    weak = [row["mutant"] for row in rows if 10 * row["killed"] < 9 * len(seeds)]
    summary = {
        "profile": options.profile,
        "seeds": seeds,
        "mutants": len(rows),
        "always_killed": sum(row["killed"] == len(seeds) for row in rows),
        "weak": weak,
        "rows": rows,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    print(f"{summary['always_killed']} of {len(rows)} mutants died under every seed; weak: {', '.join(weak) or 'none'}")
    return 1 if weak else 0


if __name__ == "__main__":
    sys.exit(main())
