"""Numbers as text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Unit:
    """What the scores are counted in.

    Attributes:
        name: as in the result file, ``percent``, ``percent f1`` or ``nats per token``.
    """

    name: str

    @property
    def sign(self) -> int:
        """1 where more is better, -1 where less is."""
        return -1 if "nats" in self.name else 1

    @property
    def digits(self) -> int:
        """Decimals that are shown."""
        return 3 if self.sign < 0 else 1

    @property
    def score(self) -> str:
        """What a score is called."""
        if self.sign < 0:
            return f"loss, {self.name} (lower is better)"
        return {"percent": "accuracy, percent", "percent f1": "F1, percent"}.get(self.name, self.name)

    @property
    def points(self) -> str:
        """What a difference is counted in."""
        return "points" if self.name.startswith("percent") else self.name


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % interval, where there is one."""

    value: float
    low: float | None = None
    high: float | None = None

    def holds_zero(self) -> bool:
        """The interval reaches zero; without an interval nothing is known, and only an exact zero does."""
        if self.low is None or self.high is None:
            return self.value == 0
        return self.low <= 0 <= self.high


def fixed(value: float, digits: int, *, signed: bool = False) -> str:
    """A number with so many decimals, and no negative zero."""
    rounded = round(value, digits) + 0.0
    return f"{rounded:+.{digits}f}" if signed else f"{rounded:.{digits}f}"


def interval(estimate: Estimate, digits: int) -> str:
    """``[40.0, 46.0]``, or nothing."""
    if estimate.low is None or estimate.high is None:
        return ""
    return f"[{fixed(estimate.low, digits)}, {fixed(estimate.high, digits)}]"


def spread(values: Sequence[float], digits: int) -> str:
    """``(40.0 to 46.0)``, or nothing for one number."""
    return f"({fixed(min(values), digits)} to {fixed(max(values), digits)})" if len(values) > 1 else ""


def mean(values: Iterable[float]) -> float:
    """The mean of at least one number."""
    numbers = list(values)
    return sum(numbers) / len(numbers)


def gain_text(estimates: Sequence[Estimate], digits: int) -> str:
    """``+43.0 [40.0, 46.0]``, or for several runs ``+43.1, mean of 3 runs from 40.2 to 45.0``."""
    values = [estimate.value for estimate in estimates]
    shown = fixed(mean(values), digits, signed=True)
    if len(values) > 1:
        lowest, highest = (fixed(value, digits, signed=True) for value in (min(values), max(values)))
        return f"{shown}, mean of {len(values)} runs from {lowest} to {highest}"
    return f"{shown} {interval(estimates[0], digits)}".rstrip()


def ratio_text(ratios: Sequence[Estimate]) -> str:
    """``2.41 [2.20, 2.66]``, or for several runs ``2.41 (mean of 3 runs from 2.20 to 2.66)``."""
    values = [ratio.value for ratio in ratios]
    if len(values) > 1:
        lowest, highest = (fixed(bound(values), 2) for bound in (min, max))
        return f"{fixed(mean(values), 2)} (mean of {len(values)} runs from {lowest} to {highest})"
    shown = interval(ratios[0], 2)
    return f"{fixed(values[0], 2)} {shown}".rstrip()


def p_value(value: float) -> str:
    """A p-value with as many digits as it deserves."""
    return "<0.001" if value < 0.001 else fixed(value, 3)


def cost(field: str, value: float) -> str:
    """Seconds, tokens or bytes for people."""
    if field in ("bytes", "memory"):
        return _bytes(value)
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if field == "tokens" or value == 0 else f"{value:#.3g}".rstrip(".")


def plural(count: int, noun: str) -> str:
    """``1 task``, ``2 tasks``."""
    ending = "es" if noun.endswith("s") else "s"
    return f"{count:,} {noun}{'' if count == 1 else ending}"


def capital(text: str) -> str:
    """A text with a capital letter."""
    return text[:1].upper() + text[1:]


def ranged(counts: Sequence[int]) -> str:
    """``32``, or ``32 to 64`` where they differ."""
    return " to ".join(f"{count:,}" for count in sorted({min(counts), max(counts)}))


def percent(share: float) -> int:
    """A share in whole percent."""
    return round(100 * share)


def ratio_of(speed: Mapping[str, Estimate], costs: Mapping[str, Mapping[str, float]], system: str) -> Estimate | None:
    """How many times as long as matched a system takes: as measured, or from the mean seconds of both."""
    if system in speed:
        return speed[system]
    theirs, ours = (costs.get(name, {}).get("seconds") for name in (system, "matched"))
    return None if theirs is None or not ours or system == "matched" else Estimate(theirs / ours)


def listed(parts: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
