"""The kernels inside a layer, compiled ahead of time for every TPU generation, and exported.

    python benchmarks/tpu_aot.py [--generations v5e] [--dims 128]     into results/tpu_aot.json

What the record holds of the same program under the same compiler is not compiled again (`--again`: it is).

The layer is projections, attention and output projection, and their gradient. Its compiled program must hold no
instruction that only moves q, k, v, the output or a gradient of them; what it needs beyond its arguments is recorded
too. `jax.export` makes the same layer for the TPU platform and reads it back. Whether each kernel builds and fits
on its own is in the record of `tpu_schedule.py`. Exit status 1 where something is moved.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
from rattention.jax.pallas import aot, config
from tpu_schedule import GENERATIONS, ROOT, commit, versions

RESULTS = ROOT / "benchmarks" / "results" / "tpu_aot.json"


def built(generation: str, D: int, kind: str) -> tuple[str, Any, tuple[Any, ...], tuple[Any, ...]]:
    """Digest, function, abstract arguments, and the shapes whose moves are looked for."""
    settings = config.default(generation, D)
    attend, train, (x, weights), projected = aot.layer(settings, D=D)
    f, args = (attend, (x, weights)) if kind == "forward" else (train, (x, weights, x))
    return aot.digest(settings, f, *args), f, args, projected


def measure(generation: str, D: int, kind: str) -> dict[str, Any]:
    digest, f, args, projected = built(generation, D, kind)
    begun = time.time()
    compiled = aot.compile_for(generation, f, *args)
    memory = compiled.memory_analysis()
    exported = jax.export.export(jax.jit(f), platforms=["tpu"])(*args)
    again = jax.export.deserialize(exported.serialize())
    return {
        "generation": generation,
        "D": D,
        "kind": kind,
        "moves": aot.moves(compiled, *projected),
        "arguments_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "kernels": sorted({n for n in ("rattention_forward", "rattention_backward") if n in compiled.as_text()}),
        "exported_for": list(again.platforms),
        "exported_bytes": len(exported.mlir_module_serialized),
        "seconds": round(time.time() - begun, 1),
        "program": digest,
        "commit": commit(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Layers compiled for TPUs that are not there.")
    parser.add_argument("--generations", nargs="+", default=list(GENERATIONS), choices=GENERATIONS)
    parser.add_argument("--dims", nargs="+", type=int, default=[64, 128, 256])
    parser.add_argument("--kinds", nargs="+", default=["forward", "train"], choices=["forward", "train"])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--again", action="store_true", help="measure also what the record holds")
    options = parser.parse_args()
    document: dict[str, Any] = {"versions": versions(), "results": []}
    if options.out.exists():
        old = json.loads(options.out.read_text())
        if old["versions"] == document["versions"]:
            document = old
    rows = {(r["generation"], r["D"], r["kind"]): r for r in document["results"]}
    failed = False
    for case in itertools.product(options.generations, options.dims, options.kinds):
        known = case in rows and rows[case].get("program") == built(*case)[0]
        result = rows[case] if known and not options.again else measure(*case)
        failed |= bool(result["moves"])
        rows[case] = result
        document["results"] = list(rows.values())
        print(*case, f"{len(result['moves'])} moves", f"{result['temporary_bytes']} temporary bytes", flush=True)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(document, indent=1) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
