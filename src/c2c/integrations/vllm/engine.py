"""The engine of ``c2c serve --engine vllm``: answers come from vLLM, fusion happens here."""

from __future__ import annotations

import asyncio
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import torch

from c2c.generation import DEFAULT_NEW_TOKENS
from c2c.integrations.vllm.answer import Answering, write
from c2c.integrations.vllm.background import Background
from c2c.integrations.vllm.errors import LoadError, SnapshotError, UnsupportedError, as_api_error
from c2c.integrations.vllm.host import Host
from c2c.integrations.vllm.hosted import Hosted, HostedReceiver, HostedSharer, model_key
from c2c.integrations.vllm.places import Places
from c2c.integrations.vllm.settings import check_own_settings
from c2c.integrations.vllm.store import SnapshotStore
from c2c.integrations.vllm.versions import check_version, installed
from c2c.integrations.vllm.ways import HostedWays
from c2c.language_model import LanguageModel
from c2c.model import C2CModel
from c2c.remote import RemoteSharer
from c2c.serving.answers import Answers
from c2c.serving.batch import Prefilled
from c2c.serving.batch import write as write_here
from c2c.serving.engine import Ask, AskToRead, Description, SharerState, Way
from c2c.serving.errors import invalid, queue_full, shutting_down
from c2c.serving.fused import unfused
from c2c.serving.logs import log_failure, warn
from c2c.serving.queue import Job
from c2c.serving.reading import Batch
from c2c.serving.readings import Readings
from c2c.serving.served import describe, sharer_states
from c2c.serving.ticket import Ticket
from c2c.serving.writer import Writer

OnLoadFailure = Literal["raise", "receiver_only"]
_READERS = 4  # prompts that are read and fused at a time
_LONGEST_RETRY = 60
_CPU_CACHE = 2**30
_CPU_END, _END = 0.5, 10.0  # seconds
_WHAT_FITS = -1
_NOT_LOADED = "receiver only: the fused cache could not be loaded into vLLM"


