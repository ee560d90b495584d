"""Two programs with plain OpenAI clients and one server: A has a document, B has a question.

A posts the document once, and passes on an id of a few bytes. B asks with the id; it never sees the document, nor
does the model that answers read it again. Any framework whose client sends further fields of a request can do
the same (`extra_body` here).

    c2c pull qwen2.5-coder-0.5b
    pip install openai
    python examples/openai_two_clients.py
    python examples/openai_two_clients.py --url http://127.0.0.1:8000 --model NAME   # a server that runs already
"""

from __future__ import annotations

import argparse
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import httpx
import openai

DOCUMENT = (
    "The lighthouse of Grey Point was built in 1884 by the engineer Mary Ellison. Its lamp burned whale oil until "
    "1911. Then a dynamo was installed. The keeper's house beside it is painted green, and is now a museum of the "
    "herring trade. The museum opens on Sundays."
)
QUESTIONS = ("Who built the lighthouse of Grey Point?", "What colour is the keeper's house?")


class ClientA:
    """Has a document."""

    def __init__(self, url: str, key: str) -> None:
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key=key)

    def hand_over(self, document: str) -> str:
        """Let the server's sharer read the document; return the id of what it has read."""
        made: Any = self.client.post("/c2c/handoffs", body={"messages": document}, cast_to=object)
        print(f"A: {made['tokens']} tokens were read, {made['bytes'] / 1e6:.1f} MB are kept as {made['id']}")
        return str(made["id"])


class ClientB:
    """Has questions."""

    def __init__(self, url: str, key: str, model: str) -> None:
        self.client, self.model = openai.OpenAI(base_url=f"{url}/v1", api_key=key), model

    def ask(self, question: str, handoff: str | None) -> str:
        """Ask, with what A has handed over or without."""
        answer = self.client.chat.completions.create(
            model=self.model,
            messages=[{"role": "user", "content": question}],
            temperature=0,
            max_tokens=24,
            extra_body={"c2c": {"handoff": handoff}} if handoff else None,
        )
        return str(answer.choices[0].message.content).strip()


@contextmanager
def server(receiver: str, sharer: str, dtype: str) -> Iterator[str]:
    """Run ``c2c serve`` on a free port; yields its address once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    models = ["--receiver", receiver, "--sharer", sharer, "--dtype", dtype, "--name", "pair"]
    process = subprocess.Popen([sys.executable, "-m", "c2c", "serve", *models, "--port", str(port)])
    url = f"http://127.0.0.1:{port}"
    try:
        while process.poll() is None:
            try:
                if httpx.get(f"{url}/health", timeout=5).is_success:
                    break
            except httpx.HTTPError:
                time.sleep(0.5)
        else:
            raise SystemExit("the server has ended; its message is above.")
        yield url
    finally:
        process.terminate()
        process.wait()


def main() -> None:
    """Hand a document over from one client to another."""
    arguments = _arguments()
    document = Path(arguments.document).read_text(encoding="utf-8") if arguments.document else DOCUMENT
    models = (arguments.receiver, arguments.sharer, arguments.dtype)
    with nullcontext(arguments.url) if arguments.url else server(*models) as url:
        a, b = ClientA(url, arguments.key), ClientB(url, arguments.key, arguments.model)
        handoff = a.hand_over(document)
        for question in arguments.question or QUESTIONS:
            print(f"B: {question}")
            print(f"   with the id:    {b.ask(question, handoff)}")
            print(f"   without the id: {b.ask(question, None)}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--receiver", default="qwen2.5-coder-0.5b")
    parser.add_argument("--sharer", default="qwen2.5-coder-0.5b")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--url", help="of a server that runs; by default one is started with these models")
    parser.add_argument("--model", default="pair", help="name of the pair on that server")
    parser.add_argument("--key", default="any", help="API key of that server")
    parser.add_argument("--document", help="a text file")
    parser.add_argument("--question", action="append", help="may be given several times")
    return parser.parse_args()


if __name__ == "__main__":
    main()
