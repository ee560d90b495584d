"""Report results of ``c2c eval``: pandas tables and matplotlib plots as Markdown and as one HTML page."""

from c2c.report.evaluations import Evaluation, group_runs
from c2c.report.load import ReportError, Run, load_results
from c2c.report.pages import check_files, make_files, report_markdown, summary_markdown, write_files

__all__ = [
    "Evaluation",
    "ReportError",
    "Run",
    "check_files",
    "group_runs",
    "load_results",
    "make_files",
    "report_markdown",
    "summary_markdown",
    "write_files",
]
