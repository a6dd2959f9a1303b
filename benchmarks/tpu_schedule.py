"""Speed of the TPU kernels as the TPU compiler schedules them, measured without a TPU.

    python benchmarks/tpu_schedule.py                                    everything, into results/tpu_schedule.json
    python benchmarks/tpu_schedule.py --generations v5p --dims 128       a part; the rest of the record is kept
    python benchmarks/tpu_schedule.py --page                             only write the tables of docs/pallas.md anew

What the record already holds of the same program, configuration and compiler is not measured again (`--again`: it is),
so a run that was cut off goes on where it was.

libtpu compiles each kernel ahead of time and writes its final schedule of VLIW bundles and what each bundle occupies.
A kernel's program is the body of its grid. Loops over chunks, heads and tiles of these shapes are unrolled (but for a
`rolled` backward, whose whole program counts once per turn of its loop over heads: an upper bound), so

    bundles per token and query head = bundles of the program / (tokens per step * query heads per step)

Code that runs once per sequence (start, final state) counts as if it ran at every step: the figure is an upper bound.
For splash attention, whose grid visits only blocks under the mask, the program counts once per visited block. The
measure is deterministic; it knows nothing of stalls, for which the bytes that cross HBM are given beside it.
"""

from __future__ import annotations

import argparse
import glob
import hashlib
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
PAGE = ROOT / "docs" / "pallas.md"
SHAPE = {"B": 1, "T": 4096, "Hq": 16, "Hkv": 4}
DECODE = {"B": 64, "T": 1, "Hq": 16, "Hkv": 4}
WINDOW = 511
GENERATIONS = ("v4", "v5e", "v5p", "v6e")
KINDS = ("forward", "backward", "decode")


def parse(folder: str, kernel: str) -> dict[str, Any]:
    """Bundles and use of the units of one kernel, from the compiler's dump."""

    def report(kind: str) -> str:
        found = sorted(glob.glob(f"{glob.escape(folder)}/*{kernel}*{kind}.txt"))
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
    spills = {u.split(":")[1].lower(): s for u, s in zip(units, sums, strict=True) if ":" in u}
    return {"bundles": bundles, "use": use, "spills": spills}


# ------------------------------------------------------------------------------------------------ one job


def worker(job: dict[str, Any], folder: str) -> dict[str, Any]:
    """One job in its own process, whose environment told the compiler where to dump."""
    if job["what"] == "ours":
        return ours(job, folder)
    import tpu_baselines

    return tpu_baselines.MEASURES[job["what"]](job, folder)


def built(job: dict[str, Any]) -> tuple[Any, Any, tuple[Any, ...]]:
    """Configuration, function and abstract arguments of a job on our kernels."""
    from rattention.jax.pallas import aot, config
    from rattention.jax.pallas.config import Config

    settings = Config(**job["config"]) if "config" in job else config.default(job["generation"], job["D"], job["dtype"])
    optional = ("rope_cos", "rope_sin") if job.get("rope") else ()
    sizes = DECODE if job["kind"] == "decode" else SHAPE
    shape = (job["D"], job["dtype"])
    f, args = aot.program(job["kind"], *shape, settings, WINDOW, job["mode"], optional=optional, **sizes)
    return settings, f, args


def program(job: dict[str, Any]) -> str:
    """Digest of what a job measures, which stays the same as long as its figures do under one compiler."""
    if job["what"] != "ours":
        return hashlib.sha256((ROOT / "benchmarks" / "tpu_baselines.py").read_bytes()).hexdigest()[:16]
    from rattention.jax.pallas import aot

    settings, f, args = built(job)
    return aot.digest(settings, f, *args)


def ours(job: dict[str, Any], folder: str) -> dict[str, Any]:
    """One of our kernels; a backward job holds also the forward that saves for it."""
    import tpu_traffic
    from rattention.jax.pallas import aot, calls

    settings, f, args = built(job)
    traffic = tpu_traffic.kernels(f, *args)
    kind, mode, sizes = job["kind"], job["mode"], DECODE if job["kind"] == "decode" else SHAPE
    compiled = aot.compile_for(job["generation"], f, *args)
    name = "rattention" if mode == "mix" else mode
    together = 2 if job["D"] == 64 else 1  # kv heads per step
    rows = SHAPE["Hq"] // SHAPE["Hkv"] * together * (1 if kind == "decode" else settings.chunk * settings.blocks)
    found: dict[str, Any] = {"config": calls.shown(settings)}
    for part in ("forward", "backward") if kind == "backward" else (kind,):
        kernel = f"{name}_{part}"
        figures = parse(folder, kernel)
        turns = SHAPE["Hq"] // SHAPE["Hkv"] if settings.rolled and part == "backward" else 1
        figures["bundles_per_token_head"] = round(figures["bundles"] * turns / rows, 3)
        hbm_bytes, figures["vmem_bytes"] = traffic[kernel]
        figures["hbm_bytes"] = hbm_bytes
        figures["hbm_bytes_per_token_head"] = round(hbm_bytes / (sizes["B"] * sizes["T"] * sizes["Hq"]), 1)
        found.setdefault("kernels", {})[kernel] = figures
    total = sum(part["bundles_per_token_head"] for part in found["kernels"].values())
    found["bundles_per_token_head"] = round(total, 3)
    found["temporary_bytes"] = compiled.memory_analysis().temp_size_in_bytes
    return found


