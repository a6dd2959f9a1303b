"""The command line: `rattention conform | coverage | mutants | replay | vectors | ops`.

Exit codes: 0 conforming, 1 not conforming, 2 could not run, or not to the end. A report that cannot be written is found
out before the run; if writing fails all the same, the verdict and its exit code stay, and stderr names the file.
"""

from __future__ import annotations

import importlib.util
import math
import os
import secrets
import sys
from collections.abc import Sequence
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rattention.conformance import backends
from rattention.conformance.output import Commands, Terminal, any_text, cannot, named
from rattention.spec import load
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from rattention.conformance.reporting import Folder

app = typer.Typer(
    cls=Commands,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Conformance of RAttention implementations. Exit codes: 0 conforming, 1 not conforming, 2 could not run.",
)
vectors_app = typer.Typer(no_args_is_help=True, help="Cases on disk.")
app.add_typer(vectors_app, name="vectors")
# Rich takes 80 columns where it sees no terminal, too few for the tables in a log.
_ON_A_TERMINAL = sys.stdout is not None and sys.stdout.isatty()
console = Terminal(highlight=False, width=None if _ON_A_TERMINAL or "COLUMNS" in os.environ else 120)


class Profile(StrEnum):
    """How much is run."""

    smoke = "smoke"
    quick = "quick"
    full = "full"


BACKEND_HELP = "NAME, all, path/to/file.py:ATTRIBUTE, MODULE:ATTRIBUTE, or exec:COMMAND"
Backend = Annotated[str, typer.Argument(help=BACKEND_HELP)]
ReportOption = Annotated[
    Path | None,
    typer.Option(help="write report.json, junit.xml, report.html and the cases here", parser=named, metavar="<path>"),
]
SEED_HELP = "the same seed gives the same cases"
SeedOption = Annotated[int | None, typer.Option(help=f"{SEED_HELP}; default: a fresh one, printed")]
ProfileOption = Annotated[Profile, typer.Option(help="how much to run")]


