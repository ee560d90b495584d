"""``c2c train`` and ``c2c prefill``: from a configuration to a trained fuser, or to its control."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from c2c.cli.options import Json, from_config
from c2c.cli.output import human_bytes, log_to_stderr, out, print_json, progress_bars
from c2c.config import ConfigError
from c2c.training.config import ADAPTER, TrainConfig, load_config

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


ConfigPath = Annotated[Path, typer.Argument(help="YAML file; see configs/. Options override it.")]


@from_config(TrainConfig, override=True, skip=["layer_map"])
def train(
    config: ConfigPath,
    *,
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint in output_dir.")] = True,
    json_: Json = False,
    **options: Any,
) -> None:
    """Train a fuser between two frozen models, or the control of one."""
    from c2c.training import train as run_training

    loaded = load_config(config, **options)
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
        from c2c.fusers import family

        _show_fuser(summary, private=family(loaded.family).context == "private")


@from_config(TrainConfig, override=True, only=["receiver", "sharer", "data_dir", "store_dir", "store_budget_gb"])
def prefill(config: ConfigPath, *, json_: Json = False, **options: Any) -> None:
    """Fill the prefill store of a configuration ahead of training."""
    from c2c.training.run import fill, prepare

    loaded = load_config(config, **options)
    if loaded.store_dir is None:
        raise ConfigError("this config keeps its prefills in memory: set store_dir, or pass --store-dir FOLDER.")
    if loaded.family == ADAPTER:
        raise ConfigError("an adapter changes the receiver's layers, so no prefill can be stored ahead: run c2c train.")
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
        out.print(f"{data['prompts']} prompts in {loaded.store_dir}, {human_bytes(data['bytes'])}")


def _show_adapter(summary: dict[str, Any]) -> None:
    dev, matched = summary["dev"], summary["matched"]
    _print_scores(
        "dev accuracy", {name: dev[name] for name in ("receiver", "adapter")}, {"adapter - receiver": dev["G"]}
    )
    out.print(f"{summary['adapter']}, chosen at step {summary['step']} on {dev['n']} dev examples")
    out.print(
        f"rank {summary['rank']}: {summary['parameters']:,} parameters; "
        f"the {matched['family']} fuser has {matched['parameters']:,}"
    )


def _show_fuser(summary: dict[str, Any], private: bool) -> None:
    dev = summary["dev"]
    _print_scores(
        "dev F1" if private else "dev accuracy",
        {name: dev[name] for name in ("receiver", "matched", "deranged")},
        {"G = matched - receiver": dev["G"], "P = matched - deranged": dev["P"]},
    )
    chosen = f"step {summary['step']}" if "step" in summary else f"blend {summary['blend']:.1f}"
    out.print(f"{summary['fuser']}, chosen at {chosen} on {dev['n']} dev examples")
    context = " --context page.txt" if private else ""  # what only the sharer reads
    out.print(f"Try it: c2c run --fuser {summary['fuser']}{context} 'your prompt'")


def _print_scores(title: str, scores: dict[str, float], gains: dict[str, float]) -> None:
    table = Table("", title)
    for name, value in scores.items():
        table.add_row(name, f"{value:.1f} %")
    for name, value in gains.items():
        table.add_row(name, f"{value:+.1f}")
    out.print(table)
