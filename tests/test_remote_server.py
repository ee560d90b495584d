"""The server as a process: the command, TLS, how it ends, and what a client sees when it is killed."""

from __future__ import annotations

import asyncio
import io
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import torch
from typer.testing import CliRunner

from c2c import C2CModel
from c2c.cli import app
from c2c.errors import C2CError
from c2c.language_model import Sharer
from c2c.remote import RemoteError, RemoteSharer
from c2c.remote.address import is_local
from c2c.remote.app import build_app
from c2c.remote.desk import Desk
from c2c.remote.limits import Limits
from c2c.remote.log import Log
from c2c.remote.order import Order
from c2c.remote.signature import Signer
from c2c.remote.stall import Stall
from c2c.tokens import left_pad
from remote_rig import make_server, serving, until
from test_remote_faults import request_of
from tiny import build, open_fusers, pair, pair_folders, tokenizer

TEXT = "The fox sleeps in a red house by the sea."
GREEDY = {"max_new_tokens": 6, "do_sample": False}
runner = CliRunner()


@pytest.fixture(scope="module")
def local():
    return open_fusers(pair(fuser_options={"rank": 8}))


def generated(model) -> list[int]:
    return model.generate(TEXT, **GREEDY).ids.tolist()


def through(local, url, **options) -> C2CModel:
    return C2CModel(local.receiver, [RemoteSharer(url, **options)], list(local.fusers))


# -- a server that is killed -------------------------------------------------------------------------------------------


@contextmanager
def process(prepare):
    """A server in a process of its own; ``prepare(sharer, stall)`` is called there once it has begun."""
    sharer = Sharer(build("qwen2", 2), tokenizer("llama3"), "qwen2")
    server, stall = make_server(sharer)

    def run():
        prepare(sharer, stall)
        server.run()
        os._exit(0)

    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    server._socket.close()  # the child has its own; what is open here would keep the port alive
    try:
        until(lambda: httpx.get(server.url + "/health").status_code == 200)
        yield server.url, child
    finally:
        child.kill()
        child.join()


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def dies_in_mid_prefill(sharer, stall):
    """After its first layer was sent."""

    def hook(*_):
        time.sleep(0.5)
        die()

    sharer.model.get_decoder().layers[1].register_forward_pre_hook(hook)


