"""Rows from JSONL files, data sets of the ``datasets`` library, or generators: read, filtered, drawn and mixed."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from c2c.config import ConfigError
from c2c.data.config import DataSource
from c2c.data.files import read_rows
from c2c.data.formats import FORMS, KINDS, NoAnswer, Row, normalise, references, vary_options
from c2c.data.synthetic import GENERATORS
from c2c.errors import did_you_mean
from c2c.utils import install_command

PASSAGE_KINDS = ("context_question", "private_question")
OPEN_KINDS = (*PASSAGE_KINDS, "question")


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
        ConfigError: a file is missing, a row lacks what its kind needs (named), a kind is unknown, or not exactly one
            of ``path``, ``dataset`` and ``synthetic`` is given.
    """
    dropped: Counter[str] = Counter()
    rows: list[Row] = []
    for source in sources:
        for what, name, known in (("kind of rows", source.kind, KINDS), ("form", source.form, FORMS)):
            if name not in known:
                raise ConfigError(f"unknown {what} {name!r}.{did_you_mean(name, known)} Known: {', '.join(known)}.")
        kept = []
        for place, data in _read(source, Path(data_dir), seed):
            if _question(data) in exclude:
                dropped["question is in an excluded file"] += 1
            elif source.kind in PASSAGE_KINDS and data.get("context") == "":
                dropped["context is empty"] += 1
            elif source.kind in OPEN_KINDS and _has_no_answer(data):
                dropped["question without an answer"] += 1
            else:
                kept.append((place, data))
        if source.skip and source.skip >= len(kept):
            raise ConfigError(f"{source.name}: skip is {source.skip}, but there are {len(kept)} rows to draw from.")
        random.Random(seed).shuffle(kept)
        kept = kept[source.skip :][: source.limit]
        converted = [_convert(data, place, source) for place, data in kept]
        if source.vary_options or source.options is not None:
            varied = vary_options([data for _, data in kept], source, seed)  # after all rows were checked above
            converted = [_convert(data, place, source) for (place, _), data in zip(kept, varied, strict=True)]
        rows += converted
    random.Random(seed + 1).shuffle(rows)
    return rows, dropped


def questions(files: Sequence[Path]) -> frozenset[str]:
    """Return the questions of these files, normalised, to be excluded from training."""
    return frozenset(_question(data) for file in files for _, data in read_rows(file))


def _read(source: DataSource, data_dir: Path, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read the rows of a source, each with its place for errors; columns are renamed, and filtered by ``keep``."""
    given = [source.path, source.dataset, source.synthetic]
    if sum(place is not None for place in given) != 1:
        raise ConfigError(
            f"give either 'path' or 'dataset' (or 'synthetic') for a source, got {', '.join(map(repr, given))}."
        )
    if source.path is not None:
        found = ((f"{source.name}, {place}", row) for place, row in read_rows(data_dir / source.path))
    elif source.synthetic is not None:
        found = ((source.name, row) for row in _generate(source, seed))
    else:
        found = ((source.name, row) for row in _read_dataset(source))
    columns, read, kept = set(source.columns.values()), 0, 0
    for place, row in found:
        columns -= set(row)
        try:
            data = normalise(row | {key: row[column] for key, column in source.columns.items() if column in row})
        except ConfigError as error:
            raise ConfigError(f"{place}: {error}") from error
        if all(data.get(column) == value for column, value in source.keep.items()):
            known = {} if data.get("id") is not None else {"id": f"{source.name}/{read}"}
            yield place, data | known
            kept += 1
        read += 1
    problems = {
        f"{source.name} is empty: it holds no rows": not read,
        f"{source.name}: no row has the columns {sorted(columns)} that 'columns' names": bool(columns),
        f"{source.name}: none of its {read} rows has the values that 'keep' names: {source.keep}": not kept,
    }
    for problem in (problem for problem, there in problems.items() if there):
        raise ConfigError(f"{problem}.")


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


def _has_no_answer(data: dict[str, Any]) -> bool:
    try:
        references(data)
    except NoAnswer:
        return True
    except ConfigError:  # told where the row is converted, with its place
        return False
    return False


def _convert(data: dict[str, Any], place: str, source: DataSource) -> Row:
    try:
        row = KINDS[source.kind](data, source)
    except ConfigError as error:
        raise ConfigError(f"{place}, row {data.get('id')!r} as {source.kind}: {error}") from error
    return replace(row, id=str(data["id"]), source=source.name)


def _question(data: dict[str, Any]) -> str:
    """Return the question or instruction, without differences in case and white space."""
    return " ".join(str(data.get("question") or data.get("instruction") or "").lower().split())
