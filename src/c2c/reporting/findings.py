"""What the numbers say in words: whether content crosses, and every way in which the fuser loses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from c2c.reporting.losses import losses, quicker, rank, standing
from c2c.reporting.names import LETTERS, POOLED, system_phrase
from c2c.reporting.results import Numbers
from c2c.reporting.sections import Section
from c2c.reporting.text import Unit, capital, cost, fixed, gain_text, listed, mean, plural, ratio_of, ratio_text

GAIN, LOSS, CAUTION = "gain", "loss", "caution"
_MANY = 3  # places beside all questions that are told in full
# Ahead of matched, these are told with the interval of the gain; for the others there is none to tell, or no need.
_WITH_CHANCE = frozenset({"sharer", "text", "adapter"})


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
    against: dict[str, str] = {}
    for task in section.tasks:
        for numbers in section.numbers(task):
            for loss in losses(numbers, section.unit):
                fired.setdefault(loss.rule, {}).setdefault(task, []).append(numbers)
                against[loss.rule] = loss.system
    told = sorted(fired.items(), key=lambda item: rank(item[0]))
    lost = [
        _tell(rule, [_Place(task, rows, section, against[rule]) for task, rows in tasks.items()])
        for rule, tasks in told
    ]
    return [*_gains(section), *lost, *_not_measured(section)]


def gain_words(section: Section) -> list[str]:
    """What is gained, in a few words each, for the overview."""
    return [found.lead[:1].lower() + found.lead[1:] for found in _gains(section) if found.level == GAIN]


def _tell(rule: str, places: Sequence[_Place]) -> Finding:
    """One sentence for all rows in which a rule fired."""
    if rule in _TELL:
        return _TELL[rule](places)
    kind, _, system = rule.partition(" ")
    tell = {"ahead": _tell_ahead, "level": _tell_level, "holds": _tell_held}[kind]
    return tell(system, places)


@dataclass(frozen=True)
class _Place:
    """Where a rule fired: a task, the runs of it, and the system that matched was compared with."""

    task: str
    rows: list[Numbers]
    section: Section
    system: str

    @property
    def unit(self) -> Unit:
        return self.section.unit

    @property
    def measured(self) -> int:
        """Runs in which the rule could have fired."""
        return sum(self.system in row.scores for row in self.section.numbers(self.task))

    @property
    def short(self) -> str:
        """The task, and in how many runs where not in all."""
        runs = "" if len(self.rows) == self.measured else f" ({len(self.rows)} of {self.measured} runs)"
        return self.task + runs

    @property
    def where(self) -> str:
        """The task and the runs as part of a sentence."""
        every, measured = self.section.numbers(self.task), self.measured
        place = f"over {self.task}" if self.task == POOLED else f"on {self.task}"
        if len(every) == 1:
            return place
        if measured == 1:
            return f"{place} in the one run that measured it"
        runs = "both runs" if measured == 2 else f"all {measured} runs"
        return f"{place} in {runs if len(self.rows) == measured else f'{len(self.rows)} of {measured} runs'}"

    def gain(self, letter: str) -> str:
        values = [row.gains[letter] for row in self.rows]
        if len(values) == 1:
            return f"{letter} = {gain_text(values, self.unit.digits)}"
        lowest, highest = (
            fixed(bound(one.value for one in values), self.unit.digits, signed=True) for bound in (min, max)
        )
        return f"{letter} from {lowest} to {highest}"

    def ratio(self, system: str) -> str:
        """How many times as long as matched a system takes."""
        ratios = [ratio for row in self.rows if (ratio := ratio_of(row.speed, row.costs, system)) is not None]
        return ratio_text(ratios)

    def amount(self, first: str, second: str) -> str:
        """How far the first system is ahead."""
        ahead = [(row.scores[first].value - row.scores[second].value) * self.unit.sign for row in self.rows]
        return f"{fixed(mean(ahead), self.unit.digits)} {self.unit.points}"


def _places(places: Sequence[_Place], tell: Callable[[_Place], str]) -> str:
    """Where a rule fired; with many places the numbers over all questions, and the names of the others."""
    pooled = [place for place in places if place.task == POOLED]
    others = [place for place in places if place.task != POOLED]
    if not pooled or len(others) < _MANY:
        return listed([tell(place) for place in places])
    return f"{tell(pooled[0])}, also on {listed([place.short for place in others])}"


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
    return _tell_ahead("sharer", places)


def _tell_sharer_quicker(places: Sequence[_Place]) -> Finding:
    text = f"{_at(places, 'S')}.{_seconds('sharer', places)}"
    return Finding(LOSS, "The sharer alone is quicker, and as good within chance", text)


def _tell_deranged(places: Sequence[_Place]) -> Finding:
    def tell(place: _Place) -> str:
        known = all(row.gains["D"].low is not None for row in place.rows)
        chance = f" ({_chance(place, 'D')})" if known else ""
        return f"by {place.amount('deranged', 'receiver')} {place.where}{chance}"

    where = _places(places, tell)
    return Finding(
        LOSS,
        "A wrong message helps too",
        f"it lifts the receiver {where}; that part of G is not the content of the message.",
    )


def _tell_ahead(system: str, places: Sequence[_Place]) -> Finding:
    letter = LETTERS.get(system, "") if system in _WITH_CHANCE else ""

    def tell(place: _Place) -> str:
        chance = f" ({_chance(place, letter)})" if letter else ""
        return f"by {place.amount(system, 'matched')} {place.where}{chance}"

    text = f"{_places(places, tell)}.{_seconds(system, places)}"
    return Finding(LOSS, f"{system_phrase(system)} is better", text)


def _tell_text_quicker(places: Sequence[_Place]) -> Finding:
    text = f"{_at(places, 'T')}.{_seconds('text', places)}"
    return Finding(LOSS, "Text-to-text is quicker, and as good within chance", text)


def _tell_slower(places: Sequence[_Place]) -> Finding:
    where = _places(places, lambda place: f"{place.ratio('text')} {place.where}")
    return Finding(LOSS, "Slower than text-to-text", f"for each second of matched, text-to-text takes {where}.")


def _tell_adapter(places: Sequence[_Place]) -> Finding:
    text = f"{_at(places, 'A')}: zero is not ruled out, and an adapter needs no sharer."
    return Finding(LOSS, "No gain over an adapter of the receiver shown", text)


def _tell_level(system: str, places: Sequence[_Place]) -> Finding:
    where = _places(places, lambda place: place.where)
    return Finding(LOSS, f"{system_phrase(system)} is as good and quicker", f"{where}.{_seconds(system, places)}")


def _tell_held(system: str, places: Sequence[_Place]) -> Finding:
    def share(place: _Place, name: str) -> str:
        return f"{fixed(mean(row.written['holds'][name] for row in place.rows), 1)} %"

    def tell(place: _Place) -> str:
        return f"{place.where} in {share(place, system)} of the answers, matched in {share(place, 'matched')}"

    lead = f"{system_phrase(system)} has the right words more often"
    return Finding(LOSS, lead, f"{_places(places, tell)}; these answers may be longer.")


def _seconds(system: str, places: Sequence[_Place]) -> str:
    """How much quicker a system is than matched, where it is."""
    pooled = [place for place in places if place.task == POOLED] or places
    rows = [row for place in pooled for row in place.rows if quicker(row, system)]
    if not rows:
        return ""
    timed = [row.costs for row in rows if all("seconds" in row.costs.get(name, {}) for name in (system, "matched"))]
    if not timed:
        return ""
    theirs, ours = (cost("seconds", mean(costs[name]["seconds"] for costs in timed)) for name in (system, "matched"))
    return f" It takes {theirs} seconds per question, matched {ours}."


_TELL: dict[str, Callable[[Sequence[_Place]], Finding]] = {
    "wrong better": _tell_wrong,
    "no content": _tell_content,
    "harm": _tell_harm,
    "no gain": _tell_no_gain,
    "sharer": _tell_sharer,
    "sharer quicker": _tell_sharer_quicker,
    "text quicker": _tell_text_quicker,
    "slower": _tell_slower,
    "adapter": _tell_adapter,
    "deranged": _tell_deranged,
}


def _gains(section: Section) -> Iterable[Finding]:
    """What is clearly above zero over all questions, and in how many of the runs."""
    for letter, lead in _LEADS.items():
        rows = section.numbers(section.headline)
        estimates = [row.gains[letter] for row in rows if letter in row.gains]
        clear = [standing(estimate, section.unit) for estimate in estimates].count("above")
        lower = f" {section.unit.name}; lower is better" if section.unit.sign < 0 else ""
        text = f"{letter} = {gain_text(estimates, section.unit.digits)}{lower}." if estimates else ""
        if clear:
            yield Finding(GAIN, lead + _some(clear, len(estimates)), text)
        elif letter in "ST" and estimates and mean(one.value for one in estimates) * section.unit.sign >= 0:
            yield Finding(CAUTION, f"Not shown to be {lead[:1].lower()}{lead[1:]}", text)
    yield from _speed(section)


_LEADS = {
    "P": "Content crosses",
    "G": "Better than the receiver alone",
    "S": "Better than the sharer alone",
    "T": "Better than text-to-text",
    "A": "Better than an adapter of the receiver",
}


def _speed(section: Section) -> Iterable[Finding]:
    """Whether text-to-text clearly takes longer, over all questions."""
    ratios = [row.speed["text"] for row in section.numbers(section.headline) if "text" in row.speed]
    clear = sum(ratio.low is not None and ratio.low > 1 for ratio in ratios)
    if clear:
        text = f"text-to-text takes {ratio_text(ratios)} times as long."
        yield Finding(GAIN, "Quicker than text-to-text" + _some(clear, len(ratios)), text)


def _some(clear: int, count: int) -> str:
    """In how many runs something holds, where it does not in all."""
    return f" in {clear} of {plural(count, 'run')}" if clear < count else ""


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
    if section.unit.sign < 0:
        return  # the others have no loss over the receiver's tokens
    if "sharer" not in systems:
        text = f"{without} whether asking the sharer would do as well."
        yield Finding(CAUTION, "The sharer alone was not measured", text)
    missing = [name for name in ("text", "adapter") if name not in systems]
    if missing:
        names = listed([_WITHOUT[name] for name in missing])
        verb = "was" if len(missing) == 1 else "were"
        text = f"{without} whether {'that' if len(missing) == 1 else 'one of these'} would do as well."
        yield Finding(CAUTION, f"{capital(names)} {verb} not measured", text)


_WITHOUT = {"text": "text-to-text", "adapter": "an adapter of the receiver"}


def _at(places: Sequence[_Place], letter: str) -> str:
    return _places(places, lambda place: f"{place.where} ({place.gain(letter)})")


def _chance(place: _Place, letter: str) -> str:
    """A gain below zero, and whether its intervals reach zero."""
    estimates = [row.gains[letter] for row in place.rows if letter in row.gains]
    within = all(estimate.low is not None and estimate.holds_zero() for estimate in estimates)
    return place.gain(letter) + ", within chance" * within