def dies_in_mid_body(sharer, stall):
    """Half of a layer's entries are out."""
    whole = stall.answer

    async def half(*arguments):
        async for piece in whole(*arguments):
            if len(piece) > 2000:
                yield piece[: len(piece) // 2]
                await asyncio.sleep(0.5)
                die()
            yield piece

    stall.answer = half


@pytest.mark.parametrize("death", [dies_in_mid_prefill, dies_in_mid_body])
@pytest.mark.parametrize("policy", ["raise", "receiver_only"])
def test_a_server_that_is_killed(local, death, policy):
    with process(death) as (url, child):
        model = through(local, url, retries=1, on_failure=policy)
        before = model.sharers[0].traffic.received
        if policy == "raise":
            with pytest.raises(RemoteError, match=r"no answer in 2 attempts") as caught:
                generated(model)
            assert caught.value.code == "unreachable"
        else:
            answer = model.generate(TEXT, **GREEDY)
            assert answer.ids.tolist() == local.receiver.answer(TEXT, **GREEDY).ids.tolist()
            assert answer.report.notes[0].startswith("receiver only: ")
        assert model.sharers[0].traffic.received - before > 1000  # it had begun to answer
        child.join(10)
        assert child.exitcode == -signal.SIGKILL


# -- a server that ends ------------------------------------------------------------------------------------------------


def slow(sharer, stall):
    for layer in sharer.model.get_decoder().layers:
        layer.register_forward_pre_hook(lambda *_: time.sleep(0.7))


def test_what_is_under_way_at_sigterm_is_finished(local):
    with process(slow) as (url, child):
        model, answers = through(local, url, retries=0), []
        thread = threading.Thread(target=lambda: answers.append(generated(model)))
        thread.start()
        until(lambda: httpx.get(url + "/health").json()["waiting"] == 1)
        os.kill(child.pid, signal.SIGTERM)
        thread.join(60)
        assert answers == [generated(local)]
        model.sharers[0].close()
        child.join(60)
        assert child.exitcode == 0
        with pytest.raises(RemoteError, match="no answer"):
            generated(through(local, url, retries=0))


# -- the command -------------------------------------------------------------------------------------------------------


def test_help_shows_examples():
    result = runner.invoke(app, ["share", "--help"])
    assert result.exit_code == 0
    assert "Examples" in result.output
    assert "c2c share qwen2.5-coder-0.5b" in result.output
    for option in ("--host", "--port", "--token", "--key-file", "--tls-cert", "--max-tokens", "--rate", "--precision"):
        assert option in result.output


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_an_address_that_others_reach_needs_a_token(host):
    result = runner.invoke(app, ["share", "/nowhere", "--host", host], env={"C2C_TOKEN": ""})
    assert result.exit_code == 2
    assert "without a token" in " ".join(result.output.replace("│", " ").split())
    with_token = runner.invoke(app, ["share", "/nowhere", "--host", host, "--token", "x"])
    assert isinstance(with_token.exception, C2CError)  # one step further: the model is looked for
    insecure = runner.invoke(app, ["share", "/nowhere", "--host", host, "--insecure"])
    assert isinstance(insecure.exception, C2CError)


def test_which_addresses_are_local():
    assert [is_local(host) for host in ("127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost")] == [True] * 5
    assert [is_local(host) for host in ("0.0.0.0", "::", "10.0.0.1", "example.org", "")] == [False] * 5


def test_an_empty_token_is_none():
    result = runner.invoke(app, ["share", "/nowhere", "--host", "0.0.0.0", "--token", ""])
    assert result.exit_code == 2
    assert "it is empty" in result.output


@pytest.mark.parametrize("layers", ["a", "1-", "-1", "1,,2", ""])
def test_layers_that_can_not_be_read(layers):
    result = runner.invoke(app, ["share", "/nowhere", "--layers", layers])
    assert result.exit_code == 2
    assert "can't be read" in result.output


def test_the_command_serves_and_ends(local, tmp_path_factory, tmp_path):
    """One process of the real command: token from the environment, key, layers, precision, log, SIGTERM."""
    receiver, sharer = pair_folders(tmp_path_factory.mktemp)
    small = C2CModel.from_models(receiver, sharer, fuser="memory", fuser_options={"slots": 2, "rank": 8})
    small.fusers[0].config.training = {"config": "none"}
    small.fusers[0].to(torch.bfloat16).save_pretrained(tmp_path / "fuser")  # stored in another type than it is used in
    key = tmp_path / "shared.key"
    key.write_text("0123456789abcdef0123456789abcdef\n")
    command = [sys.executable, "-m", "c2c", "share", sharer, "--port", "0", "--key-file", str(key)]
    command += ["--layers", "0-1,2", "--precision", "bfloat16", "--max-tokens", "300", "--rate", "0"]
    command += ["--fuser", str(tmp_path / "fuser")]
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"C2C_TOKEN": "sesame"}
    )
    try:
        line = child.stdout.readline()
        assert line.startswith(f"sharing {sharer} at http://127.0.0.1:")
        url = line.split(" at ")[1].strip()
        until(lambda: httpx.get(url + "/health").status_code == 200)
        with pytest.raises(RemoteError, match="bearer token"):
            RemoteSharer(url, key_file=key)
        remote = RemoteSharer(url, token="sesame", key_file=key)
        assert remote.precision == "bfloat16"
        model = C2CModel.from_models(receiver, remote)
        assert model.generate("Zebulon says hi", **GREEDY).report.fused_tokens > 0
        private = C2CModel.from_pretrained(tmp_path / "fuser", receiver=receiver, sharer=remote)
        answer = private.generate("Who says hi?", sharer_messages="Zebulon says hi to all of them", **GREEDY)
        assert answer.report.memory_slots == 2
        with pytest.raises(RemoteError, match="takes 300"):
            model.generate("word " * 100)
        remote.close()
        child.send_signal(signal.SIGTERM)
        _, log = child.communicate(timeout=60)
        assert child.returncode == 0
    finally:
        child.kill()
    entries = [json.loads(entry) for entry in log.splitlines() if entry.startswith("{")]
    assert [entry["status"] for entry in entries] == [401, 200, 200, 200, 413]
    assert [entry.get("kind") for entry in entries[1:4]] == ["hello", "prefill", "project"]
    assert "Zebulon" not in log
    assert "sesame" not in log


# -- binding and TLS ---------------------------------------------------------------------------------------------------


