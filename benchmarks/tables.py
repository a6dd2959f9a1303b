"""Writes the tables of the README and the docs from benchmarks/results; `--check` only says whether they are current.

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
PAGES = [ROOT / p for p in ("README.md", "docs/conformance.md", "docs/torch.md")]
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


def diagnosis(told: dict[str, Any]) -> str:
    """One row per list of faults, and one per fault whose clause is not at the head."""
    header = ("faults", "planted", "found", "clause at the head", "clause among the first three")
    body = []
    for name, n in told["summary"].items():
        shares = (f"{n[key]} ({100 * n[key] / n['faults']:.0f} %)" for key in ("head", "three"))
        body.append((name, str(n["faults"]), str(n["found"]), *shares))
    head = f"Profile {told['profile']}, seed {told['seed']}.\n\n" + rows(header, body)
    missed = [
        (
            row["title"],
            row["list"],
            " or ".join(row["clauses"]),
            str(row["place"] or "none"),
            ", ".join(row["first three"]),
        )
        for row in told["rows"]
        if row["place"] != 1
    ]
    if not missed:
        return head
    return f"{head}\nWhere another clause came first:\n\n" + rows(
        ("fault", "faults", "breaks", "place", "first three"), missed
    )


def cpu(told: dict[str, Any]) -> str:
    """The ratios, and on what they were taken."""
    shape, device = told["shape"], told["device"]
    sizes = ", ".join(f"{name} {value}" for name, value in shape.items() if name != "dtype")
    versions = f"torch {told['torch']['torch']}, jax {told['jax']['jax']}"
    head = (
        f"{sizes}, {shape['dtype']}; {device['processor']}, {device['cores']} cores; {versions}. Ratios of times.\n\n"
    )
    body = [(f"{name} {what}", f"{x:.2f}") for name in ("torch", "jax") for what, x in told[name]["ratios"].items()]
    decode = told["torch"]["decode"]
    body.append(
        (f"torch decode: token {decode['tokens']} over {decode['early position']}", f"{decode['late over early']:.2f}")
    )
    return head + rows(("what", "ratio"), body)


def speed(schedule: dict[str, Any], counts: dict[str, Any], told: dict[str, Any]) -> str:
    """One line per kind of machine: what was measured without one is said to be."""

    def bundles(**wanted: Any) -> float:
        plain = {"generation": "v5p", "D": 128, "dtype": "bfloat16"} | wanted
        found = [
            r["bundles_per_token_head"]
            for r in schedule["results"]
            if all(r.get(k) == v for k, v in plain.items()) and not r.get("rope")
        ]
        assert len(found) == 1, (wanted, found)
        return found[0]

    body = []
    for name, kind in (("forward", "forward"), ("forward + backward", "backward")):
        ours, full = bundles(what="ours", mode="mix", kind=kind), bundles(what="splash", tokens=4096, kind=kind)
        body.append(
            (
                f"TPU v5p, {name}",
                f"{ours:.1f} instruction bundles per token and head",
                f"{full / ours:.1f}x fewer than splash attention over 4096 tokens",
                "the compiler's schedule; no TPU ran",
            )
        )
    for name, ratio in counts["operations of SWA-4096 at T 8192 over ours"].items():
        body.append(
            (
                f"GPU, {name}",
                "",
                f"{ratio:.1f}x fewer matrix operations than a sliding window of 4096",
                "counted; no GPU ran",
            )
        )
    for name in ("forward", "forward+backward"):
        ratio = told["torch"]["ratios"][f"{name}: over sdpa"]
        what = f"PyTorch eager on a CPU, {name.replace('+', ' + ')}"
        body.append((what, "", f"{ratio:.2f} of the time of full causal attention at T {told['shape']['T']}", "timed"))
    return rows(("what", "cost", "against", "how known"), body)


TABLES: dict[str, tuple[tuple[str, ...], Callable[..., str]]] = {
    "sharpness": (("sharpness",), sharpness),
    "mutants": (("mutants",), mutants),
    "false_alarms": (("false_alarms",), false_alarms),
    "diagnosis": (("diagnosis",), diagnosis),
    "cpu": (("cpu",), cpu),
    "speed": (("tpu_schedule", "triton_counts", "cpu"), speed),
}
"""By name: the files of benchmarks/results that a table is made of, and how."""


def rendered(text: str) -> str:
    """The page with every table for which there are results."""

    def fill(m: re.Match[str]) -> str:
        stems, make = TABLES[m[2]]
        files = [RESULTS / f"{stem}.json" for stem in stems]
        if not all(file.exists() for file in files):
            return m[0]
        return m[1] + "\n" + make(*(json.loads(file.read_text(encoding="utf-8")) for file in files)) + "\n" + m[3]

    return MARK.sub(fill, text)


def main(arguments: list[str]) -> int:
    stale = False
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        new = rendered(text)
        stale |= new != text
        if "--check" not in arguments:
            page.write_text(new, encoding="utf-8")
    return int(stale and "--check" in arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
