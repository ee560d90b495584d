"""The worker of ``c2c share``: one thread prefills one request at a time, and hands out layers as they are made."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from c2c import identity, kv_cache
from c2c.errors import C2CError
from c2c.fusers import Fuser
from c2c.handoff import PRECISIONS, Handoff, Precision
from c2c.kv_cache import KeyValue
from c2c.language_model import Sharer
from c2c.private_context import project
from c2c.remote.model_stub import config_of, rotary_checksums, tokenizer_files
from c2c.remote.protocol import Handshake, PrefillRequest, check_request, fuser_hash
from c2c.remote.wire import FORMAT, Record, pack
from c2c.serving.errors import ApiError
from c2c.tokens import TokenBatch
from c2c.version import __version__

QUEUED_BYTES = 1 << 26  # of finished layers of one request that wait for its client; then the prefill waits too
Part = tuple[dict[str, Any], KeyValue | None, Sequence[Tensor]]  # manifest, entries of a layer, columns of each row


class Stopped(Exception):
    """The client has gone, or the deadline has passed."""


class StreamingCache(DynamicCache):
    """Hand index, keys and values of each layer, ``[rows, kv_heads, tokens, head_dim]``, to a callback once it is made.

    An exception in the callback stops the forward pass.
    """

    def __init__(self, callback: Callable[[int, KeyValue], None]) -> None:
        super().__init__()
        self._callback = callback

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append to a layer; called by its attention."""
        entries = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self._callback(layer_idx, entries)
        return entries


class PrefillJob:
    """Run one request, made on the event loop, in the worker's thread; ``deadline`` is on the monotonic clock.

    Attributes:
        facts: layers and bytes that were sent, and the code of the error, for the log.
    """

    def __init__(
        self, sharer: Sharer, fuser: Fuser | None, request: PrefillRequest, batch: TokenBatch, deadline: float
    ) -> None:
        self._sharer, self._fuser, self._request, self._batch = sharer, fuser, request, batch
        self._deadline, self._stopped = deadline, False
        self._loop, self._parts = asyncio.get_running_loop(), cast("asyncio.Queue[Part]", asyncio.Queue())
        self._room, self._queued = threading.Condition(), 0
        self.facts: dict[str, Any] = {"layers": 0, "bytes": 0, "code": "cut"}

    async def records(self, first: dict[str, Any]) -> AsyncIterator[bytes]:
        """Yield encoded records, up to ``end`` or ``error``; the manifest of the first one gets ``first`` besides."""
        precision, kind = cast(Precision, self._request.precision), ""
        try:
            while kind not in ("end", "error"):
                manifest, entries, columns = await self._parts.get()
                self._count(-_bytes(entries))
                tensors = {} if entries is None else await asyncio.to_thread(pack, entries, columns, precision)
                kind = manifest["kind"]
                whole = first | manifest if kind == "begin" else manifest
                data = await asyncio.to_thread(Record(whole, tensors).encode)
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
            if time.monotonic() < self._deadline:
                message = "the server is shutting down."
            last |= {"code": "timeout", "message": message}
        except C2CError as error:
            last |= {"code": "refused", "message": str(error)}
        except Exception as error:  # such as no memory; the server goes on
            last |= {"code": "failed", "message": f"the model failed: {type(error).__name__}."}
        self._loop.call_soon_threadsafe(self._parts.put_nowait, (last, None, ()))

    def _run(self) -> None:
        request, batch = self._request, self._batch
        columns = [torch.tensor(chosen, dtype=torch.long) for chosen in request.columns]
        if self._fuser is None and not request.draft_tokens:
            self._begin([], columns)

            def stream(index: int, entries: KeyValue) -> None:
                if index in request.layers:
                    self._put({"kind": "layer", "layer": index}, entries, columns)

            self._prefill(stream)
            return
        if request.draft_tokens:
            ids, cache = self._sharer.draft(batch, StreamingCache(lambda *_: self._check()), request.draft_tokens)
        else:
            ids, cache = batch.ids[0].tolist(), self._prefill(lambda *_: None)
        columns, layers = [torch.cat([columns[0], torch.arange(batch.length, len(ids))])], kv_cache.layers(cache)
        made = {index: layers[index] for index in request.layers}
        if self._fuser is not None:
            handoff = Handoff.from_cache(self._sharer.identity, torch.tensor(ids), columns[0], layers)
            made = dict(enumerate(project(handoff, self._sharer, self._fuser).layers))
            columns = [torch.arange(made[0][0].shape[2])]
        self._begin(ids[batch.length :], columns)
        for index, entries in made.items():
            self._put({"kind": "layer", "layer": index}, entries, columns)

    def _prefill(self, callback: Callable[[int, KeyValue], None]) -> Cache:
        def checked(index: int, entries: KeyValue) -> None:
            self._check()
            callback(index, entries)

        return self._sharer.prefill(self._batch, self._request.stop, StreamingCache(checked))

    def _begin(self, drafted: list[int], columns: Sequence[Tensor]) -> None:
        self._put({"kind": "begin", "drafted": drafted, "columns": list(map(len, columns))})

    def _put(self, manifest: dict[str, Any], entries: KeyValue | None = None, columns: Sequence[Tensor] = ()) -> None:
        """Wait for room, so that a client that reads slowly does not fill the memory."""
        size = _bytes(entries)
        with self._room:
            self._room.wait_for(
                lambda: self._stopped or not self._queued or self._queued + size <= QUEUED_BYTES,
                max(0.0, self._deadline - time.monotonic()),
            )
        self._check()
        self._count(size)
        self._loop.call_soon_threadsafe(self._parts.put_nowait, (manifest, entries, columns))

    def _count(self, size: int) -> None:
        with self._room:
            self._queued += size
            self._room.notify()

    def _check(self) -> None:
        if self._stopped or time.monotonic() > self._deadline:
            raise Stopped


