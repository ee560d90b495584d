"""RemoteSharer: a sharer whose weights are on another machine, in the place of a local one."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal, Never, Self, TypeVar, cast

import httpx
import torch
from torch import Tensor
from transformers import Cache

from c2c import kv_cache
from c2c.errors import CacheError, MismatchError, RemoteError, SharerLost
from c2c.fusers import Fuser
from c2c.handoff import PRECISIONS, Handoff, Precision, QuantizedTensor, SharerPrompt
from c2c.identity import ModelIdentity, differences, identify
from c2c.kv_cache import KVGeometry
from c2c.language_model import EntrySelection, Sharer
from c2c.remote.connection import Connection, Loss, check_unchanged, read_json, ssl_context
from c2c.remote.handoff import PartialHandoff
from c2c.remote.model_stub import build_model, load_tokenizer, load_tokenizer_files
from c2c.remote.protocol import HANDSHAKE_PATH, PREFILL_PATH, Handshake, PrefillRequest, fuser_hash, slots_of
from c2c.remote.wire import OVERHEAD, Record, WireError, native, packed_bytes, read_records, spread, unpack
from c2c.serving.config import is_loopback, read_keys
from c2c.tokens import TokenBatch

T = TypeVar("T")
Rows = list[tuple[QuantizedTensor, QuantizedTensor]]  # keys and values of each row of a layer
_LARGEST_HANDSHAKE = 1 << 28


class RemoteSharer(Sharer):
    """Use the model behind ``c2c share`` like a local :class:`~c2c.language_model.Sharer`.

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
        path = HANDSHAKE_PATH + ("?tokenizer=true" if tokenizer is None else "")
        read = partial(read_json, largest=_LARGEST_HANDSHAKE)
        made = self._handshake = Handshake.from_dict(self._connection.call(path, read), self.url)
        if tokenizer is not None:
            tokenizer = load_tokenizer(tokenizer)
        elif made.tokenizer is not None:
            tokenizer = load_tokenizer_files(made.tokenizer, self.url)
        model = build_model(made.config, made.torch_dtype, made.rotary, self.url)
        _check_claims(made.identity, identify(model, tokenizer, made.identity.name, made.geometry))
        super().__init__(model, tokenizer, f"{made.identity.name} at {self.url}")
        self.identity, self.geometry = made.identity, made.geometry
        self.precision = self._precision_for(made.torch_dtype)

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
        """Return the same sharer, whose ``read`` sends what this fuser reads, or what the server makes of it."""
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
        if self._fuser is not None:
            layers, kept = sorted(set(self._fuser.config.source_layers)), torch.tensor(plan.kept)
            return self._read_for(self._fuser, self._request(tokens, [kept], layers, draft_tokens=draft_tokens), plan)
        known = kv_cache.length(cache) if cache.layers else 0
        columns, layers = torch.arange(known, tokens.length), list(range(self.geometry.layers))
        request = self._request(tokens, [columns], layers, draft_tokens=draft_tokens)
        drafted, found = self._prefilled(request, itemgetter(0))
        ids, kept = plan.followed_by(drafted).tensors()
        if not known:
            return Handoff(self.identity, ids, kept, list(found.values()), cast(Precision, self.precision))
        new = [(keys.dequantize(self.dtype), values.dequantize(self.dtype)) for keys, values in found.values()]
        return Handoff.from_cache(self.identity, ids, kept, kv_cache.layers(kv_cache.append(cache, new)))

    def _read_for(self, fuser: Fuser, request: PrefillRequest, plan: SharerPrompt) -> PartialHandoff:
        """Read what a fuser needs, whichever is less: entries of its layers, or what it makes of them."""
        projected = self._projected(request, fuser)
        drafted, found = self._prefilled(projected or request, itemgetter(0))
        ids, kept = plan.followed_by(drafted).tensors()
        size = sum(keys.nbytes + values.nbytes for keys, values in found.values())
        if projected is not None:
            entries = [
                (keys.dequantize(fuser.dtype).to(fuser.device), values.dequantize(fuser.dtype).to(fuser.device))
                for keys, values in found.values()
            ]
            made: dict[str, Any] = {"fuser": projected.fuser, "entries": entries, "wire_bytes": size}
            return PartialHandoff(self.identity, ids, kept, [], cast(Precision, projected.precision), **made)
        like, none = self._zeros(1, len(ids)), self._zeros(1, 0)
        placed = {index: spread([pair], [kept], like) for index, pair in found.items()}
        pairs = [placed.get(index, (none, none)) for index in range(self.geometry.layers)]
        layers = [(QuantizedTensor(keys), QuantizedTensor(values)) for keys, values in pairs]
        precision = cast(Precision, native(self.dtype))
        return PartialHandoff(self.identity, ids, kept, layers, precision, wire_bytes=size)

    def _projected(self, request: PrefillRequest, fuser: Fuser) -> PrefillRequest | None:
        """Return the request for projected entries, where the server has this fuser and they are fewer bytes."""
        if not self._handshake.fusers or (name := fuser_hash(fuser)) not in self._handshake.fusers:
            return None
        receiver, precision = KVGeometry(**fuser.config.receiver_kv), self._precision_for(fuser.dtype)
        columns, slots = len(request.columns[0]) + request.draft_tokens, slots_of(fuser)
        raw = packed_bytes(self.geometry, len(request.layers), columns, request.precision)
        made = packed_bytes(receiver, receiver.layers, columns if slots is None else slots, precision)
        return request.model_copy(update={"fuser": name, "precision": precision}) if made < raw else None

    # -- requests ----------------------------------------------------------------------------------------------------

    def _request(
        self, batch: TokenBatch, columns: Sequence[Tensor], layers: list[int], stop: int | None = None, **more: Any
    ) -> PrefillRequest:
        more |= {"stop": batch.length if stop is None else stop, "precision": self.precision}
        return PrefillRequest.from_batch(self.identity, batch, columns, layers, **more)

    def _cache(self, batch: TokenBatch, columns: Sequence[Tensor], layers: list[int], stop: int) -> Cache:
        """Return the entries of a shared prompt in a cache of ``stop`` columns."""
        self.check_tokens(batch)
        like, none = self._zeros(batch.rows, stop), self._zeros(batch.rows, 0)
        found = dict.fromkeys(layers, (like, like))  # rows of which nothing is read
        if any(map(len, columns)):
            request = self._request(batch, columns, layers, stop)
            found = self._prefilled(request, lambda rows: spread(rows, columns, like))[1]
        return kv_cache.from_layers(found.get(index, (none, none)) for index in range(self.geometry.layers))

    def _prefilled(self, request: PrefillRequest, use: Callable[[Rows], T]) -> tuple[list[int], dict[int, T]]:
        """Post a request, and call ``use`` with the rows of each layer as it arrives, while the next one is made.

        Returns:
            What was drafted, and what ``use`` returned for each layer.
        """
        geometry, layers = self.geometry, request.layers
        columns = sum(map(len, request.columns)) + request.draft_tokens
        if request.fuser is not None and self._fuser is not None:
            geometry = KVGeometry(**self._fuser.config.receiver_kv)
            layers, columns = list(range(geometry.layers)), max(columns, slots_of(self._fuser) or 0)
        largest = packed_bytes(geometry, 1, columns, request.precision) + len(request.ids) * OVERHEAD

        def read(pieces: Iterator[bytes]) -> tuple[list[int], dict[int, T]]:
            records, found = read_records(pieces, largest), cast(dict[int, T], {})
            drafted, counts = self._begun(next(records), request)
            while (record := next(records)).kind != "end":
                index = self._manifest(record, "layer").get("layer")
                if index not in layers or index in found:
                    raise WireError(f"layer {index!r} was not asked for.")
                found[index] = use(unpack(record.tensors, geometry, counts, request.precision))
            if missing := sorted(set(layers) - set(found)):
                raise WireError(f"layers {missing} did not come.")
            return drafted, {index: found[index] for index in layers}

        try:
            if missing := sorted(set(request.layers) - set(self._handshake.layers)):
                advice = "Use a fuser that reads these, or start it with other --layers."
                message = f"the sharer at {self.url} does not share layers {missing}, only {self._handshake.layers}."
                raise RemoteError(f"{message} {advice}", "layer")
            return self._connection.call(PREFILL_PATH, read, request.model_dump_json().encode(), self.identity)
        except RemoteError as error:
            if self.on_failure == "receiver_only":
                raise SharerLost(str(error), error.code, error.status) from error
            raise

    def _begun(self, record: Record, request: PrefillRequest) -> tuple[list[int], list[int]]:
        """Check who answers what, before any entry is read: the drafted tokens, and the columns of each row."""
        manifest = self._manifest(record, "begin")
        check_unchanged(self.identity, manifest.get("sharer"), self.url)
        drafted, counts = cast("list[int]", manifest.get("drafted")), cast("list[int]", manifest.get("columns"))
        if not _whole_numbers(drafted, request.draft_tokens, self._handshake.vocabulary):
            raise WireError("a draft was sent that was not asked for, or with token ids that the model does not have.")
        wanted = [len(chosen) for chosen in request.columns]
        wanted[0] += len(drafted)
        projected = request.fuser is not None and _whole_numbers(counts, 1, 1 << 30) and counts
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

    def _precision_for(self, dtype: torch.dtype) -> str:
        """Return the precision for entries of this type: the chosen one, else unchanged, else the finest given."""
        given = [name for name in self._handshake.precisions if name in PRECISIONS]
        own = native(dtype)  # more bytes than these would say no more
        wanted = min(self._wanted or own, own, key=lambda name: PRECISIONS[name].itemsize)
        if wanted not in given and self._wanted is not None:
            message = f"the sharer at {self.url} does not give {self._wanted}, only {', '.join(given)}."
            raise RemoteError(f"{message} Ask for one of these.", "precision")
        return wanted if wanted in given else given[0]

    def _zeros(self, rows: int, columns: int) -> Tensor:
        return torch.zeros(rows, self.geometry.kv_heads, columns, self.geometry.head_dim, dtype=self.dtype)


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


def _check_claims(claimed: ModelIdentity, ours: ModelIdentity) -> None:
    """Whether config, tokenizer and template that came are those of the identity that came."""
    hard, soft = differences("sharer", claimed, replace(ours, architecture=claimed.architecture), "connection")
    if hard or soft:
        advice = "Pass the tokenizer of that model, or none; bring both sides to the same version of transformers."
        raise MismatchError(hard + soft, advice, "connection")


def _whole_numbers(value: Any, most: int, limit: int) -> bool:
    """Whether ``value`` is a list of at most ``most`` numbers from 0 to below ``limit``."""
    fits = isinstance(value, list) and len(value) <= most
    return fits and all(type(number) is int and 0 <= number < limit for number in value)
