"""Files that are complete or absent, JSON, provenance of results, optional packages."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from importlib import import_module, metadata
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

from packaging.requirements import Requirement

from c2c.errors import C2CError
from c2c.version import __version__

DISTRIBUTION = "cache2cache"
OnProgress = Callable[[str, int, int], None]  # what is being done, how much of it is done, and how much there is


def plugins(base: type, package: str, attribute: str) -> dict[str, Any]:
    """Return the subclasses of ``base`` by name, those of other packages (entry points) included.

    Args:
        base: the class.
        package: whose modules define subclasses, such as ``c2c.fusers``; also the group of the entry points.
        attribute: of a subclass, its name.
    """
    for module in iter_modules(import_module(package).__path__):
        import_module(f"{package}.{module.name}")
    waiting, found = [base], {}
    for kind in waiting:
        waiting += kind.__subclasses__()
        if attribute in vars(kind):
            found[getattr(kind, attribute)] = kind
    for entry in metadata.entry_points(group=package):
        if entry.name not in found:
            found[entry.name] = entry.load()
    return found


def save_atomically(folder: Path, write: Callable[[str], Any], *, private: bool = False) -> None:
    """Let ``write`` fill a temporary folder, then rename its files into ``folder``, ``config.json`` last.

    Args:
        folder: made if it is not there.
        write: gets the temporary folder's path.
        private: make the files (and a new ``folder``) readable by their owner alone; else the umask decides.

    Raises:
        OSError: what the system says, such as that the disk is full, with the folder; also where safetensors wraps it.
    """
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        if private:
            folder.chmod(0o700)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as temporary:
        try:
            write(temporary)
        except Exception as error:
            wrapped = re.search(r"\(os error (\d+)\)", str(error))  # safetensors has the number in its message only
            number = error.errno if isinstance(error, OSError) else wrapped and int(wrapped[1])
            if number is None or getattr(error, "filename", None) is not None:
                raise
            raise OSError(number, os.strerror(number), str(folder)) from error
        os.umask(mask := os.umask(0o077))  # it can be read only by setting it
        files = [path for path in Path(temporary).rglob("*") if path.is_file()]
        for path in sorted(files, key=lambda path: path.name == "config.json"):
            target = folder / path.relative_to(temporary)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.chmod(0o600 if private else 0o666 & ~mask)
            os.replace(path, target)


def check_writable(folder: str | Path, what: str, error: type[C2CError]) -> None:
    """Check that a folder can be written to, before the work whose result goes there. Makes nothing.

    Args:
        folder: where files are to go; it need not exist.
        what: the option or key that names it.
        error: what to raise.
    """
    full = Path(folder).absolute()
    there = next(path for path in (full, *full.parents) if path.exists())
    if not there.is_dir():
        raise error(f"{what} is {folder}, but {there} is a file; expected a folder, or the name of a new one.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise error(f"{what} is {folder}, but {there} is not writable: choose another folder, or change its rights.")


def read_json_object(path: Path, error: type[C2CError]) -> dict[str, Any]:
    """Read a JSON file that holds an object; raise ``error``, naming the file, for anything else."""
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError as missing:
        raise error(f"{path} is missing.") from missing
    except (json.JSONDecodeError, UnicodeDecodeError) as broken:
        raise error(f"{path} is not JSON: {broken}") from broken
    if not isinstance(data, dict):
        raise error(f"{path} holds a {type(data).__name__}, expected a JSON object.")
    return data


def read_text(path: Path, what: str, error: type[C2CError]) -> str:
    """Read a text file in UTF-8, with or without a byte order mark.

    Args:
        path: the file.
        what: names it in errors.
        error: raised where it can't be read, is no text in UTF-8, or holds nothing but white space.
    """
    try:
        data = path.read_bytes()
    except OSError as cause:
        raise error(f"{what} can't be read as text: {cause.strerror}. Expected a text file in UTF-8.") from cause
    return decode_text(data, what, error)


def decode_text(data: bytes, what: str, error: type[C2CError]) -> str:
    """Decode text in UTF-8, with or without a byte order mark; line ends become those of Python.

    Args:
        data: the bytes.
        what: names them in errors.
        error: raised where they are no text in UTF-8, or hold nothing but white space.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as cause:
        encoding = "It is UTF-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "It may be Latin-1"
        raise error(
            f"{what} can't be read as text: {cause}. Expected a text file in UTF-8. {encoding}: iconv converts it."
        ) from cause
    if "\0" in text:
        raise error(f"{what} holds NUL, and so is no text in UTF-8, perhaps UTF-16. Expected a text file in UTF-8.")
    if not text.strip():
        raise error(f"{what} is empty; expected some text to read.")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def argument_text(given: str, what: str, error: type[C2CError]) -> str:
    """Return a text of the command line, whatever encoding the locale claims for it.

    Bytes that the locale's encoding does not have are half surrogate pairs in ``sys.argv``; they are read as UTF-8.
    """
    if not re.search("[\ud800-\udfff]", given):
        return given
    try:
        return decode_text(os.fsencode(given), what, error)
    except UnicodeEncodeError as cause:
        raise error(f"{what} has half a surrogate pair, which is no character: {cause}.") from cause


