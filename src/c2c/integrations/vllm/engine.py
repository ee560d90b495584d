"""Engine of ``c2c serve --engine vllm``: vLLM decodes, fusion happens here."""

from __future__ import annotations

import asyncio
import math
import os
import shutil
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from c2c import kv_cache
from c2c.errors import C2CError, SharerLost
from c2c.generation import PrefilledPrompt
from c2c.integrations.vllm.client import EngineClient, EventLoopThread, Tokens
from c2c.integrations.vllm.errors import (
    EngineError,
    LoadError,
    SnapshotError,
    UnsupportedError,
    as_api_error,
    check_version,
    installed,
)
from c2c.integrations.vllm.models import (
    VLLMModel,
    VLLMReceiver,
    VLLMSharer,
    check_generation_config,
    model_key,
    row_ids,
    vllm_params,
)
from c2c.integrations.vllm.scheduler import TransferParams
from c2c.integrations.vllm.snapshot import SnapshotStore, new_name
from c2c.language_model import LanguageModel
from c2c.model import C2CModel
from c2c.serving.config import ServeConfig
from c2c.serving.engine import GenerateRequest, HandoffRequest, Request, RequestHandle
from c2c.serving.errors import invalid, queue_full, shutting_down
from c2c.serving.logs import log_failure, warn
from c2c.serving.model_engine import ModelEngine
from c2c.serving.outputs import RequestOutput, Scored, new_tokens
from c2c.serving.scheduler import Job
from c2c.serving.transformers_engine import decode, repeat_rows

_PREFILLS = 4  # prompts that are prefilled and fused at a time
_MAX_RETRY = 60  # seconds
_CPU_CACHE_BYTES = 2**30
_CPU_END, _END = 0.5, 10.0  # seconds
_WHAT_FITS = -1


