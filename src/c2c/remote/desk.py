"""Who may ask, how often, and whether a request is whole and new: everything before the model is troubled."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Sequence

from c2c.remote.frame import Frame, FrameError, FrameReader
from c2c.remote.freshness import Freshness, StaleError
from c2c.remote.limits import Limits, RateLimiter
from c2c.remote.refusal import Refusal
from c2c.remote.signature import Signer

_HEX = re.compile(r"[0-9a-f]{32}")


class Desk:
    """Checks requests.

    Args:
        tokens: bearer tokens that are accepted; none for everybody.
        signer: checks tags; with a key, replayed and old requests are refused.
        limits: bounds.
        freshness: nonces and clock.
    """

    def __init__(
        self, tokens: Sequence[str], signer: Signer, limits: Limits, freshness: Freshness | None = None
    ) -> None:
        self._tokens = [_digest(token) for token in tokens]
        self.signer, self.limits = signer, limits
        self._freshness = freshness or Freshness()
        self._rate = RateLimiter(limits.requests_per_minute)

    def admit(self, authorization: str | None, address: str) -> str:
        """Who asks, as a name for the log.

        Raises:
            Refusal: without a known token (401), or too often (429).
        """
        caller = self._caller(authorization) if self._tokens else address
        wait = self._rate.wait(caller)
        if wait is not None:
            raise Refusal(
                429,
                "rate",
                f"more than {self.limits.requests_per_minute} requests in a minute; try again in {wait} seconds.",
                retry_after=wait,
            )
        return caller

    def open(self, body: bytes, kinds: Sequence[str]) -> Frame:
        """The frame of a request.

        Raises:
            Refusal: malformed (400), forged (401), replayed or old (409), or of a kind that is not asked here (400).
        """
        reader = FrameReader([body], self.signer, self.limits.body_bytes)
        try:
            frame, more = reader.read(), reader.read()
        except FrameError as error:
            raise Refusal(401 if error.code == "signature" else 400, error.code, str(error)) from error
        if frame is None or more is not None:
            raise Refusal(400, "malformed", "expected one message in a request.")
        if frame.kind not in kinds:
            raise Refusal(400, "malformed", f"kind {frame.kind[:40]!r}, expected one of {', '.join(kinds)}.")
        self._check_new(frame)
        return frame

    def _caller(self, authorization: str | None) -> str:
        scheme, _, given = (authorization or "").partition(" ")
        digest = _digest(given.strip()) if scheme.lower() == "bearer" else b""
        known = [number for number, token in enumerate(self._tokens) if hmac.compare_digest(token, digest)]
        if not known:
            raise Refusal(
                401,
                "unauthorized",
                f"{'no' if not authorization else 'a wrong'} bearer token was given. Pass token=... to RemoteSharer, "
                "or set C2C_TOKEN.",
            )
        return f"token {known[0] + 1}"

    def _check_new(self, frame: Frame) -> None:
        for name in ("request", "nonce"):
            if not isinstance(frame.header.get(name), str) or not _HEX.fullmatch(frame.header[name]):
                raise Refusal(400, "malformed", f"{name} must be 32 hexadecimal digits.")
        sent = frame.header.get("time")
        if not isinstance(sent, int | float) or isinstance(sent, bool):
            raise Refusal(400, "malformed", "time must be seconds since 1970.")
        if not self.signer.signs:  # without a key anybody could put a new nonce in
            return
        try:
            self._freshness.check(frame.header["nonce"], float(sent))
        except StaleError as error:
            raise Refusal(409, "replayed", f"the request was refused: {error}") from error


def _digest(token: str) -> bytes:
    """Of one length, so that a comparison does not tell how long a token is."""
    return hashlib.sha256(token.encode()).digest()
