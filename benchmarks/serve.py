"""What a server does under load: requests per second and times to the first token, by way and number of clients.

The server runs in a process of its own; clients are those of the ``openai`` package, over HTTP. All ways are measured
in one run, and every answer is compared to the one that the same request got alone.

Closed loop: so many clients, each of which asks again when it has its answer. Open loop: requests arrive at random
(Poisson) whether or not others are answered, at a share of the highest rate that the closed loop reached; times count
from arrival. Soak: mixed ways, greedy and sampled, streamed and whole, and how the server's memory goes.

    python benchmarks/serve.py                                  # the fuser of the zoo; its models must be pulled
    python benchmarks/serve.py --tiny --clients 1 4 16 64       # random models, nothing to download
    python benchmarks/serve.py --tiny --clients 16 --soak 10    # then ten minutes of mixed load
    python benchmarks/serve.py --engine vllm                    # the receiver in vLLM, where that is installed
    python benchmarks/serve.py --url http://127.0.0.1:8000 --name pair --pid 4711     # a server that runs already
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
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import openai
from rich.console import Console
from rich.table import Table

FUSER = Path(__file__).parent.parent / "zoo" / "smollm2-135m_from_qwen2.5-coder-1.5b"
WAYS = {"receiver": "/receiver", "c2c": "", "text": "/text", "sharer": "/sharer"}
WORDS = ("copper", "river", "lamp", "plant", "music", "stone", "winter", "engine", "honey", "paper", "glass", "island")
START = 600.0  # seconds that a server may take to load its models


@dataclass(frozen=True)
class Question:
    """One request; equal ones have equal answers.

    Attributes:
        way: who answers.
        prompt: the user's message.
        seed: of a sample; None is greedy.
    """

    way: str
    prompt: str
    seed: int | None = None


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
    tokens: int = 0


def main() -> None:
    """Run and print."""
    arguments = _arguments()
    with _server(arguments) as (url, process):
        pid = process.pid if process else arguments.pid
        result = asyncio.run(_measure(Clients(url, arguments), pid, arguments))
        if process:
            process.send_signal(signal.SIGTERM)
            result["exit_code"] = process.wait(arguments.timeout)
    result |= {"settings": _settings(arguments), "machine": f"{platform.machine()}, {os.cpu_count()} cores"}
    _show(result)
    if arguments.json:
        print(json.dumps(result))


# -- load --------------------------------------------------------------------------------------------------------------


class Clients:
    """Asks a server, and knows what every question is answered alone."""

    def __init__(self, url: str, arguments: argparse.Namespace) -> None:
        self._name, self._max_tokens = arguments.name, arguments.max_tokens
        self._client = openai.AsyncOpenAI(
            base_url=f"{url}/v1",
            api_key=os.environ.get("C2C_API_KEY", "none"),
            timeout=arguments.timeout,
            max_retries=0,
        )
        self.singles: dict[Question, str] = {}

    async def learn(self, questions: list[Question]) -> None:
        """Ask them one after the other, with nobody else there."""
        for question in questions:
            text = (await self.ask(question)).text
            if text is None:
                raise SystemExit("a request failed although it was alone; see above.")
            self.singles[question] = text

    async def ask(self, question: Question, stream: bool = True) -> Answer:
        """One request."""
        began = time.perf_counter()
        try:
            return await (self._streamed if stream else self._whole)(question, began)
        except openai.OpenAIError as error:
            print(f"{question.way}: {error!r}", file=sys.stderr)
            seconds = time.perf_counter() - began
            return Answer(None, seconds, seconds)

    def differs(self, question: Question, answer: Answer) -> bool:
        """Whether it is another answer than the one that was given alone."""
        return answer.text is not None and answer.text != self.singles[question]

    async def _streamed(self, question: Question, began: float) -> Answer:
        first, text, tokens = None, "", 0
        options = {"stream": True, "stream_options": {"include_usage": True}}
        async for chunk in await self._client.chat.completions.create(**self._body(question), **options):
            piece = "".join(choice.delta.content or "" for choice in chunk.choices)
            if first is None and piece:
                first = time.perf_counter() - began
            text += piece
            tokens = chunk.usage.completion_tokens if chunk.usage else tokens
        total = time.perf_counter() - began
        return Answer(text if tokens else None, first or total, total, tokens)  # usage is what a stream ends with

    async def _whole(self, question: Question, began: float) -> Answer:
        answer = await self._client.chat.completions.create(**self._body(question))
        total = time.perf_counter() - began
        return Answer(answer.choices[0].message.content, total, total, answer.usage.completion_tokens)

    def _body(self, question: Question) -> dict:
        return {
            "model": self._name + WAYS[question.way],
            "messages": [{"role": "user", "content": question.prompt}],
            "max_tokens": self._max_tokens,
            "temperature": 0 if question.seed is None else 1,
            "seed": question.seed,
        }


async def _measure(clients: Clients, pid: int | None, arguments: argparse.Namespace) -> dict:
    """Every request alone, then all levels of load."""
    prompts = _prompts(arguments.prompts, arguments.seed)
    questions = {way: [Question(way, prompt) for prompt in prompts] for way in arguments.ways}
    for way in arguments.ways:
        await clients.ask(questions[way][0])  # warm-up
        await clients.learn(questions[way])
    levels, best = [], dict.fromkeys(arguments.ways, 0.0)
    for count in arguments.clients:
        for way in arguments.ways:
            levels.append(await _closed(clients, questions[way], count, arguments.requests))
            best[way] = max(best[way], levels[-1]["requests_per_second"])
    for share, way in itertools.product(arguments.open, arguments.ways):
        levels.append(await _open(clients, questions[way], share * best[way], arguments))
    result = {"levels": levels}
    if arguments.soak:
        every = [question for way in arguments.ways for question in questions[way]]
        result["soak"] = await _soak(clients, every, pid, arguments)
    counted = [*levels, *([result["soak"]] if arguments.soak else [])]
    totals = {key: sum(one[key] for one in counted) for key in ("requests", "failed", "differing")}
    return result | totals | {"singles": len(clients.singles)}


async def _closed(clients: Clients, questions: list[Question], count: int, requests: int) -> dict:
    """So many clients, each asking again and again until all requests are done."""
    requests = max(requests, count)
    work = itertools.islice(itertools.cycle(questions), requests)
    answers: list[tuple[Question, Answer]] = []

    async def one_client() -> None:
        for question in work:  # one iterator for all clients
            answers.append((question, await clients.ask(question)))

    began = time.perf_counter()
    await asyncio.gather(*(one_client() for _ in range(count)))
    return {"loop": "closed", "clients": count} | _level(clients, answers, time.perf_counter() - began)


async def _open(clients: Clients, questions: list[Question], rate: float, arguments: argparse.Namespace) -> dict:
    """Requests that arrive at a rate of so many per second, whatever becomes of those before."""
    rng = random.Random(arguments.seed)
    answers: list[tuple[Question, Answer]] = []

    async def one_request(question: Question) -> None:
        answers.append((question, await clients.ask(question)))

    began = time.perf_counter()
    async with asyncio.TaskGroup() as arrivals:
        for question in itertools.islice(itertools.cycle(questions), arguments.requests):
            arrivals.create_task(one_request(question))
            await asyncio.sleep(rng.expovariate(rate))
    level = _level(clients, answers, time.perf_counter() - began)
    return {"loop": "open", "arrivals_per_second": round(rate, 3)} | level


def _level(clients: Clients, answers: list[tuple[Question, Answer]], seconds: float) -> dict:
    """The figures of one level of load."""
    good = [answer for _, answer in answers if answer.text is not None]
    return {
        "way": answers[0][0].way,
        "requests": len(answers),
        "failed": len(answers) - len(good),
        "differing": sum(clients.differs(*pair) for pair in answers),
        "requests_per_second": round(len(good) / seconds, 3),
        "tokens_per_second": round(sum(answer.tokens for answer in good) / seconds, 2),
        "first_token_seconds": _percentiles([answer.first for answer in good]),
        "seconds": _percentiles([answer.total for answer in good]),
    }


async def _soak(clients: Clients, greedy: list[Question], pid: int | None, arguments: argparse.Namespace) -> dict:
    """Mixed load for a while: is every answer the one that was given alone, and does the server's memory grow?"""
    sampled = [Question(question.way, question.prompt, seed) for seed, question in enumerate(greedy)]
    await clients.learn(sampled)
    until = time.monotonic() + 60 * arguments.soak
    rng, memory, counts = random.Random(arguments.seed), [], Counter(requests=0, failed=0, differing=0)

    async def one_client() -> None:
        while time.monotonic() < until:
            question = rng.choice([*greedy, *sampled])
            answer = await clients.ask(question, stream=rng.random() < 0.5)
            counts.update(requests=1, failed=answer.text is None, differing=clients.differs(question, answer))

    async def watch() -> None:
        while pid is not None and time.monotonic() < until:
            memory.append(_rss_mb(pid))
            await asyncio.sleep(1)

    await asyncio.gather(watch(), *(one_client() for _ in range(max(arguments.clients))))
    return {"minutes": arguments.soak, "clients": max(arguments.clients)} | counts | _growth(memory)


