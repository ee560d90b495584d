"""What can go wrong between c2c and vLLM."""

from __future__ import annotations

from c2c.integrations import IntegrationError, MissingExtraError
from c2c.serving.errors import ApiError, internal


class MissingVLLMError(MissingExtraError):
    """vLLM is not installed, or in a version that this package was not tested with."""


class UnsupportedError(IntegrationError, ValueError):
    """A model, cache or setting that this integration was not made for."""


class SnapshotError(IntegrationError, ValueError):
    """A snapshot that is missing, damaged, too large, or not of these tokens."""


class LoadError(IntegrationError, RuntimeError):
    """vLLM did not take a fused cache."""


class EngineError(IntegrationError, RuntimeError):
    """The vLLM engine did not start, or has died."""


def as_api_error(error: Exception) -> ApiError:
    """What a client is told. None of these is its own fault, though all are of the library's errors."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, LoadError):
        return ApiError(500, f"the fused cache was not used, so there is no answer: {error}", code="load_failed")
    if isinstance(error, SnapshotError):
        return ApiError(503, f"a cache could not be handed to vLLM or back: {error}", code="snapshot_lost")
    return internal()
