"""Tables of docs/kernels.md from the records: counts, and what the ahead-of-time compiler made.

    python benchmarks/triton_tables.py

A place is marked `<!-- generated: NAME -->` ... `<!-- end -->`; a test holds the page against the records.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "kernels.md"
RESULTS = ROOT / "benchmarks" / "results"
MARK = re.compile(r"(<!-- generated: (counts|ratios|aot[\w-]*) -->\n).*?(<!-- end -->)", re.DOTALL)


def record(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def counts() -> str:
    columns = {"memory": "main memory, bytes", "cache": "L2 cache, bytes", "operations": "matrix operations",
               "exponentials": "exponentials"}  # fmt: skip
    rows = [
        [name, *("" if x[c] is None else f"{x[c]:,}" for c in columns)]
        for name, x in record("triton_counts")["kernels"].items()
    ]
    return table(["kernel", *columns.values()], rows)


def ratios() -> str:
    found = record("triton_counts")["operations of SWA-4096 at T 8192 over ours"]
    return table(
        ["matrix operations of SWA-4096 over ours, T 8192", "ratio"], [[n, f"{x:.2f}"] for n, x in found.items()]
    )


def cell(rows: list[dict[str, Any]]) -> str:
    """Registers, spills, shared memory in KiB and matrix instructions; the larger of several launches of one kernel."""
    if any("registers" not in r for r in rows):
        return "does not build"
    most = {k: max(r[k] for r in rows) for k in ("registers", "spills", "shared")}
    kinds = "+".join(dict.fromkeys(kind for r in rows for kind in r["matrix"]))
    return f"{most['registers']} / {most['spills']} / {-(-most['shared'] // 1024)}{' ' + kinds if kinds else ''}"


def aot(D: int) -> str:
    """The default configurations in bfloat16: kernels by targets."""
    chosen = [
        r for r in record("triton_aot")["kernels"] if (r["D"], r["dtype"], r["variant"]) == (D, "bfloat16", "default")
    ]
    targets, kernels = (list(dict.fromkeys(r[k] for r in chosen)) for k in ("target", "kernel"))
    cells = {(k, t): [r for r in chosen if (r["kernel"], r["target"]) == (k, t)] for k in kernels for t in targets}
    return table(["kernel", *targets], [[k, *(cell(cells[k, t]) for t in targets)] for k in kernels])


def aot_all() -> str:
    """What else was built: binaries, failures to build or to fit, and the most bytes or registers spilled."""
    groups: dict[tuple[str, str, int, str], list[dict[str, Any]]] = {}
    for r in record("triton_aot")["kernels"]:
        groups.setdefault((r["target"], r["dtype"], r["D"], r["variant"]), []).append(r)
    rows = []
    for (target, dtype, D, variant), found in groups.items():
        failed = [r["kernel"] for r in found if "registers" not in r or any("shared" in f for f in r["faults"])]
        spills = {r["kernel"]: r["spills"] for r in found if r.get("spills")}
        worst = max(spills.items(), key=lambda x: x[1], default=None)
        rows.append([f"{target} {dtype} {variant}", str(D), str(len(found)), ", ".join(failed) or "none",
                     f"{worst[1]} in {worst[0]}" if worst else "none"])  # fmt: skip
    return table(["target, dtype, variant", "D", "binaries", "not built or too large", "most spilled"], rows)


def page(text: str) -> str:
    """`text` with every marked place written anew."""
    make = {
        "counts": counts,
        "ratios": ratios,
        "aot-64": lambda: aot(64),
        "aot-128": lambda: aot(128),
        "aot-all": aot_all,
    }
    return MARK.sub(lambda m: m[1] + make[m[2]]() + m[3], text)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"written to {PAGE}")
