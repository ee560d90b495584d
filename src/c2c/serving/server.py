"""Running an application until it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import time
from collections.abc import Iterator
from threading import current_thread, main_thread

import uvicorn
from fastapi import FastAPI

from c2c.serving.errors import ServerError
from c2c.serving.logs import log
from c2c.serving.service import Service

_BACKLOG = 2048
_TICK = 0.05
_KEEP_ALIVE = 75  # seconds; longer than clients keep idle connections, so that none is closed under a request
_GRACE = 5.0  # seconds after the longest request, for sending


def listen(host: str, port: int) -> socket.socket:
    """A socket for the server, so that a port that is taken is known before models are loaded.

    Raises:
        ServerError: it is taken, or there is no such address.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise ServerError(
            f"can't listen at {host}:{port}: {error.strerror or error}. Choose another --port."
        ) from error
    return sock


class Server(uvicorn.Server):
    """An HTTP server that finishes what it has accepted before it ends.

    At SIGTERM or SIGINT new requests are refused while those under way are answered; a second signal gives them up, a
    third waits for nothing.

    Args:
        app: an application of :func:`c2c.serving.app.create_app`.

    Attributes:
        forced: whether requests were given up.
    """

    def __init__(self, app: FastAPI) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                lifespan="on",
                ws="none",
                backlog=_BACKLOG,
                server_header=False,
                timeout_keep_alive=_KEEP_ALIVE,
                timeout_graceful_shutdown=int(_GRACE),
            )
        )
        self._service: Service = app.state.service
        self._draining: asyncio.Task[None] | None = None
        self.forced = False

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals mean :meth:`stop`; outside the main thread nobody sends any."""
        if current_thread() is not main_thread():
            yield
            return
        loop, wanted = asyncio.get_running_loop(), (signal.SIGTERM, signal.SIGINT)
        for number in wanted:
            loop.add_signal_handler(number, self.stop)
        try:
            yield
        finally:
            for number in wanted:
                loop.remove_signal_handler(number)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, and say where."""
        await super().startup(sockets)
        if self.started and sockets:
            host, port = sockets[0].getsockname()[:2]
            log("ready", url=f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")

    def stop(self) -> None:
        """Finish what was accepted and end; called again, give it up. On the event loop."""
        if self._draining is None:
            self._draining = asyncio.get_running_loop().create_task(self._drain())
        elif not self.forced:
            self.forced = True
            log("giving_up", active=self._service.active)
            self._service.give_up()
        else:
            self.force_exit = self.should_exit = True

    async def _drain(self) -> None:
        self._service.draining = True
        log("draining", active=self._service.active)
        until = time.monotonic() + self._service.settings.timeout + _GRACE
        while self._service.active and time.monotonic() < until and not self.should_exit:
            if self.forced:
                until = min(until, time.monotonic() + _GRACE)
            await asyncio.sleep(_TICK)
        self.should_exit = True


def serve(app: FastAPI, sock: socket.socket) -> bool:
    """Serve until SIGTERM or SIGINT.

    Returns:
        Whether everything that was accepted was answered.

    Raises:
        ServerError: the application did not start.
    """
    server = Server(app)
    server.run([sock])
    if not server.started:
        raise ServerError("the server did not start; see above.")
    log("stopped", forced=server.forced)
    return not server.forced
