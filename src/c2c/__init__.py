"""Language models that talk to each other through their KV caches.

A Sharer reads a prompt; its KV cache is copied or projected by a trained Fuser into the cache of a Receiver, which
answers. ``connect`` finds the best method that two models have; ``C2CModel`` is one pair with its fuser.

Names load on first use, so that ``import c2c`` (and ``c2c --help``) does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from c2c.version import __version__

if TYPE_CHECKING:
    from c2c.connection import Connection, connect
    from c2c.errors import C2CError
    from c2c.fusers import Fuser
    from c2c.generation import Chat, FusionReport, GenerationResult
    from c2c.handoff import Handoff
    from c2c.language_model import Receiver
    from c2c.model import C2CModel
    from c2c.prompting import RenderOptions
    from c2c.sharer import Sharer

_HOMES = {
    "C2CError": "c2c.errors",
    "C2CModel": "c2c.model",
    "Chat": "c2c.generation",
    "Connection": "c2c.connection",
    "Fuser": "c2c.fusers",
    "FusionReport": "c2c.generation",
    "GenerationResult": "c2c.generation",
    "Handoff": "c2c.handoff",
    "Receiver": "c2c.language_model",
    "RenderOptions": "c2c.prompting",
    "Sharer": "c2c.sharer",
    "connect": "c2c.connection",  # a module of that name would hide the function
}

__all__ = [
    "C2CError",
    "C2CModel",
    "Chat",
    "Connection",
    "Fuser",
    "FusionReport",
    "GenerationResult",
    "Handoff",
    "Receiver",
    "RenderOptions",
    "Sharer",
    "__version__",
    "connect",
]


def __getattr__(name: str) -> Any:
    """Import the module that holds ``name`` on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'c2c' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """The public names, loaded or not."""
    return sorted(__all__)
