"""Where rows come from: the configuration of one data source."""

# ruff: noqa: RUF009 - option() returns a dataclass field
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from c2c.config import ConfigError, check_values, option

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class DataSource:
    """Rows to train, select or evaluate on: a file, a data set of the ``datasets`` library, or synthetic ones.

    Raises:
        ConfigError: values of other types, or impossible ones.
    """

    path: str | None = option(None, "JSONL file, relative to data_dir; or give dataset.")
    kind: str = option(
        "multiple_choice",
        "Kind of rows: multiple_choice, context_question, private_question, question, instruction or chat.",
    )
    form: str = option("letter", "Prompt form of multiple choice: letter, published or sentence.")
    limit: int | None = option(None, "At most this many rows, drawn with data_seed.", min=1)
    skip: int = option(0, "Skip this many drawn rows, so that two sources of one file do not overlap.", min=0)
    vary_options: float = option(
        0.0, "Share of questions that get 2 to 8 options in a new order, some from other questions.", min=0, max=1
    )
    options: int | list[int] | None = option(
        None, "Give every question this many options; [low, high] draws the number."
    )
    dataset: str | None = option(None, "Id for the datasets library, in place of path.")
    synthetic: str | None = option(
        None,
        "Synthetic rows in place of path, of kind private_question: relay, facts, skeleton or halves; "
        "with _test those that never occur in training. Needs limit.",
    )
    subset: str | None = option(None, "Configuration of the data set; '*' for all.")
    split: str = option("train", "Split of the data set.")
    columns: dict[str, str] = option({}, "Our keys to the columns that hold them, such as {output: response}.")
    keep: dict[str, Any] = option({}, "Keep only rows with these values, such as {error_type: ok}.")
    draft: int = option(
        0,
        "Of kind private_question: the sharer reads the question too, drafts at most this many tokens of "
        "an answer, and hands over their entries as well.",
    )

    def __post_init__(self) -> None:
        check_values(self)
        if self.draft < 0 or (self.draft and self.kind != "private_question"):
            raise ConfigError(
                f"draft is {self.draft} for rows of kind {self.kind!r}; expected a number of tokens, 0 for none, of "
                "kind 'private_question'."
            )
        if self.kind != "multiple_choice" and (self.vary_options or self.options is not None):
            raise ConfigError(f"options and vary_options are for rows of kind 'multiple_choice', not {self.kind!r}.")
        low, high = self.option_range or (2, 2)
        if not 2 <= low <= high <= len(LETTERS):
            raise ConfigError(
                f"options is {self.options!r}; expected a number from 2 to {len(LETTERS)}, or [lowest, highest]."
            )

    @property
    def option_range(self) -> tuple[int, int] | None:
        """Fewest and most options of a question; None leaves each question its own."""
        if self.options is None:
            return None
        bounds = [self.options] if isinstance(self.options, int) else self.options
        return (bounds[0], bounds[-1]) if 1 <= len(bounds) <= 2 else (0, 0)

    @property
    def name(self) -> str:
        """The file, data set or kind of synthetic rows."""
        return str(self.path or self.dataset or self.synthetic)
