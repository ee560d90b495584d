"""The files of a report: made in memory, then written, or compared with what is there."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from difflib import unified_diff
from itertools import islice
from pathlib import Path
from urllib.parse import quote

from c2c.reporting.canvas import Plot
from c2c.reporting.markdown import HEADER, overview_markdown, to_markdown
from c2c.reporting.page import to_html
from c2c.reporting.plots import draw
from c2c.reporting.readme import fill_readme
from c2c.reporting.results import ReportError
from c2c.reporting.sections import Section
from c2c.utils import write_text

_SHOWN = 12


def make_files(
    sections: Sequence[Section],
    title: str,
    html: Path | None,
    markdown: Path | None,
    plots: Path | None,
    readme: Path | None = None,
) -> dict[Path, str]:
    """The text of every file that was asked for.

    Args:
        sections: what to report, at least one.
        title: heading.
        html: where the page goes.
        markdown: where the Markdown goes.
        plots: folder of the plots, which the Markdown then shows.
        readme: a file whose marked part the overview fills.

    Raises:
        ReportError: matplotlib is needed and not installed, or the readme has no marked part.
    """
    files: dict[Path, str] = {}
    if readme is not None:
        files[readme] = fill_readme(readme, f"{HEADER}\n\n{overview_markdown(sections, brief=True)}")
    drawn = draw(sections) if html is not None or plots is not None else {}
    if html is not None:
        files[html] = to_html(sections, title, drawn)
    if plots is not None:
        files |= {plots / f"{slug}-{plot.kind}.svg": plot.standalone for slug, some in drawn.items() for plot in some}
    if markdown is not None:
        files[markdown] = to_markdown(sections, title, _images(drawn, plots, markdown.parent))
    return files


def _images(drawn: Mapping[str, Sequence[Plot]], plots: Path | None, folder: Path) -> dict[str, list[tuple[str, str]]]:
    """Description and address of the plots, seen from a folder."""
    if plots is None:
        return {}
    start = quote(Path(os.path.relpath(plots, folder)).as_posix())
    return {slug: [(plot.title, f"{start}/{slug}-{plot.kind}.svg") for plot in some] for slug, some in drawn.items()}


def write_files(files: Mapping[Path, str]) -> None:
    """Write every file, whole or not at all.

    Raises:
        ReportError: one could not be written.
    """
    for path, text in files.items():
        try:
            write_text(path, text)
        except OSError as error:
            raise ReportError(f"{path} can't be written: {error}.") from error


def check_files(files: Mapping[Path, str], again: str) -> None:
    """Compare what is there with what would be written.

    Args:
        files: what would be written.
        again: the command that writes it.

    Raises:
        ReportError: a file is missing or differs; names all of them and shows where the first one differs.
    """
    found = {path: path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None for path in files}
    stale = [path for path in files if found[path] != files[path]]
    if stale:
        names = ", ".join(str(path) for path in stale)
        verb = "is" if len(stale) == 1 else "are"
        raise ReportError(
            f"{names} {verb} not what the results say. Run: {again}{_difference(found[stale[0]], files[stale[0]])}"
        )


def _difference(found: str | None, expected: str) -> str:
    if found is None:
        return " (there is no such file yet)"
    lines = unified_diff(found.splitlines(), expected.splitlines(), "found", "expected", lineterm="", n=0)
    return "\n" + "\n".join(line[:200] for line in islice(lines, _SHOWN))
