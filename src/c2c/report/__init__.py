"""Report results of ``c2c eval``: pandas tables and matplotlib plots as Markdown and as one HTML page."""

from c2c.report.load import Evaluation, ReportError, load_evaluations
from c2c.report.pages import check_files, make_files, render, write_files

__all__ = ["Evaluation", "ReportError", "check_files", "load_evaluations", "make_files", "render", "write_files"]
