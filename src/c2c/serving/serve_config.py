"""Options of ``c2c serve``. Imports neither torch nor a web framework, so that ``--help`` stays fast."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from c2c.serving.http_config import HTTPConfig

EngineName = Literal["transformers", "vllm"]
OnFailure = Literal["raise", "receiver_only"]


@dataclass(frozen=True, kw_only=True)
class ServeConfig(HTTPConfig):
    """Options of ``c2c serve``: the models, the engine, and its limits."""

    receiver: str | None = field(
        default=None, metadata={"help": "Alias, hub id, folder or GGUF; by default the fuser's."}
    )
    sharer: str | None = field(
        default=None, metadata={"help": "Alias, hub id, folder, GGUF, or URL of c2c share; by default the fuser's."}
    )
    on_failure: OnFailure | None = field(
        default=None,
        metadata={
            "help": "When the sharer at a URL is lost, or vLLM does not take a fused cache: an error, or the receiver "
            "alone; raise by default."
        },
    )
    sharer_timeout: float | None = field(
        default=None, metadata={"help": "Seconds for a request to the sharer at a URL; 60 by default.", "min": 0.1}
    )
    sharer_precision: str | None = field(
        default=None, metadata={"help": "In which its entries are sent, such as int8; the model's own by default."}
    )
    sharer_ca: Path | None = field(
        default=None, metadata={"help": "Certificates to trust for it; those of the system by default."}
    )
    engine: EngineName = field(
        default="transformers",
        metadata={"help": "What runs the receiver; vllm needs an environment of its own, see the docs."},
    )
    sharer_engine: EngineName = field(
        default="transformers", metadata={"help": "The same for the sharer; vllm only beside --engine vllm."}
    )
    engine_option: list[str] | None = field(
        default=None,
        metadata={
            "help": "An argument of vLLM, such as max_model_len=4096; may be repeated.",
            "metavar": "NAME=VALUE",
        },
    )
    name: str | None = field(
        default=None, metadata={"help": "What clients call the model; by default the fuser's folder, else 'c2c'."}
    )
    systems: list[str] | None = field(
        default=None,
        metadata={
            "help": "A system that answers, such as summary_64; may be repeated. Default: c2c, receiver, sharer, text.",
            "flag": "--system",
        },
    )
    max_queue: int = field(default=64, metadata={"help": "Requests that may wait; more get 429.", "min": 1})
    max_batch: int = field(default=16, metadata={"help": "Answers that are decoded at once.", "min": 1})
    kv_tokens: int = field(
        default=65_536,
        metadata={
            "help": "KV-cache entries of a batch at most: answers times the longest prompt with its new tokens.",
            "min": 1,
        },
    )
    batch_window_ms: float = field(
        default=10.0, metadata={"help": "Milliseconds that a request waits for others to run with it.", "min": 0}
    )
    max_tokens: int = field(
        default=256, metadata={"help": "New tokens for requests that do not say how many.", "min": 1}
    )
    message_tokens: int = field(
        default=128, metadata={"help": "Tokens of the sharer's text, in text-to-text.", "min": 1}
    )
    handoffs: int = field(default=64, metadata={"help": "Handoffs kept at a time.", "min": 0})
    handoff_mb: float = field(default=1000.0, metadata={"help": "Megabytes of all handoffs together.", "min": 0})
    handoff_seconds: float = field(default=3600.0, metadata={"help": "How long a handoff is kept.", "min": 1})
    dtype: str | None = field(default=None, metadata={"help": "float32, bfloat16, float16 or auto."})
    sharer_dtype: str | None = field(default=None, metadata={"help": "The same for the sharer; --dtype by default."})
    device: str | None = field(default=None, metadata={"help": "Device map: cpu, cuda, auto."})
    allow_mismatch: bool = field(default=False, metadata={"help": "Accept models with other weights than the fuser's."})

    default_systems = ("c2c", "receiver", "sharer", "text")  # as far as the models have them

    @property
    def max_handoff_bytes(self) -> int:
        """Bytes of all handoffs together."""
        return int(self.handoff_mb * 1e6)
