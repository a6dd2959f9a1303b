"""report.json, junit.xml and report.html, each written under a temporary name and then moved."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import jinja2
from rattention.conformance import tensorfile
from rattention.conformance.reporting.summary import case_name, failing
from rattention.conformance.runner import Outcome
from rattention.spec import load

TEMPLATES = Path(__file__).resolve().parents[1] / "templates"


def write_cases(outcome: Outcome, folder: Path) -> None:
    """The minimal case of every failure, as files that `rattention replay` reads."""
    for failure in outcome.failures:
        tensorfile.write_bytes(folder / case_name(failure), failure.case)


def write_report(outcome: Outcome, report: dict[str, Any], folder: Path) -> Path:
    """All files of one report; returns the page.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_cases(outcome, folder / "cases")
    text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    tensorfile.write_bytes(folder / "report.json", text.encode("utf-8"))
    tensorfile.write_bytes(folder / "junit.xml", junit(outcome, report))
    return tensorfile.write_bytes(folder / "report.html", html([report], {}).encode("utf-8"))


def write_overview(reports: list[dict[str, Any]], absent: dict[str, str], folder: Path) -> Path:
    """One page and one JSON file over several backends."""
    merged = {
        "backend": "all",
        "conforming": all(r["conforming"] for r in reports) and bool(reports),
        "clauses": _merge_clauses(reports),
        "cases": {k: sum(r["cases"][k] for r in reports) for k in (reports[0]["cases"] if reports else ())},
        "budget": {r["backend"]: r["budget"] for r in reports},
        "backends": {r["backend"]: {"conforming": r["conforming"], "matrix": r["matrix"]} for r in reports},
        "absent": absent,
    }
    text = json.dumps(merged, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    tensorfile.write_bytes(folder / "report.json", text.encode("utf-8"))
    return tensorfile.write_bytes(folder / "report.html", html(reports, absent).encode("utf-8"))


def _merge_clauses(reports: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    table = {}
    for label, text in load().judged.items():
        statuses = {r["backend"]: r["clauses"][label]["status"] for r in reports}
        values = set(statuses.values())
        status = "FAIL" if "FAIL" in values else "pass" if "pass" in values else "untested"
        table[label] = {"text": text, "status": status, "backends": statuses}
    return table


def html(reports: list[dict[str, Any]], absent: dict[str, str]) -> str:
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
        shade=shade,
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
        failures = sum(any(r.status == "fail" for r in rs) for rs in cells.values())
        skipped = sum(all(r.status == "unsupported" for r in rs) for rs in cells.values())
        suite = ET.SubElement(
            root,
            "testsuite",
            name=name,
            tests=str(len(cells)),
            failures=str(failures),
            skipped=str(skipped),
            errors="0",
        )
        for (op, dtype), results in cells.items():
            seconds = sum(r.seconds for r in results)
            case = ET.SubElement(suite, "testcase", classname=f"{name}.{op}", name=dtype, time=f"{seconds:.3f}")
            bad = [v for r in results for v in r.violations]
            if bad:
                element = ET.SubElement(case, "failure", message=_xml(bad[0].message), type=",".join(bad[0].clauses))
                element.text = _xml("\n".join(v.message for v in bad[:20]))
            elif all(r.status == "unsupported" for r in results):
                ET.SubElement(case, "skipped", message=_xml(results[0].reason))
    ET.indent(root)
    return ET.tostring(root, encoding="utf-8", xml_declaration=True)


def _xml(text: str) -> str:
    """Without the control characters that XML forbids."""
    return "".join(c for c in text if c in "\t\n" or ord(c) >= 32)
