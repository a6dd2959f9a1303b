"""The properties of the suite, each a named function that cites the clauses it checks."""

from rattention.conformance.properties import agreement, membership, stored
from rattention.conformance.properties.base import REGISTRY, Property, make_case

__all__ = ["REGISTRY", "Property", "agreement", "make_case", "membership", "stored"]
