"""Families: which causal language models of the installed transformers can be fused, tried on tiny random models.

For each family a model of four layers is built from its config class, without any download, and used as the receiver
and as the sharer of the default fuser. What is checked are the invariants of the package, not only that nothing fails.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    TokenizersBackend,
)

from c2c.checkpoint import text_config
from c2c.errors import C2CError
from c2c.fusers import families as family_names
from c2c.language_model import Receiver
from c2c.model import C2CModel
from c2c.prompting import PLAIN_TEMPLATE
from c2c.sharer import Sharer

TEXTS = ("Name three rivers.", "Hi", "Who built the boat house?")
_NEW = 4  # tokens decoded in each check
_LARGEST = 30_000_000  # parameters; a config that stays larger has no fields for its size
_SIZES = json.loads(resources.files("c2c").joinpath("families.json").read_text(encoding="utf-8"))

_INTRODUCTION = """# Model families

Written by `c2c doctor --families --markdown docs/families.md`. For each causal family of transformers a random model
of a few layers is the receiver and the sharer of the default fuser. A family is taken in both roles if all of this
holds:

- the receiver alone decodes what transformers decodes without any cache;
- an untrained fuser changes nothing, token for token, for every fuser family named;
- with a fuser that changes the cache, a batch of unequal lengths gives the answers of its single prompts, also with
  private context where that is taken.

KV layers keep keys and values per token; they are fused. Layers that are left out (by number) keep what the model puts
there. Rotation says how channels of keys are paired: *none* is for layers without rotary embedding. That a tiny random
model is taken says that the architecture is handled rightly; it says nothing about how well a fuser learns.
"""

_COMPOSITES = """
## Multimodal models