def run(job: dict[str, Any]) -> dict[str, Any]:
    """A job in a subprocess with its own dump folder; errors are results too."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # a schedule takes hundreds of MiB of text
    folder = tempfile.mkdtemp(prefix="tpu_schedule_", dir=memory)
    dump = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=.*final_.*"
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "LIBTPU_INIT_ARGS": dump,
    }
    try:
        command = [sys.executable, __file__, "--worker", json.dumps(job), folder]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        last = done.stdout.strip().splitlines()[-1:]
        if done.returncode or not last:
            said = [x for x in done.stderr.strip().splitlines() if re.match(r"[\w.]+(Error|Unsupported): ", x)]
            return job | {"error": (said or ["no output"])[-1][:500]}
        return job | json.loads(last[0])
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# ------------------------------------------------------------------------------------------------ all jobs


def jobs(options: argparse.Namespace) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    axes = (options.generations, options.dims, options.dtypes, options.kinds)
    for generation, D, dtype, kind in itertools.product(*axes):
        base = {"generation": generation, "kind": kind, "D": D, "dtype": dtype}
        mine = {"what": "ours", "mode": "mix", **base}
        found.append(mine)
        if options.matrix or kind == "decode" or D != 128 or dtype != "bfloat16":
            continue
        found.append(mine | {"rope": True})
        # The branches alone, one kernel each: what an implementation without the fusion launches, less its norms.
        found += [mine | {"mode": mode} for mode in ("swa", "rla")]
        for tokens, T in ((512, 4096), (4096, 16384)):
            found.append({"what": "splash", **base, "tokens": tokens, "T": T, "block": 512})
        if kind == "forward":
            found.append({"what": "linear", **base, "block": 256})
    return found


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two results answer one job; the default configuration may have changed between them."""
    keys = ("what", "mode", "rope", "generation", "kind", "D", "dtype", "tokens", "T", "block")
    return all(a.get(k) == b.get(k) for k in keys)


def versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in ("jax", "jaxlib", "libtpu")}


def commit() -> str:
    """The commit that was measured, marked where its code has changed since; records do not count."""
    code = [str(ROOT / "benchmarks" / "*.py"), str(ROOT / "backends" / "jax" / "rattention"), str(ROOT / "spec")]

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True).stdout

    return git("rev-parse", "--short=12", "HEAD").strip() + "-dirty" * bool(git("status", "--porcelain", "--", *code))


# ------------------------------------------------------------------------------------------------ tables