class VLLMEngine:
    """Answers with a :class:`~c2c.model.C2CModel` whose receiver runs in vLLM. An :class:`~c2c.serving.engine.Engine`.

    A cache-to-cache request is two requests to vLLM: one reads the prompt and saves its entries, the other loads what
    the fusers made of them and answers. Requests are batched by vLLM, token by token.

    Args:
        model: receiver, sharers and fusers, all with tokenizers; the receiver's weights are given back.
        max_queue: requests that may wait.
        max_batch: answers that are written at a time.
        max_tokens: new tokens at most, for requests that do not say.
        message_tokens: the same for the sharer's text, in text-to-text.
        on_load_failure: what becomes of a request whose fused cache vLLM did not take: an error, or the receiver alone
            with the reason as ``fallback``.
        sharer_in_vllm: put the sharers into vLLM engines of their own as well.
        options: fields of vLLM's ``AsyncEngineArgs``, for all engines.
        store: where snapshots lie; by default a new folder in shared memory.

    Raises:
        MissingVLLMError: vLLM is missing, or another version. UnsupportedError: a model that this can't serve.
        EngineError: vLLM did not start.
    """

    def __init__(
        self,
        model: C2CModel,
        *,
        max_queue: int = 64,
        max_batch: int = 16,
        max_tokens: int = DEFAULT_NEW_TOKENS,
        message_tokens: int = 128,
        on_load_failure: OnLoadFailure = "raise",
        sharer_in_vllm: bool = False,
        options: dict[str, Any] | None = None,
        store: SnapshotStore | None = None,
    ) -> None:
        check_version(installed())
        if on_load_failure not in ("raise", "receiver_only"):
            raise UnsupportedError(f"on_load_failure is {on_load_failure!r}; expected 'raise' or 'receiver_only'.")
        self._model, self._max_queue, self._max_batch, self._max_tokens = model, max_queue, max_batch, max_tokens
        self._policy = on_load_failure
        self.store = store or SnapshotStore.create()
        self._folders: list[Path] = []
        self._background = Background("c2c-vllm")
        self._hosts: list[Host] = []
        arguments = {"max_num_seqs": max_batch, **_defaults(model.receiver), **(options or {})}
        try:
            self._move(arguments, sharer_in_vllm)
        except BaseException:
            self._tidy()
            raise
        self._ways, self._readings = HostedWays(model, message_tokens, self._complete), Readings(model)
        self._readers = ThreadPoolExecutor(_READERS, "c2c-reader")
        self._places = Places(max_batch)
        self._generating = Lock()  # a sharer here writes for one request at a time
        self._jobs: set[Future[None]] = set()
        self._waiting, self._last, self._closed, self._changing = 0, 1.0, False, Lock()
        self.on_batch: Callable[[Way, int], object] = lambda way, rows: None

    # -- what the server sees ------------------------------------------------------------------------------------------

    @property
    def description(self) -> Description:
        """What it serves."""
        return describe(self._model, self._ways.known)

    @property
    def sharers(self) -> tuple[SharerState, ...]:
        """Whether the sharers can be asked."""
        return sharer_states(self._model)

    @property
    def alive(self) -> bool:
        """Whether every vLLM engine can answer."""
        return self._background.alive and all(host.alive for host in self._hosts)

    @property
    def waiting(self) -> int:
        """Accepted requests that have no place yet."""
        return self._waiting

    def start(self) -> None:
        """Nothing to do: vLLM was started when this was made."""

    def submit(self, ask: Ask | AskToRead) -> Ticket:
        """Accept a request; see :class:`~c2c.serving.engine.Engine`."""
        self._check(ask)
        with self._changing:
            if self._closed:
                raise shutting_down()
            if self._waiting >= self._max_queue:
                raise queue_full(self._waiting, min(max(math.ceil(self._last), 1), _LONGEST_RETRY))
            self._waiting += 1
        ticket = Ticket()
        future = self._background.spawn(self._serve(Job(ask, ticket)))
        self._jobs.add(future)
        future.add_done_callback(self._jobs.discard)
        ticket.on_cancel(future.cancel)
        return ticket

    def close(self) -> None:
        """Finish what was accepted, and stop."""
        with self._changing:
            self._closed = True
        for future in list(self._jobs):
            try:
                future.exception()
            except BaseException:  # cancelled: its client has left
                continue
        self._readers.shutdown()
        self._tidy()

    def _check(self, ask: Ask | AskToRead) -> None:
        if isinstance(ask, AskToRead):
            self._check_reading(ask)
            return
        if not 1 <= ask.n <= self._max_batch:
            raise invalid(f"n is {ask.n}; this server writes 1 to {self._max_batch} answers at once.", "n")
        self._ways.check(ask)

    def _check_reading(self, ask: AskToRead) -> None:
        sharer = self._readings.check(ask)
        if ask.draft_tokens and isinstance(sharer, Hosted):
            raise invalid("a sharer in a vLLM engine writes no draft: leave draft_tokens out.", "draft_tokens")

    # -- one request, on the background loop ---------------------------------------------------------------------------

    async def _serve(self, job: Job) -> None:
        began = False
        try:
            async with self._places.take(job.rows):
                began, since = True, time.monotonic()
                self._no_longer_waits()
                await self._answer(job)
                self._last = time.monotonic() - since
        except asyncio.CancelledError:
            raise
        except Exception as error:
            if not isinstance(error, LoadError | SnapshotError):
                log_failure("request_failed", error)
            job.ticket.fail(as_api_error(error))
        finally:
            if not began:
                self._no_longer_waits()

    async def _answer(self, job: Job) -> None:
        loop = asyncio.get_running_loop()
        if isinstance(job.ask, AskToRead):
            await loop.run_in_executor(self._readers, self._read, job, job.ask)
            return
        batch = await loop.run_in_executor(self._readers, self._prompted, job)
        if batch is None:  # it was told why
            return
        self.on_batch(job.way, job.rows)
        if not isinstance(batch.model, Hosted):
            await loop.run_in_executor(self._readers, self._write_here, batch)
            return
        answering = self._answering(batch)
        try:
            await answering.run()
        except (LoadError, SnapshotError) as error:
            warn("fused_cache_not_loaded", reason=str(error))
            if self._policy == "raise" or answering.begun:
                raise
            await self._answering(self._alone(batch)).run()

    def _answering(self, batch: Batch) -> Answering:
        return Answering(batch, self.store, self._max_tokens, lambda: self._places.taken)

    def _alone(self, batch: Batch) -> Batch:
        """The same request for the receiver alone, saying so."""
        prompted, tokens = batch.prompted[0], batch.prefilled.tokens
        prompted.fallback, prompted.crossed = _NOT_LOADED, 0
        prompted.report = unfused(self._model, prompted.prompt_tokens, "the fused cache was not loaded", _NOT_LOADED)
        return Batch(batch.model, [prompted], Prefilled(tokens, batch.model.prefill(tokens)))

    # -- in the threads of readers -------------------------------------------------------------------------------------

    @torch.no_grad()
    def _prompted(self, job: Job) -> Batch | None:
        """Read and fuse the prompt of a request; None if it can't be, and was told so."""
        if job.way is Way.TEXT and not isinstance(self._ways.speaker, Hosted):
            with self._generating:
                return self._ways.read(job.way, [job])
        return self._ways.read(job.way, [job])

    @torch.no_grad()
    def _write_here(self, batch: Batch) -> None:
        """Let a sharer that is in no engine answer, by its own ``generate``."""
        counts = [prompted.job.rows for prompted in batch.prompted]
        with self._generating:
            answers = [Answers(one, batch, self._max_tokens, sum(counts)) for one in batch.prompted]
            writers = [writer for one in answers for writer in one.writers]
            write_here(batch.model, batch.prefilled.spread(counts), writers)

    def _complete(self, model: Hosted, ids: list[int], writer: Writer) -> None:
        self._background.wait(write(model, ids, lambda: writer, replace(writer.sampler.sampling)))

    @torch.no_grad()
    def _read(self, job: Job, ask: AskToRead) -> None:
        self._readings.read(job, ask)

    # -- beginning and end ---------------------------------------------------------------------------------------------

    def _move(self, arguments: dict[str, Any], sharers_too: bool) -> None:
        """Put the models into engines. Weights that lie in an engine are not kept here."""
        model = self._model
        for index, sharer in enumerate(model.sharers if sharers_too else []):
            if isinstance(sharer, RemoteSharer):
                raise UnsupportedError("a sharer on another machine can't be put into an engine here.")
            model.sharers[index] = HostedSharer(sharer, self._host(sharer, arguments))
        shared_weights = any(sharer.model is model.receiver.model for sharer in model.sharers)
        model.receiver = HostedReceiver(model.receiver, self._host(model.receiver, arguments, not shared_weights))

    def _host(self, model: LanguageModel, arguments: dict[str, Any], release: bool = True) -> Host:
        check_own_settings(model)
        source = self._source(model)
        if release:
            model.release()
        options = arguments | {"dtype": str(model.dtype).removeprefix("torch.")}
        key, patience = model_key(model.identity), _patience(model)
        host = Host(self._background, source, key, self.store, options, patience)
        self._hosts.append(host)
        return host

    def _source(self, model: LanguageModel) -> str:
        """A folder from which vLLM loads the model: its own, or one that is written for it."""
        folder = Path(str(model.model.config._name_or_path or ""))
        if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
            return str(folder)
        made = Path(tempfile.mkdtemp(prefix="c2c-model-"))
        self._folders.append(made)
        model.model.save_pretrained(made)
        return str(made)

    def _tidy(self) -> None:
        for host in self._hosts:
            host.close()
        self._background.close()
        self.store.close()
        for folder in self._folders:
            shutil.rmtree(folder, ignore_errors=True)

    def _no_longer_waits(self) -> None:
        with self._changing:
            self._waiting -= 1


def _patience(model: LanguageModel) -> float:
    """How long an engine may take to end when all is answered.

    Each of its processes collects garbage for seconds before it ends, one after the other. On a CPU all that they have
    is memory, which the system takes back anyway; what a device holds is for its driver to release.
    """
    return _CPU_END if model.device.type == "cpu" else _END


def _defaults(model: LanguageModel) -> dict[str, Any]:
    """What suits a CPU: no compilation, which takes minutes; small blocks; a cache that leaves room for the rest."""
    if model.device.type != "cpu":
        return {}
    sized = {} if "VLLM_CPU_KVCACHE_SPACE" in os.environ else {"kv_cache_memory_bytes": _CPU_CACHE}
    return {"enforce_eager": True, "block_size": 32, "max_model_len": _WHAT_FITS, **sized}
