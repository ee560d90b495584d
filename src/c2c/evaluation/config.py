"""The configuration of an evaluation. Help of a field is also that of its command-line option; imports no torch."""

# ruff: noqa: RUF009 - option() returns a dataclass field
from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from c2c.config import ConfigError, as_list, build, check_values, option, read_yaml
from c2c.data.config import DataSource
from c2c.errors import C2CError, did_you_mean
from c2c.evaluation.tasks import source
from c2c.utils import check_writable

Mode = Literal["logits", "generate", "answers", "nll"]
DEFAULT_SYSTEMS = ("receiver", "sharer", "matched", "deranged", "zero")
ROUTER = "router"  # picks one of two systems' answers, and so is no system of its own
# Systems of one kind of context only.
SHARED_SYSTEMS = ("text", "text_published", "adapter", "untrained", ROUTER)
THINKING_SYSTEMS = ("think", "think_deranged", "think_filler", "think_zero")
PRIVATE_SYSTEMS = ("reader", "draft", "draft_deranged", "draft_text", "summary", *THINKING_SYSTEMS)
_WITH_LOSS = ("receiver", "matched", "deranged", "zero", "untrained")  # a loss over the receiver's own tokens
# Differences between two systems, by their letter.
DIFFERENCES = {
    "G": ("matched", "receiver"),
    "P": ("matched", "deranged"),
    "S": ("matched", "sharer"),
    "T": ("matched", "text"),
    "A": ("matched", "adapter"),
    "Z": ("matched", "zero"),
    "D": ("deranged", "receiver"),
}
# Parts of the seconds of an answer, in the order in which they pass.
STAGES = ("sharer_prefill", "sharer_decode", "receiver_prefill", "fuse", "decode")


class EvaluationError(C2CError, ValueError):
    """An evaluation that can't be run as configured."""


@dataclass(frozen=True)
class EvalConfig:
    """One evaluation.

    Raises:
        EvaluationError: unknown or impossible systems, an unknown mode, no data, or numbers out of range.
        ConfigError: values of other types.
    """

    fuser: str = field(metadata={"help": "Folder or hub id of the fuser."})
    data: list[DataSource] = field(metadata={"help": "Items to evaluate on.", "cli": False})
    systems: tuple[str, ...] = option(
        DEFAULT_SYSTEMS, "Systems of c2c.systems, router, and names in fusers.", cli=False
    )
    mode: Mode = option(
        "logits",
        "logits compares the options' tokens, generate reads the letter from a generated text, answers compares "
        "generated texts with references (token F1, exact match), nll measures the reference's loss.",
    )
    fusers: dict[str, str] = option({}, "Further fusers as systems, name to folder.", cli=False)
    adapter: str | None = option(None, "Folder of the receiver's LoRA adapter, for the system adapter.")
    dev: list[DataSource] = option([], "Items that the router is fitted on; never reported.", cli=False)
    routed: float = option(0.5, "Share of the questions that the router sends to the sharer.")
    timed: int = option(0, "Items of each source that are also answered one by one to measure the cost.")
    data_dir: str = option(".", "Folder that tasks and relative paths start from.")
    limit: int | None = option(None, "At most this many items per source, drawn with seed.")
    seed: int = option(0, "Seed of the draw and of the bootstrap.", min=0)
    batch_size: int = option(8, "Items at a time; a deranged cache is from the same batch.")
    max_new_tokens: int = option(32, "Longest generated answer, in tokens.", min=1)
    message_tokens: int = option(256, "Longest text of the sharer in text-to-text, in tokens; 256 as published.", min=1)
    draft_tokens: int = option(64, "Longest draft of the sharer, in tokens.", min=1)
    think: int = option(20, "Thinking steps of the sharer.", min=1)
    realign: str = option("soft", "How its states become inputs: none, norm, ridge or soft.")
    receiver: str | None = option(None, "Receiver in place of the recorded one.")
    sharer: str | None = option(None, "Sharer in place of the recorded one.")
    output_dir: str | None = option(None, "Folder of the records and the result; an interrupted run there is resumed.")
    reuse: str | None = option(None, "output_dir of another fuser's evaluation, for answers that need no fuser.")
    store_dir: str | None = option(None, "Folder of a prefill store to use and fill.")
    store_budget_gb: float = option(20.0, "Size of the prefill store in GB.", min=0)
    dtype: str | None = option(None, "Type of the models' weights; by default float32 on a CPU, else as stored.")
    sharer_dtype: str | None = option(None, "Type of the sharer's weights, if another.")
    device_map: str | None = option(None, "As in from_pretrained of transformers.")

    def __post_init__(self) -> None:
        """Refuse what can't be run."""
        check_values(self, skip=["mode"])
        from c2c.systems import systems  # imports torch

        modes, known = get_args(Mode), {*systems(), ROUTER, *self.fusers}
        unknown = [name for name in self.systems if system_kind(name) not in known]
        hints = "".join(did_you_mean(name, known - set(self.systems)) for name in unknown)
        removed = " abstain is no longer there." if "abstain" in unknown else ""
        taken = [name for name in self.fusers if name in (*systems(), ROUTER)]
        without_loss = [name for name in self.systems if name not in (*_WITH_LOSS, *self.fusers)]
        missing = [name for name in ("receiver", "sharer") if name not in self.systems] + ["dev data"] * (not self.dev)
        problems = {
            "no data to evaluate on: give at least one file or task": not self.data,
            f"unknown mode {self.mode!r}.{did_you_mean(self.mode, modes)} Known: {', '.join(modes)}": (
                self.mode not in modes
            ),
            f"batch_size is {self.batch_size}; give at least 2: a deranged cache is another item's": (
                self.batch_size < 2
            ),
            f"limit is {self.limit}; give at least 2 items, one for another's deranged cache, or no limit": (
                self.limit is not None and self.limit < 2
            ),
            f"routed is {self.routed} (a share, 0 to 1) and timed {self.timed} (0 or more)": (
                not 0 <= self.routed <= 1 or self.timed < 0
            ),
            f"{f'unknown systems {unknown}.' if unknown else 'no system was given.'}{hints}{removed} Known: "
            f"{', '.join(sorted(known))}; others are named by a fuser: NAME=FOLDER": bool(unknown) or not self.systems,
            f"{', '.join(taken)}: a further fuser can't have the name of a system": bool(taken),
            "the system 'adapter' needs the folder of an adapter: see `c2c train --family`": (
                "adapter" in self.systems and self.adapter is None
            ),
            "mode 'nll' compares losses over the receiver's tokens, which these do not share or do not have: leave "
            f"{', '.join(without_loss)} out of the systems": self.mode == "nll" and bool(without_loss),
            "the router picks between receiver and sharer with a rule fitted on dev items: add "
            f"{', '.join(missing)}": ROUTER in self.systems and bool(missing),
        }
        for problem, found in problems.items():
            if found:
                raise EvaluationError(f"{problem}.")