class PrefillWorker:
    """Prefill with one model in one thread.

    Args:
        sharer: the model.
        tokens: of one request at most, padding and drafts included.
        waiting: requests under way at most.
        layers: those whose entries may be sent; all by default.
        finest: the precision of most bytes that is sent.
        fusers: of private context, to project with.

    Attributes:
        handshake: model and limits, for clients.
        waiting: requests under way.

    Raises:
        C2CError: layers that the model does not have, or a fuser that was made for another model.
    """

    def __init__(
        self,
        sharer: Sharer,
        *,
        tokens: int = 8192,
        waiting: int = 8,
        layers: Sequence[int] | None = None,
        finest: str = "float32",
        fusers: Sequence[Fuser] = (),
    ) -> None:
        self._sharer, self._most, self.waiting, count = sharer, waiting, 0, sharer.geometry.layers
        self._fusers = {fuser_hash(fuser): _prepared(fuser, sharer) for fuser in fusers}
        given = sorted(set(range(count) if layers is None else layers))
        if outside := [layer for layer in given if not 0 <= layer < count]:
            raise C2CError(f"layers {outside} do not exist: {sharer.name} has layers 0 to {count - 1}.")
        name, most = Path(sharer.identity.name), PRECISIONS[finest].itemsize
        public = {"name": name.name} if name.is_absolute() else {}  # not the folder that it was loaded from
        rotary_error = None
        try:
            sharer.check_rotary()
        except C2CError as error:
            rotary_error = str(error)
        self.handshake = Handshake(
            format=FORMAT,
            version=__version__,
            sharer=sharer.identity.to_dict() | public,
            config=config_of(sharer.model),
            dtype=str(sharer.dtype).removeprefix("torch."),
            layers=given,
            precisions=[name for name, dtype in PRECISIONS.items() if dtype.itemsize <= most],
            fusers=sorted(self._fusers),
            tokens=tokens,
            vocabulary=sharer.model.get_input_embeddings().num_embeddings,
            context=sharer.context_length,
            rotary=rotary_checksums(sharer.model),
            rotary_error=rotary_error,
            tokenizer=None if sharer.tokenizer is None else tokenizer_files(sharer.tokenizer),
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
