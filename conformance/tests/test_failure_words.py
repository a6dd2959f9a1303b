"""What a failure says: sizes in budgets, the call in one line, the dtype, and the same words once."""

import re
from pathlib import Path

import faulty_ports as ports
import numpy as np
from rattention.conformance.case import Case
from rattention.conformance.judge import compare_one
from rattention.conformance.properties import REGISTRY, make_case
from rattention.conformance.reporting.console import print_outcome
from rattention.conformance.reporting.files import html, junit
from rattention.conformance.reporting.groups import grouped
from rattention.conformance.reporting.summary import case_name, summarise
from rattention.conformance.runner import Settings, conform, plan_units
from rattention.conformance.strategies import make_plan
from rattention.conformance.strategies.callline import SIZES, call_line
from rattention.spec import load, validate
from rich.console import Console

PORTS = Path(__file__).with_name("faulty_ports.py")


# ---------------------------------------------------------------------------------------------- numbers


def said(got, expected, budget) -> str:
    violation, share = compare_one("out", np.array(got), np.array(expected), np.array(budget), ("NUM-1",))
    assert violation is not None
    assert violation.share == share > 1
    return violation.message


def test_where_no_error_is_admitted_there_is_no_multiple_of_a_budget():
    assert said([6.0, 5.0], [5.0, 5.0], [0.0, 0.0]) == (
        "out: must be exact; 1 of 2 elements wrong, first at [0]: got 6, expected 5 exactly"
    )
    assert "e+3" not in said([1e-300], [0.0], [0.0])


def test_both_kinds_of_elements_are_told():
    text = said([1.0, 3.0, 7.0], [0.0, 2.0, 2.0], [0.0, 0.5, 0.5])
    assert "error up to 10 times the budget, 1 elements that must be exact" in text
    assert "expected 0 exactly" in text


def test_an_infinite_answer_and_an_infinite_expectation():
    assert "infinite where a number is expected" in said([np.inf], [1.0], [0.5])
    assert "must be exact" in said([1.0], [np.inf], [0.5])
    assert "expected inf exactly" in said([1.0], [np.inf], [0.5])


# ---------------------------------------------------------------------------------------------- the call


def units():
    plan = make_plan("smoke", 5, ports.honest.describe())
    for unit in plan_units(plan, Settings("smoke", 5)):
        case = make_case(REGISTRY[unit.property_name], plan, unit.recipe)
        if case is not None:
            yield unit, case


def test_a_line_shows_what_the_call_has_and_nothing_else():
    seen = set()
    for unit, case in units():
        line = call_line(case, unit.recipe)
        op = load().operations[case.op]
        assert line.count("\n") == 0
        if unit.property_name in ("bad input", "description"):
            continue
        words = dict(word.split("=", 1) for word in re.sub(r"\[.*?\]", "", line).split() if "=" in word)
        known = {*SIZES, *op.attribute, "weights", "values", "segments", "cache"}
        assert set(words) <= known
        symbols = {s for t in op.tensors if t.name in case.tensors for s in t.shape}
        assert set(words) & set(SIZES) <= symbols, line
        assert set(words) & set(op.attribute) == set(case.attrs), line
        assert ("segments" in words) == ("segment_ids" in case.tensors), line
        dims = validate(case.op, case.tensors, case.attrs).dims
        assert all(int(words[s]) == dims[s] for s in set(words) & set(SIZES)), line
        options = re.search(r"\[(.*)\]", line)
        assert set(options[1].split() if options else []) == {
            t.name for t in op.tensors if t.optional and t.name in case.tensors
        }
        seen.add(case.op)
    assert seen == set(load().operations)


def test_a_bad_call_is_spelled():
    x = np.zeros((1, 2, 3), np.int64)
    line = call_line(Case("feature_map", {"x": x}, {"feature_map": "softmax", "windw": 3}))
    assert line == "feature_map x=int64[1, 2, 3] feature_map=softmax windw=3"


# ---------------------------------------------------------------------------------------------- the dtype


