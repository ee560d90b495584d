"""What can go wrong with a sharer on another machine, as errors for whoever asked it."""

from __future__ import annotations

from c2c.errors import C2CError, MismatchError

_ABOUT_REQUEST = frozenset({"too_long", "tokens", "order", "layer", "precision", "fuser", "failed"})


class RemoteError(C2CError, ConnectionError):
    """A remote sharer could not be reached, refused, or sent something that must not be used.

    Attributes:
        code: the reason in one word, such as ``unreachable``, ``timeout``, ``unauthorized``, ``signature``.
        status: the HTTP status, None where there was no answer.
    """

    def __init__(self, message: str, code: str = "failed", status: int | None = None) -> None:
        super().__init__(message)
        self.code, self.status = code, status

    @property
    def about_request(self) -> bool:
        """Whether the sharer is there and did not answer this request; another one it may answer."""
        return self.code in _ABOUT_REQUEST


class SharerLost(RemoteError):
    """The same where the sharer's policy is ``receiver_only``: ``C2CModel`` lets the receiver answer alone."""


class SharerChanged(MismatchError):
    """Another model is served at the address than when the connection was made. No policy covers it."""
