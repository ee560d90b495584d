"""The files of an analysis: ``NAME.json`` with the numbers and ``NAME.svg`` with the plot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from c2c.analysis.settings import AnalysisError
from c2c.reporting.canvas import Plot, drawing
from c2c.utils import install_command, write_json, write_text


def check_output(output_dir: str | None) -> None:
    """Make sure, before anything is computed, that files can be written and plots drawn; nothing without a folder.

    Raises:
        AnalysisError: matplotlib is not installed, or ``output_dir`` is a file.
    """
    if output_dir is None:
        return
    try:
        import matplotlib  # noqa: F401
    except ImportError as missing:
        raise AnalysisError(
            f"the plot of an analysis needs matplotlib: {install_command('report')}. Without --output-dir only "
            "the numbers are shown, and it is not needed."
        ) from missing
    if Path(output_dir).expanduser().is_file():
        raise AnalysisError(f"output_dir {output_dir} is a file; give a folder.")


def publish(name: str, numbers: dict[str, Any], draw: Callable[[], Plot], output_dir: str | None) -> dict[str, Any]:
    """Write numbers and plot, each whole or not at all; nothing without a folder.

    Args:
        name: of the analysis and its files.
        numbers: plain data.
        draw: makes the plot; called only where it is written.
        output_dir: folder, made where it is missing.

    Returns:
        ``numbers`` with ``analysis`` (its name) and, where files were written, ``files`` (their names) and ``caption``.

    Raises:
        AnalysisError: a file could not be written.
    """
    result = {"analysis": name} | numbers
    if output_dir is None:
        return result
    folder = Path(output_dir).expanduser()
    with drawing():
        plot = draw()
    result |= {"caption": plot.caption, "files": [f"{name}.json", f"{name}.svg"]}
    try:
        write_text(folder / f"{name}.svg", plot.standalone)
        write_json(folder / f"{name}.json", result)
    except OSError as error:
        raise AnalysisError(f"the result could not be written to {output_dir}: {error}.") from error
    return result
