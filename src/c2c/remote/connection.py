"""The HTTP side of ``RemoteSharer``: one call with its time limit and retries, and what becomes of it as an error."""

from __future__ import annotations

import json
import secrets
import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Never, TypeVar

import httpx
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_attempt, stop_before_delay
from tenacity.wait import wait_random_exponential

from c2c.errors import RemoteError, SharerChanged
from c2c.identity import ModelIdentity, differences
from c2c.remote.wire import CutOffError, WireError
from c2c.version import __version__

T = TypeVar("T")
_CONNECT_SECONDS = 10.0
_LONGEST_ERROR = 1 << 16
_RETRIED = frozenset({429, 502, 503, 504})
_backoff = wait_random_exponential(multiplier=0.25, max=8.0)


class TransientError(Exception):
    """A failure after which another attempt may succeed.

    Attributes:
        status: the HTTP status, None where the connection failed.
        retry_after: seconds that the server asks to wait.
    """

    def __init__(self, message: str, status: int | None = None, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.status, self.retry_after = status, retry_after


@dataclass
class Traffic:
    """Counters of a connection.

    Attributes:
        requests: attempts.
        retries: those of them that followed a failure.
        sent: bytes of request bodies.
        received: bytes of answers.
    """

    requests: int = 0
    retries: int = 0
    sent: int = 0
    received: int = 0


@dataclass(frozen=True)
class Loss:
    """Why a sharer did not answer.

    Attributes:
        code: the reason in one word; ``mismatch`` where another model is served.
        message: the reason in full.
        status: the HTTP status, None where there was no answer.
        since: seconds since 1970.
    """

    code: str
    message: str
    status: int | None
    since: float


class Connection:
    """Calls one server.

    Args:
        url: ``http://host:port`` or ``https://host:port``.
        token: bearer key.
        verify: as in httpx: True, False, or an ``ssl.SSLContext``.
        timeout: seconds for one call, all attempts included.
        retries: attempts after the first.

    Attributes:
        lost: why the last call failed; None if it did not, or if only the request was at fault.
    """

    def __init__(self, url: str, token: str | None, verify: Any, timeout: float, retries: int) -> None:
        self.url, self.timeout, self.traffic = url.rstrip("/"), timeout, Traffic()
        self.lost: Loss | None = None
        self._retries = retries
        headers = {"User-Agent": f"cache2cache/{__version__}"} | ({"Authorization": f"Bearer {token}"} if token else {})
        self._client = httpx.Client(headers=headers, verify=verify, follow_redirects=False)

    def close(self) -> None:
        """Close the sockets."""
        self._client.close()

    def call(
        self,
        path: str,
        read: Callable[[Iterator[bytes]], T],
        content: bytes | None = None,
        expected: ModelIdentity | None = None,
    ) -> T:
        """Send a request and read the answer.

        Args:
            path: such as ``/v1/prefill``.
            read: reads the bytes of an answer; called again from the start for another attempt.
            content: JSON to post; a GET without it.
            expected: the model that the request is for.

        Raises:
            RemoteError: refused, lost, too slow or damaged. SharerChanged: another model is served.
        """
        try:
            result: T = self._retried(path, read, content, expected)
        except RemoteError as error:
            self.lost = None if error.about_request else Loss(error.code, str(error), error.status, time.time())
            raise
        except SharerChanged as error:
            self.lost = Loss("mismatch", str(error), None, time.time())
            raise
        self.lost = None
        return result

    def _retried(self, path: str, read: Any, content: bytes | None, expected: ModelIdentity | None) -> Any:
        deadline, attempts = time.monotonic() + self.timeout, 0
        headers = {"X-Request-Id": secrets.token_hex(16), "Content-Type": "application/json"}
        request = self._client.build_request("GET" if content is None else "POST", self.url + path, content=content)
        request.headers.update(headers)

        def attempt() -> Any:
            nonlocal attempts
            attempts += 1
            self.traffic.requests += 1
            self.traffic.retries += attempts > 1
            self.traffic.sent += len(content or b"")
            return self._attempt(request, read, deadline, expected)

        retrying = Retrying(
            stop=stop_after_attempt(self._retries + 1) | stop_before_delay(self.timeout),
            wait=_pause,
            retry=retry_if_exception_type(TransientError),
            reraise=True,
        )
        try:
            return retrying(attempt)
        except TransientError as error:
            self._give_up(error, attempts)
        except WireError as error:
            raise RemoteError(f"the answer of the sharer at {self.url} was refused: {error}", error.code) from error

    def _attempt(self, request: httpx.Request, read: Any, deadline: float, expected: ModelIdentity | None) -> Any:
        left = max(0.001, deadline - time.monotonic())
        request.extensions["timeout"] = httpx.Timeout(left, connect=min(left, _CONNECT_SECONDS)).as_dict()
        try:
            response = self._client.send(request, stream=True)
            try:
                pieces = self._pieces(response, deadline)
                return read(pieces) if response.status_code == 200 else self._refused(response, pieces, expected)
            finally:
                self.traffic.received += response.num_bytes_downloaded
                response.close()
        except (httpx.ReadTimeout, httpx.WriteTimeout, httpx.PoolTimeout) as error:
            raise self._too_slow() from error
        except CutOffError as error:
            raise TransientError(str(error)) from error
        except (httpx.TransportError, httpx.DecodingError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            if "CERTIFICATE_VERIFY" in reason:
                raise RemoteError(
                    f"the certificate of {self.url} is not trusted: {reason}. Pass verify=... (c2c serve: "
                    "--sharer-ca) with the file of its certificate authority.",
                    "certificate",
                ) from error
            raise TransientError(reason) from error

    def _pieces(self, response: httpx.Response, deadline: float) -> Iterator[bytes]:
        """The bytes of an answer, as long as there is time."""
        for piece in response.iter_bytes():
            if time.monotonic() > deadline:
                raise self._too_slow()
            yield piece

    def _refused(self, response: httpx.Response, pieces: Iterator[bytes], expected: ModelIdentity | None) -> Never:
        """Turn a status other than 200 into an error."""
        status, error = response.status_code, _error_of(pieces)
        code, message = str(error.get("code") or "status"), str(error.get("message") or response.reason_phrase)
        if status in _RETRIED:
            after = response.headers.get("retry-after", "")
            raise TransientError(f"it answered {status}: {message}", status, float(after) if after.isdigit() else 0.0)
        if code == "mismatch" and expected is not None and isinstance(error.get("sharer"), dict):
            raise_if_changed(expected, error["sharer"], self.url)
        if status == 401:
            message += " Pass token=... to RemoteSharer, or set C2C_TOKEN."
        raise RemoteError(f"the sharer at {self.url} answered {status}: {message}", code, status)

    def _give_up(self, error: TransientError, attempts: int) -> Never:
        advice = {
            429: "Wait, or start it with a larger --rate.",
            None: "Is `c2c share` running there, and is the address right?",
        }.get(error.status, "Try again later.")
        code = {429: "rate", None: "unreachable"}.get(error.status, "busy")
        raise RemoteError(
            f"the sharer at {self.url} gave no answer in {attempts} attempt{'s' if attempts > 1 else ''}: "
            f"{str(error).rstrip('.')}. {advice}",
            code,
            error.status,
        ) from error

    def _too_slow(self) -> RemoteError:
        return RemoteError(
            f"the sharer at {self.url} took longer than {self.timeout:g} seconds. Pass a larger timeout=..., or ask "
            "for fewer bytes: precision='int8'.",
            "timeout",
        )


def raise_if_changed(expected: ModelIdentity, given: Any, url: str) -> None:
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
    if not isinstance(verify, str | Path) and client_cert is None:
        return verify
    try:
        context = verify
        if not isinstance(verify, ssl.SSLContext):
            context = ssl.create_default_context(cafile=str(verify) if isinstance(verify, str | Path) else None)
        if verify is False:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        if client_cert is not None:
            context.load_cert_chain(str(client_cert))
    except OSError as error:
        raise RemoteError(
            f"verify={str(verify)!r} or client_cert={str(client_cert)!r} holds no certificates: {error}. Pass files in "
            "PEM form: those to trust as verify=... (c2c serve: --sharer-ca), your own as client_cert=...",
            "certificate",
        ) from error
    return context


def _error_of(pieces: Iterator[bytes]) -> dict[str, Any]:
    held = b""
    for piece in pieces:
        held += piece
        if len(held) > _LONGEST_ERROR:
            break
    try:
        error = json.loads(held)["error"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    return error if isinstance(error, dict) else {}


def _pause(state: RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome is not None else None
    return max(_backoff(state), error.retry_after if isinstance(error, TransientError) else 0.0)
