"""``train``: from a configuration to a chosen fuser, resumable at any moment."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from c2c.fusers import LinearFuser, MemoryFuser
from c2c.heap import ask_for_large_pages, keep_freed_memory
from c2c.training.adapter import train_adapter
from c2c.training.checkpoints import find_start, note_run
from c2c.training.config import ADAPTER, ConfigError, TrainConfig
from c2c.training.distributed import Processes
from c2c.training.prepared import Prepared, calibrate, fill, prepare
from c2c.training.ridge import Batches, choose_blend, fit
from c2c.training.selection import DevScore, DevSet
from c2c.training.trainer import Selection, make_arguments, make_trainer
from c2c.utils import OnProgress, write_json


def train(config: TrainConfig, *, resume: bool = True, progress: OnProgress | None = None) -> dict[str, Any]:
    """Train a fuser; with ``family: adapter`` a receiver-only adapter of its size.

    Args:
        config: the run.
        resume: go on from the last checkpoint in ``output_dir`` if there is one.
        progress: called with (stage, done, total) while prompts are prefilled and after every step.

    Returns:
        A summary: the chosen fuser's folder, its dev scores, counts and seconds.
    """
    if config.family == ADAPTER:
        return train_adapter(config, resume=resume, progress=progress)
    last = find_start(config, resume)
    arguments = make_arguments(config)
    processes = Processes(arguments.process_index, arguments.world_size)
    ask_for_large_pages()
    prepared = prepare(config, processes)
    if config.fill == "ahead":
        fill(prepared, progress)
    output = Path(config.output_dir)
    if isinstance(prepared.training.fuser, LinearFuser):
        return solve(prepared, output, progress)
    if last is None and config.start_from is None:  # else it was calibrated when it began
        calibrate(prepared, progress)
    if prepared.training.model.receiver.device.type == "cpu":
        keep_freed_memory()
    selection = Selection(prepared, config.eval_steps or prepared.steps_per_epoch, output)
    trainer = make_trainer(prepared, arguments, selection, progress)
    if processes.first:
        note_run(config)
    begun = isinstance(prepared.training.fuser, MemoryFuser) or config.start_from is not None
    if last is None and processes.first and begun:
        selection.score(0)  # the ridge map or trained fuser that training must beat, and that is kept if it does not
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
    training: Any = prepared.training
    config = prepared.config
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
    prepared.keep(output, {"blends": blends, "blend": blend, "dev": chosen.to_dict()})
    return _summary(prepared, output, seconds, {"blend": blend, "dev": chosen.to_dict()})


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
