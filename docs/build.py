"""Builds the site: stages the Markdown of the repository, adds generated pages, runs Sphinx with warnings as errors.

    python docs/build.py [OUTPUT [STAGE]]        # site/ and build/docs/ unless given

The chapters and guides are the same files that are read on a code host; nothing is written twice. Staging keeps their
places, so relative links hold. A link to a file becomes a download, one to a folder or to a page outside the site
plain text.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import spec_tables
from rattention.spec import load

ROOT = Path(__file__).resolve().parents[1]
STAGE = ROOT / "build" / "docs"
GUIDES = ["guide", "traps", "porting", "conformance", "vectors", "torch", "jax"]
"""Guides in reading order; others of docs/ follow by name."""

LINK = re.compile(r"(!?)\[([^\]]+)\]\(([^)\s#]+)(#[^)\s]*)?\)")
FENCE = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)


def sources() -> list[Path]:
    """Every page of the repository that belongs on the site."""
    pages = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    return [*pages, *sorted((ROOT / "spec").glob("[0-9][0-9]-*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def relink(text: str, page: Path, pages: set[Path]) -> str:
    """`text` of `page` with links that the site can follow; fenced blocks are left alone."""

    def link(m: re.Match[str]) -> str:
        image, label, target, anchor = m.groups()
        if "://" in target:
            return m[0]
        path = (page.parent / target).resolve()
        if path == ROOT / "README.md":
            return f"[{label}]({'../' * len(page.relative_to(ROOT).parents[1:])}index.md{anchor or ''})"
        if path in pages:
            return m[0]
        if path.is_file() and path.suffix != ".md":  # a copied page would be a page outside the table of contents
            copy = STAGE / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
            return m[0] if image else f"{{download}}`{label.strip('`')} <{target}>`"
        return str(label)

    parts = FENCE.split(text)
    return "".join(part if part.startswith("```") else LINK.sub(link, part) for part in parts)


def toctree(caption: str, entries: list[str]) -> str:
    return "\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", "", *entries, "```", ""])


def contract() -> str:
    """The page of generated tables: operations and clauses."""
    spec = load()
    chapter_of = {}
    for path in spec_tables.chapters():
        for label in re.findall(r"\(([A-Z]+-\d+)\)$", path.read_text(encoding="utf-8"), re.MULTILINE):
            chapter_of.setdefault(label, path.name)
    return "\n".join(
        [
            "# Operations and clauses",
            "",
            f"Generated from `operations.toml`, version {spec.version}. A `?` marks what is optional.",
            "",
            "## Operations",
            "",
            spec_tables.operations(spec),
            "## Capabilities",
            "",
            spec_tables.capabilities(spec),
            "## Clauses",
            "",
            spec_tables.clauses(spec, chapter_of),
        ]
    )


def stage() -> None:
    """Write the whole source tree of the site under build/docs."""
    shutil.rmtree(STAGE, ignore_errors=True)
    pages = sources()
    for page in pages:
        copy = STAGE / page.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(relink(page.read_text(encoding="utf-8"), page, set(pages)), encoding="utf-8")
    (STAGE / "docs" / "contract.md").write_text(contract(), encoding="utf-8")

    names = [p.stem for p in pages if p.parent == ROOT / "docs"]
    guides = [n for n in GUIDES if n in names] + [n for n in names if n not in GUIDES]
    chapters = [f"spec/{p.stem}" for p in pages if p.parent == ROOT / "spec"]
    index = (STAGE / "README.md").read_text(encoding="utf-8")
    (STAGE / "README.md").unlink()
    (STAGE / "index.md").write_text(
        index
        + "\n"
        + toctree("Guides", [f"docs/{n}" for n in guides])
        + toctree("Specification", [*chapters, "docs/contract"])
        + toctree("Project", ["CONTRIBUTING", "CHANGELOG"]),
        encoding="utf-8",
    )


def main(arguments: list[str]) -> int:
    from sphinx.cmd.build import main as sphinx

    global STAGE
    output = Path(arguments[0]) if arguments else ROOT / "site"
    STAGE = Path(arguments[1]) if len(arguments) > 1 else STAGE
    stage()
    shutil.rmtree(output, ignore_errors=True)
    options = ["-q", "-W", "--keep-going", "-b", "html", "-c", str(ROOT / "docs"), "-d", f"{STAGE}.doctrees"]
    return sphinx([*options, str(STAGE), str(output)])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
