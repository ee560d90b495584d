"""The server of ``c2c share``: one thread prefills one request at a time, and layers are sent as they are made."""

from __future__ import annotations

import asyncio
import gzip
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, cast
from weakref import WeakSet

import torch
from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send
from torch import Tensor, nn
from transformers import DynamicCache

from c2c import identity, kv_cache
from c2c.errors import C2CError
from c2c.fusers import Fuser
from c2c.handoff import Handoff, Precision
from c2c.kv_cache import KeyValue
from c2c.private_context import project
from c2c.remote.config import ShareConfig
from c2c.remote.handshake import Handshake
from c2c.remote.protocol import HANDSHAKE_PATH, MEDIA_TYPE, PREFILL_PATH, PrefillRequest, Record, fuser_hash, pack
from c2c.serving.config import HTTPConfig
from c2c.serving.errors import ApiError
from c2c.serving.http_server import RequestRecord, ServerState, create_app
from c2c.sharer import Sharer
from c2c.tokens import TokenBatch
from c2c.version import __version__

QUEUED_BYTES = 1 << 26  # of finished layers of one request that wait for its client; then the prefill waits too
_PARAMS = {"layer": "layers", "precision": "precision", "fuser": "fuser"}  # of errors by code; else "ids"
Part = tuple[dict[str, Any], KeyValue | None]  # manifest and entries of a layer


class Stopped(Exception):
    """The client has gone, or the deadline has passed."""


