"""A run before its first step: models loaded, data read, stores opened and filled."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from c2c.alignment import SpanAligner
from c2c.data.formats import load_rows, questions
from c2c.fusers import BottleneckFuser, MemoryFuser
from c2c.fusers.base import fuser_hash
from c2c.model import C2CModel
from c2c.training.beliefs import with_beliefs
from c2c.training.config import ConfigError, TrainConfig
from c2c.training.distributed import Processes
from c2c.training.drafts import with_drafts
from c2c.training.examples import build_examples
from c2c.training.objective import Objective
from c2c.training.private import PrivateTraining, build_private_examples
from c2c.training.step import FuserTraining
from c2c.training.store import PrefillStore
from c2c.training.warm_start import warm_start
from c2c.utils import OnProgress

# where things lay on this machine, which is nobody else's business
PLACES = ("data_dir", "output_dir", "store_dir", "report_to")


@dataclass
class Prepared:
    """A run with its models, data and stores, before the first step.

    Attributes:
        config: the run.
        training: what is trained.
        train: examples to train on.
        dev: examples to choose on.
        dropped: rows left out, by reason.
        receiver_store: the receiver's prefills.
        sharer_store: the sharer's.
        processes: this process among those that train together.
        started_from: hash of the fuser that training goes on from, None for a new one.
    """

    config: TrainConfig
    training: Objective
    train: list[Any]
    dev: list[Any]
    dropped: Counter[str]
    receiver_store: PrefillStore
    sharer_store: PrefillStore
    processes: Processes
    started_from: str | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the data."""
        return max(1, len(self.train) // (self.config.batch_size * self.config.gradient_accumulation))

    def keep(self, output: Path, facts: dict[str, Any]) -> None:
        """Save the fuser as the best so far, with all that is needed to train it again."""
        fuser = self.training.fuser
        fuser.config.training = {
            **facts,
            **({"started_from": self.started_from} if self.started_from else {}),
            "config": {key: value for key, value in self.config.to_dict().items() if key not in PLACES},
            "examples": len(self.train),
            "dropped": dict(self.dropped),
        }
        fuser.save_pretrained(output / "best")


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
    model = _load(config)
    build = build_private_examples if model.private else build_examples
    train_examples, dev_examples, dropped = read_examples(config, model, build)
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
    kind = PrivateTraining if model.private else FuserTraining
    training = kind(model, receiver_store, sharer_store, config.guard_weight)
    training.soft_targets = config.soft_targets
    training.precision = config.precision
    return Prepared(
        config,
        training,
        train_examples,
        dev_examples,
        dropped,
        receiver_store,
        sharer_store,
        processes,
        None if config.start_from is None else fuser_hash(config.start_from),
    )


def _load(config: TrainConfig) -> C2CModel:
    """The pair with a new fuser, or with the one that training goes on from."""
    loading: dict[str, Any] = {
        "dtype": config.dtype,
        "sharer_dtype": config.sharer_dtype,
        "device_map": config.device_map,
    }
    if config.start_from is None:
        return C2CModel.from_models(
            config.receiver,
            config.sharer,
            fuser=config.family,
            layer_map=config.layer_map,
            aligner=SpanAligner(cue=config.sharer_cue),
            fuser_options=config.fuser_options,
            **loading,
        )
    model = C2CModel.from_pretrained(config.start_from, receiver=config.receiver, sharer=config.sharer, **loading)
    fusers: Any = model.fusers
    names = [str(fuser.family) for fuser in fusers]
    if names != [config.family]:
        raise ConfigError(
            f"start_from: {config.start_from} holds {' and '.join(names)}; expected one fuser of family "
            f"{config.family!r}."
        )
    return model


def read_examples(
    config: TrainConfig, pair: Any, build: Callable[..., tuple[list[Any], Counter[str]]]
) -> tuple[list[Any], list[Any], Counter[str]]:
    """The examples to train and to choose on, and how many rows were left out, by reason.

    Args:
        config: the run.
        pair: receiver, sharers and aligner, as in a :class:`~c2c.model.C2CModel`.
        build: makes examples of rows.

    Raises:
        ConfigError: none is left, or fewer than a batch.
    """
    data = Path(config.data_dir)
    rows, dropped = load_rows(config.train, data, config.data_seed, questions([data / name for name in config.exclude]))
    dev_rows, _ = load_rows(config.dev, data, config.data_seed)
    train, too_long = build(pair, rows, config.max_prompt_tokens, config.max_response_tokens)
    dev, _ = build(pair, dev_rows, config.max_prompt_tokens, config.max_response_tokens)
    if not train or not dev:
        raise ConfigError(f"no examples are left: {len(train)} to train, {len(dev)} dev; {too_long}.")
    if len(train) < config.batch_size:
        raise ConfigError(
            f"{len(train)} examples to train are less than one batch of {config.batch_size}: give more rows, or a "
            "smaller batch_size."
        )
    return train, dev, dropped + too_long


def fill(prepared: Prepared, progress: OnProgress | None = None) -> None:
    """Prefill every prompt that the store does not hold yet, after the drafts; several processes share the work.

    In memory each process keeps its own prompts, so there is nothing to share: they are then computed as they come.
    """
    processes = prepared.processes
    prepared.train, prepared.dev = (
        with_drafts(examples, prepared.training, progress if processes.first else None)
        for examples in (prepared.train, prepared.dev)
    )
    if processes.count > 1 and prepared.config.store_dir is None:
        _ask_sharer(prepared, progress)
        return
    examples = [*prepared.train, *prepared.dev]
    jobs = {
        "receiver prefill": (prepared.receiver_store, [e.receiver_prefix for e in examples], False),
        "sharer prefill": (prepared.sharer_store, [e.sharer_ids for e in examples], False),
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
    _ask_sharer(prepared, progress)
    if all(example.sharer_ids in prepared.sharer_store for example in examples):
        prepared.training.model.sharers[0].release()  # from now on only the receiver runs


def _ask_sharer(prepared: Prepared, progress: OnProgress | None) -> None:
    """Soft targets, while the sharer still has its weights."""
    config = prepared.config
    if config.soft_targets > 0 and not prepared.training.model.private:
        prepared.train = with_beliefs(prepared.train, prepared.training, config.soft_temperature, progress)


@torch.no_grad()
def calibrate(prepared: Prepared, progress: OnProgress | None = None) -> None:
    """Start where data says: channel statistics of a bottleneck fuser, the affine map of a memory fuser."""
    fuser = prepared.training.fuser
    examples = prepared.train[: prepared.config.calibration]
    if isinstance(fuser, MemoryFuser) and examples:
        warm_start(fuser, prepared.training, examples, progress=progress)
    if not isinstance(fuser, BottleneckFuser) or not examples:
        return
    fuser.start_calibration()
    size = prepared.config.batch_size
    for start in range(0, len(examples), size):
        batch = prepared.training.collate(examples[start : start + size])
        prepared.training.logits(batch, "matched", width=1)
    fuser.finish_calibration()
