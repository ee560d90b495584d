"""``c2c inspect``: what is in a fuser's folder; ``c2c convert``: write one from a published checkpoint or a fuser."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from c2c.analysis.config import AnalysisError
from c2c.cli.options import Json
from c2c.cli.output import err, human_bytes, out, print_result, print_table
from c2c.cli.run import make_messages
from c2c.errors import FuserError
from c2c.utils import check_writable

if TYPE_CHECKING:
    from c2c.fusers import Fuser
    from c2c.language_model import Receiver
    from c2c.sharer import Sharer


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
    of_prompt = {"--system": system, "--answer-prefix": answer_prefix, "--receiver": receiver, "--sharer": sharer}
    if prompt is None and (unused := [name for name, value in of_prompt.items() if value]):
        raise typer.BadParameter(f"{', '.join(unused)} are for --prompt: add it, or leave them out.")
    if plot is not None:
        from c2c.analysis.experiment import check_drawing

        plot = plot.expanduser()
        if plot.suffix.lower() not in (".png", ".html") or plot.is_dir():
            raise AnalysisError(f"--plot {plot}: expected a file that ends with .png or .html.")
        check_writable(plot.parent, "the folder of --plot", AnalysisError)
        check_drawing()
    published = _is_published(Path(fuser).expanduser())
    loaded = import_published(fuser) if published else load_fuser(fuser)
    data = describe(loaded)
    if plot is not None:
        from c2c.analysis.capture import capture_prompt, only_fuser
        from c2c.analysis.measures import layer_gates
        from c2c.analysis.plots import plot_gates, prompt_plots, save_plots
        from c2c.model import C2CModel
        from c2c.prompting import RenderOptions

        title, plots = fuser, [plot_gates(layer_gates(loaded))]
        if prompt is not None:
            only_fuser([loaded], fuser)  # before the models are loaded
            load: Any = C2CModel.from_published if published else C2CModel.from_pretrained
            with err.status("reading the prompt ..."):
                model = load(fuser, receiver=receiver, sharer=sharer)
                options = RenderOptions(answer_prefix=answer_prefix)
                capture = capture_prompt(model, make_messages(prompt, system), options)
                title, plots = " <- ".join(capture.names), prompt_plots(capture)
        save_plots(plot, title, plots)
        data["plot"] = {"file": str(plot), "pictures": [one.title for one in plots]}
    print_result(data, json_, _show)


def _is_published(folder: Path) -> bool:
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
        name = (identity or {}).get("name", "not recorded")
        facts.add_row(role, f"{name}: {kv['layers']} layers, {kv['kv_heads']} KV heads x {kv['head_dim']}")
        if identity:
            known = {part: identity.get(part) for part in ("architecture", "weights", "tokenizer")}
            facts.add_row("", "{architecture}, weights {weights}, tokenizer {tokenizer}".format(**known))
    facts.add_row("alignment", str(data["alignment"]))
    out.print(facts)
    rows: list[list[object]] = []
    for layer, source in enumerate(data["layer_map"]):
        gates = [f"{gate:.3f}" for gate in data["gates"].get(str(layer), {}).values()]
        rows.append([layer, source, *gates] if gates else [layer, "not fused", "", ""])
    print_table(("receiver layer", "reads sharer layer", "key gate", "value gate"), rows)
    if "plot" in data:
        out.print(f"{data['plot']['file']}: {', '.join(data['plot']['pictures'])}")


def convert(
    checkpoint: Annotated[Path, typer.Argument(help="Folder with projector_*.pt, or above it; or a fuser.")],
    output: Annotated[Path, typer.Argument(help="Folder to write the fuser to.")],
    receiver: Annotated[str | None, typer.Option(help="Load this receiver and record its identity.")] = None,
    sharer: Annotated[str | None, typer.Option(help="Load this sharer and record its identity.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Type of the weights; as stored if not given.")] = None,
    force: Annotated[bool, typer.Option(help="Write into a folder that already holds a fuser.")] = False,
    json_: Json = False,
) -> None:
    """Convert a published checkpoint to one safetensors file and a config, without running anything in it.

    A fuser of this package is written again with weights of another --dtype, say bfloat16 to publish it.
    """
    from c2c.fusers.base import load_fuser
    from c2c.language_model import Receiver
    from c2c.loading import parse_dtype
    from c2c.published import import_published
    from c2c.sharer import Sharer

    if (output / "config.json").exists() and not force:
        raise FuserError(f"{output} already holds a fuser; choose another folder or pass --force.")
    weights = parse_dtype(dtype)
    again = not _is_published(checkpoint) and (checkpoint / "config.json").is_file()
    if again and dtype is None:
        raise FuserError(
            f"{checkpoint} is no published checkpoint (expected projector_*.pt) but a fuser already. To write it with "
            "weights of another type pass --dtype, say bfloat16."
        )
    if not again:
        import_published(checkpoint)  # refuses what is none, before models are loaded
    with err.status("converting ..."):
        ours = Receiver.from_pretrained(receiver) if receiver else None
        theirs = Sharer.from_pretrained(sharer) if sharer else None
        fuser: Fuser
        if again:  # its statistics stay in float32
            fuser = load_fuser(checkpoint, dtype=weights)
        else:
            kv = [model.geometry if model else None for model in (ours, theirs)]
            fuser = import_published(checkpoint, receiver=kv[0], sharer=kv[1], dtype=weights)
        _check_geometries(fuser, ours, theirs)
        fuser.config.receiver = ours.identity.to_dict() if ours else fuser.config.receiver
        fuser.config.sharer = theirs.identity.to_dict() if theirs else fuser.config.sharer
        fuser.save_pretrained(output)
    print_result(describe(fuser) | {"output": str(output)}, json_, _show_converted)


def _check_geometries(fuser: Fuser, receiver: Receiver | None, sharer: Sharer | None) -> None:
    """Refuse models whose caches the fuser does not fit: their identities would be recorded."""
    for role, model, made_for in (
        ("sharer", sharer, fuser.config.sharer_kv),
        ("receiver", receiver, fuser.config.receiver_kv),
    ):
        if model is not None and model.geometry.to_dict() != made_for:
            raise FuserError(
                f"--{role} {model.name} has a cache of {model.geometry.to_dict()}, and the fuser was made for "
                f"{made_for}. Give the {role} that it was trained with."
            )


def _show_converted(data: dict[str, Any]) -> None:
    place = data["output"]
    out.print(f"{place}: {data['parameters']:,} parameters, {human_bytes(data['bytes'])}. Look: c2c inspect {place}")
    if not (data["receiver"]["identity"] and data["sharer"]["identity"]):
        out.print(
            "The checkpoint does not record which models it was trained with beyond their names; pass --receiver and "
            "--sharer to store their identities."
        )
