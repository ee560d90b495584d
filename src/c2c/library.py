"""Library: a folder of handoffs by name, one safetensors file per document, readable by its owner alone.

The files are all there is: what a listing shows stands in their headers. Each is written beside its place and renamed,
so readers need no lock; writers hold one.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from shutil import rmtree
from typing import Any

from filelock import FileLock, Timeout

from c2c.errors import HandoffError, did_you_mean
from c2c.handoff import Handoff, read_manifest
from c2c.identity import ModelIdentity

SUFFIX = ".safetensors"
LOCK_SECONDS = 60.0  # that a writer waits for another one
_LOCK = ".lock"
_LONGEST_NAME = 200  # bytes; file systems take 255, with the ending and what temporary files add
_ABANDONED = 3600.0  # seconds after which a file that is half written has no writer any more


@dataclass(frozen=True)
class LibraryEntry:
    """One document of a library, as its header describes it.

    Attributes:
        name: by which it is found.
        path: its file.
        nbytes: of the file.
        problem: why it can't be used; None where nothing is wrong.
        sharer: who read it.
        precision: how its keys and values are kept.
        tokens: how many are handed over.
        source: file that the text came from.
        created: seconds since 1970.
        expires: seconds since 1970 from which it is refused; None for never.
        bound_to: what it may be used for.
        about: all facts that were given when it was added.
    """

    name: str
    path: Path
    nbytes: int
    problem: str | None = None
    sharer: ModelIdentity | None = None
    precision: str = ""
    tokens: int = 0
    source: str | None = None
    created: float = 0.0
    expires: float | None = None
    bound_to: str | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def expired(self) -> bool:
        """Whether its time is over."""
        return self.expires is not None and time.time() > self.expires

    def to_dict(self) -> dict[str, Any]:
        """Return what people and programs are shown."""
        shown = ("precision", "tokens", "nbytes", "source", "created", "expires", "problem")
        model = None if self.sharer is None else self.sharer.name
        return {"name": self.name, "model": model} | {name: getattr(self, name) for name in shown}


class Library:
    """Keep handoffs in a folder.

    Example:
        >>> library = Library("handoffs")
        >>> library.add(sharer.read(report, before=""), "report")
        >>> model.generate("Who signed the report?", sharer_messages=library.get("report"))

    Args:
        folder: made by the first :meth:`add`, with rights for its owner alone.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()

    def add(
        self,
        handoff: Handoff,
        name: str | None = None,
        *,
        source: str | None = None,
        expires: float | None = None,
        bound_to: str | None = None,
        about: Mapping[str, Any] | None = None,
        overwrite: bool = False,
    ) -> LibraryEntry:
        """Write a handoff.

        Args:
            handoff: what was read.
            name: by which it is found; by default its id.
            source: where the text came from, for listings.
            expires: seconds since 1970 after which it is refused, and deleted by the next change of the library.
            bound_to: what it may be used for; :meth:`get` must be given the same.
            about: further facts, JSON values.
            overwrite: write over one of the same name.

        Raises:
            HandoffError: a name that can't be a file's, or is taken; a folder that others may read.
        """
        name = handoff.id if name is None else name
        path, now = self._path(name), time.time()
        facts = {"name": name, "source": source, "tokens": len(handoff.kept), "created": now}
        with self._writing():
            self._prune()
            if path.is_dir() and not path.is_symlink():
                raise HandoffError(f"{path} is a folder; expected a file, or none. Choose another name, or remove it.")
            if os.path.lexists(path) and not overwrite:
                raise HandoffError(
                    f"the library {self.folder} has a document {name!r} already. Choose another name, remove it first, "
                    "or pass overwrite=True."
                )
            handoff.save(path, bound_to=bound_to, expires=expires, about={**(about or {}), **facts})
        return self.entry(name)

    def get(self, name: str, *, bound_to: str | None = None) -> Handoff:
        """Load a handoff. Whether it fits a model is checked where it is used.

        Args:
            name: of the document.
            bound_to: what it is to be used for.

        Raises:
            HandoffError: there is none of this name, or it is damaged, expired, made for something else, renamed, a
                link, or no handoff at all.
        """
        entry = self.entry(name)
        if entry.problem is not None:
            raise HandoffError(f"the document {name!r} of the library {self.folder} can't be used: {entry.problem}")
        return Handoff.load(entry.path, bound_to=bound_to)

    def entry(self, name: str) -> LibraryEntry:
        """Return a document's entry, which may have a problem.

        Raises:
            HandoffError: there is none of this name.
        """
        path = self._path(name)
        if not os.path.lexists(path):
            there = [one.name for one in self.entries()]
            known = f"It has {', '.join(there[:20])}." if there else "It is empty, or not there: c2c library add."
            raise HandoffError(f"no document {name!r} in the library {self.folder}.{did_you_mean(name, there)} {known}")
        return _read_entry(name, path)

    def __contains__(self, name: object) -> bool:
        """Whether there is a document of this name, broken or not."""
        return any(entry.name == name for entry in self.entries())

    def entries(self, *, check: bool = False) -> list[LibraryEntry]:
        """Return all documents by name, those with a problem too.

        Args:
            check: read the files whole, which finds damage behind the headers as well.
        """
        found = []
        for path in sorted(self.folder.glob(f"[!.]*{SUFFIX}")):
            entry = _read_entry(path.name.removesuffix(SUFFIX), path)
            if check and entry.problem is None:
                entry = _checked(entry)
            found.append(entry)
        return found

    def names(self) -> list[str]:
        """Return the names of the documents that can be used, as far as their headers show."""
        return [entry.name for entry in self.entries() if entry.problem is None]

    def remove(self, name: str) -> None:
        """Delete a document, broken or not; of a link the link alone.

        Raises:
            HandoffError: there is none of this name.
        """
        path = self.entry(name).path
        with self._writing():
            path.unlink(missing_ok=True)

    def prune(self) -> list[str]:
        """Delete what has expired, and what writers that died left half written; return the names."""
        if not self.folder.is_dir():
            return []
        with self._writing():
            return self._prune()

    def _prune(self) -> list[str]:
        for half in self.folder.glob(".writing-*"):
            with suppress(FileNotFoundError):  # its writer holds no lock, and has just finished
                if time.time() - half.stat().st_mtime > _ABANDONED:
                    rmtree(half, ignore_errors=True)
        expired = [entry for entry in self.entries() if entry.expired]
        for entry in expired:
            entry.path.unlink(missing_ok=True)
        return [entry.name for entry in expired]

    def _path(self, name: str) -> Path:
        """Return the file of a name.

        Raises:
            HandoffError: it can't be a file's.
        """
        fits = isinstance(name, str) and name == name.strip() and name.isprintable()
        if not fits or not name or name.startswith(".") or name.endswith(SUFFIX) or {"/", "\\"} & {*name}:
            raise HandoffError(
                f"{name!r} can't name a document: expected printable characters without slashes, no full stop or space "
                f"at the beginning, and no {SUFFIX} at the end."
            )
        if len(name.encode()) > _LONGEST_NAME:
            raise HandoffError(f"the name {name[:40]!r}... has more than {_LONGEST_NAME} bytes: choose a shorter one.")
        return self.folder / f"{name}{SUFFIX}"

    def make(self) -> Path:
        """Make the folder if it is not there, for its owner alone; return it.

        Raises:
            HandoffError: others may read it.
        """
        if not self.folder.is_dir():
            self.folder.mkdir(0o700, parents=True, exist_ok=True)
        mode = stat.S_IMODE(self.folder.stat().st_mode)
        if os.name == "posix" and mode & 0o077:
            raise HandoffError(
                f"the folder {self.folder} has the rights {mode:03o}, so that others may look into it; a library is "
                f"its owner's alone. Run: chmod 700 {self.folder}, or name a new folder, which is made so."
            )
        return self.folder

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Hold the lock of the folder.

        Raises:
            HandoffError: others may read the folder, or another writer holds the lock.
        """
        try:
            with FileLock(self.make() / _LOCK, LOCK_SECONDS, mode=0o600):
                yield
        except Timeout as error:
            raise HandoffError(
                f"the library {self.folder} is being written to by another process since {LOCK_SECONDS:g} s. Wait for "
                "it, or end it."
            ) from error


def _read_entry(name: str, path: Path) -> LibraryEntry:
    """Read a document's header."""
    if path.is_symlink():
        return LibraryEntry(name, path, 0, "it is a link; expected a file in this folder. Add the file it leads to.")
    try:
        manifest, size = read_manifest(path), path.stat().st_size
        facts, expires = manifest.get("about") or {}, manifest.get("expires")
        entry = LibraryEntry(
            name,
            path,
            size,
            sharer=ModelIdentity.from_dict(manifest["sharer"]),
            precision=str(manifest["precision"]),
            tokens=int(facts["tokens"]),
            source=facts.get("source"),
            created=float(facts["created"]),
            expires=None if expires is None else float(expires),
            bound_to=manifest.get("bound_to"),
            about=dict(facts),
        )
    except (HandoffError, OSError) as error:
        return LibraryEntry(name, path, 0, str(error))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        problem = f"its manifest is not a library's ({type(error).__name__} {error}). Add the document again."
        return LibraryEntry(name, path, 0, problem)
    if facts.get("name") != name:
        return replace(entry, problem=f"it was added as {facts.get('name')!r}, and renamed since. Rename it back.")
    if entry.expired:
        return replace(entry, problem="it has expired. Add the document again.")
    return entry


def _checked(entry: LibraryEntry) -> LibraryEntry:
    """Read a document whole, for its digest."""
    try:
        Handoff.load(entry.path, bound_to=entry.bound_to)
    except (HandoffError, OSError) as error:
        return replace(entry, problem=str(error))
    return entry