class VLLMEngine(ModelEngine):
    """Answer with a :class:`~c2c.model.C2CModel` whose receiver runs in vLLM; an :class:`~c2c.serving.engine.Engine`.

    A cache-to-cache request is two requests to vLLM: one prefills the prompt and saves its entries, the other loads
    what the fusers made of them and decodes. vLLM batches requests token by token.

    Args:
        model: receiver, sharers and fusers, all with tokenizers; the receiver's weights are freed here.
        config: limits. With ``on_failure="receiver_only"`` the receiver answers alone where vLLM does not take a fused
            cache, with the reason as ``fallback``; else the request fails. ``sharer_engine="vllm"`` puts the sharers
            into engines of their own as well.
        options: fields of vLLM's ``AsyncEngineArgs``, for all engines.
        store: where snapshots lie; by default a new folder in shared memory.

    Raises:
        MissingVLLMError: vLLM is missing, or another version. UnsupportedError: a model that this can't serve.
        EngineError: vLLM did not start.
    """

    def __init__(
        self,
        model: C2CModel,
        config: ServeConfig,
        options: dict[str, Any] | None = None,
        store: SnapshotStore | None = None,
    ) -> None:
        check_version(installed())
        self.store = store or SnapshotStore.create()
        self._folders: list[Path] = []
        self._loop = EventLoopThread("c2c-vllm")
        self.clients: list[EngineClient] = []
        arguments = {"max_num_seqs": config.max_batch, **_cpu_defaults(model.receiver), **(options or {})}
        try:
            self._move(model, arguments, sharers_too=config.sharer_engine == "vllm")
            super().__init__(model, config)
        except BaseException:
            self._clean_up()
            raise
        self._prefills = ThreadPoolExecutor(_PREFILLS, "c2c-prefill")
        self._slots = asyncio.Semaphore(config.max_batch)
        self._running = 0  # answers that are decoded now
        self._generating = Lock()  # a sharer in this process generates for one request at a time
        self._futures: set[Future[None]] = set()
        self._waiting, self._seconds, self._closed, self._lock = 0, 1.0, False, Lock()

    @property
    def alive(self) -> bool:
        """Whether every vLLM engine can answer."""
        return self._loop.alive and all(client.alive for client in self.clients)

    @property
    def waiting(self) -> int:
        """Accepted requests that have not begun."""
        return self._waiting

    def start(self) -> None:
        """Do nothing: vLLM was started by the constructor."""

    async def submit(self, request: Request) -> RequestHandle:
        """Accept a request; see :meth:`c2c.serving.engine.Engine.submit`."""
        job = await self.accept(request)
        with self._lock:
            if self._closed:
                raise shutting_down()
            if self._waiting >= self.config.max_queue:
                raise queue_full(self._waiting, min(max(math.ceil(self._seconds), 1), _MAX_RETRY))
            self._waiting += 1
        future = asyncio.run_coroutine_threadsafe(self._serve(job), self._loop.loop)
        self._futures.add(future)
        future.add_done_callback(self._futures.discard)
        job.handle.on_cancel(future.cancel)
        return job.handle

    def close(self) -> None:
        """Finish what was accepted, and stop."""
        with self._lock:
            self._closed = True
        for future in list(self._futures):
            with suppress(BaseException):  # cancelled: its client has left
                future.exception()
        self._prefills.shutdown()
        self._clean_up()

    def check_handoff(self, request: HandoffRequest) -> Any:
        """Refuse drafts of a sharer in an engine; see :meth:`ModelEngine.check_handoff`."""
        sharer = super().check_handoff(request)
        if request.draft_tokens and isinstance(sharer, VLLMModel):
            raise invalid("a sharer in a vLLM engine drafts nothing: leave draft_tokens out.", "draft_tokens")
        return sharer

    # -- one request, on the event loop of the engine ------------------------------------------------------------------

    async def _serve(self, job: Job) -> None:
        began: float | None = None
        try:
            async with self._slots:
                began = time.monotonic()
                self._count_waiting(-1)
                await self._answer(job)
                self._seconds = time.monotonic() - began
        except asyncio.CancelledError:
            raise
        except Exception as error:
            if not isinstance(error, LoadError | SnapshotError | C2CError):
                log_failure("request_failed", error)
            job.handle.fail(as_api_error(error))
        finally:
            if began is None:
                self._count_waiting(-1)

    async def _answer(self, job: Job) -> None:
        request = job.request
        if isinstance(request, HandoffRequest):
            await self._in_thread(self.create_handoff, job)
            return
        batches = await self._in_thread(self._prefill, job)
        if not batches:
            return
        prompt: PrefilledPrompt = batches[0][1]
        self._running += request.n
        try:
            self.on_batch(request.system, request.n)
            if isinstance(prompt.model, VLLMModel):
                await self._decode_or_fall_back(job, prompt, prompt.model)
            else:
                await self._in_thread(self._decode_here, job, prompt)
        finally:
            self._running -= request.n

    async def _decode_or_fall_back(self, job: Job, prompt: PrefilledPrompt, model: VLLMModel) -> None:
        decoding = _Decoding(job, prompt, model, self.store, self._running, self.config.max_tokens)
        try:
            await decoding.run()
        except (LoadError, SnapshotError) as error:
            warn("fused_cache_not_loaded", reason=str(error))
            if self.config.on_failure != "receiver_only" or decoding.output is not None:
                raise
            lost = SharerLost("the fused cache could not be loaded into vLLM", code="load_failed")
            decoding.prompt = self.model.prefill_receiver(prompt.tokens, lost)
            await decoding.run()

    def _in_thread(self, work: Any, *arguments: Any) -> asyncio.Future[Any]:
        return self._loop.loop.run_in_executor(self._prefills, work, *arguments)

    def _prefill(self, job: Job) -> Any:
        here = not isinstance(self.model.sharers[0], VLLMModel)
        request = job.request
        generates = isinstance(request, GenerateRequest) and not self.systems[request.system].needs_context
        with self._generating if here and generates else nullcontext():
            return self.prefill([job])

    @torch.no_grad()
    def _decode_here(self, job: Job, prompt: PrefilledPrompt) -> None:
        """Decode with a sharer in this process."""
        with self._generating:
            output = RequestOutput(job, prompt, 0, job.rows, self.config.max_tokens)
            decode(repeat_rows(prompt, [output]), output.answers)

    # -- beginning and end ---------------------------------------------------------------------------------------------

    def _move(self, model: C2CModel, arguments: dict[str, Any], *, sharers_too: bool) -> None:
        """Move models into engines. Weights that lie in an engine are freed here."""
        for index, sharer in enumerate(model.sharers if sharers_too else []):
            if not sharer.generates:
                raise UnsupportedError("a sharer on another machine can't be put into an engine here.")
            model.sharers[index] = VLLMSharer(sharer, self._client(sharer, arguments))
        shared_weights = any(sharer.model is model.receiver.model for sharer in model.sharers)
        model.receiver = VLLMReceiver(
            model.receiver, self._client(model.receiver, arguments, release=not shared_weights)
        )

    def _client(self, model: LanguageModel, arguments: dict[str, Any], release: bool = True) -> EngineClient:
        check_generation_config(model)
        source = self._source(model)
        if release:
            model.release()
        options = arguments | {"dtype": str(model.dtype).removeprefix("torch.")}
        client = EngineClient(self._loop, source, model_key(model.identity), self.store, options, patience(model))
        self.clients.append(client)
        return client

    def _source(self, model: LanguageModel) -> str:
        """Return a folder from which vLLM loads the model: its own, or one that is written for it."""
        folder = Path(str(model.model.config._name_or_path or ""))
        if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
            return str(folder)
        made = Path(tempfile.mkdtemp(prefix="c2c-model-"))
        self._folders.append(made)
        model.model.save_pretrained(made)
        return str(made)

    def _clean_up(self) -> None:
        for client in self.clients:
            client.close()
        self._loop.close()
        self.store.close()
        for folder in self._folders:
            shutil.rmtree(folder, ignore_errors=True)

    def _count_waiting(self, change: int) -> None:
        with self._lock:
            self._waiting += change


