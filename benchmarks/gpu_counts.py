"""Bytes moved and operations done by each Triton kernel, per token and query head, beside the least possible.

    python benchmarks/gpu_counts.py [--markdown]

Counted from the algorithm and the frozen configuration, not measured: `memory` is what must cross main memory when
every tile that several programs read is found in the L2 cache after the first, `cache` what the programs ask of that
cache, `operations` those of the matrix products (a multiplication and an addition are two). The shape is that of the
benchmark. Written to benchmarks/results/triton_counts.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from rattention.torch.triton.config import Config, config_for

D, HQ, HKV, W, KIND = 128, 16, 4, 511, "sm_90"
BYTES = 2  # bfloat16


def counts(c: Config) -> dict[str, dict[str, Any]]:
    """kernel -> memory and cache bytes, operations, each per token and query head; `floor` has the least of each."""
    G, Dv, F, N = HQ // HKV, D, 2 * D, c.chunk
    row = (D + Dv) * BYTES  # one key and value
    state, local = F * Dv * BYTES / N / G, F * Dv * 4 / N / G  # per token: saved state, float32 sums of a chunk

    def tokens(rows: int) -> int:
        return rows // G

    def entry(memory: float, cache: float, operations: float) -> dict[str, Any]:
        return {"memory": round(memory), "cache": round(cache), "operations": round(operations)}

    # Keys that a tile of C queries reads, on average: half a chunk up to the window's edge, the window, its own tokens.
    def residue(rows: int, keys: int) -> float:
        return N / 2 + tokens(rows) + keys / 2

    def window(rows: int, keys: int) -> float:
        return W + tokens(rows) + keys / 2

    out: dict[str, dict[str, Any]] = {}
    passes = -(-Dv // c.values)
    out["rotate_keys"] = entry(2 * D * BYTES / G, 2 * D * BYTES / G, 0)
    out["local_states"] = entry(row / G + local, (passes * D + Dv) * BYTES / G + local, 2 * F * Dv / G)
    out["carry_states"] = entry(local + state, local + state, 0)
    t = c.attend
    soft, linear = window(t.rows, t.keys), residue(t.rows, t.residue)
    read = (D + Dv) * BYTES + 12
    out["attend"] = entry(
        read + (row + D * BYTES) / G + state,
        read + (soft + linear) * row / t.rows + F * Dv * BYTES / t.rows,
        soft * 2 * (D + Dv) + linear * 2 * (F + Dv) + 2 * F * Dv,
    )
    t = c.output_grad
    soft, linear = window(t.rows, t.keys), residue(t.rows, t.keys)
    read = (2 * D + 3 * Dv) * BYTES + 16
    out["output_grad"] = entry(
        read + (row + D * BYTES) / G + state,
        read + (soft + linear) * row / t.rows + F * Dv * BYTES / t.rows,
        soft * 2 * (D + Dv) + linear * 2 * (F + Dv) + 2 * F * Dv,
    )
    t = c.query_grad
    soft, linear = window(t.rows, t.keys), residue(t.rows, t.keys)
    read = (3 * D + 2 * Dv) * BYTES + 8
    out["query_grad"] = entry(
        read + (row + D * BYTES) / G + state,
        read + (soft + linear) * row / t.rows + F * Dv * BYTES / t.rows,
        soft * 2 * (2 * D + Dv) + linear * 2 * (F + Dv) + 2 * F * Dv,
    )
    out["local_states, backwards"] = entry(row + local, (passes * D + Dv) * BYTES + local, 2 * F * Dv)
    out["carry_gradients"] = entry(local + state, local + state, 0)
    t = c.residue_grad
    queries = N / 2 + t.keys / 2 + tokens(t.rows) / 2
    read = (row + 4 * (D + Dv)) / G
    out["residue_grad"] = entry(
        read + row + state,
        read + queries * row / t.keys + F * Dv * BYTES / t.keys / G,
        queries * 2 * (2 * F + 2 * Dv) + 4 * F * Dv / G,
    )
    t = c.key_grad
    queries = W + t.keys + tokens(t.rows) / 2
    read = (2 * row + 4 * (D + Dv)) / G
    out["key_grad"] = entry(read + row + 8, read + queries * (row + 8) / t.keys, queries * 2 * (2 * D + 2 * Dv))

    # Least: every input read and every output written once; exactly the window's pairs, one update and one read of a
    # state per token. Backward: five products per pair instead of two, and twice the work of the state.
    least = {
        "memory": round((D + Dv) * BYTES + row / G),
        "operations": 2 * (D + Dv) * (W + 1) + 2 * F * Dv * (1 + 1 / G),
    }
    back = {
        "memory": round((2 * D + 2 * Dv) * BYTES + 2 * row / G),
        "operations": 2 * (3 * D + 2 * Dv) * (W + 1) + 4 * F * Dv * (1 + 1 / G),
    }
    names = list(out)
    split = names.index("output_grad")
    for label, part, floor in (("forward", names[:split], least), ("backward", names[split:], back)):
        out[label] = {k: sum(out[n][k] for n in part) for k in ("memory", "cache", "operations")}
        out[f"{label}, least"] = {"memory": floor["memory"], "cache": None, "operations": round(floor["operations"])}
    ring = W * row / G
    out["decode"] = entry(ring + 2 * F * Dv * 4 / G, ring + 2 * F * Dv * 4 / G, 2 * (D + Dv) * W + 2 * F * Dv)
    out["decode, least"] = {k: out["decode"][k] if k != "cache" else None for k in out["decode"]}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description="Bytes and operations per token and query head, by kernel.")
    parser.add_argument("--markdown", action="store_true", help="print the table of docs/kernels.md")
    options = parser.parse_args()
    config = config_for(KIND, D, D, torch.bfloat16)
    table = counts(config)
    about = {"D": D, "Dv": D, "Hq": HQ, "Hkv": HKV, "window": W, "dtype": "bfloat16", "kind": KIND}
    path = Path(__file__).parent / "results" / "triton_counts.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"about": about, "config": str(config), "kernels": table}, indent=1)
    path.write_text(text + "\n", encoding="utf-8")
    if options.markdown:
        print("| kernel | main memory, bytes | L2 cache, bytes | matrix operations |\n|---|---:|---:|---:|")
        for name, x in table.items():
            cache = "" if x["cache"] is None else f"{x['cache']:,}"
            print(f"| {name} | {x['memory']:,} | {cache} | {x['operations']:,} |")


if __name__ == "__main__":
    main()
