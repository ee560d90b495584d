"""The configuration of a training run: one YAML file. Help of a field is also that of its command-line option."""

# ruff: noqa: RUF009 - option() returns a dataclass field
from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from c2c.config import ConfigError, as_list, build, check_values, option, read_yaml
from c2c.data.config import DataSource

ADAPTER = "adapter"  # in place of a fuser family
Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class TrainConfig:
    """Everything that determines a training run.

    Raises:
        ConfigError: values that are impossible, alone or together.
    """

    receiver: str = field(metadata={"help": "Receiver: alias, hub id, folder or GGUF file."})
    sharer: str = field(metadata={"help": "Sharer: alias, hub id, folder or GGUF file."})
    train: list[DataSource] = field(metadata={"help": "Rows to train on.", "cli": False})
    dev: list[DataSource] = field(metadata={"help": "Rows to select the checkpoint on.", "cli": False})
    output_dir: str = field(metadata={"help": "Folder of checkpoints and of the selected fuser."})
    data_dir: str = option(".", "Folder that the paths of data files start from.")
    exclude: list[str] = option([], "Files whose questions must not be trained on.", cli=False)
    family: str = option(
        "bottleneck", "Fuser family; 'adapter' trains the receiver alone on the same rows, as a control."
    )
    fuser_options: dict[str, Any] = option({}, "Options of the family's own config.", cli=False)
    adapter_of: str = option("bottleneck", "Family, with fuser_options, whose size the adapter has.")
    adapter_rank: int | None = option(None, "Rank of the adapter; by default the nearest to the fuser's size.", min=1)
    adapter_learning_rate: float = option(5e-4, "Peak learning rate of the adapter, in place of learning_rate.")
    layer_map: str | list[int | None] = option(
        "depth", "Sharer layer of each receiver layer: depth, terminal or a list."
    )
    start_from: str | None = option(
        None, "Trained fuser to train on (folder or hub id), of this family and for these models."
    )
    sharer_cue: str = option("", "Text that opens the sharer's turn where a row has no answer prefix.")
    linear_weight: Literal["none", "attention"] = option(
        "none", "Weight of a token pair when a linear fuser is fitted."
    )
    max_prompt_tokens: int = option(512, "Drop (and count) longer prompts.", min=1)
    max_response_tokens: int = option(128, "Drop (and count) longer responses.", min=1)
    epochs: float = option(3.0, "Passes over the data.")
    max_steps: int = option(-1, "Optimizer steps; overrides epochs.")
    batch_size: int = option(8, "Examples per step, over all processes.", min=1)
    gradient_accumulation: int = option(1, "Steps that are joined to one update.", min=1)
    learning_rate: float = option(2e-3, "Peak learning rate.", min=0)
    weight_decay: float = option(0.01, "Weight decay of AdamW.", min=0)
    warmup_steps: float = option(0.1, "Linear warm-up; below 1 a share of all steps.", min=0)
    schedule: str = option("cosine", "Learning-rate schedule of transformers.")
    max_grad_norm: float = option(1.0, "Clip gradients to this norm.", min=0)
    guard_weight: float = option(0.0, "Weight of the guard: another example's cache must not help. 0 turns it off.")
    soft_targets: float = option(0.0, "Share of the sharer's own answer in the target of multiple choice, 0 to 1.")
    soft_temperature: float = option(0.5, "Temperature of soft targets; lower is sharper.")
    reconstruction_steps: int = option(0, "First steps, in which the receiver learns to repeat the message.", min=0)
    calibration: int = option(64, "Examples that a new fuser is initialised from; 0 for none.", min=0)
    eval_steps: int | None = option(None, "Score the dev set every so many steps; by default once per epoch.", min=1)
    save_steps: int = option(25, "Write a checkpoint every so many steps.", min=1)
    seed: int = option(0, "Seed of initialisation and of the order of examples.", min=0, max=2**32 - 1)
    data_seed: int = option(0, "Seed of which rows are drawn; runs that differ in seed alone share prefills.")
    store_dir: str | None = option(None, "Folder of the prefill store; by default it is in memory.")
    store_budget_gb: float = option(8.0, "Size of the prefill store in GB; what does not fit is computed again.", min=0)
    fill: Literal["ahead", "training"] = option("ahead", "Fill the store ahead of the first step, or while training.")
    prefill_batch: int = option(4, "Prompts per prefill.", min=1)
    precision: Precision = option(
        "float32", "Arithmetic of a step: float32, or bfloat16 (autocast; weights stay in float32)."
    )
    dtype: str | None = option(None, "Type of the models' weights; by default float32 on a CPU, else as stored.")
    sharer_dtype: str | None = option(None, "Type of the sharer's weights, if another.")
    device_map: str | None = option(None, "As in from_pretrained of transformers.")
    report_to: str = option("none", "none, tensorboard or others of transformers.")
    logging_steps: int = option(10, "Report the loss every so many steps.", min=1)

    def __post_init__(self) -> None:
        check_values(self)
        ahead = self.fill == "ahead"
        problems = {
            f"max_steps is {self.max_steps}; expected 1 or more, or -1 for as many as epochs has": (
                self.max_steps != -1 and self.max_steps < 1
            ),
            f"epochs is {self.epochs}; expected a number above 0": self.epochs <= 0,
            f"soft_targets is {self.soft_targets} (a share, 0 to 1) and soft_temperature {self.soft_temperature} "
            "(above 0)": not 0 <= self.soft_targets <= 1 or self.soft_temperature <= 0,
            f"guard_weight is {self.guard_weight}; expected 0, which is off, or above": self.guard_weight < 0,
            f"adapter_learning_rate is {self.adapter_learning_rate}; expected a number above 0": (
                self.adapter_learning_rate <= 0
            ),
            f"start_from is for fusers that are trained; family is {self.family!r}": (
                self.start_from is not None and self.family in (ADAPTER, "linear")
            ),
            "draft needs fill: ahead, since the sharer drafts before the first step": (
                not ahead and any(source.draft for source in (*self.train, *self.dev))
            ),
            "soft_targets needs fill: ahead, since the sharer answers before the first step": (
                not ahead and self.soft_targets > 0
            ),
            "give at least one entry under 'train' and one under 'dev'": not self.train or not self.dev,
        }
        for problem, found in problems.items():
            if found:
                raise ConfigError(f"{problem}.")

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for the fuser's config and result files."""
        return dataclasses.asdict(self)


def load_config(path: str | Path, **overrides: Any) -> TrainConfig:
    """Read a YAML file; ``overrides`` replace its values, and None is ignored.

    Another ``family`` has its own default options in place of the file's; ``adapter`` takes the file's family as
    ``adapter_of``.

    Raises:
        ConfigError: not a mapping, unknown or missing keys, or impossible values.
    """
    data = read_yaml(Path(path))
    given = {key: value for key, value in overrides.items() if value is not None}
    if given.get("family") == ADAPTER and data.get("family", ADAPTER) != ADAPTER:
        given.setdefault("adapter_of", data["family"])  # the control of this very fuser
    elif given.get("family", data.get("family")) != data.get("family"):
        data.pop("fuser_options", None)  # they are another family's
    data |= given
    for name in ("train", "dev"):
        data[name] = [
            build(DataSource, entry, f"{path}: {name}") for entry in as_list(data.get(name), f"{path}: {name}")
        ]
    return build(TrainConfig, data, str(path))
