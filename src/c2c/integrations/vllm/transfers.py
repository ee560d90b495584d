"""Transfers of KV entries: what a request asks of the connector, and what its scheduler half plans for a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from c2c.integrations.vllm.errors import SnapshotError
from c2c.integrations.vllm.store import check_name

FIELD = "c2c"  # ours, in the parameters that vLLM hands through to connectors
_KEYS = {"load", "save", "receipt"}


@dataclass(frozen=True)
class TransferParams:
    """Parameters of one request for the connector.

    Attributes:
        load: snapshot from which it begins.
        save: snapshot that its prompt's entries become.
        receipt: file that the worker writes when the load is done.
    """

    load: str | None = None
    save: str | None = None
    receipt: str | None = None

    def to_params(self) -> dict[str, Any]:
        """Return them as ``kv_transfer_params`` of a request."""
        return {FIELD: {key: value for key, value in vars(self).items() if value is not None}}

    @classmethod
    def from_params(cls, params: Any) -> TransferParams:
        """Read ``kv_transfer_params``, which a client may have written. Empty where they are not for us.

        Raises:
            SnapshotError: something else than names.
        """
        given = params.get(FIELD) if isinstance(params, dict) else None
        if given is None:
            return cls()
        if not isinstance(given, dict) or not set(given) <= _KEYS:
            raise SnapshotError(f"kv_transfer_params.{FIELD} takes {', '.join(sorted(_KEYS))} and nothing else.")
        return cls(**{key: check_name(value) for key, value in given.items()})


@dataclass(frozen=True)
class Span:
    """A range of a prompt's tokens in the paged cache.

    Attributes:
        blocks: block table of the request.
        start: first position.
        stop: position after the last.
    """

    blocks: Sequence[int]
    start: int
    stop: int

    def slots(self, block_size: int) -> list[int]:
        """Return the slots of these positions."""
        return [self.blocks[at // block_size] * block_size + at % block_size for at in range(self.start, self.stop)]

    def block_ids(self, block_size: int) -> set[int]:
        """Return the blocks that hold these positions."""
        return {self.blocks[at // block_size] for at in range(self.start, self.stop)}


@dataclass(frozen=True)
class Load:
    """Copy entries of a snapshot into the cache.

    Attributes:
        name: of the snapshot.
        ids: the prompt.
        span: where.
        receipt: file to write when it is done.
        refusal: why it must not be done; the request then fails as a damaged snapshot makes it fail.
    """

    name: str
    ids: Sequence[int]
    span: Span
    receipt: str | None = None
    refusal: str | None = None


@dataclass(frozen=True)
class Save:
    """Copy entries of the cache into a snapshot.

    Attributes:
        name: of the snapshot.
        ids: the tokens.
        span: where they are.
    """

    name: str
    ids: Sequence[int]
    span: Span


@dataclass
class StepTransfers:
    """All transfers of one step."""

    loads: list[Load] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)
