"""Options of ``c2c share``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from c2c.serving.errors import ServerError
from c2c.serving.http_config import HTTPConfig

Finest = Literal["float32", "bfloat16", "int8", "float8"]


@dataclass(frozen=True, kw_only=True)
class ShareConfig(HTTPConfig):
    """Configure ``c2c share``; the model is an argument."""

    port: int = field(default=8650, metadata={"help": "Port; 0 for a free one.", "min": 0, "max": 65535})
    api_key: list[str] | None = field(
        default=None,
        repr=False,
        metadata={
            "flag": "--token",
            "help": "Bearer token that clients must send; may be repeated. Better: C2C_TOKEN.",
        },
    )
    key_file: Path | None = field(
        default=None,
        metadata={
            "envvar": "C2C_KEY_FILE",
            "help": "File with such tokens, one a line; the same file on both sides will do.",
        },
    )
    timeout: float = field(default=120.0, metadata={"help": "Seconds for a request, transfer included.", "min": 0.1})
    max_body_kb: int = field(default=1024, metadata={"help": "Longest request.", "min": 1})
    max_tokens: int = field(
        default=8192, metadata={"help": "Most tokens of a request, padding and drafts included.", "min": 1}
    )
    rate: int = field(
        default=60, metadata={"help": "Requests per minute and token (or address); 0 for no limit.", "min": 0}
    )
    waiting: int = field(default=8, metadata={"help": "Most requests under way; more get 503.", "min": 1})
    precision: Finest = field(default="float32", metadata={"help": "The finest that is sent."})
    layers: str | None = field(
        default=None, metadata={"help": "Layers that may be sent, such as 0-11,20; all by default."}
    )
    fuser: list[str] | None = field(
        default=None, metadata={"help": "Fuser of private context to project with; may be repeated."}
    )
    dtype: str | None = field(default=None, metadata={"help": "float32, bfloat16, float16 or auto."})
    device: str | None = field(default=None, metadata={"help": "Device map: cpu, cuda, auto."})
    connections: int | None = field(default=100, metadata={"cli": False})

    key_variable = "C2C_TOKEN"

    @property
    def max_body(self) -> int:
        """Bytes of a request at most."""
        return self.max_body_kb << 10

    def layer_list(self) -> list[int] | None:
        """Read ``0-3,7`` as 0, 1, 2, 3, 7; None for all layers.

        Raises:
            ServerError: it has another form.
        """
        if self.layers is None:
            return None
        found: set[int] = set()
        for part in self.layers.split(","):
            first, dash, last = part.strip().partition("-")
            if not first.isdigit() or (dash and not last.isdigit()):
                raise ServerError(f"--layers {self.layers!r} can't be read; expected such as 0-11,20.")
            found.update(range(int(first), int(last if dash else first) + 1))
        return sorted(found)
