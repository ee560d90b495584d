"""What a server does under load: requests per second and times to the first token, by way and number of clients.

The server runs in a process of its own. Clients are real ones, over HTTP, in a closed loop: each sends its next request
when it has its answer. All ways are measured in one run, and every answer is compared to the one that the same request
got alone.

    python benchmarks/serve.py                                  # the fuser of the zoo; its models must be pulled
    python benchmarks/serve.py --tiny --clients 1 4 16 64       # random models, nothing to download
    python benchmarks/serve.py --tiny --clients 4 --soak 300    # then five minutes of mixed load, watching memory
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from rich.console import Console
from rich.table import Table

FUSER = Path(__file__).parent.parent / "zoo" / "smollm2-135m_from_qwen2.5-coder-1.5b"
NAME = "pair"
WAYS = {"receiver": f"{NAME}/receiver", "c2c": NAME, "text": f"{NAME}/text", "sharer": f"{NAME}/sharer"}
WORDS = ("copper", "river", "lamp", "plant", "music", "stone", "winter", "engine", "honey", "paper", "glass", "island")
START = 600.0  # seconds that a server may take to load its models


@dataclass(frozen=True)
class Answer:
    """What one request got.

    Attributes:
        text: the answer; None if it failed.
        first: seconds to the first text.
        total: seconds to the end.
        tokens: of the answer.
    """

    text: str | None
    first: float
    total: float
    tokens: int


def main() -> None:
    """Run and print."""
    arguments = _arguments()
    with _server(arguments) as (url, process):
        prompts = _prompts(arguments.prompts, arguments.seed)
        result = asyncio.run(_measure(url, prompts, arguments))
        if arguments.soak:
            result["soak"] = asyncio.run(_soak(url, prompts, process.pid, arguments))
        process.send_signal(signal.SIGTERM)
        result["exit_code"] = process.wait(arguments.timeout)
    result |= {"settings": _settings(arguments), "machine": f"{platform.machine()}, {os.cpu_count()} cores"}
    _show(result)
    if arguments.json:
        print(json.dumps(result))


# -- load --------------------------------------------------------------------------------------------------------------


async def _measure(url: str, prompts: list[str], arguments: argparse.Namespace) -> dict:
    """Every request alone, then all levels of load."""
    async with _client(url, arguments) as client:
        singles = {}
        for way in arguments.ways:
            await _ask(client, way, prompts[0], arguments)  # warm-up
            singles |= {(way, prompt): (await _ask(client, way, prompt, arguments)).text for prompt in prompts}
        if None in singles.values():
            raise SystemExit("a request failed although it was alone; see the server's log above.")
        levels = []
        for clients in arguments.clients:
            for way in arguments.ways:
                levels.append(await _level(client, way, clients, prompts, singles, arguments))
    return {"levels": levels, "singles": len(singles), "differing": sum(level["differing"] for level in levels)}


async def _level(client: httpx.AsyncClient, way: str, clients: int, prompts: list, singles: dict, arguments) -> dict:
    """So many clients, each asking again and again until all requests are done."""
    count = max(arguments.requests, clients)
    work = itertools.islice(itertools.cycle(prompts), count)
    answers: list[tuple[str, Answer]] = []

    async def one_client() -> None:
        for prompt in work:  # one iterator for all clients
            answers.append((prompt, await _ask(client, way, prompt, arguments)))

    began = time.perf_counter()
    await asyncio.gather(*(one_client() for _ in range(clients)))
    seconds = time.perf_counter() - began
    good = [answer for _, answer in answers if answer.text is not None]
    return {
        "way": way,
        "clients": clients,
        "requests": count,
        "failed": count - len(good),
        "differing": sum(a.text is not None and a.text != singles[way, prompt] for prompt, a in answers),
        "requests_per_second": round(len(good) / seconds, 3),
        "tokens_per_second": round(sum(answer.tokens for answer in good) / seconds, 2),
        "first_token_seconds": _percentiles([answer.first for answer in good]),
        "seconds": _percentiles([answer.total for answer in good]),
    }


async def _ask(client: httpx.AsyncClient, way: str, prompt: str, arguments: argparse.Namespace) -> Answer:
    """One request, streamed."""
    body = {
        "model": WAYS[way],
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": arguments.max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    began, first, text, tokens, whole = time.perf_counter(), None, "", 0, False
    try:
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                print(f"{way}: {response.status_code} {(await response.aread()).decode()}", file=sys.stderr)
            async for line in response.aiter_lines():
                whole = whole or line == "data: [DONE]"
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                pieces = [choice["delta"].get("content", "") for choice in chunk.get("choices", [])]
                if first is None and any(pieces):
                    first = time.perf_counter() - began
                text += "".join(pieces)
                tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
    except httpx.HTTPError as error:
        print(f"{way}: {error!r}", file=sys.stderr)
        whole = False
    total = time.perf_counter() - began
    return Answer(text if whole else None, first or total, total, tokens)


async def _soak(url: str, prompts: list[str], pid: int, arguments: argparse.Namespace) -> dict:
    """Mixed load for a while; how the server's memory goes."""
    until = time.monotonic() + arguments.soak
    rng, memory, counts = random.Random(arguments.seed), [], {"requests": 0, "failed": 0}

    async def one_client(client: httpx.AsyncClient) -> None:
        while time.monotonic() < until:
            answer = await _ask(client, rng.choice(arguments.ways), rng.choice(prompts), arguments)
            counts["requests"] += 1
            counts["failed"] += answer.text is None

    async def watch() -> None:
        while time.monotonic() < until:
            memory.append(_rss_mb(pid))
            await asyncio.sleep(1)

    async with _client(url, arguments) as client:
        await asyncio.gather(watch(), *(one_client(client) for _ in range(max(arguments.clients))))
    fifth = max(len(memory) // 5, 1)
    fifths = [statistics.median(memory[start : start + fifth]) for start in range(0, len(memory), fifth)]
    return counts | {"seconds": arguments.soak, "rss_mb": [round(value, 1) for value in fifths[:5]]}


def _rss_mb(pid: int) -> float:
    """Resident memory of a process; Linux only."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


# -- server ------------------------------------------------------------------------------------------------------------


@contextmanager
def _server(arguments: argparse.Namespace) -> Iterator[tuple[str, subprocess.Popen]]:
    """A server in a process of its own; its log goes where ours goes, requests left out."""
    with tempfile.TemporaryDirectory() as folder:
        models = _tiny(Path(folder)) if arguments.tiny else ["--fuser", str(arguments.fuser)]
        command = [sys.executable, "-m", "c2c", "serve", *models, "--name", NAME, "--port", "0"]
        command += ["--max-queue", str(2 * max(arguments.clients)), "--max-batch", str(arguments.max_batch)]
        command += ["--timeout", str(arguments.timeout), "--batch-window-ms", str(arguments.batch_window_ms)]
        command += ["--message-tokens", str(arguments.message_tokens)]
        log_path = Path(folder) / "log"
        with log_path.open("w") as log:
            process = subprocess.Popen(command, stderr=log)
        try:
            yield _url(process, log_path), process
        finally:
            process.kill()
            process.wait()


def _url(process: subprocess.Popen, log: Path) -> str:
    """Where the server listens, once it does."""
    until = time.monotonic() + START
    while time.monotonic() < until and process.poll() is None:
        for line in log.read_text().splitlines():
            if '"event": "ready"' in line:
                return json.loads(line)["url"]
        time.sleep(0.1)
    raise SystemExit(f"the server did not start:\n{log.read_text()}")


def _tiny(folder: Path) -> list[str]:
    """Random models of two families with a tokenizer of characters, as options of the server."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    letters = [*(chr(code) for code in range(33, 127)), "\u0120", "\u010a"]  # ASCII: every token is text at once
    tokens = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    tokens.pre_tokenizer, tokens.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 128, "max_position_embeddings": 2048}
    sizes |= {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    sizes |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    options = []
    for role, config, model in (
        ("receiver", LlamaConfig, LlamaForCausalLM),
        ("sharer", Qwen2Config, Qwen2ForCausalLM),
    ):
        torch.manual_seed(len(options))
        model(config(**sizes)).save_pretrained(folder / role)
        PreTrainedTokenizerFast(tokenizer_object=tokens).save_pretrained(folder / role)
        options += [f"--{role}", str(folder / role)]
    return options


# -- helpers -----------------------------------------------------------------------------------------------------------


def _client(url: str, arguments: argparse.Namespace) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=url, timeout=arguments.timeout, limits=httpx.Limits(max_connections=None))


