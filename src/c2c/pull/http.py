"""HTTP as ``c2c pull`` needs it: certificates as pip finds them, retries, and errors in one line."""

from __future__ import annotations

import os
import ssl
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import httpx

from c2c.errors import ModelLoadError
from c2c.version import __version__

T = TypeVar("T")

RETRY_DELAYS: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)  # seconds; one more failure in a row gives up
TIMEOUT = httpx.Timeout(60.0, connect=15.0)

_TRANSIENT_STATUS = {408, 425, 429}
_ADVICE = (
    "Run the same command again to retry (a download resumes where it stopped), "
    "or set C2C_PYPI_INDEX to the URL of a mirror of the Python package index."
)


class TransientError(Exception):
    """A failure that may not happen again: the server was busy, or an answer was damaged."""


def open_client(timeout: httpx.Timeout | float = TIMEOUT) -> httpx.Client:
    """A client that follows redirects, and knows the proxies and certificates of the environment.

    Raises:
        ModelLoadError: a certificate file named in the environment can't be read.
    """
    try:
        return httpx.Client(
            timeout=timeout,
            follow_redirects=True,
            verify=_verify(),
            headers={"User-Agent": f"cache2cache/{__version__}"},
        )
    except (OSError, ssl.SSLError) as error:
        raise ModelLoadError(
            f"could not read the certificates that SSL_CERT_FILE or PIP_CERT names: {_reason(error)}"
        ) from error


def _verify() -> ssl.SSLContext | bool:
    """httpx reads SSL_CERT_FILE itself; PIP_CERT is what a machine behind a proxy often has instead."""
    pip_cert = os.environ.get("PIP_CERT")
    if not pip_cert or os.environ.get("SSL_CERT_FILE"):
        return True
    if Path(pip_cert).is_dir():
        return ssl.create_default_context(capath=pip_cert)
    return ssl.create_default_context(cafile=pip_cert)


def check_status(response: httpx.Response) -> None:
    """Sort out failures.

    Raises:
        TransientError: worth another try.
        ModelLoadError: not found, forbidden and the like.
    """
    if response.status_code in _TRANSIENT_STATUS or response.status_code >= 500:
        raise TransientError(f"the server answered {response.status_code} {response.reason_phrase}")
    if response.status_code >= 400:
        raise _unreachable(str(response.url), f"the server answered {response.status_code} {response.reason_phrase}")


def with_retries(url: str, attempt: Callable[[], T], reached: Callable[[], int] = lambda: 0) -> T:
    """Call ``attempt`` until it succeeds, with growing pauses.

    Args:
        url: for the message.
        attempt: what to do.
        reached: how far the work has come; failures only add up while this does not grow, so that a poor line
            still finishes a large file.

    Raises:
        ModelLoadError: too many failures in a row, or one that no retry can mend.
    """
    failures, best = 0, reached()
    while True:
        try:
            return attempt()
        except (httpx.UnsupportedProtocol, httpx.InvalidURL, httpx.TooManyRedirects) as error:
            raise _unreachable(url, _reason(error)) from error
        except (httpx.RequestError, TransientError) as error:
            failures = 0 if reached() > best else failures
            best = max(best, reached())
            if failures >= len(RETRY_DELAYS) or _is_certificate_error(error):
                raise _unreachable(url, _reason(error)) from error
            time.sleep(RETRY_DELAYS[failures])
            failures += 1


def hide_password(url: str) -> str:
    """The URL without the user name and password that a private index may carry."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        return url
    return str(parsed.copy_with(username=None, password=None)) if parsed.userinfo else url


def _unreachable(url: str, reason: str) -> ModelLoadError:
    trust = "Set SSL_CERT_FILE to the certificates to trust. " if "CERTIFICATE_VERIFY" in reason else ""
    return ModelLoadError(f"could not fetch {hide_password(url)}: {reason.rstrip('.')}. {trust}{_ADVICE}")


def _is_certificate_error(error: Exception) -> bool:
    return "CERTIFICATE_VERIFY" in str(error)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
