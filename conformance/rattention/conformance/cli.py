"""The command line: `rattention conform | mutants | replay | vectors | ops`.

Exit codes: 0 conforming, 1 not conforming, 2 could not run.
"""

from __future__ import annotations

import os
import secrets
import sys
from dataclasses import replace
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer
from rattention.conformance import backends
from rattention.spec import load
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

app = typer.Typer(
    add_completion=False, no_args_is_help=True, rich_markup_mode=None, help="Conformance of RAttention implementations."
)
vectors_app = typer.Typer(no_args_is_help=True, help="Cases on disk.")
app.add_typer(vectors_app, name="vectors")
# Rich takes 80 columns where it sees no terminal, too few for the tables in a log.
console = Console(highlight=False, width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120)


class Profile(StrEnum):
    """How much is run."""

    smoke = "smoke"
    quick = "quick"
    full = "full"


BACKEND_HELP = "NAME, all, path/to/file.py:ATTRIBUTE, MODULE:ATTRIBUTE, or exec:COMMAND"
Backend = Annotated[str, typer.Argument(help=BACKEND_HELP)]
ReportOption = Annotated[Path | None, typer.Option(help="write report.json, junit.xml, report.html and the cases here")]
SeedOption = Annotated[
    int | None, typer.Option(help="the same seed gives the same cases; default: a fresh one, printed")
]
ProfileOption = Annotated[Profile, typer.Option(help="how much to run")]


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
    workers: Annotated[int, typer.Option(min=0, help="worker processes; default: 2, fewer on a smaller machine")] = 0,
) -> None:
    """Hold a backend against the specification."""
    from rattention.conformance.runner import Settings

    known = {*load().clauses, *load().operations, *(label.split("-")[0] for label in load().clauses)}
    from rattention.conformance.properties import REGISTRY

    if select and select not in known | set(REGISTRY):
        _cannot(f"--select {select}: no clause, operation or property of that name")
    chosen = secrets.randbelow(2**31) if seed is None else seed
    paths = tuple(vectors or default_vectors())
    for path in paths:
        if not Path(path).exists():
            _cannot(f"--vectors {path} does not exist")
    count = workers or max(1, min(2, os.cpu_count() or 1))
    settings = Settings(profile.value, chosen, select, paths, count)
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")  # one core per worker
    console.print(f"profile {profile.value}, seed {chosen}")
    if backend == "all":
        raise typer.Exit(_all(settings, report))
    summary = _one(backend, settings, report)
    raise typer.Exit(0 if summary["conforming"] else 1)


def default_vectors() -> list[str]:
    """The stored vectors: a checkout has them in spec/, an installed package carries them."""
    from rattention.spec.operations import operations_file

    folder = operations_file().parent / "vectors"
    return [str(folder)] if folder.is_dir() and any(folder.rglob("*.safetensors")) else []


def _one(target: str, settings: Any, report: Path | None) -> dict[str, Any]:
    """Run one backend and print what was found."""
    from rattention.conformance import reporting

    summary, cases = _run(target, settings, report)
    reporting.print_outcome(console, summary, cases)
    if report:
        console.print(f"report: {report / 'report.html'}", soft_wrap=True)
    return summary


