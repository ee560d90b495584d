"""``c2c eval``: a fuser beside each model alone, beside text-to-text, and beside wrong messages."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from c2c.cli.options import Json, from_config
from c2c.cli.output import err, print_json, print_table, progress_bars
from c2c.data.config import DataSource
from c2c.evaluation.config import DIFFERENCES, EvalConfig, load_eval_config
from c2c.evaluation.tasks import tasks

_COSTS = {"seconds": ".2f", "first_token": ".2f", "tokens": ".1f", "bytes": ",.0f"}
_SHOWN = ("G", "P", "S", "T", "A")  # differences of matched to the other systems


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
    fusers = dict(pair.partition("=")[::2] for pair in other or [])
    for name, folder in fusers.items():
        if not name or not folder:
            raise typer.BadParameter(f"--other {name}: expected NAME=FOLDER, for instance linear=runs/linear/best.")
    given |= {
        "data": [_source(name, details) for name in data or []] or None,
        "dev": [_source(name, details) for name in dev or []] or None,
        "systems": None if systems is None else [name.strip() for name in systems.split(",") if name.strip()],
        "fusers": fusers or None,
    }
    loaded = load_eval_config(config, **given)
    with progress_bars() as report:
        result = run(loaded, report)
    if json_:
        print_json(result)
    else:
        _show(result, loaded.fuser)


def _source(name: str, details: dict[str, Any]) -> dict[str, Any]:
    """Make an entry of a configuration; a relative path that exists here is taken from here."""
    path = Path(name).expanduser()
    entry = {"task": name} if name in tasks() else {"path": str(path.absolute() if path.exists() else path)}
    return entry | {key: value for key, value in details.items() if value is not None}


def _show(result: dict[str, Any], fuser: str) -> None:
    parts = result.get("sources", {}) | {"all": result}
    rows = [[name, *(_score(part["systems"][name]) for part in parts.values())] for name in result["systems"]]
    for gain in _SHOWN:
        if gain in result:
            cells = (f"{p[gain]:+.2f} [{p[f'{gain}_ci95'][0]:.2f}, {p[f'{gain}_ci95'][1]:.2f}]" for p in parts.values())
            rows.append([f"{gain} = {' - '.join(DIFFERENCES[gain])}", *cells])
    columns = ["", *(f"{name}\nn {part['n']}" for name, part in parts.items())]
    print_table(columns, rows, f"{fuser}, {result['unit']}")
    if timed := {name: system for name, system in result["systems"].items() if "timed" in system}:
        speed = result.get("speed", {})
        rows = []
        for name, system in timed.items():
            ratio = f"{speed[name]['ratio']:.2f}" if name in speed else ""
            rows.append([name, *(f"{system[key]:{form}}" for key, form in _COSTS.items()), ratio])
        count = next(iter(timed.values()))["timed"]
        print_table(
            ["", *(name.replace("_", " ") for name in _COSTS), "x matched"], rows, f"one question, mean of {count:.0f}"
        )
    if result["dropped"]:
        err.print(f"not evaluated: {result['dropped']}")


def _score(system: dict[str, Any]) -> str:
    value = next(system[key] for key in ("accuracy", "f1", "mean") if key in system)
    low, high = system["ci95"]
    rest = "".join(f", {key} {system[key]:.1f}" for key in ("exact", "holds") if key in system)
    return f"{value:.2f} [{low:.2f}, {high:.2f}]{rest}"