def _prompts(count: int, seed: int) -> list[str]:
    """Questions of different lengths; no two alike."""
    rng = random.Random(seed)
    return [
        f"Question {number}: what do {', '.join(rng.sample(WORDS, rng.randint(2, 8)))} have in common?"
        for number in range(count)
    ]


def _percentiles(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    ordered = sorted(values)
    return {
        f"p{share}": round(ordered[min(len(ordered) * share // 100, len(ordered) - 1)], 4) for share in (50, 95, 99)
    }


def _settings(arguments: argparse.Namespace) -> dict:
    return {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}


def _show(result: dict) -> None:
    table = Table(
        "way", "clients", "requests/s", "tokens/s", "first p50", "p95", "p99", "whole p50", "failed", "differ"
    )
    for level in result["levels"]:
        first, whole = level["first_token_seconds"] or {}, level["seconds"] or {}
        table.add_row(
            level["way"],
            str(level["clients"]),
            f"{level['requests_per_second']:.2f}",
            f"{level['tokens_per_second']:.1f}",
            *(f"{first.get(key, 0):.2f} s" for key in ("p50", "p95", "p99")),
            f"{whole.get('p50', 0):.2f} s",
            str(level["failed"]),
            str(level["differing"]),
        )
    console = Console(stderr=True, width=120)
    console.print(table)
    if "soak" in result:
        console.print(result["soak"])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fuser", type=Path, default=FUSER, help="folder of a fuser for a shared prompt")
    parser.add_argument("--tiny", action="store_true", help="random models in place of the fuser's")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=["receiver", "c2c", "text"])
    parser.add_argument("--requests", type=int, default=16, help="per level, at least one for each client")
    parser.add_argument("--prompts", type=int, default=8, help="different prompts")
    parser.add_argument("--max-tokens", type=int, default=16, help="tokens per answer")
    parser.add_argument("--message-tokens", type=int, default=32, help="tokens of the sharer's text")
    parser.add_argument("--max-batch", type=int, default=16)
    parser.add_argument("--batch-window-ms", type=float, default=10)
    parser.add_argument("--timeout", type=float, default=600)
    parser.add_argument("--soak", type=float, default=0, metavar="SECONDS", help="then mixed load for so long")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    return parser.parse_args()


if __name__ == "__main__":
    main()
