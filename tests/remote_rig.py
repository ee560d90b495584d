"""A real server on a free port, and a TCP proxy that spoils what passes through it."""

from __future__ import annotations

import io
import json
import socket
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx

from c2c.remote.app import build_app
from c2c.remote.desk import Desk
from c2c.remote.limits import Limits
from c2c.remote.log import Log
from c2c.remote.server import Server
from c2c.remote.signature import Signer
from c2c.remote.stall import Stall

KEY = b"0123456789abcdef0123456789abcdef"


def make_server(sharer, *, tokens=(), key=None, limits=None, log=None, tls=(None, None), **options):
    """A server of this sharer on a free port, not yet running, and its stall."""
    limits, signer = limits or Limits(requests_per_minute=0), Signer(key)
    stall = Stall(sharer, signer, limits, **options)
    app = build_app(stall, Desk(tokens, signer, limits), log or Log(io.StringIO()))
    return Server(app, "127.0.0.1", 0, *tls), stall


@dataclass
class Running:
    url: str
    port: int
    stall: Stall
    stream: io.StringIO

    @property
    def log(self) -> list[dict]:
        return [json.loads(line) for line in self.stream.getvalue().splitlines()]

    def logged(self, count: int) -> list[dict]:
        """The log when so many requests stand in it."""
        for _ in range(200):
            if len(self.log) >= count:
                return self.log
            time.sleep(0.05)
        raise AssertionError(self.log)


@contextmanager
def serving(sharer, **options):
    """A running server in a thread."""
    stream = io.StringIO()
    server, stall = make_server(sharer, log=Log(stream), **options)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: httpx.get(server.url + "/health", verify=False).status_code == 200)
        yield Running(server.url, server.port, stall, stream)
    finally:
        server.stop()
        thread.join(60)
        assert not thread.is_alive()


def until(ready: Callable[[], bool], seconds: float = 60) -> None:
    """Wait for a server that is starting."""
    ends = time.monotonic() + seconds
    while True:
        try:
            if ready():
                return
        except httpx.TransportError:
            pass
        assert time.monotonic() < ends, "the server did not start"
        time.sleep(0.05)


@dataclass
class Proxy:
    """Passes bytes on, one request and its answer per connection. What is set is done to the next ``times`` of them.

    Attributes:
        port: where the server listens.
        times: how many connections are spoiled; the rest pass as they are.
        cut: the answer is cut after so many bytes.
        flip: the byte of the answer at this place is changed.
        change: makes another answer of the whole answer.
        rate: bytes per second of the answer.
        answer: given instead of the server's.
        requests, answers: what has passed.
    """

    port: int
    times: int = 0
    cut: int | None = None
    flip: int | None = None
    change: Callable[[bytes], bytes] | None = None
    rate: float | None = None
    answer: bytes | None = None
    requests: list[bytes] = field(default_factory=list)
    answers: list[bytes] = field(default_factory=list)

    def __enter__(self) -> Proxy:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._socket.close()

    def spoil(self, times: int = 1 << 30, **how) -> None:
        """Spoil the next connections."""
        self.cut = self.flip = self.change = self.rate = self.answer = None
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
            if spoiled and self.change is not None:
                whole = b"".join(iter(lambda: server.recv(1 << 16), b""))
                client.sendall(self.change(whole))
                return
            passed, kept = 0, []
            while piece := server.recv(int(self.rate / 20) or 1 if spoiled and self.rate else 1 << 16):
                if spoiled and self.flip is not None and passed <= self.flip < passed + len(piece):
                    at = self.flip - passed
                    piece = piece[:at] + bytes([piece[at] ^ 1]) + piece[at + 1 :]
                if spoiled and self.cut is not None and passed + len(piece) > self.cut:
                    client.sendall(piece[: self.cut - passed])
                    return
                if spoiled and self.rate:
                    time.sleep(len(piece) / self.rate)
                client.sendall(piece)
                passed += len(piece)
                kept.append(piece)
            self.answers.append(b"".join(kept))


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


def body_of_request(request: bytes) -> bytes:
    """What the request carries."""
    return request.partition(b"\r\n\r\n")[2]
