"""``c2c inspect``: what is in a fuser's folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from c2c.analysis.config import AnalysisError
from c2c.cli.options import Json
from c2c.cli.output import err, human_bytes, out, print_json

if TYPE_CHECKING:
    from c2c.analysis.plots import Plot
    from c2c.fusers import Fuser

_EPILOG = """Examples:

c2c inspect ./my-fuser

c2c inspect ./my-fuser --json | jq .gates

c2c inspect owner/fuser-on-the-hub

c2c inspect ./my-fuser --plot gates.png

c2c inspect ./my-fuser --plot plots.html --prompt "Why is the sky blue?" --answer-prefix "The answer is"

Without --prompt there is a plot of the gates alone. With it both models are loaded and read the prompt: gate and
weight by layer and head, fusion strength over the prompt, token alignment, PCA of the three caches, effective rank."""


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command(name="inspect", epilog=_EPILOG)(inspect)


def inspect(
    fuser: Annotated[str, typer.Argument(help="Folder or hub id of a fuser, or a published checkpoint's folder.")],
    plot: Annotated[str | None, typer.Option(help="Draw plots to this file: .png or .html.")] = None,
    prompt: Annotated[
        str | None, typer.Option(help="With --plot: draw what is fused while the pair reads this.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="With --prompt: system message for both models.")] = None,
    answer_prefix: Annotated[str, typer.Option(help="With --prompt: text that the answer continues.")] = "",
    receiver: Annotated[str | None, typer.Option(help="With --prompt: in place of the recorded receiver.")] = None,
    sharer: Annotated[str | None, typer.Option(help="With --prompt: in place of the recorded sharer.")] = None,
    json_: Json = False,
) -> None:
    """Show a fuser: geometry, layer map, gates, size, and the models it was made for; and plots of it."""
    if plot is None and prompt is not None:
        raise typer.BadParameter("--prompt is for plots: add --plot OUT.png or --plot OUT.html.")
    target = None if plot is None else _check_target(plot)
    loaded = _load(fuser)
    data = describe(loaded)
    if target is not None:
        from c2c.analysis.plots import save_plots
        from c2c.analysis.prompt_plots import fuser_plots

        title, plots = fuser, fuser_plots(loaded)
        if prompt is not None:
            from c2c.analysis.capture import check_shared

            check_shared(loaded, fuser)  # before the models are loaded
            with err.status("reading the prompt ..."):
                title, plots = _plot_prompt(fuser, _messages(prompt, system), answer_prefix, receiver, sharer)
        save_plots(target, title, plots)
        data["plot"] = {"file": str(target), "pictures": [one.title for one in plots]}
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


def _check_target(plot: str) -> Path:
    """Refuse a file that plots can't be written to, before anything is loaded."""
    from c2c.analysis.results import check_drawing

    target = Path(plot).expanduser()
    if target.suffix.lower() not in (".png", ".html") or target.is_dir():
        raise AnalysisError(f"--plot {plot}: expected a file that ends with .png or .html.")
    check_drawing()
    return target


def _plot_prompt(
    source: str, messages: list[dict[str, str]], answer_prefix: str, receiver: str | None, sharer: str | None
) -> tuple[str, list[Plot]]:
    """Return the title and the plots of a prompt as the fuser's pair reads it."""
    from c2c.analysis.capture import capture_prompt
    from c2c.analysis.prompt_plots import prompt_plots
    from c2c.model import C2CModel
    from c2c.prompting import RenderOptions

    load: Any = C2CModel.from_published if _is_published(source) else C2CModel.from_pretrained
    model = load(source, receiver=receiver, sharer=sharer)
    capture = capture_prompt(model, messages, RenderOptions(answer_prefix=answer_prefix))
    return " <- ".join(capture.names), prompt_plots(capture)


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
