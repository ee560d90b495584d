"""Evaluation: a fuser beside each model alone, text-to-text and wrong messages, on the same items.

``evaluate`` is imported on first use, so that reading a configuration does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from c2c.evaluation.config import EvalConfig, load_eval_config

if TYPE_CHECKING:
    from c2c.evaluation.run import evaluate

__all__ = ["EvalConfig", "evaluate", "load_eval_config"]


def __getattr__(name: str) -> Any:
    """Import ``evaluate`` on first use."""
    if name != "evaluate":
        raise AttributeError(f"module 'c2c.evaluation' has no attribute {name!r}")
    from c2c.evaluation.run import evaluate

    return evaluate
