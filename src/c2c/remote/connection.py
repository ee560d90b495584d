"""The client's HTTP side: one request, its signed answer frame by frame, and another attempt where that may help."""

from __future__ import annotations

import importlib.util
import json
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Never, TypeVar

import httpx
from torch import Tensor

from c2c.errors import RemoteError, SharerChanged
from c2c.identity import ModelIdentity, differences
from c2c.remote.frame import MEDIA_TYPE, CutOffError, Frame, FrameError, FrameReader, body_of, encode
from c2c.remote.freshness import WINDOW, Freshness, StaleError
from c2c.remote.retry import STATUSES, Backoff, TransientError
from c2c.remote.signature import Signer
from c2c.version import __version__

T = TypeVar("T")
_CONNECT_SECONDS = 10.0
_LONGEST_ERROR = 1 << 16


@dataclass
class Traffic:
    """What has crossed since the connection was made.

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


class Connection:
    """Asks one server.

    Args:
        url: ``http://host:port`` or ``https://host:port``.
        token: bearer token.
        signer: tags requests and checks answers.
        verify: as in httpx: True, False, or an ``ssl.SSLContext``.
        timeout: seconds for one call, all attempts included.
        backoff: when to try again.
    """

    def __init__(
        self, url: str, token: str | None, signer: Signer, verify: Any, timeout: float, backoff: Backoff
    ) -> None:
        self.url, self.timeout, self.traffic = url.rstrip("/"), timeout, Traffic()
        self._signer, self._backoff = signer, backoff
        self._freshness = Freshness(WINDOW + timeout)  # a message may be under way for as long as a call may take
        headers = {
            "User-Agent": f"cache2cache/{__version__}",
            "Content-Type": MEDIA_TYPE,
            "Accept-Encoding": "identity",
        }
        if token:
            headers["Authorization"] = f"Bearer {token}"
        self._client = httpx.Client(
            headers=headers, verify=verify, http2=importlib.util.find_spec("h2") is not None, follow_redirects=False
        )

    def close(self) -> None:
        """Close the sockets."""
        self._client.close()

    def call(
        self,
        path: str,
        header: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        read: Callable[[Iterator[Frame]], T],
        largest: int,
    ) -> T:
        """Send one frame and read the answer.

        Args:
            path: such as ``/v1/share``.
            header: without nonce and time, which each attempt gets anew.
            tensors: the body.
            read: reads the frames of an answer; called again from the start for another attempt.
            largest: longest body that a frame of the answer may have.

        Raises:
            RemoteError: refused, lost, too slow, damaged or forged. SharerChanged: another model is served.
        """
        deadline, failures = time.monotonic() + self.timeout, 0
        header, body = {**header, "request": secrets.token_hex(16)}, body_of(tensors)
        while True:
            try:
                return self._attempt(path, header, body, read, largest, deadline)
            except TransientError as error:
                failures += 1
                pause = self._backoff.pause(failures, error.retry_after)
                if pause is None or time.monotonic() + pause > deadline:
                    self._give_up(error, failures)
                self.traffic.retries += 1
                time.sleep(pause)
            except FrameError as error:
                raise RemoteError(f"the answer of the sharer at {self.url} was refused: {error}", error.code) from error

    def _attempt(
        self,
        path: str,
        header: Mapping[str, Any],
        body: bytes,
        read: Callable[[Iterator[Frame]], T],
        largest: int,
        deadline: float,
    ) -> T:
        nonce = secrets.token_hex(16)
        content = b"".join(encode({**header, "nonce": nonce, "time": time.time()}, body, self._signer))
        self.traffic.requests += 1
        self.traffic.sent += len(content)
        left = max(0.001, deadline - time.monotonic())
        limits = httpx.Timeout(left, connect=min(left, _CONNECT_SECONDS))
        try:
            with self._client.stream("POST", self.url + path, content=content, timeout=limits) as response:
                if response.status_code != 200:
                    self._refused(response, deadline, header.get("sharer"))
                reader = FrameReader(self._pieces(response, deadline), self._signer, largest)
                return read(self._checked(reader, nonce, str(header["request"])))
        except (httpx.ReadTimeout, httpx.WriteTimeout, httpx.PoolTimeout) as error:
            raise self._too_slow() from error
        except CutOffError as error:
            raise TransientError(f"the answer was cut off: {error}") from error
        except httpx.TransportError as error:
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
        for piece in response.iter_raw():
            self.traffic.received += len(piece)
            if time.monotonic() > deadline:
                raise self._too_slow()
            yield piece

    def _checked(self, reader: FrameReader, nonce: str, request: str) -> Iterator[Frame]:
        """Frames that answer this attempt, in their order, up to the end that must be there."""
        for number, frame in enumerate(reader):
            header = frame.header
            if header.get("nonce") != nonce or header.get("request") != request:
                raise FrameError("it answers another request: it was replayed or mixed up.", "replayed")
            if header.get("number") != number:
                raise FrameError(f"message {header.get('number')!r} came where {number} was expected.", "replayed")
            self._check_time(header.get("time"))
            if frame.kind == "error":
                raise RemoteError(
                    f"the sharer at {self.url} failed: {header.get('message')}", str(header.get("code")), 200
                )
            yield frame
            if frame.kind in ("end", "hello"):
                return
        raise CutOffError(f"the data ends before its last message, after {reader.count} bytes.", "cut_off")

    def _check_time(self, sent: Any) -> None:
        if not self._signer.signs:
            return
        try:
            self._freshness.check_time(float(sent))
        except (StaleError, TypeError, ValueError) as error:
            raise FrameError(f"{error}", "replayed") from error

    def _refused(self, response: httpx.Response, deadline: float, expected: Any) -> Never:
        """Turn a status other than 200 into an error."""
        status, error = response.status_code, self._error(response, deadline)
        code, message = str(error.get("code", "status")), str(error.get("message") or response.reason_phrase)
        if status in STATUSES:
            raise TransientError(f"it answered {status}: {message}", status, _seconds(response.headers))
        if code == "mismatch" and expected is not None and isinstance(error.get("sharer"), dict):
            hard, soft = differences(
                "sharer", ModelIdentity.from_dict(expected), ModelIdentity.from_dict(error["sharer"]), "connection"
            )
            raise SharerChanged(
                hard + soft or ["sharer: the server refused its identity"],
                f"Another model is served at {self.url} now: connect again, and use a fuser that was made for it.",
                "connection",
            )
        raise RemoteError(f"the sharer at {self.url} answered {status}: {message}", code, status)

    def _error(self, response: httpx.Response, deadline: float) -> dict[str, Any]:
        held = b""
        for piece in self._pieces(response, deadline):
            held += piece
            if len(held) > _LONGEST_ERROR:
                break
        try:
            error = json.loads(held)["error"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return {}
        return error if isinstance(error, dict) else {}

    def _give_up(self, error: TransientError, failures: int) -> Never:
        advice = {
            429: "Wait, or start it with a larger --rate.",
            None: "Is `c2c share` running there, and is the address right?",
        }.get(error.status, "Try again later.")
        code = {429: "rate", None: "unreachable"}.get(error.status, "busy")
        raise RemoteError(
            f"the sharer at {self.url} gave no answer in {failures} attempt{'s' if failures > 1 else ''}: "
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


def _seconds(headers: httpx.Headers) -> float | None:
    try:
        return max(0.0, float(headers["retry-after"]))
    except (KeyError, ValueError):
        return None