class StreamingCache(DynamicCache):
    """Hand number, keys and values of each layer, ``[rows, kv_heads, tokens, head_dim]``, to a callback once made.

    Numbers count the sharer's KV layers; other layers are kept for the model alone.

    An exception in the callback stops the forward pass.
    """

    def __init__(self, sharer: Sharer, callback: Callable[[int, KeyValue], None]) -> None:
        super().__init__()
        planned: Any = sharer.empty_cache()
        self.layers, self.layer_class_to_replicate = planned.layers, planned.layer_class_to_replicate
        self._numbers = {layer: number for number, layer in enumerate(sharer.layer_numbers)}
        self._callback = callback

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append to a layer; called by its attention."""
        entries = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx in self._numbers:
            self._callback(self._numbers[layer_idx], entries)
        return entries


class PrefillJob:
    """Run one request, made on the event loop, in the worker's thread.

    Attributes:
        deadline: on the monotonic clock.
        facts: layers and bytes that were sent, and the code of the error, for the log.
        streams: whether layers are sent as they are made; drafts and projections need the whole prefill first.
    """

    def __init__(
        self, sharer: Sharer, fuser: Fuser | None, request: PrefillRequest, batch: TokenBatch, deadline: float
    ) -> None:
        self._sharer, self._fuser, self._request, self._batch = sharer, fuser, request, batch
        self._columns = [torch.tensor(chosen, dtype=torch.long) for chosen in request.columns]
        self.deadline, self._stopped = deadline, False
        self._loop, self._parts = asyncio.get_running_loop(), cast("asyncio.Queue[Part]", asyncio.Queue())
        self._room, self._queued = threading.Condition(), 0
        self.facts: dict[str, Any] = {"layers": 0, "bytes": 0, "code": "cut"}
        self.streams = fuser is None and not request.draft_tokens

    async def records(self, first: dict[str, Any]) -> AsyncIterator[bytes]:
        """Yield encoded records, up to ``end`` or ``error``; the manifest of the first one gets ``first`` besides."""
        manifest: dict[str, Any] = {}
        try:
            while manifest.get("kind") not in ("end", "error"):
                manifest, entries = await self._parts.get()
                self._count(-_bytes(entries))
                whole = first | manifest if manifest["kind"] == "begin" else manifest
                data = await asyncio.to_thread(self._encode, whole, entries)
                self.facts["layers"] += entries is not None
                self.facts["bytes"] += len(data)
                yield data
            self.facts["code"] = manifest.get("code")
        finally:
            self.stop()

    def stop(self) -> None:
        """Give up at the next layer."""
        self._stopped = True
        self._count(0)

    def run(self) -> None:
        """Prefill; the last record says how it ended. Raises nothing."""
        last = {"kind": "error"}
        try:
            with torch.no_grad():
                self._run()
            last = {"kind": "end"}
        except Stopped:
            message = "the time limit of the server was reached. Ask for less, or start it with a larger --timeout."
            if time.monotonic() < self.deadline:
                message = "the server is shutting down."
            last |= {"code": "timeout", "message": message}
        except C2CError as error:
            last |= {"code": "refused", "message": str(error)}
        except Exception as error:  # such as no memory; the server goes on
            last |= {"code": "failed", "message": f"the model failed: {type(error).__name__}."}
        self._loop.call_soon_threadsafe(self._parts.put_nowait, (last, None))

    def _run(self) -> None:
        request, batch, cache, ids = (
            self._request,
            self._batch,
            StreamingCache(self._sharer, self._on_layer),
            self._request.ids[0],
        )
        if self.streams:
            self._begin([])
        if request.draft_tokens:
            ids, _ = self._sharer.draft(batch, cache, request.draft_tokens)
        else:
            self._sharer.prefill(batch, request.stop, cache)
        if self.streams:
            return
        self._columns[0] = torch.cat([self._columns[0], torch.arange(batch.length, len(ids))])
        layers = kv_cache.layers(cache)
        made = {index: layers[index] for index in request.layers}
        if self._fuser is not None:
            handoff = Handoff.from_cache(self._sharer.identity, torch.tensor(ids), self._columns[0], layers)
            made = dict(enumerate(project(handoff, self._sharer, self._fuser).layers))
            self._columns = [torch.arange(made[0][0].shape[2])]
        self._begin(ids[batch.length :])
        for index, entries in made.items():
            self._put({"kind": "layer", "layer": index}, entries)

    def _on_layer(self, index: int, entries: KeyValue) -> None:
        self._check()
        if self.streams and index in self._request.layers:
            self._put({"kind": "layer", "layer": index}, entries)

    def _begin(self, drafted: list[int]) -> None:
        self._put({"kind": "begin", "drafted": drafted, "columns": list(map(len, self._columns))})

    def _put(self, manifest: dict[str, Any], entries: KeyValue | None = None) -> None:
        """Wait for room, so that a client that reads slowly does not fill the memory."""
        size = _bytes(entries)
        with self._room:
            self._room.wait_for(
                lambda: self._stopped or not self._queued or self._queued + size <= QUEUED_BYTES,
                max(0.0, self.deadline - time.monotonic()),
            )
        self._check()
        self._count(size)
        self._loop.call_soon_threadsafe(self._parts.put_nowait, (manifest, entries))

    def _count(self, size: int) -> None:
        with self._room:
            self._queued += size
            self._room.notify()

    def _check(self) -> None:
        if self._stopped or time.monotonic() > self.deadline:
            raise Stopped

    def _encode(self, manifest: dict[str, Any], entries: KeyValue | None) -> bytes:
        precision = cast(Precision, self._request.precision)
        return Record(manifest, pack(entries, self._columns, precision) if entries else {}).encode()


class PrefillWorker:
    """Prefill with one model in one thread.

    Args:
        sharer: the model.
        config: layers and precision that may be sent, tokens of one request and requests under way at most.
        fusers: of private context, to project with.

    Attributes:
        handshake: model and limits, for clients.
        waiting: requests under way.

    Raises:
        C2CError: layers that the model does not have, or a fuser that was made for another model.
    """

    def __init__(self, sharer: Sharer, config: ShareConfig, fusers: Sequence[Fuser] = ()) -> None:
        self._sharer, self._most, self.waiting = sharer, config.waiting, 0
        self._fusers = {fuser_hash(fuser): _prepared(fuser, sharer) for fuser in fusers}
        every, given = range(sharer.geometry.layers), config.layer_list()
        if outside := sorted(set(given or every) - set(every)):
            raise C2CError(f"layers {outside} do not exist: {sharer.name} has layers 0 to {every[-1]}.")
        self.handshake = Handshake.describe(
            sharer, given or list(every), config.precision, list(self._fusers), config.max_tokens
        )
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sharer")
        self._jobs: WeakSet[PrefillJob] = WeakSet()

    def submit(self, request: PrefillRequest, deadline: float) -> PrefillJob:
        """Check a request and queue it; on the event loop.

        Raises:
            ApiError: it can't be fulfilled, or too many are under way (503).
        """
        batch = check_request(request, self.handshake)
        if self.waiting >= self._most:
            message = f"{self.waiting} requests are under way (--waiting); try again."
            raise ApiError(503, message, code="busy", headers={"Retry-After": "1"})
        self.waiting += 1  # in the same step as the check: nothing else runs on the event loop in between
        fuser = None if request.fuser is None else self._fusers[request.fuser]
        job = PrefillJob(self._sharer, fuser, request, batch, deadline)
        self._jobs.add(job)
        done = asyncio.get_running_loop().run_in_executor(self._thread, job.run)
        done.add_done_callback(self._leave)
        return job

    def _leave(self, _: Any) -> None:
        self.waiting -= 1

    def stop(self) -> None:
        """Give up what is under way."""
        for job in list(self._jobs):
            job.stop()

    def close(self) -> None:
        """Wait for what is under way, and take no more."""
        self._thread.shutdown(wait=True, cancel_futures=True)


def check_request(request: PrefillRequest, offer: Handshake) -> TokenBatch:
    """Check a request against what a server offers, and return its tokens.

    Raises:
        ApiError: it is for another model (409), too large (413), or asks for something that is not offered (422).
    """
    hard, soft = identity.differences("sharer", request.sharer, offer.sharer, "request")
    if hard or soft:
        message, details = "the request is for another model than the one that is served here.", offer.sharer.to_dict()
        raise ApiError(409, message, code="mismatch", param="sharer", details={"sharer": details})
    batch = request.batch()
    tokens, last = batch.rows * (batch.length + request.draft_tokens), int(batch.positions.max())
    largest, limit = int(batch.ids.max()), offer.context or 1 << 31
    missing = sorted(set(request.layers) - set(offer.layers))

    def refuse_if(wrong: bool, status: int, code: str, message: str) -> None:
        if wrong:
            raise ApiError(status, message, code=code, param=_PARAMS.get(code, "ids"))

    message = f"the request has {tokens} tokens, padding and drafts included, and this server takes {offer.tokens}."
    advice = "Shorten the prompt, send smaller batches, or start it with a larger --max-tokens."
    refuse_if(tokens > offer.tokens, 413, "too_long", f"{message} {advice}")
    message = f"a prompt of {batch.length} tokens with positions up to {last}, and the model was made for {limit}."
    refuse_if(max(batch.length, last + 1) > limit, 413, "too_long", f"{message} Shorten the prompt.")
    message = f"token ids up to {largest}, and the model has 0 to {offer.vocabulary - 1}. Use its tokenizer."
    refuse_if(largest >= offer.vocabulary, 422, "tokens", message)
    message = f"layers {missing} are not shared; this server gives {offer.layers}."
    advice = "Use a fuser that reads these, or start it with other --layers."
    refuse_if(bool(missing), 422, "layer", f"{message} {advice}")
    message = f"precision {request.precision!r} is not given; expected one of {', '.join(offer.precisions)}."
    advice = "Pass precision=... to RemoteSharer, or start the server with another --precision."
    refuse_if(request.precision not in offer.precisions, 422, "precision", f"{message} {advice}")
    message = "this server does not have the fuser of this request; start it with --fuser."
    refuse_if(request.fuser not in (None, *offer.fusers), 422, "fuser", message)
    return batch


def _bytes(entries: KeyValue | None) -> int:
    return sum(part.nbytes for part in entries or ())


def _prepared(fuser: Fuser, sharer: Sharer) -> Fuser:
    if fuser.context != "private":
        raise C2CError(
            f"a {fuser.family} fuser merges into the receiver's entries, which are not here: it can't project. Leave "
            "out --fuser, and its entries are fused where the receiver is."
        )
    identity.check([("sharer", fuser.config.identity("sharer"), sharer.identity)], allow_mismatch=False)
    nn.Module.to(fuser, sharer.device)
    fuser.eval()
    return fuser


# -- the application ---------------------------------------------------------------------------------------------------


class PrefillStream(StreamingResponse):
    """Stream the records of a job, cut at a deadline (on the monotonic clock) even where the client does not read."""

    def __init__(self, job: PrefillJob, first: dict[str, Any], record: RequestRecord) -> None:
        super().__init__(job.records(first), media_type=MEDIA_TYPE)
        self._job, self._record = job, record

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send, and record what is logged."""
        try:
            async with asyncio.timeout(max(0.0, self._job.deadline - time.monotonic())):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            pass  # the connection is closed without the last record, which the client notices
        finally:
            self._job.stop()
            self._record.code = self._job.facts.pop("code")
            self._record.facts |= self._job.facts


