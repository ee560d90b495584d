"""An order: what a client asks a sharer to read, and which entries it wants of it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from c2c.remote.frame import Frame
from c2c.remote.packing import NUMBER_BYTES
from c2c.remote.refusal import Refusal
from c2c.tokens import TokenBatch, natural_positions


@dataclass(frozen=True)
class Order:
    """One order.

    Attributes:
        tokens: what is read, with mask and positions.
        stop: only so many columns are read.
        layers: sharer layers whose entries are sent, each once, in ascending order.
        columns: per row the columns that are sent, ascending, int64. What is drafted is sent as well.
        precision: on the wire; for projected entries too.
        draft_tokens: at most so many tokens are written first, greedily; one row only.
        fuser: hash of a fuser that the server has, to send projected entries instead; one row only.
    """

    tokens: TokenBatch
    stop: int
    layers: tuple[int, ...]
    columns: tuple[Tensor, ...] = field(repr=False)
    precision: str
    draft_tokens: int = 0
    fuser: str | None = None

    @property
    def token_hash(self) -> str:
        """What is read: the same for the same ids and padding."""
        digest = hashlib.sha256(repr(tuple(self.tokens.ids.shape)).encode())
        digest.update(self.tokens.ids.to("cpu", torch.int32).contiguous().numpy().tobytes())
        digest.update(self.tokens.mask.to("cpu", torch.uint8).contiguous().numpy().tobytes())
        return digest.hexdigest()

    def header(self) -> dict[str, Any]:
        """What stands in the header."""
        return {
            "stop": self.stop,
            "layers": list(self.layers),
            "precision": self.precision,
            "padded": self.tokens.padded,
            "draft_tokens": self.draft_tokens,
            "fuser": self.fuser,
            "tokens": self.token_hash,
        }

    def tensors(self) -> dict[str, Tensor]:
        """What stands in the body: ids, and mask and positions where they do not go without saying."""
        counts = torch.tensor([len(columns) for columns in self.columns])
        found = {"ids": self.tokens.ids, "columns": torch.cat(self.columns), "counts": counts}
        if not bool(self.tokens.mask.all()):
            found["mask"] = self.tokens.mask
        if not torch.equal(self.tokens.positions.cpu(), natural_positions(self.tokens.mask.cpu())):
            found["positions"] = self.tokens.positions
        return {name: tensor.to("cpu", torch.int32) for name, tensor in found.items()}


@dataclass(frozen=True)
class Menu:
    """What a server gives.

    Attributes:
        layers: sharer layers whose entries may be sent.
        precisions: in which they may be sent.
        words: number of token ids.
        context: positions of the model, None where its config does not say.
        tokens: most tokens of one order, padding and drafts included.
        fusers: hashes of the fusers that it can project with.
    """

    layers: frozenset[int]
    precisions: tuple[str, ...]
    words: int
    context: int | None
    tokens: int
    fusers: frozenset[str]

    def order(self, frame: Frame) -> Order:
        """Read an order and check every part of it.

        Raises:
            Refusal: it can't be read (400), is too large (413), or asks for what is not given (422).
        """
        header = frame.header
        tokens = self._tokens(frame.tensors(), header)
        stop = _whole(header, "stop", 1, tokens.length)
        order = Order(
            tokens=tokens,
            stop=stop,
            layers=self._layers(header),
            columns=_columns(frame.tensors(), tokens.rows, stop),
            precision=self._precision(header),
            draft_tokens=_whole(header, "draft_tokens", 0, self.tokens),
            fuser=self._fuser(header),
        )
        if order.token_hash != header.get("tokens"):
            raise Refusal(400, "malformed", "the hash of the token ids is not that in the header.")
        self._check_size(order)
        return order

    def _tokens(self, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> TokenBatch:
        ids = _tensor(tensors, "ids", None)
        self._check_count(ids.shape[0] * ids.shape[1])
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.words:
            raise Refusal(
                422,
                "tokens",
                f"token ids from {low} to {high}, and the model knows 0 to {self.words - 1}. Use the "
                "tokenizer that this server sends.",
            )
        shape = tuple(ids.shape)
        mask = _tensor(tensors, "mask", shape) != 0 if "mask" in tensors else torch.ones_like(ids, dtype=torch.bool)
        positions = _tensor(tensors, "positions", shape) if "positions" in tensors else natural_positions(mask)
        limit = min(self.context or 1 << 30, 1 << 30)
        if ids.shape[1] > limit or int(positions.min()) < 0 or int(positions.max()) >= limit:
            raise Refusal(
                413,
                "too_long",
                f"a prompt of {ids.shape[1]} tokens with positions up to {int(positions.max())}, and "
                f"the model was made for {limit}. Shorten the prompt.",
            )
        padded = bool(header.get("padded")) or not bool(mask.all())
        return TokenBatch(ids, mask, positions, padded)

    def _check_count(self, count: int) -> None:
        if count > self.tokens:
            raise Refusal(
                413,
                "too_long",
                f"the request has {count} tokens, padding and drafts included, and this server takes "
                f"{self.tokens}. Shorten the prompt, send smaller batches, or start it with a larger --max-tokens.",
            )

    def _check_size(self, order: Order) -> None:
        if (order.draft_tokens or order.fuser is not None) and order.tokens.rows != 1:
            raise Refusal(422, "order", f"drafts and projections are for one row; got {order.tokens.rows}.")
        if order.draft_tokens and order.stop != order.tokens.length:
            raise Refusal(422, "order", "a draft is written after the whole prompt; stop must be its length.")
        self._check_count(order.tokens.rows * (order.tokens.length + order.draft_tokens))
        if not order.draft_tokens and not any(len(columns) for columns in order.columns):
            raise Refusal(422, "order", "no column is asked for.")

    def _layers(self, header: Mapping[str, Any]) -> tuple[int, ...]:
        asked = header.get("layers")
        whole = isinstance(asked, list) and asked and all(type(layer) is int for layer in asked)
        if not whole or asked != sorted(set(asked or [])):
            raise Refusal(400, "malformed", "layers must be ascending whole numbers, each once.")
        layers: list[int] = asked or []
        if missing := [layer for layer in layers if layer not in self.layers]:
            raise Refusal(
                422,
                "layer",
                f"layers {missing} are not shared; this server gives {sorted(self.layers)}. Use a fuser "
                "that reads these, or start it with other --layers.",
            )
        return tuple(layers)

    def _precision(self, header: Mapping[str, Any]) -> str:
        asked = header.get("precision")
        if asked not in self.precisions:
            raise Refusal(
                422,
                "precision",
                f"precision {asked!r} is not given; expected one of {', '.join(self.precisions)}. "
                "Pass precision=... to RemoteSharer, or start the server with another --precision.",
            )
        return str(asked)

    def _fuser(self, header: Mapping[str, Any]) -> str | None:
        asked = header.get("fuser")
        if asked is not None and asked not in self.fusers:
            raise Refusal(422, "fuser", "this server does not have the fuser that is asked for; start it with --fuser.")
        return None if asked is None else str(asked)


def allowed_precisions(finest: str) -> tuple[str, ...]:
    """All precisions that take no more bytes than ``finest``."""
    return tuple(name for name, size in NUMBER_BYTES.items() if size <= NUMBER_BYTES[finest])


def _columns(tensors: Mapping[str, Tensor], rows: int, stop: int) -> tuple[Tensor, ...]:
    flat, counts = _tensor(tensors, "columns", ()), _tensor(tensors, "counts", (rows,))
    if bool((counts < 0).any()) or int(counts.sum()) != flat.numel():
        raise Refusal(400, "malformed", "counts of columns do not add up to the columns.")
    columns: tuple[Tensor, ...] = flat.split(counts.tolist())
    for chosen in columns:
        if chosen.numel() and (int(chosen[0]) < 0 or int(chosen[-1]) >= stop or bool((chosen.diff() <= 0).any())):
            raise Refusal(400, "malformed", f"columns must ascend, from 0 to {stop - 1}.")
    return columns


def _tensor(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...] | None) -> Tensor:
    """An int32 tensor as int64; shape None: a filled matrix, (): a vector of any length."""
    tensor = tensors.get(name)
    fits = tensor is not None and tensor.dtype == torch.int32
    if fits and tensor is not None:
        fits = tensor.shape == shape or (shape == () and tensor.dim() == 1)
        fits = fits or (shape is None and tensor.dim() == 2 and tensor.numel() > 0)
    if not fits or tensor is None:
        raise Refusal(400, "malformed", f"the body has no int32 tensor {name!r} of the right shape.")
    return tensor.long()


def _whole(header: Mapping[str, Any], name: str, low: int, high: int) -> int:
    value = header.get(name)
    if type(value) is not int or not low <= value <= high:
        raise Refusal(400, "malformed", f"{name} is {value!r}, expected a whole number from {low} to {high}.")
    return value
