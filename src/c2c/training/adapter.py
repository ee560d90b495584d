"""Training a receiver-only adapter: the control that a fuser of equal size on the same rows is compared with.

The rows, their order, the batches and the weights of tokens are those of the fuser's run. An adapter changes every
layer, so that no prefill can be stored: each step runs the receiver over whole sequences.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, TrainingArguments, set_seed

from c2c.alignment import Aligner, SpanAligner
from c2c.fusers import family
from c2c.heap import ask_for_large_pages, keep_freed_memory
from c2c.language_model import LanguageModel, Receiver, Sharer
from c2c.layer_map import layer_map
from c2c.prefill import logits_after
from c2c.systems.lora import MANIFEST, nearest_rank, new_adapter, restore_adapter, save_adapter, trainable
from c2c.tokens import TokenBatch, left_pad
from c2c.training.checkpoints import CompleteCheckpoints, find_start, note_run
from c2c.training.config import ConfigError, Precision, TrainConfig
from c2c.training.distributed import Processes
from c2c.training.examples import Example, build_examples
from c2c.training.objective import computing_in, cross_entropy, right_pad
from c2c.training.prepared import PLACES, read_examples
from c2c.training.selection import answered_right
from c2c.training.trainer import FuserTrainer, Report, Selection, make_arguments
from c2c.utils import OnProgress, write_json

log = logging.getLogger("c2c.training")


@dataclass(frozen=True)
class Tokenizers:
    """A pair of which only the receiver runs: what examples are built with."""

    receiver: LanguageModel
    sharers: Sequence[LanguageModel]
    aligner: Aligner


@dataclass(frozen=True)
class AdapterBatch:
    """Examples as the receiver reads them: prompts left-padded, responses right-padded.

    Attributes:
        examples: the examples, in order.
        prompt: the receiver's prompts.
        responses: ids to learn, ``[batch, response]``, -100 on padding.
        weights: what each of them counts in the loss, ``[batch, response]``, 0 on padding.
    """

    examples: Sequence[Example]
    prompt: TokenBatch
    responses: Tensor
    weights: Tensor


class AdapterTraining(nn.Module):
    """The receiver with its adapter: what the Trainer trains.

    Args:
        adapter: from :func:`~c2c.systems.lora.new_adapter`.
        precision: of the arithmetic, see :class:`~c2c.training.config.TrainConfig`.
    """

    def __init__(self, adapter: Any, precision: Precision = "float32") -> None:
        super().__init__()
        self.adapter, self.precision = adapter.eval(), precision
        self.accepts_loss_kwargs = False

    def train(self, mode: bool = True) -> AdapterTraining:
        """Note the mode; the receiver stays in ``eval()`` as it does beside a fuser."""
        self.training = mode
        return self

    def forward(self, examples: Sequence[Example], share: float = 1.0) -> dict[str, Tensor]:
        """The mean loss of some examples, times their share of a batch."""
        batch = self.collate(examples)
        with computing_in(self.precision, batch.responses.device):
            return {"loss": share * self.losses(self.logits(batch), batch).mean()}

    def collate(self, examples: Sequence[Example]) -> AdapterBatch:
        """Pad."""
        device = self.adapter.get_base_model().device
        return AdapterBatch(
            examples,
            left_pad([example.receiver_ids for example in examples], 0).to(device),
            right_pad([example.response_ids for example in examples], -100).to(device),
            right_pad([example.weights for example in examples], 0.0).to(device),
        )

    def losses(self, logits: Tensor, batch: AdapterBatch) -> Tensor:
        """Loss of each example's response, its tokens weighted by ``Example.weights``; ``[batch]``."""
        return (cross_entropy(logits, batch.responses) * batch.weights).sum(-1)

    def logits(self, batch: AdapterBatch) -> Tensor:
        """Predictions of the response tokens and of nothing else, ``[batch, response, vocab]``."""
        prompt, read = batch.prompt, batch.responses[:, :-1]
        padded = prompt.padded or bool((read == -100).any())
        after = prompt.positions[:, -1:] + 1 + torch.arange(read.shape[1], device=read.device)
        return logits_after(
            self.adapter.get_base_model(),
            torch.cat([prompt.ids, read.clamp_min(0)], dim=1),
            torch.cat([prompt.mask, read != -100], dim=1) if padded else None,
            torch.cat([prompt.positions, after], dim=1),
            None,
            keep=batch.responses.shape[1],
        )


