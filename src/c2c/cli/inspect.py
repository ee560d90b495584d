"""``c2c inspect``: what is in a fuser's folder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from c2c.cli.output import human_bytes, out, print_json

if TYPE_CHECKING:
    from c2c.fusers import Fuser

_EPILOG = """Examples:

c2c inspect ./my-fuser

c2c inspect ./my-fuser --json | jq .gates

c2c inspect owner/fuser-on-the-hub"""


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command(name="inspect", epilog=_EPILOG)(inspect)


def inspect(
    fuser: Annotated[str, typer.Argument(help="Folder or hub id of a fuser, or a published checkpoint's folder.")],
    json_: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Show a fuser: geometry, layer map, gates, size, and the models it was made for."""
    data = describe(_load(fuser))
    if json_:
        print_json(data)
        return
    out.print(_facts(data))
    out.print(_layers(data))


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
    from pathlib import Path

    from c2c.fusers.base import load_fuser
    from c2c.published import import_published

    folder = Path(source).expanduser()
    published = folder.is_dir() and any(folder.glob("**/projector_*.pt"))
    return import_published(folder) if published else load_fuser(source)


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
