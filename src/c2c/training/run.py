"""``train``: from a configuration to a chosen fuser, resumable at any moment."""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from c2c.files import write_json
from c2c.fusers import BottleneckFuser, C2CFuser, Fuser, LinearFuser
from c2c.fusers.base import load_fuser
from c2c.model import C2CModel
from c2c.training.checkpoints import CompleteCheckpoints, last_complete
from c2c.training.config import ConfigError, TrainConfig
from c2c.training.distributed import Processes, shard
from c2c.training.examples import Example, build_examples
from c2c.training.memory import keep_freed_memory
from c2c.training.order import GroupedOrder
from c2c.training.ridge import Batches, choose_blend, fit
from c2c.training.rows import load_rows, questions
from c2c.training.selection import DevScore, DevSet
from c2c.training.step import FuserTraining
from c2c.training.store import PrefillStore

log = logging.getLogger("c2c.training")

OnProgress = Callable[[str, int, int], None]


@dataclass
class Prepared:
    """A run with its models, data and stores, before the first step."""

    config: TrainConfig
    training: FuserTraining
    train: list[Example]
    dev: list[Example]
    dropped: Counter[str]
    receiver_store: PrefillStore
    sharer_store: PrefillStore
    processes: Processes


class _Examples(Dataset[Example]):
    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
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


class _Schedule(TrainerCallback):
    """What depends on the step: the published gate temperature, and whether the fuser still learns to reconstruct."""

    def __init__(self, training: FuserTraining, reconstruction_steps: int) -> None:
        self.training, self.reconstruction_steps = training, reconstruction_steps

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        fuser: Any = self.training.fuser
        if hasattr(fuser, "set_step"):
            fuser.set_step(state.global_step)
        self.training.reconstructing = state.global_step < self.reconstruction_steps


class _Selection(TrainerCallback):
    """Scores the dev set and keeps the best fuser. What was scored before a resume is read back."""

    def __init__(self, prepared: Prepared, every: int, folder: Path) -> None:
        self.prepared, self.every, self.folder = prepared, every, folder
        self.dev = DevSet(prepared.dev, prepared.config.batch_size)
        self.path = folder / "dev.json"
        self.scores: dict[str, dict[str, float]] = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.log: Callable[[dict[str, float]], None] | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        due = state.global_step % self.every == 0 or state.global_step == state.max_steps
        if due and state.is_world_process_zero:
            due_to_log = control.should_log
            self.score(state.global_step)
            control.should_log = due_to_log  # writing the scores to the log cleared it, in this process alone

    def score(self, step: int) -> DevScore:
        training = self.prepared.training
        result = self.dev.score(training)
        log.info(
            "step %d: receiver %.1f matched %.1f deranged %.1f", step, result.receiver, result.matched, result.deranged
        )
        earlier = [entry["value"] for at, entry in self.scores.items() if int(at) < step]
        self.scores = {at: entry for at, entry in self.scores.items() if int(at) < step} | {str(step): result.to_dict()}
        if not earlier or result.value > max(earlier):
            keep(self.prepared, self.folder, {"step": step, "dev": result.to_dict()})
        write_json(self.path, self.scores)
        if self.log is not None:
            self.log({f"dev_{name}": value for name, value in result.to_dict().items()})
        return result


def train(config: TrainConfig, *, resume: bool = True, progress: OnProgress | None = None) -> dict[str, Any]:
    """Train a fuser.

    Args:
        config: the run.
        resume: go on from the last checkpoint in ``output_dir`` if there is one.
        progress: called with (stage, done, total) while prompts are prefilled.

    Returns:
        A summary: the chosen fuser's folder, its dev scores, counts and seconds.
    """
    arguments = _arguments(config)
    processes = Processes(arguments.process_index, arguments.world_size)
    prepared = prepare(config, processes)
    if config.fill == "ahead":
        fill(prepared, progress)
    output = Path(config.output_dir)
    if isinstance(prepared.training.fuser, LinearFuser):
        return solve(prepared, output, progress)
    calibrate(prepared)
    if prepared.training.model.receiver.device.type == "cpu":
        keep_freed_memory()
    selection = _Selection(prepared, config.eval_steps or _steps_per_epoch(prepared), output)
    trainer = _trainer(prepared, arguments, selection)
    last = last_complete(output) if resume else None
    outcome = trainer.train(resume_from_checkpoint=last)
    processes.wait()
    if not processes.first:
        return {}
    step, dev = max(selection.scores.items(), key=lambda item: item[1]["value"])
    return _summary(prepared, output, outcome.metrics["train_runtime"], {"step": int(step), "dev": dev})


