"""Rows from JSONL files, data sets of the ``datasets`` library, or generators: read, filtered, drawn and mixed."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from c2c.config import ConfigError
from c2c.data.config import DataSource
from c2c.data.formats import FORMS, KINDS, Row, normalise, vary_options
from c2c.data.synthetic import GENERATORS
from c2c.errors import did_you_mean
from c2c.utils import install_command

_WITH_CONTEXT = ("context_question", "private_question")


@dataclass(frozen=True)
class RawRow:
    """A row as it was read, with our keys.

    Attributes:
        data: its keys and values.
        place: file and line, or data set, for errors.
    """

    data: dict[str, Any]
    place: str


def load_rows(
    sources: Sequence[DataSource], data_dir: str | Path, seed: int, exclude: frozenset[str] = frozenset()
) -> tuple[list[Row], Counter[str]]:
    """Read, filter, draw and mix rows.

    Args:
        sources: files or data sets.
        data_dir: folder that the paths of files start from.
        seed: of the draw and the order.
        exclude: normalised questions that must not be used, see :func:`questions`.

    Returns:
        The rows, and how many were dropped, by reason: data sets of passages have rows without one.

    Raises:
        ConfigError: a file is missing, a row lacks what its kind needs, or a kind is unknown; names the row.
    """
    dropped: Counter[str] = Counter()
    rows: list[Row] = []
    for source in sources:
        _check_names(source)
        kept = []
        for raw in read_rows(source, Path(data_dir), seed):
            reason = _reason_to_drop(raw.data, source, exclude)
            if reason:
                dropped[reason] += 1
            else:
                kept.append(raw)
        random.Random(seed).shuffle(kept)
        rows += _convert_all(kept[source.skip :][: source.limit], source, seed)
    random.Random(seed + 1).shuffle(rows)
    return rows, dropped


def questions(files: Sequence[Path]) -> frozenset[str]:
    """Return the questions of these files, normalised, to be excluded from training."""
    return frozenset(_question(data) for file in files for _, data in read_jsonl(file))


def read_rows(source: DataSource, data_dir: Path, seed: int = 0) -> Iterator[RawRow]:
    """Read the rows of a source, with columns renamed and filtered by ``keep``.

    Raises:
        ConfigError: not exactly one of ``path``, ``dataset`` and ``synthetic`` is given, or it can't be read.
    """
    given = [source.path, source.dataset, source.synthetic]
    if sum(place is not None for place in given) != 1:
        raise ConfigError(
            f"give either 'path' or 'dataset' (or 'synthetic') for a source, got {', '.join(map(repr, given))}."
        )
    if source.path is not None:
        found = ((f", line {line}", data) for line, data in read_jsonl(data_dir / source.path))
    elif source.synthetic is not None:
        found = (("", data) for data in _generate(source, seed))
    else:
        found = (("", normalise(data)) for data in _read_dataset(source))
    for index, (line, data) in enumerate(found):
        if all(data.get(column) == value for column, value in source.keep.items()):
            renamed = data | {key: data[column] for key, column in source.columns.items() if column in data}
            yield RawRow({"id": f"{source.name}/{index}"} | renamed, f"{source.name}{line}")


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read a JSONL file: line numbers, from 1, and rows.

    Raises:
        ConfigError: missing, or a line that is not a JSON object; names the line.
    """
    if not path.is_file():
        found = f"{path} is a folder, no data file" if path.is_dir() else f"no such data file: {path}"
        raise ConfigError(f"{found}. Set data_dir to the folder that the paths start from.")
    expected, number = "Expected one JSON object on each line.", 0
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    data = json.loads(line)
                    if not isinstance(data, dict):
                        raise ConfigError(f"{path}, line {number}: expected an object, got {type(data).__name__}.")
                    yield number, data
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}, line {number}: not JSON: {error}. {expected}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is no text in UTF-8: {error}. {expected}") from error


def _check_names(source: DataSource) -> None:
    """Refuse unknown kinds and forms."""
    for what, name, known in (("kind of rows", source.kind, KINDS), ("form", source.form, FORMS)):
        if name not in known:
            raise ConfigError(f"unknown {what} {name!r}.{did_you_mean(name, known)} Known: {', '.join(known)}.")


def _reason_to_drop(data: dict[str, Any], source: DataSource, exclude: frozenset[str]) -> str:
    if _question(data) in exclude:
        return "question is in an excluded file"
    if source.kind in _WITH_CONTEXT and data.get("context") == "":
        return "context is empty"
    return ""


def _generate(source: DataSource, seed: int) -> Iterator[dict[str, Any]]:
    name = str(source.synthetic)
    kind = name.removesuffix("_test")
    if kind not in GENERATORS or source.limit is None:
        names = ", ".join(f"{known}, {known}_test" for known in GENERATORS)
        raise ConfigError(
            f"synthetic is {name!r} with limit {source.limit}; expected one of {names}, and how many rows."
        )
    split = "train" if kind == name else "test"
    return islice(GENERATORS[kind](split, seed), source.skip + source.limit)


def _read_dataset(source: DataSource) -> Iterator[dict[str, Any]]:
    try:
        from datasets import get_dataset_config_names, load_dataset
    except ImportError as error:
        raise ConfigError(
            f"data set {source.dataset!r} needs the datasets library: {install_command('datasets')}."
        ) from error
    try:
        subsets = get_dataset_config_names(source.dataset) if source.subset == "*" else [source.subset]
        found = [load_dataset(source.dataset, subset, split=source.split) for subset in subsets]
    except Exception as error:  # the library raises what its loaders raise
        raise ConfigError(
            f"could not read data set {source.dataset!r} (subset {source.subset!r}, split {source.split!r}): {error}. "
            "Check name and connection, or give a JSONL file in its place."
        ) from error
    for subset, rows in zip(subsets, found, strict=True):
        for data in rows:
            yield dict(data) | ({"id": f"{subset}/{data['id']}"} if source.subset == "*" and "id" in data else {})


def _convert_all(raws: Sequence[RawRow], source: DataSource, seed: int) -> list[Row]:
    rows = [_convert(raw, source) for raw in raws]
    if not source.vary_options and source.options is None:
        return rows
    varied = vary_options([raw.data for raw in raws], source, seed)  # after all rows were checked above
    return [_convert(RawRow(data, raw.place), source) for data, raw in zip(varied, raws, strict=True)]


def _convert(raw: RawRow, source: DataSource) -> Row:
    try:
        row = KINDS[source.kind](raw.data, source)
    except ConfigError as error:
        raise ConfigError(f"{raw.place}, row {raw.data.get('id')!r} as {source.kind}: {error}") from error
    return replace(row, id=str(raw.data["id"]), source=source.name)


def _question(data: dict[str, Any]) -> str:
    """Return the question or instruction, without differences in case and white space."""
    text = str(data.get("question") or data.get("instruction") or "")
    return " ".join(text.lower().split())