def json_line(data: Any, encoding: str = "utf-8") -> str:
    """Return data as one line of JSON; characters are escaped where an encoding lacks some of them."""
    line = json.dumps(data, ensure_ascii=False)
    try:
        line.encode(encoding)
    except UnicodeEncodeError:
        return json.dumps(data)
    return line


RESULT_EXPECTED = (
    "Expected the result.json that `c2c eval --output-dir FOLDER` writes (not the items.jsonl beside it), or a folder "
    "that holds such files."
)


def find_results(paths: Iterable[Path], error: type[C2CError]) -> list[Path]:
    """Find the result files of evaluations among files and in folders, each once; raise ``error`` where none is."""
    found: dict[Path, Path] = {}
    for path in map(Path.expanduser, paths):
        if not path.exists():
            raise error(f"{path} does not exist. {RESULT_EXPECTED}")
        files = sorted(path.rglob("result.json")) if path.is_dir() else [path]
        if not files:
            raise error(f"the folder {path} holds no result.json, nor does a folder in it. {RESULT_EXPECTED}")
        found |= {file.resolve(): file for file in files}
    if not found:
        raise error(f"no results were given. {RESULT_EXPECTED}")
    return list(found.values())


def write_json(path: Path, data: Any) -> None:
    """Write JSON to a temporary file beside ``path`` and rename it."""
    write_text(path, json.dumps(data, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text to a temporary file beside ``path`` and rename it."""
    save_atomically(
        path.parent, lambda folder: (Path(folder) / path.name).write_text(text, encoding="utf-8", newline="\n")
    )


def file_hash(path: Path) -> str:
    """Hash a file with sha256, read piece by piece."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_size(folder: Path) -> int:
    """Return the bytes of all files below a folder, of which files and folders may vanish meanwhile."""
    size = 0
    for parent, _, names in os.walk(folder):  # which passes over a folder that is gone, as rglob does not
        for name in names:
            with suppress(FileNotFoundError):
                size += Path(parent, name).stat().st_size
    return size


def install_command(extra: str) -> str:
    """Return the command that installs an extra's packages, wherever this package came from.

    Args:
        extra: its name in ``pyproject.toml``, such as ``report``.
    """
    try:
        requirements = [Requirement(line) for line in metadata.requires(DISTRIBUTION) or []]
    except metadata.PackageNotFoundError:  # run from a folder of sources
        return f"pip install '.[{extra}]' in the clone"

    def packages(extra: str) -> Iterator[str]:
        for one in requirements:
            if one.marker is None or not one.marker.evaluate({"extra": extra}) or one.marker.evaluate({"extra": ""}):
                continue
            if one.name == DISTRIBUTION:  # other extras of this package: in their place what they add
                for other in sorted(one.extras):
                    yield from packages(other)
            else:
                yield str(one).partition(";")[0].strip()

    return " ".join(["pip install", *(f"'{one}'" for one in dict.fromkeys(packages(extra)))])


def command() -> str:
    """Return the command line of this process."""
    return shlex.join(["c2c", *sys.argv[1:]])


def versions(*more: str) -> dict[str, str]:
    """Return the versions of this library, of its main dependencies, and of further packages."""
    found = {"c2c": __version__, "python": platform.python_version()}
    for name in ("torch", "transformers", *more):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def without_folder(name: str) -> str:
    """Return the name of a model, without the folder that it lies in, which is nobody else's business."""
    path = os.path.expanduser(name)
    return Path(path).resolve().name if name and (os.path.isabs(path) or os.path.exists(path)) else name


def short_path(path: str) -> str:
    """Shorten a path to folder and name: enough to tell data apart, without where it lies on this machine."""
    return "/".join(Path(path).parts[-2:])
