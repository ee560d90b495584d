"""``c2c analyze``: what a fused cache is made of, and what of it matters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from c2c.cli.output import err, out, print_json, progress_bars

if TYPE_CHECKING:
    from c2c.analysis import Settings

_DATA = """
DATA are JSON lines with "question", "choices" and "answer" (the index of the right choice). With --output-dir the
numbers go to COMMAND.json and a plot to COMMAND.svg there."""

Fuser = Annotated[str, typer.Option(help="Folder or hub id of the fuser.")]
Data = Annotated[str, typer.Option(help="JSONL file of multiple-choice questions.")]
Limit = Annotated[int, typer.Option(min=2, help="At most this many questions, drawn with the seed.")]
Seed = Annotated[int, typer.Option(help="Of the draw and of the intervals.")]
Form = Annotated[str, typer.Option(help="How questions are put: letter, published or sentence.")]
BatchSize = Annotated[int, typer.Option(min=2, help="Questions at a time.")]
StoreDir = Annotated[str | None, typer.Option(help="A prefill store to use and fill.")]
StoreBudget = Annotated[float, typer.Option(min=0, help="Its size.")]
OutputDir = Annotated[str | None, typer.Option(help="Where numbers and plot go.")]
ReceiverName = Annotated[str | None, typer.Option(help="In place of the recorded receiver.")]
SharerName = Annotated[str | None, typer.Option(help="In place of the recorded sharer.")]
Dtype = Annotated[str | None, typer.Option(help="Type of the models' weights.")]
DeviceMap = Annotated[str | None, typer.Option(help="Where the models go.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]

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


def _examples(*commands: str) -> str:
    lines = [f"c2c analyze {command}" for command in commands]
    return "\n\n".join(["Examples:", *lines]) + "\n" + _DATA


@group.command(
    "effective-rank",
    epilog=_examples(
        "effective-rank --fuser zoo/NAME --data questions.jsonl --limit 100 --output-dir analysis",
        "effective-rank --fuser zoo/NAME --data questions.jsonl --json | jq .mean",
    ),
)
def effective_rank(
    fuser: Fuser,
    data: Data,
    limit: Limit = 200,
    seed: Seed = 0,
    form: Form = "letter",
    batch_size: BatchSize = 8,
    store_dir: StoreDir = None,
    store_budget_gb: StoreBudget = 20.0,
    output_dir: OutputDir = None,
    receiver: ReceiverName = None,
    sharer: SharerName = None,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    json_: Json = False,
) -> None:
    """Effective rank of sharer, receiver and fused cache, layer by layer."""
    from c2c.analysis import measure_ranks

    _run(measure_ranks, _show_ranks, _settings(locals()), json_)


@group.command(
    "cache-map",
    epilog=_examples(
        "cache-map --fuser zoo/NAME --data questions.jsonl --limit 100 --output-dir analysis",
        "cache-map --fuser zoo/NAME --data questions.jsonl --layers 14,29 --method tsne --output-dir analysis",
    ),
)
def cache_map(
    fuser: Fuser,
    data: Data,
    layers: Annotated[
        str | None, typer.Option(help="Receiver layers, with commas; else the middle and the last fused one.")
    ] = None,
    method: Annotated[str, typer.Option(help="pca, or tsne (needs scikit-learn).")] = "pca",
    points: Annotated[int, typer.Option(min=3, help="At most this many positions in the picture.")] = 400,
    limit: Limit = 200,
    seed: Seed = 0,
    form: Form = "letter",
    batch_size: BatchSize = 8,
    store_dir: StoreDir = None,
    store_budget_gb: StoreBudget = 20.0,
    output_dir: OutputDir = None,
    receiver: ReceiverName = None,
    sharer: SharerName = None,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    json_: Json = False,
) -> None:
    """Where receiver and fused entries lie, with the sharer's beside them, in two dimensions and in numbers."""
    from c2c.analysis import draw_cache_map

    chosen = _numbers(layers)
    settings = _settings(locals())
    _run(
        lambda settings, report: draw_cache_map(
            settings,
            report,
            layers=chosen,
            method=method,  # type: ignore[arg-type]
            points=points,
        ),
        _show_map,
        settings,
        json_,
    )


