"""One backend, or all that run here: run, write what was found, print it, and say how the command ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rattention.conformance import backends, reporting, runner, workers
from rattention.conformance.output import warn
from rich.console import Console
from rich.markup import escape
from rich.table import Table


@dataclass
class Found:
    """One backend's run: its summary, where its failing cases are (by file name), whether its report was written."""

    summary: dict[str, Any]
    cases: dict[str, Path]
    written: bool


def run_one(
    console: Console, target: str, settings: runner.Settings, folder: reporting.Folder, *, whole: bool, place: str = ""
) -> Found:
    """Run one backend under a progress bar, and write what was found.

    whole: write the report, not the failing cases alone. place: of these files in the folder, empty or ending in "/".

    Raises:
        CannotRun: nothing was run.
    """
    about = f"profile {settings.profile}, seed {settings.seed}"
    what = f"cases, of which --select {settings.select} takes its own" if settings.select else "cases"
    with reporting.steps(console, target, about, what) as step:
        try:
            outcome = runner.conform(target, settings, progress=step)
        except workers.SuiteFault as fault:
            raise backends.CannotRun(f"the suite itself failed at {fault}") from None
    if not outcome.stopped and outcome.empty:
        matches = "matches no case of this profile"
        if any(r.status == "runner" for r in outcome.results):
            matches = "matches only cases that the runner decides for a port behind the wire"
        raise backends.CannotRun(f"nothing to run: --select {settings.select} {matches}")
    summary = reporting.summarise(outcome)
    step.line(reporting.end_of(summary))
    files = reporting.report_files(outcome, summary) if whole else reporting.case_files(outcome)
    written = True
    try:
        folder.write({f"{place}{name}": data for name, data in files.items()})
    except reporting.CannotWrite as error:
        warn(str(error))
        written = False
    inside = f"{place}{reporting.CASES}/" if whole else place
    cases = {f["file"]: folder.shown / f"{inside}{f['file']}" for f in summary["failures"]}
    cases = {name: path for name, path in cases.items() if folder.has(f"{inside}{name}")}
    return Found(summary, cases, written and whole)


def exit_code(summaries: Sequence[dict[str, Any]]) -> int:
    """Exit code 1 where a backend does not conform, 2 where one has no verdict, 0 where all conform."""
    if any(not s["conforming"] and not s["unfinished"] for s in summaries):
        return 1
    return 2 if not summaries or any(s["unfinished"] for s in summaries) else 0


def run_all(console: Console, settings: runner.Settings, folder: reporting.Folder, *, whole: bool) -> int:
    """Every backend that runs here: first the matrix over all of them, then what failed, then the verdicts."""
    names, absent = backends.runnable()
    if not console.is_terminal:
        console.print(f"backends that run here: {', '.join(names)}", soft_wrap=True, highlight=False)
    places = reporting.folder_names(names)
    if whole:
        for place in places.values():
            reporting.try_folder(folder.shown / place, reporting.REPORT, (reporting.CASES,), what="--report")
    found: list[Found] = []
    broken: dict[str, str] = {}
    notes = [f"[yellow]cannot run here[/] {escape(reason)}" for reason in absent.values()]
    for name in names:
        own = settings
        if settings.profile != "smoke" and backends.cost(name) == "interpreted":
            # Kernels under an interpreter take minutes where others take seconds.
            own = replace(settings, profile="smoke")
            notes.append(
                f"{escape(name)} runs under an interpreter: smoke here; "
                f"rattention conform {escape(name)} --profile {settings.profile} --seed {settings.seed} runs the rest"
            )
        try:
            found.append(run_one(console, name, own, folder, whole=whole, place=f"{places[name]}/"))
        except backends.CannotRun as reason:  # the others have a verdict all the same
            broken[name] = str(reason)
            if not console.is_terminal:
                console.print(f"{escape(name)} could not run: {escape(str(reason))}", soft_wrap=True, highlight=False)
            notes.append(f"[bold red]could not run[/] {escape(name)}: {escape(str(reason))}")
            continue
        if found[-1].summary["stopped"] == runner.INTERRUPTED:
            break
    summaries = [f.summary for f in found]
    if summaries:
        reporting.print_matrices(console, summaries)
    for note in notes:
        console.print(note, soft_wrap=True)
    for one in found:
        if not one.summary["conforming"]:
            reporting.print_outcome(console, one.summary, one.cases)
    if whole:
        try:
            folder.write(reporting.overview_files(summaries, absent | broken, places))
            console.print(f"report: {escape(str(folder.shown / 'report.html'))}", soft_wrap=True)
        except reporting.CannotWrite as error:
            warn(str(error))
    kinds = ("passed", "failed", "unsupported", *(["runner"] if any(s["cases"]["runner"] for s in summaries) else []))
    columns = ("backend", "profile", "verdict", *kinds, "largest share", "seconds")
    if console.width >= reporting.WIDE:
        table = Table(title="All backends", title_justify="left")
    else:  # no lines and short heads, so that all of it stays whole in a terminal of 80 columns
        table = Table(title="All backends", title_justify="left", box=None, padding=(0, 1, 0, 0))
        columns = tuple({"unsupported": "unsup.", "largest share": "share"}.get(name, name) for name in columns)
    for column in columns:
        table.add_column(column, no_wrap=True)
    for s in summaries:
        verdict = "[green]conforming[/]" if s["conforming"] else "[bold red]not conforming[/]"
        verdict = "[yellow]no verdict[/]" if s["unfinished"] else verdict
        c = s["cases"]
        shares = [x for by_dtype in s["budget"].values() for outputs in by_dtype.values() for x in outputs.values()]
        counts = (str(c[k]) for k in kinds)
        worst, seconds = f"{max(shares, default=0.0):.3g}", f"{s['seconds']:.1f}"
        table.add_row(escape(s["backend"]), s["profile"], verdict, *counts, worst, seconds)
    left = [name for name in names if name not in broken and name not in [s["backend"] for s in summaries]]
    for names_of, verdict in (
        (broken, "[bold red]could not run[/]"),
        (left, "[yellow]not run[/]"),
        (absent, "[yellow]cannot run here[/]"),
    ):
        for name in names_of:
            table.add_row(escape(name), "", verdict)
    console.print(table)
    code = exit_code(summaries)
    return 2 if code == 0 and (broken or left) else code