def _seconds(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 < found < math.inf:
        raise typer.BadParameter(f"{text!r} is no number of seconds above 0")
    return found


TIMEOUT_HELP = (
    "limit for one answer of a port behind exec: (default 120, and 60 to start), or for one case of another backend "
    "(default 300 in conform, none elsewhere)"
)
TimeoutOption = Annotated[float | None, typer.Option(help=TIMEOUT_HELP, parser=_seconds, metavar="<seconds>")]


def _version(wanted: bool) -> None:
    if wanted:
        try:
            package = metadata.version("rattention")
        except metadata.PackageNotFoundError:
            package = "(not installed)"
        console.print(f"rattention {package}, specification {load().version}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="print it")] = False,
) -> None:
    pass


@app.command()
def conform(
    backend: Backend,
    profile: ProfileOption = Profile.quick,
    select: Annotated[
        str, typer.Option(help="a clause, the letters of a group of clauses, an operation or a property")
    ] = "",
    seed: SeedOption = None,
    report: ReportOption = None,
    vectors: Annotated[list[str] | None, typer.Option(help="cases to run too: a file, a folder or a manifest")] = None,
    workers: Annotated[
        int,
        typer.Option(
            min=0, help="worker processes, each with a port of its own behind exec:; default: 2, 1 on a single core"
        ),
    ] = 0,
    timeout: TimeoutOption = None,
) -> None:
    """Hold a backend against the specification."""
    from rattention.conformance import reporting, verdict
    from rattention.conformance import vectors as stored
    from rattention.conformance.replay import check_files
    from rattention.conformance.runner import Settings

    known = {*load().clauses, *load().operations, *(label.split("-")[0] for label in load().clauses)}
    from rattention.conformance.properties import REGISTRY

    if select in load().library:
        cannot(f"--select {select}: a clause about the public functions of a library; a backend is not judged by it")
    if select and select not in known | set(REGISTRY):
        cannot(f"--select {select}: no clause, operation or property of that name")
    chosen = secrets.randbelow(2**31) if seed is None else seed
    if "" in (vectors or ()):
        cannot("--vectors: the name of a file or folder is empty")
    # Absolute: a backend may change the working directory.
    paths = [Path(path).absolute() for path in vectors or default_vectors(profile.value)]
    files = [file for path in paths for file in stored.list_set(path)]
    if vectors:
        check_files(files)
    if report:
        reporting.try_folder(report, reporting.REPORT, (reporting.CASES,), what="--report")
    count = workers or max(1, min(2, os.cpu_count() or 1))
    settings = Settings(profile.value, chosen, select, tuple(str(path) for path in paths), count, timeout)
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")  # one core per worker
    console.print(f"profile {profile.value}, seed {chosen}")
    folder = _claimed(report, files)
    try:
        if backend == "all":
            raise typer.Exit(verdict.run_all(console, settings, folder, whole=bool(report)))
        found = verdict.run_one(console, backend, settings, folder, whole=bool(report))
    finally:
        folder.release()
    reporting.print_outcome(console, found.summary, found.cases)
    if found.written:
        console.print(f"report: {escape(str(folder.shown / 'report.html'))}", soft_wrap=True)
    raise typer.Exit(verdict.exit_code([found.summary]))


def _claimed(report: Path | None, keep: Sequence[Path]) -> Folder:
    """The folder of a run, which it has to itself. Where nobody named one, it is the first that no other run is in."""
    from rattention.conformance.reporting import Folder

    if report:
        folder = Folder(report, keep=keep)
        if not folder.claim():
            cannot(f"--report {report}: another run of rattention is writing there")
        return folder
    folder, number = Folder(FAILURES, keep=keep), 1
    while not folder.claim():
        number += 1
        folder = Folder(f"{FAILURES}-{number}", keep=keep)
    return folder


FAILURES = Path("rattention-failures")
"""Where the failing cases are written without --report."""
FEW_VECTORS = 4
"""Stored vectors that smoke runs where --vectors does not name any."""


def default_vectors(profile: str = "quick") -> list[str]:
    """The stored vectors: a checkout has them in spec/, an installed package carries them."""
    from rattention.conformance.vectors import list_set
    from rattention.spec.operations import operations_file

    folder = operations_file().parent / "vectors"
    if not folder.is_dir() or not any(folder.rglob("*.safetensors")):
        return []
    return [str(file) for file in list_set(folder)[:FEW_VECTORS]] if profile == "smoke" else [str(folder)]


@app.command()
def replay(
    case: Annotated[Path, typer.Argument(help="a case file")],
    backend: Backend,
    timeout: TimeoutOption = None,
) -> None:
    """Run one case again, exactly as it was."""
    from rattention.conformance.replay import replay as again

    lines, failed = again(case, backend, timeout)
    for line in lines:
        console.print(escape(line), soft_wrap=True)
    raise typer.Exit(1 if failed else 0)


@app.command()
def mutants(
    profile: ProfileOption = Profile.quick,
    seed: Annotated[int | None, typer.Option(help=f"{SEED_HELP}; default: that of continuous integration")] = None,
    report: Annotated[
        Path | None, typer.Option(help="write mutants.json and coverage.md here", parser=named, metavar="<path>")
    ] = None,
    select: Annotated[str, typer.Option(help="run only the mutants whose name contains this")] = "",
) -> None:
    """Run the suite against every mutant of the catalogue: a survivor is a hole in the suite."""
    from rattention.conformance.mutants import command
    from rattention.conformance.reporting import try_folder

    if report:
        try_folder(report, ("mutants.json", "coverage.md"), what="--report")
    raise typer.Exit(command(profile.value, seed, report, select, console))


@app.command()
def coverage(
    backend: Backend = "numpy",
    profile: ProfileOption = Profile.quick,
    seed: SeedOption = None,
    report: Annotated[
        Path | None, typer.Option(help="write coverage.json and coverage.html here", parser=named, metavar="<path>")
    ] = None,
) -> None:
    """What a run draws: classes of sizes, attributes, options and values, and the pairs of them that it never draws."""
    from rattention.conformance import coverage as covering
    from rattention.conformance import reporting
    from rattention.conformance.runner import Settings
    from rattention.conformance.strategies import make_plan

    if report:
        reporting.try_folder(report, covering.FILES, what="--report")
    chosen = secrets.randbelow(2**31) if seed is None else seed
    console.print(f"profile {profile.value}, seed {chosen}")
    about = backends.describe(port := backends.resolve(backend), backend)
    backends.close(port)
    settings = Settings(profile.value, chosen)
    found = covering.covered(make_plan(profile.value, chosen, about), settings)
    covering.print_covered(console, found)
    if report:
        told = {"backend": backend, "profile": profile.value, "seed": chosen, "pairs": covering.totals(found)}
        folder = reporting.Folder(report)
        folder.write(covering.coverage_files(told, found))
        console.print(f"report: {escape(str(folder.shown / 'coverage.html'))}", soft_wrap=True)


@vectors_app.command("export")
def vectors_export(
    folder: Annotated[Path, typer.Argument(help="where the set is written", parser=named)],
    profile: ProfileOption = Profile.smoke,
    seed: Annotated[int, typer.Option(help=SEED_HELP)] = 0,
) -> None:
    """Write generated cases with the reference's answers, for ports that cannot run the suite."""
    from rattention.conformance.export import export

    number = export(folder, profile.value, seed)
    told = "" if importlib.util.find_spec("onnx") else "; no graphs, since onnx is not installed"
    console.print(f"{number} cases in {escape(str(folder))}{told}", soft_wrap=True)


@vectors_app.command("check")
def vectors_check(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="[FOLDER] BACKEND",
            help=f"a set, a manifest or one case (default: the stored vectors of this package), and {BACKEND_HELP}",
        ),
    ],
    timeout: TimeoutOption = None,
) -> None:
    """Run every case of a set."""
    from rattention.conformance.replay import check_set

    *folders, backend = arguments
    if len(folders) > 1:
        cannot(f"vectors check takes FOLDER and BACKEND, or BACKEND alone; {len(arguments)} arguments came")
    if "" in folders:
        cannot("vectors check: the name of a file or folder is empty")
    found = folders or default_vectors()
    if not found:
        cannot("the stored vectors are missing: the installation is incomplete")

    def told(lines: list[str]) -> None:
        for line in lines:
            console.print(escape(line), soft_wrap=True)

    raise typer.Exit(1 if check_set(Path(found[0]), backend, told, timeout) else 0)


@app.command()
def ops() -> None:
    """The operations and the clauses, as tables."""
    spec = load()
    table = Table(title=f"Operations, spec {spec.version}", title_justify="left")
    for column in ("operation", "tensors", "attributes", "outputs"):
        table.add_column(column, overflow="fold")
    for op in spec.operations.values():
        tensors = ", ".join(f"{t.name}{'?' if t.optional else ''} [{' '.join(t.shape)}]" for t in op.tensors)
        outputs = ", ".join(f"{t.name} [{' '.join(t.shape)}]" for t in op.outputs)
        table.add_row(op.name, escape(tensors), ", ".join(op.attribute), escape(outputs))
    console.print(table)
    clauses = Table(title="Clauses", title_justify="left", show_header=False)
    for label, text in spec.clauses.items():
        clauses.add_row(label, escape(text))
    console.print(clauses)


def main() -> None:
    """Entry point of the command."""
    any_text()
    app(prog_name="rattention")


if __name__ == "__main__":
    sys.exit(main())
