"""Rows of a file: JSON lines, or one JSON document with a list of rows or of SQuAD's articles; gzip is unpacked."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO, cast

from c2c.config import ConfigError

_EXPECTED = "Expected one JSON object on each line, or one list of objects."
_GZIP = b"\x1f\x8b"
# First bytes of files that hold no JSON, with what they are and the command that makes rows of them.
_FOREIGN = {
    b"PAR1": ("a Parquet file", "pandas.read_parquet"),
    b"PK\x03\x04": ("a zip archive or a spreadsheet", ""),
    b"BZh": ("packed with bzip2", ""),
    b"\xfd7zXZ": ("packed with xz", ""),
    b"\x28\xb5\x2f\xfd": ("packed with zstandard", ""),
    b"\xff\xfe": ("no text in UTF-8, but in UTF-16", "iconv"),
    b"\xfe\xff": ("no text in UTF-8, but in UTF-16", "iconv"),
}


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read the rows of a file, each with its place in it for errors, such as ``line 3``.

    Raises:
        ConfigError: missing, of another format, or with something that is no JSON object; names the place.
    """
    if not path.is_file():
        found = f"{path} is a folder, no data file" if path.is_dir() else f"no such data file: {path}"
        raise ConfigError(f"{found}. Set data_dir to the folder that the paths start from.")
    try:
        with _open(path) as file:
            for place, entry in _entries(file, path):
                for row in _questions(entry, f"{path}, {place}"):
                    if not isinstance(row, dict):
                        raise ConfigError(f"{path}, {place}: expected an object, got {type(row).__name__}.")
                    yield place, row
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is no text in UTF-8: {error}. {_EXPECTED} {_conversion(path, 'iconv')}") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ConfigError(f"{path} is a damaged gzip file: {error}. Get it again, or unpack what is whole.") from error


def _open(path: Path) -> TextIO:
    """Open a text file, packed or not, with or without a byte order mark."""
    with path.open("rb") as file:
        start = file.read(8)
    for magic, (kind, command) in _FOREIGN.items():
        if start.startswith(magic):
            raise ConfigError(f"{path} is {kind}. {_EXPECTED} {_conversion(path, command)}")
    if path.suffix.lower() in (".csv", ".tsv"):
        reader = "pandas.read_csv" if path.suffix.lower() == ".csv" else "pandas.read_table"
        raise ConfigError(f"{path} is a table. {_EXPECTED} {_conversion(path, reader)}")
    if b"\0" in start and not start.startswith(_GZIP):
        raise ConfigError(f"{path} is no text in UTF-8, perhaps UTF-16. {_EXPECTED} {_conversion(path, 'iconv')}")
    opened = gzip.open if start.startswith(_GZIP) else open
    return cast(TextIO, opened(path, "rt", encoding="utf-8-sig"))


def _conversion(path: Path, command: str) -> str:
    """Say how a file of another format becomes JSON lines."""
    if command.startswith("pandas"):
        code = (
            f"import pandas; {command}({str(path)!r}).to_json({path.stem + '.jsonl'!r}, orient='records', lines=True)"
        )
        return f"Convert it: python -c {json.dumps(code)}"
    iconv = f"Convert it: iconv -f UTF-16 -t UTF-8 '{path}' (or from LATIN1, or whatever it is)."
    return iconv if command == "iconv" else "Unpack it, and give what is in it."


def _entries(file: TextIO, path: Path) -> Iterator[tuple[str, Any]]:
    """Parse the lines of a file, or the items of the list in it where it is one JSON document."""
    lines = ((f"line {number}", line) for number, line in enumerate(file, 1) if line.strip())
    first, second = next(lines, None), next(lines, None)
    if first is None:
        return
    if not _is_document(first[1], alone=second is None):
        yield first[0], _parse(first[1], f"{path}, {first[0]}")
        for place, line in (second, *lines) if second else ():
            yield place, _parse(line, f"{path}, {place}")
        return
    file.seek(0)
    document = _parse(file.read(), str(path))
    if isinstance(document, dict):  # SQuAD has its articles under "data", TriviaQA its questions under "Data"
        found = (document.get(key) for key in ("data", "Data"))
        document = next((rows for rows in found if isinstance(rows, list)), [document])
    for number, item in enumerate(document, 1):
        yield f"item {number}", item


def _is_document(line: str, alone: bool) -> bool:
    """Return whether a first line opens a document: a list, or an object that ends in no or another line."""
    if line.lstrip().startswith("["):
        return True
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        return line.startswith("{") and not line[error.pos :].strip()
    except (ValueError, RecursionError):
        return False  # is an error where the line is read
    return alone and isinstance(value, dict) and any(isinstance(value.get(key), list) for key in ("data", "Data"))


def _parse(text: str, where: str) -> Any:
    """Parse JSON; what is no number in it becomes None.

    Raises:
        ConfigError: no JSON, or with half a surrogate pair, which no text has.
    """
    try:
        value = json.loads(text, parse_constant=lambda name: None)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{where}: {error.object[error.start]!r} is half a surrogate pair and no character. Write texts as UTF-8."
        ) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not JSON: {error}. {_EXPECTED}") from error
    return value


def _questions(entry: Any, where: str) -> list[Any]:
    """Return the questions of an article in SQuAD's layout, each with its paragraph; others as they are."""
    if not isinstance(entry, dict) or not isinstance(entry.get("paragraphs"), list):
        return [entry]
    try:
        return [{"context": part["context"]} | asked for part in entry["paragraphs"] for asked in part["qas"]]
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{where}: 'paragraphs' without 'context' and 'qas', as SQuAD has them.") from error
