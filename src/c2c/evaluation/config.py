"""What to evaluate: a fuser, items, systems and how answers are read."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from c2c.config import build, read_yaml
from c2c.data.config import DataSource
from c2c.errors import C2CError, did_you_mean
from c2c.evaluation.tasks import source

# Always there; the others are named in `fusers` or need a setting.
SYSTEMS = (
    "receiver",
    "sharer",
    "matched",
    "deranged",
    "zero",
    "untrained",
    "text",
    "text_published",
    "adapter",
    "router",
    "abstain",
    "reader",
    "draft",
    "draft_deranged",
    "draft_text",
    "summary_50",
    "summary_100",
    "summary_200",
)
# Of a fuser of private context only; and of one of shared context only.
PRIVATE_SYSTEMS = ("reader", "draft", "draft_deranged", "draft_text", "summary_50", "summary_100", "summary_200")
SHARED_SYSTEMS = ("text", "text_published", "adapter", "untrained", "router", "abstain")
DEFAULT_SYSTEMS = ("receiver", "sharer", "matched", "deranged", "zero")
# Made of other systems' answers, with a rule fitted on dev.
DERIVED = {"router": ("receiver", "sharer"), "abstain": ("receiver", "matched")}
# Systems that have a loss over the receiver's own tokens.
_WITH_LOSS = frozenset({"receiver", "matched", "deranged", "zero", "untrained"})
MODES = ("logits", "generate", "answers", "nll")


class EvaluationError(C2CError, ValueError):
    """An evaluation that can't be run as asked."""


