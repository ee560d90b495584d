"""``c2c train`` and ``c2c prefill``: from a configuration to a trained fuser, or to its control."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from c2c.cli.options import Json, from_config
from c2c.cli.output import err, human_bytes, log_to_stderr, out, print_result, print_table, progress_bars
from c2c.config import ConfigError
from c2c.training.config import ADAPTER, TrainConfig, load_config

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
    from c2c.fusers import family
    from c2c.training import train as run_training

    loaded = load_config(config, **options)
    log_to_stderr("c2c.training")
    with progress_bars() as report:
        summary = run_training(loaded, resume=resume, progress=report)
    if summary:  # else another process reports
        private = loaded.family != ADAPTER and family(loaded.family).context == "private"
        print_result(summary, json_, partial(_show, private=private))
        _report_dropped(summary)


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
        "dropped": dict(prepared.dropped),
    }
    size = f"{data['prompts']} prompts in {loaded.store_dir}, {human_bytes(data['bytes'])}"
    print_result(data, json_, lambda _: out.print(size))
    _report_dropped(data)


def _report_dropped(data: dict[str, Any]) -> None:
    if data["dropped"]:
        err.print(f"rows that were left out: {data['dropped']}", markup=False, soft_wrap=True)


def _show(summary: dict[str, Any], private: bool) -> None:
    dev, adapter = summary["dev"], summary.get("adapter")
    rows = [(name, f"{dev[name]:.1f} %") for name in ("receiver", "adapter", "matched", "deranged") if name in dev]
    gains = {"G": "adapter - receiver"} if adapter else {"G": "matched - receiver", "P": "matched - deranged"}
    rows += [(f"{gain} = {meaning}", f"{dev[gain]:+.1f}") for gain, meaning in gains.items()]
    print_table(("", "dev F1" if private else "dev accuracy"), rows)
    chosen = f"step {summary['step']}" if "step" in summary else f"blend {summary['blend']:.1f}"
    out.print(f"{adapter or summary['fuser']}, chosen at {chosen} on {dev['n']} dev examples")
    if adapter:
        matched = summary["matched"]
        out.print(
            f"rank {summary['rank']}: {summary['parameters']:,} parameters; "
            f"the {matched['family']} fuser has {matched['parameters']:,}"
        )
    else:
        context = " --context page.txt" if private else ""  # what only the sharer reads
        out.print(f"Try it: c2c run --fuser {summary['fuser']}{context} 'your prompt'")
