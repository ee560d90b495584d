"""The protocol between ``RemoteSharer`` and ``c2c share``: the handshake, the request for a prefill, and its checks.

GET  /v1/sharer    the handshake; ``?tokenizer=true`` with the tokenizer's files
POST /v1/prefill   a :class:`PrefillRequest` as JSON; the answer is a stream of records, see wire.py
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor

from c2c.errors import RemoteError
from c2c.fusers import Fuser
from c2c.handoff import PRECISIONS
from c2c.identity import ModelIdentity, differences
from c2c.kv_cache import KVGeometry
from c2c.remote.wire import FORMAT
from c2c.serving.errors import ApiError
from c2c.tokens import TokenBatch, natural_positions

HANDSHAKE_PATH, PREFILL_PATH = "/v1/sharer", "/v1/prefill"
_MOST_LAYERS = 4096


class Handshake(BaseModel, frozen=True):
    """Describe a server's model and limits."""

    format: str  # of the wire
    version: str  # of c2c
    sharer: dict[str, Any]  # identity of the model
    config: dict[str, Any]  # of its text decoder
    dtype: str  # of its cache
    layers: list[int]  # whose entries may be sent
    precisions: list[str]  # in which they may be sent, the finest first
    fusers: list[str]  # hashes of those that the server projects with
    tokens: int  # of one request at most, padding and drafts included
    vocabulary: int  # number of token ids
    context: int | None = None  # positions of the model, None where its config does not say
    rotary: list[float] | None = None  # checksum of the rotary tables per layer, None without rotary embedding
    rotary_error: str | None = None  # why the rotation can't be taken off, None where it can
    tokenizer: dict[str, str] | None = None  # files by name, None where there is none or it was not wanted

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

    @classmethod
    def from_dict(cls, data: Any, url: str) -> Handshake:
        """Read what a server sent; unknown keys are ignored.

        Raises:
            RemoteError: another version, or something is missing or has another form.
        """
        try:
            if data["format"] != FORMAT:
                raise ValueError(f"format {data['format']!r} of version {data.get('version')}, expected {FORMAT!r}")
            found = cls.model_validate(data)
            usable = isinstance(found.torch_dtype, torch.dtype) and not PRECISIONS.keys().isdisjoint(found.precisions)
            if not usable or not 0 < found.geometry.layers <= _MOST_LAYERS:
                raise ValueError("facts out of range")
        except (ValidationError, ValueError, KeyError, TypeError, AttributeError) as error:
            message = f"the handshake of the sharer at {url} can't be read ({type(error).__name__}: {error})."
            raise RemoteError(f"{message} Bring both sides to the same version of c2c.", "malformed") from error
        return found


class PrefillRequest(BaseModel, frozen=True, extra="forbid"):
    """Describe what a sharer shall read, and which entries of it are wanted."""

    sharer: dict[str, Any]  # identity of the model that is meant
    ids: list[list[int]]  # [rows, tokens]
    stop: int  # only so many columns are read
    layers: list[int]  # whose entries are sent, each once, in ascending order
    columns: list[list[int]]  # per row those that are sent, ascending; what is drafted is sent as well
    precision: str  # on the wire; for projected entries too
    mask: list[list[bool]] | None = None  # which ids are no padding; None for all
    positions: list[list[int]] | None = None  # None where they count the tokens of each row
    padded: bool = False  # whether the batch counts as padded though the mask is full
    draft_tokens: int = 0  # at most so many are written first, greedily; one row only
    fuser: str | None = None  # hash of a fuser of the server, to send projected entries instead; one row only

    @classmethod
    def from_batch(
        cls, sharer: ModelIdentity, batch: TokenBatch, columns: Sequence[Tensor], layers: Sequence[int], **rest: Any
    ) -> PrefillRequest:
        """Make a request for a batch; mask and positions are left out where they follow from the rest."""
        mask, positions = batch.mask.cpu(), batch.positions.cpu()
        return cls(
            sharer=sharer.to_dict(),
            ids=batch.ids.tolist(),
            mask=None if bool(mask.all()) else mask.tolist(),
            positions=None if torch.equal(positions, natural_positions(mask)) else positions.tolist(),
            padded=batch.padded,
            layers=list(layers),
            columns=[chosen.tolist() for chosen in columns],
            **rest,
        )

    @property
    def kind(self) -> str:
        """``project``, ``read`` (with a draft) or ``prefill``, for logs."""
        return "project" if self.fuser is not None else "read" if self.draft_tokens else "prefill"

    def batch(self) -> TokenBatch:
        """Return the tokens; ValueError where ids, mask and positions are no matrices of one shape."""
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
    try:
        hard, soft = differences("sharer", ModelIdentity.from_dict(request.sharer), offer.identity, "request")
    except TypeError as error:
        message = "sharer must be the identity of the model that is meant."
        raise ApiError(400, message, code="malformed", param="sharer") from error
    if hard or soft:
        message = "the request is for another model than the one that is served here."
        raise ApiError(409, message, code="mismatch", param="sharer", details={"sharer": offer.sharer})
    try:
        batch = request.batch()
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise ApiError(400, f"the tokens can't be read: {error}.", code="malformed", param="ids") from error
    _check_size(request, batch, offer)
    _check_selection(request, batch, offer)
    return batch


