"""A model in a vLLM engine: reads prompts into snapshots, and answers from prompts or snapshots, token by token."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from c2c.integrations.vllm.background import Background
from c2c.integrations.vllm.errors import EngineError, LoadError, SnapshotError
from c2c.integrations.vllm.plan import Wish
from c2c.integrations.vllm.snapshot import Snapshot, token_hash
from c2c.integrations.vllm.store import SnapshotStore, new_name
from c2c.integrations.vllm.versions import check_version, installed
from c2c.serving.sampling import Scored

CONNECTOR = "C2CConnector"
CONNECTOR_MODULE = "c2c.integrations.vllm.connector"
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


@dataclass(frozen=True)
class Step:
    """What an engine tells about a request at a time.

    Attributes:
        tokens: new ones.
        scored: their log-probabilities; empty if not asked for.
        ended: why it has ended, None while it has not.
    """

    tokens: list[int]
    scored: list[Scored]
    ended: str | None = None


class Host:
    """A vLLM engine with one model.

    Args:
        background: where it is talked to.
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
        background: Background,
        model: str,
        key: str,
        store: SnapshotStore,
        options: dict[str, Any] | None = None,
        patience: float = 10.0,
    ) -> None:
        check_version(installed())
        self._background, self._key, self._store, self._patience = background, key, store, patience
        eager = (options or {}).get("enforce_eager", False)
        for name, value in (_ENVIRONMENT | (_EAGER if eager else {})).items():
            os.environ.setdefault(name, value)
        try:
            self._llm: Any = background.wait(_started(_arguments(model, key, store) | (options or {})))
        except Exception as error:
            raise EngineError(
                f"vLLM did not start with {model}: {error} The log above says more; docs/serving.md says what it needs."
            ) from error

    @property
    def alive(self) -> bool:
        """Whether it can answer."""
        return self._background.alive and not self._llm.errored

    @property
    def context(self) -> int:
        """Tokens of a prompt and its answer together, at most."""
        return int(self._llm.model_config.max_model_len)

    async def stream(
        self, ids: Sequence[int], settings: dict[str, Any], wish: Wish | None = None
    ) -> AsyncGenerator[Step, None]:
        """Answer token by token, on the background loop. Closing the iterator aborts the request.

        Args:
            ids: the prompt.
            settings: fields of vLLM's ``SamplingParams``.
            wish: what is to be loaded and saved.

        Raises:
            LoadError: the load failed, or was not done. EngineError: vLLM broke.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        if wish is not None and settings.get("prompt_logprobs") is not None:
            raise LoadError("prompt_logprobs can't be had with a fused cache: vLLM would read the prompt itself.")
        prompt: dict[str, Any] = {"prompt_token_ids": list(ids)}
        extra = None
        if wish is not None:
            extra = {"kv_transfer_params": wish.to_params()}
            if wish.load is not None:  # its blocks are found by nobody else, not even by a second load of the snapshot
                prompt["cache_salt"] = new_name()
        params = SamplingParams(
            **settings, detokenize=False, output_kind=RequestOutputKind.DELTA, extra_args=extra, ignore_eos=True
        )
        proven = wish is None or wish.load is None
        async with aclosing(self._generate(prompt, params)) as outputs:
            async for output in outputs:
                step = _step(output)
                if step.ended == "error":
                    raise LoadError("vLLM could not load the fused cache; the engine's log says why.")
                if not proven and wish is not None and not self._store.acknowledged(wish.receipt or ""):
                    raise LoadError("vLLM answered without loading the fused cache.")
                proven = True
                yield step

    async def read(self, ids: Sequence[int], begin: Snapshot | None = None) -> Snapshot:
        """The entries of a prompt, on the background loop.

        Args:
            ids: the prompt.
            begin: entries of its first tokens, in place of those that the model would make.

        Raises:
            LoadError: ``begin`` was not loaded. SnapshotError: nothing was saved. EngineError: vLLM broke.
        """
        wish = Wish(save=new_name())
        if begin is not None:
            wish = Wish(save=wish.save, load=new_name(), receipt=new_name())
        names = [name for name in vars(wish).values() if name is not None]
        try:
            if begin is not None:
                await asyncio.to_thread(self._store.put, str(wish.load), begin)
            async for _ in self.stream(ids, _GREEDY, wish):
                pass
            snapshot = await asyncio.to_thread(self._store.get, str(wish.save))
        finally:
            for name in names:
                self._store.delete(name)
        if snapshot.facts.model != self._key or snapshot.facts.tokens != token_hash(ids):
            raise SnapshotError("vLLM saved entries of other tokens than it was asked for.")
        return snapshot

    def read_now(self, ids: Sequence[int], begin: Snapshot | None = None) -> Snapshot:
        """:meth:`read`, from any other thread."""
        return self._background.wait(self.read(ids, begin))

    def close(self) -> None:
        """End the engine."""
        self._background.wait(_shut_down(self._llm, self._patience))

    async def _generate(self, prompt: dict[str, Any], params: Any) -> AsyncGenerator[Any, None]:
        from vllm.exceptions import VLLMClientError
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        try:
            async for output in self._llm.generate(prompt, params, request_id=new_name()):
                yield output
        except (EngineDeadError, EngineGenerateError, VLLMClientError) as error:
            raise EngineError(f"vLLM broke: {type(error).__name__}.") from error


def _arguments(model: str, key: str, store: SnapshotStore) -> dict[str, Any]:
    """What c2c needs of an engine; the tokenizer is ours, and so are the model's own settings for decoding."""
    extra = {
        "folder": str(store.folder),
        "model": key,
        "max_bytes": store.max_bytes,
        "max_seconds": store.max_seconds,
    }
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
            "kv_connector_extra_config": extra,
            "kv_load_failure_policy": "fail",  # with "recompute" the answer would silently be the receiver's own
        },
    }


async def _started(arguments: dict[str, Any]) -> Any:
    from vllm.config import KVTransferConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    arguments["kv_transfer_config"] = KVTransferConfig(**arguments["kv_transfer_config"])
    return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))


async def _shut_down(llm: Any, seconds: float) -> None:
    llm.shutdown(timeout=seconds)


def _step(output: Any) -> Step:
    told = output.outputs[0]
    tokens = list(told.token_ids)
    scored = [_scored(token, entries) for token, entries in zip(tokens, told.logprobs or [], strict=False)]
    return Step(tokens, scored, told.finish_reason)


def _scored(token: int, entries: dict[int, Any]) -> Scored:
    """The chosen token is among the entries, whether or not it is one of the likeliest."""
    ranked = sorted(entries.items(), key=lambda pair: pair[1].rank)
    return Scored(float(entries[token].logprob), [(other, float(entry.logprob)) for other, entry in ranked])
