"""One outcome as plain data: the content of report.json, and what every other report is made from."""

from __future__ import annotations

import math
import re
import shlex
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from rattention.conformance.properties import REGISTRY
from rattention.conformance.runner import Outcome
from rattention.conformance.session import Failure
from rattention.spec import load

LARGEST_SHARE = 1e9
"""A share of the budget in a report; larger ones, the infinite one included, are written as this: JSON has no inf."""


def case_name(failure: Failure) -> str:
    """File name of a failure's case: property, operation and place in the plan."""
    slug = re.sub(r"[^a-zA-Z0-9]+", "-", f"{failure.property_name}-{failure.op}-{failure.dtype}").strip("-")
    return f"{slug}-{failure.index}.safetensors"


def replay_line(file: Path, report: dict[str, Any]) -> str:
    """The command that runs a failing case again, quoted for a shell."""
    return shlex.join(["rattention", "replay", str(file), report["backend"]])


def summarise(outcome: Outcome) -> dict[str, Any]:
    """The report as JSON-ready data. Stable keys: backend, conforming, clauses, cases, budget."""
    settings = outcome.settings
    counts = Counter(r.status for r in outcome.results)
    return {
        "backend": outcome.backend,
        "conforming": outcome.conforming,
        "stopped": outcome.stopped,
        "unfinished": outcome.unfinished,
        "profile": settings.profile,
        "seed": settings.seed,
        "select": settings.select,
        "spec_version": load().version,
        "describe": _plain(dict(outcome.describe)),
        "seconds": round(outcome.seconds, 2),
        "cases": {
            "total": sum(counts[s] for s in ("pass", "fail", "unsupported", "runner")),
            "passed": counts["pass"],
            "failed": counts["fail"],
            "crashed": sum(r.crashed for r in outcome.results),
            "unsupported": counts["unsupported"],
            "runner": counts["runner"],
            "left_out": outcome.left_out,
            "calls": sum(r.calls for r in outcome.results),
        },
        "matrix": matrix(outcome),
        "clauses": clauses(outcome),
        "budget": budget(outcome),
        "properties": properties(outcome),
        "unsupported": dict(Counter(r.reason for r in outcome.results if r.status == "unsupported")),
        "runner": dict(Counter(r.reason for r in outcome.results if r.status == "runner")),
        "failures": [failure_json(f) for f in outcome.failures],
    }


def matrix(outcome: Outcome) -> dict[str, dict[str, str]]:
    """Operation by dtype: pass, CRASH, FAIL, unsupported or untested.

    CRASH is said where a case ended in an exception or with the process, and FAIL where answers are wrong alone. A case
    that shrinking has taken over to another dtype counts for that one as well: it fails there. What the backend does
    not declare is unsupported, though it passes the test that it is refused (BCK-3).
    """
    declared = {key: _listed(outcome.describe.get(key)) for key in ("operations", "dtypes")}
    seen: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    dtypes = load().storage_dtypes
    for r in outcome.results:
        for dtype in dtypes if r.dtype == "any" else (r.dtype,):
            seen[r.op, dtype]["crash" if r.crashed else r.status] += 1
    for failure in outcome.failures:
        if failure.found:
            seen[failure.op, failure.dtype]["crash" if any(v.crash for v in failure.violations) else "fail"] += 1
    table: dict[str, dict[str, str]] = {}
    for op in load().operations:
        row = {}
        for dtype in dtypes:
            counts = seen[op, dtype]
            if op == "rope_table" and dtype != "float32":
                continue
            row[dtype] = (
                "CRASH"
                if counts["crash"]
                else "FAIL"
                if counts["fail"]
                else "unsupported"
                if op not in declared["operations"] or dtype not in declared["dtypes"]
                else "pass"
                if counts["pass"]
                else "unsupported"
                if counts["unsupported"]
                else "untested"
            )
        table[op] = row
    return table


def _listed(value: Any) -> tuple[Any, ...]:
    """What a description lists; nothing where it is broken, which "description" reports."""
    return tuple(value) if isinstance(value, list | tuple) else ()


def clauses(outcome: Outcome) -> dict[str, dict[str, Any]]:
    """Label to text, status (pass, FAIL, runner, untested), and how often it was checked and broken.

    runner: a clause that the runner keeps for a port behind the wire, which the run says nothing about.
    `weight` ranks the failing ones: a violation that names one clause weighs more than one that lists suspects.
    """
    checked: Counter[str] = Counter()
    by: dict[str, set[str]] = defaultdict(set)
    for r in outcome.results:
        if r.status == "pass":
            checked.update(r.clauses)
            for label in r.clauses:
                by[label].add(r.property_name)
    broken: Counter[str] = Counter()
    weight: dict[str, float] = defaultdict(float)
    for violation in outcome.violations():
        for rank, label in enumerate(dict.fromkeys(violation.clauses)):
            broken[label] += 1
            weight[label] += 1.0 / ((1 + rank) * len(violation.clauses))
    table = {}
    for label, text in load().judged.items():
        idle = "runner" if label in outcome.held else "untested"
        status = "FAIL" if broken[label] else "pass" if checked[label] else idle
        table[label] = {
            "text": text,
            "status": status,
            "passed": checked[label],
            "violations": broken[label],
            "weight": round(weight[label], 3),
            "properties": sorted(by[label]),
        }
    return table


def failing(table: dict[str, dict[str, Any]]) -> list[str]:
    """Failing clauses, the likeliest first; NUM-1 is last, because every wrong number breaks it."""
    labels = [label for label, entry in table.items() if entry["status"] == "FAIL"]
    return sorted(labels, key=lambda label: (label == "NUM-1", -table[label]["weight"]))


def budget(outcome: Outcome) -> dict[str, dict[str, dict[str, float]]]:
    """Largest share of the budget used: operation, dtype, output. Above 1 is a failure."""
    worst: dict[str, dict[str, dict[str, float]]] = {}
    for r in outcome.results:
        for (op, dtype, name), share in r.shares.items():
            cell = worst.setdefault(op, {}).setdefault(dtype, {})
            cell[name] = max(cell.get(name, 0.0), round(min(share, LARGEST_SHARE), 4))
    order = list(load().operations)
    return {op: worst[op] for op in sorted(worst, key=order.index)}


def properties(outcome: Outcome) -> dict[str, dict[str, Any]]:
    """Property to its clauses, counts by status and seconds."""
    table: dict[str, dict[str, Any]] = {}
    for name, prop in REGISTRY.items():
        results = [r for r in outcome.results if r.property_name == name]
        counts = Counter(r.status for r in results)
        table[name] = {
            "about": prop.about,
            "clauses": list(prop.clauses),
            "passed": counts["pass"],
            "failed": counts["fail"],
            "unsupported": counts["unsupported"],
            "runner": counts["runner"],
            "seconds": round(sum(r.seconds for r in results), 2),
        }
    return table


def failure_json(failure: Failure) -> dict[str, Any]:
    """One failure without its case bytes."""
    return {
        "property": failure.property_name,
        "op": failure.op,
        "dtype": failure.dtype,
        "found": failure.found,
        "case": failure.call,
        "file": case_name(failure),
        "violations": [_plain(v.to_json()) for v in failure.violations],
    }


def _plain(value: Any) -> Any:
    """Strict JSON: non-finite numbers as text."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    return value if isinstance(value, str | int | float | bool | None) else str(value)
