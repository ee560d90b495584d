"""Errors of the vLLM integration."""

from __future__ import annotations

from c2c.integrations import IntegrationError, MissingExtraError
from c2c.serving.errors import ApiError, internal


class MissingVLLMError(MissingExtraError):
    """vLLM is not installed, or in a version that this package was not tested with."""


class UnsupportedError(IntegrationError, ValueError):
    """A model, cache or parameter that this integration was not made for."""


class SnapshotError(IntegrationError, ValueError):
    """A snapshot that is missing, damaged, too large, or not of these tokens."""


class LoadError(IntegrationError, RuntimeError):
    """A fused cache that vLLM did not load."""


class EngineError(IntegrationError, RuntimeError):
    """A vLLM engine that did not start, or has died."""


def as_api_error(error: BaseException) -> ApiError:
    """Convert an error of this integration, which is never the fault of the client."""
    match error:
        case ApiError():
            return error
        case LoadError():
            return ApiError(500, f"the fused cache was not used, so there is no answer: {error}", code="load_failed")
        case SnapshotError():
            return ApiError(503, f"a cache could not be handed to vLLM or back: {error}", code="snapshot_lost")
    return internal()