@group.command(
    "gates",
    epilog=_examples(
        "gates --fuser zoo/NAME --data questions.jsonl --limit 100 --output-dir analysis",
        "gates --fuser zoo/NAME --data questions.jsonl --json | jq .mean_relative",
    ),
)
def gates(
    fuser: Fuser,
    data: Data,
    limit: Limit = 200,
    seed: Seed = 0,
    form: Form = "letter",
    batch_size: BatchSize = 8,
    store_dir: StoreDir = None,
    store_budget_gb: StoreBudget = 20.0,
    output_dir: OutputDir = None,
    receiver: ReceiverName = None,
    sharer: SharerName = None,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    json_: Json = False,
) -> None:
    """Gate openness by layer, and how much is added to each layer and head."""
    from c2c.analysis import measure_gates

    _run(measure_gates, _show_gates, _settings(locals()), json_)


@group.command(
    "progressive",
    epilog=_examples(
        "progressive --fuser zoo/NAME --data questions.jsonl --limit 300 --output-dir analysis",
        "progressive --fuser zoo/NAME --data questions.jsonl --store-dir runs/store --json | jq .latter",
    ),
)
def progressive(
    fuser: Fuser,
    data: Data,
    limit: Limit = 200,
    seed: Seed = 0,
    form: Form = "letter",
    batch_size: BatchSize = 8,
    store_dir: StoreDir = None,
    store_budget_gb: StoreBudget = 20.0,
    output_dir: OutputDir = None,
    receiver: ReceiverName = None,
    sharer: SharerName = None,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    json_: Json = False,
) -> None:
    """Accuracy when only the first, or the last, part of the positions is fused."""
    from c2c.analysis import measure_progressive

    _run(measure_progressive, _show_progressive, _settings(locals()), json_)


@group.command(
    "precision",
    epilog=_examples(
        "precision --fuser zoo/NAME --data questions.jsonl --limit 300 --output-dir analysis",
        "precision --fuser zoo/NAME --data questions.jsonl --unrounded --json | jq .precisions",
    ),
)
def precision(
    fuser: Fuser,
    data: Data,
    unrounded: Annotated[
        bool, typer.Option("--unrounded", help="Entries in the sharer's own type too; it reads every prompt again.")
    ] = False,
    limit: Limit = 200,
    seed: Seed = 0,
    form: Form = "letter",
    batch_size: BatchSize = 8,
    store_dir: StoreDir = None,
    store_budget_gb: StoreBudget = 20.0,
    output_dir: OutputDir = None,
    receiver: ReceiverName = None,
    sharer: SharerName = None,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    json_: Json = False,
) -> None:
    """Accuracy and bytes when the sharer's entries cross in fewer bits."""
    from c2c.analysis import measure_precision

    settings = _settings(locals())
    _run(
        lambda settings, report: measure_precision(settings, report, unrounded=unrounded),
        _show_precision,
        settings,
        json_,
    )


@group.command(
    "layers",
    epilog=_examples(
        "layers --fuser zoo/NAME --data questions.jsonl --limit 300 --output-dir analysis",
        "layers --fuser zoo/NAME --data questions.jsonl --store-dir runs/store --json | jq .single",
    ),
)
def layers(
    fuser: Fuser,
    data: Data,
    limit: Limit = 200,
    seed: Seed = 0,
    form: Form = "letter",
    batch_size: BatchSize = 8,
    store_dir: StoreDir = None,
    store_budget_gb: StoreBudget = 20.0,
    output_dir: OutputDir = None,
    receiver: ReceiverName = None,
    sharer: SharerName = None,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    json_: Json = False,
) -> None:
    """Accuracy with single layers, only keys, only values, or all but a third of the layers fused."""
    from c2c.analysis import measure_layers

    _run(measure_layers, _show_layers, _settings(locals()), json_)


@group.command(
    "enrichment",
    epilog=_examples(
        "enrichment --model smollm2-135m --data test.jsonl --shots-data train.jsonl --shots 5 --limit 200",
        "enrichment --model FOLDER --data test.jsonl --shots-data dev.jsonl --output-dir analysis --json",
    ),
)
def enrichment(
    model: Annotated[str, typer.Option(help="Alias, hub id, folder or GGUF file of one model.")],
    data: Data,
    shots_data: Annotated[str, typer.Option(help="JSONL file of the exemplars, such as the train split.")],
    shots: Annotated[int, typer.Option(min=0, help="Exemplars, the same for all questions.")] = 5,
    limit: Limit = 200,
    seed: Seed = 0,
    form: Form = "letter",
    output_dir: OutputDir = None,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    json_: Json = False,
) -> None:
    """The oracle without a fuser: does a cache that has read exemplars help, at the question's own length?"""
    from c2c.analysis import EnrichmentSettings, measure_enrichment

    settings = EnrichmentSettings(
        **{name: value for name, value in locals().items() if name in _fields(EnrichmentSettings)}
    )
    _run(measure_enrichment, _show_enrichment, settings, json_)


