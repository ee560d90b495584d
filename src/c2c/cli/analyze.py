"""``c2c analyze``: what a fused cache is made of, and what of it matters. The options are the fields of the configs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from c2c.analysis.config import AnalysisConfig, CacheMapConfig, EnrichmentConfig, PrecisionConfig, ScalingConfig
from c2c.cli.options import Json, from_config
from c2c.cli.output import err, out, print_json, progress_bars

Result = Mapping[str, Any]

group = typer.Typer(
    name="analyze",
    help="What a fused cache is made of, and what of it matters: the measurements of the paper, for any fuser.",
    epilog="Start with: c2c analyze progressive --fuser zoo/NAME --data questions.jsonl --limit 100",
    no_args_is_help=True,
    rich_markup_mode="rich",
)


def register(app: typer.Typer) -> None:
    """Add the commands to the app."""
    app.add_typer(group, name="analyze")


def _command(
    name: str,
    config: type,
    measure: str,
    example: str = "--fuser zoo/NAME --data questions.jsonl --output-dir analysis",
) -> Callable[[Callable[[Result], None]], None]:
    """Make a command of the function that shows its result: the docstring is the help, the config has the options."""

    def decorate(show: Callable[[Result], None]) -> None:
        @group.command(name, help=show.__doc__, epilog=f"Examples:\n\nc2c analyze {name} {example}")
        @from_config(config)
        def command(*, json_: Json = False, **options: Any) -> None:
            _run(measure, config(**options), show, json_)

    return decorate


def _run(measure: str, config: Any, show: Callable[[Result], None], as_json: bool) -> None:
    module, _, function = measure.partition(".")
    run = getattr(import_module(f"c2c.analysis.{module}"), function)  # only here, because it imports torch
    with progress_bars() as report:
        result = run(config, report)
    if as_json:
        print_json(result)
    else:
        show(result)
        if result.get("dropped"):
            err.print(f"left out: {result['dropped']}")
    for name in result.get("files", ()):
        err.print(f"wrote {Path(config.output_dir) / name}", highlight=False)


@_command("effective-rank", AnalysisConfig, "measures.measure_effective_rank")
def _effective_rank(result: Result) -> None:
    """Effective rank of sharer, receiver and fused cache, layer by layer."""
    mean = {"layer": "mean"} | result["mean"]
    columns = [(kind, side) for kind in result["headline"] for side in mean[kind]]
    table = Table("layer", title=f"effective rank over {result['tokens']} positions, keys as they lie in the cache")
    for column in columns:
        table.add_column("\n".join(column), justify="right")
    for layer in (*result["layers"], mean):
        table.add_row(str(layer["layer"]), *(f"{layer[kind][side]:.1f}" for kind, side in columns))
    out.print(table)
    unrotated = ", ".join(f"{side} {value:.1f}" for side, value in mean["keys_unrotated"].items())
    out.print(f"keys without their rotary embedding, mean: {unrotated}")


@_command("cache-map", CacheMapConfig, "measures.measure_cache_map")
def _cache_map(result: Result) -> None:
    """Where receiver and fused entries lie, with the sharer's beside them, in two dimensions and in numbers."""
    parts = [(layer, kind) for layer in result["layers"] for kind in ("keys", "values")]
    table = Table("", title=f"entries at {result['tokens']} positions")
    for layer, kind in parts:
        table.add_column(f"layer {layer['layer']}\n{kind}", justify="right")
    for name in result["layers"][0]["keys"]:
        numbers = [layer[kind][name] for layer, kind in parts]
        table.add_row(name.replace("_", " "), *("-" if x is None else f"{x:.3f}" for x in numbers))
    out.print(table)


@_command("gates", AnalysisConfig, "measures.measure_gates")
def _gates(result: Result) -> None:
    """Gate openness by layer, and how much is added to each layer and head."""
    openness = "soft gates" if result["open"] is None else f"{result['open']:.1f} % of the gates are open"
    heads = range(len(result["layers"][0]["relative"]["keys"]))
    columns = [f"{letter} {head}" for letter in "KV" for head in heads]
    table = Table("layer", "key gate", "value gate", *columns, title=f"{openness}; norm added / own norm by head")
    for layer in result["layers"]:
        gates, norms = layer["gate"].values(), [x for kind in layer["relative"].values() for x in kind]
        table.add_row(str(layer["layer"]), *(f"{x:.3f}" for x in gates), *(f"{x:.2f}" for x in norms))
    out.print(table)