Multimodal families that transformers has as causal language models are in the tables above, towers and all. Of the
others the language model alone is loaded, as one of these families, so that they need no row of their own. Named are
multimodal families by the language model that their config has by default; a checkpoint may have another.
"""


@dataclass
class FamilyReport:
    """Report what was found about one family.

    Attributes:
        family: its ``model_type``.
        receiver: ``yes``, or why not.
        sharer: ``yes``, or why not.
        private: whether a receiver takes private context: ``yes``, or why not.
        batch: ``together``, or ``one by one`` where rows of a batch disturb each other.
        fusers: fuser families whose untrained model gives the receiver's own answer.
        layers: KV layers of how many.
        left_out: the other layers, by reason.
        rotation: how keys are rotated, over the layers.
        wrong: invariants that do not hold; must be empty.
    """

    family: str
    receiver: str = ""
    sharer: str = ""
    private: str = ""
    batch: str = ""
    fusers: list[str] = field(default_factory=list)
    layers: str = ""
    left_out: dict[str, list[int]] = field(default_factory=dict)
    rotation: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    @property
    def taken(self) -> bool:
        """Whether the default fuser takes the family in both roles, with every invariant."""
        return self.receiver == self.sharer == "yes" and not self.wrong


def causal_families() -> list[str]:
    """Return the model types with a causal language model in the installed transformers."""
    return sorted(config.model_type for config in MODEL_FOR_CAUSAL_LM_MAPPING)


def composite_families() -> dict[str, list[str]]:
    """Return the multimodal model types of which the loader takes the language model, by the type of that."""
    found: dict[str, list[str]] = {}
    for name, kind in CONFIG_MAPPING.items():
        if kind not in MODEL_FOR_CAUSAL_LM_MAPPING and "text_config" in kind.sub_configs:
            with suppress(Exception):  # of the loader, and of configs without defaults
                found.setdefault(text_config(kind(), name).model_type, []).append(name)
    return {name: sorted(found[name]) for name in sorted(found)}


def build_tiny(family: str, seed: int = 0, **options: Any) -> PreTrainedModel:
    """Build a random model of a few layers.

    Args:
        family: a ``model_type``.
        seed: of the weights.
        **options: fields of its config.

    Raises:
        ValueError: the config stays large, or can't be made small by its usual fields.
    """
    kind = CONFIG_MAPPING[family]
    config = kind(**_sizes(kind) | options)
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[kind]
    if model_class.config_class is not kind:  # of a multimodal model its language model, as ``from_pretrained`` does
        config = config.get_text_config(decoder=True)
    with torch.device("meta"):
        size = sum(weight.numel() for weight in model_class(config).parameters())
    if size > _LARGEST:
        raise ValueError(f"its config makes {size / 1e6:.0f} million parameters")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = model_class(config).eval()
    model.generation_config = GenerationConfig()  # without what a family decodes with by default
    return model


def _sizes(kind: type[PreTrainedConfig]) -> dict[str, Any]:
    """Return small values for the fields of a config class, and for those of the configs inside."""
    known = {entry.name for entry in dataclasses.fields(kind)} - set(kind.attribute_map)
    sizes = {name: value for name, value in _SIZES["all"].items() if name in known}
    for name in kind.sub_configs:
        part = type(getattr(kind(), name, None))
        if issubclass(part, PreTrainedConfig):
            sizes[name] = {"model_type": part.model_type} | _sizes(part)
    own: dict[str, Any] = _SIZES["families"].get(kind.model_type, {})
    return sizes | own


@cache
def byte_tokenizer() -> TokenizersBackend:
    """Make a tokenizer of bytes with a plain chat template."""
    words = {piece: index for index, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=words, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = TokenizersBackend(tokenizer_object=backend)
    tokenizer.chat_template = PLAIN_TEMPLATE
    return tokenizer


def check_family(name: str) -> FamilyReport:
    """Build a tiny model of a family and check it in both roles."""
    report = FamilyReport(name)
    try:
        model = build_tiny(name)
    except Exception as error:  # config classes raise whatever they like
        report.receiver = report.sharer = f"not built: {_line(error)}"
        return report
    try:
        receiver = Receiver(model, byte_tokenizer(), name)
        report.layers = f"{receiver.geometry.layers} of {receiver.geometry.layers + len(receiver.left_out)}"
        for layer, reason in receiver.left_out.items():
            report.left_out.setdefault(reason, []).append(layer)
    except C2CError as error:
        report.receiver = report.sharer = f"refused: {_line(error)}"
        return report
    report.receiver = _refusal(report, lambda: _check_receiver(receiver, report))
    report.sharer = _refusal(report, lambda: _check_sharer(Sharer(model, byte_tokenizer(), name), report))
    if report.receiver == "yes":
        report.private = _refusal(report, lambda: _check_private(receiver, report))
        report.fusers = [kind for kind in family_names() if _untrained_is_alone(receiver, kind)]
    return report


def _refusal(report: FamilyReport, check: Callable[[], None]) -> str:
    try:
        check()
    except C2CError as error:
        return f"refused: {_line(error)}"
    except Exception as error:  # what a user would see as a traceback
        report.wrong.append(f"{type(error).__name__}: {_line(error)}")
        return "failed"
    return "yes"


def _line(error: Exception) -> str:
    return f"{error}".strip().split("\n")[0][:160]


def _partner(role: type[Receiver] | type[Sharer]) -> Any:
    return role(build_tiny("llama", seed=7), byte_tokenizer(), "llama")


def _answers(model: Any, texts: Any, **kwargs: Any) -> list[list[int]]:
    found = model(texts, max_new_tokens=_NEW, do_sample=False, **kwargs)
    return [result.ids.tolist() for result in (found if isinstance(found, list) else [found])]


def _one_by_one(model: Any, **kwargs: Any) -> list[list[int]]:
    return [_answers(model, text, **kwargs)[0] for text in TEXTS]


def _check(report: FamilyReport, what: str, got: Any, expected: Any) -> None:
    if got != expected:
        report.wrong.append(what)


def _check_receiver(receiver: Receiver, report: FamilyReport) -> None:
    report.batch = "one by one" if receiver.separates(receiver.encode(list(TEXTS))) else "together"
    model = C2CModel.from_models(receiver, _partner(Sharer))
    kinds = [
        "none" if entry is None else "neighbours" if entry.interleaved else "halves" for entry in receiver.rope_scheme
    ]
    report.rotation = sorted(set(kinds))
    alone = _one_by_one(receiver.answer)
    _check(report, "alone is not transformers' own answer", alone, [_plain(receiver, text) for text in TEXTS])
    _check(report, "untrained is not alone", _one_by_one(model.generate), alone)
    _open(model)
    singles = _one_by_one(model.generate)
    _check(report, "a batch is not its singles", _answers(model.generate, list(TEXTS)), singles)


def _check_sharer(sharer: Sharer, report: FamilyReport) -> None:
    model = _open(C2CModel.from_models(_partner(Receiver), sharer))
    batch, singles = _answers(model.generate, list(TEXTS)), _one_by_one(model.generate)
    _check(report, "a batch of the sharer is not its singles", batch, singles)


def _check_private(receiver: Receiver, report: FamilyReport) -> None:
    model = _open(C2CModel.from_models(receiver, _partner(Sharer), fuser="memory"))
    model.fusers[0].config.training = {"config": "random"}  # type: ignore[union-attr]
    given = {"sharer_messages": "The code is 8264."}
    batch, singles = _answers(model.generate, list(TEXTS), **given), _one_by_one(model.generate, **given)
    _check(report, "a batch with private context is not its singles", batch, singles)


def _untrained_is_alone(receiver: Receiver, kind: str) -> bool:
    try:
        model = C2CModel.from_models(receiver, _partner(Sharer), fuser=kind)
        given = {"sharer_messages": "The code is 8264."} if model.private else {}
        return _answers(model.generate, TEXTS[0], **given) == _answers(receiver.answer, TEXTS[0])
    except C2CError:
        return False


def _plain(receiver: Receiver, text: str) -> list[int]:
    """Decode with transformers alone, without any cache: what is always right."""
    batch = receiver.encode(text)
    ids = batch.ids
    with torch.no_grad():
        for _ in range(_NEW):
            logits = receiver.model(input_ids=ids, use_cache=False).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    new: list[int] = ids[0, batch.length :].tolist()
    return new


def _open(model: C2CModel) -> C2CModel:
    """Give the fuser random weights, so that fusing changes the answer."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.fusers.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return model