@dataclass
class PreparedAdapter:
    """An adapter's run before its first step.

    Attributes:
        config: the run.
        receiver: the model that the adapter is in.
        training: what is trained.
        train: the fuser's examples.
        dev: the fuser's dev examples.
        dropped: rows left out, by reason.
        rank: of the adapter.
        matched: the fuser whose size it has: ``family`` and ``parameters``.
    """

    config: TrainConfig
    receiver: LanguageModel
    training: AdapterTraining
    train: list[Example]
    dev: list[Example]
    dropped: Counter[str]
    rank: int
    matched: dict[str, Any]

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the data."""
        return max(1, len(self.train) // (self.config.batch_size * self.config.gradient_accumulation))

    @property
    def parameters(self) -> int:
        """Size of the adapter."""
        return sum(parameter.numel() for parameter in trainable(self.training.adapter))

    @property
    def piece(self) -> int:
        """Examples that run at once: on a CPU few, which need little padding, and are as quick per token."""
        if self.receiver.device.type != "cpu":
            return self.config.batch_size
        return min(1 if self.config.precision == "float32" else 4, self.config.batch_size)

    def keep(self, output: Path, facts: dict[str, Any]) -> None:
        """Save the adapter as the best so far, with all that is needed to train it again."""
        training = {
            **facts,
            "config": {key: value for key, value in self.config.to_dict().items() if key not in PLACES},
            "examples": len(self.train),
            "dropped": dict(self.dropped),
        }
        save_adapter(
            self.training.adapter, self.receiver, output / "best", {"matched": self.matched, "training": training}
        )


def prepare_adapter(config: TrainConfig) -> PreparedAdapter:
    """Load the receiver, read the fuser's data, and add an adapter of the fuser's size.

    Raises:
        ConfigError: what the configuration asks for can't be done; says what.
        AdapterError: an impossible rank; ``peft`` is missing.
    """
    receiver = Receiver.from_pretrained(config.receiver, dtype=config.dtype, device_map=config.device_map)
    sharer = _without_weights(config.sharer)
    train, dev, dropped = read_examples(
        config, Tokenizers(receiver, [sharer], SpanAligner(cue=config.sharer_cue)), build_examples
    )
    size = fuser_parameters(config, receiver, sharer)
    rank = nearest_rank(receiver.model, size) if config.adapter_rank is None else config.adapter_rank
    set_seed(config.seed)
    training = AdapterTraining(new_adapter(receiver, rank), config.precision)
    matched = {"family": config.adapter_of, "parameters": size}
    prepared = PreparedAdapter(config, receiver, training, train, dev, dropped, rank, matched)
    log.info("adapter of rank %d: %d parameters; the fuser has %d", rank, prepared.parameters, size)
    return prepared


def fuser_parameters(config: TrainConfig, receiver: LanguageModel, sharer: LanguageModel) -> int:
    """How many parameters the fuser of a configuration has, ``adapter_of`` being its family.

    Raises:
        ConfigError: a fuser of private context: its receiver has not read what an adapter would learn from.
        FuserError: no such family.
    """
    kind = family(config.adapter_of)
    if kind.context != "shared":
        raise ConfigError(
            f"adapter_of is {config.adapter_of!r}, a fuser of private context; there is no control for it."
        )
    layers = layer_map(config.layer_map, receiver.geometry.layers, sharer.geometry.layers)
    with torch.device("meta"):
        fuser = kind.from_geometry(sharer.geometry, receiver.geometry, layers, **config.fuser_options)
    return sum(parameter.numel() for parameter in fuser.parameters())


def _without_weights(name: str) -> Sharer:
    """A sharer's tokenizer and geometry, without its weights in memory."""
    if not name.endswith(".gguf"):
        return Sharer.from_pretrained(name, device_map="meta")
    sharer = Sharer.from_pretrained(name)
    sharer.release()
    return sharer


@dataclass(frozen=True)
class AdapterScore:
    """Accuracy on a dev set in percent, by the same rule as a fuser's.

    Attributes:
        n: examples.
        receiver: the receiver alone.
        adapter: the receiver with its adapter.
        loss: mean loss with the adapter.
    """

    n: int
    receiver: float
    adapter: float
    loss: float

    @property
    def value(self) -> float:
        """What checkpoints are chosen by."""
        return self.adapter

    def to_dict(self) -> dict[str, float]:
        """Plain data."""
        return asdict(self) | {"G": self.adapter - self.receiver, "value": self.value}


@torch.no_grad()
def score(
    training: AdapterTraining, examples: Sequence[Example], piece: int, *, alone: bool = False
) -> tuple[float, float]:
    """Accuracy in percent and mean loss on a dev set.

    Args:
        training: the receiver with its adapter.
        examples: the dev set.
        piece: examples that run at once.
        alone: turn the adapter off.
    """
    hits, loss = 0.0, 0.0
    with training.adapter.disable_adapter() if alone else contextlib.nullcontext():
        for part in pieces(examples, piece):
            batch: Any = training.collate(part)
            logits = training.logits(batch)
            hits += sum(answered_right(logits, batch))
            loss += float(training.losses(logits, batch).sum())
    return 100 * hits / len(examples), loss / len(examples)


def pieces(examples: Sequence[Example], size: int) -> list[list[Example]]:
    """Parts of a batch with sequences of similar length, so that little goes into padding."""
    ordered = sorted(examples, key=lambda example: len(example.receiver_ids) + len(example.response_ids))
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


