"""What a run covers: for each operation its classes of sizes, attributes, options and values, and the pairs of them.

Counted are the cases of "agreement", which hold every element of every output against the reference; what the other
properties draw comes on top.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from rattention.conformance.runner import Settings, plan_units
from rattention.conformance.strategies import Plan
from rattention.conformance.strategies.pairs import Pairs, completes, wanted
from rattention.conformance.strategies.plan import supported
from rich.console import Console
from rich.markup import escape

FILES = ("coverage.json", "coverage.html")
JUDGED = "agreement"
SHOWN = 12
"""Pairs of an operation that the console names."""


@dataclass
class Covered:
    """One operation.

    pairs: how many were drawn, of all that can meet. asked: likewise, of those that the profile holds under every seed.
    missing: pairs never drawn, as (factor, class, factor, class); a class that was never drawn stands with itself.
    apart: how many pairs no call has, by reason. undeclared: classes that the backend does not take.
    """

    op: str
    cases: int
    counts: dict[str, dict[str, int]]
    pairs: tuple[int, int]
    asked: tuple[int, int]
    missing: list[tuple[str, str, str, str]]
    apart: dict[str, int] = field(default_factory=dict)
    undeclared: list[str] = field(default_factory=list)


def covered(plan: Plan, settings: Settings) -> dict[str, tuple[Covered, Pairs]]:
    """Operation to what its cases of a run hold."""
    units = plan_units(plan, settings)
    found = {}
    for op in supported(plan):
        drawn = [u.recipe for u in units if u.property_name == JUDGED and u.recipe.op == op]
        pairs = Pairs(plan, op)
        pairs.add(drawn)
        found[op] = (_covered(pairs, len(drawn), plan), pairs)
    return found


def _covered(p: Pairs, cases: int, plan: Plan) -> Covered:
    counts: dict[str, dict[str, int]] = {}
    undeclared = []
    for (factor, name), times, declared in zip(p.names, p.times, p.declared, strict=True):
        if declared:
            counts.setdefault(factor.name, {})[name] = int(times)
        else:
            undeclared.append(f"{factor.name} {name}")
    gaps = [(p.names[i], p.names[j]) for i, j in np.argwhere(np.triu(p.missing()))]
    missing = [(f.name, x, g.name, y) for (f, x), (g, y) in gaps]
    able = int(np.triu(p.can_meet).sum())
    apart: dict[str, int] = {}
    for i, row in enumerate(p.reasons):
        for j, why in enumerate(row[: i + 1]):
            if why and p.names[i][0] is not p.names[j][0] and p.declared[i] and p.declared[j]:
                apart[why] = apart.get(why, 0) + 1
    asked = p.asked(wanted(plan)) & p.can_meet if completes(plan) else np.zeros_like(p.can_meet)
    held = (int(np.triu(asked & p.seen).sum()), int(np.triu(asked).sum()))
    return Covered(p.op, cases, counts, (able - len(missing), able), held, missing, apart, undeclared)


def totals(found: Mapping[str, tuple[Covered, Pairs]], what: str = "pairs") -> tuple[int, int]:
    """Pairs drawn, and all that can meet, over every operation; what="asked": of those that the profile holds."""
    parts = [getattr(one, what) for one, _ in found.values()]
    return sum(drawn for drawn, _ in parts), sum(able for _, able in parts)


def print_covered(console: Console, found: Mapping[str, tuple[Covered, Pairs]]) -> None:
    """The table of each operation, and the pairs that were never drawn."""
    for one, _ in found.values():
        drawn, able = one.pairs
        console.print(f"[bold]{one.op}[/]  {one.cases} cases, {drawn} of {able} pairs")
        for factor, counts in one.counts.items():
            classes = "  ".join(f"{name}: {n}" if n else f"[red]{name}: 0[/]" for name, n in counts.items())
            console.print(f"  [cyan]{factor}[/]  {classes}", soft_wrap=True)
        if one.undeclared:
            console.print(f"  not declared: {escape(', '.join(one.undeclared))}", soft_wrap=True)
        for why, number in one.apart.items():
            console.print(f"  {number} pairs cannot meet: {escape(why)}", soft_wrap=True)
        for f, x, g, y in one.missing[:SHOWN]:
            pair = f"{f} {x}" if (f, x) == (g, y) else f"{f} {x} with {g} {y}"
            console.print(f"  [red]never drawn[/]  {escape(pair)}", soft_wrap=True)
        if len(one.missing) > SHOWN:
            console.print(f"  [red]never drawn[/]  {len(one.missing) - SHOWN} more; --report names them all")
    drawn, able = totals(found)
    held, asked = totals(found, "asked")
    console.print(f"{drawn} of {able} pairs that can meet are drawn; {_promise(held, asked, able)}", soft_wrap=True)


def _promise(held: int, asked: int, able: int) -> str:
    if not asked:
        return "each new shape costs this backend a program or an interpreter's time, so no pair is promised"
    if asked == able:
        return "this profile promises all of them"
    return f"of the {asked} that this profile promises, those that matter most, {held} are"


def coverage_files(about: Mapping[str, Any], found: Mapping[str, tuple[Covered, Pairs]]) -> dict[str, bytes]:
    """coverage.json with every number, and coverage.html with a picture of each operation's pairs."""
    plain = {**about, "operations": {op: vars(one) for op, (one, _) in found.items()}}
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, trim_blocks=True
    )
    page = env.get_template("coverage.html.j2").render(
        about=about, found=[(one, _picture(pairs)) for one, pairs in found.values()]
    )
    text = json.dumps(plain, indent=1, ensure_ascii=False) + "\n"
    return {"coverage.json": text.encode(), "coverage.html": page.encode()}


def _picture(p: Pairs) -> list[dict[str, Any]]:
    """Rows of a lower triangle: the class, and for each earlier one whether the pair was drawn, missed or cannot be."""
    rows = []
    for i, (factor, name) in enumerate(p.names):
        cells = []
        for j in range(i + 1):
            one, two = f"{factor.name} {name}", f"{p.names[j][0].name} {p.names[j][1]}"
            state = "drawn" if p.can_meet[i, j] and p.seen[i, j] else "missed" if p.can_meet[i, j] else "apart"
            why = p.reasons[i][j] or ("" if p.can_meet[i, j] else "not declared")
            cells.append((state, f"{one}, {two}" + (f": {why}" if why else f": {state}")))
        rows.append({"factor": factor.name, "name": name, "times": int(p.times[i]), "cells": cells})
    return rows
