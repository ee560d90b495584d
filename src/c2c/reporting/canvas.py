"""What all plots are drawn on: SVG with text as text, and colours that the page sets for light, dark and print."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from c2c.errors import C2CError
from c2c.reporting.names import CONTROLS
from c2c.utils import install_command

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 420  # pixels; small enough that the text can be read on a phone
TEXT, HEADING = 12.5, 13.0
LEGEND = 18.0  # height of a line of a legend
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"

# What is drawn with a colour of this table comes out as a variable: name -> (in light, in dark). Shapes and labels say
# the same again, since no eleven colours are told apart by everyone. Stages have the hue of the model that works.
COLOURS = {
    "ink": ("#1f2328", "#e6edf3"),
    "muted": ("#57606a", "#9da7b3"),
    "grid": ("#d0d7de", "#3d444d"),
    "page": ("#ffffff", "#0d1117"),
    "worse": ("#fbe9e4", "#3a1d16"),
    "loss": ("#b3261e", "#ff8a75"),
    "receiver": ("#57606a", "#a9b4c0"),
    "sharer": ("#b35900", "#f2a65a"),
    "matched": ("#0b5cad", "#6cb0ff"),
    "control": ("#8a3fa0", "#d59be6"),
    "text": ("#0f766e", "#4fd1c5"),
    "adapter": ("#8a7300", "#e3d34f"),
    "router": ("#8c5546", "#d8a999"),
    "abstain": ("#0e86b0", "#8fdcf7"),
    "other": ("#c2447e", "#f58ab8"),
    "sharer_prefill": ("#f0b678", "#8a4a0c"),
    "sharer_decode": ("#b35900", "#f2a65a"),
    "receiver_prefill": ("#b3bcc6", "#59636e"),
    "fuse": ("#0b5cad", "#6cb0ff"),
    "decode": ("#57606a", "#a9b4c0"),
}
# Stand-ins while matplotlib draws, which knows no variables.
PAINT = {name: f"#c2c0{position:02x}" for position, name in enumerate(COLOURS)}
_MARKERS = {
    "receiver": "o",
    "sharer": "s",
    "matched": "D",
    "deranged": "o",
    "zero": "s",
    "untrained": "^",
    "draft_deranged": "v",
    "text": "^",
    "text_published": "v",
    "adapter": "P",
    "router": "X",
    "abstain": "d",
}
_OTHER_MARKERS = "<>ph8*"


@dataclass(frozen=True)
class Plot:
    """One figure.

    Attributes:
        kind: ``scores``, ``tasks``, ``gains``, ``speed``, ``stages`` or ``abstention``.
        title: what it shows.
        caption: how to read it.
        svg: for a page that sets the colours.
        standalone: a file of its own, which sets them itself.
    """

    kind: str
    title: str
    caption: str
    svg: str
    standalone: str


@contextmanager
def drawing() -> Iterator[None]:
    """Draw in here: matplotlib's own settings and not the user's, so that the same results give the same file.

    Raises:
        C2CError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as missing:
        raise C2CError(
            f"plots need matplotlib: {install_command('report')}. Markdown without --plots does without it."
        ) from missing
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams["svg.fonttype"] = "none"
        matplotlib.rcParams["svg.hashsalt"] = "c2c"
        warnings.filterwarnings("ignore", message="Glyph")  # a browser has fonts for what the layout's font lacks
        yield