def _run(target: str, settings: Any, report: Path | None) -> tuple[dict[str, Any], Path | None]:
    """Run one backend under a progress bar; the summary, and the folder of the failing cases."""
    from rattention.conformance import reporting, runner, workers
    from rattention.conformance.reporting.files import write_cases

    columns = (
        TextColumn(escape(target)),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("[red]{task.fields[failed]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None, failed="")

        def step(done: int, total: int, failed: int) -> None:
            bar.update(task, completed=done, total=total, failed=f"{failed} failed" if failed else "")

        try:
            outcome = runner.conform(target, settings, progress=step)
        except backends.CannotRun as reason:
            bar.stop()
            _cannot(str(reason))
        except workers.SuiteFault as fault:
            bar.stop()
            _cannot(f"the suite itself failed at {fault}")
    if not any(r.status != "skip" for r in outcome.results):
        _cannot(f"nothing to run: --select {settings.select} matches no case of this profile")
    summary = reporting.summarise(outcome)
    cases = None
    if outcome.failures:
        cases = (report or Path("rattention-failures")) / "cases" if report else Path("rattention-failures")
        write_cases(outcome, cases)
    if report:
        reporting.write_report(outcome, summary, report)
    return summary, cases


def _all(settings: Any, report: Path | None) -> int:
    """Every backend that runs here: first the matrix over all of them, then what failed, then the verdicts."""
    from rattention.conformance import reporting

    names, absent = backends.runnable()
    found: list[tuple[dict[str, Any], Path | None]] = []
    notes = [f"[yellow]cannot run here[/] {escape(reason)}" for reason in absent.values()]
    for name in names:
        own = settings
        if settings.profile != "smoke" and backends.cost(name) == "interpreted":
            # Kernels under an interpreter take minutes where others take seconds.
            own = replace(settings, profile="smoke")
            notes.append(
                f"{name} runs under an interpreter: smoke here; "
                f"rattention conform {name} --profile {settings.profile} --seed {settings.seed} runs the rest"
            )
        found.append(_run(name, own, report / name if report else None))
    summaries = [summary for summary, _ in found]
    if summaries:
        reporting.print_matrices(console, summaries)
    for note in notes:
        console.print(note, soft_wrap=True)
    for summary, cases in found:
        if not summary["conforming"]:
            reporting.print_outcome(console, summary, cases)
    if report:
        console.print(f"report: {reporting.write_overview(summaries, absent, report)}", soft_wrap=True)
    table = Table(title="All backends", title_justify="left")
    for column in ("backend", "profile", "verdict", "passed", "failed", "unsupported", "largest share", "seconds"):
        table.add_column(column, no_wrap=column in ("backend", "verdict"))
    for s in summaries:
        verdict = "[green]conforming[/]" if s["conforming"] else "[bold red]not conforming[/]"
        c = s["cases"]
        shares = [x for by_dtype in s["budget"].values() for outputs in by_dtype.values() for x in outputs.values()]
        counts = (str(c[k]) for k in ("passed", "failed", "unsupported"))
        worst, seconds = f"{max(shares, default=0.0):.3g}", f"{s['seconds']:.1f}"
        table.add_row(s["backend"], s["profile"], verdict, *counts, worst, seconds)
    for name in absent:
        table.add_row(name, "", "[yellow]cannot run here[/]")
    console.print(table)
    if not summaries:
        return 2
    return 0 if all(s["conforming"] for s in summaries) else 1


@app.command()
def replay(
    case: Annotated[Path, typer.Argument(help="a case file")],
    backend: Backend,
) -> None:
    """Run one case again, exactly as it was."""
    from rattention.conformance.replay import replay as again

    try:
        lines, failed = again(case, backend)
    except backends.CannotRun as reason:
        _cannot(str(reason))
    except (OSError, ValueError, KeyError) as error:
        _cannot(f"{case} cannot be replayed: {error}")
    for line in lines:
        console.print(escape(line), soft_wrap=True)
    raise typer.Exit(1 if failed else 0)


@app.command()
def mutants(
    profile: ProfileOption = Profile.quick,
    seed: SeedOption = None,
    report: ReportOption = None,
    select: Annotated[str, typer.Option(help="run only the mutants whose name contains this")] = "",
) -> None:
    """Run the suite against every mutant of the catalogue: a survivor is a hole in the suite."""
    try:
        from rattention.conformance.mutants import command
    except ImportError as error:
        _cannot(f"the catalogue of mutants is not installed: {error}")
    raise typer.Exit(command(profile.value, seed, report, select, console))


@vectors_app.command("export")
def vectors_export(
    folder: Annotated[Path, typer.Argument(help="where the set is written")],
    profile: ProfileOption = Profile.smoke,
    seed: SeedOption = 0,
) -> None:
    """Write generated cases with the reference's answers, for ports that cannot run the suite."""
    from rattention.conformance.export import export

    console.print(f"{export(folder, profile.value, seed or 0)} cases in {folder}", soft_wrap=True)


@vectors_app.command("check")
def vectors_check(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="[FOLDER] BACKEND",
            help=f"a set, a manifest or one case (default: the stored vectors of this package), and {BACKEND_HELP}",
        ),
    ],
) -> None:
    """Run every case of a set."""
    from rattention.conformance.replay import check_set

    *folders, backend = arguments
    if not folders:
        folders = default_vectors() or _cannot("the stored vectors are missing: the installation is incomplete")
    if len(folders) > 1:
        _cannot(f"vectors check takes FOLDER and BACKEND, or BACKEND alone; {len(arguments)} arguments came")
    folder = Path(folders[0])
    try:
        lines, failed = check_set(folder, backend)
    except backends.CannotRun as reason:
        _cannot(str(reason))
    except (OSError, ValueError, KeyError) as error:
        _cannot(f"{folder} cannot be read: {error}")
    for line in lines:
        console.print(escape(line), soft_wrap=True)
    raise typer.Exit(1 if failed else 0)


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


def _cannot(text: str) -> Any:
    """One line on stderr, exit code 2."""
    Console(stderr=True, highlight=False).print(f"rattention: {escape(text)}", soft_wrap=True)
    raise typer.Exit(2)


def main() -> None:
    """Entry point of the command."""
    app(prog_name="rattention")


if __name__ == "__main__":
    sys.exit(main())
