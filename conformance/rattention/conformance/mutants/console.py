"""`rattention mutants`: run, print who was killed by which test, and fail where the suite has a hole."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rattention.conformance import tensorfile
from rattention.conformance.interrupts import hold
from rattention.conformance.mutants import CATALOGUE
from rattention.conformance.mutants.coverage import Row, clause_rows, holes, markdown, passing
from rattention.conformance.mutants.runner import Death, run_mutants, select
from rattention.conformance.output import warn
from rattention.conformance.reporting import steps
from rich.console import Console
from rich.markup import escape
from rich.table import Table

SEED = 20250618
"""The seed of continuous integration, used where none is given."""


def command(profile: str, seed: int | None, report: Path | None, text: str, console: Console) -> int:
    """Exit code: 0 when every mutant dies and every clause is covered, 1 when not.

    2 when nothing matches `text`, or when the run was interrupted before one survived.
    """
    chosen = select(text)
    if not chosen:
        warn(f"--select {text}: no mutant is called so")
        return 2
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")  # one core per worker
    seed = SEED if seed is None else seed
    if console.is_terminal:  # a log has these words in the line that says that the run begins
        console.print(f"profile {profile}, seed {seed}, {len(chosen)} mutants")
    workers = max(1, min(2, os.cpu_count() or 1)) if len(chosen) > 8 else 0

    begin = time.perf_counter()
    deaths: list[Death] = []  # what is known if the run is interrupted

    def step(death: Death) -> None:
        deaths.append(death)
        show(len(deaths), len(chosen), sum(not d.killed for d in deaths))
        if not death.killed:
            console.print(f"[bold red]survivor[/] {death.mutant} after {death.cases} cases")

    rows: list[Row] = []
    whole = True
    with steps(console, "mutants", f"profile {profile}, seed {seed}", "mutants") as show:
        show(0, len(chosen), 0)
        try:
            deaths = run_mutants(profile, seed, chosen, workers=workers, progress=step)
            if not text:  # coverage is a statement about the whole catalogue
                show.line("all were run; now the honest backends, for the coverage of the clauses")
                rows = clause_rows(deaths, passing(profile, seed, report))
        except KeyboardInterrupt:
            hold()
            whole = False
            deaths = _in_order(deaths)
        alive = sum(not d.killed for d in deaths)
        killed = f"{len(deaths) - alive} of {len(chosen)} killed, {alive} survived"
        show.line(f"{'ends' if whole else 'interrupted'}: {killed}, {time.perf_counter() - begin:.1f} s")
    _print(deaths, rows, console)
    if not whole:
        console.print(f"[bold red]interrupted[/]: {len(chosen) - len(deaths)} mutants were not run")
    if report:
        try:
            _write(deaths, rows, report, profile, seed)
            console.print(f"report: {escape(str(report / 'mutants.json'))}", soft_wrap=True)
        except OSError as error:
            warn(f"{report} could not be written: {error.strerror or error}")
    if not all(d.killed for d in deaths) or holes(rows):
        return 1
    return 0 if whole else 2


def _in_order(deaths: list[Death]) -> list[Death]:
    """Those of the catalogue, whichever process was first."""
    place = {name: i for i, name in enumerate(CATALOGUE)}
    return sorted(deaths, key=lambda d: place[d.mutant])


def _print(deaths: list[Death], rows: list[Row], console: Console) -> None:
    table = Table(title="Mutants", title_justify="left")
    for column in ("mutant", "class", "breaks", "killed by", "on", "cases", "seconds"):
        table.add_column(column, overflow="fold")
    for d in deaths:
        m = CATALOGUE[d.mutant]
        by = d.test if d.killed else "[bold red]SURVIVES[/]"
        table.add_row(d.mutant, m.kind, " ".join(m.clauses), by, d.op, str(d.cases), f"{d.seconds:.2f}")
    console.print(table)
    if rows:
        clauses = Table(title="Clause coverage", title_justify="left")
        for column in ("clause", "passing cases", "killed mutants", "backends"):
            clauses.add_column(column, overflow="fold")
        for row in rows:
            clauses.add_row(row.clause, str(row.passed), str(len(row.killed)), ", ".join(row.backends))
        console.print(clauses)
    alive = [d.mutant for d in deaths if not d.killed]
    kinds = Counter(CATALOGUE[d.mutant].kind for d in deaths)
    console.print(f"{len(deaths) - len(alive)} of {len(deaths)} mutants killed, of {len(kinds)} classes")
    for name in alive:
        console.print(f"[bold red]survivor[/] {name}: {escape(CATALOGUE[name].title)}")
    for hole in holes(rows):
        console.print(f"[bold red]not covered[/] {escape(hole)}")


def _write(deaths: list[Death], rows: list[Row], report: Path, profile: str, seed: int) -> None:
    mutants: list[dict[str, Any]] = []
    for d in deaths:
        m = CATALOGUE[d.mutant]
        about = {"title": m.title, "class": m.kind, "breaks": list(m.clauses), "source": m.source}
        mutants.append({**about, "killed": d.killed, **asdict(d)})
    summary = {
        "profile": profile,
        "seed": seed,
        "killed": sum(d.killed for d in deaths),
        "mutants": mutants,
        "clauses": [asdict(row) for row in rows],
        "holes": holes(rows),
    }
    tensorfile.write_bytes(report / "mutants.json", (json.dumps(summary, indent=2) + "\n").encode("utf-8"))
    # Written in any case: the table of an earlier run must not stand beside the mutants of this one.
    table = markdown(rows) if rows else "Not measured: only part of the catalogue was run.\n"
    tensorfile.write_bytes(report / "coverage.md", table.encode("utf-8"))
