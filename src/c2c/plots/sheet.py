"""Several pictures on one sheet, as a PNG file."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from c2c.plots.picture import Picture
from c2c.reporting.canvas import PAINT, WIDTH
from c2c.utils import save_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DPI = 144  # figures are laid out at 72
_GAP = 40  # pixels of the file
_COLUMN = 78  # letters of a caption on a line


def write_sheet(path: Path, title: str, pictures: Sequence[Picture]) -> None:
    """Pictures in two columns, each with its title above and its caption below."""
    blocks = [_block(picture) for picture in pictures]
    columns = _columns(blocks) if len(blocks) > 1 else [blocks]
    height = max(sum(len(block) for block in column) for column in columns)
    body = _beside([_padded(np.concatenate(column), height) for column in columns])
    head = _words([(title, 13.0, "bold", PAINT["ink"])], body.shape[1] * 72 / _DPI)
    sheet = np.concatenate([_widened(head, body.shape[1]), body])
    save_atomically(path.parent, lambda folder: _write(Path(folder) / path.name, sheet))


def _block(picture: Picture) -> Any:
    lines: list[tuple[str, float, str, str]] = [(picture.title, 12.0, "bold", PAINT["ink"])]
    above = _words(lines, WIDTH)
    captions = textwrap.wrap(picture.caption, _COLUMN)
    below = _words([(line, 9.5, "normal", PAINT["muted"]) for line in captions], WIDTH)
    return np.concatenate([above, _pixels(picture.figure), below])


def _words(lines: Sequence[tuple[str, float, str, str]], width: float) -> Any:
    """Lines of text on white, so many pixels (of 72 to the inch) wide."""
    from matplotlib.figure import Figure

    height = 8 + sum(1.5 * size for _, size, _, _ in lines)
    figure = Figure(figsize=(width / 72, height / 72), dpi=72)
    y = height - 4
    for text, size, weight, colour in lines:
        figure.text(6 / width, y / height, text, fontsize=size, weight=weight, color=colour, va="top", parse_math=False)
        y -= 1.5 * size
    return _pixels(figure)


def _pixels(figure: Figure) -> Any:
    from matplotlib.image import imread

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, facecolor="white")
    buffer.seek(0)
    return (imread(buffer)[:, :, :3] * 255).round().astype(np.uint8)


def _columns(blocks: Sequence[Any]) -> list[list[Any]]:
    """Two columns of about one height, in order."""
    total = sum(len(block) for block in blocks)
    heights = np.cumsum([len(block) for block in blocks])
    split = 1 + int(np.argmin([max(height, total - height) for height in heights[:-1]]))
    return [list(blocks[:split]), list(blocks[split:])]


def _beside(columns: Sequence[Any]) -> Any:
    gap = np.full((len(columns[0]), _GAP, 3), 255, np.uint8)
    parts = [part for column in columns for part in (gap, column)]
    return np.concatenate([*parts, gap], axis=1)


def _padded(block: Any, height: int) -> Any:
    return np.pad(block, ((0, height - len(block)), (0, 0), (0, 0)), constant_values=255)


def _widened(block: Any, width: int) -> Any:
    block = block[:, :width]
    return np.pad(block, ((_GAP // 2, 0), (0, width - block.shape[1]), (0, 0)), constant_values=255)


def _write(path: Path, sheet: Any) -> None:
    from matplotlib.image import imsave

    imsave(path, sheet)
