"""What the numbers say in words: whether content crosses, and every way in which the fuser loses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from c2c.reporting.losses import RULES, losses, quicker, rank, standing
from c2c.reporting.names import POOLED, system_phrase
from c2c.reporting.results import Numbers
from c2c.reporting.sections import Section
from c2c.reporting.text import Unit, cost, fixed, gain_text, listed, mean, plural

GAIN, LOSS, CAUTION = "gain", "loss", "caution"


@dataclass(frozen=True)
class Finding:
    """One line of a verdict.

    Attributes:
        level: ``gain``, ``loss`` or ``caution``.
        lead: the finding in a few words.
        text: the numbers.
    """

    level: str
    lead: str
    text: str


def findings(section: Section) -> list[Finding]:
    """The verdict on a section: what is gained, what is lost, and what was not measured."""
    fired: dict[str, dict[str, list[Numbers]]] = {}
    for task in section.tasks:
        for numbers in section.numbers(task):
            for loss in losses(numbers, section.unit):
                fired.setdefault(loss.rule, {}).setdefault(task, []).append(numbers)
    lost = [_tell(rule, tasks, section) for rule, tasks in sorted(fired.items(), key=lambda item: rank(item[0]))]
    return [*_gains(section), *lost, *_not_measured(section)]


def gain_words(section: Section) -> list[str]:
    """What is gained, in a few words each, for the overview."""
    return [found.lead[:1].lower() + found.lead[1:] for found in _gains(section) if found.level == GAIN]


def _tell(rule: str, tasks: dict[str, list[Numbers]], section: Section) -> Finding:
    """One sentence for all rows in which a rule fired."""
    places = [_Place(task, rows, section) for task, rows in tasks.items()]
    if rule in RULES:
        return _TELL[rule](places)
    kind, _, system = rule.partition(" ")
    return _tell_ahead(system, places) if kind == "ahead" else _tell_level(system, places)


@dataclass(frozen=True)
class _Place:
    """Where a rule fired: a task, and the runs of it."""

    task: str
    rows: list[Numbers]
    section: Section

    @property
    def unit(self) -> Unit:
        return self.section.unit

    @property
    def where(self) -> str:
        runs = len(self.section.numbers(self.task))
        place = f"over {self.task}" if self.task == POOLED else f"on {self.task}"
        if runs == 1:
            return place
        return (
            f"{place} in all {runs} runs" if len(self.rows) == runs else f"{place} in {len(self.rows)} of {runs} runs"
        )

    def gain(self, letter: str) -> str:
        values = [row.gains[letter] for row in self.rows]
        if len(values) == 1:
            return f"{letter} = {gain_text(values, self.unit.digits)}"
        lowest, highest = (
            fixed(bound(one.value for one in values), self.unit.digits, signed=True) for bound in (min, max)
        )
        return f"{letter} from {lowest} to {highest}"

    def amount(self, first: str, second: str) -> str:
        """How far the first system is ahead."""
        ahead = [(row.scores[first].value - row.scores[second].value) * self.unit.sign for row in self.rows]
        return f"{fixed(mean(ahead), self.unit.digits)} {self.unit.points}"


def _tell_content(places: Sequence[_Place]) -> Finding:
    text = f"{_at(places, 'P')}: zero is not ruled out, and at zero another question's cache does as well."
    return Finding(LOSS, "No content shown", text)


def _tell_wrong(places: Sequence[_Place]) -> Finding:
    return Finding(LOSS, "The wrong message does better", f"{_at(places, 'P')}.")


def _tell_harm(places: Sequence[_Place]) -> Finding:
    return Finding(LOSS, "Worse than the receiver alone", f"{_at(places, 'G')}.")


def _tell_no_gain(places: Sequence[_Place]) -> Finding:
    return Finding(LOSS, "No gain over the receiver shown", f"{_at(places, 'G')}: zero is not ruled out.")


def _tell_sharer(places: Sequence[_Place]) -> Finding:
    parts = [f"by {place.amount('sharer', 'matched')} {place.where} ({_chance(place)})" for place in places]
    return Finding(LOSS, "The sharer alone is better", f"{listed(parts)}.{_seconds('sharer', places)}")


def _tell_sharer_quicker(places: Sequence[_Place]) -> Finding:
    parts = [f"{place.where} ({place.gain('S')})" for place in places]
    text = f"{listed(parts)}.{_seconds('sharer', places)}"
    return Finding(LOSS, "The sharer alone is quicker, and as good within chance", text)


def _tell_deranged(places: Sequence[_Place]) -> Finding:
    parts = [f"by {place.amount('deranged', 'receiver')} {place.where}" for place in places]
    text = f"it lifts the receiver {listed(parts)}; that part of G is not the content of the message."
    return Finding(LOSS, "A wrong message helps too", text)


def _tell_ahead(system: str, places: Sequence[_Place]) -> Finding:
    parts = [f"by {place.amount(system, 'matched')} {place.where}" for place in places]
    return Finding(LOSS, f"{system_phrase(system)} is better", f"{listed(parts)}.{_seconds(system, places)}")


def _tell_level(system: str, places: Sequence[_Place]) -> Finding:
    where = listed([place.where for place in places])
    return Finding(LOSS, f"{system_phrase(system)} is as good and quicker", f"{where}.{_seconds(system, places)}")


def _seconds(system: str, places: Sequence[_Place]) -> str:
    """How much quicker a system is than matched, where it is."""
    rows = [row for place in places for row in place.rows if quicker(row, system)]
    if not rows:
        return ""
    theirs, ours = (cost("seconds", mean(row.costs[name]["seconds"] for row in rows)) for name in (system, "matched"))
    return f" It takes {theirs} seconds per question, matched {ours}."


_TELL: dict[str, Callable[[Sequence[_Place]], Finding]] = {
    "wrong better": _tell_wrong,
    "no content": _tell_content,
    "harm": _tell_harm,
    "no gain": _tell_no_gain,
    "sharer": _tell_sharer,
    "sharer quicker": _tell_sharer_quicker,
    "deranged": _tell_deranged,
}


def _gains(section: Section) -> Iterable[Finding]:
    """What is clearly above zero over all questions, and in how many of the runs."""
    leads = {"P": "Content crosses", "G": "Better than the receiver alone", "S": "Better than the sharer alone"}
    rows = section.numbers(section.headline)
    for letter, lead in leads.items():
        estimates = [row.gains[letter] for row in rows if letter in row.gains]
        standings = [standing(estimate, section.unit) for estimate in estimates]
        clear = standings.count("above")
        lower = f" {section.unit.name}; lower is better" if section.unit.sign < 0 else ""
        text = f"{letter} = {gain_text(estimates, section.unit.digits)}{lower}." if estimates else ""
        if clear:
            runs = f" in {clear} of {plural(len(estimates), 'run')}" if clear < len(estimates) else ""
            yield Finding(GAIN, lead + runs, text)
        elif letter == "S" and estimates and mean(one.value for one in estimates) * section.unit.sign >= 0:
            yield Finding(CAUTION, "Not shown to be better than the sharer alone", text)


def _not_measured(section: Section) -> Iterable[Finding]:
    """Comparisons without which the numbers say little."""
    systems, without = section.systems, "so it is not known"
    if "matched" not in systems:
        yield Finding(CAUTION, "Matched was not measured", "there is nothing to compare the other systems with.")
        return
    if "deranged" not in systems:
        text = f"without the deranged system there is no P, {without} whether content crosses."
        yield Finding(CAUTION, "P was not measured", text)
    if "receiver" not in systems:
        yield Finding(CAUTION, "G was not measured", f"the receiver alone is missing, {without} what the fuser brings.")
    if "sharer" not in systems and section.unit.sign > 0:
        text = f"{without} whether asking the sharer would do as well."
        yield Finding(CAUTION, "The sharer alone was not measured", text)


def _at(places: Sequence[_Place], letter: str) -> str:
    return listed([f"{place.where} ({place.gain(letter)})" for place in places])


def _chance(place: _Place) -> str:
    """S, and whether its intervals reach zero."""
    estimates = [row.gains["S"] for row in place.rows]
    within = all(estimate.low is not None and estimate.holds_zero() for estimate in estimates)
    return place.gain("S") + ", within chance" * within
