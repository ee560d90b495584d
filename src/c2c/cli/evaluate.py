"""``c2c eval``: a fuser beside each model alone, and beside the wrong message."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from c2c.cli.output import err, out, print_json, progress_bars

_EPILOG = """Examples:

c2c eval --fuser zoo/NAME --data questions.jsonl --limit 200

c2c eval --fuser zoo/NAME --data a.jsonl --data b.jsonl --systems receiver,sharer,matched,deranged,zero --json

c2c eval --fuser zoo/NAME --data questions.jsonl --mode generate --form published --output-dir runs/eval

c2c eval --fuser zoo/NAME --data answers.jsonl --kind question --mode nll --systems receiver,matched,deranged

Questions are JSON lines with "question", "choices" and "answer" (the index of the right choice).
G = matched - receiver, P = matched - deranged: with P near zero a fuser carries nothing of its sharer's message.
With --output-dir a run that was stopped goes on where it was."""


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command(name="eval", epilog=_EPILOG)(evaluate)


def evaluate(
    fuser: Annotated[str, typer.Option(help="Folder or hub id of the fuser.")],
    data: Annotated[list[str], typer.Option(help="JSONL file; may be given several times.")],
    systems: Annotated[str, typer.Option(help="What to compare, with commas.")] = (
        "receiver,sharer,matched,deranged,zero"
    ),
    mode: Annotated[str, typer.Option(help="logits, generate or nll (open answers).")] = "logits",
    kind: Annotated[str, typer.Option(help="Kind of rows: multiple_choice, question, instruction, ...")] = (
        "multiple_choice"
    ),
    form: Annotated[str, typer.Option(help="How questions are put: letter, published or sentence.")] = "letter",
    options: Annotated[
        int | None, typer.Option(help="Give every question so many options, the missing ones from other questions.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="At most this many items per file, drawn with the seed.")] = None,
    skip: Annotated[int, typer.Option(help="Leave out so many of the drawn items, for instance trained ones.")] = 0,
    seed: Annotated[int, typer.Option(help="Of the draw and of the intervals.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Items at a time.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(help="In mode generate.")] = 32,
    receiver: Annotated[str | None, typer.Option(help="In place of the recorded receiver.")] = None,
    sharer: Annotated[str | None, typer.Option(help="In place of the recorded sharer.")] = None,
    output_dir: Annotated[str | None, typer.Option(help="Where items and result go; resumes there.")] = None,
    store_dir: Annotated[str | None, typer.Option(help="A prefill store to use and fill.")] = None,
    store_budget_gb: Annotated[float, typer.Option(help="Its size.")] = 20.0,
    dtype: Annotated[str | None, typer.Option(help="Type of the models' weights.")] = None,
    device_map: Annotated[str | None, typer.Option(help="Where the models go.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Measure a fuser against each model alone and against wrong messages."""
    from c2c.evaluation import EvalConfig
    from c2c.evaluation import evaluate as run
    from c2c.training.config import DataSource

    config = EvalConfig(
        fuser=fuser,
        data=[DataSource(str(Path(path).expanduser()), kind, form, skip=skip, options=options) for path in data],
        systems=tuple(name.strip() for name in systems.split(",") if name.strip()),
        mode=mode,
        limit=limit,
        seed=seed,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        receiver=receiver,
        sharer=sharer,
        output_dir=output_dir,
        store_dir=store_dir,
        store_budget_gb=store_budget_gb,
        dtype=dtype,
        device_map=device_map,
    )
    with progress_bars() as report:
        result = run(config, report)
    if json_:
        print_json(result)
    else:
        _show(result, fuser)


def _show(result: dict[str, Any], fuser: str) -> None:
    parts = result.get("sources", {}) | {"all": result}
    first = next(iter(result["systems"].values()))
    key = "accuracy" if "accuracy" in first else "mean"
    table = Table(title=f"{fuser}, {result['unit']}")
    table.add_column("")
    for name, numbers in parts.items():
        table.add_column(f"{name}\nn {numbers['n']}", justify="right")
    for system in result["systems"]:
        table.add_row(
            system, *(_with_interval(p["systems"][system][key], p["systems"][system]) for p in parts.values())
        )
    for gain, meaning in (("G", "matched - receiver"), ("P", "matched - deranged"), ("S", "matched - sharer")):
        if gain in result:
            table.add_row(
                f"{gain} = {meaning}",
                *(f"{p[gain]:+.2f} [{p[f'{gain}_ci95'][0]:.2f}, {p[f'{gain}_ci95'][1]:.2f}]" for p in parts.values()),
            )
    out.print(table)
    if result["dropped"]:
        err.print(f"not evaluated: {result['dropped']}")


def _with_interval(value: float, system: dict[str, Any]) -> str:
    low, high = system["ci95"]
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"
