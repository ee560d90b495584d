"""Render a report as Markdown, as one HTML page and as the table of a README, and write or check its files."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from difflib import unified_diff
from itertools import islice
from os.path import relpath
from pathlib import Path
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from c2c.report.load import Evaluation, ReportError
from c2c.report.names import LEGEND, SYSTEMS, in_order, spaced
from c2c.report.plots import draw_plots
from c2c.report.tables import Table, readme_table, result_tables, run_tables, summary_table
from c2c.utils import read_text, write_text

_BEGIN, _END = "<!-- results -->", "<!-- /results -->"


def make_files(
    evaluations: Sequence[Evaluation],
    title: str,
    *,
    html: Path | None = None,
    markdown: Path | None = None,
    plots: Path | None = None,
    readme: Path | None = None,
) -> dict[Path, str]:
    """Make the text of every file that is wanted, for at least one evaluation.

    Args:
        plots: folder of the plots, which the Markdown then shows.
        readme: a file with lines ``<!-- results -->`` and ``<!-- /results -->``, between which the table goes.

    Raises:
        ReportError: the readme can't be read, or has not each of the marks once.
    """
    files: dict[Path, str] = {}
    drawn = draw_plots(evaluations) if html is not None or plots is not None else {}
    if readme is not None:
        files[readme] = _fill_readme(readme, render("summary.md", evaluations, summary=readme_table(evaluations)))
    if html is not None:
        data = {name: base64.b64encode(svg.encode()).decode() for name, (_, svg) in drawn.items()}
        images = {f"data:image/svg+xml;base64,{data[name]}": caption for name, (caption, _) in drawn.items()}
        files[html] = render("report.html", evaluations, title, images=images)
    images = {}
    if plots is not None:
        files |= {plots / f"{name}.svg": svg for name, (_, svg) in drawn.items()}
        folder = quote(Path(relpath(plots, (markdown or plots).parent)).as_posix())
        images = {f"{folder}/{name}.svg": caption for name, (caption, _) in drawn.items()}
    if markdown is not None:
        files[markdown] = render("report.md", evaluations, title, images=images)
    return files


def render(
    template: str,
    evaluations: Sequence[Evaluation],
    title: str = "",
    *,
    images: Mapping[str, str] | None = None,
    summary: Table | None = None,
) -> str:
    """Fill a template; values are escaped for HTML by the environment, for Markdown by the filter ``md``.

    Args:
        template: ``report.html``, ``report.md``, or ``summary.md`` for the table with a row per evaluation.
        evaluations: at least one.
        title: heading.
        images: address of each plot to its caption.
        summary: a table in place of that row per evaluation.
    """
    environment = Environment(
        loader=PackageLoader("c2c.report"),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["md"] = _escape_markdown
    systems = in_order({name for one in evaluations for name in one.systems}, SYSTEMS)
    return environment.get_template(template).render(
        title=title,
        systems={spaced(name): SYSTEMS[name] for name in systems if name in SYSTEMS},
        summary=summary or summary_table(evaluations),
        images=images or {},
        evaluations=evaluations,
        result_tables=result_tables,
        run_tables=run_tables,
        legend=LEGEND,
    )


def write_files(files: Mapping[Path, str]) -> None:
    """Write every file, whole or not at all; raise ReportError where one can't be written."""
    for path, text in files.items():
        try:
            write_text(path, text)
        except OSError as error:
            raise ReportError(f"{path} can't be written: {error}.") from error


def check_files(files: Mapping[Path, str], command: str) -> None:
    """Compare the files that are there with those that ``command`` would write; of plots only which there are.

    Raises:
        ReportError: a file is missing or differs, or a plot is there that would not be written.
    """
    found = {path: path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None for path in files}
    stale = [path for path, text in found.items() if text is None or (path.suffix != ".svg" and text != files[path])]
    folders = {path.parent for path in files if path.suffix == ".svg"}
    extra = sorted(path for folder in folders for path in folder.glob("*.svg") if path not in files)
    if extra:
        raise ReportError(f"{', '.join(map(str, extra))} are no plots of these results: delete them.")
    if stale:
        text, wanted = found[stale[0]], files[stale[0]].splitlines()
        lines = [] if text is None else unified_diff(text.splitlines(), wanted, "found", "expected", lineterm="", n=0)
        difference = "".join(f"\n{line[:200]}" for line in islice(lines, 12)) or " (there is no such file yet)"
        raise ReportError(f"{', '.join(map(str, stale))}: not what the results say. Run: {command}{difference}")


def _escape_markdown(text: str) -> str:
    """Show a text as it is, on one line and inside a table."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"[\\`*|~$\[\]]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", text)


def _fill_readme(path: Path, table: str) -> str:
    text = read_text(path, str(path), ReportError)
    before, _, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not end or text.count(_BEGIN) != 1 or text.count(_END) != 1:
        raise ReportError(
            f"{path} must have {_BEGIN} and {_END} once each, in this order, on lines of their own: put them where the "
            "results belong."
        )
    return f"{before}{_BEGIN}\n\n{table.strip()}\n\n{_END}{after}"
