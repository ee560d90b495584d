"""Training runs: from a configuration to a selected fuser (or its control), resumable at any moment."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState  # type: ignore[import-untyped]
from transformers import set_seed

from c2c.alignment import SpanAligner
from c2c.config import ConfigError
from c2c.data.sources import load_rows, questions
from c2c.fusers.base import AlignedEntries, fuser_hash
from c2c.model import C2CModel
from c2c.training.config import ADAPTER, TrainConfig
from c2c.training.dev_set import DevSet, Selection
from c2c.training.examples import Example, build_examples
from c2c.training.lora import load_adapter_pair, make_adapter_objective
from c2c.training.objective import FuserObjective, Objective
from c2c.training.prefill_store import PrefillStore
from c2c.training.private_context import PrivateContextObjective
from c2c.training.shared_context import SharedContextObjective
from c2c.training.sharer_outputs import with_drafts, with_soft_targets
from c2c.training.trainer import find_checkpoint, make_arguments, make_trainer, record_run
from c2c.utils import OnProgress, write_json

# paths of this machine, which do not belong in a fuser's record
_PATHS = ("data_dir", "output_dir", "store_dir", "report_to")


@dataclass
class Run:
    """A run with its models, rows and stores, before the first step.

    Attributes:
        train: examples to train on.
        dev: examples to select on.
        dropped: rows left out, by reason.
        processes: this process among those that train together (``torchrun``, ``accelerate launch``).
        started_from: hash of the fuser that training starts from, None for a new one.
    """

    config: TrainConfig
    objective: Any
    train: list[Example]
    dev: list[Example]
    dropped: Counter[str]
    processes: PartialState
    started_from: str | None = None

    @property
    def output(self) -> Path:
        """Folder of checkpoints and of what is selected."""
        return Path(self.config.output_dir)

    def keep(self, facts: dict[str, Any]) -> None:
        """Save what is trained as the best so far, with all that is needed to train it again."""
        record = {
            **facts,
            **({"started_from": self.started_from} if self.started_from else {}),
            "config": {key: value for key, value in self.config.to_dict().items() if key not in _PATHS},
            "examples": len(self.train),
            "dropped": dict(self.dropped),
        }
        self.objective.save(self.output / "best", record)

    def summarise(self, seconds: float, facts: dict[str, Any]) -> dict[str, Any]:
        """Write ``summary.json``: the best folder, its dev scores, counts and seconds."""
        summary = {
            self.objective.kind: str(self.output / "best"),
            **facts,
            **self.objective.summary(),
            "train_examples": len(self.train),
            "dropped": dict(self.dropped),
            "train_seconds": round(seconds, 1),
            "processes": self.processes.num_processes,
        }
        write_json(self.output / "summary.json", summary)
        return summary


def train(config: TrainConfig, *, resume: bool = True, progress: OnProgress | None = None) -> dict[str, Any]:
    """Train a fuser; with ``family: adapter`` a receiver-only adapter of its size.

    Goes on from the last checkpoint in ``output_dir``, if there is one and ``resume``. ``progress`` is called with
    (stage, done, total) while prompts are prefilled and after every step.

    Returns:
        A summary: the selected fuser's folder, its dev scores, counts and seconds; empty in all but the first process.
    """
    checkpoint = find_checkpoint(config, resume)
    arguments = make_arguments(config)
    run = prepare(config, arguments.distributed_state)
    first = run.processes.is_main_process
    if config.fill == "ahead":
        fill(run, progress)
    if isinstance(run.objective, FuserObjective) and run.objective.fuser.closed_form:
        return fit(run, progress)
    fresh = checkpoint is None
    useful = fresh and (config.start_from is not None or initialise(run, progress))
    if fresh and first:
        (run.output / "dev.json").unlink(missing_ok=True)  # scores of an earlier run
    every = config.eval_steps or max(1, len(run.train) // (config.batch_size * config.gradient_accumulation))
    selection = Selection(run.objective, DevSet(run.dev, config.batch_size), every, run.output, run.keep)
    trainer = make_trainer(run.objective, run.train, arguments, selection, progress)
    if first:
        record_run(config)
        if useful:
            selection.score(0)  # what training must beat, and what is kept if it does not
    outcome = trainer.train(resume_from_checkpoint=checkpoint)
    run.processes.wait_for_everyone()
    return run.summarise(outcome.metrics["train_runtime"], selection.best) if first else {}


def prepare(config: TrainConfig, processes: PartialState | None = None) -> Run:
    """Load models, read rows, open the stores; ``processes`` are by default as the environment says.

    Raises:
        ConfigError: the configuration asks for something that can't be done; says what.
    """
    processes = processes or PartialState(cpu=config.device_map in (None, "cpu"))
    set_seed(config.seed)
    pair: Any = load_adapter_pair(config) if config.family == ADAPTER else _load_pair(config)
    examples, dev, dropped = _read_examples(config, pair)
    objective: Objective
    if config.family == ADAPTER:
        objective = make_adapter_objective(config, pair)
    else:
        objective = _fuser_objective(config, pair, processes.num_processes)
    objective.precision = config.precision
    started_from = None if config.start_from is None else fuser_hash(config.start_from)
    return Run(config, objective, examples, dev, dropped, processes, started_from)


def fill(run: Run, progress: OnProgress | None = None) -> None:
    """Prefill every prompt that the stores do not hold yet, after the drafts; several processes share the work.

    In memory each process keeps its own prompts, so there is nothing to share: they are then computed when they are
    needed. Progress is counted in tokens, which the time left can be estimated from.
    """
    objective, config, processes = run.objective, run.config, run.processes
    if not isinstance(objective, FuserObjective):
        return
    first = progress if processes.is_main_process else None
    sharer, store = objective.model.sharers[0], objective.sharer_store
    run.train, run.dev = (with_drafts(examples, sharer, store, first) for examples in (run.train, run.dev))
    examples = [*run.train, *run.dev]
    if processes.num_processes == 1 or config.store_dir is not None:
        stores = {
            "receiver prefill": (
                objective.receiver_store,
                [e.receiver_prefix for e in examples if not objective.receiver_store.depends(len(e.receiver_ids))],
            ),
            "sharer prefill": (store, [example.sharer_ids for example in examples]),
        }
        if objective.receiver.left_out:  # runs in each step, see FuserObjective
            del stores["receiver prefill"]
        for stage, (target, prompts) in stores.items():
            ordered = sorted(prompts, key=len)  # so that all processes get as much
            report = None if first is None else partial(first, f"{stage} (tokens)")
            target.fill(ordered[processes.process_index :: processes.num_processes], report)
        processes.wait_for_everyone()
    if config.soft_targets > 0 and not objective.model.private:
        run.train = with_soft_targets(run.train, sharer, store, config.soft_temperature, first)
    if all(example.sharer_ids in store for example in examples):
        sharer.release()  # from now on only the receiver runs


def initialise(run: Run, progress: OnProgress | None = None) -> bool:
    """Initialise a new fuser from entries of training prompts.

    Returns:
        Whether it is of use already, see :meth:`c2c.fusers.Fuser.initialise_from_data`.
    """
    if not isinstance(run.objective, FuserObjective):
        return False
    objective, fuser, size = run.objective, run.objective.fuser, run.config.batch_size
    examples = run.train if fuser.closed_form else run.train[: run.config.calibration]
    if objective.model.private:  # each passage once, whatever the number of its questions
        examples = list({tuple(example.sharer_ids): example for example in examples}.values())

    def data() -> Iterator[AlignedEntries]:
        for start in range(0, len(examples), size):
            yield from objective.observe(examples[start : start + size], run.config.linear_weight)
            if progress is not None:
                progress("initialisation", min(start + size, len(examples)), len(examples))

    return bool(examples) and fuser.initialise_from_data(data())


def fit(run: Run, progress: OnProgress | None = None) -> dict[str, Any]:
    """Fit a fuser in closed form, and tune it on the dev set.

    Raises:
        ConfigError: in several processes. FuserError: too few examples.
    """
    if run.processes.num_processes > 1:
        raise ConfigError("a fuser in closed form is fitted by one process, in seconds: start it without a launcher.")
    began = time.perf_counter()
    initialise(run, progress)
    seconds = time.perf_counter() - began
    dev, scores = DevSet(run.dev, run.config.batch_size), list[dict[str, float]]()

    def score() -> float:
        scores.append(dev.score(run.objective))
        return scores[-1]["value"]

    tuned = run.objective.fuser.tune(score)
    best = max(scores or [dev.score(run.objective)], key=lambda entry: entry["value"])
    facts = {**tuned, "dev": best}
    run.keep(facts)
    return run.summarise(seconds, facts)


def _load_pair(config: TrainConfig) -> C2CModel:
    """Load the pair with a new fuser, or with the one that training starts from."""
    options: Any = {name: getattr(config, name) for name in ("dtype", "sharer_dtype", "device_map")}
    if config.start_from is None:
        return C2CModel.from_models(
            config.receiver,
            config.sharer,
            fuser=config.family,
            layer_map=config.layer_map,
            aligner=SpanAligner(cue=config.sharer_cue),
            fuser_options=config.fuser_options,
            **options,
        )
    model = C2CModel.from_pretrained(config.start_from, receiver=config.receiver, sharer=config.sharer, **options)
    names = [str(fuser.family) for fuser in model.fusers]
    if names != [config.family]:
        raise ConfigError(
            f"start_from: {config.start_from} holds {' and '.join(names)}; expected one fuser of family "
            f"{config.family!r}."
        )
    return model


def _fuser_objective(config: TrainConfig, model: C2CModel, writers: int) -> FuserObjective:
    fuser: Any = model.fusers[0]
    options: dict[str, Any] = {
        "folder": Path(config.store_dir) if config.store_dir else None,
        "budget": int(config.store_budget_gb * 5e8),
        "batch": config.prefill_batch,
        "writers": writers,
    }
    kind = PrivateContextObjective if model.private else SharedContextObjective
    objective: FuserObjective = kind(
        model,
        PrefillStore(model.receiver, range(model.receiver.geometry.layers), **options),
        PrefillStore(model.sharers[0], fuser.config.source_layers, **options),
    )
    objective.guard_weight, objective.soft_targets = config.guard_weight, config.soft_targets
    objective.reconstruction_steps = config.reconstruction_steps
    return objective


def _read_examples(config: TrainConfig, pair: Any) -> tuple[list[Example], list[Example], Counter[str]]:
    """Return the examples to train and to select on, and how many rows were left out, by reason.

    Raises:
        ConfigError: none is left, or fewer than a batch.
    """
    data = Path(config.data_dir)
    excluded = questions([data / name for name in config.exclude])
    rows, dropped = load_rows(config.train, data, config.data_seed, excluded)
    dev_rows, dev_dropped = load_rows(config.dev, data, config.data_seed)
    train, too_long = build_examples(pair, rows, config.max_prompt_tokens, config.max_response_tokens)
    dev, dev_too_long = build_examples(pair, dev_rows, config.max_prompt_tokens, config.max_response_tokens)
    left_out = dropped + too_long
    left_out.update({f"dev: {reason}": count for reason, count in (dev_dropped + dev_too_long).items()})
    if not train or not dev:
        raise ConfigError(f"no examples are left: {len(train)} to train, {len(dev)} dev; left out: {dict(left_out)}.")
    if len(train) < config.batch_size:
        raise ConfigError(
            f"{len(train)} examples to train are less than one batch of {config.batch_size}: give more rows, or a "
            "smaller batch_size."
        )
    return train, dev, left_out
