"""Training a fuser between two frozen models, from prefills that are computed once.

``train`` is imported on first use, so that reading a configuration does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from c2c.training.config import TrainConfig, load_config

if TYPE_CHECKING:
    from c2c.training.run import train

__all__ = ["TrainConfig", "load_config", "train"]


def __getattr__(name: str) -> Any:
    """Import ``train`` on first use."""
    if name != "train":
        raise AttributeError(f"module 'c2c.training' has no attribute {name!r}")
    from c2c.training.run import train

    return train
