"""The properties of the suite, each a named function that cites the clauses it checks."""

from rattention.conformance.properties import (
    agreement,
    contract,
    declared,
    drift,
    exact,
    inert,
    laws,
    membership,
    numerics,
    ranges,
    stop,
    stored,
    symmetry,
    values,
)
from rattention.conformance.properties.base import REGISTRY, Property, make_case

__all__ = [
    "REGISTRY",
    "Property",
    "agreement",
    "contract",
    "declared",
    "drift",
    "exact",
    "inert",
    "laws",
    "make_case",
    "membership",
    "numerics",
    "ranges",
    "stop",
    "stored",
    "symmetry",
    "values",
]
