"""How the defaults of `rattention.jax.pallas.config` were found: candidates by scheduled bundles, least first.

    python benchmarks/tpu_search.py [--generations v5p] [--dims 128] [--kinds forward]    into results/tpu_search.json

bfloat16, the shape of `tpu_schedule.py`. Forward and backward have fields of their own and are searched apart; the
chunk C and the m chunks per step are common. The table in `config` is written by hand from the record.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import tpu_schedule
from tpu_schedule import GENERATIONS, ROOT, run, versions

RESULTS = ROOT / "benchmarks" / "results" / "tpu_search.json"


def candidates(kind: str, full: bool) -> list[dict[str, int]]:
    """Fields of `Config` that differ from its defaults."""
    if kind == "forward":
        found = [{"heads": h, "lag": lag} for h, lag in itertools.product((2, 4), (1, 2))]
        more: list[dict[str, int]] = [
            {"heads": 1, "lag": 1},
            {"heads": 4, "lag": 3},
            {"blocks": 2, "heads": 4, "lag": 2},
        ]
        more += [{"blocks": 8, "heads": 4, "lag": 2}, {"chunk": 256, "blocks": 2, "heads": 2, "lag": 2}]
    else:
        found = [{"backward_heads": h, "backward_lag": lag} for h, lag in ((1, 1), (2, 1), (4, 1))]
        more = [{"backward_heads": 4, "backward_lag": 2}, {"blocks": 8, "backward_heads": 4}]
        more += [{"blocks": 2, "backward_heads": 4}, {"chunk": 256, "blocks": 2, "backward_heads": 1}]
    return found + more * full


def main() -> None:
    parser = argparse.ArgumentParser(description="Search over kernel configurations by the compiled schedule.")
    parser.add_argument("--generations", nargs="+", default=list(GENERATIONS), choices=GENERATIONS)
    parser.add_argument("--dims", nargs="+", type=int, default=[64, 128, 256])
    parser.add_argument("--kinds", nargs="+", default=["forward", "backward"], choices=["forward", "backward"])
    parser.add_argument("--full", action="store_true", help="also other chunks and numbers of blocks")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    sys.path[:0] = [str(ROOT / "spec"), str(ROOT / "backends" / "jax")]
    from rattention.jax.pallas.config import of_generation

    found: dict[str, Any] = {"versions": versions(), "results": []}
    if options.out.exists():
        found = json.loads(options.out.read_text())
    for generation, D, kind in itertools.product(options.generations, options.dims, options.kinds):
        for fields in candidates(kind, options.full):
            config = dataclasses.asdict(dataclasses.replace(of_generation(generation), **fields))
            key = {"generation": generation, "D": D, "kind": kind, "fields": fields}
            if any(all(r[k] == v for k, v in key.items()) for r in found["results"]):
                continue
            job = {"what": "ours", "mode": "mix", "generation": generation, "D": D, "dtype": "bfloat16", "kind": kind}
            result = run(job | {"config": config})
            row = key | {"commit": tpu_schedule.commit()}
            if "error" in result:
                row["error"] = result["error"]
            else:
                part = result["kernels"][f"rattention_{kind}"]
                row |= {k: part[k] for k in ("bundles_per_token_head", "use", "spills", "vmem_bytes")}
            found["results"].append(row)
            print(generation, D, kind, fields, row.get("bundles_per_token_head", row.get("error")), flush=True)
            options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
