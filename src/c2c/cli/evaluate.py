"""``c2c eval``: a fuser beside each model alone, beside text, and beside the wrong message."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from c2c.cli.output import err, out, print_json, progress_bars

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
G = matched - receiver, P = matched - deranged: with P near zero a fuser carries nothing of its sharer's message.
With --output-dir a run that was stopped goes on where it was, and systems can be added to a finished one.
With --reuse the models alone, text-to-text and the adapter do not answer again what they did beside another fuser."""


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command(name="eval", epilog=_EPILOG)(evaluate)


def evaluate(
    config: Annotated[Path | None, typer.Argument(help="YAML file; options override it.")] = None,
    fuser: Annotated[str | None, typer.Option(help="Folder or hub id of the fuser.")] = None,
    data: Annotated[list[str] | None, typer.Option(help="JSONL file or task; may be given several times.")] = None,
    dev: Annotated[
        list[str] | None, typer.Option(help="The same, to fit router and abstain on; never reported.")
    ] = None,
    data_dir: Annotated[str | None, typer.Option(help="Folder that tasks and relative paths start from.")] = None,
    systems: Annotated[
        str | None, typer.Option(help="What to compare, with commas. [default: receiver,sharer,matched,deranged,zero]")
    ] = None,
    other: Annotated[
        list[str] | None, typer.Option(help="A further fuser as a system: NAME=FOLDER; may be given several times.")
    ] = None,
    adapter: Annotated[str | None, typer.Option(help="Folder of the receiver's adapter, for that system.")] = None,
    mode: Annotated[str | None, typer.Option(help="logits, generate or nll (open answers). [default: logits]")] = None,
    kind: Annotated[str | None, typer.Option(help="Kind of rows: multiple_choice, question, instruction, ...")] = None,
    form: Annotated[str | None, typer.Option(help="How questions are put: letter, published or sentence.")] = None,
    options: Annotated[
        int | None, typer.Option(help="Give every question so many options, the missing ones from other questions.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="At most this many items per source, drawn with the seed.")] = None,
    skip: Annotated[int | None, typer.Option(help="Leave out so many drawn items first, such as trained ones.")] = None,
    timed: Annotated[int | None, typer.Option(help="Items per source to measure speed, bytes and memory on.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the draw and of the intervals. [default: 0]")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Items at a time. [default: 8]")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Of a generated answer. [default: 32]")] = None,
    message_tokens: Annotated[int | None, typer.Option(help="In text-to-text, of the sharer. [default: 256]")] = None,
    receiver: Annotated[str | None, typer.Option(help="In place of the recorded receiver.")] = None,
    sharer: Annotated[str | None, typer.Option(help="In place of the recorded sharer.")] = None,
    output_dir: Annotated[str | None, typer.Option(help="Where items and result go; resumes there.")] = None,
    reuse: Annotated[
        str | None, typer.Option(help="Output folder of another fuser's evaluation, to take both models' answers from.")
    ] = None,
    store_dir: Annotated[str | None, typer.Option(help="A prefill store to use and fill.")] = None,
    store_budget_gb: Annotated[float | None, typer.Option(help="Its size. [default: 20]")] = None,
    dtype: Annotated[str | None, typer.Option(help="Type of the models' weights.")] = None,
    sharer_dtype: Annotated[str | None, typer.Option(help="Of the sharer's, where it differs.")] = None,
    device_map: Annotated[str | None, typer.Option(help="Where the models go.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Measure a fuser against each model alone, against text, and against wrong messages."""
    from c2c.evaluation import evaluate as run
    from c2c.evaluation import load_eval_config
    from c2c.evaluation.config import make_eval_config

    how = {"kind": kind, "form": form, "skip": skip, "options": options}
    given: dict[str, Any] = {
        "fuser": fuser,
        "data": _sources(data, how),
        "dev": _sources(dev, how),
        "data_dir": data_dir,
        "systems": None if systems is None else [name.strip() for name in systems.split(",") if name.strip()],
        "fusers": _named(other),
        "adapter": adapter,
        "mode": mode,
        "limit": limit,
        "timed": timed,
        "seed": seed,
        "batch_size": batch_size,
        "max_new_tokens": max_new_tokens,
        "message_tokens": message_tokens,
        "receiver": receiver,
        "sharer": sharer,
        "output_dir": output_dir,
        "reuse": reuse,
        "store_dir": store_dir,
        "store_budget_gb": store_budget_gb,
        "dtype": dtype,
        "sharer_dtype": sharer_dtype,
        "device_map": device_map,
    }
    loaded = make_eval_config({}, "options", **given) if config is None else load_eval_config(config, **given)
    with progress_bars() as report:
        result = run(loaded, report)
    if json_:
        print_json(result)
    else:
        _show(result, loaded.fuser)


def _sources(names: list[str] | None, how: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Entries of a configuration; a relative path that is there from here is taken from here."""
    from c2c.evaluation.tasks import TASKS

    if not names:
        return None
    rest = {key: value for key, value in how.items() if value is not None}
    entries = []
    for name in names:
        path = Path(name).expanduser()
        entries.append(
            ({"task": name} if name in TASKS else {"path": str(path.absolute() if path.exists() else path)}) | rest
        )
    return entries


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
    first = next(iter(result["systems"].values()))
    key = next(name for name in ("accuracy", "f1", "mean") if name in first)
    table = Table(title=f"{fuser}, {result['unit']}")
    table.add_column("")
    for name, numbers in parts.items():
        table.add_column(f"{name}\nn {numbers['n']}", justify="right")
    for system in result["systems"]:
        table.add_row(
            system, *(_with_interval(p["systems"][system][key], p["systems"][system]) for p in parts.values())
        )
    for gain, meaning in _MEANINGS.items():
        if gain in result:
            table.add_row(
                f"{gain} = {meaning}",
                *(f"{p[gain]:+.2f} [{p[f'{gain}_ci95'][0]:.2f}, {p[f'{gain}_ci95'][1]:.2f}]" for p in parts.values()),
            )
    out.print(table)
    _show_costs(result)
    if result["dropped"]:
        err.print(f"not evaluated: {result['dropped']}")


_MEANINGS = {
    "G": "matched - receiver",
    "P": "matched - deranged",
    "S": "matched - sharer",
    "T": "matched - text",
    "A": "matched - adapter",
}


def _show_costs(result: dict[str, Any]) -> None:
    """Seconds per question, where they were measured."""
    measured = {name: system for name, system in result["systems"].items() if "timed" in system}
    if not measured:
        return
    count = next(iter(measured.values()))["timed"]
    table = Table(
        "", "seconds", "first token", "tokens", "bytes", "x matched", title=f"one question, mean of {count:.0f}"
    )
    for name, system in measured.items():
        ratio = result.get("speed", {}).get(name)
        table.add_row(
            name,
            f"{system['seconds']:.2f}",
            f"{system['first_token']:.2f}",
            f"{system['tokens']:.1f}",
            f"{system['bytes']:,.0f}",
            "" if ratio is None else f"{ratio['ratio']:.2f}",
        )
    out.print(table)


def _with_interval(value: float, system: dict[str, Any]) -> str:
    low, high = system["ci95"]
    rest = "".join(f", {key} {system[key]:.1f}" for key in ("exact", "holds") if key in system)
    return f"{value:.2f} [{low:.2f}, {high:.2f}]{rest}"
