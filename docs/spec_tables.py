"""Tables of operations.toml as Markdown, and the places in the chapters where they stand.

A chapter marks a place with `<!-- generated: KIND NAME -->` ... `<!-- end -->`; what lies between is written here and
checked by spec/tests. `python docs/spec_tables.py` rewrites the chapters.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "spec"))

from rattention.spec import REQUIRED, Attribute, Operation, Spec, Tensor, load  # noqa: E402

MARK = re.compile(r"(<!-- generated: (\w+)(?: ([\w.]+))? -->\n).*?(<!-- end -->)", re.DOTALL)


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table; a bar inside a cell is escaped."""
    lines = [header, tuple("---" for _ in header), *rows]
    return "".join("| " + " | ".join(c.replace("|", "\\|") for c in line) + " |\n" for line in lines)


def shape(t: Tensor) -> str:
    return "`[" + ", ".join(t.shape) + "]`"


def tick(names: tuple[str, ...] | list[str]) -> str:
    return ", ".join(f"`{n}`" for n in names)


def inputs(op: Operation) -> str:
    """One row per tensor, in the order of the public function."""
    return table(
        ("tensor", "shape", "dtype", "required", "differentiable", "meaning"),
        [
            (
                f"`{t.name}`",
                shape(t),
                t.dtype,
                "no" if t.optional else "yes",
                "yes" if t.differentiable else "no",
                t.about,
            )
            for t in op.tensors
        ],
    )


def outputs(op: Operation) -> str:
    return table(
        ("output", "shape", "dtype", "differentiable"),
        [(f"`{o.name}`", shape(o), o.dtype, "yes" if o.differentiable else "no") for o in op.outputs],
    )


def default(a: Attribute) -> str:
    return "required" if a.default is REQUIRED else f"`{a.default}`"


def attributes(op: Operation) -> str:
    return table(
        ("attribute", "domain", "default", "meaning"),
        [(f"`{a.name}`", a.domain, default(a), a.about) for a in op.attributes],
    )


def vjps(spec: Spec) -> str:
    return table(
        ("operation", "cotangents", "gradients"),
        [
            (
                f"`{name}`",
                tick([t.name for t in op.tensors if t.name.startswith("d_")]),
                tick([o.name for o in op.outputs]),
            )
            for name, op in spec.operations.items()
            if op.is_vjp
        ],
    )


def bad_inputs(spec: Spec) -> str:
    rows = []
    for b in spec.bad_inputs:
        what = {
            "remove": "leave out",
            "unknown": "add an unknown tensor",
            "drop_axis": "drop the last axis of",
            "add_axis": "add an axis to",
            "grow": f"lengthen axis {b.axis} by 1 in",
            "empty_axis": f"shorten axis {b.axis} to 0 in",
            "cast": f"cast to {b.value}",
            "cast_other": "cast to another storage dtype",
            "attribute": f"set `{b.name}` to `{b.value}`",
            "drop_attribute": f"leave out `{b.name}`",
            "unknown_attribute": f"add an attribute `{b.name}`",
            "put": f"write `{b.value}` at element {b.index} of",
            "special": f"`{b.name}`, blamed on",
        }[b.action]
        of = tick(b.tensors) if b.tensors else (f"`{b.argument}`" if b.argument else "")
        rows.append((f"`{b.id}`", f"`{b.clause}`", f"{what} {of}".strip()))
    return table(("id", "clause", "change to a valid call"), rows)


def capabilities(spec: Spec) -> str:
    return table(
        ("capability", "needed by calls with"),
        [(f"`{name}`", tick(tensors)) for name, tensors in spec.capabilities.items()],
    )


def operations(spec: Spec) -> str:
    """The table of the contract: every operation with its tensors, attributes and outputs."""
    rows = []
    for name, op in spec.operations.items():
        if op.is_vjp:
            continue
        tensors = ", ".join(f"`{t.name}`" + ("?" if t.optional else "") for t in op.tensors)
        attrs = ", ".join(f"`{a.name}`" + ("" if a.default is REQUIRED else "?") for a in op.attributes)
        rows.append((f"[`{name}`](../spec/{op.chapter})", tensors, attrs, tick([o.name for o in op.outputs])))
    return table(("operation", "tensors", "attributes", "outputs"), rows)


def clauses(spec: Spec, chapter_of: dict[str, str]) -> str:
    rows = []
    for label, text in spec.clauses.items():
        chapter = chapter_of[label]
        rows.append((f"`{label}`", text, f"[{chapter[:2]}](../spec/{chapter})"))
    return table(("clause", "text", "chapter"), rows)


def render(kind: str, name: str | None, spec: Spec) -> str:
    """The table that stands between the marks `generated: kind name`."""
    per_operation: dict[str, Callable[[Operation], str]] = {
        "inputs": inputs,
        "outputs": outputs,
        "attributes": attributes,
    }
    whole: dict[str, Callable[[Spec], str]] = {"vjps": vjps, "bad_inputs": bad_inputs, "capabilities": capabilities}
    if name is None:
        return whole[kind](spec)
    return per_operation[kind](spec.operations[name])


def fill(text: str, spec: Spec) -> str:
    """`text` with every marked place filled anew."""
    return MARK.sub(lambda m: f"{m[1]}\n{render(m[2], m[3], spec)}\n{m[4]}", text)


def chapters() -> list[Path]:
    return sorted((ROOT / "spec").glob("[0-9][0-9]-*.md"))


def main() -> None:
    spec = load()
    for path in chapters():
        text = path.read_text(encoding="utf-8")
        filled = fill(text, spec)
        if filled != text:
            path.write_text(filled, encoding="utf-8")
            print(f"rewrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
