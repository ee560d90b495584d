"""All pictures of a fuser or of a prompt, and the files that they go to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

from c2c.analysis.settings import AnalysisError
from c2c.plots.gates import draw_gates
from c2c.plots.maps import draw_maps
from c2c.plots.picture import Picture
from c2c.plots.ranks import draw_ranks
from c2c.plots.reading import Reading
from c2c.plots.strength import draw_strength
from c2c.plots.tokens import draw_tokens
from c2c.reporting.canvas import COLOURS, PAINT, colour_rules, drawing, finish
from c2c.utils import install_command, write_text

if TYPE_CHECKING:
    from c2c.fusers import Fuser

SUFFIXES = (".png", ".html")
_drawing_at_a_time = Lock()  # matplotlib's settings and the canvas's colours are the process's

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
:root {{ {light} }}
@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}
body {{ margin: 0; padding: 20px; background: var(--c2c-page); color: var(--c2c-ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }}
main {{ max-width: 1120px; margin: 0 auto; columns: 2 400px; column-gap: 32px; }}
h1 {{ font-size: 1.4rem; column-span: all; margin: 0 0 16px; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.05rem; margin: 0 0 4px; }}
figure {{ margin: 0 0 28px; break-inside: avoid; }}
figure svg {{ display: block; width: 100%; height: auto; max-width: 510px; }}
figcaption {{ color: var(--c2c-muted); font-size: 0.875rem; }}
</style></head><body><main><h1>{title}</h1>
{figures}
</main></body></html>
"""


def check_target(path: str) -> Path:
    """Make sure, before anything is loaded, that pictures can be drawn and written there.

    Raises:
        AnalysisError: another suffix than .png or .html, a folder, or matplotlib is missing.
    """
    target = Path(path).expanduser()
    if target.suffix.lower() not in SUFFIXES:
        raise AnalysisError(f"--plot {path}: expected a file that ends with .png or .html.")
    if target.is_dir():
        raise AnalysisError(f"--plot {path} is a folder; give a file that ends with .png or .html.")
    check_matplotlib()
    return target


def check_matplotlib() -> None:
    """Make sure that pictures can be drawn.

    Raises:
        AnalysisError: matplotlib is missing.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as missing:
        raise AnalysisError(f"pictures need matplotlib: {install_command('report')}.") from missing


def figures_html(fuser: Fuser, reading: Reading | None) -> str:
    """All pictures as figures of a page that sets the canvas's colours."""
    with _drawing_at_a_time, drawing():
        return "\n".join(_figure(picture) for picture in _draw(fuser, reading))


def save(path: Path, title: str, fuser: Fuser, reading: Reading | None) -> list[str]:
    """Write all pictures to one file; returns their titles.

    Raises:
        AnalysisError: the file can't be written.
    """
    try:
        if path.suffix.lower() == ".html":
            return _save_html(path, title, fuser, reading)
        return _save_png(path, title, fuser, reading)
    except OSError as error:
        raise AnalysisError(f"the pictures could not be written to {path}: {error}.") from error


def _draw(fuser: Fuser, reading: Reading | None) -> list[Picture]:
    pictures = [draw_gates(fuser, reading)]
    if reading is not None:
        pictures += [draw(reading) for draw in (draw_strength, draw_tokens, draw_maps, draw_ranks)]
    return pictures


def _save_html(path: Path, title: str, fuser: Fuser, reading: Reading | None) -> list[str]:
    with _drawing_at_a_time, drawing():
        pictures = _draw(fuser, reading)
        figures = "\n".join(_figure(picture) for picture in pictures)
    light, dark = colour_rules()
    write_text(path, _PAGE.format(title=escape(title), light=light, dark=dark, figures=figures))
    return [picture.title for picture in pictures]


def _figure(picture: Picture) -> str:
    plot = finish(picture.name, picture.title, picture.caption, picture.figure, "c2c")
    return f"<figure><h2>{escape(plot.title)}</h2>{plot.svg}<figcaption>{escape(plot.caption)}</figcaption></figure>"


def _save_png(path: Path, title: str, fuser: Fuser, reading: Reading | None) -> list[str]:
    from c2c.plots.sheet import write_sheet

    with _drawing_at_a_time, drawing(), _in_light():
        pictures = _draw(fuser, reading)
        write_sheet(path, title, pictures)
    return [picture.title for picture in pictures]


@contextmanager
def _in_light() -> Iterator[None]:
    """The canvas's colours themselves, in place of the variables that stand for them in SVG."""
    variables = dict(PAINT)
    PAINT.update({name: light for name, (light, _) in COLOURS.items()})
    try:
        yield
    finally:
        PAINT.update(variables)
