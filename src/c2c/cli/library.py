"""``c2c library``: documents that a model has read, kept on disk as handoffs."""

from __future__ import annotations

import hashlib
import re
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from c2c.cli.options import Json, from_config
from c2c.cli.output import err, human_bytes, out, print_json, print_result, print_table, progress_bars
from c2c.config import option
from c2c.errors import HandoffError, PromptError
from c2c.utils import argument_text, read_text

if TYPE_CHECKING:
    from c2c.handoff import Handoff
    from c2c.library import Library
    from c2c.sharer import Sharer

group = typer.Typer(
    name="library",
    help="Documents that a model has read, kept on disk as handoffs, to be asked about many times.",
    epilog="Start with: c2c library add FOLDER report.txt --model qwen2.5-coder-0.5b",
    no_args_is_help=True,
    rich_markup_mode="rich",
)
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_LIBRARY = typer.Argument(help="The library's folder.")


@dataclass(frozen=True)
class AddConfig:
    """Options of ``c2c library add``."""

    precision: Literal["float32", "bfloat16", "float16", "int8", "float8"] | None = option(
        None, "How keys and values are kept; the model's own by default."
    )
    system: str | None = option(None, "System message under which questions will be asked.")
    among: bool = option(
        False, "They will stand among others: read each behind another passage, which is not handed over."
    )
    family: Literal["copy", "memory"] = option(
        "copy", "Fuser family that will use them; for memory a document is read by itself."
    )
    name: str | None = option(None, "Name of the document, where one is given; by default the file's, without ending.")
    expires: str | None = option(None, "After how long they are refused, such as 90m, 12h or 7d; never by default.")
    dtype: str | None = option(None, "float32, bfloat16, float16 or auto.")
    device: str | None = option(None, "Device map: cpu, cuda, auto.")


@group.command(
    "add",
    epilog="Examples:\n\nc2c library add handoffs a.txt b.txt --model qwen2.5-coder-0.5b --precision int8\n\n"
    "c2c library add handoffs report.txt --model smollm2-135m --system 'Answer in one word.' --expires 7d",
)
@from_config(AddConfig)
def add(
    folder: Annotated[Path, typer.Argument(help="The library's folder; made for its owner alone.")],
    files: Annotated[list[Path], typer.Argument(help="Text files.", show_default=False)],
    *,
    model: Annotated[str, typer.Option(help="Alias, hub id, folder or GGUF of the sharer, which reads.")],
    json_: Json = False,
    **options: Any,
) -> None:
    """Let a model read text files, and keep what it read. A file that it has read already is not read again."""
    config = AddConfig(**options)
    if config.name is not None and len(files) > 1:
        raise typer.BadParameter("a name is for one file: leave it out, or add one at a time.", param_hint="--name")
    if config.system is not None and config.family == "memory":
        raise typer.BadParameter("for memory a document is read by itself: leave it out.", param_hint="--system")
    if config.among and config.family == "memory":
        raise typer.BadParameter("for memory a document is read by itself: leave it out.", param_hint="--among")
    expires = None if config.expires is None else time.time() + _seconds(config.expires)
    system = None if config.system is None else argument_text(config.system, "--system", PromptError)
    texts = {path: read_text(path, str(path), PromptError) for path in files}
    with err.status("loading model ..."):
        from c2c.library import Library
        from c2c.sharer import Sharer

        library = Library(folder)
        names = _names(library, files, config.name)
        sharer = Sharer.from_pretrained(model, dtype=config.dtype, device_map=config.device)
    precision: Any = config.precision or str(sharer.dtype).removeprefix("torch.")
    read = []
    with progress_bars() as report:
        for done, (name, path) in enumerate(names.items()):
            report("documents", done, len(names))
            about = _about(texts[path], config.family, system, config.among)
            handoff = _kept(library, name, sharer, precision, about)
            if handoff is None:
                read.append(name)
                before = None if config.family == "memory" else system or ""
                handoff = sharer.read(texts[path], before=before, among=config.among).to(precision)
            elif expires is None and library.entry(name).expires is None:
                continue  # as it is
            source = str(path.resolve())
            library.add(handoff, name, source=source, expires=expires, about=about, overwrite=True)
        report("documents", len(names), len(names))
    entries = [library.entry(name).to_dict() | {"read": name in read} for name in names]
    print_result({"folder": str(folder), "documents": entries}, json_, _show_added)


@group.command("list", epilog="Examples:\n\nc2c library list handoffs\n\nc2c library list handoffs --check")
def list_documents(
    folder: Annotated[Path, _LIBRARY],
    check: Annotated[bool, typer.Option("--check", help="Read the files whole; exit with 1 if one is broken.")] = False,
    json_: Json = False,
) -> None:
    """List the documents of a library; broken ones with what is wrong."""
    from c2c.library import Library

    if not folder.is_dir():
        raise HandoffError(f"no library at {folder}: expected a folder that c2c library add has made.")
    entries = [entry.to_dict() for entry in Library(folder).entries(check=check)]
    print_result({"folder": str(folder), "documents": entries}, json_, _show_entries)
    if check and any(entry["problem"] for entry in entries):
        raise typer.Exit(1)


