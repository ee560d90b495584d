"""The part of a README that results fill."""

from __future__ import annotations

from pathlib import Path

from c2c.reporting.results import ReportError

BEGIN, END = "<!-- results -->", "<!-- /results -->"


def fill_readme(path: Path, text: str) -> str:
    """What a file says with ``text`` between its markers, the rest as it is.

    Args:
        path: the file; lines of its own mark the place, ``<!-- results -->`` and ``<!-- /results -->``.
        text: Markdown.

    Raises:
        ReportError: the file can't be read, or has not each of the markers once and in order.
    """
    try:
        found = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ReportError(f"{path} can't be read: {error}.") from error
    counts = found.count(BEGIN), found.count(END)
    if counts != (1, 1) or found.index(BEGIN) > found.index(END):
        raise ReportError(
            f"{path} has {BEGIN} {counts[0]} times and {END} {counts[1]} times; expected each once, in this order: put "
            "both on lines of their own where the results belong."
        )
    before, rest = found.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n\n{text.strip()}\n\n{END}{after}"
