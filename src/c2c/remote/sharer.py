"""RemoteSharer: a sharer whose weights are on another machine, in the place of a local one."""

from __future__ import annotations

import copy
import os
import ssl
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
from c2c.errors import CacheError, MismatchError, PromptError, RemoteError, SharerChanged, SharerLost
from c2c.fusers import Fuser
from c2c.handoff import Handoff, Packed, Precision, Reading, reading
from c2c.identity import ModelIdentity, differences, identify
from c2c.kv_cache import KeyValue, KVGeometry
from c2c.language_model import Sharer, Wanted
from c2c.messages import conversations
from c2c.prompting import RenderOptions
from c2c.remote import skeleton
from c2c.remote.address import is_local
from c2c.remote.connection import Connection, Traffic
from c2c.remote.frame import Frame, FrameError
from c2c.remote.fuser_hash import fuser_hash
from c2c.remote.greeting import Greeting
from c2c.remote.handoff import PartialHandoff
from c2c.remote.order import Order
from c2c.remote.packing import NUMBER_BYTES, PRECISIONS, Expected, native, packed_bytes, spread
from c2c.remote.retry import Backoff
from c2c.remote.signature import Signer, read_key
from c2c.remote.standing import Loss, Standing
from c2c.remote.tokenizer_files import from_files, from_source
from c2c.tokens import TokenBatch, left_pad

T = TypeVar("T")
OnFailure = Literal["raise", "receiver_only"]
_LARGEST_HELLO = 1 << 28
_OVERHEAD = 1 << 16  # what safetensors and scales may take besides


