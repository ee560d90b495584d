"""RemoteSharer: a sharer whose weights are on another machine, in the place of a local one."""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Never, Self, TypeVar, cast

import httpx
import torch
from torch import Tensor
from transformers import Cache

from c2c import kv_cache
from c2c.errors import CacheError, MismatchError, PromptError, RemoteError, SharerLost
from c2c.fusers import Fuser
from c2c.handoff import Handoff, Packed, Precision, Reading, reading
from c2c.identity import ModelIdentity, differences, identify
from c2c.kv_cache import KeyValue, KVGeometry
from c2c.language_model import Sharer, Wanted
from c2c.messages import conversations
from c2c.prompting import RenderOptions
from c2c.remote.connection import Connection, Loss, Traffic, raise_if_changed, ssl_context
from c2c.remote.handoff import PartialHandoff
from c2c.remote.model_stub import build_model, load_tokenizer, load_tokenizer_files
from c2c.remote.protocol import HANDSHAKE_PATH, PREFILL_PATH, Handshake, PrefillRequest, fuser_hash
from c2c.remote.wire import (
    NUMBER_BYTES,
    OVERHEAD,
    PRECISIONS,
    LayerSpec,
    WireError,
    native,
    packed_bytes,
    read_records,
    spread,
)
from c2c.serving.http_config import is_loopback, read_keys
from c2c.tokens import TokenBatch, left_pad

T = TypeVar("T")
Rows = list[tuple[Packed, Packed] | None]
_LARGEST_HANDSHAKE = 1 << 28


