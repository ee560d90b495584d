"""RemoteSharer: a sharer whose weights are on another machine, in the place of a local one."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Never, Self, cast

import httpx
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor
from transformers import Cache

from c2c import kv_cache
from c2c.errors import CacheError, HandoffError, MismatchError, RemoteError, SharerLost
from c2c.fusers import Fuser
from c2c.handoff import PRECISIONS, Handoff, Precision, QuantizedTensor, SharerPrompt
from c2c.identity import differences, identify
from c2c.kv_cache import KeyValue, KVGeometry
from c2c.loading import load
from c2c.private_context import project
from c2c.remote import protocol
from c2c.remote.connection import Connection, Loss, check_unchanged, read_all, ssl_context
from c2c.remote.handshake import Handshake
from c2c.remote.protocol import Number, PrefillRequest, Record, Rows, WireError, fuser_hash, packed_bytes, spread
from c2c.serving.config import is_loopback, read_keys
from c2c.sharer import EntrySelection, Sharer
from c2c.tokens import TokenBatch, natural_positions

_NUMBERS = TypeAdapter(list[Number])
_LARGEST_HANDSHAKE = 1 << 28
_ADVICE = "Read with sharer.read(...), which sends everything."


@dataclass(frozen=True)
class ProjectedHandoff(Handoff):
    """Hold what one fuser made of a prompt that was read on another machine, and not the sharer's cache.

    Its ``layers`` are entries for the receiver's cache, keys without rotation.

    Attributes:
        fuser: hash of the fuser.
        wire_bytes: of the entries that crossed, the sharer's or projected ones, whichever were fewer.
    """

    fuser: str = ""
    wire_bytes: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the entries as they crossed."""
        return self.wire_bytes

    @property
    def held_bytes(self) -> int:
        """Bytes that it takes here."""
        return super().nbytes

    def projected(self, fuser: Fuser) -> list[KeyValue]:
        """Return the entries, on the fuser's device.

        Raises:
            HandoffError: it was read for another fuser.
        """
        if fuser_hash(fuser) != self.fuser:
            raise HandoffError(f"this handoff was read for another fuser, whose entries it holds. {_ADVICE}")
        return [
            (keys.dequantize(fuser.dtype).to(fuser.device), values.dequantize(fuser.dtype).to(fuser.device))
            for keys, values in self.layers
        ]

    def _refuse(self, *args: Any, **kwargs: Any) -> Never:
        # zeros for a control would be made of entries rather than of what was read, and so be no control
        raise HandoffError(
            f"this handoff holds only what one fuser made: no whole cache, and is neither converted, zeroed nor saved. "
            f"{_ADVICE}"
        )

    cache = to = save = zeros_like = _refuse