def solve(prepared: Prepared, output: Path, progress: OnProgress | None = None) -> dict[str, Any]:
    """Fit a linear fuser in closed form and choose its blend on the dev set.

    Raises:
        ConfigError: asked for in several processes. FuserError: too few examples.
    """
    training, config = prepared.training, prepared.config
    fuser: Any = training.fuser
    if prepared.processes.count > 1:
        raise ConfigError("a linear fuser is solved for in one process, in seconds: start it without a launcher.")
    began = time.perf_counter()
    batches = Batches(training, prepared.train, config.batch_size)
    fit(fuser, batches, training.model, ridge=fuser.config.ridge, weight=config.linear_weight, progress=progress)
    seconds = time.perf_counter() - began
    scores: dict[float, DevScore] = {}
    dev = DevSet(prepared.dev, config.batch_size)

    def value(fuser: LinearFuser) -> float:
        blend = float(fuser.gates().max())
        scores[blend] = dev.score(training)
        return scores[blend].value

    blends = choose_blend(fuser, value, progress=progress)
    blend, chosen = max(scores.items(), key=lambda item: (item[1].value, -item[0]))
    keep(prepared, output, {"blends": blends, "blend": blend, "dev": chosen.to_dict()})
    return _summary(prepared, output, seconds, {"blend": blend, "dev": chosen.to_dict()})


def keep(prepared: Prepared, output: Path, facts: dict[str, Any]) -> None:
    """Save the fuser as the best so far, with all that is needed to train it again."""
    fuser = prepared.training.fuser
    fuser.config.training = {
        **facts,
        "config": prepared.config.to_dict(),
        "examples": len(prepared.train),
        "dropped": dict(prepared.dropped),
    }
    fuser.save_pretrained(output / "best")


def _summary(prepared: Prepared, output: Path, seconds: float, facts: dict[str, Any]) -> dict[str, Any]:
    summary = {
        "fuser": str(output / "best"),
        **facts,
        "train_examples": len(prepared.train),
        "dropped": dict(prepared.dropped),
        "train_seconds": round(seconds, 1),
        "prefilled": {"receiver": prepared.receiver_store.computed, "sharer": prepared.sharer_store.computed},
        "processes": prepared.processes.count,
    }
    write_json(output / "summary.json", summary)
    return summary


def _trainer(prepared: Prepared, arguments: TrainingArguments, selection: _Selection) -> FuserTrainer:
    training, config = prepared.training, prepared.config
    training.fuser.train()
    trainer = FuserTrainer(
        model=training,
        args=arguments,
        train_dataset=_Examples(prepared.train),
        data_collator=lambda examples: {"examples": examples},
        callbacks=[_Schedule(training, config.reconstruction_steps), selection, CompleteCheckpoints()],
    )
    selection.log = trainer.log
    if isinstance(training.fuser, C2CFuser) and "anneal_steps" not in config.fuser_options:
        # the published schedule ends with the run
        steps = _steps_per_epoch(prepared) * config.epochs if config.max_steps < 0 else config.max_steps
        training.fuser.config.anneal_steps = int(steps)
    return trainer