class RemoteSharer(Sharer):
    """The model behind ``c2c share``, used like a local :class:`~c2c.language_model.Sharer`.

    It connects at once: identity, tokenizer and config of the model cross, no weights. What is asked of it later brings
    the entries that a fuser reads, and nothing else.

    Args:
        url: ``https://host:port``, or ``http://...``.
        token: bearer token; by default ``C2C_TOKEN`` of the environment.
        key_file: file with the key that both sides sign with; by default ``C2C_KEY_FILE`` of the environment.
        verify: whether to check the server's certificate, a file of certificates to trust, or an ``ssl.SSLContext``.
        precision: of entries on the wire: ``float32``, ``bfloat16``, ``float16``, ``int8`` or ``float8``; by default
            the model's own, which changes nothing, or the finest that the server gives.
        on_failure: when the sharer is lost after the model was made: ``raise``, or ``receiver_only``: the receiver
            answers alone, and the report says so.
        timeout: seconds for one call, all attempts included.
        retries: further attempts when the connection fails or the server is busy.
        rest: after a loss that took time, such as a timeout, the next calls fail at once for so many seconds at least;
            0 asks every time. For servers, where others wait meanwhile.
        tokenizer: the model's tokenizer where it is at hand (object, alias, hub id or folder); it need not cross then.

    Attributes:
        traffic: what has crossed so far.
        precision: of entries on the wire.

    Raises:
        RemoteError: the server can't be reached, refuses, or is no such server.
        MismatchError: the tokenizer is not the model's.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        key_file: str | Path | None = None,
        verify: bool | str | Path | ssl.SSLContext = True,
        precision: str | None = None,
        on_failure: OnFailure = "raise",
        timeout: float = 120.0,
        retries: int = 3,
        rest: float = 0.0,
        tokenizer: Any = None,
    ) -> None:
        token = token or os.environ.get("C2C_TOKEN")
        _check_options(url, token, precision, on_failure)
        key_file = key_file or os.environ.get("C2C_KEY_FILE")
        self._connection = Connection(
            url,
            token,
            Signer(read_key(key_file) if key_file else None),
            _trust(verify),
            timeout,
            Backoff(retries),
        )
        self.url, self.on_failure, self._standing = self._connection.url, on_failure, Standing(rest)
        greeting = self._greet(with_files=tokenizer is None)
        self._greeting, self._asked, self._fuser = greeting, precision, cast(Fuser | None, None)
        if tokenizer is not None:
            tokenizer = from_source(tokenizer)
        elif greeting.files is not None:
            tokenizer = from_files(greeting.files, self.url)
        model = skeleton.build(greeting.config, greeting.dtype, greeting.rotary, self.url)
        self._check_claims(identify(model, tokenizer, greeting.identity.name, greeting.geometry))
        super().__init__(model, tokenizer, f"{greeting.identity.name} at {self.url}")
        self.identity, self.geometry = greeting.identity, greeting.geometry
        self.precision = self._wire(greeting.dtype)

    # -- what it is --------------------------------------------------------------------------------------------------

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
        """Why the last call was not answered; None if it was, or if there was none."""
        return self._standing.lost

    def check_rotary(self) -> None:
        """Make sure that the rotation can be taken off the model's keys; the server has tried.

        Raises:
            CacheError: it can't.
        """
        if self._greeting.rotary_error is not None:
            raise CacheError(self._greeting.rotary_error)

    def release(self) -> None:
        """Nothing: the weights are not here."""

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    # -- what is asked of it -----------------------------------------------------------------------------------------

    def share(self, batch: TokenBatch, wanted: Wanted) -> Cache:
        """The wanted entries at their places; other columns are zero, and other layers empty.

        A batch with more tokens than the server takes at a time is asked for in parts.

        Raises:
            RemoteError: the sharer is lost. SharerLost: the same with ``on_failure="receiver_only"``.
        """
        layers, most = _layers(wanted.layers), max(1, self._greeting.tokens // batch.length)
        columns = [wanted.columns[wanted.rows == row].unique() for row in range(batch.rows)]
        orders = [
            Order(
                batch.select(range(start, min(start + most, batch.rows))),
                wanted.stop,
                layers,
                tuple(columns[start : start + most]),
                self.precision,
            )
            for start in range(0, batch.rows, most)
        ]
        return _stacked([self._cache(order) for order in orders])

    def prefill(self, batch: TokenBatch, stop: int | None = None, cache: Cache | None = None) -> Cache:
        """The whole cache of the first ``stop`` columns: every layer crosses.

        Raises:
            CacheError: there is a cache to extend, which the server does not have. RemoteError: the sharer is lost.
        """
        if cache is not None and cache.layers:
            raise CacheError(f"{self.name} can't extend a cache that is here. Prefill the whole prompt.")
        stop = batch.length if stop is None else stop
        columns = tuple(torch.arange(stop) for _ in range(batch.rows))
        return self._cache(Order(batch, stop, tuple(range(self.geometry.layers)), columns, self.precision))

    def for_fuser(self, fuser: Any) -> Self:
        """The same sharer, whose ``read`` sends what this fuser reads, or what the server makes of it: the lesser."""
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
        """Refused; ``read(draft_tokens=...)`` lets the server draft."""
        self._only_shares("draft")

    def generate(self, *args: Any, **kwargs: Any) -> Never:
        """Refused: the weights are not here."""
        self._only_shares("generate")

    def answer(self, *args: Any, **kwargs: Any) -> Never:
        """Refused: the weights are not here."""
        self._only_shares("answer")

    def next_logits(self, *args: Any, **kwargs: Any) -> Never:
        """Refused: the weights are not here."""
        self._only_shares("next_logits")

    # -- reading -----------------------------------------------------------------------------------------------------

    def _read_whole(self, plan: Reading, draft_tokens: int, reuse: Handoff | None) -> Handoff:
        known, held = 0, cast(list[KeyValue], [])
        if reuse is not None:
            hard, soft = differences("sharer", reuse.sharer, self.identity)
            if hard or soft:
                raise MismatchError(hard + soft, "Extend a handoff with the model that made it.")
            known = min(reuse.shared_prefix(plan.ids), len(plan.ids) - 1)
            held = kv_cache.layers(kv_cache.crop(reuse.cache(self.dtype, self.device), known)) if known else []
        tokens, layers = left_pad([plan.ids], 0), tuple(range(self.geometry.layers))
        columns = (torch.arange(known, tokens.length),)
        order = Order(tokens, tokens.length, layers, columns, self.precision, draft_tokens)
        drafted, found = self._entries(order)
        ids = [*plan.ids, *drafted]
        kept = torch.tensor([*plan.kept, *range(len(plan.ids), len(ids))])
        if not held:
            precision = cast(Precision, self.precision)
            return Handoff(self.identity, torch.tensor(ids), kept, [found[i] for i in layers], precision)
        joined = [_joined(old, found[index], self.dtype) for index, old in enumerate(held)]
        return Handoff.from_cache(self.identity, torch.tensor(ids), kept, joined)

    def _read_for(self, fuser: Fuser, plan: Reading, draft_tokens: int) -> PartialHandoff:
        """What a fuser needs, whichever is less: entries of the layers that it reads, or what becomes of them."""
        tokens, most = left_pad([plan.ids], 0), len(plan.kept) + draft_tokens
        layers, columns = _layers(fuser.config.source_layers), (torch.tensor(plan.kept),)
        order = Order(tokens, tokens.length, layers, columns, self.precision, draft_tokens)
        projected = self._projected(order, fuser, most)
        if projected is not None:
            return self._read_projected(projected, fuser, plan, most)
        drafted, found = self._entries(order)
        ids = [*plan.ids, *drafted]
        places = torch.tensor([*plan.kept, *range(len(plan.ids), len(ids))])
        like, none = self._blank(1, len(ids)), Packed(self._blank(1, 0))
        spaced = {index: spread([pair], [places], like) for index, pair in found.items()}
        filled = [
            (Packed(spaced[index][0]), Packed(spaced[index][1])) if index in spaced else (none, none)
            for index in range(self.geometry.layers)
        ]
        precision = cast(Precision, native(self.dtype))
        size = sum(keys.nbytes + values.nbytes for keys, values in found.values())
        return PartialHandoff(
            self.identity, torch.tensor(ids), places, filled, precision, frozenset(layers), wire_bytes=size
        )

    def _projected(self, order: Order, fuser: Fuser, columns: int) -> Order | None:
        """The order for projected entries, where the server has this fuser and they are fewer bytes."""
        if not self._greeting.fusers or (name := fuser_hash(fuser)) not in self._greeting.fusers:
            return None
        receiver, precision = KVGeometry(**fuser.config.receiver_kv), self._wire(fuser.dtype)
        slots = getattr(fuser.config, "slots", None)
        raw = packed_bytes(self.geometry, len(order.layers), columns, order.precision)
        made = packed_bytes(receiver, receiver.layers, columns if slots is None else slots, precision)
        return replace(order, fuser=name, precision=precision) if made < raw else None

    def _read_projected(self, order: Order, fuser: Fuser, plan: Reading, most: int) -> PartialHandoff:
        receiver = KVGeometry(**fuser.config.receiver_kv)
        most = max(most, getattr(fuser.config, "slots", None) or 0)

        def read(frames: Iterator[Frame]) -> tuple[list[int], list[tuple[Packed, Packed] | None]]:
            drafted, found = self._begin(next(frames), order), cast(list[tuple[Packed, Packed] | None], [])
            slots: int | None = None
            for frame in frames:
                if frame.kind == "end":
                    break
                slots = _slots(frame, slots, most)
                if frame.kind != "entries" or frame.header.get("layer") != len(found):
                    raise FrameError(f"a message {frame.kind!r} came where entries {len(found)} were expected.")
                found.append(Expected(receiver, (slots,), order.precision).rows(frame.tensors())[0])
            if len(found) != receiver.layers:
                raise FrameError(f"entries of {len(found)} layers came, expected {receiver.layers}.")
            return drafted, found

        largest = packed_bytes(receiver, 1, most, order.precision) + _OVERHEAD
        drafted, found = self._call("project", order, read, largest)
        ids = [*plan.ids, *drafted]
        kept = torch.tensor([*plan.kept, *range(len(plan.ids), len(ids))])
        none = torch.zeros(1, receiver.kv_heads, 0, receiver.head_dim, dtype=fuser.dtype)
        entries = [
            (none, none) if pair is None else (pair[0].unpack(fuser.dtype), pair[1].unpack(fuser.dtype))
            for pair in found
        ]
        placed = [(keys.to(fuser.device), values.to(fuser.device)) for keys, values in entries]
        size = sum(pair[0].nbytes + pair[1].nbytes for pair in found if pair is not None)
        return PartialHandoff(
            self.identity,
            torch.tensor(ids),
            kept,
            [],
            cast(Precision, order.precision),
            fuser=order.fuser,
            entries=placed,
            wire_bytes=size,
        )

    # -- asking ------------------------------------------------------------------------------------------------------

    def _cache(self, order: Order) -> Cache:
        """Entries of a shared prompt in a cache of ``order.stop`` columns."""
        self.check_tokens(order.tokens)
        like, none = self._blank(order.tokens.rows, order.stop), self._blank(order.tokens.rows, 0)
        if any(map(len, order.columns)):
            found = self._layers_of(order, lambda rows: spread(rows, order.columns, like))[1]
        else:  # rows of which nothing is read
            found = dict.fromkeys(order.layers, (like, like))
        return kv_cache.from_layers(found.get(index, (none, none)) for index in range(self.geometry.layers))

    def _entries(self, order: Order) -> tuple[list[int], dict[int, tuple[Packed, Packed]]]:
        """What was drafted, and the entries of one row by layer, as they crossed."""
        return self._layers_of(order, lambda rows: cast(tuple[Packed, Packed], rows[0]))

    def _layers_of(
        self, order: Order, use: Callable[[list[tuple[Packed, Packed] | None]], T]
    ) -> tuple[list[int], dict[int, T]]:
        """Ask for layers; ``use`` is called for each as it arrives, while the server makes the next."""
        if missing := sorted(set(order.layers) - self._greeting.layers):
            raise self._policy(
                RemoteError(
                    f"the sharer at {self.url} does not share layers {missing}, only {sorted(self._greeting.layers)}. "
                    "Use a fuser that reads these, or start it with other --layers.",
                    "layer",
                )
            )

        def read(frames: Iterator[Frame]) -> tuple[list[int], dict[int, T]]:
            drafted, found = self._begin(next(frames), order), cast(dict[int, T], {})
            counts = [len(columns) for columns in order.columns]
            counts[0] += len(drafted)
            expected = Expected(self.geometry, tuple(counts), order.precision)
            for frame in frames:
                if frame.kind == "end":
                    break
                index = frame.header.get("layer")
                if frame.kind != "layer" or index not in order.layers or index in found:
                    raise FrameError(f"a message {frame.kind!r} for layer {index!r} was not asked for.")
                found[index] = use(expected.rows(frame.tensors()))
            if missing := sorted(set(order.layers) - set(found)):
                raise FrameError(f"layers {missing} did not come.")
            return drafted, found

        columns = sum(map(len, order.columns)) + order.draft_tokens
        rows = order.tokens.rows
        largest = packed_bytes(self.geometry, 1, columns, order.precision) + rows * _OVERHEAD
        return self._call("read" if order.draft_tokens else "prefill", order, read, largest)

    def _call(self, kind: str, order: Order, read: Callable[[Iterator[Frame]], T], largest: int) -> T:
        header = {"kind": kind, "sharer": self.identity.to_dict()} | order.header()
        try:
            with self._standing.call():
                return self._connection.call("/v1/share", header, order.tensors(), read, largest)
        except RemoteError as error:
            raise self._policy(error) from error

    def _begin(self, frame: Frame, order: Order) -> list[int]:
        """Check who answers what before any entry is read: what was drafted first."""
        header = frame.header
        if frame.kind != "begin" or header.get("tokens") != order.token_hash:
            raise FrameError(f"a message {frame.kind!r} for other tokens came where the beginning was expected.")
        hard, soft = differences("sharer", self.identity, _identity(header.get("sharer")), "connection")
        if hard or soft:
            raise SharerChanged(hard + soft, f"Another model is served at {self.url} now: connect again.", "connection")
        drafted = header.get("drafted")
        if not isinstance(drafted, list) or len(drafted) > order.draft_tokens:
            raise FrameError("a draft was sent that is not as it was asked for.")
        words = self.model.get_input_embeddings().num_embeddings
        if not all(type(token) is int and 0 <= token < words for token in drafted):
            raise FrameError("a draft holds token ids that the model does not have.")
        return drafted

    def _greet(self, with_files: bool) -> Greeting:
        def read(frames: Iterator[Frame]) -> Frame:
            frame = next(frames)
            if frame.kind != "hello":
                raise FrameError(f"a message {frame.kind!r} came where a greeting was expected.")
            return frame

        header = {"kind": "hello", "files": with_files}
        return Greeting.from_frame(self._connection.call("/v1/hello", header, {}, read, _LARGEST_HELLO), self.url)

    def _check_claims(self, ours: ModelIdentity) -> None:
        """Whether config, tokenizer and template that came are those of the identity that came."""
        claimed = self._greeting.identity
        hard, soft = differences("sharer", claimed, replace(ours, architecture=claimed.architecture), "connection")
        if hard or soft:
            advice = "Pass the tokenizer of that model, or none; bring both sides to the same version of transformers."
            raise MismatchError(hard + soft, advice, "connection")

    def _policy(self, error: RemoteError) -> RemoteError:
        if self.on_failure == "receiver_only":
            return SharerLost(str(error), error.code, error.status)
        return error

    def _wire(self, dtype: torch.dtype) -> str:
        """The precision for entries of this type: as asked, else unchanged, else the finest that is given."""
        given = self._greeting.precisions
        wanted = self._asked or native(dtype)
        if self._asked is not None and NUMBER_BYTES[self._asked] > NUMBER_BYTES[native(dtype)]:
            wanted = native(dtype)  # more bytes would say no more
        if wanted in given:
            return wanted
        if self._asked is not None:
            raise RemoteError(
                f"the sharer at {self.url} does not give {self._asked}, only {', '.join(given)}. Ask for one of these.",
                "precision",
            )
        return given[0]

    def _blank(self, rows: int, columns: int) -> Tensor:
        return torch.zeros(rows, self.geometry.kv_heads, columns, self.geometry.head_dim, dtype=self.dtype)

    def _only_shares(self, what: str) -> Never:
        raise RemoteError(
            f"{self.name} only shares its cache: {what} needs the weights, which are on the other machine. Load the "
            "model here for that (c2c run --mode c2c asks for nothing else).",
            "weights",
        )


def _check_options(url: str, token: str | None, precision: str | None, on_failure: str) -> None:
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, TypeError) as error:
        raise RemoteError(f"{url!r} is no URL: {error}. Expected https://host:port.", "url") from error
    if parsed.scheme not in ("http", "https") or not parsed.host or parsed.userinfo:
        raise RemoteError(
            f"the URL {parsed.copy_with(userinfo=b'')} can't be used. Expected https://host:port, without a user name; "
            "give a token as token=....",
            "url",
        )
    if token is not None and not (token.isascii() and token.isprintable()):
        raise RemoteError("the token has characters that HTTP headers can't hold; expected printable ASCII.", "token")
    if precision is not None and precision not in PRECISIONS:
        raise RemoteError(f"unknown precision {precision!r}; expected one of {', '.join(PRECISIONS)}.", "precision")
    if on_failure not in ("raise", "receiver_only"):
        raise RemoteError(f"on_failure is {on_failure!r}; expected 'raise' or 'receiver_only'.", "policy")
    if parsed.scheme == "http" and not is_local(parsed.host):
        warnings.warn(
            f"{parsed.host} is asked without TLS: whoever is on the way can read prompts, caches and the token. Use "
            "https.",
            stacklevel=3,
        )


def _trust(verify: Any) -> Any:
    if not isinstance(verify, str | Path):
        return verify
    try:
        return ssl.create_default_context(cafile=str(verify))
    except OSError as error:
        raise RemoteError(
            f"verify={str(verify)!r} holds no certificates: {error}. Pass a file with those of the sharer's authority "
            "in PEM form, as verify=... (c2c serve: --sharer-ca).",
            "certificate",
        ) from error


def _layers(layers: Any) -> tuple[int, ...]:
    return tuple(sorted(set(layers)))


def _identity(data: Any) -> ModelIdentity:
    try:
        return ModelIdentity.from_dict(data)
    except (TypeError, AttributeError) as error:
        raise FrameError("the identity of the model is missing.") from error


def _slots(frame: Frame, before: int | None, most: int) -> int:
    """How many entries each layer has, the same for all."""
    counts = frame.header.get("columns")
    if not isinstance(counts, list) or len(counts) != 1 or type(counts[0]) is not int or not 0 <= counts[0] <= most:
        raise FrameError(f"entries {counts!r} came, expected at most {most}.")
    if before is not None and counts[0] != before:
        raise FrameError(f"layers with {before} and {counts[0]} entries came, expected as many in each.")
    return counts[0]


def _stacked(caches: Sequence[Cache]) -> Cache:
    """Caches of parts of a batch as one; they have the same columns, and the same layers are empty."""
    if len(caches) == 1:
        return caches[0]
    by_layer = zip(*(kv_cache.layers(cache) for cache in caches), strict=True)
    return kv_cache.from_layers((torch.cat([k for k, _ in rows]), torch.cat([v for _, v in rows])) for rows in by_layer)


def _joined(old: KeyValue, new: tuple[Packed, Packed], dtype: torch.dtype) -> KeyValue:
    keys, values = (torch.cat([held, part.unpack(dtype)], dim=2) for held, part in zip(old, new, strict=True))
    return keys, values
