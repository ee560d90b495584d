"""The server's log: one JSON object per line on stderr; sizes and times, and never any text or token of a prompt."""

from __future__ import annotations

import json
import sys
import threading
import time
from typing import Any, TextIO


class Log:
    """Writes events.

    Args:
        stream: where to; stderr by default.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream, self._lock = stream or sys.stderr, threading.Lock()

    def write(self, event: str, **facts: Any) -> None:
        """One line; facts that are None are left out."""
        known = {key: value for key, value in facts.items() if value is not None}
        line = json.dumps({"time": round(time.time(), 3), "event": event} | known)
        with self._lock:
            self._stream.write(line + "\n")
            self._stream.flush()
