"""The HTTP side of ``RemoteSharer``: one call with its time limit and retries, and its failures as errors."""

from __future__ import annotations

import json
import secrets
import ssl
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Never, TypeVar

import httpx
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_attempt, stop_before_delay
from tenacity.wait import wait_random_exponential

from c2c.errors import C2CError, RemoteError, SharerChanged
from c2c.identity import ModelIdentity, differences
from c2c.remote.protocol import CutOffError, WireError
from c2c.version import __version__

T = TypeVar("T")
Read = Callable[[Iterator[bytes]], T]  # reads the bytes of an answer; called again from the start for another attempt
_CONNECT_SECONDS = 10.0
_LONGEST_ERROR = 1 << 16
_RETRIED = frozenset({429, 502, 503, 504})
_backoff = wait_random_exponential(multiplier=0.25, max=8.0)


class TransientError(Exception):
    """A failure after which another attempt may succeed: with an HTTP status, and seconds that the server wants."""

    def __init__(self, message: str, status: int | None = None, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.status, self.retry_after = status, retry_after


@dataclass
class Traffic:
    """Count what crosses a connection: attempts, those that followed a failure, bytes of requests and of answers."""

    requests: int = 0
    retries: int = 0
    sent: int = 0
    received: int = 0


class Loss(NamedTuple):
    """Record why a sharer did not answer: one word, the whole message, HTTP status if any, seconds since 1970."""

    code: str
    message: str
    status: int | None
    since: float


class Connection:
    """Call one server, ``retries`` times again, with ``timeout`` seconds for all attempts of a call together.

    Attributes:
        lost: why the last call failed; None if it did not, or if only the request was at fault.
    """

    def __init__(self, url: str, token: str | None, verify: Any, timeout: float, retries: int) -> None:
        self.url, self.timeout, self.traffic = url.rstrip("/"), timeout, Traffic()
        self.lost: Loss | None = None
        self._retries = retries
        headers = {"User-Agent": f"cache2cache/{__version__}", "Content-Type": "application/json"}
        headers |= {"Authorization": f"Bearer {token}"} if token else {}
        self._client = httpx.Client(headers=headers, verify=verify, follow_redirects=False)

    def close(self) -> None:
        """Close the sockets."""
        self._client.close()

    def call(self, path: str, read: Read[T], body: bytes | None = None, model: ModelIdentity | None = None) -> T:
        """Send a request and read the answer.

        Args:
            path: such as ``/v1/prefill``.
            read: reads an answer whose status is 200.
            body: JSON to post; a GET without it.
            model: the one that the request is for.

        Raises:
            RemoteError: refused, lost, too slow or damaged. SharerChanged: another model is served.
        """
        method, headers = (
            "POST" if body else "GET",
            {"X-Request-Id": secrets.token_hex(16)},
        )  # the same for all attempts
        request = self._client.build_request(method, self.url + path, content=body, headers=headers)
        retrying = Retrying(
            stop=stop_after_attempt(self._retries + 1) | stop_before_delay(self.timeout),
            wait=_pause,
            retry=retry_if_exception_type(TransientError),
            reraise=True,
        )
        try:
            result: T = retrying(self._attempt, request, read, time.monotonic() + self.timeout, model)
        except C2CError as error:
            self._record(error)
            raise
        except (TransientError, WireError, httpx.TimeoutException, TimeoutError) as error:
            lost = self._explain(error, int(retrying.statistics["attempt_number"]))
            self._record(lost)
            raise lost from error
        finally:
            self.traffic.retries += int(retrying.statistics["attempt_number"]) - 1
        self.lost = None
        return result

    def _record(self, error: C2CError) -> None:
        if not isinstance(error, RemoteError):
            self.lost = Loss("mismatch", str(error), None, time.time())
        else:
            self.lost = None if error.about_request else Loss(error.code, str(error), error.status, time.time())

    def _explain(self, error: Exception, attempts: int) -> RemoteError:
        if isinstance(error, WireError):
            return RemoteError(f"the answer of the sharer at {self.url} was refused: {error}", error.code)
        if not isinstance(error, TransientError):
            advice = "Pass a larger timeout=..., or ask for fewer bytes: precision='int8'."
            return RemoteError(
                f"the sharer at {self.url} took longer than {self.timeout:g} seconds. {advice}", "timeout"
            )
        code, advice = {
            429: ("rate", "Wait, or start it with a larger --rate."),
            None: ("unreachable", "Is `c2c share` running there, and is the address right?"),
        }.get(error.status, ("busy", "Try again later."))
        count = f"{attempts} attempt{'s' if attempts > 1 else ''}"
        message = f"the sharer at {self.url} gave no answer in {count}: {str(error).rstrip('.')}. {advice}"
        return RemoteError(message, code, error.status)

    def _attempt(self, request: httpx.Request, read: Read[T], deadline: float, model: ModelIdentity | None) -> T:
        left = max(0.001, deadline - time.monotonic())
        request.extensions["timeout"] = httpx.Timeout(left, connect=min(left, _CONNECT_SECONDS)).as_dict()
        self.traffic.requests += 1
        self.traffic.sent += len(request.content)
        try:
            response = self._client.send(request, stream=True)
            try:
                pieces = _until(deadline, response.iter_bytes())
                return read(pieces) if response.status_code == 200 else self._refuse(response, pieces, model)
            finally:
                self.traffic.received += response.num_bytes_downloaded
                response.close()
        except (httpx.ReadTimeout, httpx.WriteTimeout, httpx.PoolTimeout):
            raise
        except (httpx.TransportError, httpx.DecodingError, CutOffError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            if "CERTIFICATE_VERIFY" not in reason:
                raise TransientError(reason) from error
            advice = "Pass verify=... (c2c serve: --sharer-ca) with the file of its certificate authority."
            message = f"the certificate of {self.url} is not trusted: {reason}. {advice}"
            raise RemoteError(message, "certificate") from error

    def _refuse(self, response: httpx.Response, pieces: Iterator[bytes], model: ModelIdentity | None) -> Never:
        status = response.status_code
        try:
            error = dict(json.loads(read_all(pieces, _LONGEST_ERROR))["error"])
        except (ValueError, KeyError, TypeError):
            error = {}
        code, message = str(error.get("code") or "status"), str(error.get("message") or response.reason_phrase)
        if status in _RETRIED:
            after = response.headers.get("retry-after", "")
            raise TransientError(f"it answered {status}: {message}", status, float(after) if after.isdigit() else 0.0)
        if code == "mismatch" and model is not None:
            check_unchanged(model, error.get("sharer"), self.url)
        if status == 401:
            message += " Pass token=... to RemoteSharer, or set C2C_TOKEN."
        raise RemoteError(f"the sharer at {self.url} answered {status}: {message}", code, status)


def read_all(pieces: Iterable[bytes], largest: int) -> bytes:
    """Join pieces; raise WireError where they are longer than ``largest`` bytes."""
    held = bytearray()
    for piece in pieces:
        held += piece
        if len(held) > largest:
            raise WireError(f"the answer is longer than {largest} bytes.")
    return bytes(held)


def _until(deadline: float, pieces: Iterable[bytes]) -> Iterator[bytes]:
    for piece in pieces:
        if time.monotonic() > deadline:
            raise TimeoutError
        yield piece


def check_unchanged(expected: ModelIdentity, given: Any, url: str) -> None:
    """Compare the model that a server names with the one that it named in the handshake.

    Raises:
        SharerChanged: they differ. WireError: no identity was given.
    """
    try:
        hard, soft = differences("sharer", expected, ModelIdentity.from_dict(given), "connection")
    except (TypeError, AttributeError) as error:
        raise WireError("the identity of the model is missing.") from error
    if hard or soft:
        advice = f"Another model is served at {url} now: connect again, and use a fuser that was made for it."
        raise SharerChanged(hard + soft, advice, "connection")


def ssl_context(verify: Any, client_cert: str | Path | None) -> Any:
    """Return what httpx verifies with: certificates to trust from a file, and a client certificate with its key.

    Raises:
        RemoteError: a file that can't be used.
    """
    trusted = str(verify) if isinstance(verify, str | Path) else None
    if trusted is None and client_cert is None:
        return verify
    try:
        context = verify if isinstance(verify, ssl.SSLContext) else ssl.create_default_context(cafile=trusted)
        if verify is False:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        if client_cert is not None:
            context.load_cert_chain(str(client_cert))
    except OSError as error:
        message = f"verify={trusted!r} or client_cert={str(client_cert)!r} holds no certificates: {error}. Pass files "
        advice = "in PEM form: verify=... (c2c serve: --sharer-ca) with those to trust, client_cert=... with your own."
        raise RemoteError(message + advice, "certificate") from error
    return context


def _pause(state: RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome is not None else None
    return max(_backoff(state), error.retry_after if isinstance(error, TransientError) else 0.0)
