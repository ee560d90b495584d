"""KV connector that vLLM loads by its path. Its two halves are ``TransferScheduler`` and ``TransferWorker``.

vLLM makes it twice, once beside the scheduler and once beside the model, perhaps in other processes; the transfers that
the first has planned for a step come to the second as that step's metadata.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)

from c2c.integrations.vllm.errors import UnsupportedError, check_version, installed
from c2c.integrations.vllm.scheduler import Transfer, TransferScheduler
from c2c.integrations.vllm.snapshot import SnapshotStore
from c2c.integrations.vllm.worker import TransferWorker

_WAIT = 10.0


@dataclass
class StepMetadata(KVConnectorMetadata):  # type: ignore[misc]
    """Transfers of a step as vLLM carries them."""

    loads: list[Transfer] = field(default_factory=list)
    saves: list[Transfer] = field(default_factory=list)


class C2CConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """Load and save KV entries of requests with parameters for it; others are left alone.

    Extra options: ``folder`` of the store, ``model`` (key of the model), ``max_bytes`` and ``max_seconds`` of the
    store, ``wait_seconds`` for a snapshot that is not there yet.
    """

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        check_version(installed())
        self._config, self._groups = vllm_config, kv_cache_config.kv_cache_groups
        _check_parallel(vllm_config.parallel_config)
        extra = vllm_config.kv_transfer_config.kv_connector_extra_config
        limits = {key: extra[key] for key in ("max_bytes", "max_seconds") if key in extra}
        store, model = SnapshotStore(Path(extra["folder"]), **limits), str(extra["model"])
        if role == KVConnectorRole.SCHEDULER:
            self._scheduler = TransferScheduler(store, model, float(extra.get("wait_seconds", _WAIT)))
        else:
            self._worker = TransferWorker(store, model)

    @property
    def requires_kv_delivery(self) -> bool:
        """False: a save is done within its step, so that a pre-emption later can't spoil it."""
        return False

    # -- beside the scheduler ------------------------------------------------------------------------------------------

    def on_new_request(self, request: Any) -> None:
        """Track a request that loads or saves."""
        self._scheduler.add(request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Return how many tokens are loaded, within the step."""
        return self._scheduler.match(request, num_computed_tokens), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Plan the load into the blocks of a request."""
        self._scheduler.allocate(request, list(blocks.get_block_ids()[0]), num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> StepMetadata:
        """Return the transfers of a step."""
        return StepMetadata(*self._scheduler.step(scheduler_output))

    def update_connector_output(self, connector_output: Any) -> None:
        """Record which loads failed."""
        if connector_output.invalid_block_ids:
            self._scheduler.fail(connector_output.invalid_block_ids)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Return what became of a request; its blocks may be freed."""
        return False, self._scheduler.report(request.request_id)

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Return the same."""
        return False, self._scheduler.report(request.request_id)

    # -- beside the model ----------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """Take the caches, and test that their layout is known."""
        self._worker.register(kv_caches, self._config.compilation_config.static_forward_context, self._groups)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Load, before the forward pass of the step; newer model runners pass more, which is not needed."""
        self._worker.load(self._get_connector_metadata().loads)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Do nothing: loads are done before the forward pass."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Do nothing: whole prompts are saved after the forward pass."""

    def wait_for_save(self) -> None:
        """Save, after the forward pass."""
        self._worker.save(self._get_connector_metadata().saves)

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Return the blocks whose load failed."""
        return self._worker.take_failed()


def _check_parallel(parallel: Any) -> None:
    sizes = {
        "tensor": parallel.tensor_parallel_size,
        "pipeline": parallel.pipeline_parallel_size,
        "decode context": getattr(parallel, "decode_context_parallel_size", 1),
    }
    over = [f"{name} parallel size {size}" for name, size in sizes.items() if size != 1]
    if over:
        raise UnsupportedError(f"{', '.join(over)}: c2c was tested with one worker. Run several engines instead.")
