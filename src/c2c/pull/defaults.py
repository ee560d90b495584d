"""The pair that commands use when none is named."""

DEFAULT_RECEIVER = "smollm2-135m"
DEFAULT_SHARER = "qwen2.5-coder-0.5b"
