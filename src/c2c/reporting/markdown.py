"""The report as Markdown, fit for a README."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from c2c.reporting.cells import LOST, NOTHING, WON, Cell, Table
from c2c.reporting.findings import CAUTION, GAIN, LOSS, findings
from c2c.reporting.overview import Verdict, overview, verdicts
from c2c.reporting.sections import Section, readings, run_title, systems_in
from c2c.reporting.tables import detail_tables, section_tables

HEADER = "<!-- Made by `c2c report` from result files; change those, not this. -->"
SIGNS = {GAIN: "\u2713", LOSS: "\u2717", CAUTION: "!"}


def to_markdown(sections: Sequence[Section], title: str, plots: Mapping[str, Sequence[tuple[str, str]]]) -> str:
    """The whole report.

    Args:
        sections: what to report, at least one.
        title: heading.
        plots: per slug of a section the plots to show, as description and address.
    """
    parts = [HEADER, f"# {escape(title)}", *_reading(sections)]
    if len(sections) > 1:
        parts.append(overview_markdown(sections))
    for section in sections:
        parts += _section(section, plots.get(section.slug, ()))
    return "\n\n".join(parts) + "\n"


def overview_markdown(sections: Sequence[Section], *, brief: bool = False) -> str:
    """All sections at a glance: the tables, and gains and losses in words.

    Args:
        sections: what to show.
        brief: one row for each section in place of one for each of its data sets. Losses on single data sets stay in
            the words below.
    """
    lines = [line for verdict in verdicts(sections) if (line := _verdict(verdict))]
    return "\n\n".join([*map(table_markdown, overview(sections, brief=brief)), *["\n".join(lines)] * bool(lines)])


def _verdict(verdict: Verdict) -> str:
    won, lost = (f"{sign} {escape(words)}" * bool(words) for sign, words in ((WON, verdict.won), (LOST, verdict.lost)))
    words = " ".join(part for part in (won, lost) if part)
    return f"- {escape(verdict.title)}: {words}" if words else ""


def _reading(sections: Sequence[Section]) -> list[str]:
    gains = [f"- **{letter}** = {difference}: {meaning}" for letter, difference, meaning in readings(sections)]
    known = "; ".join(f"**{escape(name)}**: {meaning}" for name, meaning in systems_in(sections) if meaning)
    lower = " Losses in nats are better when lower, so there G, P and S should be below zero."
    note = "Brackets hold 95 % intervals." + lower * any(section.unit.sign < 0 for section in sections)
    return ["\n".join(gains), f"{note} {known}."]


def _section(section: Section, plots: Sequence[tuple[str, str]]) -> list[str]:
    verdict = [f"- {SIGNS[found.level]} **{escape(found.lead)}**: {escape(found.text)}" for found in findings(section)]
    images = [f"![{re.sub(r'[][]', '', escape(description))}]({address})" for description, address in plots]
    heading = [f"## {escape(section.title)}", f"Data: {escape(section.subtitle)}", "\n".join(verdict)]
    tables = [table_markdown(table) for table in section_tables(section)]
    return [*heading, *images, *tables, *_details(section), _provenance(section)]


def _details(section: Section) -> list[str]:
    tables = [table_markdown(table) for table in detail_tables(section)]
    head = "<details><summary>Each run, and each stage</summary>"
    return ["\n\n".join([head, *tables, "</details>"])] if tables else []


def _provenance(section: Section) -> str:
    blocks = []
    for run in section.runs:
        lines = [f"{label}: {' '.join(text.split())}" for label, text in run.provenance.items()]
        blocks.append(f"{escape(run_title(run))}:\n\n{_fenced(lines)}")
    head = "<details><summary>Commands, versions and hashes</summary>"
    return "\n\n".join([head, *blocks, "</details>"])


def _fenced(lines: Sequence[str]) -> str:
    """A code block whose fence is longer than any run of backticks in it."""
    text = "\n".join(lines)
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{text}\n{fence}"


def table_markdown(table: Table) -> str:
    """A table in GitHub's Markdown; titles of groups are rows with one entry."""
    lines = [_line(escape(column) for column in table.columns), _line(_rules(table))]
    for group in table.groups:
        if group.title:
            lines.append(_line([f"*{escape(group.title)}*", *[""] * (len(table.columns) - 1)]))
        lines += [_line(_markdown(cell) for cell in row) for row in group.rows]
    note = f"\n\n{escape(table.note)}" if table.note else ""
    return f"{escape(table.caption)}:\n\n" + "\n".join(lines) + note


def escape(text: str) -> str:
    """Text that Markdown shows as it is, on one line and inside a table."""
    text = " ".join(text.split()).replace("\\", "\\\\")
    text = re.sub(r"&(?=[#\w])", "&amp;", text)
    text = re.sub(r"<(?=[a-zA-Z/!?])", "&lt;", text)  # before anything else it is only a sign
    text = re.sub(r"([`*|~$])", r"\\\1", text)
    text = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)  # inside a word it is an underscore
    return re.sub(r"\](?=[(\[:])", r"\\]", text)  # else a link


def _rules(table: Table) -> list[str]:
    first = table.groups[0].rows[0]
    return ["---" if position == 0 or cell.words else "--:" for position, cell in enumerate(first)]


def _markdown(cell: Cell) -> str:
    text = escape(cell.text)
    if cell.words:
        return f"{cell.mark} {text}".strip()
    if cell.text != NOTHING and (cell.strong or cell.mark):
        text = f"**{text}**"
    return " ".join(part for part in (text, cell.detail, cell.mark) if part)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
