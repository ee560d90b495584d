"""Client of a vLLM engine with one model: prefills prompts into snapshots, and decodes from prompts or snapshots."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from threading import Thread
from typing import Any, TypeVar

from c2c.integrations.vllm.errors import EngineError, LoadError, SnapshotError
from c2c.integrations.vllm.snapshot import Snapshot, token_hash
from c2c.integrations.vllm.store import SnapshotStore, new_name
from c2c.integrations.vllm.transfers import TransferParams
from c2c.integrations.vllm.versions import check_version, installed
from c2c.serving.outputs import Scored

T = TypeVar("T")
CONNECTOR, CONNECTOR_MODULE = "C2CConnector", "c2c.integrations.vllm.connector"
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


@dataclass(frozen=True)
class StepOutput:
    """New tokens of one request.

    Attributes:
        tokens: their ids.
        scored: their log-probabilities; empty if not requested.
        reason: why the request has ended, None while it has not.
    """

    tokens: list[int]
    scored: list[Scored]
    reason: str | None = None


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
            self._llm: Any = loop.run(_start(_arguments(model, key, store) | options))
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
    ) -> AsyncGenerator[StepOutput, None]:
        """Decode token by token, on the client's loop. Closing the iterator aborts the request.

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
        if transfer != TransferParams() and params.get("prompt_logprobs") is not None:
            raise LoadError("prompt_logprobs can't be had with a fused cache: vLLM would read the prompt itself.")
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
                step = _step(output)
                if step.reason == "error":
                    raise LoadError("vLLM could not load the fused cache; the engine's log says why.")
                if not proven and not self._store.acknowledged(transfer.receipt or ""):
                    raise LoadError("vLLM answered without loading the fused cache.")
                proven = True
                yield step

    async def prefill(self, ids: Sequence[int], begin: Snapshot | None = None) -> Snapshot:
        """Prefill a prompt and return its entries, on the client's loop.

        Args:
            ids: the prompt.
            begin: entries of its first tokens, in place of those that the model would make.

        Raises:
            LoadError: ``begin`` was not loaded. SnapshotError: nothing was saved. EngineError: vLLM broke.
        """
        transfer = TransferParams(save=new_name())
        if begin is not None:
            transfer = TransferParams(save=transfer.save, load=new_name(), receipt=new_name())
        names = [name for name in vars(transfer).values() if name is not None]
        try:
            if begin is not None:
                await asyncio.to_thread(self._store.put, str(transfer.load), begin)
            async for _ in self.stream(ids, _GREEDY, transfer):
                pass
            snapshot = await asyncio.to_thread(self._store.get, str(transfer.save))
        finally:
            for name in names:
                self._store.delete(name)
        if snapshot.info.model != self._key or snapshot.info.tokens != token_hash(ids):
            raise SnapshotError("vLLM saved entries of other tokens than those requested.")
        return snapshot

    async def generate(self, ids: Sequence[int], params: dict[str, Any]) -> list[int]:
        """Decode a whole answer, on the client's loop."""
        return [token async for step in self.stream(ids, params) for token in step.tokens]

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


def _arguments(model: str, key: str, store: SnapshotStore) -> dict[str, Any]:
    """Return what c2c needs of an engine; tokenizer and decoding parameters are its own."""
    limits = {"max_bytes": store.max_bytes, "max_seconds": store.max_seconds}
    return {
        "model": model,
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "max_logprobs": _TOP_LOGPROBS,
        "disable_log_stats": True,
        "kv_transfer_config": {
            "kv_connector": CONNECTOR,
            "kv_connector_module_path": CONNECTOR_MODULE,
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"folder": str(store.folder), "model": key, **limits},
            "kv_load_failure_policy": "fail",  # with "recompute" the answer would silently be the receiver's own
        },
    }


async def _start(arguments: dict[str, Any]) -> Any:
    from vllm.config import KVTransferConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    arguments["kv_transfer_config"] = KVTransferConfig(**arguments["kv_transfer_config"])
    return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))


async def _shut_down(llm: Any, seconds: float) -> None:
    llm.shutdown(timeout=seconds)


def _step(output: Any) -> StepOutput:
    new = output.outputs[0]
    tokens = list(new.token_ids)
    scored = [_score(token, entries) for token, entries in zip(tokens, new.logprobs or [], strict=False)]
    return StepOutput(tokens, scored, new.finish_reason)


def _score(token: int, entries: dict[int, Any]) -> Scored:
    """Convert log-probabilities; the chosen token is among them, whether or not it is one of the likeliest."""
    ranked = sorted(entries.items(), key=lambda pair: pair[1].rank)
    return Scored(float(entries[token].logprob), [(other, float(entry.logprob)) for other, entry in ranked])