def new_axes(margins: tuple[float, float, float, float], height: float) -> tuple[Figure, Axes]:
    """Axes of a height in pixels, with margins left, right, top and bottom."""
    from matplotlib.figure import Figure

    left, right, top, bottom = margins
    total = height + top + bottom
    figure = Figure(figsize=(WIDTH / 72, total / 72), dpi=72)
    figure.patch.set_alpha(0)
    axes = figure.add_axes((left / WIDTH, bottom / total, (WIDTH - left - right) / WIDTH, height / total))
    axes.patch.set_alpha(0)
    axes.spines[["left", "right", "top"]].set_visible(False)
    axes.spines["bottom"].set_color(PAINT["grid"])
    axes.tick_params(axis="both", which="both", colors=PAINT["muted"], labelsize=TEXT - 0.5, length=0, pad=5)
    axes.grid(axis="x", color=PAINT["grid"], lw=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.label.set(color=PAINT["muted"], fontsize=TEXT)
    return figure, axes


def look(name: str, systems: Sequence[str]) -> tuple[str, str, bool]:
    """Colour and marker of a system, and whether the marker is hollow."""
    if name in CONTROLS:
        return "control", _MARKERS[name], True
    if name in _MARKERS:
        return ("text" if name == "text_published" else name), _MARKERS[name], False
    others = [other for other in systems if other not in _MARKERS]
    return "other", _OTHER_MARKERS[others.index(name) % len(_OTHER_MARKERS)], False


def legend_lines(labels: Sequence[str]) -> list[list[tuple[float, str]]]:
    """Labels of a legend in lines that fit, each with where its sign stands, in pixels from the left."""
    lines: list[list[tuple[float, str]]] = [[]]
    x = 10.0
    for label in labels:
        width = 16 + 6.7 * len(label)
        if lines[-1] and x + width > WIDTH:
            lines.append([])
            x = 10.0
        lines[-1].append((x, label))
        x += width + 14
    return lines


def legend(axes: Axes, signs: dict[str, dict[str, Any]], left: float, above: float) -> None:
    """Draw a legend over the axes.

    Args:
        axes: where.
        signs: how matplotlib draws the marker of each label.
        left: pixels from the figure's left to the axes.
        above: pixels from the axes to the middle of the lowest line.
    """
    lines = legend_lines(list(signs))
    for row, line in enumerate(lines):
        y = above + LEGEND * (len(lines) - 1 - row)
        for x, label in line:
            write_above(axes, label, x - left + 12, y, fontsize=TEXT - 0.5)
            sign: dict[str, Any] = {"ls": "", "clip_on": False, "zorder": 5} | signs[label]
            axes.plot([0], [1], transform=_offset(axes, x - left, y), **sign)


def heading_above(axes: Axes, text: str, left: float, above: float) -> None:
    """A heading over the axes, so many pixels from their upper left corner."""
    write_above(axes, text, -left, above, fontsize=HEADING, weight="bold")


def write_above(axes: Axes, text: str, x: float, y: float, **style: Any) -> None:
    """Text so many pixels from the upper left corner of the axes."""
    plain: dict[str, Any] = {"va": "center", "color": PAINT["ink"], "parse_math": False}
    axes.annotate(text, (0, 1), (x, y), xycoords="axes fraction", textcoords="offset points", **plain | style)


def _offset(axes: Axes, x: float, y: float) -> Any:
    """So many pixels from the upper left corner of the axes."""
    from matplotlib.transforms import ScaledTranslation

    return axes.transAxes + ScaledTranslation(x / 72, y / 72, axes.figure.dpi_scale_trans)


def short(text: str, length: int) -> str:
    """A text that fits."""
    return text if len(text) <= length else text[: length - 1] + "\u2026"


def finish(kind: str, title: str, caption: str, figure: Figure, slug: str) -> Plot:
    """A drawn figure as a plot."""
    size = WIDTH, round(figure.get_figheight() * 72)
    drawn = _drawn(figure, f"{slug}-{kind}")
    used = [name for name in COLOURS if name == "page" or f"--c2c-{name})" in drawn]
    light, dark = colour_rules(used)
    style = f"<style>svg {{ {light} }} @media (prefers-color-scheme: dark) {{ svg {{ {dark} }} }}</style>"
    page = '<rect x="-12" y="-12" width="100%" height="100%" rx="8" fill="var(--c2c-page)"/>'
    alone = f"{_opening(title, *size, margin=12)}{style}{page}{drawn}\n"
    return Plot(kind, title, caption, _opening(title, *size) + drawn, alone)


def colour_rules(names: Iterable[str] = tuple(COLOURS)) -> tuple[str, str]:
    """CSS declarations of the colours, in light and in dark."""
    light, dark = (" ".join(f"--c2c-{name}: {COLOURS[name][theme]};" for name in names) for theme in (0, 1))
    return light, dark


def _opening(title: str, width: int, height: int, margin: int = 0) -> str:
    box = f"{-margin} {-margin} {width + 2 * margin} {height + 2 * margin}"
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{width + 2 * margin}" height="{height + 2 * margin}" viewBox="{box}" role="img">'
        f"<title>{escape(title)}</title>"
    )


def _drawn(figure: Figure, name: str) -> str:
    """What is drawn and the closing tag, without a time or a version, its ids made unique on a page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index(">", svg.index("<svg")) + 1 :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    for role, paint in PAINT.items():
        svg = svg.replace(paint, f"var(--c2c-{role})")
    return re.sub(r"'DejaVu Sans'[^;\"]*", _FONT, svg)
