"""Binding, TLS and a graceful end: the app on a socket."""

from __future__ import annotations

import math
import signal
import socket
import threading
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI

from c2c.errors import C2CError

CONNECTIONS = 100


class ServerError(C2CError, OSError):
    """The server can't be started as asked."""


class Server:
    """An app on a socket that is bound already.

    Args:
        app: the app.
        host: name or address to bind.
        port: port; 0 for a free one.
        cert: certificate file for TLS.
        key: its private key.
        grace: seconds for what is under way when the server is told to end.

    Raises:
        ServerError: the address can't be bound, or the TLS files can't be read.
    """

    def __init__(
        self, app: FastAPI, host: str, port: int, cert: Path | None = None, key: Path | None = None, grace: float = 30.0
    ) -> None:
        if (cert is None) != (key is None):
            raise ServerError("TLS needs both --tls-cert and --tls-key.")
        tls: dict[str, Any] = {} if cert is None else {"ssl_certfile": str(cert), "ssl_keyfile": str(key)}
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            limit_concurrency=CONNECTIONS,
            timeout_graceful_shutdown=math.ceil(grace),
            **tls,
        )
        try:
            config.load()
        except OSError as error:
            raise ServerError(f"the TLS files {cert} and {key} can't be used: {error}") from error
        self._server, self._socket = uvicorn.Server(config), _bind(host, port)
        self.host, self.port = host, int(self._socket.getsockname()[1])
        shown = f"[{host}]" if ":" in host else host
        self.url = f"{'https' if tls else 'http'}://{shown}:{self.port}"

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT; requests under way are finished first."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises it again when it has ended
        try:
            self._server.run(sockets=[self._socket])
        finally:
            self._socket.close()

    def stop(self) -> None:
        """Let :meth:`run` end, from another thread."""
        self._server.should_exit = True


def _bind(host: str, port: int) -> socket.socket:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        bound = socket.socket(found[0], socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(found[4])
    except OSError as error:
        raise ServerError(f"can't listen on {host}:{port}: {error}. Choose another --host or --port.") from error
    return bound
