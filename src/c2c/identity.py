"""Model identity: what a fuser was trained for, compared with the models at hand before it is used."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from transformers import PreTrainedModel

from c2c.errors import MismatchError
from c2c.kv_cache import KVGeometry
from c2c.utils import without_folder
from c2c.weights_hash import WeightsReader, same_values

_STRUCTURE = ("architecture", "kv", "rope")


@dataclass(frozen=True)
class ModelIdentity:
    """Record everything about a model that changes what its KV cache means.

    Attributes:
        name: id or path that it was loaded from; informative, never compared.
        revision: commit of the hub repository, where known; informative.
        architecture: the model class.
        kv: layers, kv_heads and head_dim of its cache.
        rope: the rotary parameters of its config, as JSON.
        weights: fingerprint of the weights, None where they are not in memory.
        tokenizer: hash of the tokenizer's vocabulary and rules, None without a tokenizer.
        template: hash of the chat template, None without one.
        values: checksum of every weight, with what a comparison across types needs; None in records of older versions,
            which are compared by ``weights``.
        variant: active adapters and quantization; informative. None in records of older versions.
    """

    name: str
    revision: str | None
    architecture: str
    kv: dict[str, int]
    rope: str | None
    weights: str | None
    tokenizer: str | None
    template: str | None
    values: dict[str, str] | None = None
    variant: str | None = None

    @property
    def weights_key(self) -> str | None:
        """Return what tells the weights of two models apart, as a key; None where it is not known."""
        return self.weights if self.values is None else self.values["checksum"]

    def same_weights(self, other: ModelIdentity) -> bool | None:
        """Whether both have the same weights, whatever their types; None where that is not known."""
        if self.weights is None or other.weights is None:
            return None
        if self.values is None or other.values is None:
            return self.weights == other.weights
        alike = self.weights == other.weights or self.values["dtype"] != other.values["dtype"]
        return alike and same_values(self.values, other.values)

    def to_dict(self) -> dict[str, Any]:
        """Return a plain dict, for the fuser's config."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ModelIdentity:
        """Make an identity of what :meth:`to_dict` returned; unknown keys of a newer version are ignored."""
        known = {field.name for field in fields(cls)}
        return cls(**{key: value for key, value in data.items() if key in known})


# (role, the identity expected, or None where none is recorded, the identity given)
Pairs = list[tuple[str, ModelIdentity | None, ModelIdentity]]


class IdentityReader:
    """Read the identity of one model as it is now; what did not change since the last time is not hashed again."""

    def __init__(self) -> None:
        self._weights = WeightsReader()
        self._rules: tuple[Any, str | None] | None = None

    def read(self, model: PreTrainedModel, tokenizer: Any, name: str, geometry: KVGeometry) -> ModelIdentity:
        """Return the identity of a loaded model."""
        rope = getattr(model.config.get_text_config(decoder=True), "rope_parameters", None)
        template = getattr(tokenizer, "chat_template", None)
        rules = (id(tokenizer), None if tokenizer is None else len(tokenizer))
        if self._rules is None or self._rules[0] != rules:
            self._rules = (rules, tokenizer_hash(tokenizer))
        weights = self._weights.read(model)
        return ModelIdentity(
            name=name,
            revision=getattr(model.config, "_commit_hash", None),
            architecture=type(model).__name__,
            kv=geometry.to_dict(),
            rope=json.dumps(rope, sort_keys=True, default=str) if rope else None,
            weights=weights.fingerprint,
            tokenizer=self._rules[1],
            template=_digest(str(template).encode()) if template else None,
            values=weights.values,
            variant=weights.variant,
        )


def identify(model: PreTrainedModel, tokenizer: Any, name: str, geometry: KVGeometry) -> ModelIdentity:
    """Return the identity of a loaded model."""
    return IdentityReader().read(model, tokenizer, name, geometry)


def tokenizer_hash(tokenizer: Any) -> str | None:
    """Hash a fast tokenizer's vocabulary and rules, without its padding and truncation state."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    rules = json.loads(backend.to_str())
    rules.pop("padding", None)
    rules.pop("truncation", None)
    return _digest(json.dumps(rules, sort_keys=True).encode())


def differences(
    role: str, expected: ModelIdentity, given: ModelIdentity, what: str = "fuser"
) -> tuple[list[str], list[str]]:
    """Compare two identities; ``what`` was made for the expected one.

    Returns:
        Differences that make fusion impossible (cache shape, rotary embedding, architecture), and differences that
        make it doubtful (weights, tokenizer, template). Facts that either side does not know are not compared.
    """
    hard: list[str] = []
    soft: list[str] = []
    for field in ("architecture", "kv", "rope", "weights", "tokenizer", "template"):
        want, got = getattr(expected, field), getattr(given, field)
        if want is None or got is None or _same(field, expected, given):
            continue
        if field == "weights":
            want, got = (" ".join(filter(None, (one.weights, one.variant))) for one in (expected, given))
        names = without_folder(expected.name), without_folder(given.name)
        line = f"{role} {field}: the {what} was made for {want} ({names[0]}), got {got} ({names[1]})"
        (hard if field in _STRUCTURE else soft).append(line)
    return hard, soft


def _same(field: str, expected: ModelIdentity, given: ModelIdentity) -> bool:
    want, got = getattr(expected, field), getattr(given, field)
    if field == "weights":
        return expected.same_weights(given) is not False
    if field == "rope" and want != got:  # 10000 and 10000.0 are one base
        return bool(json.loads(want) == json.loads(got))
    return bool(want == got)


def check(pairs: Pairs, allow_mismatch: bool, what: str = "fuser") -> list[str]:
    """Compare all expected identities with those of the models given.

    Args:
        pairs: role, identity expected and identity given of each model.
        allow_mismatch: accept other weights, tokenizers or templates of the same structure.
        what: what expects them, for the error.

    Returns:
        The differences that were accepted.

    Raises:
        MismatchError: listing every difference.
    """
    found = [differences(role, expected, given, what) for role, expected, given in pairs if expected is not None]
    hard, soft = ([line for pair in found for line in pair[index]] for index in (0, 1))
    if hard or (soft and not allow_mismatch):
        advice = f"Load the models that the {what} names, or train one for these."
        if what == "fuser":
            advice = "Load the models that the fuser names (c2c inspect FUSER), or train a fuser for this pair."
        if _swapped(pairs):
            advice = "They fit the other way round: swap receiver and sharer (--receiver, --sharer)."
        if not hard:
            advice += " If you know that the models are equivalent, pass allow_mismatch=True."
        raise MismatchError(hard + soft, advice, what)
    return soft


def _swapped(pairs: Pairs) -> bool:
    """Whether two models would fit in each other's place."""
    wanted, given = [want for _, want, _ in pairs if want is not None], [got for _, _, got in pairs]
    return len(pairs) == len(wanted) == 2 and not any(
        any(differences("", want, got)) for want, got in zip(wanted, reversed(given), strict=True)
    )


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]
