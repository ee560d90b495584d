"""Client of a vLLM engine with one model: prefills prompts into snapshots, and decodes from prompts or snapshots."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from itertools import zip_longest
from threading import Thread
from typing import Any, TypeVar

from c2c.integrations.vllm.errors import EngineError, LoadError, SnapshotError, check_version, installed
from c2c.integrations.vllm.scheduler import TransferParams
from c2c.integrations.vllm.snapshot import Snapshot, SnapshotStore, new_name, token_hash
from c2c.serving.outputs import Scored

T = TypeVar("T")
Tokens = list[tuple[int, Scored | None]]
_TOP_LOGPROBS = 20
_GREEDY = {"max_tokens": 1, "temperature": 0.0}
_ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a fork of a process with threads in torch may hang
    # what killed processes leave in shared memory is removed by a process that would warn about each piece
    "PYTHONWARNINGS": "ignore:resource_tracker",
}
# without it the first sample, and the first log-probability, hold up every request while a compiler runs
_EAGER = {"TORCH_COMPILE_DISABLE": "1"}


class EventLoopThread:
    """Run an event loop in a thread of its own, so that vLLM and the HTTP server never wait for each other."""

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = Thread(target=self.loop.run_forever, name=name, daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._thread.is_alive()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop and wait for its result; from any other thread."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    def close(self) -> None:
        """Stop the loop."""
        if self._thread.is_alive():
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join()
            self.loop.close()


class EngineClient:
    """Start a vLLM engine with one model, and send requests to it.

    Args:
        loop: event loop that the engine's client runs on.
        model: folder or hub id.
        key: what its snapshots are marked with.
        store: where they lie.
        options: fields of vLLM's ``AsyncEngineArgs``.
        patience: seconds that its processes may take to end, then they are killed.

    Raises:
        MissingVLLMError: vLLM is missing, or another version. EngineError: it did not start.
    """

    def __init__(
        self,
        loop: EventLoopThread,
        model: str,
        key: str,
        store: SnapshotStore,
        options: dict[str, Any] | None = None,
        patience: float = 10.0,
    ) -> None:
        check_version(installed())
        self.loop, self._key, self._store, self._patience = loop, key, store, patience
        options = options or {}
        for name, value in (_ENVIRONMENT | (_EAGER if options.get("enforce_eager") else {})).items():
            os.environ.setdefault(name, value)
        try:
            self._llm: Any = loop.run(_start(model, key, store, options))
        except Exception as error:
            raise EngineError(
                f"vLLM did not start with {model}: {error} The log above says more; docs/serving.md says what it needs."
            ) from error

    @property
    def alive(self) -> bool:
        """Whether it can answer."""
        return self.loop.alive and not self._llm.errored

    @property
    def context_length(self) -> int:
        """Tokens of a prompt and its answer together, at most."""
        return int(self._llm.model_config.max_model_len)

    async def stream(
        self, ids: Sequence[int], params: dict[str, Any], transfer: TransferParams | None = None
    ) -> AsyncGenerator[Tokens, None]:
        """Decode token by token, on the client's loop. Closing the iterator aborts the request.

        Yields new tokens as they come, each with its log-probabilities where ``params`` request them.

        Args:
            ids: the prompt.
            params: fields of vLLM's ``SamplingParams``.
            transfer: what is to be loaded and saved.

        Raises:
            LoadError: the load failed, or was not done. EngineError: vLLM broke.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        transfer = transfer or TransferParams()
        prompt: dict[str, Any] = {"prompt_token_ids": list(ids)}
        if transfer.load is not None:  # no other request may find its blocks, not even another load of the snapshot
            prompt["cache_salt"] = new_name()
        sampling = SamplingParams(
            **params,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            extra_args={"kv_transfer_params": transfer.to_params()} if transfer != TransferParams() else None,
            ignore_eos=True,
        )
        proven = transfer.load is None
        async with aclosing(self._generate(prompt, sampling)) as outputs:
            async for output in outputs:
                new = output.outputs[0]
                if new.finish_reason == "error":
                    raise LoadError("vLLM could not load the fused cache; the engine's log says why.")
                if not proven and not self._store.acknowledged(transfer.receipt or ""):
                    raise LoadError("vLLM answered without loading the fused cache.")
                proven = True
                yield [(token, _score(token, entry)) for token, entry in zip_longest(new.token_ids, new.logprobs or [])]

    async def prefill(self, ids: Sequence[int], begin: Snapshot | None = None) -> Snapshot:
        """Prefill a prompt and return its entries, on the client's loop.

        Args:
            ids: the prompt.
            begin: entries of its first tokens, in place of those that the model would make.

        Raises:
            LoadError: ``begin`` was not loaded. SnapshotError: nothing was saved. EngineError: vLLM broke.
        """
        load, save, receipt = new_name(), new_name(), new_name()
        try:
            if begin is None:
                transfer = TransferParams(save=save)
            else:
                transfer = TransferParams(load, save, receipt)
                await asyncio.to_thread(self._store.put, load, begin)
            async for _ in self.stream(ids, _GREEDY, transfer):
                pass
            snapshot = await asyncio.to_thread(self._store.get, save)
        finally:
            for name in (load, save, receipt):
                self._store.delete(name)
        if snapshot.info.model != self._key or snapshot.info.tokens != token_hash(ids):
            raise SnapshotError("vLLM saved entries of other tokens than those requested.")
        return snapshot

    async def generate(self, ids: Sequence[int], params: dict[str, Any]) -> list[int]:
        """Decode a whole answer, on the client's loop."""
        return [token async for new in self.stream(ids, params) for token, _ in new]

    def close(self) -> None:
        """End the engine."""
        self.loop.run(_shut_down(self._llm, self._patience))

    async def _generate(self, prompt: dict[str, Any], params: Any) -> AsyncGenerator[Any, None]:
        from vllm.exceptions import VLLMClientError
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        try:
            async for output in self._llm.generate(prompt, params, request_id=new_name()):
                yield output
        except (EngineDeadError, EngineGenerateError, VLLMClientError) as error:
            raise EngineError(f"vLLM broke: {type(error).__name__}.") from error


async def _start(model: str, key: str, store: SnapshotStore, options: dict[str, Any]) -> Any:
    """Start an engine with what c2c needs of it; tokenizer and decoding parameters are c2c's own."""
    from vllm.config import KVTransferConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    limits = {"max_bytes": store.max_bytes, "max_seconds": store.max_seconds}
    transfer = KVTransferConfig(
        kv_connector="C2CConnector",
        kv_connector_module_path="c2c.integrations.vllm.connector",
        kv_role="kv_both",
        kv_connector_extra_config={"folder": str(store.folder), "model": key, **limits},
        kv_load_failure_policy="fail",  # with "recompute" the answer would silently be the receiver's own
    )
    needed = {
        "model": model,
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "max_logprobs": _TOP_LOGPROBS,
        "disable_log_stats": True,
        "kv_transfer_config": transfer,
    }
    return AsyncLLM.from_engine_args(AsyncEngineArgs(**needed | options))


async def _shut_down(llm: Any, seconds: float) -> None:
    llm.shutdown(timeout=seconds)


def _score(token: int, entries: dict[int, Any] | None) -> Scored | None:
    """Convert log-probabilities; the chosen token is among them, whether or not it is one of the likeliest."""
    if entries is None:
        return None
    ranked = sorted(entries.items(), key=lambda pair: pair[1].rank)
    return Scored(float(entries[token].logprob), [(other, float(entry.logprob)) for other, entry in ranked])