class RemoteSharer(Sharer):
    """Use the model behind ``c2c share`` like a local :class:`~c2c.sharer.Sharer`.

    It connects at once: identity, tokenizer and config of the model cross, no weights. A prefill then brings the
    entries that a fuser reads, and nothing else. The server keeps nothing: ``read`` with ``reuse=`` lets it read
    everything again, but only what is new crosses.

    Args:
        url: ``https://host:port``, or ``http://...``.
        token: bearer key; by default ``C2C_TOKEN`` of the environment, or the first key of ``key_file``.
        key_file: file with the key; by default ``C2C_KEY_FILE`` of the environment.
        verify: whether to check the server's certificate, a file of certificates to trust, or an ``ssl.SSLContext``.
        client_cert: PEM file with a certificate and its key, for servers that want one; by default
            ``C2C_CLIENT_CERT`` of the environment.
        precision: of entries on the wire: ``float32``, ``bfloat16``, ``float16``, ``int8`` or ``float8``; by default
            the model's own, which changes nothing, or the finest that the server gives.
        on_failure: when the sharer is lost after the model was made: ``raise``, or ``receiver_only``: the receiver
            answers alone, and the report says so.
        timeout: seconds for one call, all attempts included.
        retries: further attempts when the connection fails or the server is busy.
        tokenizer: the model's tokenizer where it is at hand (object, alias, hub id or folder); it need not cross then.

    Attributes:
        precision: of entries on the wire.
        traffic: what has crossed since the connection was made.

    Raises:
        RemoteError: the server can't be reached, refuses, or is no such server; later ``SharerLost`` in its place with
            ``on_failure="receiver_only"``.
        MismatchError: the tokenizer is not the model's; later another model is served.
        ModelLoadError: the tokenizer can't be loaded.
    """

    generates = False

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        key_file: str | Path | None = None,
        verify: Any = True,
        client_cert: str | Path | None = None,
        precision: str | None = None,
        on_failure: Literal["raise", "receiver_only"] = "raise",
        timeout: float = 120.0,
        retries: int = 3,
        tokenizer: Any = None,
    ) -> None:
        token, key_file = token or os.environ.get("C2C_TOKEN"), key_file or os.environ.get("C2C_KEY_FILE")
        if not token and key_file:
            token = read_keys(key_file)[0]
        _check_options(url, token, precision, on_failure)
        trust = ssl_context(verify, client_cert or os.environ.get("C2C_CLIENT_CERT"))
        self._connection = Connection(url, token, trust, timeout, retries)
        self.url, self.on_failure, self._wanted = self._connection.url, on_failure, precision
        self.traffic = self._connection.traffic
        self._fuser: Fuser | None = None
        path = protocol.HANDSHAKE_PATH + ("?tokenizer=true" if tokenizer is None else "")
        data = self._connection.call(path, partial(read_all, largest=_LARGEST_HANDSHAKE))
        self._handshake = Handshake.parse(data, self.url)
        self.identity, self.geometry = self._handshake.sharer, self._handshake.geometry
        self.rope_scheme, self.left_out = self._handshake.rope, {}  # whatever is left out is left there
        model = self._handshake.build_model(self.url)
        given = tokenizer is not None
        tokenizer = load(model, tokenizer=tokenizer)[1] if given else self._handshake.load_tokenizer(self.url)
        self._check_parts(model, tokenizer)
        super().__init__(model, tokenizer, f"{self.identity.name} at {self.url}")
        self.precision = self._precision_for(model.dtype)

    def _check_parts(self, model: Any, tokenizer: Any) -> None:
        """Check that config, tokenizer and template that came are those of the identity that came."""
        ours = identify(model, tokenizer, self.identity.name, self.geometry)
        ours = replace(ours, architecture=self.identity.architecture)
        hard, soft = differences("sharer", self.identity, ours, "connection")
        if hard or soft:
            advice = "Pass the tokenizer of that model, or none; bring both sides to the same version of transformers."
            raise MismatchError(hard + soft, advice, "connection")

    @property
    def device(self) -> torch.device:
        """Where entries arrive: the host."""
        return torch.device("cpu")

    @property
    def lost(self) -> Loss | None:
        """Why the last call failed; None if it did not, or if there was none."""
        return self._connection.lost

    def check_rotary(self) -> None:
        """Make sure that the rotation can be taken off the model's keys, which the server has tried.

        Raises:
            CacheError: it can't.
        """
        if self._handshake.rotary_error is not None:
            raise CacheError(self._handshake.rotary_error)

    def release(self) -> None:
        """Do nothing: the weights are not here."""

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def share(self, batch: TokenBatch, wanted: EntrySelection) -> Cache:
        """Return the wanted entries at their places; other columns are zero, and other layers empty.

        A batch with more tokens than the server takes at a time is sent in parts.

        Raises:
            RemoteError: the sharer is lost.
        """
        layers, most = sorted(set(wanted.layers)), max(1, self._handshake.tokens // batch.length)
        columns = [wanted.columns[wanted.rows == row].unique() for row in range(batch.rows)]
        parts = [
            self._cache(batch.select(range(i, min(i + most, batch.rows))), columns[i : i + most], layers, wanted.stop)
            for i in range(0, batch.rows, most)
        ]
        layered = zip(*(kv_cache.layers(cache) for cache in parts), strict=True)
        return kv_cache.from_layers((torch.cat([k for k, _ in x]), torch.cat([v for _, v in x])) for x in layered)

    def prefill(self, batch: TokenBatch, stop: int | None = None, cache: Cache | None = None) -> Cache:
        """Return the whole cache of the first ``stop`` columns: every layer crosses.

        Raises:
            CacheError: there is a cache to extend, which the server does not have. RemoteError: the sharer is lost.
        """
        if cache is not None and cache.layers:
            raise CacheError(f"{self.name} can't extend a cache that is here. Prefill the whole prompt.")
        stop = batch.length if stop is None else stop
        return self._cache(batch, [torch.arange(stop)] * batch.rows, list(range(self.geometry.layers)), stop)

    def for_fuser(self, fuser: Any) -> Self:
        """Return the same sharer, whose ``read`` gives what this fuser makes of a prompt."""
        if fuser.keeps_tokens:  # what stands before the passage is of use as well
            return self
        bound = copy.copy(self)
        bound._fuser = fuser
        return bound

    def _only_shares(self, *args: Any, **kwargs: Any) -> Never:
        """Refuse: the weights are not here; ``read(draft_tokens=...)`` lets the server draft."""
        raise RemoteError(
            f"{self.name} only shares its cache: for text the weights are needed, which are on the other machine. Load "
            "the model here for that (c2c run --mode c2c needs no text of it).",
            "weights",
        )

    draft = generate = answer = next_logits = _only_shares

    # -- handoffs ----------------------------------------------------------------------------------------------------

    def _read_prompt(self, plan: SharerPrompt, tokens: TokenBatch, cache: Cache, draft_tokens: int) -> Handoff:
        draft_tokens = max(0, draft_tokens)
        if self._fuser is not None:
            return self._read_for(self._fuser, plan, tokens, draft_tokens)
        known = kv_cache.length(cache) if cache.layers else 0
        columns, layers = torch.arange(known, tokens.length), list(range(self.geometry.layers))
        request = self._request(tokens, [columns], layers, tokens.length, draft_tokens)
        drafted, found = self._prefilled(request)
        ids, kept = plan.followed_by(drafted).tensors()
        if not known:
            return Handoff(self.identity, ids, kept, [rows[0] for rows in found.values()], self.precision)
        new = [(keys.dequantize(self.dtype), values.dequantize(self.dtype)) for ((keys, values),) in found.values()]
        return Handoff.from_cache(self.identity, ids, kept, kv_cache.layers(kv_cache.append(cache, new)))

    def _read_for(self, fuser: Fuser, plan: SharerPrompt, tokens: TokenBatch, draft_tokens: int) -> Handoff:
        """Read what a fuser needs or what the server makes of it, whichever is less, and project the former here."""
        columns, layers = torch.tensor(plan.kept), sorted(set(fuser.config.source_layers))
        request = self._request(tokens, [columns], layers, tokens.length, draft_tokens)
        name = fuser_hash(fuser)
        if name in self._handshake.fusers:
            projected = request.model_copy(update={"fuser": name, "precision": self._precision_for(fuser.dtype)})
            request = min(request, projected, key=self._size)
        drafted, found = self._prefilled(request)
        ids, kept = plan.followed_by(drafted).tensors()
        entries = [rows[0] for rows in found.values()]
        size = sum(keys.nbytes + values.nbytes for keys, values in entries)
        if request.fuser is None:
            placed = self._placed(found, [kept], layers, len(ids))
            made = project(Handoff.from_cache(self.identity, ids, kept, placed), self, fuser).layers
            entries = [(QuantizedTensor(keys), QuantizedTensor(values)) for keys, values in made]
        precision = cast(Precision, request.precision)
        return ProjectedHandoff(self.identity, ids, kept, entries, precision, fuser=name, wire_bytes=size)

    def _read_thinking(self, *args: Any) -> Never:
        """Refuse: a request has no place for thinking steps."""
        raise RemoteError(
            f"{self.name} takes no thinking steps from here: pass think=0, or load the model on this machine.",
            "weights",
        )

    # -- requests ----------------------------------------------------------------------------------------------------

    def _request(
        self, batch: TokenBatch, columns: Sequence[Tensor], layers: list[int], stop: int, draft_tokens: int = 0
    ) -> PrefillRequest:
        """Make a request; mask and positions are left out where they follow from the rest."""
        mask, positions = batch.mask.cpu(), batch.positions.cpu()
        return PrefillRequest(
            sharer=self.identity,
            ids=batch.ids.tolist(),
            stop=stop,
            layers=layers,
            columns=[chosen.tolist() for chosen in columns],
            precision=self.precision,
            mask=None if bool(mask.all()) else mask.tolist(),
            positions=None if torch.equal(positions, natural_positions(mask)) else positions.tolist(),
            padded=batch.padded,
            draft_tokens=draft_tokens,
        )

    def _expected(self, request: PrefillRequest) -> tuple[KVGeometry, list[int], int]:
        """Return the shape of the cache whose entries a request brings, their layers, and their columns at most."""
        columns = sum(map(len, request.columns)) + request.draft_tokens
        if request.fuser is None or self._fuser is None:
            return self.geometry, request.layers, columns
        geometry, slots = KVGeometry(**self._fuser.config.receiver_kv), getattr(self._fuser.config, "slots", None)
        return geometry, list(range(geometry.layers)), columns if slots is None else slots

    def _size(self, request: PrefillRequest) -> int:
        geometry, layers, columns = self._expected(request)
        return packed_bytes(geometry, len(layers), columns, request.precision)

    def _cache(self, batch: TokenBatch, columns: Sequence[Tensor], layers: list[int], stop: int) -> Cache:
        """Return the entries of a shared prompt in a cache of ``stop`` columns."""
        self.check_tokens(batch)
        found: dict[int, Rows] = {}
        if any(map(len, columns)):
            found = self._prefilled(self._request(batch, columns, layers, stop))[1]
        return kv_cache.from_layers(self._placed(found, columns, layers, stop))

    def _placed(
        self, found: dict[int, Rows], columns: Sequence[Tensor], layers: list[int], length: int
    ) -> list[KeyValue]:
        """Scatter entries to their columns of so many, zero elsewhere; layers other than ``layers`` are empty."""
        zeros, none = (
            torch.zeros(len(columns), self.geometry.kv_heads, count, self.geometry.head_dim, dtype=self.dtype)
            for count in (length, 0)
        )
        return [
            spread(found.get(index), columns, zeros) if index in layers else (none, none)
            for index in range(self.geometry.layers)
        ]

    def _prefilled(self, request: PrefillRequest) -> tuple[list[int], dict[int, Rows]]:
        """Post a request; return what was drafted, and the rows of each layer."""
        geometry, layers, columns = self._expected(request)
        largest = packed_bytes(geometry, 1, columns, request.precision) + len(request.ids) * protocol.OVERHEAD

        def read(pieces: Iterator[bytes]) -> tuple[list[int], dict[int, Rows]]:
            records, found = protocol.read_records(pieces, largest), dict[int, Rows]()
            drafted, counts = self._begun(next(records), request)
            while (record := next(records)).kind != "end":
                index = self._manifest(record, "layer").get("layer")
                if index not in layers or index in found:
                    raise WireError(f"layer {index!r} was not asked for.")
                found[index] = protocol.unpack(record.tensors, geometry, counts, request.precision)
            if missing := sorted(set(layers) - set(found)):
                raise WireError(f"layers {missing} did not come.")
            return drafted, {index: found[index] for index in layers}

        try:
            return self._connection.call(protocol.PREFILL_PATH, read, request.model_dump_json().encode(), self.identity)
        except RemoteError as error:
            if self.on_failure == "receiver_only":
                raise SharerLost(str(error), error.code, error.status) from error
            raise

    def _begun(self, record: Record, request: PrefillRequest) -> tuple[list[int], list[int]]:
        """Check who answers what, before any entry is read: the drafted tokens, and the columns of each row."""
        manifest = self._manifest(record, "begin")
        check_unchanged(self.identity, manifest.get("sharer"), self.url)
        try:
            drafted = _NUMBERS.validate_python(manifest.get("drafted"))
            counts = _NUMBERS.validate_python(manifest.get("columns"))
        except ValidationError as error:
            raise WireError(f"its first record can't be read: {error}") from error
        if len(drafted) > request.draft_tokens or max(drafted, default=0) >= self._handshake.vocabulary:
            raise WireError("a draft was sent that was not asked for, or with token ids that the model does not have.")
        wanted = [len(chosen) for chosen in request.columns]
        wanted[0] += len(drafted)
        projected = request.fuser is not None and len(counts) == 1  # a fuser with slots makes as many, or none at all
        if counts != wanted and not projected:
            raise WireError(f"{counts!r} columns came, expected {wanted}.")
        return drafted, counts

    def _manifest(self, record: Record, kind: str) -> dict[str, Any]:
        """Return the manifest of a record that must be of one kind."""
        if record.kind == "error":
            message = f"the sharer at {self.url} failed: {record.manifest.get('message')}"
            raise RemoteError(message, str(record.manifest.get("code")), 200)
        if record.kind != kind:
            raise WireError(f"a record {record.kind!r} came where {kind!r} was expected.")
        return record.manifest

    def _precision_for(self, dtype: torch.dtype) -> Precision:
        """Return the precision for entries of this type: the chosen one, else unchanged, else the finest given."""
        given = self._handshake.precisions
        own = next((name for name, known in PRECISIONS.items() if known == dtype), "float32")
        wanted: Any = min(self._wanted or own, own, key=lambda name: PRECISIONS[name].itemsize)  # more says no more
        if wanted not in given and self._wanted is not None:
            message = f"the sharer at {self.url} does not give {self._wanted}, only {', '.join(given)}."
            raise RemoteError(f"{message} Ask for one of these.", "precision")
        return wanted if wanted in given else given[0]


def _check_options(url: str, token: str | None, precision: str | None, on_failure: str) -> None:
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, TypeError) as error:
        raise RemoteError(f"{url!r} is no URL: {error}. Expected https://host:port.", "url") from error
    if parsed.scheme not in ("http", "https") or not parsed.host or parsed.userinfo:
        message = f"the URL {parsed.copy_with(userinfo=b'')} can't be used. Expected https://host:port, without a user "
        raise RemoteError(f"{message}name; give a key as token=....", "url")
    if token is not None and not (token.isascii() and token.isprintable()):
        raise RemoteError("the token has characters that HTTP headers can't hold; expected printable ASCII.", "token")
    if precision is not None and precision not in PRECISIONS:
        raise RemoteError(f"unknown precision {precision!r}; expected one of {', '.join(PRECISIONS)}.", "precision")
    if on_failure not in ("raise", "receiver_only"):
        raise RemoteError(f"on_failure is {on_failure!r}; expected 'raise' or 'receiver_only'.", "policy")
    if parsed.scheme == "http" and not is_loopback(parsed.host):
        message = f"{parsed.host} is called without TLS: whoever is on the way can read prompts, caches and the token."
        warnings.warn(f"{message} Use https.", stacklevel=3)
