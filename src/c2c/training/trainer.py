"""The Trainer of transformers, for fusers: what it saves, in which order it reads, and what it selects."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from c2c.fusers import C2CFuser, Fuser
from c2c.fusers.base import load_fuser
from c2c.training.checkpoints import CompleteCheckpoints
from c2c.training.config import ConfigError, TrainConfig
from c2c.training.objective import Objective
from c2c.training.order import GroupedOrder
from c2c.training.prepared import Prepared
from c2c.training.selection import DevScore, DevSet
from c2c.utils import OnProgress, install_command, write_json

log = logging.getLogger("c2c.training")


class _Examples(Dataset[Any]):
    def __init__(self, examples: Sequence[Any]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Any:
        return self.examples[index]


class FuserTrainer(Trainer):
    """The Trainer of transformers; checkpoints hold the fuser alone, and batches hold responses of similar length."""

    def _get_train_sampler(self, train_dataset: Any = None) -> GroupedOrder:
        lengths = [len(example.response_ids) for example in self.train_dataset]  # type: ignore[union-attr]
        return GroupedOrder(lengths, self.args.train_batch_size * self.args.world_size, self.args.seed)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = output_dir or self.args.output_dir or "."
        self._fuser.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        stored = load_fuser(resume_from_checkpoint, dtype=torch.float32)
        self._fuser.load_state_dict(stored.state_dict())
        if isinstance(stored, C2CFuser) and isinstance(self._fuser, C2CFuser):
            self._fuser.temperature = stored.temperature

    @property
    def _fuser(self) -> Fuser:
        training: Any = self.accelerator.unwrap_model(self.model)
        fuser: Fuser = training.fuser
        return fuser


class Schedule(TrainerCallback):
    """What depends on the step: the published gate temperature, and whether the fuser still learns to reconstruct."""

    def __init__(self, training: Objective, reconstruction_steps: int) -> None:
        self.training, self.reconstruction_steps = training, reconstruction_steps

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer."""
        fuser: Any = self.training.fuser
        if hasattr(fuser, "set_step"):
            fuser.set_step(state.global_step)
        self.training.reconstructing = state.global_step < self.reconstruction_steps


class Report(TrainerCallback):
    """Tells how far the training is; in place of the Trainer's own bars, which write to stdout."""

    def __init__(self, progress: OnProgress | None) -> None:
        self.progress = progress

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer."""
        if self.progress is not None and state.is_world_process_zero:
            self.progress("training", state.global_step, state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer."""
        logs = kwargs.get("logs") or {}
        if "loss" in logs and state.is_world_process_zero:
            log.info("step %d of %d: loss %.3f", state.global_step, state.max_steps, logs["loss"])


class Selection(TrainerCallback):
    """Scores the dev set and keeps the best fuser. What was scored before a resume is read back."""

    def __init__(self, prepared: Prepared, every: int, folder: Path) -> None:
        self.prepared, self.every, self.folder = prepared, every, folder
        self.dev = DevSet(prepared.dev, prepared.config.batch_size)
        self.path = folder / "dev.json"
        self.scores: dict[str, dict[str, float]] = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.log: Callable[[dict[str, float]], None] | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer."""
        due = state.global_step % self.every == 0 or state.global_step == state.max_steps
        if due and state.is_world_process_zero:
            due_to_log = control.should_log
            self.score(state.global_step)
            control.should_log = due_to_log  # writing the scores to the log cleared it, in this process alone

    def score(self, step: int) -> DevScore:
        """Score the fuser as it is after ``step``, and keep it if it is the best so far."""
        training = self.prepared.training
        result = self.dev.score(training)
        log.info(
            "step %d: dev receiver %.1f, matched %.1f, deranged %.1f",
            step,
            result.receiver,
            result.matched,
            result.deranged,
        )
        earlier = [entry["value"] for at, entry in self.scores.items() if int(at) < step]
        self.scores = {at: entry for at, entry in self.scores.items() if int(at) < step} | {str(step): result.to_dict()}
        if not earlier or result.value > max(earlier):
            self.prepared.keep(self.folder, {"step": step, "dev": result.to_dict()})
        write_json(self.path, self.scores)
        if self.log is not None:
            self.log({f"dev_{name}": value for name, value in result.to_dict().items()})
        return result


def make_trainer(
    prepared: Prepared, arguments: TrainingArguments, selection: Selection, progress: OnProgress | None = None
) -> FuserTrainer:
    """The Trainer of a prepared run."""
    training, config = prepared.training, prepared.config
    training.fuser.train()
    trainer = FuserTrainer(
        model=training,
        args=arguments,
        train_dataset=_Examples(prepared.train),
        data_collator=lambda examples: {"examples": examples},
        callbacks=[
            Schedule(training, config.reconstruction_steps),
            selection,
            CompleteCheckpoints(),
            Report(progress),
        ],
    )
    trainer.remove_callback(PrinterCallback)
    selection.log = trainer.log
    if isinstance(training.fuser, C2CFuser) and "anneal_steps" not in config.fuser_options:
        # the published schedule ends with the run
        steps = prepared.steps_per_epoch * config.epochs if config.max_steps < 0 else config.max_steps
        training.fuser.config.anneal_steps = int(steps)
    return trainer


def make_arguments(config: TrainConfig) -> TrainingArguments:
    """What the Trainer is told.

    Raises:
        ConfigError: the batch can't be shared by the processes there are, or the Trainer refuses a value.
    """
    if config.report_to == "tensorboard" and find_spec("tensorboard") is None:
        raise ConfigError(f"report_to is 'tensorboard', which is not installed: {install_command('tensorboard')}.")
    try:
        arguments = _arguments(config)
    except ValueError as error:
        raise ConfigError(f"the Trainer refuses this configuration: {error}") from error
    # batch_size counts over all processes, so that a result does not depend on how many there are
    share, rest = divmod(config.batch_size, arguments.world_size)
    if rest or share < 1 or (config.guard_weight > 0 and share < 2):
        raise ConfigError(
            f"batch_size {config.batch_size} can't be shared by {arguments.world_size} processes: it must be a "
            "multiple, with at least 2 for each where guard_weight is set (a wrong message is another example's)."
        )
    arguments.per_device_train_batch_size = share
    return arguments


def _arguments(config: TrainConfig) -> TrainingArguments:
    return TrainingArguments(
        output_dir=config.output_dir,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps,
        gradient_accumulation_steps=config.gradient_accumulation,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        warmup_steps=config.warmup_steps,
        lr_scheduler_type=config.schedule,
        max_grad_norm=config.max_grad_norm,
        optim="adamw_torch_fused",
        logging_steps=config.logging_steps,
        save_strategy="steps",
        save_steps=config.save_steps,
        save_total_limit=2,
        report_to=config.report_to,
        disable_tqdm=True,
        seed=config.seed,
        remove_unused_columns=False,
        dataloader_drop_last=True,
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=False,
        use_cpu=config.device_map in (None, "cpu") and not torch.cuda.is_available(),
    )