def _steps_per_epoch(prepared: Prepared) -> int:
    config = prepared.config
    return max(1, len(prepared.train) // (config.batch_size * config.gradient_accumulation))


def prepare(config: TrainConfig, processes: Processes | None = None) -> Prepared:
    """Load models, read data, open the stores.

    Args:
        config: the run.
        processes: this process among those that train together; by default it is alone.

    Raises:
        ConfigError: what the configuration asks for can't be done; says what.
    """
    processes = processes or Processes()
    set_seed(config.seed)
    model = C2CModel.from_models(
        config.receiver,
        config.sharer,
        fuser=config.family,
        layer_map=config.layer_map,
        fuser_options=config.fuser_options,
        dtype=config.dtype,
        device_map=config.device_map,
    )
    data = Path(config.data_dir)
    forbidden = questions([data / name for name in config.exclude])
    rows, dropped = load_rows(config.train, data, config.data_seed, forbidden)
    dev_rows, _ = load_rows(config.dev, data, config.data_seed)
    train_examples, too_long = build_examples(model, rows, config.max_prompt_tokens, config.max_response_tokens)
    dev_examples, _ = build_examples(model, dev_rows, config.max_prompt_tokens, config.max_response_tokens)
    if not train_examples or not dev_examples:
        raise ConfigError(f"no examples are left: {len(train_examples)} to train, {len(dev_examples)} dev; {too_long}.")
    fuser: Any = model.fusers[0].config
    folder = Path(config.store_dir) if config.store_dir else None
    common: dict[str, Any] = {
        "folder": folder,
        "budget": int(config.store_budget_gb * 5e8),
        "batch": config.prefill_batch,
        "writers": processes.count,
    }
    receiver_store = PrefillStore(model.receiver, range(model.receiver.geometry.layers), **common)
    sharer_store = PrefillStore(model.sharers[0], fuser.source_layers, **common)
    if config.shard_sharer and processes.count > 1:
        if folder is None or config.fill != "ahead":
            raise ConfigError("shard_sharer needs store_dir and fill: ahead, so that all processes prefill in step.")
        shard(model.sharers[0])
    training = FuserTraining(model, receiver_store, sharer_store, config.guard_weight)
    return Prepared(
        config,
        training,
        train_examples,
        dev_examples,
        dropped + too_long,
        receiver_store,
        sharer_store,
        processes,
    )


def fill(prepared: Prepared, progress: OnProgress | None = None) -> None:
    """Prefill every prompt that the store does not hold yet; several processes share the work.

    In memory each process keeps its own prompts, so there is nothing to share: they are then computed as they come.
    """
    processes = prepared.processes
    if processes.count > 1 and prepared.config.store_dir is None:
        return
    examples = [*prepared.train, *prepared.dev]
    jobs = {
        "receiver prefill": (prepared.receiver_store, [e.receiver_ids[:-1] for e in examples], False),
        "sharer prefill": (prepared.sharer_store, [e.sharer_ids for e in examples], prepared.config.shard_sharer),
    }
    for stage, (store, prompts, in_step) in jobs.items():
        if in_step and all(ids in store for ids in prompts):  # the folder is shared, so all processes see the same
            continue
        part = processes.part(prompts)
        done = 0
        for count in store.fill(part, compute_all=in_step and processes.count > 1):
            done += count
            if progress is not None and processes.first:
                progress(stage, done, len(part))
    processes.wait()


@torch.no_grad()
def calibrate(prepared: Prepared) -> None:
    """Set the bottleneck fuser's channel statistics from the first examples."""
    fuser = prepared.training.fuser
    if not isinstance(fuser, BottleneckFuser) or prepared.config.calibration <= 0:
        return
    fuser.start_calibration()
    examples = prepared.train[: prepared.config.calibration]
    size = prepared.config.batch_size
    for start in range(0, len(examples), size):
        batch = prepared.training.collate(examples[start : start + size])
        prepared.training.logits(batch, "matched", width=1)
    fuser.finish_calibration()


def _arguments(config: TrainConfig) -> TrainingArguments:
    arguments = TrainingArguments(
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
        seed=config.seed,
        remove_unused_columns=False,
        dataloader_drop_last=True,
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=False,
        use_cpu=config.device_map in (None, "cpu") and not torch.cuda.is_available(),
    )
    # batch_size counts over all processes, so that a result does not depend on how many there are
    share, rest = divmod(config.batch_size, arguments.world_size)
    if rest or share < 1 or (config.guard_weight > 0 and share < 2):
        raise ConfigError(
            f"batch_size {config.batch_size} can't be shared by {arguments.world_size} processes: it must be a "
            "multiple, with at least 2 for each where guard_weight is set (a wrong message is another example's)."
        )
    arguments.per_device_train_batch_size = share
    return arguments
