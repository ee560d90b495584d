"""A request that the server does not fulfil: the status, a word for programs, a sentence for people."""

from __future__ import annotations

from typing import Any


class Refusal(Exception):
    """Why a request is refused; sent to the client as JSON.

    Attributes:
        status: the HTTP status.
        code: the reason in one word.
        message: what was given, what was expected, what to do. Never any text of a prompt.
        retry_after: seconds after which it may be fulfilled, None where a retry is of no use.
        details: more for the client, such as the identity of the model that is served.
    """

    def __init__(self, status: int, code: str, message: str, retry_after: float | None = None, **details: Any) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message
        self.retry_after, self.details = retry_after, details

    def to_dict(self) -> dict[str, Any]:
        """The JSON body of the answer."""
        return {"error": {"code": self.code, "message": self.message} | self.details}
