"""The report as one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from c2c.reporting.canvas import Plot, colour_rules
from c2c.reporting.cells import NOTHING
from c2c.reporting.findings import CAUTION, GAIN, LOSS, findings
from c2c.reporting.overview import overview, verdicts
from c2c.reporting.sections import Section, readings, run_title, systems_in
from c2c.reporting.tables import detail_tables, section_tables
from c2c.reporting.text import plural

WORDS = {GAIN: "\u2713 gain", LOSS: "\u2717 loss", CAUTION: "! caution"}


def to_html(sections: Sequence[Section], title: str, plots: Mapping[str, Sequence[Plot]]) -> str:
    """The whole page.

    Args:
        sections: what to report, at least one.
        title: heading.
        plots: per slug of a section its plots, as :func:`~c2c.reporting.plots.draw` makes them.
    """
    # everything is escaped but our own style sheet and the plots, whose texts matplotlib escapes
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    light, dark = colour_rules()
    return environment.from_string(_resource("page.html")).render(
        title=title,
        nothing=NOTHING,
        style=Markup(_resource("page.css").replace("/* light */", light).replace("/* dark */", dark)),
        reading=readings(sections),
        systems=systems_in(sections),
        lower=any(section.unit.sign < 0 for section in sections),
        overview=overview(sections) if len(sections) > 1 else [],
        verdicts=verdicts(sections) if len(sections) > 1 else [],
        sections=[_section(section, plots.get(section.slug, ())) for section in sections],
    )


def _section(section: Section, plots: Sequence[Plot]) -> dict[str, Any]:
    verdict = findings(section)
    lost = sum(found.level == LOSS for found in verdict)
    return {
        "slug": section.slug,
        "receiver": section.runs[0].receiver,
        "sharer": section.runs[0].sharer,
        "subtitle": section.subtitle,
        "losses": plural(lost, "loss"),
        "lost": lost > 0,
        "verdict": [(found.level, WORDS[found.level], found.lead, found.text) for found in verdict],
        "plots": [(plot.kind, Markup(plot.svg), plot.caption) for plot in plots],
        "tables": section_tables(section),
        "details": detail_tables(section),
        "runs": [(run_title(run), run.provenance) for run in section.runs],
    }


def _resource(name: str) -> str:
    return files("c2c.reporting").joinpath(name).read_text(encoding="utf-8")
