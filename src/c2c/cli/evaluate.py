"""``c2c eval``: a fuser beside its controls; ``c2c lm-eval``: tasks of the lm-evaluation-harness on a pair."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from c2c.cli.options import Json, from_config, parse_pairs
from c2c.cli.output import err, out, print_result, print_table, progress_bars
from c2c.config import ConfigError
from c2c.data.config import DataSource
from c2c.evaluation.config import DIFFERENCES, EvalConfig, HarnessConfig, load_eval_config
from c2c.evaluation.tasks import tasks
from c2c.utils import argument_text, command, file_hash, versions, write_json

_COSTS = {"seconds": ".2f", "first_token": ".2f", "tokens": ".1f", "bytes": ",.0f"}
_SHOWN = ("G", "P", "S", "T", "A")  # differences of matched to the other systems
# Settings that simple_evaluate takes under the same name.
_SETTINGS = ("limit", "num_fewshot", "apply_chat_template", "system_instruction", "gen_kwargs", "log_samples")
# What of the harness's result is kept; the rest describes the machine.
_KEPT = (
    "results",
    "groups",
    "group_subtasks",
    "configs",
    "versions",
    "n-shot",
    "higher_is_better",
    "n-samples",
    "samples",
)


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
        "data": [_source(name, details) for name in data or []] or None,
        "dev": [_source(name, details) for name in dev or []] or None,
        "systems": None if systems is None else _split(systems),
        "fusers": parse_pairs(other, "--other", "linear=runs/linear/best") or None,
    }
    loaded = load_eval_config(config, **given)
    with progress_bars() as report:
        result = run(loaded, report)
    print_result(result, json_, partial(_show, fuser=loaded.fuser))


def _split(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


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
        columns = ["", *(name.replace("_", " ") for name in _COSTS), "x matched"]
        print_table(columns, rows, f"one question, mean of {next(iter(timed.values()))['timed']:.0f}")
    if result["dropped"]:
        err.print(f"not evaluated: {result['dropped']}", markup=False, soft_wrap=True)


def _score(system: dict[str, Any]) -> str:
    value = next(system[key] for key in ("accuracy", "f1", "mean") if key in system)
    low, high = system["ci95"]
    rest = "".join(f", {key} {system[key]:.1f}" for key in ("exact", "holds") if key in system)
    return f"{value:.2f} [{low:.2f}, {high:.2f}]{rest}"


@from_config(HarnessConfig)
def lm_eval(*, json_: Json = False, **options: Any) -> None:
    """Run tasks of the lm-evaluation-harness on a pair."""
    if options["system_instruction"] is not None:
        given = options["system_instruction"]
        options["system_instruction"] = argument_text(given, "--system-instruction", ConfigError)
    config = HarnessConfig(**options)
    systems, tasks = _split(config.system), _split(config.tasks)
    with err.status("loading tasks ..."):
        manager = _load_tasks(tasks, systems, config.include_path)
    from lm_eval import simple_evaluate
    from lm_eval.utils import handle_non_serializable

    from c2c.evaluation.lm_eval import C2CLM, System
    from c2c.fusers.base import resolve
    from c2c.model import C2CModel

    with err.status("loading models ..."):
        names = {name: getattr(config, name) for name in ("receiver", "sharer", "dtype", "device_map")}
        model = C2CModel.from_pretrained(config.fuser, **names)
    settings = {name: getattr(config, name) for name in _SETTINGS}
    settings["limit"] = int(config.limit) if config.limit is not None and config.limit >= 1 else config.limit
    settings["log_samples"] = config.log_samples and config.output is not None
    results: dict[str, Any] = {}
    for name in systems:
        lm = C2CLM(model, cast(System, name), batch_size=config.batch_size, max_length=config.max_length)
        result = simple_evaluate(model=lm, tasks=tasks, task_manager=manager, **settings)
        kept = {key: result[key] for key in _KEPT if key in result} | {"counts": dict(lm.counts)}
        results[name] = json.loads(json.dumps(kept, default=handle_non_serializable))
    folder = resolve(config.fuser)
    provenance = {
        "fuser": {str(path.relative_to(folder)): file_hash(path) for path in sorted(folder.rglob("model.safetensors"))},
        "receiver": model.receiver.identity.to_dict(),
        "sharers": [sharer.identity.to_dict() for sharer in model.sharers],
        "settings": settings | {"tasks": tasks, "batch_size": config.batch_size, "max_length": config.max_length},
        "command": command(),
        "versions": versions("lm_eval"),
    }
    data = {"systems": results, "provenance": provenance}
    if config.output is not None:
        write_json(Path(config.output), data)
    for result in results.values():
        result.pop("samples", None)
    print_result(data, json_, _show_tasks)


def _load_tasks(names: list[str], systems: list[str], include: list[str]) -> Any:
    """Return the harness's task manager, once all tasks and their data are loaded.

    Raises:
        IntegrationError: unknown systems or tasks, or data that can't be loaded; nothing to do.
        MissingExtraError: the harness is not installed.
    """
    from c2c.evaluation.lm_eval import SYSTEMS
    from c2c.integrations import IntegrationError

    if not systems or not names or not set(systems) <= set(SYSTEMS):
        raise IntegrationError(
            f"got systems {systems} and tasks {names}; expected at least one of each, systems out of "
            f"{', '.join(SYSTEMS)}."
        )
    if missing := [folder for folder in include if not Path(folder).is_dir()]:
        raise IntegrationError(f"--include-path {', '.join(missing)}: no such folder.")
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=include, include_defaults=False)
    if not all(name in manager.all_subtasks or Path(name).is_file() for name in names):
        manager = TaskManager(include_path=include)  # only where needed: reading the harness's own tasks takes seconds
    for name in names:
        try:
            manager.load([name])
        except KeyError as error:
            raise IntegrationError(
                f"the harness has no task {name!r}. `lm_eval ls tasks` lists its own; give --include-path FOLDER for "
                "others, or the path of a task file."
            ) from error
        except Exception as error:  # data sets fail in many ways
            raise IntegrationError(f"task {name!r} can't be loaded: {type(error).__name__}: {error}") from error
    return manager


def _show_tasks(data: dict[str, Any]) -> None:
    from lm_eval.utils import make_table

    for name, result in data["systems"].items():
        out.print(f"[bold]{name}[/bold]")
        typer.echo(make_table(result))
        if "groups" in result:
            typer.echo(make_table(result, "groups"))
        remarks = {reason: count for reason, count in result["counts"].items() if count and reason != "contexts"}
        if remarks:
            err.print(f"{name}, of {result['counts']['contexts']} contexts: {remarks}")
