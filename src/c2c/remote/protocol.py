"""The protocol between ``RemoteSharer`` and ``c2c share``: the handshake, the request for a prefill, and its checks.

GET  /v1/sharer    the handshake; ``?tokenizer=true`` with the tokenizer's files
POST /v1/prefill   a :class:`PrefillRequest` as JSON; the answer is a stream of records, see wire.py
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import chain
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from c2c.errors import RemoteError
from c2c.fusers import Fuser
from c2c.identity import ModelIdentity, differences
from c2c.kv_cache import KVGeometry
from c2c.remote.wire import FORMAT, NUMBER_BYTES, PRECISIONS
from c2c.serving.errors import ApiError
from c2c.tokens import TokenBatch, natural_positions

HANDSHAKE_PATH, PREFILL_PATH = "/v1/sharer", "/v1/prefill"
_MOST_LAYERS = 4096


@dataclass(frozen=True)
class Handshake:
    """Describe a server's model and limits.

    Attributes:
        format: of the wire.
        version: of c2c.
        sharer: identity of the model.
        config: of its text decoder.
        dtype: of its cache.
        layers: those whose entries may be sent.
        precisions: in which they may be sent, the finest first.
        fusers: hashes of the fusers that the server projects with.
        tokens: of one request at most, padding and drafts included.
        vocabulary: number of token ids.
        context: positions of the model, None where its config does not say.
        rotary: a checksum per layer of its rotary tables, None without rotary embedding.
        rotary_error: why its rotation can't be taken off, None where it can.
        tokenizer: its files, None where there is none or it was not wanted.
    """

    format: str
    version: str
    sharer: dict[str, Any]
    config: dict[str, Any]
    dtype: str
    layers: list[int]
    precisions: list[str]
    fusers: list[str]
    tokens: int
    vocabulary: int
    context: int | None = None
    rotary: list[float] | None = None
    rotary_error: str | None = None
    tokenizer: dict[str, str] | None = None

    @property
    def identity(self) -> ModelIdentity:
        """Who the model is."""
        return ModelIdentity.from_dict(self.sharer)

    @property
    def geometry(self) -> KVGeometry:
        """The shape of the model's cache."""
        return KVGeometry(**self.identity.kv)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type of the model's cache."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Any, url: str) -> Handshake:
        """Read what a server sent; unknown keys are ignored.

        Raises:
            RemoteError: another version, or something is missing or has another form.
        """
        try:
            if data["format"] != FORMAT:
                raise ValueError(f"format {data['format']!r} of version {data.get('version')}, expected {FORMAT!r}")
            known = {field.name for field in fields(cls)}
            found = cls(**{name: value for name, value in data.items() if name in known})
            usable = isinstance(found.torch_dtype, torch.dtype) and set(found.precisions) & set(PRECISIONS)
            if not usable or not 0 < found.geometry.layers <= _MOST_LAYERS or not isinstance(found.tokens, int):
                raise ValueError("facts out of range")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RemoteError(
                f"the handshake of the sharer at {url} can't be read ({type(error).__name__}: {error}). Bring both "
                "sides to the same version of c2c.",
                "malformed",
            ) from error
        return found


