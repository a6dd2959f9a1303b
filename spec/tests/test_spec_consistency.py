"""Prose, operations.toml and code name the same clauses, tensors and attributes."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import runpy
from fractions import Fraction
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from rattention.spec import REQUIRED, load

ROOT = Path(__file__).resolve().parents[2]
SPEC = load()
CHAPTERS = sorted((ROOT / "spec").glob("[0-9][0-9]-*.md"))
OPERATIONS = {name: op for name, op in SPEC.operations.items() if not op.is_vjp}
PREFIXES = sorted({label.split("-")[0] for label in SPEC.clauses})
# One or two digits: SWA-512 is the name of a window size in tables of results, not a clause.
LABEL = re.compile(rf"\b(?:{'|'.join(PREFIXES)})-\d{{1,2}}(?![\d\w])")
ENDS_IN_LABEL = re.compile(rf"\(({'|'.join(PREFIXES)})-(\d+)\)$")
NORMATIVE = re.compile(r"\*\*(must|must not|should|should not|may)\*\*")
TEMPLATE = [
    "Semantics",
    "Inputs",
    "Outputs",
    "Attributes",
    "Constraints",
    "Special cases",
    "Gradient",
    "Numerics",
    "Example",
    "Notes",
]


def paragraphs(path: Path) -> list[str]:
    """Paragraphs of prose, each on one line; fenced blocks, tables and headings left out."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    blocks = re.split(r"\n\s*\n", text)
    return [" ".join(b.split()) for b in blocks if b.strip() and not b.lstrip().startswith(("|", "#", "<!--"))]


def clause_sentences() -> dict[str, list[tuple[str, str]]]:
    """Label -> [(chapter file, paragraph)] for every paragraph that ends in a label."""
    found: dict[str, list[tuple[str, str]]] = {}
    for path in CHAPTERS:
        for paragraph in paragraphs(path):
            match = ENDS_IN_LABEL.search(paragraph)
            if match:
                found.setdefault(f"{match[1]}-{match[2]}", []).append((path.name, paragraph))
    return found


def load_tables() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(ROOT / "docs" / "spec_tables.py")))


def index_prefixes() -> dict[str, str]:
    """Prefix -> chapter file, from the table of chapters in the index."""
    rows = re.findall(r"\]\((\d\d-[\w-]+\.md)\) \| ([A-Z, ]+) \|", (ROOT / "spec" / "00-index.md").read_text())
    return {prefix: chapter for chapter, prefixes in rows for prefix in prefixes.split(", ")}


def test_every_clause_is_one_normative_sentence_in_its_chapter():
    found = clause_sentences()
    chapter_of = index_prefixes()
    missing = [label for label in SPEC.clauses if label not in found]
    unknown = [label for label in found if label not in SPEC.clauses]
    assert not missing, f"clauses of operations.toml without a sentence in the chapters: {missing}"
    assert not unknown, f"labels in the chapters that operations.toml lacks: {unknown}"
    for label, places in found.items():
        assert len(places) == 1, f"{label} ends {len(places)} sentences: {[p for p, _ in places]}"
        chapter, _ = places[0]
        assert chapter == chapter_of[label.split("-")[0]], f"{label} stands in {chapter}"


def test_normative_words_and_labels_go_together():
    for path in CHAPTERS:
        if path.name == "00-index.md":  # defines the words
            continue
        for paragraph in paragraphs(path):
            normative = NORMATIVE.search(paragraph)
            label = ENDS_IN_LABEL.search(paragraph)
            assert bool(normative) == bool(label), f"{path.name}: {paragraph!r}"
            if label:
                assert len(re.findall(rf"\((?:{'|'.join(PREFIXES)})-\d+\)", paragraph)) == 1, paragraph


def test_clauses_of_a_prefix_are_numbered_without_gaps():
    for prefix in PREFIXES:
        numbers = [int(label.split("-")[1]) for label in SPEC.clauses if label.startswith(prefix + "-")]
        assert numbers == list(range(1, len(numbers) + 1)), prefix


def test_index_names_every_chapter_and_every_prefix():
    text = (ROOT / "spec" / "00-index.md").read_text()
    linked = set(re.findall(r"\]\((\d\d-[\w-]+\.md)\)", text))
    assert linked | {"00-index.md"} == {p.name for p in CHAPTERS}
    assert set(index_prefixes()) == set(PREFIXES)


@pytest.mark.parametrize("name", OPERATIONS)
def test_chapter_follows_the_template(name: str):
    text = (ROOT / "spec" / OPERATIONS[name].chapter).read_text()
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == TEMPLATE
    assert f"# {OPERATIONS[name].chapter[:2]} {name}\n" in text
    assert "```python" in text


@pytest.mark.parametrize("name", OPERATIONS)
def test_chapter_has_the_tables_of_its_operation(name: str):
    text = (ROOT / "spec" / OPERATIONS[name].chapter).read_text()
    for kind in ("inputs", "outputs", "attributes"):
        assert f"<!-- generated: {kind} {name} -->" in text, f"{kind} of {name}"
    for tensor in OPERATIONS[name].tensors:
        assert f"| `{tensor.name}` |" in text


def test_generated_tables_are_up_to_date():
    tables = load_tables()
    for path in CHAPTERS:
        text = path.read_text(encoding="utf-8")
        assert tables.fill(text, SPEC) == text, f"{path.name} is stale: run python docs/spec_tables.py"


def test_labels_cited_anywhere_exist():
    own = Path(__file__).resolve()
    skipped = {".venv", "site", "build", "dist", "report", ".git", "node_modules"}
    for suffix in ("*.py", "*.md", "*.toml", "*.c"):
        for path in ROOT.rglob(suffix):
            relative = path.relative_to(ROOT)
            if path == own or skipped & set(relative.parts):
                continue
            cited = set(LABEL.findall(path.read_text(encoding="utf-8")))
            unknown = sorted(cited - set(SPEC.clauses))
            assert not unknown, f"{relative} cites {unknown}"


