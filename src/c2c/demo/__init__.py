"""``c2c demo``: one prompt, answered by four systems, side by side in a browser.

Needs the extra ``demo``. Nothing here imports torch before the page is up: models are loaded in the background.
"""

# ruff: noqa: RUF009 - option() returns a dataclass field

from __future__ import annotations

from dataclasses import dataclass

from c2c.config import option


@dataclass(frozen=True)
class DemoConfig:
    """Options of ``c2c demo``."""

    fuser: list[str] | None = option(None, "Folder or hub id of a fuser; may be repeated. The first is shown first.")
    model: list[str] | None = option(
        None, "Alias, hub id or folder of one model on both sides, which needs no fuser; may be repeated."
    )
    host: str = option("127.0.0.1", "Address to listen at; 0.0.0.0 for all.")
    port: int = option(7860, "Port to listen at; 0 takes a free one.", min=0, max=65535)
    open_browser: bool = option(False, "Open the page in a browser.", flag="--open")
    max_new_tokens: int = option(16, "At most this many tokens per answer, at first.", min=1)
    message_tokens: int = option(64, "At most this many for the text that is passed.", min=1)
    dtype: str | None = option(None, "float32, bfloat16, float16 or auto.")
    device: str | None = option(None, "Device map: cpu, cuda, auto.")
    allow_mismatch: bool = option(False, "Accept models with other weights than the fuser's.")