@_command("progressive", AnalysisConfig, "ablations.measure_progressive")
def _progressive(result: Result) -> None:
    """Accuracy when only the first, or the last, part of the positions is fused."""
    table = Table("fused", "former part", "latter part", title=f"accuracy in percent, n {result['n']}")
    for former, latter in zip(result["former"], result["latter"], strict=True):
        table.add_row(f"{former['fraction']:g}", _score(former), _score(latter))
    _print_with_gains(table, result)
    out.print(f"deranged {_score(result['deranged'])}, zero {_score(result['zero'])}")


@_command("precision", PrecisionConfig, "ablations.measure_precision")
def _precision(result: Result) -> None:
    """Accuracy and bytes when the sharer's entries are sent in fewer bits."""
    table = Table("precision", "kB a question", "accuracy", "cost", "differ", title=f"in percent, n {result['n']}")
    for one in result["precisions"]:
        size, differ = f"{one['bytes'] / 1e3:,.0f}", f"{one['differ']:.1f}"
        table.add_row(one["precision"], size, _score(one), _points(one["cost"]), differ)
    _print_with_gains(table, result)
    out.print(f"receiver alone {_score(result['receiver'])}, deranged {_score(result['deranged'])}")


@_command("layers", AnalysisConfig, "ablations.measure_layers")
def _layers(result: Result) -> None:
    """Accuracy with single layers, only keys, only values, or all but a third of the layers fused."""
    table = Table("fused", "accuracy", title=f"accuracy in percent, n {result['n']}")
    for name, score in result["systems"].items():
        table.add_row(name, _score(score))
    for one in result["single"]:
        table.add_row(f"layer {one['layer']} only", _score(one))
    _print_with_gains(table, result)


@_command(
    "enrichment",
    EnrichmentConfig,
    "enrichment.measure_enrichment",
    "--model smollm2-135m --data test.jsonl --shots-data train.jsonl --shots 5",
)
def _enrichment(result: Result) -> None:
    """The oracle without a fuser: does a cache that has read exemplars help, at the question's own length?"""
    title = f"accuracy in percent, n {result['n']}, {result['shots']} exemplars"
    table = Table("", "accuracy", "over direct", title=title)
    for name, score in result["systems"].items():
        gain = result.get(f"{name}_gain")
        table.add_row(name.replace("_", "-"), _score(score), "" if gain is None else _points(gain))
    out.print(table)


@group.command(epilog="Examples:\n\nc2c analyze scaling runs/eval_0.5b runs/eval_1.5b --parameters my-sharer=1.2e9")
def scaling(
    results: Annotated[
        list[str], typer.Argument(help="result.json files of c2c eval, or folders with them: one receiver, same items.")
    ],
    parameters: Annotated[
        list[str] | None, typer.Option(help="A sharer's size where it is not known: NAME=COUNT; may be repeated.")
    ] = None,
    output_dir: Annotated[str | None, typer.Option(help="Folder for the numbers (JSON) and the plot (SVG).")] = None,
    json_: Json = False,
) -> None:
    """Accuracy by the size of the sharer, from the results of several evaluations."""
    config = ScalingConfig(results=results, parameters=_counts(parameters or []), output_dir=output_dir)
    _run("scaling.measure_scaling", config, _scaling, json_)


def _counts(pairs: list[str]) -> dict[str, float]:
    counts = {}
    for pair in pairs:
        name, _, count = pair.rpartition("=")
        try:
            counts[name] = float(count)
        except ValueError:
            counts[name] = 0.0
        if not name or counts[name] < 1:
            raise typer.BadParameter(f"--parameters {pair}: expected NAME=COUNT, for instance my-sharer=1.5e9.")
    return counts


def _scaling(result: Result) -> None:
    systems = list(dict.fromkeys(name for row in result["rows"] for name in row["systems"]))
    table = Table("sharer", "size", *systems, "G", "P", title=f"receiver {result['receiver']}, n {result['n']}")
    for row in result["rows"]:
        scores = [_score(row["systems"][name], "\n") if name in row["systems"] else "" for name in systems]
        gains = [f"{row[letter]:+.1f}" if letter in row else "" for letter in ("G", "P")]
        table.add_row(row["sharer"], f"{row['parameters'] / 1e9:.3g}B\n({row['counted']})", *scores, *gains)
    out.print(table)


def _print_with_gains(table: Table, result: Result) -> None:
    out.print(table)
    out.print(f"G = matched - receiver {_points(result['G'])}; P = matched - deranged {_points(result['P'])}")


def _score(score: Result, separator: str = " ") -> str:
    low, high = score["ci95"]
    return f"{score['accuracy']:.1f}{separator}[{low:.1f}, {high:.1f}]"


def _points(gain: Result) -> str:
    low, high = gain["ci95"]
    return f"{gain['points']:+.1f} [{low:.1f}, {high:.1f}]"
