"""Logs of the servers: one JSON object per line on stderr. Texts of prompts and answers are never logged."""

from __future__ import annotations

import json
import logging
import sys
import traceback
from datetime import UTC, datetime
from typing import Any

_LOG = logging.getLogger("c2c.serving")


class JsonFormatter(logging.Formatter):
    """Format a record as one JSON object: time, level, event and its facts."""

    def format(self, record: logging.LogRecord) -> str:
        """Return one line."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        return json.dumps(line | getattr(record, "facts", {}), ensure_ascii=False)


def log_to_stderr() -> None:
    """Send the server's records, and the warnings of uvicorn, to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    for name, level in (("c2c.serving", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)


def log(event: str, **facts: Any) -> None:
    """Log an event."""
    _LOG.info(event, extra={"facts": facts})


def warn(event: str, **facts: Any) -> None:
    """Log a failure outside of this process."""
    _LOG.warning(event, extra={"facts": facts})


def log_failure(event: str, error: BaseException, **facts: Any) -> None:
    """Log a fault with its stack, without the message of the exception, which may quote a prompt."""
    frames = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(error.__traceback__)]
    _LOG.error(event, extra={"facts": facts | {"error": type(error).__name__, "frames": frames[-12:]}})
