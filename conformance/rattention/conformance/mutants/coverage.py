"""The both-ways rule: each clause has a mutant that a test of it kills, and a conforming run that exercises it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rattention.conformance import runner
from rattention.conformance.mutants import CATALOGUE
from rattention.conformance.mutants.runner import Death
from rattention.conformance.mutants.wire import WirePort
from rattention.spec import load


@dataclass(frozen=True)
class Row:
    """One clause: cases that passed in conforming runs, mutants that break it and died by a test of it, who passed."""

    clause: str
    passed: int
    killed: tuple[str, ...]
    backends: tuple[str, ...]


def passing(profile: str, seed: int, report: Path | None = None) -> dict[str, Counter[str]]:
    """Backend to passing cases per clause: `numpy` and a port behind the wire run here, others are read from `report`.

    Only conforming runs count.
    """
    outcome = runner.conform("numpy", runner.Settings(profile, seed, workers=0))
    found: dict[str, Counter[str]] = {}
    wire = runner.conform("wire", runner.Settings("smoke", seed), backend=WirePort())
    for name, run in (("numpy", outcome), ("eager form through exec:", wire)):
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
    for clause in load().clauses:
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
