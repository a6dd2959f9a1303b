"""What a planted fault is: one line of the plain port, replaced."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from rattention.spec import load

PORT = Path(__file__).with_name("port.py")


@dataclass(frozen=True)
class Fault:
    """A fault of one line.

    id, title: for people. clauses: what a reader of the specification would call it, two labels at most, written down
    before the suite was asked. old, new: a piece of one line of the port that occurs once, and what stands there
    instead.
    """

    id: str
    title: str
    clauses: tuple[str, ...]
    old: str
    new: str

    def backend(self) -> Any:
        """The port with the fault in it."""
        module = ModuleType(f"plain port, {self.id}")
        source = PORT.read_text(encoding="utf-8").replace(self.old, self.new)
        exec(compile(source, f"{PORT.name} with {self.id}", "exec"), module.__dict__)
        return module.port


def faults(*rows: tuple[str, str, str, str, str]) -> dict[str, Fault]:
    """The faults of a list by id, each checked: it changes one place in one line, and cites clauses that exist.

    Raises:
        ValueError: a row that does not.
    """
    source, found = PORT.read_text(encoding="utf-8"), {}
    for id, labels, title, old, new in rows:
        clauses = tuple(labels.split())
        if source.count(old) != 1 or "\n" in old.strip("\n") or old == new:
            raise ValueError(f"{id}: {old!r} must be a piece of one line and occur once, not {source.count(old)} times")
        if not 1 <= len(clauses) <= 2 or set(clauses) - set(load().clauses) or id in found:
            raise ValueError(f"{id}: one or two clauses of the specification and an id of its own are needed")
        found[id] = Fault(id, title, clauses, old, new)
    return found