@group.command("remove", epilog="Examples:\n\nc2c library remove handoffs report minutes")
def remove(
    folder: Annotated[Path, _LIBRARY],
    names: Annotated[list[str], typer.Argument(help="Of documents.", show_default=False)],
    json_: Json = False,
) -> None:
    """Delete documents of a library: all that are named, or none where one is not there."""
    from c2c.library import Library

    library, unique = Library(folder), list(dict.fromkeys(names))
    for name in unique:
        library.entry(name)
    for name in unique:
        library.remove(name)
    if json_:
        print_json({"folder": str(folder), "removed": unique})
    else:
        out.print(f"removed {', '.join(unique)}", markup=False, highlight=False)


def read_contexts(given: list[str], folder: Path | None) -> list[Any]:
    """Read what ``--context`` names: texts, and handoffs of files or of the library in ``folder``.

    Raises:
        PromptError: a file that is no text, or a name that is a file and a document of the library.
        HandoffError: a handoff that can't be used, or a library without any document that is named.
    """
    library: Any = None
    if folder is not None:
        from c2c.library import Library

        library = Library(folder)
        if not given:
            there = ", ".join(library.names()) or "none"
            raise PromptError(f"--library {folder}: name its documents with --context. It has {there}.")
    return [_read_context(argument_text(one, "--context", PromptError), library) for one in given]


def _read_context(given: str, library: Library | None) -> str | Handoff:
    path = Path(given)
    if library is not None and given in library:
        if path.is_file():
            raise PromptError(
                f"--context {given} is a document of {library.folder}, and a file here. Write ./{given} for the file, "
                "or run the command in another folder."
            )
        return library.get(given)
    if path.suffix == ".safetensors":
        from c2c.handoff import Handoff

        return Handoff.load(path)
    if library is not None and not path.exists() and "/" not in given:
        return library.get(given)  # which says what there is
    return read_text(path, f"--context {given}", PromptError)


def _seconds(text: str) -> float:
    """Convert a duration such as 7d to seconds."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text.strip())
    if found is None or float(found[1]) <= 0:
        raise typer.BadParameter(f"got {text!r}; expected such as 90m, 12h or 7d.", param_hint="--expires")
    return float(found[1]) * _UNITS[found[2]]


def _names(library: Library, files: list[Path], name: str | None) -> dict[str, Path]:
    """Return the files by their names.

    Raises:
        HandoffError: a name that two files would have, or that another file's document has.
    """
    there = {entry.name: entry for entry in library.entries() if not entry.expired}
    found: dict[str, Path] = {}
    for path in files:
        own = name or path.stem
        other = found.get(own)
        if other is None and own in there and there[own].source != str(path.resolve()):
            other = Path(there[own].source or there[own].path)
        if other is not None and other.resolve() != path.resolve():
            raise HandoffError(
                f"{path} would be {own!r} in the library, and so is {other}. Add it by itself with --name, or run "
                f"first: c2c library remove {library.folder} {own}"
            )
        found[own] = path
    return found


def _about(text: str, family: str, system: str | None, among: bool) -> dict[str, Any]:
    """Return what tells whether a document has been read so already, besides the model."""
    text = hashlib.sha256(text.encode()).hexdigest()
    return {"text": text, "family": family, "system": system, "among": among}


def _kept(library: Library, name: str, sharer: Sharer, precision: str, about: dict[str, Any]) -> Handoff | None:
    """Return the handoff of a document that this model has read so already; None where there is none, or a broken."""
    from c2c.identity import differences

    with suppress(HandoffError):
        entry = library.entry(name)
        same = entry.problem is None and entry.precision == precision and about.items() <= entry.about.items()
        if same and entry.sharer is not None and not any(differences("sharer", entry.sharer, sharer.identity)):
            return library.get(name)
    return None


def _show_added(data: dict[str, Any]) -> None:
    rows = (
        [one["name"], one["tokens"], human_bytes(one["nbytes"]), "read" if one["read"] else "as it was"]
        for one in data["documents"]
    )
    print_table(("document", "tokens", "size", ""), rows)


def _show_entries(data: dict[str, Any]) -> None:
    rows = (
        [one["name"], one["model"], one["precision"], one["tokens"], human_bytes(one["nbytes"]), _until(one["expires"])]
        for one in data["documents"]
        if not one["problem"]
    )
    print_table(("document", "model", "precision", "tokens", "size", "expires"), rows)
    for one in data["documents"]:
        if one["problem"]:
            out.print(f"{one['name']}: {one['problem']}", style="yellow", markup=False, highlight=False)


def _until(expires: float | None) -> str:
    return "never" if expires is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(expires))
