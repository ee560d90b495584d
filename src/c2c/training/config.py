"""The configuration of a training run: one YAML file, every key known."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from c2c.errors import C2CError, did_you_mean

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
ADAPTER = "adapter"  # in place of a fuser family
Precision = Literal["float32", "bfloat16"]


class ConfigError(C2CError, ValueError):
    """A configuration with unknown or impossible keys."""


@dataclass(frozen=True)
class DataSource:
    """Rows to train, choose or evaluate on.

    Attributes:
        path: JSONL file, relative to ``data_dir``; or give ``dataset``.
        kind: ``multiple_choice``, ``context_question``, ``question``, ``instruction`` or ``chat``.
        form: how a multiple-choice question is put: ``letter``, ``published`` or ``sentence``.
        limit: at most this many rows, drawn with the run's ``data_seed``.
        skip: leave out so many of the drawn rows first, so that two sources of one file do not overlap.
        vary_options: share of the questions that get 2 to 8 options in a new order, the missing ones from other
            questions.
        options: give every question so many options, in the same way; of two numbers, each question one between them.
        dataset: id of the ``datasets`` library, in place of ``path``.
        synthetic: rows that are made up, in place of ``path``: ``relay`` (see :mod:`c2c.data.synthetic`),
            ``facts`` (see :mod:`c2c.data.synthetic`), ``skeleton`` (see :mod:`c2c.data.synthetic`) or ``halves``
            (see :mod:`c2c.data.synthetic`), and with ``_test`` added those that never occur in training; of kind
            ``private_question``, as many as ``limit`` and ``skip`` ask for.
        subset: configuration of the data set; ``"*"`` for all of them.
        split: split of the data set.
        columns: our keys to the columns that hold them, for instance ``{output: response}``.
        keep: only rows with these values, for instance ``{error_type: ok}``.
        draft: of kind ``private_question``: the sharer is asked too, drafts at most so many tokens of an answer, and
            hands these over as well; 0 for none.
    """

    path: str | None = None
    kind: str = "multiple_choice"
    form: str = "letter"
    limit: int | None = None
    skip: int = 0
    vary_options: float = 0.0
    options: int | list[int] | None = None
    dataset: str | None = None
    synthetic: str | None = None
    subset: str | None = None
    split: str = "train"
    columns: dict[str, str] = field(default_factory=dict)
    keep: dict[str, Any] = field(default_factory=dict)
    draft: int = 0

    def __post_init__(self) -> None:
        """Refuse impossible numbers of options and of drafted tokens.

        Raises:
            ConfigError: not a number from 2 on, or not two in order; a draft of a row that has no context to itself.
        """
        if self.draft < 0 or (self.draft and self.kind != "private_question"):
            raise ConfigError(
                f"draft is {self.draft} for rows of kind {self.kind!r}; expected a number of tokens, 0 for none, of "
                "kind 'private_question'."
            )
        low, high = self.option_range or (2, 2)
        if not 2 <= low <= high <= len(LETTERS):
            raise ConfigError(
                f"options is {self.options!r}; expected a number from 2 to {len(LETTERS)}, or [lowest, highest]."
            )

    @property
    def option_range(self) -> tuple[int, int] | None:
        """Fewest and most options that a question is given; None where it keeps its own."""
        if self.options is None:
            return None
        bounds = [self.options] if isinstance(self.options, int) else self.options
        return (bounds[0], bounds[-1]) if 1 <= len(bounds) <= 2 else (0, 0)

    @property
    def name(self) -> str:
        """The file, data set, or what is made up."""
        return str(self.path or self.dataset or self.synthetic)


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a training run.

    Attributes:
        receiver: alias, hub id, folder or GGUF file.
        sharer: the same.
        train: what to train on.
        dev: what to choose the checkpoint on.
        output_dir: where checkpoints and the chosen fuser go.
        data_dir: folder that the paths of ``train``, ``dev`` and ``exclude`` start from.
        exclude: files whose questions must not be trained on.
        family: fuser family; or ``adapter``, which trains the receiver alone on the same rows, as a control.
        fuser_options: passed to the family's config.
        layer_map: ``depth``, ``terminal`` or a list.
        start_from: a trained fuser to train on, folder or hub id, in place of a new one; layer map and cue are then its
            own. It must be of ``family`` and for these models.
        adapter_of: with ``adapter``, the fuser family whose size it has, with ``fuser_options``; in a command,
            ``--family adapter`` puts the file's family here.
        adapter_rank: rank of the adapter; by default that with nearest to as many parameters as the fuser.
        adapter_learning_rate: peak for the adapter, in place of ``learning_rate``: LoRA takes smaller steps.
        sharer_cue: text that the sharer alone reads after the opening of its turn, where a row has no answer prefix,
            see :class:`~c2c.alignment.SpanAligner`.
        linear_weight: what a pair counts when a ``linear`` fuser is fitted: ``none`` or ``attention``.
        max_prompt_tokens: longer prompts are dropped and counted.
        max_response_tokens: longer responses are dropped and counted.
        epochs: passes over the data.
        max_steps: optimizer steps; overrides ``epochs``.
        batch_size: examples per step, over all processes.
        gradient_accumulation: steps joined to one update.
        learning_rate: peak.
        weight_decay: of AdamW.
        warmup_steps: linear warm-up; below 1 it is a share of all steps.
        schedule: name of a transformers schedule.
        max_grad_norm: clipping.
        guard_weight: weight of the guard: with another example's sharer cache the loss must not be lower than the
            receiver's alone. 0 turns it off.
        soft_targets: share of the sharer's own belief in the target of the token that names a choice, 0 to 1; for a
            weak sharer, whose answers are often wrong.
        soft_temperature: below 1 these beliefs are sharper.
        reconstruction_steps: in the first so many steps the receiver learns to repeat the last message in place of
            the response.
        calibration: examples for the channel statistics of the bottleneck fuser.
        eval_steps: score the dev set every so many steps; by default once per epoch.
        save_steps: write a checkpoint every so many steps.
        seed: of initialisation and of the order of examples.
        data_seed: of which rows are drawn, and of varied options; apart from ``seed``, so that runs with several seeds
            share their prefills.
        store_dir: folder of the prefill store; None keeps it in memory.
        store_budget_gb: at most this much; what does not fit is computed again.
        fill: ``ahead`` fills the store before the first step, ``training`` as prompts are needed.
        prefill_batch: prompts per prefill.
        shard_sharer: spread the sharer's weights over the processes (FSDP) while the store is filled.
        precision: of the arithmetic of a step: ``float32``, or ``bfloat16``, which multiplies matrices in bfloat16
            (autocast) while weights, gradients and optimizer stay in float32; prefills and dev scores are untouched.
        dtype: of the models' weights; by default float32 on a CPU, else as stored.
        sharer_dtype: of the sharer's, where it differs.
        device_map: as in ``from_pretrained``.
        report_to: ``none``, ``tensorboard`` or others of transformers.
        logging_steps: how often the loss is reported.
    """

    receiver: str
    sharer: str
    train: list[DataSource]
    dev: list[DataSource]
    output_dir: str
    data_dir: str = "."
    exclude: list[str] = field(default_factory=list)
    family: str = "bottleneck"
    fuser_options: dict[str, Any] = field(default_factory=dict)
    adapter_of: str = "bottleneck"
    adapter_rank: int | None = None
    adapter_learning_rate: float = 5e-4
    layer_map: str | list[int | None] = "depth"
    start_from: str | None = None
    sharer_cue: str = ""
    linear_weight: Literal["none", "attention"] = "none"
    max_prompt_tokens: int = 512
    max_response_tokens: int = 128
    epochs: float = 3.0
    max_steps: int = -1
    batch_size: int = 8
    gradient_accumulation: int = 1
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    warmup_steps: float = 0.1
    schedule: str = "cosine"
    max_grad_norm: float = 1.0
    guard_weight: float = 0.0
    soft_targets: float = 0.0
    soft_temperature: float = 0.5
    reconstruction_steps: int = 0
    calibration: int = 64
    eval_steps: int | None = None
    save_steps: int = 25
    seed: int = 0
    data_seed: int = 0
    store_dir: str | None = None
    store_budget_gb: float = 8.0
    fill: str = "ahead"
    prefill_batch: int = 4
    shard_sharer: bool = False
    precision: Precision = "float32"
    dtype: str | None = None
    sharer_dtype: str | None = None
    device_map: str | None = None
    report_to: str = "none"
    logging_steps: int = 10

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for the fuser's config and result files."""
        return dataclasses.asdict(self)


