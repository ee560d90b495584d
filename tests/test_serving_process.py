"""``c2c serve`` as a process: how it starts, and how it ends."""

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

from c2c import C2CModel
from c2c.cli import app
from serving_harness import PATIENCE, Running, user
from tiny import open_fusers, pair_folders


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


def of(folders) -> list[str]:
    """Options for these models."""
    return ["--receiver", folders[0], "--sharer", folders[1]]


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
        self.running = Running("", None, None)
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


def body(text: str, **fields) -> dict:
    return {"model": "pair", "messages": user(text), "max_tokens": 8, "temperature": 0} | fields


def test_sigterm_under_load_loses_nothing_that_was_accepted(folders):
    pair = C2CModel.from_models(*folders)
    texts = [f"hello there {number}" for number in range(12)]
    with serving(*of(folders), "--name", "pair", "--max-batch", "2") as process, ThreadPoolExecutor(12) as clients:
        server = process.running

        def ask(text):
            return server.post("/v1/chat/completions", json=body(text, stream=text.endswith("7")))

        futures = [clients.submit(ask, text) for text in texts]
        server.until(lambda: server.get("/health").json()["active"] == 12 or futures[0].done())
        process.popen.send_signal(signal.SIGTERM)
        server.until(lambda: process.event("draining"))
        assert process.event("draining")["active"] > 2, "the signal came while most of them were under way"
        late = server.post("/v1/chat/completions", json=body("late"))
        assert late.status_code == 503
        found = [future.result() for future in futures]
        assert [response.status_code for response in found] == [200] * 12
        for text, response in zip(texts, found, strict=True):
            expected = pair.generate(text, max_new_tokens=8, do_sample=False).text
            if text.endswith("7"):
                assert response.text.endswith("data: [DONE]\n\n")
            else:
                assert response.json()["choices"][0]["message"]["content"] == expected
        assert process.end() == 0
        assert process.event("stopped")["forced"] is False
        assert [line["status"] for line in process.log if line["event"] == "request"].count(200) == 12
        with pytest.raises(httpx.ConnectError):
            server.get("/health")


def test_a_second_signal_gives_up_what_is_under_way(folders):
    with serving(*of(folders), "--name", "pair") as process, ThreadPoolExecutor(2) as clients:
        server = process.running
        path = "/v1/chat/completions"
        whole = clients.submit(server.post, path, json=body("hello", max_tokens=470))
        stream = clients.submit(server.post, path, json=body("hello", max_tokens=470, stream=True))
        server.until(lambda: server.get("/health").json()["active"] == 2)
        process.popen.send_signal(signal.SIGINT)
        server.until(lambda: process.event("draining"))
        process.popen.send_signal(signal.SIGINT)
        assert process.end() == 1
        assert process.event("stopped")["forced"] is True
        assert whole.result().json()["error"]["code"] == "shutting_down"
        assert "shutting_down" in stream.result().text
        assert "[DONE]" not in stream.result().text


def test_an_idle_server_ends_with_0_and_said_only_json(folders):
    key = "from-the-environment"
    with serving(*of(folders), C2C_API_KEY=f"other, {key}") as process:
        server = process.running
        assert server.get("/v1/models").status_code == 401
        assert [card.id for card in server.client(key).models.list()] == [
            "c2c",
            "c2c/receiver",
            "c2c/sharer",
            "c2c/text",
        ]
        curl = shutil.which("curl")
        if curl:
            command = [curl, "-sN", f"{server.url}/v1/chat/completions", "-H", f"Authorization: Bearer {key}"]
            asked = json.dumps(body("hello", model="c2c", stream=True))
            said = subprocess.run([*command, "-d", asked], capture_output=True, text=True, timeout=PATIENCE)
            assert said.stdout.startswith("data: {")
            assert said.stdout.endswith("data: [DONE]\n\n")
        assert process.end(signal.SIGTERM) == 0
        assert key not in json.dumps(process.log)
        assert {line["event"] for line in process.log} == {"ready", "request", "draining", "stopped"}
        assert all("untrained" in line or not line.strip() or "answers equal" in line for line in process.other)


# -- a sharer on another machine ---------------------------------------------------------------------------------------


@contextmanager
def sharing(folder, *options, **environment):
    """`c2c share` of a model, as a process: where it is, and the process."""
    command = [sys.executable, "-m", "c2c", "share", folder, "--port", "0", *options]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=os.environ | environment
    )
    try:
        said = process.stdout.readline()
        assert " at http" in said
        yield said.split(" at ")[1].strip(), process
    finally:
        process.kill()
        process.wait(PATIENCE)
        process.stdout.close()


