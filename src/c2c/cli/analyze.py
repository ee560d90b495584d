"""``c2c analyze``: what a fused cache is made of, and what of it matters. The options are the fields of the configs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from c2c.analysis.config import AnalysisConfig, CacheMapConfig, EnrichmentConfig, PrecisionConfig, ScalingConfig
from c2c.cli.options import Json, from_config, parse_pairs
from c2c.cli.output import err, out, print_result, print_table, progress_bars

Result = Mapping[str, Any]

group = typer.Typer(
    name="analyze",
    help="What a fused cache is made of, and what of it matters: the measurements of the paper, for any fuser.",
    epilog="Start with: c2c analyze progressive --fuser zoo/NAME --data questions.jsonl --limit 100",
    no_args_is_help=True,
    rich_markup_mode="rich",
)


def _command(
    name: str,
    module: str,
    config: type = AnalysisConfig,
    example: str = "--fuser zoo/NAME --data questions.jsonl --output-dir analysis",
) -> Callable[[Callable[[Result], None]], None]:
    """Make a command of the function that shows its result: the docstring is the help, the config has the options."""

    def decorate(show: Callable[[Result], None]) -> None:
        @group.command(name, help=show.__doc__, epilog=f"Examples:\n\nc2c analyze {name} {example}")
        @from_config(config)
        def command(*, json_: Json = False, **options: Any) -> None:
            _run(name, module, config(**options), show, json_)

    return decorate


def _run(name: str, module: str, config: Any, show: Callable[[Result], None], as_json: bool) -> None:
    measures = import_module(f"c2c.analysis.{module}")  # only here, because it imports torch
    with progress_bars() as report:
        result = getattr(measures, f"measure_{name.replace('-', '_')}")(config, report)
    print_result(result, as_json, show)
    if result.get("dropped") and not as_json:
        err.print(f"left out: {result['dropped']}")
    for file in result.get("files", ()):
        err.print(f"wrote {Path(config.output_dir) / file}", highlight=False)


@_command("effective-rank", "measures")
def _effective_rank(result: Result) -> None:
    """Effective rank of sharer, receiver and fused cache, layer by layer."""
    columns = [(kind, side) for kind in result["headline"] for side in result["mean"][kind]]
    layers = (*result["layers"], {"layer": "mean"} | result["mean"])
    rows = ([layer["layer"], *(f"{layer[kind][side]:.1f}" for kind, side in columns)] for layer in layers)
    title = f"effective rank over {result['tokens']} positions, keys as they lie in the cache"
    print_table(["layer", *map("\n".join, columns)], rows, title)
    unrotated = ", ".join(f"{side} {value:.1f}" for side, value in result["mean"]["keys_unrotated"].items())
    out.print(f"keys without their rotary embedding, mean: {unrotated}")


@_command("cache-map", "measures", CacheMapConfig)
def _cache_map(result: Result) -> None:
    """Where receiver and fused entries lie, with the sharer's beside them, in two dimensions and in numbers."""
    parts = {f"layer {one['layer']}\n{kind}": one[kind] for one in result["layers"] for kind in ("keys", "values")}
    rows = []
    for name in result["layers"][0]["keys"]:
        numbers = (part[name] for part in parts.values())
        rows.append([name.replace("_", " "), *("-" if x is None else f"{x:.3f}" for x in numbers)])
    print_table(["", *parts], rows, f"entries at {result['tokens']} positions")


@_command("gates", "measures")
def _gates(result: Result) -> None:
    """Gate openness by layer, and how much is added to each layer and head."""
    openness = "soft gates" if result["open"] is None else f"{result['open']:.1f} % of the gates are open"
    heads = [f"{letter} {head}" for letter in "KV" for head in range(len(result["layers"][0]["relative"]["keys"]))]
    rows = []
    for layer in result["layers"]:
        gates, norms = layer["gate"].values(), [x for kind in layer["relative"].values() for x in kind]
        rows.append([layer["layer"], *(f"{x:.3f}" for x in gates), *(f"{x:.2f}" for x in norms)])
    print_table(["layer", "key gate", "value gate", *heads], rows, f"{openness}; norm added / own norm by head")


