"""``c2c lm-eval``: tasks of the lm-evaluation-harness on a pair of models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from c2c.cli.options import Json, from_config
from c2c.cli.output import err, out, print_json
from c2c.evaluation.config import HarnessConfig
from c2c.utils import command, file_hash, versions, write_json

if TYPE_CHECKING:
    from c2c.model import C2CModel

_EPILOG = """Examples:

c2c lm-eval --fuser zoo/NAME --tasks arc_easy,openbookqa --limit 200 --apply-chat-template

c2c lm-eval --fuser zoo/NAME --tasks arc_easy --system receiver,sharer,matched,deranged --output result.json

c2c lm-eval --fuser zoo/NAME --tasks my_task --include-path tasks/ --num-fewshot 2 --batch-size 8 --json

c2c lm-eval --fuser zoo/NAME --tasks tasks/my_task.yaml --gen-kwargs max_gen_toks=64

Systems: receiver and sharer alone; matched, the fused receiver; deranged, the receiver fused with what the sharer read
of another document: a gain that deranged has as well is not content of the prompt.
Without --apply-chat-template both models read the task's raw text; a fuser trained on chat prompts wants the template.
Needs the harness: pip install 'cache2cache\\[lm-eval]'. Most tasks fetch their data from the hub."""

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


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command(name="lm-eval", epilog=_EPILOG)(lm_eval)


@from_config(HarnessConfig)
def lm_eval(*, json_: Json = False, **options: Any) -> None:
    """Run tasks of the lm-evaluation-harness on a pair."""
    config = HarnessConfig(**options)
    systems = [name.strip() for name in config.system.split(",") if name.strip()]
    tasks = [name.strip() for name in config.tasks.split(",") if name.strip()]
    with err.status("loading tasks ..."):
        manager = _load_tasks(tasks, systems, config.include_path)
    with err.status("loading models ..."):
        from c2c.model import C2CModel

        names = {name: getattr(config, name) for name in ("receiver", "sharer", "dtype", "device_map")}
        model = C2CModel.from_pretrained(config.fuser, **names)
    settings = {name: getattr(config, name) for name in _SETTINGS}
    settings["limit"] = int(config.limit) if config.limit is not None and config.limit >= 1 else config.limit
    settings["log_samples"] = config.log_samples and config.output is not None
    results = {name: _run(model, name, config, tasks=tasks, task_manager=manager, **settings) for name in systems}
    details = settings | {"tasks": tasks, "batch_size": config.batch_size, "max_length": config.max_length}
    data = {"systems": results, "provenance": _provenance(model, config.fuser, details)}
    if config.output is not None:
        write_json(Path(config.output), data)
    if json_:
        print_json({**data, "systems": {name: _without_samples(result) for name, result in results.items()}})
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

    unknown = [name for name in systems if name not in SYSTEMS]
    if unknown or not systems or not names:
        raise IntegrationError(
            f"got systems {systems} and tasks {names}; expected at least one of each, systems out of "
            f"{', '.join(SYSTEMS)}."
        )
    missing = [folder for folder in include if not Path(folder).is_dir()]
    if missing:
        raise IntegrationError(f"--include-path {', '.join(missing)}: no such folder.")
    manager = _manager(names, include)
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


def _manager(names: list[str], include: list[str]) -> Any:
    """Return a manager of the given folders alone where that does: reading the harness's own tasks takes seconds."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=include, include_defaults=False)
    if all(name in manager.all_subtasks or Path(name).is_file() for name in names):
        return manager
    return TaskManager(include_path=include)


def _run(model: C2CModel, system: Any, config: HarnessConfig, **settings: Any) -> dict[str, Any]:
    """Return one system's result, as the harness gives it, without what describes the machine."""
    from lm_eval import simple_evaluate
    from lm_eval.utils import handle_non_serializable

    from c2c.evaluation.lm_eval import C2CLM

    lm = C2CLM(model, system, batch_size=config.batch_size, max_length=config.max_length)
    result = simple_evaluate(model=lm, **settings)
    kept = {key: result[key] for key in _KEPT if key in result} | {"counts": dict(lm.counts)}
    plain: dict[str, Any] = json.loads(json.dumps(kept, default=handle_non_serializable))
    return plain


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


def _without_samples(result: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in result.items() if key != "samples"}


def _provenance(model: C2CModel, fuser: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Return all that is needed to repeat a run."""
    from c2c.fusers.base import resolve

    folder = resolve(fuser)
    return {
        "fuser": {str(path.relative_to(folder)): file_hash(path) for path in sorted(folder.rglob("model.safetensors"))},
        "receiver": model.receiver.identity.to_dict(),
        "sharers": [sharer.identity.to_dict() for sharer in model.sharers],
        "settings": settings,
        "command": command(),
        "versions": versions("lm_eval"),
    }