def test_links_between_documents_resolve():
    documents = [*CHAPTERS, *(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md")]
    for path in documents:
        text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if "://" in target or target.startswith("#"):
                continue
            assert (path.parent / target.split("#")[0]).exists(), f"{path.relative_to(ROOT)} links to {target}"


# ------------------------------------------------------------------------------------------- public functions

EXTRA = {"impl", "precision", "check_values", "return_final_state"}
FRAMEWORKS = {"numpy": "numpy", "torch": "torch", "jax": "jax"}


def backend_module(name: str) -> ModuleType:
    if importlib.util.find_spec(FRAMEWORKS[name]) is None:
        pytest.skip(f"{name} is not installed")
    if importlib.util.find_spec(f"rattention.{name}") is None:
        pytest.skip(f"rattention.{name} is not on the path")
    return importlib.import_module(f"rattention.{name}")


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_public_signature_matches(framework: str, operation: str):
    op = OPERATIONS[operation]
    function = getattr(backend_module(framework), operation)
    parameters = inspect.signature(function).parameters
    attributes = {a.name: a for a in op.attributes}

    tensors = [n for n in parameters if n not in attributes and n not in EXTRA]
    expected = [t.name for t in op.tensors]
    if operation == "rattention_extend":  # the four cache tensors travel as one container
        expected = list(dict.fromkeys("cache" if n.startswith("cache_") else n for n in expected))
    assert tensors == expected

    for name, attribute in attributes.items():
        parameter = parameters[name]
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY, name
        default = inspect.Parameter.empty if attribute.default is REQUIRED else attribute.default
        assert parameter.default == default, name
    for tensor in op.tensors:
        if tensor.optional:
            assert parameters[tensor.name].default is None, tensor.name


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_cache_is_one_container_everywhere(framework: str):
    cache = backend_module(framework).Cache
    parameters = inspect.signature(cache.empty).parameters
    named = {"batch", "num_kv_heads", "head_dim", "value_dim", "window", "feature_map", "dtype"}
    assert named <= set(parameters) <= named | {"device"}
    empty = cache.empty(2, num_kv_heads=3, head_dim=4, value_dim=5, window=6)
    assert [tuple(x.shape) for x in (empty.k, empty.v, empty.state, empty.length)] == [
        (2, 6, 3, 4),
        (2, 6, 3, 5),
        (2, 3, 8, 5),
        (2,),
    ]
    for window in (-1, 0, None):  # EXT-10
        assert cache.empty(1, num_kv_heads=1, head_dim=2, window=window).k.shape[1] == 0


ADAPTERS = [
    ("numpy", "rattention.numpy.adapter"),
    ("torch", "rattention.torch.adapter"),
    ("torch", "rattention.torch.triton_adapter"),
    ("jax", "rattention.jax.adapter"),
    ("jax", "rattention.jax.pallas_adapter"),
]


@pytest.mark.parametrize(("framework", "module"), ADAPTERS, ids=[m for _, m in ADAPTERS])
def test_adapters_describe_themselves_in_the_words_of_the_spec(framework: str, module: str):  # BCK-1
    backend_module(framework)
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not part of this tree")
    about = importlib.import_module(module).backend.describe()
    keys = {"name", "version", "spec_version", "operations", "dtypes", "capabilities", "tile_sizes", "limits"}
    assert keys <= set(about) <= keys | {"kernels", "cost"}
    assert about["spec_version"] == SPEC.version
    assert set(about["operations"]) <= set(SPEC.operations)
    assert set(about["dtypes"]) <= set(SPEC.storage_dtypes)
    assert set(about["capabilities"]) <= set(SPEC.capabilities)
    assert set(about["tile_sizes"]) == {"T", "window", "D"}
    for bound in about["limits"].values():  # a list is what is allowed, not a range
        assert not (isinstance(bound, list) and len(bound) == 2 and bound[1] > 2 * bound[0] > 0), about["limits"]


# ------------------------------------------------------------------------------------------------ numbers


def test_constants_of_the_budget_are_those_of_the_reference():
    backend_module("numpy")
    text = (ROOT / "spec" / "10-numerics.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([A-Z_]+)` \| ([^|]+) \|", text, re.MULTILINE))
    assert len(rows) >= 5
    modules = [importlib.import_module(f"rattention.numpy.{m}") for m in ("bounded", "budget")]
    for name, shown in rows.items():
        value = next(getattr(m, name) for m in modules if hasattr(m, name))
        values = value if isinstance(value, tuple) else (value,)
        assert [float(Fraction(x)) for x in shown.split(" and ")] == [pytest.approx(v) for v in values], name


# ------------------------------------------------------------------------------------------------ mathematics


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.name)
def test_inline_mathematics_survives_markdown(path: Path):
    """Markdown strips a backslash before punctuation, so `\\{`, `\\,` and `\\_` belong into ```math blocks."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for line in re.sub(r"`[^`\n]*`", "", text).splitlines():
        assert line.count("$") % 2 == 0, f"inline mathematics is broken across lines: {line}"
        for formula in re.findall(r"\$([^$]+)\$", line):
            assert not re.search(r"\\[^a-zA-Z]", formula), formula


def test_mathematics_uses_no_macro_that_code_hosts_refuse():
    for path in [*CHAPTERS, *(ROOT / "docs").glob("*.md")]:
        for macro in (r"\operatorname", r"\newcommand", r"\def", r"\require", r"\href"):
            assert not re.search(re.escape(macro) + r"\b", path.read_text(encoding="utf-8")), f"{path.name}: {macro}"
