"""The both-ways rule: each clause has a mutant that a test of it kills, and a conforming run that exercises it."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rattention.conformance import runner
from rattention.conformance.mutants import CATALOGUE, Port
from rattention.conformance.mutants.runner import Death
from rattention.conformance.mutants.wire import WirePort
from rattention.spec import Call, Result, load


@dataclass(frozen=True)
class Row:
    """One clause: cases that passed in conforming runs, mutants that break it and died by a test of it, who passed."""

    clause: str
    passed: int
    killed: tuple[str, ...]
    backends: tuple[str, ...]


class KernelPort(Port):
    """The unchanged form with a kernel that it claims and names: what BCK-4 asks for."""

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "name": "eager form with a kernel", "kernels": ["matmul"]}

    def pack(self, call: Call, tensors: dict[str, np.ndarray], outputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return Result(dict(super().pack(call, tensors, outputs)), path="matmul", kernels=["matmul"])


def passing(profile: str, seed: int, report: Path | None = None) -> dict[str, Counter[str]]:
    """Backend to passing cases per clause: `numpy` and two ports run here, others are read from `report`.

    Only conforming runs count.
    """
    outcome = runner.conform("numpy", runner.Settings(profile, seed, workers=min(2, os.cpu_count() or 1)))
    found: dict[str, Counter[str]] = {}
    wire = runner.conform("wire", runner.Settings("smoke", seed), backend=WirePort())
    kernels = runner.conform("kernels", runner.Settings("smoke", seed, select="agreement"), backend=KernelPort())
    ran = {"numpy": outcome, "eager form through exec:": wire, "eager form with a kernel": kernels}
    for name, run in ran.items():
        if run.conforming:
            found[name] = Counter(c for r in run.results if r.status == "pass" for c in r.clauses)
    for file in sorted(report.glob("*/report.json")) if report else []:
        told = json.loads(file.read_text(encoding="utf-8"))
        if told.get("conforming") and told.get("backend") not in found:
            clauses = told.get("clauses") or {}
            found[str(told["backend"])] = Counter({c: int(e.get("passed", 0)) for c, e in clauses.items()})
    return found


def clause_rows(deaths: Sequence[Death], passes: Mapping[str, Counter[str]]) -> list[Row]:
    """One row per clause of the specification, in its order."""
    rows = []
    for clause in load().judged:
        killed = tuple(
            d.mutant for d in deaths if d.killed and clause in CATALOGUE[d.mutant].clauses and clause in d.clauses
        )
        who = tuple(name for name, counts in passes.items() if counts[clause])
        rows.append(Row(clause, sum(counts[clause] for counts in passes.values()), killed, who))
    return rows


def holes(rows: Sequence[Row]) -> list[str]:
    """What is missing, one line per clause and kind."""
    found = [f"{row.clause}: no mutant that breaks it is killed by a test of it" for row in rows if not row.killed]
    return found + [f"{row.clause}: no conforming run exercises it" for row in rows if not row.passed]


def markdown(rows: Sequence[Row]) -> str:
    """The table as a document."""
    lines = ["| clause | text | passing cases | killed mutants | backends |", "|---|---|---|---|---|"]
    for row in rows:
        text = load().clauses[row.clause].replace("|", "\\|")
        names = ", ".join(f"`{name}`" for name in row.killed[:6]) + (", ..." if len(row.killed) > 6 else "")
        lines.append(
            f"| {row.clause} | {text} | {row.passed} | {len(row.killed)}: {names} | {', '.join(row.backends)} |"
        )
    return "\n".join(lines) + "\n"
