"""Speed of the TPU kernels as the TPU compiler schedules them, measured without a TPU.

    python benchmarks/tpu_schedule.py                 the table of docs/kernels-tpu.md, as results/tpu_schedule.json
    python benchmarks/tpu_schedule.py --generations v5p --kinds forward backward --dims 128
    python benchmarks/tpu_schedule.py --search        also other configurations: how the defaults were found

libtpu compiles each kernel ahead of time and writes its final schedule of VLIW bundles and what each bundle occupies.
A kernel's program is the body of its grid, all loops over chunks, tiles and heads unrolled, so

    bundles per token and query head = bundles of the program / (tokens per step * query heads per step)

Code that runs once per sequence (start, final state) counts as if it ran at every step: the figure is an upper bound.
For splash attention, whose grid visits only blocks under the mask, the program counts once per visited block.
The measure is deterministic; it knows nothing of memory stalls, for which the bytes that cross HBM are given beside it.
"""

from __future__ import annotations

import argparse
import glob
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "tpu_schedule.json"
SHAPE = {"B": 1, "T": 4096, "Hq": 16, "Hkv": 4}
WINDOW = 511
GENERATIONS = ("v4", "v5e", "v5p", "v6e")


def parse(folder: str, kernel: str) -> dict[str, Any]:
    """Bundles and use of the units of one kernel, from the compiler's dump."""

    def report(kind: str) -> str:
        found = sorted(glob.glob(f"{folder}/*-{kernel}*{kind}.txt"))
        if not found:
            raise RuntimeError(f"the compiler's dump holds no {kind} of {kernel}")
        return Path(found[-1]).read_text()

    match = re.search(r"total scheduled bundles:\s+(\d+)", report("schedule-analysis_final_bundles"))
    if match is None:
        raise RuntimeError(f"no bundle count in the schedule of {kernel}")
    bundles = int(match.group(1))
    lines = report("final_hlo-static-per-bundle-utilization").splitlines()
    units = [name.strip() for name in lines[1].split(",")]
    capacity = [int(n) for n in lines[2].split()]
    sums = [0] * len(units)
    for line in lines[4:]:
        for i, n in enumerate(line.split()):
            sums[i] += int(n)
    use = {u: round(s / c / bundles, 3) for u, s, c in zip(units, sums, capacity, strict=True) if ":" not in u}
    spills = {u: s for u, s in zip(units, sums, strict=True) if ":" in u}
    # No reordering of these instructions takes fewer bundles than the matrix units are busy: the share of that floor.
    return {"bundles": bundles, "use": use, "spills": spills, "matrix_floor_share": use["MXU"]}


def worker(job: dict[str, Any], folder: str) -> dict[str, Any]:
    """One job in its own process, whose environment told the compiler where to dump."""
    sys.path[:0] = [str(ROOT / "spec"), str(ROOT / "backends" / "jax")]
    return {"ours": ours, "splash": splash}[job["what"]](job, folder)


def ours(job: dict[str, Any], folder: str) -> dict[str, Any]:
    from rattention.jax.pallas import aot, calls, config
    from rattention.jax.pallas.config import Config

    settings = Config(**job["config"]) if "config" in job else config.default(job["generation"], job["D"])
    decode = job["kind"] == "decode"
    sizes = SHAPE | ({"B": 64, "T": 1} if decode else {})
    f, args = aot.program(job["kind"], job["D"], job["dtype"], settings, WINDOW, job["mode"], **sizes)
    compiled = aot.compile_for(job["generation"], f, *args)
    kernel = f"{ {'mix': 'rattention'}.get(job['mode'], job['mode']) }_{job['kind']}"
    found = parse(folder, kernel) | {"kernel": kernel, "config": calls.shown(settings)}
    together = 2 if job["D"] == 64 else 1  # kv heads per step
    rows = SHAPE["Hq"] // SHAPE["Hkv"] * together * (1 if decode else settings.chunk * settings.blocks)
    found["bundles_per_token_head"] = round(found["bundles"] / rows, 3)
    found["hbm_bytes"] = calls.traffic[kernel]
    found["hbm_bytes_per_token_head"] = round(found["hbm_bytes"] / (sizes["B"] * sizes["T"] * sizes["Hq"]), 1)
    found["temporary_bytes"] = compiled.memory_analysis().temp_size_in_bytes
    return found