def of(report, status):
    return {dtype for dtype, found in report["matrix"]["rms_mix"].items() if found == status}


def wrong_everywhere(op, t, a):
    out = dict(ports.honest.run(op, t, a))
    return out | {"out": out["out"] + out["out"].dtype.type(1)} if op == "rms_mix" and t["swa"].size else out


def test_a_fault_of_one_dtype_stays_in_it():
    outcome = conform("bf16", Settings("smoke", 3, select="rms_mix"), backend=ports.Port(ports.bf16_halved))
    report = summarise(outcome)
    assert of(report, "FAIL") == {"bfloat16"}
    assert {f["dtype"] for f in report["failures"]} == {"bfloat16"}
    assert not any(f["found"] for f in report["failures"])


def test_matrix_and_cases_agree_where_shrinking_changes_the_dtype():
    """No case of float32 is among the plan's failures, and the minimal cases are of it all the same."""
    port = ports.Port(wrong_everywhere)
    outcome = conform("all", Settings("smoke", 3, select="rms_mix"), backend=port)
    moved = [f for f in outcome.failures if f.found]
    assert moved
    assert all(f.dtype == "float32" != f.found for f in moved)
    outcome.results = [r for r in outcome.results if not (r.dtype == "float32" and r.status == "fail")]
    report = summarise(outcome)
    assert "float32" in of(report, "FAIL")
    text = f"found in {moved[0].found}; made smaller, it fails in float32 too"
    console = Console(record=True, width=200)
    print_outcome(console, report)
    assert text in console.export_text()
    assert text in html([report], {}, {})
    assert b'name="float32"' in junit(outcome, report)


def test_a_case_stays_within_what_is_declared():
    """A backend of bfloat16 alone with a least size: beyond both it may do what it likes."""

    def narrow(op, t, a):
        out = dict(ports.honest.run(op, t, a))
        return {n: x + x.dtype.type(1) if x.dtype.kind != "i" else x for n, x in out.items()}

    about = {"dtypes": ["bfloat16"], "limits": {"T": {"minimum": 2}}}
    port = ports.Port(narrow, **about)
    outcome = conform("narrow", Settings("smoke", 3, select="agreement"), backend=port)
    sizes = [int(found[1]) for f in outcome.failures if (found := re.search(r" T=(\d+)", f.call))]
    assert min(sizes) == 2
    assert {f.dtype for f in outcome.failures if f.op != "rope_table"} == {"bfloat16"}


# ---------------------------------------------------------------------------------------------- once


def test_equal_messages_are_told_once():
    def one_place(op, t, a):
        if op == "rms_mix":
            raise ValueError(f"shapes {[x.shape for x in t.values()]}")
        return ports.honest.run(op, t, a)

    outcome = conform("one place", Settings("smoke", 3, select="rms_mix"), backend=ports.Port(one_place))
    report = summarise(outcome)
    assert len(report["failures"]) > 4
    valid = [f for f in report["failures"] if f["property"] != "bad input"]
    assert len({f["violations"][0]["message"] for f in valid}) > 1  # of other sizes, yet at one place
    assert len(grouped(valid)) == 1
    console = Console(record=True, width=200)
    cases = {f["file"]: Path("cases") / f["file"] for f in report["failures"]}
    print_outcome(console, report, cases)
    text = console.export_text()
    assert text.count('raise ValueError(f"shapes') == len(grouped(report["failures"]))
    assert "The same in " in text
    page = html([report], {}, {})
    assert page.count("raise ValueError") == len(grouped(report["failures"]))
    assert all(case_name(f) in page for f in outcome.failures)


def test_other_messages_are_other_groups():
    def failure(message, trace=""):
        return {"violations": [{"message": message, "trace": trace}]}

    one, two = 'T:\n  File "p.py", line 3, in f\nKeyError: 1', 'T:\n  File "p.py", line 4, in f\nKeyError: 1'
    found = grouped([failure("a"), failure("b"), failure("a"), failure("c", one), failure("d", one), failure("c", two)])
    assert [len(group) for group in found] == [2, 1, 2, 1]
