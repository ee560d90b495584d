"""A real server on a free port, and a TCP proxy that spoils what passes through it."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx

from c2c.remote.config import ShareConfig
from c2c.remote.protocol import HANDSHAKE_PATH, PREFILL_PATH
from c2c.remote.server import PrefillWorker, build_app
from c2c.serving.http_server import Server, listen, url_of

KEY = "0123456789abcdef0123456789abcdef"
_LOG = logging.getLogger("c2c.serving")


def make_server(sharer, fusers=(), **options):
    """A server of this sharer, not yet running, its socket and its worker; options as in :class:`ShareConfig`."""
    config = ShareConfig(**({"port": 0, "rate": 0} | options))
    worker = PrefillWorker(sharer, config, fusers)
    return Server(build_app(worker, config), config), listen("127.0.0.1", 0), worker, config


@dataclass
class Running:
    url: str
    port: int
    worker: PrefillWorker
    log: list[dict]

    def logged(self, count: int) -> list[dict]:
        """The log when so many requests stand in it."""
        until(lambda: len(self.log) >= count)
        return self.log


class _Collect(logging.Handler):
    def __init__(self, lines: list[dict]) -> None:
        super().__init__()
        self.lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage() == "request" and record.facts["path"] in (HANDSHAKE_PATH, PREFILL_PATH):
            self.lines.append(record.facts)


@contextmanager
def serving(sharer, fusers=(), **options):
    """A running server in a thread; further options are fields of :class:`ShareConfig`."""
    server, sock, worker, config = make_server(sharer, fusers, **options)
    handler = _Collect([])
    _LOG.addHandler(handler)
    _LOG.setLevel(logging.INFO)
    thread = threading.Thread(target=server.run, args=([sock],))
    thread.start()
    try:
        until(lambda: server.started)
        yield Running(url_of(sock, config), sock.getsockname()[1], worker, handler.lines)
    finally:
        server.should_exit = True
        thread.join(60)
        _LOG.removeHandler(handler)
        assert not thread.is_alive()


def until(ready: Callable[[], bool], seconds: float = 60) -> None:
    """Wait until something holds; a server that does not answer yet does not."""
    ends = time.monotonic() + seconds
    while True:
        try:
            if ready():
                return
        except httpx.TransportError:
            pass
        assert time.monotonic() < ends, "it never came to hold"
        time.sleep(0.02)


@dataclass
class Proxy:
    """Passes bytes on, one request and its answer per connection. What is set is done to the next ``times`` of them.

    Attributes:
        port: where the server listens.
        times: how many connections are spoiled; the rest pass as they are.
        cut: the answer is cut after so many bytes.
        change: makes another answer of the whole answer.
        rate: bytes per second of the answer.
        answer: given instead of the server's.
        requests: what has passed.
    """

    port: int
    times: int = 0
    cut: int | None = None
    change: Callable[[bytes], bytes] | None = None
    rate: float | None = None
    answer: bytes | None = None
    requests: list[bytes] = field(default_factory=list)

    def __enter__(self) -> Proxy:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._socket.close()

    def spoil(self, times: int = 1 << 30, **how) -> None:
        """Spoil the next connections."""
        self.cut = self.change = self.rate = self.answer = None
        self.times = times
        for name, value in how.items():
            setattr(self, name, value)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._pass, args=(client,), daemon=True).start()

    def _pass(self, client: socket.socket) -> None:
        with client:
            request = _message(client)
            if not request:
                return
            self.requests.append(request)
            spoiled, self.times = self.times > 0, max(0, self.times - 1)
            try:
                if spoiled and self.answer is not None:
                    client.sendall(self.answer)
                    return
                self._forward(client, request, spoiled)
            except OSError:
                return  # one side has gone

    def _forward(self, client: socket.socket, request: bytes, spoiled: bool) -> None:
        with socket.create_connection(("127.0.0.1", self.port)) as server:
            server.sendall(_closing(request))
            answer = b"".join(iter(lambda: server.recv(1 << 16), b""))
        if spoiled and self.change is not None:
            answer = self.change(answer)
        if spoiled and self.cut is not None:
            answer = answer[: self.cut]
        step = int(self.rate / 20) if spoiled and self.rate else 1 << 20
        for start in range(0, len(answer), step):
            client.sendall(answer[start : start + step])
            time.sleep(0.05 if spoiled and self.rate else 0)


def _message(source: socket.socket) -> bytes:
    """One request with its body."""
    held = b""
    while b"\r\n\r\n" not in held:
        piece = source.recv(1 << 16)
        if not piece:
            return b""
        held += piece
    head, _, body = held.partition(b"\r\n\r\n")
    fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
    length = int(fields.get(b"content-length", b"0"))
    while len(body) < length:
        body += source.recv(1 << 16)
    return head + b"\r\n\r\n" + body


def _closing(request: bytes) -> bytes:
    """So that each connection carries one request."""
    head, _, body = request.partition(b"\r\n\r\n")
    lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"connection:")]
    return b"\r\n".join([*lines, b"Connection: close"]) + b"\r\n\r\n" + body
