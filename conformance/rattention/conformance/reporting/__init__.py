"""What a run found, for people and for machines."""

from rattention.conformance.reporting.console import print_matrices, print_outcome
from rattention.conformance.reporting.files import write_overview, write_report
from rattention.conformance.reporting.summary import case_name, summarise

__all__ = ["case_name", "print_matrices", "print_outcome", "summarise", "write_overview", "write_report"]
