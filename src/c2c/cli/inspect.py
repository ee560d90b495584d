"""``c2c inspect``: what is in a fuser's folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from c2c.cli.output import err, human_bytes, out, print_json

if TYPE_CHECKING:
    from c2c.fusers import Fuser
    from c2c.plots.reading import Reading

_EPILOG = """Examples:

c2c inspect ./my-fuser

c2c inspect ./my-fuser --json | jq .gates

c2c inspect owner/fuser-on-the-hub

c2c inspect ./my-fuser --plot gates.png

c2c inspect ./my-fuser --plot pictures.html --prompt "Why is the sky blue?" --answer-prefix "The answer is"

Without --prompt there is a picture of the gates alone. With it both models are loaded and read the prompt: gate and
weight by layer and head, fusion strength over the prompt, token alignment, PCA of the three caches, effective rank."""


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command(name="inspect", epilog=_EPILOG)(inspect)


def inspect(
    fuser: Annotated[str, typer.Argument(help="Folder or hub id of a fuser, or a published checkpoint's folder.")],
    plot: Annotated[str | None, typer.Option(help="Draw pictures to this file: .png or .html.")] = None,
    prompt: Annotated[
        str | None, typer.Option(help="With --plot: draw what crosses while the pair reads this.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="With --prompt: system message for both models.")] = None,
    answer_prefix: Annotated[str, typer.Option(help="With --prompt: text that the answer continues.")] = "",
    receiver: Annotated[str | None, typer.Option(help="With --prompt: in place of the recorded receiver.")] = None,
    sharer: Annotated[str | None, typer.Option(help="With --prompt: in place of the recorded sharer.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Show a fuser: geometry, layer map, gates, size, and the models it was made for; and pictures of it."""
    if plot is None and prompt is not None:
        raise typer.BadParameter("--prompt is for pictures: add --plot OUT.png or --plot OUT.html.")
    target = _check_target(plot)
    loaded = _load(fuser)
    data = describe(loaded)
    if target is not None:
        reading = None
        if prompt is not None:
            messages = _messages(prompt, system)
            with err.status("reading the prompt ..."):
                reading = _read(fuser, loaded, messages, answer_prefix, receiver=receiver, sharer=sharer)
        data["plot"] = {"file": str(target), "pictures": _save(target, fuser, loaded, reading)}
    if json_:
        print_json(data)
        return
    out.print(_facts(data))
    out.print(_layers(data))
    if target is not None:
        out.print(f"{target}: {', '.join(data['plot']['pictures'])}")


def describe(fuser: Fuser) -> dict[str, Any]:
    """Everything about a fuser, as plain data."""
    config = fuser.config
    gates = fuser.gates().tolist()
    parameters = sum(p.numel() for p in fuser.parameters())
    return {
        "family": fuser.family,
        "parameters": parameters,
        "bytes": sum(p.nbytes for p in fuser.parameters()) + sum(b.nbytes for b in fuser.buffers()),
        "dtype": str(next(fuser.parameters()).dtype).removeprefix("torch."),
        "trained": fuser.trained,
        "receiver": {"kv": config.receiver_kv, "identity": config.receiver},
        "sharer": {"kv": config.sharer_kv, "identity": config.sharer},
        "alignment": config.alignment,
        "layer_map": config.layer_map,
        "gates": {
            str(layer): {"key": round(key, 4), "value": round(value, 4)}
            for layer, (key, value) in zip(config.fused_layers, gates, strict=True)
        },
        "c2c_version": config.c2c_version,
    }


def _load(source: str) -> Fuser:
    from c2c.fusers.base import load_fuser
    from c2c.published import import_published

    return import_published(Path(source).expanduser()) if _is_published(source) else load_fuser(source)


def _is_published(source: str) -> bool:
    folder = Path(source).expanduser()
    return folder.is_dir() and any(folder.glob("**/projector_*.pt"))


def _messages(prompt: str, system: str | None) -> list[dict[str, str]]:
    first = [{"role": "system", "content": system}] if system else []
    return [*first, {"role": "user", "content": prompt}]


def _check_target(plot: str | None) -> Path | None:
    if plot is None:
        return None
    from c2c.plots.album import check_target

    return check_target(plot)


def _read(
    source: str, fuser: Fuser, messages: list[dict[str, str]], answer_prefix: str, **models: str | None
) -> Reading:
    """The prompt as the fuser's pair reads it."""
    from c2c.model import C2CModel
    from c2c.plots.reading import check_fuser, read_prompt
    from c2c.prompting import RenderOptions

    check_fuser(fuser)  # before the models are loaded
    kwargs: dict[str, Any] = models
    published = _is_published(source)
    model = (C2CModel.from_published if published else C2CModel.from_pretrained)(source, **kwargs)
    return read_prompt(model, messages, RenderOptions(answer_prefix=answer_prefix))


def _save(target: Path, source: str, fuser: Fuser, reading: Reading | None) -> list[str]:
    from c2c.plots.album import save

    title = source if reading is None else f"{reading.receiver} <- {reading.sharer}"
    return save(target, title, fuser, reading)


def _facts(data: dict[str, Any]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_row("family", f"{data['family']} ({'trained' if data['trained'] else 'untrained'})")
    table.add_row("size", f"{data['parameters']:,} parameters, {human_bytes(data['bytes'])} as {data['dtype']}")
    for role in ("receiver", "sharer"):
        kv, identity = data[role]["kv"], data[role]["identity"]
        name = identity["name"] if identity else "not recorded"
        table.add_row(role, f"{name}: {kv['layers']} layers, {kv['kv_heads']} KV heads x {kv['head_dim']}")
        if identity:
            table.add_row(
                "",
                f"{identity['architecture']}, weights {identity['weights']}, tokenizer {identity['tokenizer']}",
            )
    table.add_row("alignment", str(data["alignment"]))
    return table


def _layers(data: dict[str, Any]) -> Table:
    table = Table("receiver layer", "reads sharer layer", "key gate", "value gate")
    for layer, source in enumerate(data["layer_map"]):
        gates = data["gates"].get(str(layer))
        if gates is None:
            table.add_row(str(layer), "not fused", "", "")
        else:
            table.add_row(str(layer), str(source), f"{gates['key']:.3f}", f"{gates['value']:.3f}")
    return table
