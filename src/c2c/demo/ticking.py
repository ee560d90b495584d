"""A stream that also says when nothing comes, so that a stopwatch can go on."""

from __future__ import annotations

from collections.abc import Iterator
from queue import Empty, Queue
from threading import Thread
from typing import TypeVar

T = TypeVar("T")


class _End:
    """The end of a stream, and what ended it."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


def ticking(stream: Iterator[T], every: float) -> Iterator[T | None]:
    """The items of ``stream`` as they come, and None where none came for ``every`` seconds."""
    items: Queue[T | _End] = Queue()
    Thread(target=_drain, args=(stream, items), daemon=True).start()
    while True:
        try:
            item = items.get(timeout=every)
        except Empty:
            yield None
            continue
        if isinstance(item, _End):
            if item.error is not None:
                raise item.error
            return
        yield item


def _drain(stream: Iterator[T], items: Queue[T | _End]) -> None:
    try:
        for item in stream:
            items.put(item)
    except BaseException as error:
        items.put(_End(error))
    else:
        items.put(_End())