@dataclass(frozen=True)
class HarnessConfig:
    """One run of the lm-evaluation-harness; see ``c2c lm-eval``."""

    fuser: str = field(metadata={"help": "Folder or hub id of the fuser."})
    tasks: str = field(metadata={"help": "Names of tasks or groups, or task files, with commas."})
    system: str = option("matched", "receiver, sharer, matched, deranged; several with commas.")
    limit: float | None = option(None, "Documents per task; below 1 a share of them.", min=0)
    num_fewshot: int | None = option(
        None, "Examples in the prompt, in place of the task's number unless that is 0.", min=0
    )
    apply_chat_template: bool = option(
        False, "Render messages, each model with its own template.", flag="--apply-chat-template"
    )
    system_instruction: str | None = option(None, "System message, or text before the prompt.")
    gen_kwargs: str | None = option(None, "For generation: max_gen_toks=64,do_sample=True,...")
    batch_size: int = option(8, "Contexts, and continuations, at a time.", min=1)
    max_length: int | None = option(None, "Truncate contexts to this many tokens.", min=2)
    include_path: list[str] = option([], "Folder with task files; may be repeated.")
    output: str | None = option(None, "File for the result, as JSON.")
    log_samples: bool = option(False, "Every request and answer in the output file.", flag="--log-samples")
    receiver: str | None = option(None, "Receiver in place of the recorded one.")
    sharer: str | None = option(None, "Sharer in place of the recorded one.")
    dtype: str | None = option(None, "Type of the models' weights.")
    device_map: str | None = option(None, "As in from_pretrained of transformers.")

    def __post_init__(self) -> None:
        """Check the values; raise ConfigError for impossible ones."""
        check_values(self)
        if self.limit is not None and (self.limit == 0 or (self.limit > 1 and self.limit % 1)):
            raise ConfigError(f"limit is {self.limit:g}; expected a whole number from 1 on, or a share below 1.")
        if self.gen_kwargs and not all("=" in part for part in self.gen_kwargs.split(",")):
            raise ConfigError(
                f"gen_kwargs is {self.gen_kwargs!r:.80}; expected such as max_gen_toks=64,do_sample=True."
            )
        if self.output is not None:
            place = Path(self.output).absolute()
            if place.is_dir():
                raise ConfigError(f"output is {self.output!r}, a folder; expected a file for the result.")
            check_writable(place.parent, "the folder of output", ConfigError)


def system_kind(name: str) -> str:
    """Return the name under which a system is registered: ``summary`` for ``summary_50``."""
    return re.sub(r"_\d+$", "", name)


def load_eval_config(path: str | Path | None, **overrides: Any) -> EvalConfig:
    """Read an evaluation from a YAML file, or make one of the overrides alone.

    Args:
        path: the file; keys are those of :class:`EvalConfig`. Entries of ``data`` and ``dev`` are sources, or name a
            task: ``{task: openbookqa, limit: 300}``.
        **overrides: values that replace those of the file; None is ignored.

    Raises:
        ConfigError: not a mapping, an unknown key or task, or a missing key. EvaluationError: impossible values.
    """
    where = "options" if path is None else str(path)
    data = {} if path is None else read_yaml(Path(path))
    data |= {key: value for key, value in overrides.items() if value is not None}
    given = data.get("data_dir")
    folder = Path(given if isinstance(given, str | Path) else ".")  # another type is refused below
    for name in ("data", "dev"):
        place = f"{where}: {name}"
        data[name] = [source(entry, folder, place) for entry in as_list(data.get(name), place)]
    if isinstance(data.get("systems"), list):
        data["systems"] = tuple(data["systems"])
    return build(EvalConfig, data, where)
