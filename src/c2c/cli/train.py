"""``c2c train`` and ``c2c prefill``: from a configuration to a trained fuser, or to its control."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from c2c.cli.output import log_to_stderr, out, print_json, progress_bars

_TRAIN_EPILOG = """Examples:

c2c train configs/multiple_choice.yaml

c2c train config.yaml --data-dir ~/data --output-dir runs/a --seed 1

c2c train config.yaml --max-steps 20 --json

c2c train config.yaml --start-from zoo/NAME --output-dir runs/mine    # a fuser that exists, on rows of your own

c2c train config.yaml --family adapter --output-dir runs/adapter     # the receiver alone, same rows and size

A run that was stopped goes on from its last checkpoint; --no-resume starts afresh."""

_PREFILL_EPILOG = """Examples:

c2c prefill configs/multiple_choice.yaml

Stop it at any time; the next call goes on where it was."""


def register(app: typer.Typer) -> None:
    """Add the commands to the app."""
    app.command(name="train", epilog=_TRAIN_EPILOG)(train)
    app.command(name="prefill", epilog=_PREFILL_EPILOG)(prefill)


ConfigPath = Annotated[Path, typer.Argument(help="YAML file; see configs/.")]
ReceiverName = Annotated[str | None, typer.Option(help="Overrides receiver.")]
SharerName = Annotated[str | None, typer.Option(help="Overrides sharer.")]
DataDir = Annotated[str | None, typer.Option(help="Overrides data_dir.")]
StoreDir = Annotated[str | None, typer.Option(help="Overrides store_dir.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]


def train(
    config: ConfigPath,
    receiver: ReceiverName = None,
    sharer: SharerName = None,
    data_dir: DataDir = None,
    output_dir: Annotated[str | None, typer.Option(help="Overrides output_dir.")] = None,
    store_dir: StoreDir = None,
    family: Annotated[
        str | None, typer.Option(help="Overrides family; 'adapter' trains the receiver alone, as a control.")
    ] = None,
    adapter_learning_rate: Annotated[float | None, typer.Option(help="Overrides adapter_learning_rate.")] = None,
    seed: Annotated[int | None, typer.Option(help="Overrides seed.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Overrides max_steps.")] = None,
    soft_targets: Annotated[float | None, typer.Option(help="Overrides soft_targets.")] = None,
    start_from: Annotated[str | None, typer.Option(help="A trained fuser to train on; overrides start_from.")] = None,
    guard_weight: Annotated[float | None, typer.Option(help="Overrides guard_weight.")] = None,
    precision: Annotated[str | None, typer.Option(help="Overrides precision: float32 or bfloat16.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint in output_dir.")] = True,
    json_: Json = False,
) -> None:
    """Train a fuser between two frozen models, or the control of one."""
    from c2c.fusers import family as family_of
    from c2c.training import load_config
    from c2c.training import train as run_training

    loaded = load_config(
        config,
        receiver=receiver,
        sharer=sharer,
        data_dir=data_dir,
        output_dir=output_dir,
        store_dir=store_dir,
        family=family,
        adapter_learning_rate=adapter_learning_rate,
        seed=seed,
        max_steps=max_steps,
        soft_targets=soft_targets,
        start_from=start_from,
        guard_weight=guard_weight,
        precision=precision,
    )
    log_to_stderr("c2c.training")
    with progress_bars() as report:
        summary = run_training(loaded, resume=resume, progress=report)
    if not summary:  # another process reports
        return
    if json_:
        print_json(summary)
    elif "adapter" in summary:
        _show_adapter(summary)
    else:
        _show(summary, private=family_of(loaded.family).context == "private")


def prefill(
    config: ConfigPath,
    receiver: ReceiverName = None,
    sharer: SharerName = None,
    data_dir: DataDir = None,
    store_dir: StoreDir = None,
    json_: Json = False,
) -> None:
    """Fill the prefill store of a configuration ahead of training."""
    from c2c.errors import C2CError
    from c2c.training import load_config
    from c2c.training.config import ADAPTER
    from c2c.training.run import fill, prepare

    loaded = load_config(config, receiver=receiver, sharer=sharer, data_dir=data_dir, store_dir=store_dir)
    if loaded.store_dir is None:
        raise C2CError("this config keeps its prefills in memory: set store_dir, or pass --store-dir FOLDER.")
    if loaded.family == ADAPTER:
        raise C2CError("an adapter changes the receiver's layers, so no prefill can be stored ahead: run c2c train.")
    prepared = prepare(loaded)
    with progress_bars() as report:
        fill(prepared, report)
    stores = {"receiver": prepared.objective.receiver_store, "sharer": prepared.objective.sharer_store}
    data: dict[str, Any] = {
        "prompts": len(prepared.train) + len(prepared.dev),
        "computed": {name: store.computed for name, store in stores.items()},
        "bytes": sum(store.used for store in stores.values()),
    }
    if json_:
        print_json(data)
    else:
        out.print(f"{data['prompts']} prompts in {loaded.store_dir}, {data['bytes'] / 1e9:.2f} GB")


def _show_adapter(summary: dict[str, Any]) -> None:
    dev, matched = summary["dev"], summary["matched"]
    table = Table("", "dev accuracy")
    for name in ("receiver", "adapter"):
        table.add_row(name, f"{dev[name]:.1f} %")
    table.add_row("adapter - receiver", f"{dev['G']:+.1f}")
    out.print(table)
    out.print(f"{summary['adapter']}, chosen at step {summary['step']} on {dev['n']} dev examples")
    out.print(
        f"rank {summary['rank']}: {summary['parameters']:,} parameters; "
        f"the {matched['family']} fuser has {matched['parameters']:,}"
    )


def _show(summary: dict[str, Any], private: bool) -> None:
    dev = summary["dev"]
    table = Table("", "dev F1" if private else "dev accuracy")
    for name in ("receiver", "matched", "deranged"):
        table.add_row(name, f"{dev[name]:.1f} %")
    table.add_row("G = matched - receiver", f"{dev['G']:+.1f}")
    table.add_row("P = matched - deranged", f"{dev['P']:+.1f}")
    out.print(table)
    chosen = f"step {summary['step']}" if "step" in summary else f"blend {summary['blend']:.1f}"
    out.print(f"{summary['fuser']}, chosen at {chosen} on {dev['n']} dev examples")
    context = " --context page.txt" if private else ""  # what only the sharer reads
    out.print(f"Try it: c2c run --fuser {summary['fuser']}{context} 'your prompt'")