def _growth(memory: list[float]) -> dict:
    """Resident memory: medians of five equal spans of time, and by how much the last is above the second."""
    if len(memory) < 5:
        return {"rss_mb": None, "growth_mb": None}
    spans = [memory[len(memory) * i // 5 : len(memory) * (i + 1) // 5] for i in range(5)]
    medians = [round(statistics.median(span), 1) for span in spans]
    return {"rss_mb": medians, "growth_mb": round(medians[-1] - medians[1], 1)}


def _rss_mb(pid: int) -> float:
    """Resident memory of a process; Linux only."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


# -- server ------------------------------------------------------------------------------------------------------------


@contextmanager
def _server(arguments: argparse.Namespace) -> Iterator[tuple[str, subprocess.Popen | None]]:
    """A server in a process of its own, or the one that runs already."""
    if arguments.url:
        yield arguments.url.rstrip("/"), None
        return
    with tempfile.TemporaryDirectory() as folder:
        head_dim = 32 if arguments.engine == "vllm" else 16  # it has no kernels for smaller ones
        fuser = _tiny(Path(folder), head_dim) if arguments.tiny else arguments.fuser
        command = [sys.executable, "-m", "c2c", "serve", str(fuser), "--name", arguments.name, "--port", "0"]
        command += ["--max-queue", str(2 * max(*arguments.clients, arguments.requests))]
        command += ["--max-batch", str(arguments.max_batch), "--batch-window-ms", str(arguments.batch_window_ms)]
        command += ["--timeout", str(arguments.timeout), "--message-tokens", str(arguments.message_tokens)]
        command += ["--engine", arguments.engine]
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


def _tiny(folder: Path, head_dim: int = 16) -> Path:
    """Random models of two families, with a tokenizer of characters and a fuser that really changes the cache."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    from c2c import C2CModel

    letters = [*(chr(code) for code in range(33, 127)), "\u0120", "\u010a"]  # ASCII: every token is text at once
    tokens = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    tokens.pre_tokenizer, tokens.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": len(letters), "max_position_embeddings": 2048}
    sizes |= {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    sizes |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    torch.manual_seed(0)
    roles = {
        "receiver": LlamaForCausalLM(LlamaConfig(head_dim=head_dim, **sizes)),
        "sharer": Qwen2ForCausalLM(Qwen2Config(**sizes)),
    }
    for role, model in roles.items():
        model.save_pretrained(folder / role)
        PreTrainedTokenizerFast(tokenizer_object=tokens).save_pretrained(folder / role)
    pair = C2CModel.from_models(str(folder / "receiver"), str(folder / "sharer"))
    for name, parameter in pair.fusers[0].named_parameters():
        if name in ("up", "up_bias"):
            torch.nn.init.normal_(parameter)
    pair.save_pretrained(folder / "fuser")
    return folder / "fuser"


# -- helpers -----------------------------------------------------------------------------------------------------------


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
    return {key: value.name if isinstance(value, Path) else value for key, value in vars(arguments).items()}


def _show(result: dict) -> None:
    table = Table("way", "load", "requests/s", "tokens/s", "first p50", "p95", "p99", "whole p50", "failed", "differ")
    for level in result["levels"]:
        first, whole = level["first_token_seconds"] or {}, level["seconds"] or {}
        closed = level["loop"] == "closed"
        table.add_row(
            level["way"],
            f"{level['clients']} clients" if closed else f"{level['arrivals_per_second']:.2f} arrivals/s",
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
    models = parser.add_mutually_exclusive_group()
    models.add_argument("--fuser", type=Path, default=FUSER, help="folder of a fuser for a shared prompt")
    models.add_argument("--tiny", action="store_true", help="random models in place of the fuser's")
    models.add_argument("--url", help="a server that runs already")
    parser.add_argument("--name", default="pair", help="what the server calls its model")
    parser.add_argument("--pid", type=int, help="of the server at --url, to watch its memory")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64], help="closed loop")
    parser.add_argument(
        "--open", type=float, nargs="*", default=[0.5, 0.8], metavar="SHARE", help="open loop, of the highest rate"
    )
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=["receiver", "c2c", "text"])
    parser.add_argument("--requests", type=int, default=64, help="per level; closed loop at least one for each client")
    parser.add_argument("--prompts", type=int, default=8, help="different prompts")
    parser.add_argument("--max-tokens", type=int, default=16, help="tokens per answer")
    parser.add_argument("--message-tokens", type=int, default=32, help="tokens of the sharer's text")
    parser.add_argument("--engine", choices=["transformers", "vllm"], default="transformers", help="of the receiver")
    parser.add_argument("--max-batch", type=int, default=16)
    parser.add_argument("--batch-window-ms", type=float, default=10)
    parser.add_argument("--timeout", type=float, default=600)
    parser.add_argument("--soak", type=float, default=0, metavar="MINUTES", help="then mixed load for so long")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    return parser.parse_args()


if __name__ == "__main__":
    main()