@_command("progressive", "ablations")
def _progressive(result: Result) -> None:
    """Accuracy when only the first, or the last, part of the positions is fused."""
    pairs = zip(result["former"], result["latter"], strict=True)
    rows = ((f"{former['fraction']:g}", _score(former), _score(latter)) for former, latter in pairs)
    _print_accuracies(("fused", "former part", "latter part"), rows, result)
    out.print(f"deranged {_score(result['deranged'])}, zero {_score(result['zero'])}")


@_command("precision", "ablations", PrecisionConfig)
def _precision(result: Result) -> None:
    """Accuracy and bytes when the sharer's entries are sent in fewer bits."""
    rows = (
        (one["precision"], f"{one['bytes'] / 1e3:,.0f}", _score(one), _points(one["cost"]), f"{one['differ']:.1f}")
        for one in result["precisions"]
    )
    _print_accuracies(("precision", "kB a question", "accuracy", "cost", "differ"), rows, result)
    out.print(f"receiver alone {_score(result['receiver'])}, deranged {_score(result['deranged'])}")


@_command("layers", "ablations")
def _layers(result: Result) -> None:
    """Accuracy with single layers, only keys, only values, or all but a third of the layers fused."""
    scores = result["systems"] | {f"layer {one['layer']} only": one for one in result["single"]}
    _print_accuracies(("fused", "accuracy"), ((name, _score(score)) for name, score in scores.items()), result)


@_command(
    "enrichment",
    "enrichment",
    EnrichmentConfig,
    "--model smollm2-135m --data test.jsonl --shots-data train.jsonl --shots 5",
)
def _enrichment(result: Result) -> None:
    """The oracle without a fuser: does a cache that has read exemplars help, at the question's own length?"""
    rows = []
    for name, score in result["systems"].items():
        gain = result.get(f"{name}_gain")
        rows.append((name.replace("_", "-"), _score(score), "" if gain is None else _points(gain)))
    title = f"accuracy in percent, n {result['n']}, {result['shots']} exemplars"
    print_table(("", "accuracy", "over direct"), rows, title)


@group.command(epilog="Examples:\n\nc2c analyze scaling runs/eval_0.5b runs/eval_1.5b --parameters my-sharer=1.2e9")
@from_config(ScalingConfig)
def scaling(
    results: Annotated[
        list[str], typer.Argument(help="result.json files of c2c eval, or folders with them: one receiver, same items.")
    ],
    parameters: Annotated[
        list[str] | None, typer.Option(help="A sharer's size where it is not known: NAME=COUNT; may be repeated.")
    ] = None,
    *,
    json_: Json = False,
    **options: Any,
) -> None:
    """Accuracy by the size of the sharer, from the results of several evaluations."""

    def count(text: str) -> float:
        if float(text) < 1:
            raise ValueError
        return float(text)

    counts = parse_pairs(parameters, "--parameters", "my-sharer=1.5e9", count)
    _run("scaling", "scaling", ScalingConfig(results=results, parameters=counts, **options), _scaling, json_)


def _scaling(result: Result) -> None:
    systems = list(dict.fromkeys(name for row in result["rows"] for name in row["systems"]))
    rows = []
    for row in result["rows"]:
        scores = [_score(row["systems"][name], "\n") if name in row["systems"] else "" for name in systems]
        gains = [f"{row[letter]:+.1f}" if letter in row else "" for letter in ("G", "P")]
        rows.append([row["sharer"], f"{row['parameters'] / 1e9:.3g}B\n({row['counted']})", *scores, *gains])
    print_table(["sharer", "size", *systems, "G", "P"], rows, f"receiver {result['receiver']}, n {result['n']}")


def _print_accuracies(columns: Sequence[str], rows: Iterable[Sequence[str]], result: Result) -> None:
    print_table(columns, rows, f"accuracy in percent, n {result['n']}")
    out.print(f"G = matched - receiver {_points(result['G'])}; P = matched - deranged {_points(result['P'])}")


def _score(score: Result, separator: str = " ") -> str:
    low, high = score["ci95"]
    return f"{score['accuracy']:.1f}{separator}[{low:.1f}, {high:.1f}]"


def _points(gain: Result) -> str:
    low, high = gain["ci95"]
    return f"{gain['points']:+.1f} [{low:.1f}, {high:.1f}]"
