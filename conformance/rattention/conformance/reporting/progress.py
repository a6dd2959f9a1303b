"""How far a run is: a bar on a terminal, lines in a log."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rattention.conformance.reporting.console import counts
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

EVERY = 60.0
"""Seconds between two lines of a log."""


class Steps:
    """Told of every step. In a log the first one and one a minute make a line, so that a long run is seen to be alive.

    name: of what runs. about: what is said of it when it begins. what: is counted, such as cases.
    """

    def __init__(self, console: Console, name: str, about: str, what: str, bar: Progress | None = None):
        self.console, self.name, self.about, self.what, self.bar = console, name, about, what, bar
        self.task = bar.add_task("", total=None, failed="") if bar else None
        self.said = 0.0

    def __call__(self, done: int, total: int, failed: int) -> None:
        count = f"{failed} failed" if failed else ""
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=done, total=total, failed=count)
        elif not self.said:
            self.line(f"begins: {self.about}, {total} {self.what}")
        elif time.monotonic() - self.said > EVERY:
            self.line(f"{done} of {total} {self.what}{f', {count}' if count else ''}")

    def line(self, text: str) -> None:
        """A line of a log; nothing on a terminal, where the bar is."""
        self.said = time.monotonic()
        if self.bar is None:
            self.console.print(f"{escape(self.name)} {escape(text)}", soft_wrap=True, highlight=False)


@contextmanager
def steps(console: Console, name: str, about: str, what: str = "cases") -> Iterator[Steps]:
    """Show the steps that the block tells of."""
    if not console.is_terminal:
        yield Steps(console, name, about, what)
        return
    failed = TextColumn("[red]{task.fields[failed]}")
    columns = (TextColumn(escape(name)), BarColumn(), MofNCompleteColumn(), failed, TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        yield Steps(console, name, about, what, bar)


def end_of(report: dict[str, Any]) -> str:
    """What a log says of a run that has ended."""
    verdict = "no verdict" if report["unfinished"] else "conforming" if report["conforming"] else "not conforming"
    return f"ends: {verdict}, {counts(report)}, {report['seconds']:.1f} s"
