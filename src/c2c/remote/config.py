"""Options of ``c2c share``."""

# ruff: noqa: RUF009 - option() returns a dataclass field

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from c2c.config import option
from c2c.serving.config import HTTPConfig
from c2c.serving.errors import ServerError

Finest = Literal["float32", "bfloat16", "int8", "float8"]


@dataclass(frozen=True, kw_only=True)
class ShareConfig(HTTPConfig):
    """Configure ``c2c share``; the model is an argument."""

    port: int = option(8650, "Port; 0 for a free one.", min=0, max=65535)
    api_key: list[str] | None = option(
        None, "Bearer token that clients must send; may be repeated. Better: C2C_TOKEN.", flag="--token", repr=False
    )
    key_file: Path | None = option(
        None, "File with such tokens, one a line; the same file on both sides will do.", envvar="C2C_KEY_FILE"
    )
    timeout: float = option(120.0, "Seconds for a request, transfer included.", min=0.1)
    max_body_kb: int = option(1024, "Longest request.", min=1)
    max_tokens: int = option(8192, "Most tokens of a request, padding and drafts included.", min=1)
    rate: int = option(60, "Requests per minute and token (or address); 0 for no limit.", min=0)
    waiting: int = option(8, "Most requests under way; more get 503.", min=1)
    precision: Finest = option("float32", "The finest that is sent.")
    layers: str | None = option(None, "Layers that may be sent, such as 0-11,20; all by default.")
    fuser: list[str] | None = option(None, "Fuser of private context to project with; may be repeated.")
    dtype: str | None = option(None, "float32, bfloat16, float16 or auto.")
    device: str | None = option(None, "Device map: cpu, cuda, auto.")
    connections: int | None = option(100, "", cli=False)

    key_variable = "C2C_TOKEN"

    @property
    def max_body(self) -> int:
        """Bytes of a request at most."""
        return self.max_body_kb << 10

    def __post_init__(self) -> None:
        """Check the options; raise ServerError, or ConfigError for a value out of its range."""
        super().__post_init__()
        self.layer_list()
        if self.device == "meta":
            raise ServerError("--device is 'meta', which holds no weights; expected such as cpu, cuda or auto.")

    def layer_list(self) -> list[int] | None:
        """Read ``0-3,7`` as 0, 1, 2, 3, 7; None for all layers.

        Raises:
            ServerError: it has another form.
        """
        if self.layers is None:
            return None
        parts = [re.fullmatch(r"\s*([0-9]{1,4})(?:-([0-9]{1,4}))?\s*", part) for part in self.layers.split(",")]
        ranges = [range(int(found[1]), int(found[2] or found[1]) + 1) for found in parts if found]
        if None in parts or not all(ranges):
            raise ServerError(f"--layers {self.layers!r:.80} can't be read; expected such as 0-11,20.")
        return sorted({layer for one in ranges for layer in one})
