"""The server as a process: the command, TLS, how it ends, and what a client sees when it is killed."""

from __future__ import annotations

import asyncio
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
from c2c.remote import RemoteError, RemoteSharer
from c2c.remote.config import ShareConfig
from c2c.remote.protocol import PREFILL_PATH
from c2c.remote.server import PrefillJob
from c2c.sharer import Sharer
from remote_rig import KEY, make_server, serving, until
from test_remote_faults import GREEDY, TEXT, generated, request_of, through
from tiny import build, open_fusers, pair, pair_folders, tokenizer

runner = CliRunner()


@pytest.fixture(scope="module")
def local():
    return open_fusers(pair(fuser_options={"rank": 8}))


# -- a server that is killed, and one that ends ------------------------------------------------------------------------


@contextmanager
def process(prepare):
    """A server in a process of its own; ``prepare(sharer)`` is called there once it has begun."""
    sharer = Sharer(build("qwen2", 2), tokenizer("llama3"), "qwen2")
    server, sock, *_ = make_server(sharer)
    url = f"http://127.0.0.1:{sock.getsockname()[1]}"

    def run():
        prepare(sharer)
        server.run([sock])
        os._exit(0)

    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    sock.close()  # the child has its own; what is open here would keep the port alive
    try:
        until(lambda: httpx.get(url + "/health").status_code == 200)
        yield url, child
    finally:
        child.kill()
        child.join()


def dies_in_mid_prefill(sharer):
    """After its first layer was sent."""

    def hook(*_):
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)

    sharer.model.get_decoder().layers[1].register_forward_pre_hook(hook)