def tables(document: dict[str, Any]) -> str:
    """The record as Markdown."""
    good = [r for r in document["results"] if "error" not in r]
    stack = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    lines = [
        f"B {SHAPE['B']}, T {SHAPE['T']}, Hq {SHAPE['Hq']}, Hkv {SHAPE['Hkv']}, D = Dv, window {WINDOW}; {stack}.",
        "",
        "Scheduled bundles per token and query head, D 128, bfloat16:",
        "",
        "| kernels | " + " | ".join(GENERATIONS) + " |",
        "|---" * (len(GENERATIONS) + 1) + "|",
    ]
    mine: dict[str, Any] = {"what": "ours", "D": 128, "dtype": "bfloat16", "mode": "mix", "rope": None}
    rows: list[tuple[str, list[dict[str, Any]]]] = []
    for kind, title in (("forward", "forward"), ("backward", "forward + backward")):
        rows.append((f"**rattention, {title}**", [mine | {"kind": kind}]))
        rows.append((f"rattention with rotary tables, {title}", [mine | {"kind": kind, "rope": True}]))
        branches = [mine | {"kind": kind, "mode": mode} for mode in ("swa", "rla")]
        rows.append((f"its two branches in a kernel each, without norms, {title}", branches))
        for tokens in (512, 4096):
            wanted = {"what": "splash", "kind": kind, "tokens": tokens}
            rows.append((f"splash attention, SWA-{tokens}, {title}", [wanted]))
        if kind == "forward":
            rows.append(("chunked linear attention, unfused, forward", [{"what": "linear"}]))
    for title, wanted in rows:
        cells = []
        for generation in GENERATIONS:
            parts = [find(good, w | {"generation": generation}) for w in wanted]
            known = [part["bundles_per_token_head"] for part in parts if part is not None]
            cells.append(f"{sum(known):.2f}" if len(known) == len(parts) else "")
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Each kernel in its default configuration (decode: B 64, one token per row). Matrix and vector: share of the"
        " slots of the matrix and vector arithmetic units that the schedule fills; the first is also the share of the"
        " matrix-unit floor, since no order of the same products takes fewer bundles than they fill. Spill, fill:"
        " instructions per thousand bundles. HBM: bytes per token and query head. VMEM: scratch and blocks, without"
        " the compiler's own.",
        "",
        "| generation | D | dtype | kernel | C x m | bundles | matrix | vector | spill | fill | HBM | VMEM, MiB |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    order = {name: i for i, name in enumerate((*GENERATIONS, *KINDS))}
    plain = [r for r in good if r["what"] == "ours" and r["mode"] == "mix" and not r.get("rope")]
    plain.sort(key=lambda r: (order[r["generation"]], r["D"], r["dtype"], order[r["kind"]]))
    for r in plain:
        name = f"rattention_{r['kind']}"
        x = r["kernels"][name]
        n = x["bundles"] / 1000
        cells = [
            *(r["generation"], r["D"], r["dtype"], r["kind"], f"{r['config']['chunk']} x {r['config']['blocks']}"),
            *(f"{x['bundles_per_token_head']:.2f}", f"{x['use']['MXU']:.2f}", f"{x['use']['VALU']:.2f}"),
            *(f"{x['spills']['spill'] / n:.0f}", f"{x['spills']['fill'] / n:.0f}"),
            *(f"{x['hbm_bytes_per_token_head']:.0f}", f"{x['vmem_bytes'] / 2**20:.1f}"),
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def find(results: list[dict[str, Any]], wanted: dict[str, Any]) -> dict[str, Any] | None:
    return next((r for r in results if all(r.get(k) == v for k, v in wanted.items())), None)


MARKS = ("<!-- tpu_schedule: begin -->\n", "<!-- tpu_schedule: end -->")


def page(text: str, document: dict[str, Any]) -> str:
    """The page with the tables of `document` between its marks."""
    head, rest = text.split(MARKS[0])
    return head + MARKS[0] + tables(document) + MARKS[1] + rest.split(MARKS[1])[1]


def main() -> None:
    parser = argparse.ArgumentParser(description="Scheduled bundles of the TPU kernels.")
    parser.add_argument("--generations", nargs="+", default=list(GENERATIONS), choices=GENERATIONS)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--dims", nargs="+", type=int, default=[64, 128, 256])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--matrix", action="store_true", help="only the kernels in their defaults, nothing beside them")
    parser.add_argument("--page", action="store_true", help="measure nothing, write the tables of docs/pallas.md")
    parser.add_argument("--again", action="store_true", help="measure also what the record holds")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    sys.path[:0] = [str(ROOT / "spec"), str(ROOT / "backends" / "jax"), str(ROOT / "benchmarks")]
    if options.worker:
        print(json.dumps(worker(json.loads(options.worker[0]), options.worker[1])))
        return
    document: dict[str, Any] = {"shape": SHAPE | {"window": WINDOW}, "versions": versions(), "results": []}
    if options.out.exists():
        old = json.loads(options.out.read_text())
        if options.page or old["versions"] == document["versions"]:
            document = old
    for job in [] if options.page else jobs(options):
        known = next((r for r in document["results"] if same(r, job)), {})
        digest = program(job)
        if not options.again and "error" not in known and known.get("program") == digest:
            continue
        result = run(job) | {"program": digest, "commit": commit()}
        document["results"] = [r for r in document["results"] if not same(r, result)] + [result]
        shown = {k: result.get(k) for k in (*job, "bundles_per_token_head", "error")}
        print(" ".join(f"{k}={v}" for k, v in shown.items() if v is not None), flush=True)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(document, indent=1) + "\n")
    if options.out == RESULTS and PAGE.exists():
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), document), encoding="utf-8")


if __name__ == "__main__":
    main()
