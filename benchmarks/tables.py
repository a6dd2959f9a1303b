"""Writes the tables of docs/conformance.md from benchmarks/results; `--check` only says whether they are up to date.

    python benchmarks/tables.py [--check]

A table stands between `<!-- results: NAME -->` and `<!-- end -->`; without its results the place stays as it is.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "conformance.md"
MARK = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
DTYPES = ("float32", "bfloat16", "float16")


def rows(header: tuple[str, ...], body: list[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *body]
    return "".join("| " + " | ".join(c.replace("|", "\\|") for c in line) + " |\n" for line in lines)


def sharpness(told: dict[str, Any]) -> str:
    """One row per operation and output: the smallest error caught in every element, and in one."""

    def size(x: float | None) -> str:
        return "none" if x is None else f"{x:.1e}"

    body = []
    for op, outputs in told["smallest"].items():
        for name, cells in outputs.items():
            texts = (f"{size(c['all'])} / {size(c['one'])}" if (c := cells.get(d)) else "" for d in DTYPES)
            body.append((f"`{op}`", f"`{name}`", *texts))
    return f"Under {len(told['seeds'])} seeds.\n\n" + rows(("operation", "output", *DTYPES), body)


def mutants(told: dict[str, Any]) -> str:
    """One row per class of fault."""
    seeds = len(told["seeds"])
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in told["rows"]:
        kinds.setdefault(row["class"], []).append(row)
    body = []
    for kind, mine in sorted(kinds.items()):
        least = min(row["killed"] for row in mine)
        hardest = max(mine, key=lambda row: (-row["killed"], row["median_cases"]))
        tests = sorted({name for row in mine for name in row["killed_by"]})
        body.append((kind, str(len(mine)), f"{least} of {seeds}", f"`{hardest['mutant']}`", ", ".join(tests)))
    head = (
        f"{told['mutants']} mutants, {seeds} fresh seeds of {told['profile']}: {told['always_killed']} died under "
        f"every seed; in fewer than nine tenths: {', '.join(told['weak']) or 'none'}.\n\n"
    )
    return head + rows(("class", "mutants", "least killed", "hardest", "tests that killed"), body)


def false_alarms(told: dict[str, Any]) -> str:
    """One row per backend and profile."""
    body = []
    for entry in told["summary"]:
        worst = max((x for row in entry["largest_share"].values() for x in row.values()), default=0.0)
        counts = (str(entry["runs"]), str(entry["alarms"]), str(entry["units"]))
        seconds = f"{entry['seconds_median']:.0f}"
        body.append((f"`{entry['backend']}`", entry["profile"], *counts, seconds, f"{worst:.3f}"))
    header = ("backend", "profile", "runs", "alarms", "units", "seconds per run", "largest share of a budget")
    return rows(header, body)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "sharpness": sharpness,
    "mutants": mutants,
    "false_alarms": false_alarms,
}


def rendered(text: str) -> str:
    """The page with every table for which there are results."""

    def fill(m: re.Match[str]) -> str:
        file = RESULTS / f"{m[2]}.json"
        if not file.exists():
            return m[0]
        return m[1] + "\n" + TABLES[m[2]](json.loads(file.read_text(encoding="utf-8"))) + "\n" + m[3]

    return MARK.sub(fill, text)


def main(arguments: list[str]) -> int:
    text = PAGE.read_text(encoding="utf-8")
    new = rendered(text)
    if "--check" in arguments:
        return int(new != text)
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
