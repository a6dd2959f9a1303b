"""What a run found, for people and for machines."""

from rattention.conformance.reporting.console import WIDE, print_matrices, print_outcome
from rattention.conformance.reporting.files import CASES, REPORT, case_files, folder_names, overview_files, report_files
from rattention.conformance.reporting.folder import CannotWrite, Folder, try_folder
from rattention.conformance.reporting.progress import end_of, steps
from rattention.conformance.reporting.summary import case_name, replay_line, summarise

__all__ = [
    "CASES",
    "REPORT",
    "WIDE",
    "CannotWrite",
    "Folder",
    "case_files",
    "case_name",
    "end_of",
    "folder_names",
    "overview_files",
    "print_matrices",
    "print_outcome",
    "replay_line",
    "report_files",
    "steps",
    "summarise",
    "try_folder",
]
