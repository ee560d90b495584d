"""``c2c eval``: a fuser beside each model alone, beside text-to-text, and beside wrong messages."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from c2c.cli.options import Json, from_config
from c2c.cli.output import err, out, print_json, progress_bars
from c2c.data.config import DataSource
from c2c.evaluation.config import EvalConfig, load_eval_config, make_eval_config
from c2c.evaluation.tasks import tasks

_EPILOG = """Examples:

c2c eval --fuser zoo/NAME --data questions.jsonl --limit 200

c2c eval --fuser zoo/NAME --data a.jsonl --data b.jsonl --systems receiver,sharer,matched,deranged,zero --json

c2c eval --fuser zoo/NAME --data a.jsonl --systems receiver,sharer,matched,text --timed 10

c2c eval configs/eval/benchmarks.yaml --fuser zoo/NAME --data-dir ~/data --output-dir runs/eval

c2c eval --fuser zoo/NAME --data questions.jsonl --mode generate --form published --output-dir runs/eval

c2c eval --fuser zoo/NAME --data answers.jsonl --kind question --mode nll --systems receiver,matched,deranged

c2c eval --fuser runs/new/best --data a.jsonl --output-dir runs/new_eval --reuse runs/old_eval

Questions are JSON lines with "question", "choices" and "answer" (the index of the right choice). --data also takes the
name of a task below --data-dir: openbookqa, arc_challenge, arc_easy, mmlu_redux, ceval, gsm8k.
G = matched - receiver, P = matched - deranged: with P near zero no content of the sharer's message crosses.
With --output-dir an interrupted run is resumed, and systems can be added to a finished one.
With --reuse the models alone, text-to-text and the adapter keep their answers from another fuser's evaluation."""
_COSTS = {"seconds": ".2f", "first_token": ".2f", "tokens": ".1f", "bytes": ",.0f"}
_GAINS = {
    "G": "matched - receiver",
    "P": "matched - deranged",
    "S": "matched - sharer",
    "T": "matched - text",
    "A": "matched - adapter",
}


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command(name="eval", epilog=_EPILOG)(evaluate)


@from_config(EvalConfig, override=True)
@from_config(DataSource, only=("kind", "form", "skip"), override=True)
def evaluate(
    config: Annotated[Path | None, typer.Argument(help="YAML file; options override it.")] = None,
    *,
    data: Annotated[list[str] | None, typer.Option(help="JSONL file or task; may be repeated.")] = None,
    dev: Annotated[list[str] | None, typer.Option(help="The same, to fit the router on; never reported.")] = None,
    systems: Annotated[
        str | None,
        typer.Option(help="Systems to compare, with commas. \\[default: receiver,sharer,matched,deranged,zero]"),
    ] = None,
    other: Annotated[
        list[str] | None, typer.Option(help="A further fuser as a system: NAME=FOLDER; may be repeated.")
    ] = None,
    options: Annotated[
        int | None, typer.Option(help="Give every question this many options, the missing ones from other questions.")
    ] = None,
    json_: Json = False,
    **given: Any,
) -> None:
    """Measure a fuser against each model alone, against text-to-text, and against wrong messages."""
    from c2c.evaluation import evaluate as run

    details = {"options": options} | {name: given.pop(name) for name in ("kind", "form", "skip")}
    given |= {
        "data": _sources(data, details),
        "dev": _sources(dev, details),
        "systems": None if systems is None else [name.strip() for name in systems.split(",") if name.strip()],
        "fusers": _named(other),
    }
    loaded = make_eval_config({}, "options", **given) if config is None else load_eval_config(config, **given)
    with progress_bars() as report:
        result = run(loaded, report)
    if json_:
        print_json(result)
    else:
        _show(result, loaded.fuser)


def _sources(names: list[str] | None, details: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Make entries of a configuration; a relative path that exists here is taken from here."""
    if not names:
        return None
    rest = {key: value for key, value in details.items() if value is not None}
    paths = {name: Path(name).expanduser() for name in names}
    return [
        ({"task": name} if name in tasks() else {"path": str(path.absolute() if path.exists() else path)}) | rest
        for name, path in paths.items()
    ]


def _named(pairs: list[str] | None) -> dict[str, str] | None:
    if not pairs:
        return None
    named = dict(pair.partition("=")[::2] for pair in pairs)
    broken = [name for name, folder in named.items() if not name or not folder]
    if broken:
        raise typer.BadParameter(f"--other {broken[0]}: expected NAME=FOLDER, for instance linear=runs/linear/best.")
    return named


def _show(result: dict[str, Any], fuser: str) -> None:
    parts = result.get("sources", {}) | {"all": result}
    table = Table("", title=f"{fuser}, {result['unit']}")
    for name, numbers in parts.items():
        table.add_column(f"{name}\nn {numbers['n']}", justify="right")
    for system in result["systems"]:
        table.add_row(system, *(_score(part["systems"][system]) for part in parts.values()))
    for gain, meaning in _GAINS.items():
        if gain in result:
            cells = (f"{p[gain]:+.2f} [{p[f'{gain}_ci95'][0]:.2f}, {p[f'{gain}_ci95'][1]:.2f}]" for p in parts.values())
            table.add_row(f"{gain} = {meaning}", *cells)
    out.print(table)
    _show_costs(result)
    if result["dropped"]:
        err.print(f"not evaluated: {result['dropped']}")


def _show_costs(result: dict[str, Any]) -> None:
    """Print seconds, tokens and bytes per question, where they were measured."""
    measured = {name: system for name, system in result["systems"].items() if "timed" in system}
    if not measured:
        return
    count = next(iter(measured.values()))["timed"]
    columns = ("", "seconds", "first token", "tokens", "bytes", "x matched")
    table = Table(*columns, title=f"one question, mean of {count:.0f}")
    for name, system in measured.items():
        ratio = result.get("speed", {}).get(name)
        cells = [f"{system[key]:{form}}" for key, form in _COSTS.items()]
        table.add_row(name, *cells, "" if ratio is None else f"{ratio['ratio']:.2f}")
    out.print(table)


def _score(system: dict[str, Any]) -> str:
    value = next(system[key] for key in ("accuracy", "f1", "mean") if key in system)
    low, high = system["ci95"]
    rest = "".join(f", {key} {system[key]:.1f}" for key in ("exact", "holds") if key in system)
    return f"{value:.2f} [{low:.2f}, {high:.2f}]{rest}"
