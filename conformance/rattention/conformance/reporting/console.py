"""The end of a run on the terminal: matrix, failing clauses, budget, failures with their replay lines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rattention.conformance.reporting.groups import changed, crashed, distinct, grouped
from rattention.conformance.reporting.summary import LARGEST_SHARE, failing, replay_line
from rattention.spec import load
from rich.console import Console
from rich.markup import escape
from rich.table import Table

STYLE = {
    "pass": "green",
    "CRASH": "bold white on red",
    "FAIL": "bold red",
    "unsupported": "yellow",
    "runner": "dim",
    "untested": "dim",
}
SHORT = {"unsupported": "-", "untested": "."}
"""How the matrix over several backends spells what takes too much room in a terminal of 80 columns."""
WIDE = 100
"""Columns of a terminal that has room for a matrix with lines."""
SHOWN = 8
"""Failures printed in full; the others are in the report."""

SAME = 3
"""Of the cases that say what the first of them says, those whose replay line is printed."""


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
    kept = [label for label, e in report["clauses"].items() if e["status"] == "runner"]
    if kept and not report["select"]:
        console.print(f"[dim]clauses that the runner keeps for a port behind the wire: {', '.join(kept)}[/]")
    console.print(_budget(report))
    for reason, count in list(report["unsupported"].items())[:6]:
        console.print(f"[yellow]unsupported[/] ({count} cases): {escape(reason)}")
    groups = grouped(report["failures"])
    for group in groups[:SHOWN]:
        _failures(console, report, group, cases or {})
    more = sum(len(group) for group in groups[SHOWN:])
    if more:
        console.print(f"[dim]and {more} more failure{'s' if more > 1 else ''} in the report[/]")
    c = report["cases"]
    if c["left_out"]:
        why = report["stopped"] or "the run was given up after these failures"
        console.print(f"[bold red]{c['left_out']} cases were not run[/]: {escape(why)}", soft_wrap=True)
    verdict = "[bold green]CONFORMING[/]" if report["conforming"] else "[bold red]NOT CONFORMING[/]"
    if report["unfinished"]:
        verdict = "[bold yellow]NO VERDICT[/]"
    console.print(
        f"{verdict}  {escape(report['backend'])}  {counts(report)}  "
        f"profile {report['profile']}, seed {report['seed']}, {report['seconds']:.1f} s",
        soft_wrap=True,
    )


def counts(report: dict[str, Any]) -> str:
    """How many cases ended how."""
    c = report["cases"]
    crashed = f" ({c['crashed']} crashed)" if c["crashed"] else ""
    return f"{c['passed']} passed, {c['failed']} failed{crashed}, {c['unsupported']} unsupported{by_runner(c)}"


def by_runner(cases: Mapping[str, int]) -> str:
    """The count of the cases that say nothing about a port behind the wire; "" where there are none."""
    return f", {cases['runner']} decided by the runner" if cases["runner"] else ""


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
            status = next((s for s in ("CRASH", "FAIL", "pass") if told[s]), next(iter(row.values())))
            some = status in ("CRASH", "FAIL", "pass") and told[status] < len(row)
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
            text = told_share(share) + (f" {name}" if len(outputs) > 1 else "")
            cells.append(f"[bold red]{text}[/]" if share > 1 else text)
        table.add_row(op, *cells)
    return table


def told_share(share: float) -> str:
    """A share of the budget; infinite where an output must be exact and is not."""
    return "inf" if share >= LARGEST_SHARE else f"{share:.3g}"


def _failures(console: Console, report: dict[str, Any], group: list[dict[str, Any]], cases: Mapping[str, Path]) -> None:
    """The first failure of a group in full; of the others, which say the same, what they are and where."""
    first, *others = group
    label = "[bold white on red]CRASH[/]  " if crashed(first) else ""
    console.rule(f"{label}{_title(first)}", align="left")
    console.print(f"case: {escape(first['case'])}", highlight=False, soft_wrap=True)
    if changed(first):
        console.print(changed(first), highlight=False)
    for violation in distinct(first["violations"])[:4]:
        guess = f"  [cyan](looks like: {escape(violation['guess'])})[/]" if violation["guess"] else ""
        console.print(f"- {escape(violation['message'])}{guess}", highlight=False)
        for line in violation["trace"].splitlines():
            console.print(f"    [dim]{escape(line)}[/]", highlight=False, soft_wrap=True)
        labels = violation["clauses"][:4]
        for label in labels:
            console.print(f"    [bold]{label}[/] {escape(load().clauses.get(label, ''))}", highlight=False)
    _replay(console, report, cases.get(first["file"]))
    if others:
        console.print(f"The same in {len(others)} more case{'s' if len(others) > 1 else ''}:")
    for other in others[:SAME]:
        _replay(console, report, cases.get(other["file"]))
    if len(others) > SAME:
        console.print(f"[dim]and {len(others) - SAME} more in the report[/]")


def _title(failure: dict[str, Any]) -> str:
    return f"[red]{escape(failure['property'])}[/]  {escape(failure['op'])}  {failure['dtype']}"


def _replay(console: Console, report: dict[str, Any], file: Path | None) -> None:
    if file is not None:
        console.print(escape(replay_line(file, report)), highlight=False, soft_wrap=True)
