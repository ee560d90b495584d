"""The HTTP server of ``c2c serve`` and ``c2c share``: binding, TLS, and a graceful end."""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from c2c.serving.config import HTTPConfig
from c2c.serving.errors import ServerError
from c2c.serving.logs import log

_GRACE = 5.0  # seconds after the longest request, for sending


def listen(host: str, port: int) -> socket.socket:
    """Bind a socket, so that a port that is taken is found out before models are loaded.

    Raises:
        ServerError: it is taken, or there is no such address.
    """
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        reason = error.strerror or error
        raise ServerError(f"can't listen at {host}:{port}: {reason}. Choose another --host or --port.") from error
    return bound


def url_of(sock: socket.socket, config: HTTPConfig) -> str:
    """Return the address of a server, such as ``https://127.0.0.1:8650``."""
    host, port = sock.getsockname()[:2]
    return f"{'https' if config.tls_cert else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"


class Server(uvicorn.Server):
    """Serve HTTP, and finish what was accepted before the end.

    At SIGTERM or SIGINT new requests are refused while those under way are answered; a second signal gives them up, a
    third waits for nothing.

    Attributes:
        forced: whether requests were given up.

    Raises:
        ServerError: TLS files that can't be used.
    """

    def __init__(self, app: FastAPI, config: HTTPConfig) -> None:
        options: dict[str, Any] = {
            "log_config": None,
            "access_log": False,
            "lifespan": "on",
            "ws": "none",
            "server_header": False,
            "limit_concurrency": config.connections,
            "timeout_keep_alive": 75,  # longer than clients keep idle connections: none is closed under a request
            "timeout_graceful_shutdown": int(_GRACE),
        }
        super().__init__(uvicorn.Config(app, **options, **_tls_options(config)))
        try:
            self.config.load()
        except OSError as error:
            raise ServerError(f"the TLS files {config.tls_cert} and {config.tls_key} can't be used: {error}") from error
        self._http, self._state = config, app.state.server
        self._draining: asyncio.Task[None] | None = None
        self.forced = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop at a signal; outside the main thread there are none."""
        asyncio.get_running_loop().call_soon_threadsafe(self.stop)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, and log where."""
        await super().startup(sockets)
        if self.started and sockets:
            log("ready", url=url_of(sockets[0], self._http))

    def stop(self) -> None:
        """Finish what was accepted and end; called again, give it up. On the event loop."""
        if self._draining is None:
            self._draining = asyncio.get_running_loop().create_task(self._drain())
        elif not self.forced:
            self.forced = True
            log("giving_up", active=self._state.active)
            self._state.abort()
        else:
            self.force_exit = self.should_exit = True

    async def _drain(self) -> None:
        self._state.draining = True
        log("draining", active=self._state.active)
        until = time.monotonic() + self._http.timeout + _GRACE
        while self._state.active and time.monotonic() < until and not self.should_exit:
            if self.forced:
                until = min(until, time.monotonic() + _GRACE)
            await asyncio.sleep(0.05)
        self.should_exit = True


def serve(app: FastAPI, sock: socket.socket, config: HTTPConfig) -> bool:
    """Serve until SIGTERM or SIGINT.

    Returns:
        Whether everything that was accepted was answered.

    Raises:
        ServerError: the application did not start.
    """
    server = Server(app, config)
    server.run([sock])
    if not server.started:
        raise ServerError("the server did not start; see above.")
    log("stopped", forced=server.forced)
    return not server.forced


def _tls_options(config: HTTPConfig) -> dict[str, Any]:
    if (config.tls_cert is None) != (config.tls_key is None):
        raise ServerError("TLS needs both --tls-cert and --tls-key.")
    if config.tls_client_ca is not None and config.tls_cert is None:
        raise ServerError("--tls-client-ca needs --tls-cert and --tls-key: without TLS there are no certificates.")
    required = ssl.CERT_REQUIRED if config.tls_client_ca is not None else ssl.CERT_NONE
    return {
        "ssl_certfile": config.tls_cert,
        "ssl_keyfile": config.tls_key,
        "ssl_ca_certs": config.tls_client_ca,
        "ssl_cert_reqs": required,
    }