def _refuse_if(wrong: bool, status: int, code: str, param: str, message: str) -> None:
    if wrong:
        raise ApiError(status, message, code=code, param=param)


def _check_size(request: PrefillRequest, batch: TokenBatch, offer: Handshake) -> None:
    draft, stop, count = request.draft_tokens, request.stop, batch.rows * (batch.length + request.draft_tokens)
    outside = not 0 <= draft <= offer.tokens or not 1 <= stop <= batch.length
    _refuse_if(outside, 400, "malformed", "stop", f"draft_tokens {draft} or stop {stop} is out of range.")
    message = f"the request has {count} tokens, padding and drafts included, and this server takes {offer.tokens}."
    advice = "Shorten the prompt, send smaller batches, or start it with a larger --max-tokens."
    _refuse_if(count > offer.tokens, 413, "too_long", "ids", f"{message} {advice}")
    last, limit = int(batch.positions.max()), offer.context or 1 << 30
    message = f"a prompt of {batch.length} tokens with positions up to {last}, and the model was made for {limit}."
    beyond = batch.length > limit or int(batch.positions.min()) < 0 or last >= limit
    _refuse_if(beyond, 413, "too_long", "ids", f"{message} Shorten the prompt.")
    message = f"drafts and projections are for one row; got {batch.rows}."
    _refuse_if(batch.rows > 1 and (draft > 0 or request.fuser is not None), 422, "request", "ids", message)
    message = "a draft is written after the whole prompt; stop must be its length."
    _refuse_if(draft > 0 and stop != batch.length, 422, "request", "stop", message)


def _check_selection(request: PrefillRequest, batch: TokenBatch, offer: Handshake) -> None:
    low, high, words = int(batch.ids.min()), int(batch.ids.max()), offer.vocabulary
    message = f"token ids from {low} to {high}, and the model knows 0 to {words - 1}."
    advice = "Use the tokenizer that this server sends."
    _refuse_if(low < 0 or high >= words, 422, "tokens", "ids", f"{message} {advice}")
    fit = len(request.columns) == batch.rows and all(
        chosen == sorted(set(chosen) & set(range(request.stop))) for chosen in request.columns
    )
    message = f"columns must be {batch.rows} lists of ascending numbers from 0 to {request.stop - 1}."
    _refuse_if(not fit, 400, "malformed", "columns", message)
    empty = not request.draft_tokens and not any(request.columns)
    _refuse_if(empty, 422, "request", "columns", "no column is wanted.")
    ascending = request.layers == sorted(set(request.layers)) and len(request.layers) > 0
    _refuse_if(not ascending, 400, "malformed", "layers", "layers must be ascending whole numbers, each once.")
    missing = [layer for layer in request.layers if layer not in offer.layers]
    message = f"layers {missing} are not shared; this server gives {offer.layers}."
    advice = "Use a fuser that reads these, or start it with other --layers."
    _refuse_if(bool(missing), 422, "layer", "layers", f"{message} {advice}")
    message = f"precision {request.precision!r} is not given; expected one of {', '.join(offer.precisions)}."
    advice = "Pass precision=... to RemoteSharer, or start the server with another --precision."
    _refuse_if(request.precision not in offer.precisions, 422, "precision", "precision", f"{message} {advice}")
    message = "this server does not have the fuser of this request; start it with --fuser."
    _refuse_if(request.fuser not in (None, *offer.fusers), 422, "fuser", "fuser", message)


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
    state, config = [*fuser.named_parameters(), *fuser.named_buffers()], fuser.config
    kind = [fuser.family, fuser.trained, config.layer_map, config.sharer_kv, config.receiver_kv, config.sharer]
    facts = json.dumps([*kind, slots_of(fuser)], sort_keys=True)
    versions = (facts, [(name, x.data_ptr(), -1 if x.is_inference() else x._version) for name, x in state])
    known = _HASHES.get(fuser)
    if known is None or known[0] != versions:
        digest = hashlib.sha256(facts.encode())
        for name, tensor in sorted(fuser.state_dict().items()):
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        known = _HASHES[fuser] = versions, digest.hexdigest()
    return known[1]
