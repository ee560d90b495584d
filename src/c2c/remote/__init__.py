"""Sharers on other machines: ``c2c share`` serves a model's prefills, ``RemoteSharer`` takes the place of a local one.

Names load on first use, so that a model with local sharers needs no HTTP client.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from c2c.errors import C2CError, RemoteError, SharerLost
from c2c.utils import install_command

if TYPE_CHECKING:
    from c2c.remote.client import RemoteSharer

__all__ = ["RemoteError", "RemoteSharer", "SharerLost"]


def __getattr__(name: str) -> Any:
    """Import the client on first use."""
    if name != "RemoteSharer":
        raise AttributeError(f"module 'c2c.remote' has no attribute {name!r}")
    if find_spec("tenacity") is None:
        raise C2CError(f"a sharer on another machine needs tenacity: {install_command('remote')}.")
    from c2c.remote.client import RemoteSharer

    return RemoteSharer