def test_a_sharer_that_is_killed_leaves_the_receiver(folders, fuser):
    folder, pair = fuser
    texts = ["hello", "who buys the red house?"]
    options = ["--on-failure", "receiver_only", "--sharer-timeout", "20", "--sharer-precision", "float32"]
    with (
        sharing(folders[1]) as (url, share),
        serving(folder, "--sharer", url, *options) as process,
        ThreadPoolExecutor(2) as clients,
    ):
        server = process.running

        def ask(text):
            return server.post("/v1/chat/completions", json=body(text, model="my-fuser")).json()

        for text, answer in zip(texts, clients.map(ask, texts), strict=True):
            assert answer["choices"][0]["message"]["content"] == (
                pair.generate(text, max_new_tokens=8, do_sample=False).text
            )
            assert "c2c" not in answer
        share.kill()
        share.wait(PATIENCE)
        for text, answer in zip(texts, clients.map(ask, texts), strict=True):
            assert answer["choices"][0]["message"]["content"] == (
                pair.receiver.answer(text, max_new_tokens=8, do_sample=False).text
            )
            assert answer["c2c"]["fallback"].startswith("receiver only: ")
        assert server.get("/health").json()["sharers"][0]["code"] == "unreachable"
        assert process.end(signal.SIGTERM) == 0
        assert [line["code"] for line in process.log if line["event"] == "sharer_lost"][:1] == ["unreachable"]
        assert [line.get("fallback") for line in process.log if line["event"] == "request"] == [None, None, True, True]


def test_a_wrong_token_is_found_before_anything_is_served(folders):
    with sharing(folders[1], C2C_TOKEN="right") as (url, _):
        command = [sys.executable, "-m", "c2c", "serve", "--receiver", folders[0], "--sharer", url, "--port", "0"]
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=PATIENCE, env=os.environ | {"C2C_TOKEN": "wrong"}
        )
    assert result.returncode == 1
    assert "API key" in result.stderr
    assert "Traceback" not in result.stderr


def certificate(folder, name: str, *options: str) -> tuple[str, str]:
    """A new key and a certificate for it: where they lie."""
    cert, key = str(folder / f"{name}.pem"), str(folder / f"{name}-key.pem")
    kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command = ["openssl", "req", "-x509", *kind, "-days", "2", "-subj", f"/CN={name}", "-keyout", key, "-out", cert]
    subprocess.run([*command, *options], check=True, capture_output=True)
    return cert, key


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes certificates with openssl")
def test_a_sharer_is_trusted_by_the_authority_that_was_named(folders, fuser, tmp_path):
    folder, pair = fuser
    authority = ["-addext", "keyUsage=critical,keyCertSign"]
    ours, ours_key = certificate(tmp_path, "ours", *authority)
    other, _ = certificate(tmp_path, "other", *authority)
    signed = ["-CA", ours, "-CAkey", ours_key, "-addext", "subjectAltName=IP:127.0.0.1"]
    cert, key = certificate(tmp_path, "sharer", *signed, "-addext", "basicConstraints=critical,CA:FALSE")
    with sharing(folders[1], "--tls-cert", cert, "--tls-key", key) as (url, _):
        assert url.startswith("https://")
        options = [folder, "--sharer", url, "--sharer-precision", "float32"]
        with serving(*options, "--sharer-ca", ours) as process:
            answer = process.running.post("/v1/chat/completions", json=body("hello", model="my-fuser")).json()
            assert answer["choices"][0]["message"]["content"] == (
                pair.generate("hello", max_new_tokens=8, do_sample=False).text
            )
            assert process.end(signal.SIGTERM) == 0
        nothing = str(tmp_path / "none.pem")
        for more, said in (
            (["--sharer-ca", other], f"the certificate of {url} is not trusted"),
            ([], f"the certificate of {url} is not trusted"),
            (["--sharer-ca", nothing], f"{nothing!r} holds no certificates"),
        ):
            command = [sys.executable, "-m", "c2c", "serve", *options, "--port", "0", *more]
            result = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
            assert result.returncode == 1
            error = " ".join(result.stderr.split())
            assert said in error
            assert "--sharer-ca" in error
            assert "Traceback" not in error


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--on-failure", "receiver_only"], "are for a sharer at a URL"),
        (["--sharer", "./folder", "--sharer-timeout", "3"], "got ./folder"),
        (["--sharer", "http://127.0.0.1:1", "--on-failure", "ignore"], "'ignore' is not one of"),
        (["one", "--fuser", "two"], "a fuser is given already: one"),
    ],
)
def test_options_that_do_not_go_together(options, said):
    result = CliRunner().invoke(app, ["serve", "--port", "0", *options])
    assert result.exit_code == 2
    assert said in " ".join(result.output.replace("│", " ").split())


# -- the command -------------------------------------------------------------------------------------------------------


def test_a_port_that_is_taken_is_one_message(folders):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "c2c", "serve", *of(folders), "--port", str(port)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert result.returncode == 1
    assert result.stderr.startswith(f"c2c: can't listen at 127.0.0.1:{port}")
    assert "--port" in result.stderr
    assert "Traceback" not in result.stderr


def test_missing_packages_are_named(monkeypatch):
    import importlib.util

    from c2c.cli import serve
    from c2c.serving.errors import MissingServerError

    real = importlib.util.find_spec
    monkeypatch.setattr(serve, "find_spec", lambda name: None if name == "uvicorn" else real(name))
    result = CliRunner().invoke(app, ["serve"])
    assert isinstance(result.exception, MissingServerError)
    assert "uvicorn" in str(result.exception)
    assert "pip install 'fastapi>=" in str(result.exception)


def test_help_shows_examples_and_imports_nothing_heavy():
    result = CliRunner().invoke(app, ["serve", "--help"])
    assert result.exit_code == 0
    assert "Examples" in result.output
    assert "c2c serve" in result.output
    heavy = "{'torch', 'fastapi', 'uvicorn', 'prometheus_client'}"
    code = f"import sys, c2c.cli; assert not {heavy} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
