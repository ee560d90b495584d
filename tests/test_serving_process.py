"""``c2c serve`` as a process: how it starts, how it ends, and what its options refuse."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Thread

import httpx
import pytest
from typer.testing import CliRunner

from c2c import C2CModel, connect
from c2c.cli import app
from serving_harness import PATIENCE, Running, error_of, text_of, user
from tiny import open_fusers, pair_folders

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return pair_folders(tmp_path_factory.mktemp)


@pytest.fixture(scope="module")
def fuser(folders, tmp_path_factory):
    """The folder of a fuser that really changes the cache, and the pair with it."""
    made = open_fusers(C2CModel.from_models(*folders))
    folder = tmp_path_factory.mktemp("fusers") / "my-fuser"
    made.save_pretrained(folder)
    return str(folder), made


class Process:
    """A server in a process of its own, and its log."""

    def __init__(self, *options, **environment):
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "c2c", "serve", "--port", "0", *options],
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | environment,
        )
        self.log: list[dict] = []
        self.other: list[str] = []
        self._reader = Thread(target=self._read, daemon=True)
        self._reader.start()
        self.running = Running("", None, None, None)
        try:
            self.running.until(lambda: self.event("ready") or self.popen.poll() is not None)
        except AssertionError:
            self.popen.kill()
            raise
        ready = self.event("ready")
        assert ready is not None, self.other
        self.running.url = ready["url"]

    def _read(self):
        for line in self.popen.stderr:
            try:
                self.log.append(json.loads(line))
            except ValueError:
                self.other.append(line)

    def event(self, name: str) -> dict | None:
        return next((line for line in self.log if line["event"] == name), None)

    def end(self, number: signal.Signals | None = None) -> int:
        """Send a signal, and wait for the exit code."""
        if number is not None:
            self.popen.send_signal(number)
        code = self.popen.wait(PATIENCE)
        self._reader.join(PATIENCE)
        return code


@contextmanager
def serving(*options, **environment):
    process = Process(*options, **environment)
    try:
        yield process
    finally:
        process.popen.kill()
        process.end()


@pytest.mark.slow
def test_sigterm_under_load_loses_nothing_that_was_accepted(folders):
    pair, texts = connect(*folders), [f"hello there {number}" for number in range(12)]
    options = ["--receiver", folders[0], "--sharer", folders[1], "--name", "pair", "--max-batch", "2"]
    with serving(*options) as process, ThreadPoolExecutor(12) as clients:
        server = process.running
        futures = [clients.submit(server.chat, text, "pair", max_tokens=8, stream=text.endswith("7")) for text in texts]
        server.until(lambda: server.get("/health").json()["active"] == 12 or futures[0].done())
        process.popen.send_signal(signal.SIGTERM)
        server.until(lambda: process.event("draining"))
        assert process.event("draining")["active"] > 2, "the signal came while most of them were under way"
        assert server.chat(model="pair").status_code == 503
        for text, future in zip(texts, futures, strict=True):
            if text.endswith("7"):
                assert future.result().text.endswith("data: [DONE]\n\n")
            else:
                expected = pair.generate(text, max_new_tokens=8, do_sample=False).text
                assert text_of(future.result()) == expected
        assert process.end() == 0
        assert process.event("stopped")["forced"] is False
        assert [line["status"] for line in process.log if line["event"] == "request"].count(200) == 12
        with pytest.raises(httpx.ConnectError):
            server.get("/health")


@pytest.mark.slow
def test_a_second_signal_gives_up_what_is_under_way(folders):
    options = ["--receiver", folders[0], "--sharer", folders[1], "--name", "pair"]
    with serving(*options) as process, ThreadPoolExecutor(2) as clients:
        server = process.running
        whole, stream = (
            clients.submit(server.chat, "hello", "pair/receiver", max_tokens=470, stream=stream)
            for stream in (False, True)
        )
        server.until(lambda: server.get("/health").json()["active"] == 2)
        process.popen.send_signal(signal.SIGINT)
        server.until(lambda: process.event("draining"))
        process.popen.send_signal(signal.SIGINT)
        assert process.end() == 1
        assert process.event("stopped")["forced"] is True
        assert error_of(whole.result())["code"] == "shutting_down"
        assert "shutting_down" in stream.result().text
        assert "[DONE]" not in stream.result().text


@pytest.mark.slow
def test_an_idle_server_ends_with_0_and_logs_only_json(folders):
    key = "from-the-environment"
    options = ["--receiver", folders[0], "--sharer", folders[1]]
    with serving(*options, C2C_API_KEY=f"other, {key}") as process:
        server = process.running
        assert server.get("/v1/models").status_code == 401
        models = [card.id for card in server.client(key).models.list()]
        assert models == ["c2c", "c2c/receiver", "c2c/sharer", "c2c/text"]
        if curl := shutil.which("curl"):
            headers = ["-H", f"Authorization: Bearer {key}", "-H", "Content-Type: application/json"]
            body = json.dumps({"model": "c2c", "messages": user("hello"), "max_tokens": 4, "stream": True})
            command = [curl, "-sN", server.url + CHAT, *headers, "-d", body]
            out = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE).stdout
            assert out.startswith("data: {")
            assert out.endswith("data: [DONE]\n\n")
        assert process.end(signal.SIGTERM) == 0
        assert key not in json.dumps(process.log)
        assert {line["event"] for line in process.log} == {"ready", "request", "draining", "stopped"}
        assert all(line.startswith("method: ") or not line.strip() for line in process.other)


# -- a sharer on another machine ---------------------------------------------------------------------------------------


@contextmanager
def sharing(folder, *options):
    """`c2c share` of a model, as a process: its address, and the process."""
    command = [sys.executable, "-m", "c2c", "share", folder, "--port", "0", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        yield process.stdout.readline().split(" at ")[1].strip(), process
    finally:
        process.kill()
        process.wait(PATIENCE)
        process.stdout.close()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes certificates with openssl")
def test_a_sharer_that_is_killed_leaves_the_receiver(folders, fuser, tmp_path):
    cert, key = str(tmp_path / "cert.pem"), str(tmp_path / "key.pem")
    make = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=here"
    made = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", cert]
    subprocess.run(["openssl", *make.split(), *made], check=True, capture_output=True)
    folder, pair = fuser
    texts = ["hello", "who buys the red house?"]
    options = ["--on-failure", "receiver_only", "--sharer-timeout", "20", "--sharer-precision", "float32"]
    with sharing(folders[1], "--tls-cert", cert, "--tls-key", key) as (url, share):
        command = [sys.executable, "-m", "c2c", "serve", folder, "--sharer", url, "--port", "0"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
        assert result.returncode == 1
        assert "not trusted" in " ".join(result.stderr.split())
        assert "Traceback" not in result.stderr
        with serving(folder, "--sharer", url, "--sharer-ca", cert, *options) as process:
            server = process.running
            for text, answer in zip(texts, server.chat_all(texts, model="my-fuser", max_tokens=8), strict=True):
                assert text_of(answer) == pair.generate(text, max_new_tokens=8, do_sample=False).text
                assert "c2c" not in answer.json()
            share.kill()
            share.wait(PATIENCE)
            for text, answer in zip(texts, server.chat_all(texts, model="my-fuser", max_tokens=8), strict=True):
                assert text_of(answer) == pair.receiver.answer(text, max_new_tokens=8, do_sample=False).text
                assert answer.json()["c2c"]["fallback"].startswith("receiver only: ")
            assert server.get("/health").json()["sharers"][0]["code"] == "unreachable"
            assert process.end(signal.SIGTERM) == 0
            assert [line["code"] for line in process.log if line["event"] == "sharer_lost"][:1] == ["unreachable"]
            assert [line.get("fallbacks") for line in process.log if line["event"] == "request"] == [None, None, 1, 1]


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--on-failure", "receiver_only"], "are for a sharer at a URL"),
        (["--sharer", "./folder", "--sharer-timeout", "3"], "got ./folder"),
        (["--sharer", "http://127.0.0.1:1", "--on-failure", "ignore"], "'ignore' is not one of"),
        (["one", "--fuser", "two"], "a fuser is given already: one"),
        (["--engine-option", "max_model_len=64"], "--engine vllm"),
        (["--sharer-engine", "vllm"], "--engine vllm"),
    ],
)
def test_options_that_do_not_go_together(options, message):
    result = CliRunner().invoke(app, ["serve", "--port", "0", *options])
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())


def test_a_port_that_is_taken_is_one_message():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        result = CliRunner().invoke(app, ["serve", "nowhere", "--port", port])
    assert f"can't listen at 127.0.0.1:{port}" in str(result.exception)
    assert "--port" in str(result.exception)


def test_missing_packages_are_named(monkeypatch):
    import importlib.util

    from c2c.cli import serve
    from c2c.serving.errors import MissingServerError

    real = importlib.util.find_spec
    monkeypatch.setattr(serve, "find_spec", lambda name: None if name == "uvicorn" else real(name))
    result = CliRunner().invoke(app, ["serve"])
    assert isinstance(result.exception, MissingServerError)
    assert "uvicorn" in str(result.exception)


def test_help_shows_examples_and_imports_nothing_heavy():
    result = CliRunner().invoke(app, ["serve", "--help"])
    assert result.exit_code == 0
    assert "Examples" in result.output
    heavy = "{'torch', 'fastapi', 'uvicorn', 'prometheus_client'}"
    code = f"import sys, c2c.cli; assert not {heavy} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
