"""A real server on a free port, in a thread, and what tests send to it."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event, Thread

import httpx
import openai

from c2c import C2CModel
from c2c.serving.app import create_app
from c2c.serving.config import ServeConfig
from c2c.serving.http_server import Server, listen, url_of
from c2c.serving.transformers_engine import TransformersEngine
from tiny import open_fusers, pair

NAME = "tiny"
PATIENCE = 120.0  # seconds; other work may have the machine


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def model() -> C2CModel:
    """A tiny pair whose fuser really changes the cache."""
    made = open_fusers(pair())
    made.fusers[0].config.training = {"config": "random"}
    return made


@dataclass
class Running:
    """A server that runs."""

    url: str
    state: object
    engine: object
    server: Server

    def post(self, path: str, **kwargs) -> httpx.Response:
        return httpx.post(self.url + path, **{"timeout": PATIENCE, **kwargs})

    def get(self, path: str, **kwargs) -> httpx.Response:
        return httpx.get(self.url + path, timeout=PATIENCE, **kwargs)

    def chat(self, text="hello there", model=NAME, timeout=PATIENCE, headers=None, **fields) -> httpx.Response:
        body = {"model": model, "messages": user(text), "max_tokens": 6, "temperature": 0} | fields
        body = {k: v for k, v in body.items() if v is not ...}
        return self.post("/v1/chat/completions", json=body, timeout=timeout, headers=headers)

    def chat_all(self, texts, **fields) -> list[httpx.Response]:
        """Responses to chats that are sent at once."""
        with ThreadPoolExecutor(len(texts)) as clients:
            return list(clients.map(lambda text: self.chat(text, **fields), texts))

    def client(self, key="any") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=PATIENCE)

    def metric(self, name: str, **labels: str) -> float:
        """Sum of a metric's samples with these labels."""
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        lines = [line for line in self.get("/metrics").text.splitlines() if line.startswith((name + "{", name + " "))]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if all(label in line for label in wanted))

    def until(self, condition) -> None:
        until(condition)


def until(condition) -> None:
    """Wait until something holds."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it never came to hold"
        time.sleep(0.01)


@contextmanager
def started(app, config):
    """Run a server in a thread: its address, and the server."""
    sock, server = listen("127.0.0.1", 0), Server(app, config)
    thread = Thread(target=server.run, args=([sock],), daemon=True)
    thread.start()
    try:
        until(lambda: server.started)
        yield url_of(sock, config), server
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        assert not thread.is_alive(), "the server did not end"


@contextmanager
def running(model_, *, engine=None, window=0.01, **options):
    """Serve a model, or an engine of its own."""
    config = ServeConfig(**{"name": NAME, "message_tokens": 6, "batch_window_ms": 1000 * window, **options})
    engine = engine or TransformersEngine(model_, config)
    app = create_app(engine, config)
    with started(app, config) as (url, server):
        yield Running(url, app.state.server, engine, server)


@contextmanager
def held(model_, after: int = 0):
    """Let so many forward passes of the receiver go by, and hold the next one until the event is set."""
    gate, passes = Event(), []

    def wait(*_):
        passes.append(1)
        if len(passes) > after:
            gate.wait(PATIENCE)

    hook = model_.receiver.model.register_forward_pre_hook(wait)
    try:
        yield gate
    finally:
        gate.set()
        hook.remove()


def text_of(response: httpx.Response) -> str:
    """The only answer."""
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


def stop(server: Server) -> None:
    """Do what a signal does."""
    next(iter(server.servers)).get_loop().call_soon_threadsafe(server.stop)


def error_of(response: httpx.Response) -> dict:
    """The error of a response, with its status."""
    data = response.json()
    assert set(data) == {"error"}
    assert set(data["error"]) == {"message", "type", "param", "code"}
    return data["error"] | {"status": response.status_code}


def events(response_text: str) -> list:
    """The data of server-sent events."""
    lines = [line.removeprefix("data: ") for line in response_text.split("\n\n") if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def streamed(response: httpx.Response) -> list[str]:
    """The texts of all answers of a stream."""
    texts: dict[int, str] = {}
    for chunk in events(response.text)[:-1]:
        for choice in chunk["choices"]:
            piece = choice["delta"].get("content") or "" if "delta" in choice else choice["text"]
            texts[choice["index"]] = texts.get(choice["index"], "") + piece
    return [texts[index] for index in sorted(texts)]
