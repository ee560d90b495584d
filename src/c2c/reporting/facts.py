"""What the rules of router and abstention did, in a sentence each."""

from __future__ import annotations

from collections.abc import Sequence

from c2c.reporting.sections import Section
from c2c.reporting.text import fixed, percent, ranged


def facts(section: Section, systems: Sequence[str]) -> list[str]:
    """A sentence for each of the systems that has a rule fitted on dev."""
    told = {"router": _router(section), "abstain": _abstain(section)}
    return [sentence for name, sentence in told.items() if name in systems and sentence]


def _router(section: Section) -> str:
    found = [run.routing for run in section.runs if run.routing is not None]
    if not found:
        return ""
    sent, asked = ranged([percent(one.sent) for one in found]), ranged([percent(one.asked) for one in found])
    return f"Router: {sent} % of the questions went to the sharer, {asked} % were meant to."


def _abstain(section: Section) -> str:
    found = [run.abstention for run in section.runs if run.abstention is not None]
    if not found:
        return ""
    share = ranged([percent(one.share_fused) for one in found])
    margins = dict.fromkeys(fixed(one.margin, 2) for one in found if one.margin is not None)
    margin = f" (where it was surer by {' or '.join(margins)} nats)" if margins else ""
    return f"Abstain: {share} % of the questions were answered from the fused cache{margin}; fitted on other questions."
