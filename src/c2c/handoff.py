"""Handoff: a sharer's cache of what it has read, as a value that is saved, quantized, extended and used many times."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor
from transformers import Cache

from c2c import kv_cache
from c2c.errors import HandoffError, PromptError
from c2c.identity import ModelIdentity
from c2c.kv_cache import KeyValue
from c2c.messages import Conversation
from c2c.prompting import RenderOptions, encode, render, require_tokenizer, text_tokens, with_passage
from c2c.tokens import SLOT, TokenBatch, common_prefix, natural_positions
from c2c.utils import save_atomically

Precision = Literal["float32", "bfloat16", "float16", "int8", "float8"]
_FORMAT = "c2c-handoff-1"
PRECISIONS: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
    "float8": torch.float8_e4m3fn,
}
_SIDES = ("key", "value")
_LARGEST = {"int8": 127.0, "float8": 448.0}


@dataclass(frozen=True)
class QuantizedTensor:
    """Hold a tensor of keys or values, perhaps quantized.

    Attributes:
        data: ``[1, kv_heads, tokens, head_dim]``.
        scale: what to multiply it by, ``[1, kv_heads, 1, head_dim]`` for keys (whose channels differ much) or
            ``[1, kv_heads, tokens, 1]`` for values; None where nothing was scaled.
    """

    data: Tensor
    scale: Tensor | None = None

    @classmethod
    def quantize(cls, x: Tensor, precision: Precision, along: int) -> QuantizedTensor:
        """Round ``x``; for 8 bits each slice along dimension ``along`` gets a scale of its own."""
        if precision not in _LARGEST:
            return cls(x.to(PRECISIONS[precision]).contiguous())
        scale = (x.float().abs().amax(along, keepdim=True) / _LARGEST[precision]).clamp_min(1e-12)
        scaled = x.float() / scale
        return cls((scaled.round() if precision == "int8" else scaled).to(PRECISIONS[precision]).contiguous(), scale)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the tensor in ``dtype``."""
        return self.data.to(dtype) if self.scale is None else (self.data.float() * self.scale).to(dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of data and scale."""
        return self.data.nbytes + (self.scale.nbytes if self.scale is not None else 0)


@dataclass(frozen=True)
class SharerPrompt:
    """Hold a sharer's prompt tokens, slots for thoughts among them, and the columns that are handed over."""

    ids: list[int]
    kept: list[int]

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Return ids and kept columns, each int64 on the host."""
        return torch.tensor(self.ids), torch.tensor(self.kept)

    def followed_by(self, draft: Sequence[int]) -> SharerPrompt:
        """Append what the sharer wrote after it; all of that is handed over."""
        length = len(self.ids)
        return SharerPrompt([*self.ids, *draft], [*self.kept, *range(length, length + len(draft))])

    def with_thoughts(self, steps: int) -> SharerPrompt:
        """Append slots for thinking steps, which have no token; all are handed over."""
        return self.followed_by([SLOT] * steps)

    def batch(self) -> TokenBatch:
        """Return the tokens, one row."""
        return _one_row(torch.tensor(self.ids))


def _one_row(ids: Tensor) -> TokenBatch:
    ids = ids.unsqueeze(0)
    mask = torch.ones_like(ids, dtype=torch.bool)
    return TokenBatch(ids, mask, natural_positions(mask), padded=False, has_slots=bool((ids == SLOT).any()))


def sharer_prompt(tokenizer: Any, conversation: Conversation, options: RenderOptions) -> SharerPrompt:
    """Tokenise a conversation for a sharer and select what is handed over.

    Kept are the texts of the messages, and the template after the last one, whose positions have read everything; other
    template tokens say nothing about the messages, and the first token of a prompt holds values out of all proportion.

    Raises:
        PromptError: no text of any message is found in the rendered prompt.
    """
    encoded = encode(require_tokenizer(tokenizer, "sharer"), render(tokenizer, conversation, options))
    owners = text_tokens(encoded)
    texts = [column for column, owner in enumerate(owners) if owner is not None]
    if not texts:
        raise PromptError(
            f"nothing to hand over: no message text was found in the rendered prompt {encoded.rendered.text!r}."
        )
    return SharerPrompt(encoded.ids, [*texts, *range(texts[-1] + 1, len(encoded.ids))])


# read before a document that will stand among others: a first passage is read otherwise than one that follows another
OTHER_PASSAGE = (
    "Bread is made of flour, water, salt and a raising agent. The dough is kneaded until it is smooth, left in a warm "
    "place until it has doubled in size, shaped into loaves and baked in a hot oven. Wheat is the most common grain, "
    "followed by rye and spelt. In many towns bakers begin their work long before sunrise, so that fresh loaves are on "
    "the shelves when the first customers arrive. A loaf that has cooled keeps for several days when it is wrapped in "
    "cloth or paper. Older bread is toasted, fried, or soaked in milk and baked again with fruit. Recipes differ from "
    "region to region: some add seeds or nuts, others olives, herbs or cheese."
)


def passage_prompt(
    tokenizer: Any, document: str, before: Any, options: RenderOptions, among: bool | str = False
) -> SharerPrompt:
    """Tokenise a document as a passage in the prompt of a receiver that is the same model.

    Handed over are the tokens of the passage alone. They stand behind the same tokens as where the receiver reads the
    text itself, up to the passage's end.

    Args:
        tokenizer: of both models.
        document: the text.
        before: messages that the receiver's prompt begins with, or the text of its system message; empty for none.
        options: with the instruction and the form of passages.
        among: read it behind another passage, which is not handed over: this text, or one that is kept for that.

    Raises:
        PromptError: ``before`` holds a user message, or the template loses the passage.
    """
    opening = [{"role": "system", "content": before}] if isinstance(before, str) and before else list(before)
    if any(message["role"] == "user" for message in opening):
        raise PromptError("before=... holds a user message; documents stand in the first one, behind system messages.")
    others = [] if among is False else [OTHER_PASSAGE if among is True else among]
    asked = with_passage([*opening, {"role": "user", "content": "Q"}], *others, document, options=options)
    encoded = encode(require_tokenizer(tokenizer, "sharer"), render(tokenizer, asked, options))
    found = encoded.rendered.spans[-1]
    if found is None or encoded.rendered.contents[-1][found[1] :] != asked[-1]["content"]:
        raise PromptError("the chat template changes the text of user messages, so that a passage has no place in it.")
    skipped = [options.instruction, *(options.passage.replace("{passage}", other) for other in others)]
    start = found[0][0] + len("".join(skipped))
    stop = found[0][1] - 1  # before the question
    kept = [column for column, (first, last) in enumerate(encoded.offsets) if first >= start and first < last <= stop]
    if not kept:
        raise PromptError(f"nothing to hand over: no token of the document {document!r:.80} was found in the prompt.")
    return SharerPrompt(encoded.ids[: kept[-1] + 1], kept)


@dataclass(frozen=True)
class Handoff:
    """A sharer's cache of what it has read (and perhaps written), ready for any receiver that has a fuser for it.

    Attributes:
        sharer: who has read.
        ids: all tokens of its prompt, ``[tokens]``; ``tokens.SLOT`` for a thinking step, which has no token.
        kept: the columns that are handed over, ``[kept]``: message texts, thoughts, what the sharer wrote, and the
            template after the last message, which has read everything.
        layers: keys and values of all layers and tokens.
        precision: how they are kept.
        hidden: a layer and the hidden states that enter it, of the kept columns, ``[1, kept, hidden]``: for a variant
            that recomputes layers from there on.
        realign: how the states of thinking steps became inputs, see :mod:`c2c.thinking`; None without such steps.
    """

    sharer: ModelIdentity
    ids: Tensor
    kept: Tensor
    layers: list[tuple[QuantizedTensor, QuantizedTensor]] = field(repr=False)
    precision: Precision
    hidden: tuple[int, QuantizedTensor] | None = field(default=None, repr=False)
    realign: str | None = field(default=None, kw_only=True)

    @classmethod
    def from_cache(
        cls,
        sharer: ModelIdentity,
        ids: Tensor,
        kept: Tensor,
        layers: Sequence[KeyValue],
        hidden: tuple[int, Tensor] | None = None,
        realign: str | None = None,
    ) -> Self:
        """Make a handoff of keys and values as they lie in the cache, each ``[1, kv_heads, tokens, head_dim]``."""
        precision: Any = str(layers[0][0].dtype).removeprefix("torch.")
        quantized = [
            (QuantizedTensor(keys.contiguous()), QuantizedTensor(values.contiguous())) for keys, values in layers
        ]
        states = None if hidden is None else (hidden[0], QuantizedTensor(hidden[1].contiguous()))
        return cls(sharer, ids.cpu().long(), kept.cpu().long(), quantized, precision, states, realign=realign)

    @property
    def tokens(self) -> TokenBatch:
        """The sharer's tokens, one row."""
        return _one_row(self.ids)

    @property
    def thoughts(self) -> Tensor:
        """The columns of thinking steps, ``[steps]``."""
        return (self.ids == SLOT).nonzero().flatten()

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values, and hidden states."""
        hidden = 0 if self.hidden is None else self.hidden[1].nbytes
        return sum(keys.nbytes + values.nbytes for keys, values in self.layers) + hidden

    @property
    def id(self) -> str:
        """What was read and by whom: the same for the same tokens (and realignment of thoughts) and sharer."""
        sharer = self.sharer
        who = sharer.weights_key or sharer.name  # weights on disk are not known
        facts = [who, sharer.architecture, sharer.kv, self.ids.tolist(), *([self.realign] if self.realign else [])]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def cache(self, dtype: torch.dtype, device: torch.device) -> Cache:
        """Return the sharer's cache of all tokens, in ``dtype``."""
        return kv_cache.from_layers(
            (keys.dequantize(dtype).to(device), values.dequantize(dtype).to(device)) for keys, values in self.layers
        )

    def to(self, precision: Precision) -> Handoff:
        """Convert to another precision; 8 bits take a quarter of float32.

        Raises:
            HandoffError: an unknown precision.
        """
        if precision not in PRECISIONS:
            raise HandoffError(f"unknown precision {precision!r}; expected one of {', '.join(PRECISIONS)}.")
        if precision == self.precision:
            return self
        whole = ((keys.dequantize(torch.float32), values.dequantize(torch.float32)) for keys, values in self.layers)
        quantized = [
            (QuantizedTensor.quantize(keys, precision, 2), QuantizedTensor.quantize(values, precision, 3))
            for keys, values in whole
        ]
        hidden = self.hidden
        if hidden is not None:
            states = hidden[1].dequantize(torch.float32)
            hidden = hidden[0], QuantizedTensor.quantize(states, precision, 2)
        return replace(self, layers=quantized, precision=precision, hidden=hidden)

    def zeros_like(self, columns: Tensor | None = None) -> Handoff:
        """Return the same handoff with zeros for keys and values, for a control.

        Args:
            columns: of these; by default of all that are handed over.
        """
        columns = self.kept if columns is None else columns

        def zeros(part: QuantizedTensor) -> QuantizedTensor:
            data = part.data.clone()
            data[:, :, columns.to(data.device)] = 0
            return replace(part, data=data)

        layers, hidden = [(zeros(keys), zeros(values)) for keys, values in self.layers], self.hidden
        if hidden is not None:
            hidden = hidden[0], replace(hidden[1], data=torch.zeros_like(hidden[1].data))
        return replace(self, layers=layers, hidden=hidden)

    def projected(self, fuser: Any) -> list[KeyValue] | None:
        """Return entries that the sharer's side has projected with ``fuser`` already; else None."""
        return None

    def shared_prefix(self, ids: Sequence[int]) -> int:
        """Count the first tokens of ``ids`` that this handoff begins with."""
        return common_prefix(self.ids.tolist(), ids)

    # -- files -------------------------------------------------------------------------------------------------------

    def save(
        self,
        path: str | Path,
        *,
        bound_to: str | None = None,
        expires: float | None = None,
        key: bytes | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        """Write one safetensors file, with a manifest in its header.

        Args:
            path: the file.
            bound_to: what it may be used for, such as a conversation's id; :meth:`load` must be given the same.
            expires: seconds since 1970 after which it is refused.
            key: secret that signs manifest and content (HMAC-SHA256); without it a hash finds damage, but no forgery.
            about: facts that :func:`read_manifest` returns without reading the content, such as a name; JSON values.
        """
        path = Path(path)
        tensors = {"ids": self.ids, "kept": self.kept}
        parts = {
            f"{i}.{name}": part for i, pair in enumerate(self.layers) for name, part in zip(_SIDES, pair, strict=True)
        }
        if self.hidden is not None:
            parts["hidden"] = self.hidden[1]
        for name, part in parts.items():
            tensors[name] = part.data.cpu()
            if part.scale is not None:
                tensors[f"{name}.scale"] = part.scale.cpu()
        manifest = {
            "format": _FORMAT,
            "sharer": self.sharer.to_dict(),
            "precision": self.precision,
            "layers": len(self.layers),
            **({} if self.hidden is None else {"hidden_layer": self.hidden[0]}),
            "bound_to": bound_to,
            "expires": expires,
            **({} if self.realign is None else {"realign": self.realign}),
            "about": dict(about or {}),
        }
        header = {"manifest": json.dumps(manifest, sort_keys=True)}
        header["digest"] = _digest(header["manifest"], tensors, key)
        save_atomically(
            path.parent, lambda folder: save_file(tensors, Path(folder) / path.name, metadata=header), private=True
        )

    @classmethod
    def load(cls, path: str | Path, *, bound_to: str | None = None, key: bytes | None = None) -> Self:
        """Load what :meth:`save` wrote.

        Args:
            path: the file.
            bound_to: what it is to be used for.
            key: the secret that it was signed with.

        Raises:
            HandoffError: missing, cut off, damaged, forged, no handoff at all, expired, or made for something else.
        """
        path = Path(path)
        with _opened(path) as (file, header):
            file.seek(0)
            tensors = load(file.read())
        manifest = json.loads(header["manifest"])
        if not hmac.compare_digest(header["digest"], _digest(header["manifest"], tensors, key)):
            signed = " or was signed with another key" if key is not None else " (or was signed: pass its key)"
            raise HandoffError(f"{path} is damaged: its content does not have the digest in its header{signed}.")
        if manifest.get("bound_to") != bound_to:
            raise HandoffError(
                f"{path} was handed over for {manifest.get('bound_to')!r}, and is to be used for {bound_to!r}. A "
                "handoff is not taken from one conversation to another."
            )
        try:
            expired = manifest.get("expires") is not None and time.time() > manifest["expires"]
            handoff = cls._from_tensors(manifest, tensors)
        except (KeyError, TypeError, ValueError) as error:
            raise HandoffError(
                f"{path} is no whole handoff: {type(error).__name__} {error}. Let the sharer read again and save it."
            ) from error
        if expired:
            raise HandoffError(f"{path} has expired: let the sharer read again.")
        return handoff

    @classmethod
    def _from_tensors(cls, manifest: dict[str, Any], tensors: dict[str, Tensor]) -> Self:
        """Make a handoff of a file's content; ValueError or KeyError where parts are missing or do not fit."""

        def quantized(name: str) -> QuantizedTensor:
            return QuantizedTensor(tensors[name], tensors.get(f"{name}.scale"))

        layers = [(quantized(f"{index}.key"), quantized(f"{index}.value")) for index in range(manifest["layers"])]
        identity, ids, kept = ModelIdentity.from_dict(manifest["sharer"]), tensors["ids"], tensors["kept"]
        if ids.dim() != 1 or kept.dim() != 1 or not (int(kept.min()) >= 0 and int(kept.max()) < len(ids)):
            raise ValueError(f"{tuple(ids.shape)} token ids, of which columns {kept.tolist()[:8]} are handed over")
        expected = (1, identity.kv["kv_heads"], len(ids), identity.kv["head_dim"])
        realign, odd = manifest.get("realign"), ids[ids < 0]
        if bool((odd != SLOT).any()) or (len(odd) > 0) != isinstance(realign, str):
            raise ValueError(f"{len(odd)} columns without a token, and thoughts realigned by {realign!r}")
        if len(layers) != identity.kv["layers"] or any(part.data.shape != expected for pair in layers for part in pair):
            raise ValueError(f"{len(layers)} layers; expected {identity.kv['layers']}, each of shape {expected}")
        hidden = (int(manifest["hidden_layer"]), quantized("hidden")) if "hidden_layer" in manifest else None
        if hidden is not None and hidden[1].data.shape[:2] != (1, len(kept)):
            raise ValueError(f"hidden states of shape {tuple(hidden[1].data.shape)} for {len(kept)} tokens")
        return cls(identity, ids, kept, layers, manifest["precision"], hidden, realign=realign)


def read_manifest(path: str | Path) -> dict[str, Any]:
    """Read the manifest of a handoff's file and nothing else; its digest, over the content too, is not checked.

    Raises:
        HandoffError: missing, cut off, or no handoff at all.
    """
    with _opened(Path(path)) as (_, header):
        manifest: dict[str, Any] = json.loads(header["manifest"])
        return manifest


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, dict[str, str]]]:
    """Open a handoff's file; yields it with its header.

    It is opened once, where ``safe_open`` opens it twice and mixes two files if one is renamed to this path meanwhile.
    """
    if not path.is_file():
        raise HandoffError(f"no such handoff: {path}.")
    try:
        with path.open("rb") as file:
            header = _header(file)
            if not _has_manifest(header):
                raise HandoffError(f"{path} is no handoff: its header has no manifest of format {_FORMAT}.")
            yield file, header
    except (SafetensorError, OSError, EOFError) as error:
        raise HandoffError(f"{path} is cut off or no safetensors file: {error}") from error


def _header(file: BinaryIO) -> dict[str, str]:
    """Read the metadata of a safetensors file; EOFError where it is none, or shorter than its header says."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    try:
        tensors = json.loads(file.read(length)) if length <= size else {}
        metadata: dict[str, str] = tensors.pop("__metadata__", {})
        ends = [tensor["data_offsets"][1] for tensor in tensors.values()]
        whole = size == 8 + length + max(ends, default=-1)
    except (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise EOFError(f"its header can't be read ({type(error).__name__})") from error
    if not whole:
        raise EOFError(f"its {size} bytes are not those that its header lists")
    return metadata


def _has_manifest(header: Mapping[str, str]) -> bool:
    with suppress(KeyError, TypeError, ValueError):
        return json.loads(header["manifest"])["format"] == _FORMAT and "digest" in header
    return False


def _digest(manifest: str, tensors: dict[str, Tensor], key: bytes | None) -> str:
    """Hash manifest, names, shapes, dtypes and bytes."""
    sum_ = hmac.new(key, digestmod=hashlib.sha256) if key is not None else hashlib.sha256()
    sum_.update(manifest.encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        sum_.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        sum_.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return sum_.hexdigest()