def load_config(path: str | Path, **overrides: Any) -> TrainConfig:
    """Read a YAML file.

    Args:
        path: the file.
        **overrides: values that replace those of the file; None is ignored. Another ``family`` has its own default
            options in place of the file's.

    Raises:
        ConfigError: not a mapping, an unknown key, or a missing one; names the known keys.
    """
    data = read_yaml(Path(path))
    given = {key: value for key, value in overrides.items() if value is not None}
    if given.get("family") == ADAPTER and data.get("family", ADAPTER) != ADAPTER:
        given.setdefault("adapter_of", data["family"])  # the control of this very fuser
    elif given.get("family", data.get("family")) != data.get("family"):
        data.pop("fuser_options", None)  # they are another family's
    data |= given
    for name in ("train", "dev"):
        data[name] = [build(DataSource, entry, f"{path}: {name}") for entry in data.get(name) or []]
    config: TrainConfig = build(TrainConfig, data, str(path))
    if config.fill not in ("ahead", "training"):
        raise ConfigError(f"{path}: fill is {config.fill!r}; expected 'ahead' or 'training'.")
    if not 0 <= config.soft_targets <= 1 or config.soft_temperature <= 0:
        raise ConfigError(
            f"{path}: soft_targets is {config.soft_targets} (a share, 0 to 1) and soft_temperature "
            f"{config.soft_temperature} (above 0)."
        )
    if config.guard_weight < 0:
        raise ConfigError(f"{path}: guard_weight is {config.guard_weight}; expected 0, which is off, or above.")
    if config.start_from is not None and config.family in (ADAPTER, "linear"):
        raise ConfigError(f"{path}: start_from is for fusers that are trained; family is {config.family!r}.")
    if config.fill != "ahead" and any(source.draft for source in (*config.train, *config.dev)):
        raise ConfigError(f"{path}: draft needs fill: ahead, since the sharer writes before the first step.")
    if config.soft_targets > 0 and config.fill != "ahead":
        raise ConfigError(f"{path}: soft_targets needs fill: ahead, since the sharer is asked before the first step.")
    if not config.train or not config.dev:
        raise ConfigError(f"{path}: give at least one entry under 'train' and one under 'dev'.")
    return config


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Raises:
        ConfigError: missing, not YAML, or not a mapping.
    """
    expected = "Expected a YAML file of keys and values, such as those in configs/."
    if not path.is_file():
        found = f"{path} is a folder, no config" if path.is_dir() else f"no such config: {path}"
        raise ConfigError(f"{found}. {expected}")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}\n{expected}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected keys and values, got {type(data).__name__}.")
    return data


def build(kind: Any, data: Any, where: str) -> Any:
    """An object of a dataclass from plain data.

    Raises:
        ConfigError: not a mapping, unknown keys, or missing ones; names the known keys.
    """
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: expected keys and values, got {data!r}.")
    known = {entry.name: entry for entry in dataclasses.fields(kind)}
    unknown = sorted(set(data) - set(known))
    missing = [
        name
        for name, entry in known.items()
        if name not in data and entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
    ]
    if unknown:
        hints = "".join(did_you_mean(name, set(known) - set(data)) for name in unknown)
        raise ConfigError(f"{where}: unknown keys {unknown}.{hints} Known: {', '.join(known)}.")
    if missing:
        options = ", ".join("--" + name.replace("_", "-") for name in missing)
        raise ConfigError(f"{where}: missing keys {missing}. Give them in a config, or as {options}.")
    hints_of = get_type_hints(kind)
    for name, value in data.items():
        if not _fits(value, hints_of[name]):
            raise ConfigError(f"{where}: {name} is {value!r}; expected {_wanted(hints_of[name])}.{_number_hint(value)}")
    return kind(**data)


_WORDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", NoneType: "nothing"}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of a YAML file can be what a field says; what is in a list or mapping is not looked at."""
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    kind = get_origin(hint) or hint
    if kind in (int, float):
        return isinstance(value, int | kind) and not isinstance(value, bool)
    if kind in (list, tuple):
        return isinstance(value, list | tuple)
    if kind is str:
        return isinstance(value, str | Path)
    return kind is Any or isinstance(value, kind)


def _wanted(hint: Any) -> str:
    """What a field says, in words."""
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(_wanted(part) for part in get_args(hint))
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    kind = get_origin(hint) or hint
    return _WORDS.get(kind, "a list" if kind in (list, tuple) else "keys and values")


def _number_hint(value: Any) -> str:
    """YAML takes 2e-3 for a text, which nobody expects."""
    try:
        float(value if isinstance(value, str) else "-")
    except ValueError:
        return ""
    return " It is a text in YAML: write numbers without quotes, and with a point, such as 2.0e-3 or 0.002."
