"""Evaluation that can say no: a fuser beside each model alone and beside the wrong message, on the same items."""

from c2c.evaluation.config import EvalConfig, load_eval_config
from c2c.evaluation.run import evaluate

__all__ = ["EvalConfig", "evaluate", "load_eval_config"]
