"""Wrong implementations on purpose: `CATALOGUE` maps each id to its mutant; `runner` holds the suite to them."""

from importlib import import_module
from pathlib import Path
from typing import Any

from rattention.conformance.mutants.eager import Form
from rattention.conformance.mutants.port import CATALOGUE, Mutant, Port

FAMILIES = (
    "window",
    "state",
    "heads",
    "softmax",
    "mix",
    "precision",
    "gradients",
    "segments",
    "cache",
    "corners",
    "contract",
    "declarations",
    "crashes",
    "wire",
)
for _family in FAMILIES:  # each module plants its mutants when it is imported
    import_module(f"rattention.conformance.mutants.{_family}")


def command(profile: str, seed: int | None, report: Path | None, select: str, console: Any) -> int:
    """`rattention mutants`: see `console.command`, imported here because it imports the catalogue."""
    from rattention.conformance.mutants.console import command as run

    return run(profile, seed, report, select, console)


__all__ = ["CATALOGUE", "FAMILIES", "Form", "Mutant", "Port", "command"]