def summary(reports: Sequence[FamilyReport]) -> str:
    """Return one line of counts."""
    taken = sum(report.taken for report in reports)
    built = sum(not report.receiver.startswith("not built") for report in reports)
    return (
        f"{taken} families are taken in both roles, of {built} that could be built and {len(reports)} causal ones in "
        f"transformers {transformers.__version__}"
    )


def markdown(reports: Sequence[FamilyReport]) -> str:
    """Return a table of the families that are taken, and one of the others with the reason."""
    taken, others = ([report for report in reports if report.taken is yes] for yes in (True, False))
    heads = ("family", "KV layers", "rotation", "fusers", "private context", "batch", "left out")
    lines = [_INTRODUCTION, f"{summary(reports)}.", "", *_row(*heads), f"|{'---|' * len(heads)}"]
    for one in taken:
        left = "; ".join(f"{', '.join(map(str, layers))}: {reason}" for reason, layers in one.left_out.items())
        private = one.private if one.private == "yes" else "no: attention layers differ in shape"
        lines += _row(
            f"`{one.family}`", one.layers, ", ".join(one.rotation), ", ".join(one.fusers), private, one.batch, left
        )
    lines += ["", *_row("not taken", "receiver", "sharer")]
    lines.append("|---|---|---|")
    for one in others:
        wrong = f" ({'; '.join(one.wrong)})" if one.wrong else ""
        sharer = "the same" if one.sharer == one.receiver else one.sharer
        lines += _row(f"`{one.family}`", one.receiver + wrong, sharer)
    lines += [_COMPOSITES, *_row("language model", "multimodal families"), "|---|---|"]
    for name, composites in composite_families().items():
        lines += _row(f"`{name}`", ", ".join(f"`{one}`" for one in composites))
    return "\n".join(lines) + "\n"


def _row(*cells: str) -> list[str]:
    return [f"| {' | '.join(cell.replace('|', ' ') for cell in cells)} |"]