def build_app(worker: PrefillWorker, config: HTTPConfig) -> FastAPI:
    """Make the application around a worker.

    Raises:
        ServerError: keys that can't be used, or none and an address that others can reach.
    """
    router, made = APIRouter(), worker.handshake
    handshakes = {
        wanted: gzip.compress(made.model_dump_json(exclude=None if wanted else {"tokenizer"}).encode())
        for wanted in (True, False)
    }

    @router.get(HANDSHAKE_PATH)
    async def handshake(request: Request, tokenizer: bool = False) -> Response:
        request.state.record.facts["kind"] = "handshake"
        return Response(handshakes[tokenizer], media_type="application/json", headers={"Content-Encoding": "gzip"})

    @router.post(PREFILL_PATH)
    async def prefill(body: PrefillRequest, request: Request) -> Response:
        record = request.state.record
        kind = "project" if body.fuser is not None else "read" if body.draft_tokens else "prefill"
        tokens = sum(map(len, body.ids))
        record.facts |= {"kind": kind, "rows": len(body.ids), "tokens": tokens, "precision": body.precision}
        first = {"sharer": made.sharer.to_dict(), "precision": body.precision}
        return PrefillStream(worker.submit(body, record.began + config.timeout), first, record)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(worker.close)

    state = ServerState(lambda: {"version": __version__, "waiting": worker.waiting}, abort=worker.stop)
    return create_app(config, [router], state, lifespan)
