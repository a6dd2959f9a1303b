"""The end of a run on the terminal: matrix, failing clauses, budget, failures with their replay lines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rattention.conformance.reporting.summary import failing, replay_line
from rattention.spec import load
from rich.console import Console
from rich.markup import escape
from rich.table import Table

STYLE = {"pass": "green", "FAIL": "bold red", "unsupported": "yellow", "untested": "dim"}
SHORT = {"unsupported": "-", "untested": "."}
"""How the matrix over several backends spells what takes too much room in a terminal of 80 columns."""
WIDE = 100
"""Columns of a terminal that has room for a matrix with lines."""
SHOWN = 8
"""Failures printed in full; the others are in the report."""


LISTED = 10
"""Failing clauses with their text; the others by label alone."""
LIKELY = 0.15
"""How likely a clause must be to be listed with its text, in units of the likeliest."""


def print_outcome(console: Console, report: dict[str, Any], cases: Mapping[str, Path] | None = None) -> None:
    """Print one report. `cases`: where the case files of the failures are, by name; none where they are not."""
    console.print(_matrix(report))
    wrong = failing(report["clauses"])
    if wrong:
        table = Table(title="Failing clauses, the likeliest first", title_justify="left", show_header=False, box=None)
        likely = _likely(report["clauses"], wrong)
        for label in likely:
            entry = report["clauses"][label]
            table.add_row(f"[bold red]{label}[/]", escape(entry["text"]), f"[dim]{entry['violations']} violations[/]")
        console.print(table)
        if len(wrong) > len(likely):
            console.print(f"[dim]not ruled out, and hardly it: {', '.join(wrong[len(likely) :])}[/]")
    untested = [label for label, e in report["clauses"].items() if e["status"] == "untested"]
    if untested and not report["select"]:
        console.print(f"[dim]untested clauses: {', '.join(untested)}[/]")
    console.print(_budget(report))
    for reason, count in list(report["unsupported"].items())[:6]:
        console.print(f"[yellow]unsupported[/] ({count} cases): {escape(reason)}")
    for failure in report["failures"][:SHOWN]:
        _failure(console, report, failure, (cases or {}).get(failure["file"]))
    more = len(report["failures"]) - SHOWN
    if more > 0:
        console.print(f"[dim]and {more} more failure{'s' if more > 1 else ''} in the report[/]")
    c = report["cases"]
    if c["left_out"]:
        why = report["stopped"] or "the run was given up after these failures"
        console.print(f"[bold red]{c['left_out']} cases were not run[/]: {escape(why)}", soft_wrap=True)
    verdict = "[bold green]CONFORMING[/]" if report["conforming"] else "[bold red]NOT CONFORMING[/]"
    if report["unfinished"]:
        verdict = "[bold yellow]NO VERDICT[/]"
    console.print(
        f"{verdict}  {escape(report['backend'])}  {c['passed']} passed, {c['failed']} failed, "
        f"{c['unsupported']} unsupported  profile {report['profile']}, seed {report['seed']}, {report['seconds']:.1f} s"
    )


def _likely(table: dict[str, dict[str, Any]], wrong: list[str]) -> list[str]:
    """The failing clauses that are worth a look, at least three of them."""
    least = LIKELY * table[wrong[0]]["weight"]
    return [label for n, label in enumerate(wrong[:LISTED]) if n < 3 or table[label]["weight"] >= least]


def print_matrices(console: Console, reports: list[dict[str, Any]]) -> None:
    """Operation x backend over several reports: pass where every dtype that was tested passed."""
    table = Table(title="operation x backend", title_justify="left")
    if console.width < WIDE:  # no lines, so that names stay whole in a terminal of 80 columns
        table.box, table.padding = None, (0, 1, 0, 0)
    table.add_column("operation", no_wrap=True)
    for report in reports:
        table.add_column(escape(report["backend"].replace("-", "-\n")), overflow="fold")
    notes: dict[str, str] = {}
    for op in load().operations:
        cells = []
        for report in reports:
            row = report["matrix"][op]
            told = Counter(row.values())
            status = next((s for s in ("FAIL", "pass") if told[s]), next(iter(row.values())))
            some = status in ("FAIL", "pass") and told[status] < len(row)
            text = SHORT.get(status, status) + "*" * some
            if status in SHORT:
                notes[SHORT[status]] = status
            if some:
                notes["*"] = "some dtypes only, the backend's own report says which"
            cells.append(f"[{STYLE[status]}]{text}[/]")
        table.add_row(op, *cells)
    console.print(table)
    if notes:
        console.print(f"[dim]{'; '.join(f'{sign} {text}' for sign, text in sorted(notes.items()))}[/]")


def _matrix(report: dict[str, Any]) -> Table:
    table = Table(title=escape(f"{report['backend']}: operation x dtype"), title_justify="left")
    table.add_column("group")
    table.add_column("operation", no_wrap=True)
    for dtype in load().storage_dtypes:
        table.add_column(dtype)
    last = ""
    for op, row in report["matrix"].items():
        group = load().operations[op].group
        cells = [f"[{STYLE[s]}]{s}[/]" if (s := row.get(d)) else "" for d in load().storage_dtypes]
        table.add_row("" if group == last else group, op, *cells)
        last = group
    return table


def _budget(report: dict[str, Any]) -> Table:
    table = Table(title="Largest share of the error budget", title_justify="left")
    table.add_column("operation", no_wrap=True)
    dtypes = load().storage_dtypes
    for dtype in dtypes:
        table.add_column(dtype, justify="right")
    for op, row in report["budget"].items():
        cells = []
        for dtype in dtypes:
            outputs = row.get(dtype)
            if not outputs:
                cells.append("")
                continue
            name, share = max(outputs.items(), key=lambda kv: kv[1])
            text = f"{share:.3g}" + (f" {name}" if len(outputs) > 1 else "")
            cells.append(f"[bold red]{text}[/]" if share > 1 else text)
        table.add_row(op, *cells)
    return table


def _failure(console: Console, report: dict[str, Any], failure: dict[str, Any], file: Path | None) -> None:
    console.rule(f"[red]{escape(failure['property'])}[/]  {escape(failure['op'])}  {failure['dtype']}", align="left")
    console.print(f"case: {escape(failure['case'])}", highlight=False)
    for violation in failure["violations"][:4]:
        guess = f"  [cyan](looks like: {escape(violation['guess'])})[/]" if violation["guess"] else ""
        console.print(f"- {escape(violation['message'])}{guess}", highlight=False)
        labels = violation["clauses"][:4]
        for label in labels:
            console.print(f"    [bold]{label}[/] {escape(load().clauses.get(label, ''))}", highlight=False)
    if file is not None:
        console.print(escape(replay_line(file, report)), highlight=False, soft_wrap=True)