@group.command(
    "scaling",
    epilog="Examples:\n\nc2c analyze scaling runs/eval_0.5b runs/eval_1.5b --output-dir analysis\n\n"
    "c2c analyze scaling runs/eval --parameters my-sharer=1.2e9 --json\n\n"
    "RESULTS are result.json files of c2c eval --output-dir, or folders with such files: one receiver, the same "
    "questions, other sharers.",
)
def scaling(
    results: Annotated[list[str], typer.Argument(help="Result files, or folders that hold result.json files.")],
    parameters: Annotated[
        list[str] | None, typer.Option(help="A sharer's size where it is not known: NAME=COUNT; may be repeated.")
    ] = None,
    output_dir: OutputDir = None,
    json_: Json = False,
) -> None:
    """Accuracy by the size of the sharer, from the results of several evaluations."""
    from c2c.analysis import measure_scaling

    _finish(measure_scaling(results, _counts(parameters), output_dir), _show_scaling, output_dir, json_)


def _fields(kind: type) -> set[str]:
    import dataclasses

    return {field.name for field in dataclasses.fields(kind)}


def _settings(given: dict[str, Any]) -> Settings:
    """Settings from a command's arguments of the same names."""
    from c2c.analysis import Settings

    return Settings(**{name: value for name, value in given.items() if name in _fields(Settings)})


def _run(
    measure: Callable[[Any, Callable[[str, int, int], None]], dict[str, Any]],
    show: Callable[[dict[str, Any]], None],
    settings: Any,
    as_json: bool,
) -> None:
    with progress_bars() as report:
        result = measure(settings, report)
    _finish(result, show, settings.output_dir, as_json)


def _finish(
    result: dict[str, Any], show: Callable[[dict[str, Any]], None], output_dir: str | None, as_json: bool
) -> None:
    if as_json:
        print_json(result)
    else:
        show(result)
        if result.get("dropped"):
            err.print(f"left out: {result['dropped']}")
    for name in result.get("files", ()):
        err.print(f"wrote {Path(output_dir or '') / name}", highlight=False)


def _numbers(text: str | None) -> list[int] | None:
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() for part in parts):
        raise typer.BadParameter(f"--layers {text}: expected layer numbers with commas, for instance 14,29.")
    return [int(part) for part in parts]


def _counts(pairs: list[str] | None) -> dict[str, float]:
    counts: dict[str, float] = {}
    for pair in pairs or ():
        name, _, count = pair.rpartition("=")
        try:
            counts[name] = float(count)
        except ValueError:
            counts[name] = 0.0
        if not name or counts[name] < 1:
            raise typer.BadParameter(f"--parameters {pair}: expected NAME=COUNT, for instance my-sharer=1.5e9.")
    return counts


# -- tables ----------------------------------------------------------------------------------------------------------


def _show_ranks(result: dict[str, Any]) -> None:
    headline, mean = result["headline"], result["mean"]
    table = Table(title=f"effective rank over {result['tokens']} positions, keys as they lie in the cache")
    sides = list(mean[headline[0]])
    for column in ("layer", *(f"{kind}\n{side}" for kind in headline for side in sides)):
        table.add_column(column, justify="right")
    for layer in (*result["layers"], {"layer": "mean"} | mean):
        values = [layer[kind][side] for kind in headline for side in sides]
        table.add_row(str(layer["layer"]), *(f"{value:.1f}" for value in values))
    out.print(table)
    bare = ", ".join(f"{side} {value:.1f}" for side, value in mean["keys_unrotated"].items())
    out.print(f"keys without their rotary embedding, mean: {bare}")


