"""The Trainer of transformers for an :class:`Objective`: its order of examples, and its checkpoints."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from c2c.config import ConfigError
from c2c.training.config import ADAPTER, TrainConfig
from c2c.training.dev_set import Selection
from c2c.training.examples import Example
from c2c.training.objective import Objective
from c2c.utils import OnProgress, check_writable, install_command, read_json_object, write_json

log = logging.getLogger("c2c.training")
_COMPLETE, _RUN = "complete", "run.json"
_POOL = 16  # batches that are sorted among themselves
# fields that may change when a run is resumed: paths, lengths, and how often it reports
_FREE = {"data_dir", "output_dir", "store_dir", "store_budget_gb", "report_to", "epochs", "max_steps"}
_FREE |= {"eval_steps", "save_steps", "logging_steps", "fill", "prefill_batch", "device_map"}


# -- checkpoints: each counts only when it was written whole, and only for its own run ---------------------------------


def last_complete(folder: Path) -> str | None:
    """Return the last whole checkpoint of a run, None if there is none; half-written ones are removed."""
    found: dict[int, Path] = {}
    for path in folder.glob("checkpoint-*"):
        step = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if step and (path / _COMPLETE).exists():
            found[int(step[1])] = path
        elif step:
            shutil.rmtree(path, ignore_errors=True)
    return str(found[max(found)]) if found else None


def find_checkpoint(config: TrainConfig, resume: bool) -> str | None:
    """Return the checkpoint to resume from, None for a fresh start; called before anything is loaded.

    Raises:
        ConfigError: ``output_dir`` can't be written to, or holds the run of another configuration.
    """
    check_writable(config.output_dir, "output_dir", ConfigError)
    last = last_complete(Path(config.output_dir)) if resume else None
    recorded = Path(config.output_dir) / _RUN
    if last is not None and recorded.is_file():
        before, now = read_json_object(recorded, ConfigError), _fixed_fields(config)
        other = [f"{key} was {before[key]!r}, is {now[key]!r}" for key in now if before.get(key, now[key]) != now[key]]
        if other:
            raise ConfigError(
                f"{config.output_dir} holds the run of another configuration: {'; '.join(other)}. Choose another "
                "output_dir (--output-dir), take the old values, or start afresh with --no-resume."
            )
    return last


def record_run(config: TrainConfig) -> None:
    """Write the configuration that the checkpoints to come belong to."""
    write_json(Path(config.output_dir) / _RUN, _fixed_fields(config))


def _fixed_fields(config: TrainConfig) -> dict[str, Any]:
    fields = {key: value for key, value in config.to_dict().items() if key not in _FREE}
    plain: dict[str, Any] = json.loads(json.dumps(fields, default=str))  # as it will be read again
    return plain


# -- the Trainer -------------------------------------------------------------------------------------------------------


class LengthGroupedSampler(Sampler[int]):
    """Indices of all examples in random order, with responses of similar length in one batch, to save padding.

    A function of seed and epoch alone, so that a resumed run repeats it; the sampler of transformers draws from the
    global generator, and so depends on what ran before. ``batch`` counts over all processes.
    """

    def __init__(self, lengths: Sequence[int], batch: int, seed: int) -> None:
        self.lengths, self.batch, self.seed, self.epoch = lengths, batch, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Move to another epoch's order."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=draw).tolist()
        batches: list[list[int]] = []
        for start in range(0, len(order), _POOL * self.batch):
            pool = sorted(order[start : start + _POOL * self.batch], key=lambda index: self.lengths[index])
            batches += [pool[i : i + self.batch] for i in range(0, len(pool), self.batch)]
        last = batches.pop() if batches and len(batches[-1]) < self.batch else []  # dropped by the loader
        for index in torch.randperm(len(batches), generator=draw).tolist():
            yield from batches[index]
        yield from last


class InPlaceArguments(TrainingArguments):
    """Arguments that leave an objective where it is: on the receiver's device, as its frozen models are."""

    @property
    def place_model_on_device(self) -> bool:
        """False: the Trainer's device need not be the receiver's."""
        return False

    @property
    def n_gpu(self) -> int:
        """At most 1: the Trainer would replicate the objective over all visible GPUs, without its frozen models."""
        return min(int(super().n_gpu), 1)


