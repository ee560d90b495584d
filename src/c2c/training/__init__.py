"""Training a fuser between two frozen models, from prefills that are computed once."""

from c2c.training.config import TrainConfig, load_config
from c2c.training.run import train

__all__ = ["TrainConfig", "load_config", "train"]
