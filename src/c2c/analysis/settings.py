"""What to look at: a fuser, items, and where things go."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from c2c.data.config import DataSource
from c2c.errors import C2CError


class AnalysisError(C2CError, ValueError):
    """An analysis that can't be made of what was given."""


@dataclass(frozen=True)
class Settings:
    """One analysis of one fuser.

    Attributes:
        fuser: folder or hub id.
        data: JSONL file of multiple-choice items: ``question``, ``choices``, ``answer``.
        limit: at most this many items, drawn with the seed; None for all.
        seed: of the draw and of the intervals.
        form: how questions are put: ``letter``, ``published`` or ``sentence``.
        batch_size: items at a time, at least 2: a control needs another item's cache.
        store_dir: a prefill store to use and fill; None computes every prefill.
        store_budget_gb: its size, half of it for each model.
        output_dir: where the numbers and the plot go; None keeps no files.
        receiver: in place of the recorded receiver.
        sharer: in place of the recorded sharer.
        dtype: type of the models' weights.
        device_map: where the models go.
    """

    fuser: str
    data: str
    limit: int | None = 200
    seed: int = 0
    form: str = "letter"
    batch_size: int = 8
    store_dir: str | None = None
    store_budget_gb: float = 20.0
    output_dir: str | None = None
    receiver: str | None = None
    sharer: str | None = None
    dtype: str | None = None
    device_map: str | None = None

    def __post_init__(self) -> None:
        """Refuse impossible numbers.

        Raises:
            AnalysisError: fewer than two items, in all or at a time.
        """
        check_limit(self.limit)
        if self.batch_size < 2:
            raise AnalysisError(f"batch_size is {self.batch_size}; give at least 2, one item for another's control.")


def check_limit(limit: int | None) -> None:
    """Refuse fewer than two items.

    Raises:
        AnalysisError: ``limit`` is below 2.
    """
    if limit is not None and limit < 2:
        raise AnalysisError(f"limit is {limit}; give at least 2 items, or none for all of them.")


def source(data: str, form: str, limit: int | None) -> DataSource:
    """A file of items as a source of rows, its path made absolute.

    Raises:
        AnalysisError: there is no such file.
    """
    path = Path(data).expanduser().absolute()
    if not path.is_file():
        raise AnalysisError(
            f'no such data file: {data}. Expected JSON lines with "question", "choices" and "answer" (the index of '
            "the right choice)."
        )
    return DataSource(str(path), form=form, limit=limit)
