"""Errors: everything that a user can get wrong, as one family of exceptions.

Each message says what was given, what was expected, and what to do. The second base class lets code that
catches the built-in type keep working.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class C2CError(Exception):
    """Base of every error that this package raises on purpose."""


def did_you_mean(given: object, known: Iterable[str]) -> str:
    """Return a question to append to an error, naming the nearest known name; empty if none is near."""
    near = difflib.get_close_matches(str(given).lower(), list(known), n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""


class PromptError(C2CError, ValueError):
    """A prompt that cannot be encoded, aligned or run: empty, too long, right-padded, without a template."""


class ContextLengthError(PromptError):
    """A prompt that is longer than a model's context, or than a server takes."""


class AlignmentError(PromptError):
    """The tokens of two models could not be aligned."""


class CacheError(C2CError, ValueError):
    """A KV cache that cannot be fused or decoded from: wrong length, wrong layer type, wrong shape."""


class FuserError(C2CError, ValueError):
    """A fuser, its configuration, or a published checkpoint is not usable."""


class MismatchError(FuserError):
    """The fuser or adapter was trained for other models than those given. Lists every difference.

    Attributes:
        differences: one line per difference, "what: fuser expects X, got Y".
    """

    def __init__(self, differences: Sequence[str], advice: str, what: str = "fuser") -> None:
        self.differences = list(differences)
        lines = "\n".join(f"  - {line}" for line in self.differences)
        super().__init__(f"this {what} does not fit these models:\n{lines}\n{advice}")


class SystemUnavailableError(C2CError, ValueError):
    """An unknown system, or one that can't answer with these models."""


class HandoffError(C2CError, ValueError):
    """A handed-over cache that can't be used: damaged, foreign, expired, or made for something else."""


class ModelLoadError(C2CError, OSError):
    """A model, tokenizer or file could not be found, read or downloaded."""


# Codes of failures that concern one request: the sharer is up, and another request may succeed.
_REQUEST_CODES = frozenset({"too_long", "tokens", "request", "layer", "precision", "fuser", "failed"})


class RemoteError(C2CError, ConnectionError):
    """A remote sharer that could not be reached, refused a request, or sent an invalid answer.

    Attributes:
        code: the reason in one word, such as ``unreachable``, ``timeout``, ``invalid_api_key``, ``damaged``.
        status: the HTTP status, None where there was no answer.
    """

    def __init__(self, message: str, code: str = "failed", status: int | None = None) -> None:
        super().__init__(message)
        self.code, self.status = code, status

    @property
    def about_request(self) -> bool:
        """Whether the failure concerns this request alone, and not the sharer."""
        return self.code in _REQUEST_CODES


class SharerLost(RemoteError):
    """The same where ``on_failure="receiver_only"``: ``C2CModel`` lets the receiver answer alone."""


class SharerChanged(MismatchError):
    """Another model is served at the address than when the connection was made. No failure policy covers it."""
