"""The files of a report as bytes: report.json, junit.xml, report.html and the failing cases; `folder` writes them."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jinja2
from rattention.conformance.judge import Violation
from rattention.conformance.reporting.console import told_share
from rattention.conformance.reporting.groups import changed, crashed, distinct, grouped
from rattention.conformance.reporting.summary import case_name, failing, replay_line
from rattention.conformance.runner import Outcome
from rattention.conformance.session import UnitResult
from rattention.spec import load

TEMPLATES = Path(__file__).resolve().parents[1] / "templates"


REPORT = ("report.json", "junit.xml", "report.html")
CASES = "cases"
SKIPPED = ("unsupported", "runner")
"""What junit.xml calls skipped: cases that say nothing for or against the backend."""


def folder_names(backends: Iterable[str]) -> dict[str, str]:
    """A folder for each backend of a report over several, whatever characters its name has."""
    found: dict[str, str] = {}
    for backend in backends:
        name = slug = re.sub(r"[^a-zA-Z0-9_-]+", "-", backend).strip("-") or "backend"
        number = 1
        while name in found.values():
            number += 1
            name = f"{slug}-{number}"
        found[backend] = name
    return found


def case_files(outcome: Outcome) -> dict[str, bytes]:
    """The minimal case of every failure, as files that `rattention replay` reads."""
    return {case_name(failure): failure.case for failure in outcome.failures}


def report_files(outcome: Outcome, report: dict[str, Any]) -> dict[str, bytes]:
    """Name to content of every file of one report, the failing cases last: a full disk costs the least of them."""
    return {
        "report.json": _json(report),
        "junit.xml": junit(outcome, report),
        "report.html": _bytes(html([report], {}, {})),
    } | {f"{CASES}/{name}": data for name, data in case_files(outcome).items()}


def overview_files(
    reports: list[dict[str, Any]], absent: dict[str, str], folders: Mapping[str, str]
) -> dict[str, bytes]:
    """One page and one JSON file over several backends, whose own reports are in `folders`."""
    merged = {
        "backend": "all",
        "conforming": all(r["conforming"] for r in reports) and bool(reports),
        "clauses": _merge_clauses(reports),
        "cases": {k: sum(r["cases"][k] for r in reports) for k in (reports[0]["cases"] if reports else ())},
        "budget": {r["backend"]: r["budget"] for r in reports},
        "backends": {r["backend"]: {"conforming": r["conforming"], "matrix": r["matrix"]} for r in reports},
        "absent": absent,
    }
    return {
        "report.json": _json(merged),
        "report.html": _bytes(html(reports, absent, folders)),
    }


def _json(report: Any) -> bytes:
    return _bytes(json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def _bytes(text: str) -> bytes:
    """Names of files and backends may hold bytes that are no text: they become escapes."""
    return text.encode("utf-8", errors="backslashreplace")


def _merge_clauses(reports: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    table = {}
    for label, text in load().judged.items():
        statuses = {r["backend"]: r["clauses"][label]["status"] for r in reports}
        values = set(statuses.values())
        status = next((s for s in ("FAIL", "pass", "runner") if s in values), "untested")
        table[label] = {"text": text, "status": status, "backends": statuses}
    return table


def html(reports: list[dict[str, Any]], absent: dict[str, str], folders: Mapping[str, str]) -> str:
    """A self-contained page: no script, no font and no image from elsewhere."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("report.html.j2")
    return page.render(
        reports=reports,
        absent=absent,
        clauses=load().clauses,
        operations=load().operations,
        dtypes=load().storage_dtypes,
        failing=failing,
        grouped=grouped,
        distinct=distinct,
        crashed=crashed,
        changed=changed,
        told_share=told_share,
        shade=shade,
        replay=lambda report, file: replay_line(Path(folders.get(report["backend"], "")) / CASES / file, report),
    )


def shade(share: float) -> str:
    """Colour of a heat map's cell: white at no error, amber at the whole budget, red above it."""
    if share <= 0:
        return "#ffffff"
    if share <= 1:
        return f"rgb(255,{255 - int(70 * share)},{255 - int(170 * share)})"
    depth = min(1.0, 0.35 + 0.65 * (share - 1) / 9)
    return f"rgb({230 - int(70 * depth)},{110 - int(90 * depth)},{90 - int(60 * depth)})"


def junit(outcome: Outcome, report: dict[str, Any]) -> bytes:
    """One suite per property, one test case per operation and dtype, for continuous integration."""
    root = ET.Element("testsuites", name=f"rattention conform {outcome.backend}")
    grouped: dict[str, dict[tuple[str, str], list[Any]]] = {}
    for r in outcome.results:
        if r.status != "skip":
            grouped.setdefault(r.property_name, {}).setdefault((r.op, r.dtype), []).append(r)
    for name, cells in grouped.items():
        bad = {cell: _violations(outcome, name, cell, results) for cell, results in cells.items()}
        crashes = sum(any(v.crash for v in found) for found in bad.values())
        skipped = sum(all(r.status in SKIPPED for r in rs) for rs in cells.values())
        suite = ET.SubElement(
            root,
            "testsuite",
            name=name,
            tests=str(len(cells)),
            failures=str(sum(map(bool, bad.values())) - crashes),
            skipped=str(skipped),
            errors=str(crashes),
        )
        for (op, dtype), results in cells.items():
            seconds = sum(r.seconds for r in results)
            case = ET.SubElement(suite, "testcase", classname=f"{name}.{op}", name=dtype, time=f"{seconds:.3f}")
            found = bad[op, dtype]
            if found:
                # A crash is an error: the backend gave no answer that could be a failure.
                kind = "error" if any(v.crash for v in found) else "failure"
                found.sort(key=lambda v: not v.crash)
                element = ET.SubElement(case, kind, message=_xml(found[0].message), type=",".join(found[0].clauses))
                element.text = _xml("\n".join(f"{v.message}\n{v.trace}".strip() for v in found[:20]))
            elif all(r.status in SKIPPED for r in results):
                ET.SubElement(case, "skipped", message=_xml(results[0].reason))
    if report["stopped"]:
        suite = ET.SubElement(root, "testsuite", name="run", tests="1", failures="0", skipped="0", errors="1")
        case = ET.SubElement(suite, "testcase", classname="run", name="every case was run", time="0")
        left = f"{report['cases']['left_out']} cases were not run"
        ET.SubElement(case, "error", message=_xml(f"{left}: {report['stopped']}"), type="stopped")
    ET.indent(root)
    return ET.tostring(root, encoding="utf-8", xml_declaration=True)


def _violations(outcome: Outcome, name: str, cell: tuple[str, str], results: list[UnitResult]) -> list[Violation]:
    """Of one property on one operation and dtype, with the cases that shrinking took over to that dtype."""
    moved = [f for f in outcome.failures if f.found and (f.property_name, f.op, f.dtype) == (name, *cell)]
    return [v for one in (*results, *moved) for v in one.violations]


def _xml(text: str) -> str:
    """Without the characters that XML forbids: control characters, and halves of surrogate pairs."""
    return re.sub("[^\\t\\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "", text)
