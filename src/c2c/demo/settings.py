"""What the demo is started with."""

from __future__ import annotations

from dataclasses import dataclass

SYSTEM = "You are a helpful assistant."  # what the fusers of the zoo were trained with


@dataclass(frozen=True)
class Settings:
    """Options of ``c2c demo``.

    Attributes:
        fusers: folders or hub ids beside those of the zoo; the first one is shown first.
        host: address to listen at.
        port: port; 0 takes a free one.
        open_browser: whether to open the page.
        max_new_tokens: at most this many tokens per answer, where the page starts.
        message_tokens: at most this many for the message of text-to-text.
        dtype: type of the models' weights.
        device: where the models go.
        allow_mismatch: accept models with other weights than a fuser's.
    """

    fusers: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: int = 7860
    open_browser: bool = False
    max_new_tokens: int = 16
    message_tokens: int = 64
    dtype: str | None = None
    device: str | None = None
    allow_mismatch: bool = False