@dataclass
class _Decoding:
    """Decode one request in an engine, from its prompt or a fused cache. Nothing is sent before a load is proven.

    Attributes:
        output: its output; None as long as nothing was sent.
    """

    job: Job
    prompt: PrefilledPrompt
    model: VLLMModel
    store: SnapshotStore
    rows: int
    default_tokens: int
    output: RequestOutput | None = None

    async def run(self) -> None:
        """Decode all answers.

        Raises:
            LoadError: the engine did not load the fused cache. SnapshotError: no room for it. EngineError: it broke.
        """
        ids, cache, name = row_ids(self.prompt.tokens), self.prompt.cache, None
        try:
            if cache.layers and kv_cache.length(cache):
                name = new_name()
                await asyncio.to_thread(self.store.put, name, self.model.snapshot(ids, cache))
            async with asyncio.TaskGroup() as group:
                for index in range(self.job.rows):
                    group.create_task(self._decode(ids, index, name))
        except* Exception as failures:
            raise failures.exceptions[0] from failures  # the others have the same cause
        finally:
            if name is not None:  # not before: a pre-empted request loads it again
                self.store.delete(name)

    async def _decode(self, ids: list[int], index: int, name: str | None) -> None:
        request = self.job.request
        if not isinstance(request, GenerateRequest):
            raise TypeError("a handoff has no answers")
        transfer = None if name is None else TransferParams(load=name, receipt=new_name())
        limit = new_tokens(self.model, len(ids), request.sampling.max_tokens, self.default_tokens)
        params = vllm_params(self.model, request.sampling, limit, index)
        try:
            async with aclosing(self.model.client.stream(ids, params, transfer)) as steps:
                async for tokens in steps:
                    if tokens and self._append(tokens, index, params["logprobs"]):
                        return
            raise EngineError("vLLM ended an answer before it was whole.")
        finally:
            if transfer is not None:
                self.store.delete(str(transfer.receipt))

    def _append(self, tokens: Tokens, index: int, top: int | None) -> bool:
        """Append tokens to an answer, with the ``top`` likeliest: vLLM adds the chosen one. Return whether it ended."""
        self.output = self.output or RequestOutput(self.job, self.prompt, 0, self.rows, self.default_tokens)
        answer = self.output.answers[index]
        for token, scored in tokens:
            answer.append(token, scored and Scored(scored.chosen, scored.top[:top]))
        return answer.done


def patience(model: LanguageModel) -> float:
    """Return how many seconds an engine may take to end when all is answered.

    Each of its processes collects garbage for seconds before it ends, one after the other. On a CPU all that they have
    is memory, which the system takes back anyway; what a device holds is for its driver to release.
    """
    return _CPU_END if model.device.type == "cpu" else _END


def _cpu_defaults(model: LanguageModel) -> dict[str, Any]:
    """Return what suits a CPU: no compilation, which takes minutes; small blocks; a cache that leaves room."""
    if model.device.type != "cpu":
        return {}
    sized = {} if "VLLM_CPU_KVCACHE_SPACE" in os.environ else {"kv_cache_memory_bytes": _CPU_CACHE_BYTES}
    return {"enforce_eager": True, "block_size": 32, "max_model_len": _WHAT_FITS, **sized}
