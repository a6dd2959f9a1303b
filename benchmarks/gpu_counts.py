"""Bytes moved and operations done by each Triton kernel, per token and query head, beside the least possible.

    python benchmarks/gpu_counts.py

Counted from the algorithm and the frozen configuration, not measured: `memory` is what must cross main memory when
every tile that several programs read is found in the L2 cache after the first, `cache` what the programs ask of that
cache, `operations` those of the matrix products (a multiplication and an addition are two), `exponentials` those of
softmax and feature maps. The shape is that of the benchmark. Written to benchmarks/results/triton_counts.json;
`python benchmarks/triton_tables.py` puts it into docs/kernels.md.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / p) for p in ("spec", "backends/torch")]

import torch  # noqa: E402
from rattention.torch.triton.config import Config, config_for  # noqa: E402

D, HQ, HKV, W, KIND = 128, 16, 4, 511, "sm_90"
BYTES = 2  # bfloat16
PROGRAMS = 512  # wanted by a decoding step: see ring.py
DECODE_BATCH = 64


def least(window: int, G: int, D: int, Dv: int) -> dict[str, dict[str, float]]:
    """Forward and backward per token and query head: every input read and every output written once; exactly the
    window's pairs, one update and one read of a state per token. Backward: five products per pair instead of two, and
    twice the work of the state."""
    F, row = 2 * D, (D + Dv) * BYTES
    return {
        "forward": {
            "memory": (D + Dv) * BYTES + row / G,
            "operations": 2 * (D + Dv) * (window + 1) + 2 * F * Dv * (1 + 1 / G),
            "exponentials": window + 1 + F * (1 + 1 / G),
        },
        "backward": {
            "memory": (2 * D + 2 * Dv) * BYTES + 2 * row / G,
            "operations": 2 * (3 * D + 2 * Dv) * (window + 1) + 4 * F * Dv * (1 + 1 / G),
            "exponentials": window + 1 + F * (1 + 1 / G),
        },
    }


def flex(total: int, T: int, D: int, Dv: int, block: int = 128) -> dict[str, float]:
    """Operations of softmax attention with a window of `total` tokens, per token and head, in whole blocks: two
    products per pair forward, five backward."""
    n = -(-T // block)
    blocks = sum(min(i, -(-(total - 1) // block)) + 1 for i in range(n))
    pairs = blocks * block * block / T
    return {"forward": pairs * 2 * (D + Dv), "backward": pairs * 2 * (3 * D + 2 * Dv)}


def counts(c: Config) -> dict[str, dict[str, Any]]:
    """kernel -> memory and cache bytes, operations, each per token and query head; `floor` has the least of each."""
    G, Dv, F, N = HQ // HKV, D, 2 * D, c.chunk
    row = (D + Dv) * BYTES  # one key and value
    state, local = F * Dv * BYTES / N / G, F * Dv * 4 / N / G  # per token: saved state, float32 sums of a chunk

    def tokens(rows: int) -> int:
        return rows // G

    def entry(memory: float, cache: float, operations: float, exponentials: float = 0) -> dict[str, Any]:
        amounts = {"memory": memory, "cache": cache, "operations": operations, "exponentials": exponentials}
        return {name: round(x) for name, x in amounts.items()}

    # Keys that a tile of C queries reads, on average: half a chunk up to the window's edge, the window, its own tokens.
    def residue(rows: int, keys: int) -> float:
        return N / 2 + tokens(rows) + keys / 2

    def window(rows: int, keys: int) -> float:
        return W + tokens(rows) + keys / 2

    out: dict[str, dict[str, Any]] = {}
    passes = -(-Dv // c.values)
    out["rotate_keys"] = entry(2 * D * BYTES / G, 2 * D * BYTES / G, 0)
    out["local_states"] = entry(row / G + local, (passes * D + Dv) * BYTES / G + local, 2 * F * Dv / G, passes * F / G)
    out["carry_states"] = entry(local + state, local + state, 0)
    t = c.attend
    soft, linear = window(t.rows, t.keys), residue(t.rows, t.residue)
    read = (D + Dv) * BYTES + 12
    out["attend"] = entry(
        read + (row + D * BYTES) / G + state,
        read + (soft + linear) * row / t.rows + F * Dv * BYTES / t.rows,
        soft * 2 * (D + Dv) + linear * 2 * (F + Dv) + 2 * F * Dv,
        soft + linear * F / t.rows + F,
    )
    t = c.output_grad
    soft, linear = window(t.rows, t.keys), residue(t.rows, t.keys)
    read = (2 * D + 3 * Dv) * BYTES + 16
    out["output_grad"] = entry(
        read + (row + D * BYTES) / G + state,
        read + (soft + linear) * row / t.rows + F * Dv * BYTES / t.rows,
        soft * 2 * (D + Dv) + linear * 2 * (F + Dv) + 2 * F * Dv,
        soft + linear * F / t.rows + F,
    )
    t = c.query_grad
    soft, linear = window(t.rows, t.keys), residue(t.rows, t.keys)
    read = (3 * D + 2 * Dv) * BYTES + 8
    out["query_grad"] = entry(
        read + (row + D * BYTES) / G + state,
        read + (soft + linear) * row / t.rows + F * Dv * BYTES / t.rows,
        soft * 2 * (2 * D + Dv) + linear * 2 * (F + Dv) + 2 * F * Dv,
        soft + linear * F / t.rows + F,
    )
    out["local_states, backwards"] = entry(row + local, (passes * D + Dv) * BYTES + local, 2 * F * Dv, passes * F)
    out["carry_gradients"] = entry(local + state, local + state, 0)
    t = c.residue_grad
    queries = N / 2 + t.keys / 2 + tokens(t.rows) / 2
    launches = 2 if c.split_residue else 1
    read = (row + 4 * (D + Dv)) / G
    out["residue_grad"] = entry(
        read + launches * row + state,
        read + launches * (queries * row / t.keys + F * Dv * BYTES / t.keys / G),
        queries * 2 * (2 * F + 2 * Dv) + 4 * F * Dv / G,
        launches * (queries * F / t.keys + F / G) + F / G,
    )
    t = c.key_grad
    queries = W + t.keys + tokens(t.rows) / 2
    read = (2 * row + 4 * (D + Dv)) / G
    out["key_grad"] = entry(
        read + row + 8, read + queries * (row + 8) / t.keys, queries * 2 * (2 * D + 2 * Dv), queries
    )

    floors = least(W, G, D, Dv)
    names = list(out)
    split = names.index("output_grad")
    for label, part in (("forward", names[:split]), ("backward", names[split:])):
        out[label] = {k: sum(out[n][k] for n in part) for k in ("memory", "cache", "operations", "exponentials")}
        out[f"{label}, least"] = {"cache": None} | {k: round(x) for k, x in floors[label].items()}
    ring, both_ways = W * row / G, 2 * F * Dv * 4 / G
    splits = 1
    while splits < F // 32 and DECODE_BATCH * HKV * splits < PROGRAMS:
        splits *= 2
    parts = 2 * splits * (2 * Dv + 2) * 4 if splits > 1 else 0  # written, and read by `combine`
    products = 2 * (D + Dv) * W + 2 * F * Dv
    special = W + F * (1 + 1 / G) * splits
    out[f"decode, batch {DECODE_BATCH}"] = entry(ring + both_ways + parts, ring + both_ways + parts, products, special)
    out["decode, least"] = entry(ring + both_ways, 0, products, W + F * (1 + 1 / G)) | {"cache": None}
    return out


def against(table: dict[str, dict[str, Any]], T: int = 8192, total: int = 4096) -> dict[str, float]:
    """Matrix operations of softmax attention with a wide window over ours."""
    wide = flex(total, T, D, D)
    both = wide["forward"] + wide["backward"]
    return {
        "forward": wide["forward"] / table["forward"]["operations"],
        "forward + backward": both / (table["forward"]["operations"] + table["backward"]["operations"]),
    }


def report() -> dict[str, Any]:
    config = config_for(KIND, D, D, torch.bfloat16)
    table = counts(config)
    about = {"D": D, "Dv": D, "Hq": HQ, "Hkv": HKV, "window": W, "dtype": "bfloat16", "kind": KIND}
    ratios = {n: round(x, 2) for n, x in against(table).items()}
    return {
        "about": about,
        "config": str(config),
        "kernels": table,
        "operations of SWA-4096 at T 8192 over ours": ratios,
    }


def main() -> None:
    path = ROOT / "benchmarks" / "results" / "triton_counts.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report(), indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