class ObjectiveTrainer(Trainer):
    """Trains an objective; checkpoints hold only what is trained."""

    @property
    def unwrapped(self) -> Objective:
        """What is trained, also where it is wrapped for several processes."""
        objective: Objective = self.accelerator.unwrap_model(self.model)
        return objective

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Run a batch in micro batches, whose activations are in memory one at a time."""
        examples = inputs["examples"]
        total = torch.zeros((), device=self.args.device)
        for part in self.unwrapped.micro_batches(examples):
            batch = {"examples": part, "share": len(part) / len(examples)}
            total += super().training_step(model, batch, num_items_in_batch).to(total.device)
        return total

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthGroupedSampler:
        examples: Any = self.train_dataset
        lengths = [len(example.response_ids) for example in examples]
        return LengthGroupedSampler(lengths, self.args.train_batch_size * self.args.world_size, self.args.seed)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        self.unwrapped.save(Path(output_dir or self.args.output_dir or "."))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.unwrapped.load(Path(resume_from_checkpoint))


class RunCallback(TrainerCallback):
    """Moves the objective's schedules, reports progress (the Trainer's bars write to stdout), and marks checkpoints."""

    def __init__(self, objective: Objective, progress: OnProgress | None) -> None:
        self.objective, self.progress = objective, progress

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the length of the training."""
        self.objective.on_train_begin(state.max_steps)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the schedules to a step."""
        self.objective.on_step(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report the step."""
        if self.progress is not None and state.is_world_process_zero:
            self.progress("training", state.global_step, state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log the loss."""
        logs = kwargs.get("logs") or {}
        if "loss" in logs and state.is_world_process_zero:
            log.info("step %d of %d: loss %.3f", state.global_step, state.max_steps, logs["loss"])

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Mark a checkpoint as complete after its last file was written."""
        if state.is_world_process_zero:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / _COMPLETE).touch()


def make_trainer(
    objective: Objective,
    examples: Sequence[Example],
    arguments: TrainingArguments,
    selection: Selection,
    progress: OnProgress | None = None,
) -> ObjectiveTrainer:
    """Make the Trainer of an objective, which stays on its own device."""
    objective.train()
    trainer = ObjectiveTrainer(
        model=objective,
        args=arguments,
        train_dataset=list(examples),
        data_collator=lambda examples: {"examples": examples},
        callbacks=[selection, RunCallback(objective, progress)],
    )
    trainer.accelerator.device_placement = False
    trainer.remove_callback(PrinterCallback)
    selection.log = trainer.log
    return trainer


def make_arguments(config: TrainConfig) -> TrainingArguments:
    """Make the Trainer's arguments.

    Raises:
        ConfigError: the batch can't be shared by the processes there are, or the Trainer refuses a value.
    """
    if config.report_to == "tensorboard" and find_spec("tensorboard") is None:
        raise ConfigError(f"report_to is 'tensorboard', which is not installed: {install_command('tensorboard')}.")
    same = ("output_dir", "max_steps", "weight_decay", "warmup_steps", "max_grad_norm", "logging_steps", "save_steps")
    try:
        arguments = InPlaceArguments(
            **{name: getattr(config, name) for name in (*same, "report_to", "seed")},
            num_train_epochs=config.epochs,
            gradient_accumulation_steps=config.gradient_accumulation,
            learning_rate=config.adapter_learning_rate if config.family == ADAPTER else config.learning_rate,
            lr_scheduler_type=config.schedule,
            optim="adamw_torch_fused",
            save_total_limit=2,
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_drop_last=True,
            dataloader_pin_memory=False,
            ddp_find_unused_parameters=False,
            use_cpu=config.device_map in (None, "cpu"),  # where the frozen models are then
        )
        for callback in get_reporting_integration_callbacks(arguments.report_to):
            callback()  # raises where its package is missing
    except (ValueError, RuntimeError, ImportError) as error:
        raise ConfigError(f"the Trainer refuses this configuration: {error}") from error
    # batch_size counts over all processes, so that a result does not depend on how many there are
    share, rest = divmod(config.batch_size, arguments.world_size)
    guarded = config.guard_weight > 0 and config.family != ADAPTER
    if rest or share < 1 or (guarded and share < 2):
        raise ConfigError(
            f"batch_size {config.batch_size} can't be shared by {arguments.world_size} processes: it must be a "
            "multiple, with at least 2 for each where guard_weight is set (a wrong message is another example's)."
        )
    arguments.per_device_train_batch_size = share
    return arguments
