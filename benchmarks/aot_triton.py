"""Ahead-of-time matrix: every kernel, built for every GPU target without a GPU.

    python benchmarks/aot_triton.py [--targets sm_90,gfx942] [--dims 64,128] [--dtypes bfloat16] [--variants] [--add]

Each kernel is captured as a device of that kind would launch it, compiled, and measured: registers, spills, shared
memory, matrix instructions. Written to benchmarks/results/triton_aot.json, beside what was compiled and with what; with
`--add`, rows of other targets, dims, dtypes and variants that the same sources gave before stay. Exit status 1 where a
kernel fails to build, does not fit the target's shared memory, or, in bfloat16 at D 64 and 128, spills or leaves the
matrix units idle. `python benchmarks/triton_tables.py` puts the record into docs/kernels.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from provenance import commit

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / p) for p in ("spec", "backends/torch")]
os.environ.pop("TRITON_INTERPRET", None)  # the interpreter would stand in for the compiler

import torch  # noqa: E402
import triton  # noqa: E402
from rattention.torch.triton.aot import SHARED_LIMIT, TARGETS, Binary, compile_launch, sources  # noqa: E402
from rattention.torch.triton.backward import backward  # noqa: E402
from rattention.torch.triton.forward import forward  # noqa: E402
from rattention.torch.triton.launch import Launch, capturing  # noqa: E402
from rattention.torch.triton.plan import Plan  # noqa: E402
from rattention.torch.triton.ring import Ring, step  # noqa: E402

ELEMENTWISE = frozenset({"carry_states", "carry_gradients", "rotate_keys", "combine"})
"""Kernels without a matrix product."""

WARPGROUP = frozenset({"attend", "output_grad", "query_grad", "residue_grad", "key_grad"})
"""Kernels that must use wgmma on sm_90."""


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launches(kind: str, D: int, dtype: torch.dtype, variants: bool = False) -> Iterator[tuple[str, Launch]]:
    """(variant, launch) of every kernel that a device of `kind` runs at head dim D."""
    B, T, Hq, Hkv, window = 2, 8192, 16, 4, 511
    base: dict[str, Any] = {
        "q": empty(B, T, Hq, D, dtype=dtype), "k": empty(B, T, Hkv, D, dtype=dtype),
        "v": empty(B, T, Hkv, D, dtype=dtype), "scale": None, "eps": 1e-6,
    }  # fmt: skip
    weights = {"swa_weight": empty(Hq, D), "rla_weight": empty(Hq, D)}
    table = {"rope_cos": empty(T, D // 2), "rope_sin": empty(T, D // 2)}
    scales = {"q_scale": empty(D), "k_scale": empty(D)}
    full = {**base, **weights, **table, **scales, "window": window, "feature_map": "softmax", "mode": "mix"}
    cases = {"default": full}
    if variants:
        packed = {"segment_ids": empty(B, T, dtype=torch.int32), "positions": empty(B, T, dtype=torch.int32)}
        carried = {"memory": empty(Hq, 2 * D, D), "initial_state": empty(B, Hkv, 2 * D, D)}
        cases |= {
            "segments": {**full, **packed, **carried},
            "window -1": {**full, "window": -1},
            "window None": {**full, "window": None},
            "identity": {**full, "feature_map": "identity"},
            "softmax branch": {**base, **table, "window": window, "feature_map": "identity", "mode": "soft"},
            "linear branch": {**base, **scales, "window": window, "feature_map": "relu", "mode": "linear"},
        }
    for name, arguments in cases.items():
        with capturing(kind) as found:
            plan = Plan(**arguments)
            forward(plan)
            final = None if plan.mode == "soft" else empty(B, Hkv, plan.F, D)
            backward(plan, empty(2, B, Hq, T), empty(B, T, Hq, D, dtype=dtype), final)
        seen: set[tuple[str, str]] = set()
        for x in found:
            key = (x.name, f"{x.constants.get('MODE')} {x.constants.get('KEYS')}")
            if key not in seen:
                seen.add(key)
                yield name, x
    with capturing(kind) as found:
        for rows in (1, 256):
            ring = Ring(
                empty(rows, window + 1, Hkv, D, dtype=dtype), empty(rows, window + 1, Hkv, D, dtype=dtype),
                empty(rows, Hkv, 2 * D, D), empty(rows, dtype=torch.int32),
            )  # fmt: skip
            new = [empty(rows, 1, h, D, dtype=dtype) for h in (Hq, Hkv, Hkv)]
            step(ring, *new, **weights, **table, **scales, window=window)
    for x in found:
        yield "default", x


def faults(binary: Binary, D: int, dtype: str, variant: str) -> list[str]:
    """What this binary breaks of the promises above."""
    found = []
    if binary.shared > SHARED_LIMIT[binary.target]:
        found.append(f"{binary.shared} bytes of shared memory, {SHARED_LIMIT[binary.target]} at most")
    if dtype == "bfloat16" and D in (64, 128) and variant == "default":
        if binary.spills:
            found.append(f"{binary.spills} spilled")
        if binary.kernel not in ELEMENTWISE and not binary.matrix:
            found.append("no matrix instructions")
        if binary.target == "sm_90" and binary.kernel in WARPGROUP and "wgmma" not in binary.matrix:
            found.append("no wgmma")
    return found


def measure(
    targets: list[str], dims: list[int], dtypes: list[str], variants: bool, kernels: set[str] | None = None
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    jobs = [(target, D, dtype) for target in targets for D in dims for dtype in dtypes]
    for target, D, dtype in jobs:
        for variant, x in launches(target, D, getattr(torch, dtype), variants):
            if kernels is not None and x.name not in kernels:
                continue
            entry: dict[str, Any] = {"D": D, "dtype": dtype, "variant": variant}
            began = time.perf_counter()
            try:
                binary = compile_launch(x, target)
            except Exception as error:
                reason = (str(error).strip().splitlines() or [repr(error)])[0]
                entry |= {"kernel": x.name, "target": target, "faults": [reason]}
            else:
                entry |= {**asdict(binary), "faults": faults(binary, D, dtype, variant)}
            rows.append(entry)
            took = time.perf_counter() - began
            print(f"{'FAULT' if entry['faults'] else 'ok':5} {took:5.1f} s  {entry}", flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description="Build every Triton kernel for every GPU target, without a GPU.")
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--dims", default="64,128")
    parser.add_argument("--dtypes", default="bfloat16")
    parser.add_argument("--kernels", default="", help="only these, by name")
    parser.add_argument("--variants", action="store_true", help="segments, memory, other windows, single branches")
    parser.add_argument("--add", action="store_true", help="keep the other rows that these sources gave before")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "triton_aot.json")
    options = parser.parse_args()
    targets, dims = options.targets.split(","), [int(d) for d in options.dims.split(",")]
    only = set(options.kernels.split(",")) if options.kernels else None
    about = {
        "commit": commit(),
        "sources": sources(),
        "triton": triton.__version__,
        "torch": torch.__version__,
        "shape": "B 2, T 8192, Hq 16, Hkv 4, w 511; decode at batch 1 and 256",
    }
    rows = measure(targets, dims, options.dtypes.split(","), options.variants, only)
    kept: list[dict[str, Any]] = []
    if options.add and options.out.is_file():
        before = json.loads(options.out.read_text(encoding="utf-8"))
        if all(before["about"][x] == about[x] for x in ("sources", "triton", "torch")):
            fresh = {(r["target"], r["D"], r["dtype"], r["variant"]) for r in rows}
            kept = [r for r in before["kernels"] if (r["target"], r["D"], r["dtype"], r["variant"]) not in fresh]
    order = list(TARGETS)
    every = sorted(kept + rows, key=lambda r: (order.index(r["target"]), r["dtype"], r["D"], r["variant"]))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    text = ",\n  ".join(json.dumps(r) for r in every)
    options.out.write_text(
        f'{{"about": {json.dumps(about, indent=1)},\n "kernels": [\n  {text}\n]}}\n', encoding="utf-8"
    )
    broken = [r for r in rows if r["faults"]]
    print(f"{len(rows)} binaries, {len(broken)} with faults; written to {options.out}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
