"""The HTTP base of both servers: keys, limits, errors, logs, health, drain and TLS, on a real socket."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import ssl
import subprocess
import time
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event, Thread

import httpx
import pytest
from fastapi import APIRouter, Request
from pydantic import BaseModel
from typer.testing import CliRunner

from c2c.cli import app as command
from c2c.errors import C2CError, ContextLengthError, PromptError, RemoteError, SharerChanged
from c2c.serving.config import HTTPConfig, is_loopback
from c2c.serving.errors import ServerError, to_api_error
from c2c.serving.http_server import Server, ServerState, create_app, listen, on_disconnect
from c2c.serving.logs import JsonFormatter
from serving_harness import error_of, started, stop, until

JSON = {"Content-Type": "application/json"}
KEY, OTHER = "first-key-of-this-test", "other-key-of-this-test"


class Body(BaseModel, extra="forbid"):
    text: str


def routes(gate: Event, gone: Event) -> APIRouter:
    router = APIRouter()

    @router.post("/echo")
    async def echo(body: Body, request: Request) -> dict:
        request.state.record.facts["length"] = len(body.text)
        return {"text": body.text, "owner": request.state.record.owner}

    @router.post("/fail")
    async def fail(body: Body) -> None:
        raise {"prompt": PromptError, "fault": ZeroDivisionError}[body.text]("a secret")

    @router.post("/wait")
    async def wait(request: Request) -> dict:
        async with on_disconnect(request, gone.set):
            await asyncio.to_thread(gate.wait, 30)
        return {}

    return router


@dataclass
class Running:
    url: str
    server: Server
    state: ServerState
    gate: Event
    gone: Event

    def post(self, path: str, text: str = "hello", **kwargs) -> httpx.Response:
        return httpx.post(self.url + path, **({"json": {"text": text}, "timeout": 30} | kwargs))


@contextmanager
def running(**options):
    config, state, gate, gone = HTTPConfig(port=0, **options), ServerState(), Event(), Event()
    with started(create_app(config, [routes(gate, gone)], state), config) as (url, server):
        try:
            yield Running(url, server, state, gate, gone)
        finally:
            gate.set()


# -- keys --------------------------------------------------------------------------------------------------------------


def test_keys_admit_and_name_an_owner(tmp_path):
    (tmp_path / "keys").write_text(f"{OTHER}\n")
    with running(api_key=[KEY], key_file=tmp_path / "keys") as server:
        for header in ("", KEY, "Bearer", "Bearer wrong", "Bearer é"):
            response = server.post("/echo", headers={"Authorization": header.encode("latin-1")})
            assert (response.status_code, error_of(response)["code"]) == (401, "invalid_api_key")
        owners = [
            server.post("/echo", headers={"Authorization": f"Bearer {key}"}).json()["owner"] for key in (KEY, OTHER)
        ]
        assert len(set(owners)) == 2
        assert not any(key in owner for key in (KEY, OTHER) for owner in owners)
        assert server.post("/nowhere").status_code == 401, "not even the routes are shown"
        assert httpx.get(server.url + "/health").status_code == httpx.get(server.url + "/ready").status_code == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_an_open_address_without_keys_is_refused(host, monkeypatch):
    monkeypatch.delenv("C2C_API_KEY", raising=False)
    with pytest.raises(ServerError, match="--insecure"):
        create_app(HTTPConfig(host=host), [], ServerState())
    create_app(HTTPConfig(host=host, insecure=True), [], ServerState())
    monkeypatch.setenv("C2C_API_KEY", f"{KEY}, {OTHER}")
    assert HTTPConfig(host=host).keys().owner(f"Bearer {OTHER}")


def test_serve_refuses_an_open_address_before_anything_is_loaded():
    result = CliRunner().invoke(command, ["serve", "/nowhere", "--host", "0.0.0.0"], env={"C2C_API_KEY": ""})
    assert isinstance(result.exception, ServerError)


def test_keys_that_can_not_be_used(tmp_path):
    (tmp_path / "short").write_text("short\n")
    for options in ({"api_key": [" "]}, {"key_file": tmp_path / "none"}, {"key_file": tmp_path / "short"}):
        with pytest.raises(ServerError, match="key"):
            HTTPConfig(**options).keys()


def test_loopback_addresses():
    assert [is_loopback(host) for host in ("127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost")] == [True] * 5
    assert [is_loopback(host) for host in ("0.0.0.0", "::", "10.0.0.1", "example.org", "")] == [False] * 5


# -- limits ------------------------------------------------------------------------------------------------------------


def test_a_body_that_is_too_large_is_refused():
    with running(max_body_mb=0.01) as server:
        for content in (b"x" * 30_000, (b"x" * 1000 for _ in range(30)), (b"x" * 100_000 for _ in range(50))):
            response = server.post("/echo", json=None, content=content)
            assert (response.status_code, error_of(response)["code"]) == (413, "request_too_large")
        assert server.post("/echo").status_code == 200


def test_a_body_that_does_not_arrive_is_given_up():
    def slow():
        yield b"{"
        time.sleep(1.5)
        yield b"}"

    with running(timeout=0.3) as server:
        response = server.post("/echo", json=None, content=slow())
        assert (response.status_code, error_of(response)["code"]) == (408, "timeout")


def test_requests_per_minute_are_limited():
    with running(rate=2, api_key=[KEY, OTHER]) as server:
        bearer = [{"Authorization": f"Bearer {key}"} for key in (KEY, OTHER)]
        statuses = [server.post("/echo", headers=bearer[0]).status_code for _ in range(3)]
        assert statuses == [200, 200, 429]
        assert 0 < int(server.post("/echo", headers=bearer[0]).headers["retry-after"]) <= 60
        assert server.post("/echo", headers=bearer[1]).status_code == 200


# -- errors and logs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "request_", "status", "code", "param"),
    [
        ("/echo", {"json": {}}, 400, "missing_parameter", "text"),
        ("/echo", {"json": {"text": 1}}, 400, "invalid_value", "text"),
        ("/echo", {"json": {"text": "", "more": 1}}, 400, "unknown_parameter", "more"),
        ("/echo", {"json": None, "content": b"{}"}, 400, "invalid_json", None),
        *(
            ("/echo", {"json": None, "content": content, "headers": JSON}, 400, "invalid_json", None)
            for content in (b"{", b"[" * 100_000, b"\xff\xfe", b"", b"[1]", b'"text"')
        ),
        ("/nowhere", {}, 404, "not_found", None),
        ("/fail", {"text": "prompt"}, 400, "invalid_value", None),
        ("/fail", {"text": "fault"}, 500, "internal_error", None),
    ],
)
def test_errors_have_one_form(caplog, path, request_, status, code, param):
    caplog.set_level(logging.INFO, "c2c.serving")
    with running() as server:
        response = server.post(path, **request_)
        assert httpx.get(server.url + "/echo").status_code == 405
    assert (response.status_code, error_of(response)["code"], error_of(response)["param"]) == (status, code, param)
    lines = [JsonFormatter().format(record) for record in caplog.records if record.name == "c2c.serving"]
    logged = next(line for line in map(json.loads, lines) if line["event"] == "request")
    assert (logged["status"], logged["code"], logged["request_id"]) == (status, code, response.headers["x-request-id"])
    assert "secret" not in "".join(lines)


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (ContextLengthError("no room"), 400, "context_length_exceeded"),
        (PromptError("a text which was made for a test"), 400, "invalid_value"),
        (RemoteError("x", "too_long"), 400, "context_length_exceeded"),
        (RemoteError("x", "timeout"), 504, "sharer_timeout"),
        (RemoteError("x", "unreachable"), 502, "sharer_lost"),
        (SharerChanged(["weights"], "connect again"), 502, "sharer_mismatch"),
        (C2CError("x"), 400, "invalid_value"),
    ],
)
def test_the_status_follows_from_the_class(error, status, code):
    found = to_api_error(error)
    assert (found.status, found.code) == (status, code)


def test_request_ids_and_facts(caplog):
    caplog.set_level(logging.INFO, "c2c.serving")
    with running() as server:
        ids = [
            server.post("/echo", "hidden", headers={"x-request-id": given}).headers["x-request-id"]
            for given in ("mine-1", "not sane")
        ]
    assert ids[0] == "mine-1"
    assert len(ids[1]) == 32
    logged = [record for record in caplog.records if record.message == "request"]
    assert [record.facts["length"] for record in logged] == [6, 6]
    assert "hidden" not in str([record.facts for record in logged])


# -- clients that leave, and the end -----------------------------------------------------------------------------------


def test_a_client_that_leaves_is_noticed():
    with running() as server:
        with pytest.raises(httpx.ReadTimeout):
            server.post("/wait", timeout=0.3)
        assert server.gone.wait(10)
        server.gate.set()
        until(lambda: server.state.ended == 1)


def test_a_server_that_ends_answers_what_it_has_accepted():
    with running() as server:
        answers = []
        thread = Thread(target=lambda: answers.append(server.post("/wait").status_code))
        thread.start()
        until(lambda: server.state.active == 1)
        stop(server.server)
        until(lambda: server.state.draining)
        response = server.post("/echo")
        assert (response.status_code, error_of(response)["code"]) == (503, "shutting_down")
        for path in ("/health", "/ready"):
            response = httpx.get(server.url + path)
            assert (response.status_code, response.json()["status"]) == (503, "draining")
        server.gate.set()
        thread.join()
        assert answers == [200]
        until(lambda: server.server.should_exit)
        assert not server.server.forced


def test_a_second_signal_gives_up_and_a_third_waits_for_nothing():
    aborted = Event()
    with running() as server:
        server.state.abort = aborted.set
        thread = Thread(target=server.post, args=("/wait",), daemon=True)
        thread.start()
        until(lambda: server.state.active == 1)
        stop(server.server)
        until(lambda: server.state.draining)
        assert not aborted.is_set()
        stop(server.server)
        assert aborted.wait(10)
        assert server.server.forced
        stop(server.server)
        until(lambda: server.server.should_exit)
        server.gate.set()
        thread.join()


# -- binding and TLS ---------------------------------------------------------------------------------------------------


def test_addresses_and_certificates_that_can_not_be_used(tmp_path):
    taken = listen("127.0.0.1", 0)
    taken.listen()
    with taken, pytest.raises(ServerError, match="can't listen"):
        listen("127.0.0.1", taken.getsockname()[1])
    files = {name: tmp_path / name for name in ("tls_cert", "tls_key", "tls_client_ca")}
    for names in (["tls_cert"], ["tls_client_ca"], ["tls_cert", "tls_key"]):
        with pytest.raises(ServerError, match="TLS"):
            HTTPConfig(**{name: files[name] for name in names})


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes certificates with openssl")
def test_tls_with_client_certificates(tmp_path):
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost "
        f"-addext subjectAltName=IP:127.0.0.1 -keyout {key} -out {cert}".split(),
        check=True,
        capture_output=True,
    )
    with running(tls_cert=cert, tls_key=key, tls_client_ca=cert) as server:
        assert server.url.startswith("https://")
        trusted = ssl.create_default_context(cafile=str(cert))
        with pytest.raises(httpx.TransportError):
            server.post("/echo", verify=trusted)
        trusted.load_cert_chain(cert, key)
        assert server.post("/echo", verify=trusted).status_code == 200