def splash(job: dict[str, Any], folder: str) -> dict[str, Any]:
    """JAX's splash attention for a causal window of `tokens` tokens, itself included."""
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
    from rattention.jax.pallas import aot

    T, heads, D, block = job["T"], SHAPE["Hq"], job["D"], job["block"]
    mask = masks.MultiHeadMask([masks.LocalMask((T, T), (job["tokens"] - 1, 0), 0) for _ in range(heads)])
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    blocks = kernel.BlockSizes(**{f"block_{name}": block for name in names})
    attend = kernel.make_splash_mha(mask, block_sizes=blocks, head_shards=1, q_seq_shards=1)
    x = jax.ShapeDtypeStruct((heads, T, D), jnp.bfloat16)
    if job["kind"] == "forward":
        aot.compile_for(job["generation"], lambda q, k, v: attend(q, k, v), x, x, x)
        parts = ["splash_mha_fwd"]
    else:
        aot.compile_for(job["generation"], lambda q, k, v, d: jax.vjp(attend, q, k, v)[1](d), x, x, x, x)
        parts = ["splash_mha_dq", "splash_mha_dkv"]
    count = T // block
    # Visited (query block, key block) pairs of one head: those with an unmasked element.
    visited = sum(i >= j and (i - j - 1) * block + 1 < job["tokens"] for i in range(count) for j in range(count))
    found: dict[str, Any] = {"visited_blocks": visited, "parts": {name: parse(folder, name) for name in parts}}
    bundles = sum(part["bundles"] for part in found["parts"].values())
    found["bundles_per_token_head"] = round(bundles * visited / T, 3)
    return found


def run(job: dict[str, Any]) -> dict[str, Any]:
    """A job in a subprocess with its own dump folder; errors are results too."""
    folder = tempfile.mkdtemp(prefix="tpu_schedule_")
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true",
    }
    try:
        command = [sys.executable, __file__, "--worker", json.dumps(job), folder]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        last = done.stdout.strip().splitlines()[-1:]
        if done.returncode or not last:
            return job | {"error": (done.stderr.strip().splitlines() or ["no output"])[-1][:500]}
        return job | json.loads(last[0])
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def jobs(options: argparse.Namespace) -> list[dict[str, Any]]:
    found = []
    axes = (options.generations, options.dims, options.dtypes, options.kinds)
    for generation, D, dtype, kind in itertools.product(*axes):
        base = {"generation": generation, "kind": kind, "D": D, "dtype": dtype}
        mine = {"what": "ours", "mode": "mix", **base}
        found.append(mine)
        if kind == "decode":
            continue
        if D == 128 and dtype == "bfloat16":
            # The branches alone, one kernel each: what an implementation without the fusion launches, less its norms.
            found += [mine | {"mode": mode} for mode in ("swa", "rla")]
            for tokens, T in ((512, 4096), (4096, 16384)):
                found.append({"what": "splash", **base, "tokens": tokens, "T": T, "block": 512})
        if options.search:
            for blocks, heads, lag in itertools.product((1, 2, 4, 8), (1, 2, 4), (1, 2)):
                config = {"blocks": blocks, "heads": heads, "lag": lag, "backward_heads": heads, "backward_lag": lag}
                found.append(mine | {"config": config})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Scheduled bundles of the TPU kernels.")
    parser.add_argument("--generations", nargs="+", default=list(GENERATIONS), choices=GENERATIONS)
    parser.add_argument("--kinds", nargs="+", default=["forward", "backward", "decode"])
    parser.add_argument("--dims", nargs="+", type=int, default=[64, 128, 256])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--search", action="store_true", help="other configurations too")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(worker(json.loads(options.worker[0]), options.worker[1])))
        return
    document: dict[str, Any] = {"shape": SHAPE | {"window": WINDOW}, "libtpu": metadata.version("libtpu")}
    document["results"] = []
    for job in jobs(options):
        result = run(job)
        document["results"].append(result)
        shown = {k: result.get(k) for k in (*job, "bundles_per_token_head", "matrix_floor_share", "error")}
        print(" ".join(f"{k}={v}" for k, v in shown.items() if v is not None), flush=True)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