class RemoteSharer(Sharer):
    """The model behind ``c2c share``, used like a local :class:`~c2c.language_model.Sharer`.

    It connects at once: identity, tokenizer and config of the model cross, no weights. A prefill then brings the
    entries that a fuser reads, and nothing else.

    Args:
        url: ``https://host:port``, or ``http://...``.
        token: bearer key; by default ``C2C_TOKEN`` of the environment, or the first key of ``key_file``.
        key_file: file with the key; by default ``C2C_KEY_FILE`` of the environment.
        verify: whether to check the server's certificate, a file of certificates to trust, or an ``ssl.SSLContext``.
        client_cert: PEM file with a certificate and its key, for servers that ask for one; by default
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

    Raises:
        RemoteError: the server can't be reached, refuses, or is no such server.
        MismatchError: the tokenizer is not the model's.
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
        self.url, self.on_failure = self._connection.url, on_failure
        self._fuser: Fuser | None = None
        self.handshake = self._shake_hands(with_tokenizer=tokenizer is None)
        if tokenizer is not None:
            tokenizer = load_tokenizer(tokenizer)
        elif self.handshake.tokenizer is not None:
            tokenizer = load_tokenizer_files(self.handshake.tokenizer, self.url)
        dtype, who = self.handshake.torch_dtype, self.handshake.identity
        model = build_model(self.handshake.config, dtype, self.handshake.rotary, self.url)
        _check_claims(who, identify(model, tokenizer, who.name, self.handshake.geometry))
        super().__init__(model, tokenizer, f"{who.name} at {self.url}")
        self.identity, self.geometry = who, self.handshake.geometry
        self._asked = precision
        self.precision = self._precision_for(dtype)

    @property
    def device(self) -> torch.device:
        """Where entries arrive: the host."""
        return torch.device("cpu")

    @property
    def traffic(self) -> Traffic:
        """What has crossed since the connection was made."""
        return self._connection.traffic

    @property
    def lost(self) -> Loss | None:
        """Why the last call failed; None if it did not, or if there was none."""
        return self._connection.lost

    def check_rotary(self) -> None:
        """Make sure that the rotation can be taken off the model's keys, which the server has tried.

        Raises:
            CacheError: it can't.
        """
        if self.handshake.rotary_error is not None:
            raise CacheError(self.handshake.rotary_error)

    def release(self) -> None:
        """Do nothing: the weights are not here."""

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    # -- what a sharer does ------------------------------------------------------------------------------------------

    def share(self, batch: TokenBatch, wanted: Wanted) -> Cache:
        """Return the wanted entries at their places; other columns are zero, and other layers empty.

        A batch with more tokens than the server takes at a time is sent in parts.

        Raises:
            RemoteError: the sharer is lost. SharerLost: the same with ``on_failure="receiver_only"``.
        """
        layers, most = sorted(set(wanted.layers)), max(1, self.handshake.tokens // batch.length)
        columns = [wanted.columns[wanted.rows == row].unique() for row in range(batch.rows)]
        parts = [
            self._cache(batch.select(range(i, min(i + most, batch.rows))), columns[i : i + most], layers, wanted.stop)
            for i in range(0, batch.rows, most)
        ]
        if len(parts) == 1:
            return parts[0]
        by_layer = zip(*(kv_cache.layers(cache) for cache in parts), strict=True)
        return kv_cache.from_layers(
            (torch.cat([keys for keys, _ in rows]), torch.cat([values for _, values in rows])) for rows in by_layer
        )

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

    def read(
        self,
        messages: Any,
        *,
        draft_tokens: int = 0,
        options: RenderOptions | None = None,
        reuse: Handoff | None = None,
    ) -> Handoff:
        """Let the model read messages; arguments as in :meth:`c2c.language_model.Sharer.read`.

        The server keeps nothing: with ``reuse`` it reads everything again, but only what is new crosses.

        Raises:
            RemoteError: the sharer is lost. MismatchError: ``reuse`` is another model's.
        """
        batch, single = conversations(messages)
        if not single:
            raise PromptError("a handoff holds one conversation: call read once for each.")
        plan = reading(self.tokenizer, batch[0], options or RenderOptions())
        self.check_prompt(left_pad([plan.ids], 0))
        if self._fuser is not None:
            return self._read_for(self._fuser, plan, draft_tokens)
        return self._read_whole(plan, draft_tokens, reuse)

    def draft(self, tokens: TokenBatch, cache: Cache, count: int) -> Never:
        """Refuse; ``read(draft_tokens=...)`` lets the server draft."""
        self._only_shares("draft")

    def generate(self, *args: Any, **kwargs: Any) -> Never:
        """Refuse: the weights are not here."""
        self._only_shares("generate")

    def answer(self, *args: Any, **kwargs: Any) -> Never:
        """Refuse: the weights are not here."""
        self._only_shares("answer")

    def next_logits(self, *args: Any, **kwargs: Any) -> Never:
        """Refuse: the weights are not here."""
        self._only_shares("next_logits")

    def _only_shares(self, what: str) -> Never:
        raise RemoteError(
            f"{self.name} only shares its cache: {what} needs the weights, which are on the other machine. Load the "
            "model here for that (c2c run --mode c2c asks for nothing else).",
            "weights",
        )

    # -- handoffs ----------------------------------------------------------------------------------------------------

    def _read_whole(self, plan: Reading, draft_tokens: int, reuse: Handoff | None) -> Handoff:
        known, held = 0, cast(list[KeyValue], [])
        if reuse is not None:
            hard, soft = differences("sharer", reuse.sharer, self.identity)
            if hard or soft:
                raise MismatchError(hard + soft, "Extend a handoff with the model that made it.")
            known = min(reuse.shared_prefix(plan.ids), len(plan.ids) - 1)
            held = kv_cache.layers(kv_cache.crop(reuse.cache(self.dtype, self.device), known)) if known else []
        layers, columns = range(self.geometry.layers), torch.arange(known, len(plan.ids))
        drafted, found = self._entries(self._request(plan, columns, list(layers), draft_tokens))
        ids, kept = plan.followed_by(drafted).tensors()
        packed = [found[index] for index in layers]
        if not held:
            return Handoff(self.identity, ids, kept, packed, cast(Precision, self.precision))
        joined = [_joined(old, new, self.dtype) for old, new in zip(held, packed, strict=True)]
        return Handoff.from_cache(self.identity, ids, kept, joined)

    def _read_for(self, fuser: Fuser, plan: Reading, draft_tokens: int) -> PartialHandoff:
        """What a fuser needs, whichever is less: entries of the layers that it reads, or what becomes of them."""
        layers, columns = sorted(set(fuser.config.source_layers)), torch.tensor(plan.kept)
        request = self._request(plan, columns, layers, draft_tokens)
        projected = self._projected(request, fuser)
        drafted, found = self._entries(projected or request, KVGeometry(**fuser.config.receiver_kv))
        ids, kept = plan.followed_by(drafted).tensors()
        precision = cast(Precision, projected.precision if projected else native(self.dtype))
        size = sum(keys.nbytes + values.nbytes for keys, values in found.values())
        if projected is not None:
            made = [tuple(part.unpack(fuser.dtype).to(fuser.device) for part in found[index]) for index in found]
            entries = cast(list[KeyValue], made)
            return PartialHandoff(
                self.identity, ids, kept, [], precision, fuser=projected.fuser, entries=entries, wire_bytes=size
            )
        like, none = self._zeros(1, len(ids)), Packed(self._zeros(1, 0))
        placed = {index: spread([pair], [kept], like) for index, pair in found.items()}
        filled = [
            (Packed(placed[index][0]), Packed(placed[index][1])) if index in placed else (none, none)
            for index in range(self.geometry.layers)
        ]
        return PartialHandoff(self.identity, ids, kept, filled, precision, held=frozenset(layers), wire_bytes=size)

    def _projected(self, request: PrefillRequest, fuser: Fuser) -> PrefillRequest | None:
        """The request for projected entries, where the server has this fuser and they are fewer bytes."""
        if not self.handshake.fusers or (name := fuser_hash(fuser)) not in self.handshake.fusers:
            return None
        receiver, precision = KVGeometry(**fuser.config.receiver_kv), self._precision_for(fuser.dtype)
        columns = len(request.columns[0]) + request.draft_tokens
        slots = getattr(fuser.config, "slots", None)
        raw = packed_bytes(self.geometry, len(request.layers), columns, request.precision)
        made = packed_bytes(receiver, receiver.layers, columns if slots is None else slots, precision)
        return replace(request, fuser=name, precision=precision) if made < raw else None

    # -- requests ----------------------------------------------------------------------------------------------------

    def _request(self, plan: Reading, columns: Tensor, layers: list[int], draft_tokens: int) -> PrefillRequest:
        batch, rest = left_pad([plan.ids], 0), {"precision": self.precision, "draft_tokens": draft_tokens}
        return PrefillRequest.from_batch(self.identity, batch, [columns], layers, stop=batch.length, **rest)

    def _cache(self, batch: TokenBatch, columns: Sequence[Tensor], layers: list[int], stop: int) -> Cache:
        """Entries of a shared prompt in a cache of ``stop`` columns."""
        self.check_tokens(batch)
        like, none = self._zeros(batch.rows, stop), self._zeros(batch.rows, 0)
        if any(map(len, columns)):
            request = PrefillRequest.from_batch(
                self.identity, batch, columns, layers, stop=stop, precision=self.precision
            )
            found = self._prefilled(request, lambda rows: spread(rows, columns, like))[1]
        else:  # rows of which nothing is read
            found = dict.fromkeys(layers, (like, like))
        return kv_cache.from_layers(found.get(index, (none, none)) for index in range(self.geometry.layers))

    def _entries(
        self, request: PrefillRequest, receiver: KVGeometry | None = None
    ) -> tuple[list[int], dict[int, tuple[Packed, Packed]]]:
        """What was drafted, and the entries of one row by layer, as they crossed."""

        def first(rows: Rows) -> tuple[Packed, Packed]:
            none = torch.zeros(1, geometry.kv_heads, 0, geometry.head_dim)
            return rows[0] or (Packed(none), Packed(none))

        geometry = receiver if request.fuser is not None and receiver is not None else self.geometry
        return self._prefilled(request, first, geometry)

    def _prefilled(
        self, request: PrefillRequest, use: Callable[[Rows], T], geometry: KVGeometry | None = None
    ) -> tuple[list[int], dict[int, T]]:
        """Ask for layers; ``use`` is called for each as it arrives, while the server makes the next."""
        geometry, projected, content = geometry or self.geometry, request.fuser is not None, request.encode()
        layers = list(range(geometry.layers)) if projected else request.layers
        columns = sum(map(len, request.columns)) + request.draft_tokens
        largest = packed_bytes(geometry, 1, columns, request.precision) + len(request.ids) * OVERHEAD
        if missing := sorted(set(request.layers) - set(self.handshake.layers)):
            advice = "Use a fuser that reads these, or start it with other --layers."
            message = f"the sharer at {self.url} does not share layers {missing}, only {self.handshake.layers}."
            raise self._by_policy(RemoteError(f"{message} {advice}", "layer"))

        def read(pieces: Iterator[bytes]) -> tuple[list[int], dict[int, T]]:
            records, found = read_records(pieces, largest), cast(dict[int, T], {})
            begin = _checked(next(records), "begin", self.url)
            raise_if_changed(self.identity, begin.get("sharer"), self.url)
            drafted = self._drafted(begin, request)
            spec = LayerSpec(geometry, _columns(begin, request, len(drafted)), request.precision)
            for record in records:
                if record.kind == "end":
                    break
                index = _checked(record, "layer", self.url).get("layer")
                if index not in layers or index in found:
                    raise WireError(f"layer {index!r} was not asked for.")
                found[index] = use(spec.unpack(record.tensors))
            if missing := sorted(set(layers) - set(found)):
                raise WireError(f"layers {missing} did not come.")
            return drafted, found

        try:
            return self._connection.call(PREFILL_PATH, read, content, self.identity)
        except RemoteError as error:
            raise self._by_policy(error) from error

    def _drafted(self, begin: dict[str, Any], request: PrefillRequest) -> list[int]:
        drafted = begin.get("drafted")
        words = self.handshake.vocabulary
        if not isinstance(drafted, list) or len(drafted) > request.draft_tokens:
            raise WireError("a draft was sent that is not as it was asked for.")
        if not all(type(token) is int and 0 <= token < words for token in drafted):
            raise WireError("a draft holds token ids that the model does not have.")
        return drafted

    def _shake_hands(self, with_tokenizer: bool) -> Handshake:
        def read(pieces: Iterator[bytes]) -> Any:
            held = bytearray()
            for piece in pieces:
                held += piece
                if len(held) > _LARGEST_HANDSHAKE:
                    raise WireError(f"the handshake is longer than {_LARGEST_HANDSHAKE} bytes.")
            try:
                return json.loads(held)
            except (ValueError, RecursionError) as error:
                raise WireError("the handshake is not JSON: is that `c2c share`?") from error

        path = HANDSHAKE_PATH + ("?tokenizer=true" if with_tokenizer else "")
        return Handshake.from_dict(self._connection.call(path, read), self.url)

    def _by_policy(self, error: RemoteError) -> RemoteError:
        return SharerLost(str(error), error.code, error.status) if self.on_failure == "receiver_only" else error

    def _precision_for(self, dtype: torch.dtype) -> str:
        """The precision for entries of this type: as asked, else unchanged, else the finest that is given."""
        given = [name for name in self.handshake.precisions if name in PRECISIONS]
        wanted = self._asked or native(dtype)
        if NUMBER_BYTES[wanted] > NUMBER_BYTES[native(dtype)]:
            wanted = native(dtype)  # more bytes would say no more
        if wanted not in given and self._asked is not None:
            message = f"the sharer at {self.url} does not give {self._asked}, only {', '.join(given)}."
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
        raise RemoteError(
            f"the URL {parsed.copy_with(userinfo=b'')} can't be used. Expected https://host:port, without a user name; "
            "give a key as token=....",
            "url",
        )
    if token is not None and not (token.isascii() and token.isprintable()):
        raise RemoteError("the token has characters that HTTP headers can't hold; expected printable ASCII.", "token")
    if precision is not None and precision not in PRECISIONS:
        raise RemoteError(f"unknown precision {precision!r}; expected one of {', '.join(PRECISIONS)}.", "precision")
    if on_failure not in ("raise", "receiver_only"):
        raise RemoteError(f"on_failure is {on_failure!r}; expected 'raise' or 'receiver_only'.", "policy")
    if parsed.scheme == "http" and not is_loopback(parsed.host):
        warnings.warn(
            f"{parsed.host} is asked without TLS: whoever is on the way can read prompts, caches and the token. Use "
            "https.",
            stacklevel=3,
        )


def _check_claims(claimed: ModelIdentity, ours: ModelIdentity) -> None:
    """Whether config, tokenizer and template that came are those of the identity that came."""
    hard, soft = differences("sharer", claimed, replace(ours, architecture=claimed.architecture), "connection")
    if hard or soft:
        advice = "Pass the tokenizer of that model, or none; bring both sides to the same version of transformers."
        raise MismatchError(hard + soft, advice, "connection")


def _checked(record: Any, kind: str, url: str) -> dict[str, Any]:
    """The manifest of a record that must be of one kind."""
    manifest: dict[str, Any] = record.manifest
    if record.kind == "error":
        raise RemoteError(f"the sharer at {url} failed: {manifest.get('message')}", str(manifest.get("code")), 200)
    if record.kind != kind:
        raise WireError(f"a record {record.kind!r} came where {kind!r} was expected.")
    return manifest


def _columns(begin: dict[str, Any], request: PrefillRequest, drafted: int) -> tuple[int, ...]:
    """Columns per row as the server announces them: those that were asked for, or at most so many if projected."""
    given, wanted = begin.get("columns"), [len(chosen) for chosen in request.columns]
    wanted[0] += drafted
    fits = given == wanted
    if request.fuser is not None:
        fits = isinstance(given, list) and len(given) == 1 and type(given[0]) is int and given[0] >= 0
    if not fits:
        raise WireError(f"{given!r} columns came, expected {wanted}.")
    return tuple(cast(list[int], given))


def _joined(old: KeyValue, new: tuple[Packed, Packed], dtype: torch.dtype) -> KeyValue:
    keys, values = (torch.cat([held, part.unpack(dtype)], dim=2) for held, part in zip(old, new, strict=True))
    return keys, values
