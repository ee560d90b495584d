"""``c2c lm-eval``: tasks of the lm-evaluation-harness on a pair of models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import typer

from c2c.cli.options import Json, from_config
from c2c.cli.output import err, out, print_json
from c2c.evaluation.config import HarnessConfig
from c2c.utils import command, file_hash, versions, write_json

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


@from_config(HarnessConfig)
def lm_eval(*, json_: Json = False, **options: Any) -> None:
    """Run tasks of the lm-evaluation-harness on a pair."""
    config = HarnessConfig(**options)
    systems = [name.strip() for name in config.system.split(",") if name.strip()]
    tasks = [name.strip() for name in config.tasks.split(",") if name.strip()]
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
    weights = sorted(folder.rglob("model.safetensors"))
    provenance = {
        "fuser": {str(path.relative_to(folder)): file_hash(path) for path in weights},
        "receiver": model.receiver.identity.to_dict(),
        "sharers": [sharer.identity.to_dict() for sharer in model.sharers],
        "settings": settings | {"tasks": tasks, "batch_size": config.batch_size, "max_length": config.max_length},
        "command": command(),
        "versions": versions("lm_eval"),
    }
    if config.output is not None:
        write_json(Path(config.output), {"systems": results, "provenance": provenance})
    for result in results.values():
        result.pop("samples", None)
    if json_:
        print_json({"systems": results, "provenance": provenance})
    else:
        _show(results)


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


def _show(results: dict[str, Any]) -> None:
    from lm_eval.utils import make_table

    for name, result in results.items():
        out.print(f"[bold]{name}[/bold]")
        typer.echo(make_table(result))
        if "groups" in result:
            typer.echo(make_table(result, "groups"))
        remarks = {reason: count for reason, count in result["counts"].items() if count and reason != "contexts"}
        if remarks:
            err.print(f"{name}, of {result['counts']['contexts']} contexts: {remarks}")