def dies_in_mid_body(sharer):
    """Half of a layer's entries are out."""
    whole = PrefillJob.records

    async def half(*arguments):
        async for piece in whole(*arguments):
            if len(piece) > 2000:
                yield piece[: len(piece) // 2]
                await asyncio.sleep(0.5)
                os.kill(os.getpid(), signal.SIGKILL)
            yield piece

    PrefillJob.records = half


@pytest.mark.slow
@pytest.mark.parametrize("death", [dies_in_mid_prefill, dies_in_mid_body])
@pytest.mark.parametrize("policy", ["raise", "receiver_only"])
def test_a_server_that_is_killed(local, death, policy):
    with process(death) as (url, child):
        model = through(local, url, retries=1, on_failure=policy)
        before = model.sharers[0].traffic.received
        if policy == "raise":
            with pytest.raises(RemoteError, match="2 attempts") as caught:
                generated(model)
            assert caught.value.code == "unreachable"
        else:
            answer = model.generate(TEXT, **GREEDY)
            assert answer.ids.tolist() == local.receiver.answer(TEXT, **GREEDY).ids.tolist()
            assert answer.report.notes[0].startswith("receiver only: ")
        assert model.sharers[0].traffic.received - before > 500, "it had begun to answer"
        child.join(10)
        assert child.exitcode == -signal.SIGKILL


@pytest.mark.slow
def test_what_is_under_way_at_sigterm_is_finished(local):
    def slow(sharer):
        for layer in sharer.model.get_decoder().layers:
            layer.register_forward_pre_hook(lambda *_: time.sleep(0.7))

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


# -- the command -------------------------------------------------------------------------------------------------------


def test_help_shows_examples_and_options():
    result = runner.invoke(app, ["share", "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert "c2c share qwen2.5-coder-0.5b" in result.output
    options = "host port token key-file tls-cert tls-key tls-client-ca insecure max-tokens max-body-kb rate timeout"
    for option in [*options.split(), "waiting", "precision", "layers", "fuser", "dtype", "device"]:
        assert f"--{option}" in result.output


def test_an_address_that_others_reach_needs_a_token():
    command = ["share", "/nowhere", "--host", "0.0.0.0", "--port", "0"]
    result = runner.invoke(app, command, env={"C2C_TOKEN": ""})
    assert isinstance(result.exception, C2CError)
    assert "C2C_TOKEN" in str(result.exception)
    for more in (["--token", "x"], ["--insecure"]):
        result = runner.invoke(app, [*command, *more], env={"C2C_TOKEN": ""})
        assert "/nowhere" in str(result.exception), "one step further: the model is looked for"
    result = runner.invoke(app, [*command, "--token", ""])
    assert "empty" in str(result.exception)


@pytest.mark.parametrize("layers", ["a", "1-", "-1", "1,,2", ""])
def test_layers_that_can_not_be_read(layers):
    with pytest.raises(C2CError, match="can't be read"):
        ShareConfig(layers=layers).layer_list()
    assert ShareConfig(layers="0-2,5").layer_list() == [0, 1, 2, 5]


@pytest.mark.slow
def test_the_command_serves_and_ends(local, tmp_path_factory, tmp_path):
    """One process of the real command: keys of environment and file, layers, precision, fuser, log, SIGTERM."""
    receiver, sharer = pair_folders(tmp_path_factory.mktemp)
    small = C2CModel.from_models(receiver, sharer, fuser="memory", fuser_options={"slots": 2, "rank": 8})
    small.fusers[0].config.training = {"config": "none"}
    small.fusers[0].to(torch.bfloat16).save_pretrained(tmp_path / "fuser")  # stored in another type than it is used in
    key = tmp_path / "shared.key"
    key.write_text(KEY + "\n")
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
        with pytest.raises(RemoteError, match="API key"):
            RemoteSharer(url)
        remote = RemoteSharer(url, token="sesame")
        assert remote.precision == "bfloat16"
        model = C2CModel.from_models(receiver, remote)
        assert model.generate("Zebulon says hi", **GREEDY).report.fused_tokens > 0
        private = C2CModel.from_pretrained(
            tmp_path / "fuser", receiver=receiver, sharer=RemoteSharer(url, key_file=key)
        )
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
    lines = [json.loads(entry) for entry in log.splitlines() if entry.startswith("{")]
    entries = [entry for entry in lines if entry["event"] == "request"]
    assert [entry["status"] for entry in entries] == [401, 200, 200, 200, 200, 413]
    assert [entry.get("kind") for entry in entries[1:5]] == ["handshake", "prefill", "handshake", "project"]
    assert {"rows", "tokens", "layers", "bytes", "seconds", "owner", "request_id"} <= set(entries[2])
    assert not any(secret in log for secret in ("Zebulon", "sesame", KEY))


# -- health and TLS ----------------------------------------------------------------------------------------------------


def test_health_tells_nothing_of_the_model(local):
    with serving(local.sharers[0]) as running:
        answer = httpx.get(running.url + "/health").json()
        assert answer["status"] == "ok"
        assert set(answer) == {"status", "version", "waiting"}
        for path in ("/docs", "/openapi.json", "/v1/other"):
            assert httpx.get(running.url + path).status_code == 404


def certificate(folder) -> tuple[Path, Path]:
    cert, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run(
        f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost "
        f"-addext subjectAltName=IP:127.0.0.1 -keyout {key} -out {cert}".split(),
        check=True,
        capture_output=True,
    )
    return cert, key


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate with openssl")
def test_tls_and_client_certificates(local, tmp_path, monkeypatch):
    cert, key = certificate(tmp_path)
    own = tmp_path / "own.pem"
    own.write_bytes(cert.read_bytes() + key.read_bytes())
    with serving(local.sharers[0], tls_cert=cert, tls_key=key, api_key=["t"]) as running:
        assert running.url.startswith("https://")
        assert generated(through(local, running.url, verify=cert, token="t")) == generated(local)
        assert generated(through(local, running.url, verify=False, token="t")) == generated(local)
        with pytest.raises(RemoteError, match="not trusted") as caught:
            RemoteSharer(running.url, token="t")
        assert caught.value.code == "certificate"
        with pytest.raises(RemoteError, match="no certificates"):
            RemoteSharer(running.url, verify=tmp_path / "none.pem")
        with pytest.raises(RemoteError, match="no answer"):  # plain HTTP to a TLS port
            RemoteSharer(running.url.replace("https", "http"), retries=0)
    with serving(local.sharers[0], tls_cert=cert, tls_key=key, tls_client_ca=cert) as running:
        with pytest.raises(RemoteError):
            RemoteSharer(running.url, verify=cert, retries=0)
        assert generated(through(local, running.url, verify=False, client_cert=own)) == generated(local)
        monkeypatch.setenv("C2C_CLIENT_CERT", str(own))
        assert generated(through(local, running.url, verify=cert)) == generated(local)


# -- clients that do not play along ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_client_that_does_not_read_is_cut(local):
    with serving(local.sharers[0], timeout=2.0) as running:
        rows = [list(range(5, 505)) for _ in range(16)]
        wanted = {"ids": rows, "stop": 500, "columns": [list(range(500))] * 16}
        body = json.dumps(request_of(local.sharers[0], **wanted)).encode()
        head = b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n" % PREFILL_PATH.encode()
        with socket.socket() as lazy:
            lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            lazy.connect(("127.0.0.1", running.port))
            lazy.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            entry = running.logged(1)[0]
            assert (entry["code"], entry["status"]) == ("cut", 200)
            assert 1.5 < entry["seconds"] < 10
            assert generated(through(local, running.url)) == generated(local)
