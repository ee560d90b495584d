"""What a server allows."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Settings:
    """Limits and keys of a server.

    Attributes:
        name: what clients call the model.
        api_keys: who may ask; none lets everybody.
        timeout: seconds that a request may take, waiting included.
        max_body: bytes of a request.
        max_batch: answers that one request may ask for.
        max_handoffs: handoffs kept at a time.
        max_handoff_bytes: bytes of all of them together.
        handoff_seconds: how long one is kept at most.
    """

    name: str
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    timeout: float = 300.0
    max_body: int = 4_000_000
    max_batch: int = 16
    max_handoffs: int = 64
    max_handoff_bytes: int = 1_000_000_000
    handoff_seconds: float = 3600.0
