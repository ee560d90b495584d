"""What can go wrong with a sharer on another machine, as errors for whoever asked it."""

from __future__ import annotations

from c2c.errors import C2CError


class RemoteError(C2CError, ConnectionError):
    """A remote sharer could not be reached, refused, or sent something that must not be used.

    Attributes:
        code: the reason in one word, such as ``unreachable``, ``timeout``, ``unauthorized``, ``signature``.
        status: the HTTP status, None where there was no answer.
    """

    def __init__(self, message: str, code: str = "failed", status: int | None = None) -> None:
        super().__init__(message)
        self.code, self.status = code, status


class SharerLost(RemoteError):
    """The same where the sharer's policy is ``receiver_only``: ``C2CModel`` lets the receiver answer alone."""