@dataclass(frozen=True, kw_only=True)
class PrefillRequest:
    """Describe what a sharer shall read, and which entries of it are wanted.

    Attributes:
        sharer: identity of the model that is meant.
        ids: token ids, ``[rows, tokens]``.
        mask: which of them are no padding; None for all.
        positions: None where they count the tokens of each row.
        padded: whether the batch counts as padded though the mask is full.
        stop: only so many columns are read.
        layers: sharer layers whose entries are sent, each once, in ascending order.
        columns: per row the columns that are sent, ascending. What is drafted is sent as well.
        precision: on the wire; for projected entries too.
        draft_tokens: at most so many tokens are written first, greedily; one row only.
        fuser: hash of a fuser of the server, to send projected entries instead; one row only.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}  # read by FastAPI

    sharer: dict[str, Any]
    ids: list[list[int]]
    stop: int
    layers: list[int]
    columns: list[list[int]]
    precision: str
    mask: list[list[bool]] | None = None
    positions: list[list[int]] | None = None
    padded: bool = False
    draft_tokens: int = 0
    fuser: str | None = None

    @classmethod
    def from_batch(
        cls, sharer: ModelIdentity, batch: TokenBatch, columns: Sequence[Tensor], layers: Sequence[int], **rest: Any
    ) -> PrefillRequest:
        """Make a request for a batch; mask and positions are left out where they follow from the rest."""
        mask, positions = batch.mask.cpu(), batch.positions.cpu()
        natural = torch.equal(positions, natural_positions(mask))
        return cls(
            sharer=sharer.to_dict(),
            ids=batch.ids.tolist(),
            mask=None if bool(mask.all()) else mask.tolist(),
            positions=None if natural else positions.tolist(),
            padded=batch.padded,
            layers=list(layers),
            columns=[chosen.tolist() for chosen in columns],
            **rest,
        )

    @property
    def kind(self) -> str:
        """``project``, ``read`` (with a draft) or ``prefill``, for logs."""
        return "project" if self.fuser is not None else "read" if self.draft_tokens else "prefill"

    def encode(self) -> bytes:
        """Return JSON."""
        return json.dumps(asdict(self), separators=(",", ":")).encode()

    def batch(self) -> TokenBatch:
        """Return the tokens.

        Raises:
            ValueError: ids, mask and positions have different shapes, or a row has another length.
        """
        ids = torch.tensor(self.ids)
        mask = torch.ones_like(ids, dtype=torch.bool) if self.mask is None else torch.tensor(self.mask)
        positions = natural_positions(mask) if self.positions is None else torch.tensor(self.positions)
        if ids.dim() != 2 or not ids.numel() or not ids.shape == mask.shape == positions.shape:
            raise ValueError("ids, mask and positions must be matrices of one shape")
        return TokenBatch(ids, mask, positions, self.padded or self.mask is not None)


def check_request(request: PrefillRequest, offer: Handshake) -> TokenBatch:
    """Check every part of a request against what a server offers, and return its tokens.

    Raises:
        ApiError: it can't be read (400), is for another model (409), too large (413), or asks for something that is
            not offered (422).
    """
    _check_identity(request.sharer, offer)
    try:
        batch = request.batch()
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise ApiError(400, f"the tokens can't be read: {error}.", code="malformed", param="ids") from error
    for wrong, status, code, param, message in chain(
        _size(request, batch, offer), _terms(request, batch, offer)
    ):  # lazily: the size is checked first
        if wrong:
            raise ApiError(status, message, code=code, param=param)
    return batch


def offered_precisions(finest: str) -> list[str]:
    """Return all precisions that take no more bytes than ``finest``."""
    return [name for name, size in NUMBER_BYTES.items() if size <= NUMBER_BYTES[finest]]


def _check_identity(given: dict[str, Any], offer: Handshake) -> None:
    try:
        hard, soft = differences("sharer", ModelIdentity.from_dict(given), offer.identity, "request")
    except (TypeError, AttributeError) as error:
        message = "sharer must be the identity of the model that is meant."
        raise ApiError(400, message, code="malformed", param="sharer") from error
    if hard or soft:
        message = "the request is for another model than the one that is served here."
        raise ApiError(409, message, code="mismatch", param="sharer", details={"sharer": offer.sharer})


_Check = tuple[bool, int, str, str, str]  # whether it is wrong, HTTP status, code, field, message


def _size(request: PrefillRequest, batch: TokenBatch, offer: Handshake) -> Iterator[_Check]:
    """Check how much is read."""
    draft, stop, count = request.draft_tokens, request.stop, batch.rows * (batch.length + request.draft_tokens)
    message = f"draft_tokens {draft} or stop {stop} is out of range."
    yield not 0 <= draft <= offer.tokens or not 1 <= stop <= batch.length, 400, "malformed", "stop", message
    message = f"the request has {count} tokens, padding and drafts included, and this server takes {offer.tokens}."
    advice = "Shorten the prompt, send smaller batches, or start it with a larger --max-tokens."
    yield count > offer.tokens, 413, "too_long", "ids", f"{message} {advice}"
    last, limit = int(batch.positions.max()), offer.context or 1 << 30
    beyond = batch.length > limit or int(batch.positions.min()) < 0 or last >= limit
    message = f"a prompt of {batch.length} tokens with positions up to {last}, and the model was made for {limit}."
    yield beyond, 413, "too_long", "ids", f"{message} Shorten the prompt."
    single = not (draft or request.fuser is not None) or batch.rows == 1
    yield not single, 422, "request", "ids", f"drafts and projections are for one row; got {batch.rows}."
    message = "a draft is written after the whole prompt; stop must be its length."
    yield draft > 0 and stop != batch.length, 422, "request", "stop", message


def _terms(request: PrefillRequest, batch: TokenBatch, offer: Handshake) -> Iterator[_Check]:
    """Check what is wanted."""
    low, high, words = int(batch.ids.min()), int(batch.ids.max()), offer.vocabulary
    message = f"token ids from {low} to {high}, and the model knows 0 to {words - 1}."
    yield low < 0 or high >= words, 422, "tokens", "ids", f"{message} Use the tokenizer that this server sends."
    fits = len(request.columns) == batch.rows and all(
        chosen == sorted(set(chosen) & set(range(request.stop))) for chosen in request.columns
    )
    message = f"columns must be {batch.rows} lists of ascending numbers from 0 to {request.stop - 1}."
    yield not fits, 400, "malformed", "columns", message
    empty = not request.draft_tokens and not any(request.columns)
    yield empty, 422, "request", "columns", "no column is wanted."
    ascending = request.layers == sorted(set(request.layers)) and len(request.layers) > 0
    yield not ascending, 400, "malformed", "layers", "layers must be ascending whole numbers, each once."
    missing = [layer for layer in request.layers if layer not in offer.layers]
    message = f"layers {missing} are not shared; this server gives {offer.layers}."
    advice = "Use a fuser that reads these, or start it with other --layers."
    yield bool(missing), 422, "layer", "layers", f"{message} {advice}"
    message = f"precision {request.precision!r} is not given; expected one of {', '.join(offer.precisions)}."
    advice = "Pass precision=... to RemoteSharer, or start the server with another --precision."
    yield request.precision not in offer.precisions, 422, "precision", "precision", f"{message} {advice}"
    unknown = request.fuser is not None and request.fuser not in offer.fusers
    message = "this server does not have the fuser of this request; start it with --fuser."
    yield unknown, 422, "fuser", "fuser", message


# -- fusers ------------------------------------------------------------------------------------------------------------

_HASHES: WeakKeyDictionary[Fuser, tuple[Any, str]] = WeakKeyDictionary()


def slots_of(fuser: Fuser) -> int | None:
    """Return how many entries a fuser of private context makes of any prompt; None for one per token."""
    return getattr(fuser.config, "slots", None)


def fuser_hash(fuser: Fuser) -> str:
    """Return the sha256 over family, layer map, geometries, identities and all weights.

    Client and server have the same one only if they would project alike. It is computed again only when a weight was
    written or replaced since the last time.
    """
    state = [*fuser.named_parameters(), *fuser.named_buffers()]
    config = [
        fuser.family,
        fuser.trained,
        fuser.config.layer_map,
        fuser.config.sharer_kv,
        fuser.config.receiver_kv,
        fuser.config.sharer,
        slots_of(fuser),
    ]
    facts = json.dumps(config, sort_keys=True)
    versions = (facts, [(name, x.data_ptr(), -1 if x.is_inference() else x._version) for name, x in state])
    known = _HASHES.get(fuser)
    if known is None or known[0] != versions:
        digest = hashlib.sha256(facts.encode())
        for name, tensor in sorted(fuser.state_dict().items()):
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        known = _HASHES[fuser] = versions, digest.hexdigest()
    return known[1]
