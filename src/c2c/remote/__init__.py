"""Sharers on other machines: ``c2c share`` serves a model's prefills, ``RemoteSharer`` takes the place of a local one.

Names load on first use, so that a model with local sharers needs no HTTP client.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from c2c.errors import RemoteError, SharerLost

if TYPE_CHECKING:
    from c2c.remote.client import RemoteSharer

__all__ = ["RemoteError", "RemoteSharer", "SharerLost"]


def __getattr__(name: str) -> Any:
    """Import the client on first use."""
    if name != "RemoteSharer":
        raise AttributeError(f"module 'c2c.remote' has no attribute {name!r}")
    from c2c.remote.client import RemoteSharer

    return RemoteSharer