def _show_map(result: dict[str, Any]) -> None:
    table = Table("", title=f"entries at {result['tokens']} positions")
    parts = [(layer, kind) for layer in result["layers"] for kind in ("keys", "values")]
    for layer, kind in parts:
        table.add_column(f"layer {layer['layer']}\n{kind}", justify="right")
    for name in result["layers"][0]["keys"]:
        numbers = [layer[kind][name] for layer, kind in parts]
        table.add_row(name.replace("_", " "), *("-" if x is None else f"{x:.3f}" for x in numbers))
    out.print(table)


def _show_gates(result: dict[str, Any]) -> None:
    heads = len(result["layers"][0]["relative"]["keys"])
    share = "soft gates" if result["open"] is None else f"{result['open']:.1f} % of the gates are open"
    table = Table(title=f"{share}; added / own length by head")
    columns = [f"{kind[0].upper()} {head}" for kind in ("keys", "values") for head in range(heads)]
    for column in ("layer", "key gate", "value gate", *columns):
        table.add_column(column, justify="right")
    for layer in result["layers"]:
        sizes = [*layer["relative"]["keys"], *layer["relative"]["values"]]
        gate = layer["gate"]
        table.add_row(str(layer["layer"]), f"{gate['keys']:.3f}", f"{gate['values']:.3f}", *(f"{x:.2f}" for x in sizes))
    out.print(table)


def _show_progressive(result: dict[str, Any]) -> None:
    table = Table("fused", "former part", "latter part", title=f"accuracy in percent, n {result['n']}")
    for former, latter in zip(result["former"], result["latter"], strict=True):
        table.add_row(f"{former['fraction']:g}", _score(former), _score(latter))
    out.print(table)
    out.print(f"deranged {_score(result['deranged'])}, zero {_score(result['zero'])}")
    _show_gains(result)


def _show_precision(result: dict[str, Any]) -> None:
    table = Table("precision", "kB a question", "accuracy", "cost", "differ", title=f"in percent, n {result['n']}")
    for one in result["precisions"]:
        cells = [_score(one), _points(one["cost"]), f"{one['differ']:.1f}"]
        table.add_row(one["precision"], f"{one['bytes'] / 1e3:,.0f}", *cells)
    out.print(table)
    out.print(f"receiver alone {_score(result['receiver'])}, deranged {_score(result['deranged'])}")
    _show_gains(result)


def _show_layers(result: dict[str, Any]) -> None:
    table = Table("fused", "accuracy", title=f"accuracy in percent, n {result['n']}")
    for name, score in result["systems"].items():
        table.add_row(name, _score(score))
    for one in result["single"]:
        table.add_row(f"layer {one['layer']} only", _score(one))
    out.print(table)
    _show_gains(result)


def _show_enrichment(result: dict[str, Any]) -> None:
    title = f"accuracy in percent, n {result['n']}, {result['shots']} exemplars"
    table = Table("", "accuracy", "over direct", title=title)
    for name, score in result["systems"].items():
        gain = result.get(f"{name}_gain")
        table.add_row(name.replace("_", "-"), _score(score), "" if gain is None else _points(gain))
    out.print(table)


def _show_scaling(result: dict[str, Any]) -> None:
    systems = list(dict.fromkeys(name for row in result["rows"] for name in row["systems"]))
    table = Table("sharer", "size", *systems, "G", "P", title=f"receiver {result['receiver']}, n {result['n']}")
    for row in result["rows"]:
        scores = [_stacked(row["systems"].get(name)) for name in systems]
        gains = [f"{row[letter]:+.1f}" if letter in row else "" for letter in ("G", "P")]
        table.add_row(row["sharer"], f"{row['parameters'] / 1e9:.3g}B\n({row['counted']})", *scores, *gains)
    out.print(table)


def _show_gains(result: dict[str, Any]) -> None:
    out.print(f"G = matched - receiver {_points(result['G'])}; P = matched - deranged {_points(result['P'])}")


def _score(score: dict[str, Any]) -> str:
    low, high = score["ci95"]
    return f"{score['accuracy']:.1f} [{low:.1f}, {high:.1f}]"


def _stacked(score: dict[str, Any] | None) -> str:
    """A score over its interval, where a row has no room for both."""
    return "" if score is None else _score(score).replace(" ", "\n", 1)


def _points(gain: dict[str, Any]) -> str:
    low, high = gain["ci95"]
    return f"{gain['points']:+.1f} [{low:.1f}, {high:.1f}]"
