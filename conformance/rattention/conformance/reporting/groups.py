"""Failures that say the same, together: one fault of a backend shows in many cases."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def grouped(failures: Iterable[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Failures of a report in groups of equal messages, in the order of the first of each.

    Crashes at one place are equal, whatever sizes or names their texts tell.
    """
    found: dict[Any, list[dict[str, Any]]] = {}
    for failure in failures:
        found.setdefault(frozenset(_said(v) for v in failure["violations"]), []).append(failure)
    return list(found.values())


def distinct(violations: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Violations of one failure, each message once."""
    return list({_said(v): v for v in reversed(list(violations))}.values())[::-1]


def _said(violation: dict[str, Any]) -> str:
    places = [line for line in violation["trace"].splitlines() if line.startswith('  File "')]
    return "\n".join(places) or violation["message"]


def crashed(failure: dict[str, Any]) -> bool:
    return any(v["kind"] == "crash" for v in failure["violations"])


def changed(failure: dict[str, Any]) -> str:
    """What is said where the case that is left has another dtype than the one that failed first."""
    if not failure["found"]:
        return ""
    return f"found in {failure['found']}; made smaller, it fails in {failure['dtype']} too"
