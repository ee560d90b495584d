"""``c2c inspect``: what is in a fuser's folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from c2c.analysis.config import AnalysisError
from c2c.cli.options import Json
from c2c.cli.output import err, human_bytes, out, print_json, print_table

if TYPE_CHECKING:
    from c2c.fusers import Fuser


def inspect(
    fuser: Annotated[str, typer.Argument(help="Folder or hub id of a fuser, or a published checkpoint's folder.")],
    plot: Annotated[Path | None, typer.Option(help="Draw plots to this file: .png or .html.")] = None,
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
    from c2c.fusers.base import load_fuser
    from c2c.published import import_published

    if plot is None and prompt is not None:
        raise typer.BadParameter("--prompt is for plots: add --plot OUT.png or --plot OUT.html.")
    if plot is not None:
        plot = _check_plot(plot)
    published = is_published(Path(fuser).expanduser())
    loaded = import_published(fuser) if published else load_fuser(fuser)
    data = describe(loaded)
    if plot is not None:
        from c2c.analysis.capture import capture_prompt, check_shared
        from c2c.analysis.plots import save_plots
        from c2c.analysis.prompt_plots import fuser_plots, prompt_plots
        from c2c.model import C2CModel
        from c2c.prompting import RenderOptions

        title, plots = fuser, fuser_plots(loaded)
        if prompt is not None:
            check_shared(loaded, fuser)  # before the models are loaded
            messages = [{"role": "system", "content": system}] if system else []
            messages.append({"role": "user", "content": prompt})
            load: Any = C2CModel.from_published if published else C2CModel.from_pretrained
            with err.status("reading the prompt ..."):
                model = load(fuser, receiver=receiver, sharer=sharer)
                capture = capture_prompt(model, messages, RenderOptions(answer_prefix=answer_prefix))
                title, plots = " <- ".join(capture.names), prompt_plots(capture)
        save_plots(plot, title, plots)
        data["plot"] = {"file": str(plot), "pictures": [one.title for one in plots]}
    if json_:
        print_json(data)
        return
    _show(data)
    if plot is not None:
        out.print(f"{plot}: {', '.join(data['plot']['pictures'])}")


def _check_plot(plot: Path) -> Path:
    """Refuse a file that plots can't be written to, before anything is loaded."""
    from c2c.analysis.results import check_drawing

    plot = plot.expanduser()
    if plot.suffix.lower() not in (".png", ".html") or plot.is_dir():
        raise AnalysisError(f"--plot {plot}: expected a file that ends with .png or .html.")
    check_drawing()
    return plot


def is_published(folder: Path) -> bool:
    """Return whether a published checkpoint lies in the folder or below it."""
    return any(folder.glob("**/projector_*.pt"))


def describe(fuser: Fuser) -> dict[str, Any]:
    """Return everything about a fuser, as plain data."""
    config = fuser.config
    gates = fuser.gates().tolist()
    return {
        "family": fuser.family,
        "parameters": sum(p.numel() for p in fuser.parameters()),
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


def _show(data: dict[str, Any]) -> None:
    facts = Table.grid(padding=(0, 2))
    facts.add_row("family", f"{data['family']} ({'trained' if data['trained'] else 'untrained'})")
    facts.add_row("size", f"{data['parameters']:,} parameters, {human_bytes(data['bytes'])} as {data['dtype']}")
    for role in ("receiver", "sharer"):
        kv, identity = data[role]["kv"], data[role]["identity"]
        name = identity["name"] if identity else "not recorded"
        facts.add_row(role, f"{name}: {kv['layers']} layers, {kv['kv_heads']} KV heads x {kv['head_dim']}")
        if identity:
            hashes = f"weights {identity['weights']}, tokenizer {identity['tokenizer']}"
            facts.add_row("", f"{identity['architecture']}, {hashes}")
    facts.add_row("alignment", str(data["alignment"]))
    out.print(facts)
    rows: list[list[object]] = []
    for layer, source in enumerate(data["layer_map"]):
        gates = [f"{gate:.3f}" for gate in data["gates"].get(str(layer), {}).values()]
        rows.append([layer, source, *gates] if gates else [layer, "not fused", "", ""])
    print_table(("receiver layer", "reads sharer layer", "key gate", "value gate"), rows)
