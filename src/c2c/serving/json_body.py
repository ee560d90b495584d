"""JSON bodies, parsed strictly: what could be read in two ways, or by nobody, is refused."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError

from c2c.serving.errors import ApiError, invalid, validation_error

MAX_DEPTH = 100  # of objects and lists in each other: code that walks through them must not run out of stack
_JSON_TYPE = re.compile(r"application/(.+\+)?json", re.IGNORECASE)
B = TypeVar("B", bound=BaseModel)


def json_body(kind: type[B]) -> Callable[[Request], Awaitable[B]]:
    """Return a dependency that reads a request's body.

    Other content types are refused: a web page may send those to any address without being asked for its origin.
    """

    async def read(request: Request) -> B:
        if not _JSON_TYPE.fullmatch(request.headers.get("content-type", "").partition(";")[0].strip()):
            raise _no_object()
        data = parse(await request.body())
        if not isinstance(data, dict):
            raise _no_object()
        try:
            return kind.model_validate(data)
        except ValidationError as error:
            raise validation_error(error.errors(include_url=False, include_input=False)[0]) from None

    return read


def parse(raw: bytes) -> Any:
    """Parse JSON in UTF-8.

    Raises:
        ApiError: it is none; an object has a key twice; numbers that are none (NaN); half a surrogate pair; too deep.
    """
    try:
        data = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_object, parse_constant=_no_number)
    except (ValueError, RecursionError):  # not UTF-8, not JSON, a number of thousands of digits, thousands of brackets
        raise _invalid_json("the body is not valid JSON in UTF-8.") from None
    _check(data)
    return data


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise _invalid_json(f"the body has {twice!r:.80} twice in one object: give it once.")
    return made


def _no_number(name: str) -> Any:
    raise _invalid_json(f"the body has {name}, which is no number of JSON.")


def _check(data: Any) -> None:
    """Check texts and depth, without recursion."""
    waiting: list[tuple[tuple[str, ...], Any]] = [((), data)]
    while waiting:
        path, value = waiting.pop()
        if len(path) > MAX_DEPTH:
            raise _invalid_json(f"the body has objects and lists in each other, deeper than {MAX_DEPTH}.")
        if isinstance(value, str) and not _encodable(value):
            raise invalid("half a surrogate pair is no text: send texts in UTF-8.", ".".join(path))
        if isinstance(value, dict):
            if not all(map(_encodable, value)):
                raise _invalid_json("the name of a field has half a surrogate pair, which is no text.")
            waiting += [((*path, name), item) for name, item in value.items()]
        elif isinstance(value, list):
            kinds = (str, dict, list)
            waiting += [((*path, str(at)), item) for at, item in enumerate(value) if isinstance(item, kinds)]


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _invalid_json(message: str) -> ApiError:
    return invalid(message, code="invalid_json")


def _no_object() -> ApiError:
    return _invalid_json("send a JSON object as body, with Content-Type: application/json.")
