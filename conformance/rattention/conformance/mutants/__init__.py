"""Wrong implementations on purpose: `CATALOGUE` maps each id to its mutant; `runner` holds the suite to them."""

from importlib import import_module

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
    "contract",
)
for _family in FAMILIES:  # each module plants its mutants when it is imported
    import_module(f"rattention.conformance.mutants.{_family}")

__all__ = ["CATALOGUE", "FAMILIES", "Form", "Mutant", "Port"]