@dataclass(frozen=True)
class EvalConfig:
    """One evaluation.

    Attributes:
        fuser: folder or hub id.
        data: the items; multiple choice, or rows with a reference answer for ``nll``.
        systems: any of ``receiver`` (alone), ``sharer`` (alone), ``matched``, ``deranged`` (the sharer cache of
            another item), ``zero`` (a sharer cache of zeros), ``untrained`` (a new fuser of the same shape), ``text``
            and ``text_published`` (the sharer writes, the receiver reads; may say the answer, or must not),
            ``adapter`` (a trained adapter of the receiver, without sharer), ``router`` (each question to one of the
            two models), ``abstain`` (the fused cache only where it seems to help), and the names in ``fusers``. For
            private context, where the sharer alone has read a passage, ``receiver`` and ``matched``, ``deranged`` and
            ``zero`` as above, ``sharer`` (passage and question), ``reader`` (the receiver with the passage in its
            prompt), ``summary_50``, ``_100``, ``_200`` (the receiver with a summary of so many tokens that the sharer
            wrote), ``draft`` (the sharer is asked too, drafts an answer, and hands over its cache of that as well),
            ``draft_deranged`` (another item's), and ``draft_text`` (the receiver reads the draft as text).
        mode: ``logits`` compares the options' tokens at the place of the letter, ``generate`` decodes and reads the
            letter from the text, ``answers`` decodes and compares with the reference answers (token F1, exact match),
            ``nll`` measures the reference answer, in nats per token.
        fusers: further fusers to compare with, name to folder; for instance a linear one, or one that the receiver
            uses with itself as sharer.
        adapter: folder of the receiver's adapter, for the system of that name.
        dev: items that ``router`` and ``abstain`` are fitted on; never those that are reported.
        routed: share of the questions that the router sends to the sharer.
        timed: so many items of each source are also answered one by one, as a user would, to measure seconds, tokens,
            bytes and memory.
        data_dir: folder that paths of the data start from.
        limit: at most this many items of each source, drawn with the seed.
        seed: of the draw and of the bootstrap.
        batch_size: items at a time; a deranged cache comes from the same batch.
        max_new_tokens: of an answer that is generated.
        message_tokens: at most so many tokens from the sharer in text-to-text; 256 as published.
        draft_tokens: at most so many tokens of a draft.
        receiver: in place of the recorded receiver.
        sharer: in place of the recorded sharer.
        output_dir: where per-item outputs and the result go; an unfinished run there is resumed, and systems can be
            added to a finished one. None writes nothing.
        reuse: ``output_dir`` of a finished evaluation with the same models, items and settings, perhaps of another
            fuser: the answers of systems that the fuser takes no part in come from there. What is measured with
            ``timed`` does not.
        store_dir: folder of a prefill store to use and to fill; None keeps nothing.
        store_budget_gb: size of that store.
        dtype: of the models' weights; by default float32 on a CPU, else as stored.
        sharer_dtype: of the sharer's, where it differs.
        device_map: as in ``from_pretrained``.
    """

    fuser: str
    data: list[DataSource]
    systems: tuple[str, ...] = DEFAULT_SYSTEMS
    mode: str = "logits"
    fusers: dict[str, str] = field(default_factory=dict)
    adapter: str | None = None
    dev: list[DataSource] = field(default_factory=list)
    routed: float = 0.5
    timed: int = 0
    data_dir: str = "."
    limit: int | None = None
    seed: int = 0
    batch_size: int = 8
    max_new_tokens: int = 32
    message_tokens: int = 256
    draft_tokens: int = 64
    receiver: str | None = None
    sharer: str | None = None
    output_dir: str | None = None
    reuse: str | None = None
    store_dir: str | None = None
    store_budget_gb: float = 20.0
    dtype: str | None = None
    sharer_dtype: str | None = None
    device_map: str | None = None

    def __post_init__(self) -> None:
        """Refuse what can't be run.

        Raises:
            EvaluationError: unknown or impossible systems, an unknown mode, no data, or numbers out of range.
        """
        if not self.data:
            raise EvaluationError("no data to evaluate on: give at least one file or task.")
        if self.mode not in MODES:
            raise EvaluationError(
                f"unknown mode {self.mode!r}.{did_you_mean(self.mode, MODES)} Known: {', '.join(MODES)}."
            )
        self._check_systems()
        if self.batch_size < 2:
            raise EvaluationError(
                f"batch_size is {self.batch_size}; give at least 2: a deranged cache is another item's."
            )
        if self.limit is not None and self.limit < 2:
            raise EvaluationError(
                f"limit is {self.limit}; give at least 2 items, one for another's deranged cache, or no limit."
            )
        if not 0 <= self.routed <= 1 or self.timed < 0:
            raise EvaluationError(f"routed is {self.routed} (a share, 0 to 1) and timed {self.timed} (0 or more).")

    def _check_systems(self) -> None:
        known = (*SYSTEMS, *self.fusers)
        unknown = [system for system in self.systems if system not in known]
        if unknown or not self.systems:
            hints = "".join(did_you_mean(name, set(known) - set(self.systems)) for name in unknown)
            raise EvaluationError(
                f"{f'unknown systems {unknown}.' if unknown else 'no system was given.'}{hints} Known: "
                f"{', '.join(known)}; others are named by a fuser: NAME=FOLDER."
            )
        taken = [name for name in self.fusers if name in SYSTEMS]
        if taken:
            raise EvaluationError(f"{', '.join(taken)}: a further fuser can't have the name of a system.")
        if "adapter" in self.systems and self.adapter is None:
            raise EvaluationError("the system 'adapter' needs the folder of an adapter: see `c2c train --family`.")
        losses = [system for system in self.systems if system not in _WITH_LOSS and system not in self.fusers]
        if self.mode == "nll" and losses:
            raise EvaluationError(
                "mode 'nll' compares losses over the receiver's tokens, which these do not share or do not have: "
                f"leave {', '.join(losses)} out of the systems."
            )
        for name, parts in DERIVED.items():
            missing = [part for part in parts if part not in self.systems]
            if name in self.systems and (missing or not self.dev):
                raise EvaluationError(
                    f"the system {name!r} is made of {' and '.join(parts)} with a rule fitted on dev items: add "
                    f"{', '.join([*missing, *['dev data'] * (not self.dev)])}."
                )
        if "abstain" in self.systems and self.mode != "logits":
            raise EvaluationError("the system 'abstain' compares the options' scores: use mode 'logits'.")

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for result files."""
        return dataclasses.asdict(self)


def load_eval_config(path: str | Path, **overrides: Any) -> EvalConfig:
    """Read an evaluation from a YAML file.

    Args:
        path: the file; keys are those of :class:`EvalConfig`. Entries of ``data`` and ``dev`` are sources, or name a
            task: ``{task: openbookqa, limit: 300}``.
        **overrides: values that replace those of the file; None is ignored.

    Raises:
        ConfigError: not a mapping, an unknown key, task, or a missing key. EvaluationError: impossible values.
    """
    return make_eval_config(read_yaml(Path(path)), str(path), **overrides)


def make_eval_config(values: dict[str, Any], where: str, /, **overrides: Any) -> EvalConfig:
    """An evaluation from plain data, see :func:`load_eval_config`.

    Args:
        values: keys of :class:`EvalConfig`.
        where: what to call the data in an error.
        **overrides: values that replace those of the data; None is ignored.
    """
    data = values | {key: value for key, value in overrides.items() if value is not None}
    folder = Path(data.get("data_dir") or ".")
    for name in ("data", "dev"):
        data[name] = [source(entry, folder, f"{where}: {name}") for entry in data.get(name) or []]
    if isinstance(data.get("systems"), list):
        data["systems"] = tuple(data["systems"])
    config: EvalConfig = build(EvalConfig, data, where)
    return config
