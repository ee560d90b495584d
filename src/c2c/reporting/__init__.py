"""Results of ``c2c eval`` as one HTML page and as Markdown, with plots, and with the losses in words."""

from c2c.reporting.markdown import overview_markdown, to_markdown
from c2c.reporting.outputs import check_files, make_files, write_files
from c2c.reporting.page import to_html
from c2c.reporting.plots import draw
from c2c.reporting.reading import read_results
from c2c.reporting.results import ReportError
from c2c.reporting.sections import Section, group

__all__ = [
    "ReportError",
    "Section",
    "check_files",
    "draw",
    "group",
    "make_files",
    "overview_markdown",
    "read_results",
    "to_html",
    "to_markdown",
    "write_files",
]