class AdapterSelection(Selection):
    """Scores the dev set and keeps the most accurate adapter. What was scored before a resume is read back."""

    def __init__(self, prepared: PreparedAdapter, every: int, folder: Path) -> None:
        run: Any = prepared
        super().__init__(run, every, folder)
        self.run = prepared
        self._receiver: float | None = next((entry["receiver"] for entry in self.scores.values()), None)

    def score(self, step: int) -> Any:
        """Score the adapter as it is after ``step``, and keep it if it is the best so far."""
        result = self._measure()
        log.info("step %d: dev receiver %.1f, adapter %.1f", step, result.receiver, result.adapter)
        earlier = {at: entry for at, entry in self.scores.items() if int(at) < step}
        self.scores = earlier | {str(step): result.to_dict()}
        if all(result.value > entry["value"] for entry in earlier.values()):
            self.run.keep(self.folder, {"step": step, "dev": result.to_dict()})
        write_json(self.path, self.scores)
        if self.log is not None:
            self.log({f"dev_{name}": value for name, value in result.to_dict().items()})
        return result

    def _measure(self) -> AdapterScore:
        training, dev, piece = self.run.training, self.run.dev, self.run.piece
        if self._receiver is None:
            self._receiver, _ = score(training, dev, piece, alone=True)
        accuracy, loss = score(training, dev, piece)
        return AdapterScore(len(dev), self._receiver, accuracy, loss)


class AdapterTrainer(FuserTrainer):
    """The Trainer of transformers with a fuser's batches; checkpoints hold the adapter alone.

    Attributes:
        prepared: the run.
    """

    prepared: PreparedAdapter

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """A batch in pieces: the activations of one piece are in memory at a time."""
        examples = inputs["examples"]
        total = torch.zeros((), device=self.args.device)
        for piece in pieces(examples, self.prepared.piece):
            part = {"examples": piece, "share": len(piece) / len(examples)}
            total += super().training_step(model, part, num_items_in_batch)
        return total

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir or ".")
        save_adapter(self.prepared.training.adapter, self.prepared.receiver, folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        restore_adapter(self.prepared.training.adapter, Path(resume_from_checkpoint))


def make_adapter_trainer(
    prepared: PreparedAdapter,
    arguments: TrainingArguments,
    selection: AdapterSelection,
    progress: OnProgress | None = None,
) -> AdapterTrainer:
    """The Trainer of a prepared run."""
    trainer = AdapterTrainer(
        model=prepared.training,
        args=arguments,
        train_dataset=prepared.train,
        data_collator=lambda examples: {"examples": examples},
        callbacks=[selection, CompleteCheckpoints(), Report(progress)],
    )
    trainer.prepared = prepared
    trainer.remove_callback(PrinterCallback)
    selection.log = trainer.log
    return trainer


def train_adapter(config: TrainConfig, *, resume: bool = True, progress: OnProgress | None = None) -> dict[str, Any]:
    """Train an adapter; arguments as in :func:`c2c.training.train`.

    Returns:
        A summary: the chosen adapter's folder, its dev scores, size, counts and seconds.
    """
    if config.adapter_learning_rate <= 0:
        raise ConfigError(f"adapter_learning_rate is {config.adapter_learning_rate}; expected a number above 0.")
    output = Path(config.output_dir)
    last = find_start(config, resume)
    if last is not None and not (Path(last) / MANIFEST).exists():
        raise ConfigError(f"{last} is not an adapter's: give the adapter an output_dir (--output-dir) of its own.")
    # the guard is about wrong messages, and here are none
    arguments = make_arguments(
        dataclasses.replace(config, learning_rate=config.adapter_learning_rate, guard_weight=0.0)
    )
    processes = Processes(arguments.process_index, arguments.world_size)
    ask_for_large_pages()
    prepared = prepare_adapter(config)
    if prepared.receiver.device.type == "cpu":
        keep_freed_memory()
    selection = AdapterSelection(prepared, config.eval_steps or prepared.steps_per_epoch, output)
    if processes.first:
        note_run(config)
    trainer = make_adapter_trainer(prepared, arguments, selection, progress)
    outcome = trainer.train(resume_from_checkpoint=last)
    processes.wait()
    if not processes.first:
        return {}
    step, dev = max(selection.scores.items(), key=lambda item: item[1]["value"])
    facts = {"step": int(step), "dev": dev, "processes": processes.count}
    return _summary(prepared, output, outcome.metrics["train_runtime"], facts)


def _summary(prepared: PreparedAdapter, output: Path, seconds: float, facts: dict[str, Any]) -> dict[str, Any]:
    summary = {
        "adapter": str(output / "best"),
        **facts,
        "rank": prepared.rank,
        "parameters": prepared.parameters,
        "matched": prepared.matched,
        "train_examples": len(prepared.train),
        "dropped": dict(prepared.dropped),
        "train_seconds": round(seconds, 1),
    }
    write_json(output / "summary.json", summary)
    return summary