def test_a_port_that_is_taken(local):
    from c2c.remote.server import Server

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(C2CError, match=rf"can't listen on 127.0.0.1:{port}"):
            Server(None, "127.0.0.1", port)
    with pytest.raises(C2CError, match="both --tls-cert and --tls-key"):
        Server(None, "127.0.0.1", 0, cert="a")
    with pytest.raises(C2CError, match="TLS files a and b can't be used"):
        Server(None, "127.0.0.1", 0, cert="a", key="b")


def certificate(folder) -> tuple[Path, Path]:
    cert, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run(
        f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost "
        f"-addext subjectAltName=IP:127.0.0.1 -keyout {key} -out {cert}".split(),
        check=True,
        capture_output=True,
    )
    return cert, key


@contextmanager
def http2(sharer, cert, key):
    """The same application behind a server that offers HTTP/2; yields its address and the versions that were spoken."""
    from hypercorn.asyncio import serve
    from hypercorn.config import Config

    limits, signer, spoken = Limits(requests_per_minute=0), Signer(None), []
    inner = build_app(Stall(sharer, signer, limits), Desk((), signer, limits), Log(io.StringIO()))

    async def app(scope, receive, send):
        if scope["type"] == "http":
            spoken.append(scope["http_version"])
        await inner(scope, receive, send)

    listening = socket.create_server(("127.0.0.1", 0))
    port, config = listening.getsockname()[1], Config()
    config.bind, config.certfile, config.keyfile = [f"fd://{listening.detach()}"], str(cert), str(key)
    loop, over = asyncio.new_event_loop(), asyncio.Event()
    thread = threading.Thread(target=lambda: loop.run_until_complete(serve(app, config, shutdown_trigger=over.wait)))
    thread.start()
    try:
        yield f"https://127.0.0.1:{port}", spoken
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join(60)
        assert not thread.is_alive()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate with openssl")
def test_http2_where_the_other_side_offers_it(local, tmp_path):
    cert, key = certificate(tmp_path)
    with http2(local.sharers[0], cert, key) as (url, spoken):
        assert generated(through(local, url, verify=cert)) == generated(local)
    assert len(spoken) > 1
    assert set(spoken) == {"2"}


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate with openssl")
def test_tls(local, tmp_path):
    cert, key = certificate(tmp_path)
    with serving(local.sharers[0], tls=(cert, key), tokens=["t"]) as running:
        assert running.url.startswith("https://")
        assert generated(through(local, running.url, verify=cert, token="t")) == generated(local)
        assert generated(through(local, running.url, verify=False, token="t")) == generated(local)
        with pytest.raises(RemoteError, match="is not trusted") as caught:
            RemoteSharer(running.url, token="t")
        assert caught.value.code == "certificate"
        with pytest.raises(RemoteError, match="holds no certificates"):
            RemoteSharer(running.url, verify=tmp_path / "none.pem")
        with pytest.raises(RemoteError, match="no answer"):  # plain HTTP to a TLS port
            RemoteSharer(running.url.replace("https", "http"), retries=0)


# -- clients that do not play along ------------------------------------------------------------------------------------


def test_a_client_that_does_not_read_is_cut(local):
    with serving(local.sharers[0], limits=Limits(seconds=3.0, requests_per_minute=0)) as running:
        rows = [list(range(5, 505)) for _ in range(16)]
        order = Order(left_pad(rows, 0), 500, (0, 1, 2), tuple(torch.arange(500) for _ in rows), "float32")
        body = b"".join(request_of(local.sharers[0], Signer(None), **order.header(), tensors=order.tensors()))
        with socket.socket() as lazy:
            lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            lazy.connect(("127.0.0.1", running.port))
            lazy.sendall(b"POST /v1/share HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            entry = running.logged(1)[0]
            assert (entry["code"], entry["status"]) == ("cut", 200)
            assert 2.5 < entry["seconds"] < 10
            assert generated(through(local, running.url)) == generated(local)


def test_a_client_that_does_not_finish_its_request_is_cut(local):
    with serving(local.sharers[0], limits=Limits(seconds=1.0, requests_per_minute=0)) as running:
        with socket.create_connection(("127.0.0.1", running.port)) as slow_one:
            slow_one.sendall(b"POST /v1/share HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nC2C1")
            assert slow_one.recv(1 << 16).startswith(b"HTTP/1.1 408 ")
        assert generated(through(local, running.url)) == generated(local)
