"""What a server does under load: requests per second and times to the first token, by engine, way and clients.

A server runs in a process of its own, one at a time; clients are those of the ``openai`` package, over HTTP. All
engines and ways are measured in one run, and every answer is compared to the one that the same request got alone.

Closed loop: so many clients, each of which asks again when it has its answer. Open loop: requests arrive at random
(Poisson) whether or not others are answered, at a share of the highest rate that the first engine reached in the closed
loop, so that all engines get the same arrivals; times count from arrival. Soak: mixed ways, greedy and sampled,
streamed and whole, and how the server's memory goes.

One engine, loop, load and way is a cell. No cell takes longer than --cell-seconds: what is unanswered then is cut, and
counted as cut. With --out every cell is written when it is done, and a run that was killed goes on where it was.

    python benchmarks/serve.py                                  # the fuser of the zoo; its models must be pulled
    python benchmarks/serve.py --tiny --clients 1 4 16 64       # random models, nothing to download
    python benchmarks/serve.py --tiny --clients 16 --soak 10    # then ten minutes of mixed load
    python benchmarks/serve.py --tiny --engine both --out runs/serve.json       # transformers, then vLLM
    python benchmarks/serve.py --table runs/serve.json          # its table, in Markdown
    python benchmarks/serve.py --url http://127.0.0.1:8000 --name pair --pid 4711     # a server that runs already
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
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
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
from rich.console import Console
from rich.table import Table

from c2c.utils import write_json

ROOT = Path(__file__).parent.parent
FUSER = ROOT / "zoo" / "smollm2-135m_from_qwen2.5-coder-1.5b"
ENGINES = {"hf": "transformers", "vllm": "vllm"}  # as `c2c serve --engine` calls them
WAYS = {"receiver": "/receiver", "c2c": "", "text": "/text", "sharer": "/sharer"}
WORDS = ("copper", "river", "lamp", "plant", "music", "stone", "winter", "engine", "honey", "paper", "glass", "island")
START = 600.0  # seconds that a server may take to load its models
PERCENTILES = {50: 1, 95: 20, 99: 100}  # and how many requests each needs
TELL = 15.0  # seconds between words about a cell that goes on
# what may differ when a run goes on: it adds cells, and changes none
OPEN_ENDED = {
    "clients",
    "leave_out",
    "open",
    "ways",
    "engine",
    "soak",
    "out",
    "json",
    "table",
    "url",
    "pid",
    "vllm_python",
    "timeout",
}


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


@dataclass
class Answer:
    """What one request got.

    Attributes:
        text: the answer; None if it failed or was cut.
        first: seconds to the first text; infinite if there was none.
        total: seconds to the end; infinite if there was none.
        tokens: of the answer.
        failed: the server refused, or broke off.
    """

    text: str | None = None
    first: float = math.inf
    total: float = math.inf
    tokens: int = 0
    failed: bool = False


@dataclass(frozen=True)
class Cell:
    """One level of load for one way of one engine.

    Attributes:
        engine: what runs the receiver.
        loop: ``closed`` or ``open``.
        load: clients, or a share of the highest rate.
        way: who answers.
    """

    engine: str
    loop: str
    load: float
    way: str

    @property
    def name(self) -> str:
        """By which it is found in a result."""
        return f"{self.engine}, {self.loop}, {self.load:g}, {self.way}"


def main() -> None:
    """Run and print."""
    arguments = _arguments()
    if arguments.table:
        print(markdown(json.loads(arguments.table.read_text())))
        return
    record = Record(arguments.out, _settings(arguments))
    with tempfile.TemporaryDirectory() as folder:
        fuser = arguments.fuser
        if arguments.tiny and not arguments.url:
            fuser = _tiny(Path(folder))
        for engine in arguments.engine:
            if _missing(record, engine, arguments):
                _run(record, engine, fuser, arguments)
    result = record.result()
    Console(stderr=True, width=140).print(
        _table(result), *(facts.get("soak", "") for facts in result["engines"].values())
    )
    if arguments.json:
        print(json.dumps(result))


def _run(record: Record, engine: str, fuser: Path, arguments: argparse.Namespace) -> None:
    """Start a server, measure what is missing, and stop it."""
    began = time.monotonic()
    with _server(engine, fuser, arguments) as (url, process):
        facts = record.engine(engine)
        facts["start_seconds"] = round(time.monotonic() - began, 1)
        pid = process.pid if process else arguments.pid
        asyncio.run(_measure(record, engine, Clients(url, arguments), pid, arguments))
        if process:
            facts["rss_mb"] = round(_rss_mb(process.pid))
            stopped = time.monotonic()
            process.send_signal(signal.SIGTERM)
            facts["exit_code"] = process.wait(arguments.timeout)
            facts["stop_seconds"] = round(time.monotonic() - stopped, 2)
    record.save()


# -- the result --------------------------------------------------------------------------------------------------------


class Record:
    """A result as it grows; in a file, if one is given, after every cell.

    Args:
        path: the file. What it holds already is kept.
        settings: what was asked for.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        self._path, self._settings = path, settings
        known = json.loads(path.read_text()) if path and path.exists() else {}
        self._check(known)
        self.cells: dict[str, dict[str, Any]] = {level["cell"]: level for level in known.get("levels", [])}
        self._engines: dict[str, dict[str, Any]] = known.get("engines", {})

    def engine(self, name: str) -> dict[str, Any]:
        """What is known of an engine: its answers to single requests, seconds, memory."""
        return self._engines.setdefault(name, {"singles": {}})

    def add(self, cell: Cell, level: dict[str, Any]) -> None:
        """A cell is done."""
        self.cells[cell.name] = {"cell": cell.name, "engine": cell.engine, "loop": cell.loop} | level
        self.save()

    def best(self, way: str) -> float:
        """The highest rate of the first engine that answered in the closed loop; 0 if none did."""
        rates: dict[str, float] = {}
        for level in self.cells.values():
            if level["loop"] == "closed" and level["way"] == way:
                engine = level["engine"]
                rates[engine] = max(rates.get(engine, 0.0), level["requests_per_second"])
        return next((rate for rate in rates.values() if rate), 0.0)

    def save(self) -> None:
        """Write the file, whole or not at all."""
        if self._path:
            write_json(self._path, self.result())

    def result(self) -> dict[str, Any]:
        """All of it."""
        levels = list(self.cells.values())
        counted = levels + [facts["soak"] for facts in self._engines.values() if "soak" in facts]
        totals = {key: sum(one.get(key, 0) for one in counted) for key in ("requests", "failed", "cut", "differing")}
        machine = f"{platform.machine()}, {os.cpu_count()} cores, load average {os.getloadavg()[1]:.1f} at the end"
        said = {"levels": levels, "engines": self._engines, "agreement": self._agreement()} | totals
        return said | {"settings": self._settings, "machine": machine}

    def _agreement(self) -> dict[str, str]:
        """How many greedy answers to single requests are the same in all engines, by way."""
        singles = [facts["singles"] for facts in self._engines.values()]
        if len(singles) < 2:
            return {}
        shared = [key for key in singles[0] if all(key in other for other in singles) and key.endswith(", greedy")]
        same = Counter(key.split(", ")[0] for key in shared if len({other[key] for other in singles}) == 1)
        ways = Counter(key.split(", ")[0] for key in shared)
        return {way: f"{same[way]} of {count}" for way, count in ways.items()}

    def _check(self, known: dict[str, Any]) -> None:
        then = known.get("settings", self._settings)
        changed = [key for key in self._settings.keys() - OPEN_ENDED if then.get(key) != self._settings[key]]
        if changed:
            told = "; ".join(f"{key} was {then.get(key)}, now {self._settings[key]}" for key in sorted(changed))
            raise SystemExit(f"{self._path} was measured otherwise: {told}. Use these settings, or another --out.")


def _missing(record: Record, engine: str, arguments: argparse.Namespace) -> list[Cell]:
    """The cells of an engine that are not measured yet; not empty if its soak is not done."""
    loads = [("closed", count) for count in arguments.clients] + [("open", share) for share in arguments.open]
    cells = [Cell(engine, loop, load, way) for loop, load in loads for way in arguments.ways]
    cells = [cell for cell in cells if f"{cell.load:g}:{cell.way}" not in arguments.leave_out]
    missing = [cell for cell in cells if cell.name not in record.cells]
    unsoaked = arguments.soak and "soak" not in record.engine(engine)
    return missing or ([Cell(engine, "soak", arguments.soak, "all")] if unsoaked else [])


# -- load --------------------------------------------------------------------------------------------------------------


class Clients:
    """Asks a server, and knows what every question is answered alone."""

    def __init__(self, url: str, arguments: argparse.Namespace) -> None:
        self._name, self._max_tokens = arguments.name, arguments.max_tokens
        self._url, self._seconds = url, arguments.timeout
        self._client = openai.AsyncOpenAI(
            base_url=f"{url}/v1",
            api_key=os.environ.get("C2C_API_KEY", "none"),
            timeout=arguments.timeout,
            max_retries=0,
        )
        self.singles: dict[str, str] = {}

    async def learn(self, questions: list[Question]) -> None:
        """Ask them one after the other, with nobody else there."""
        for question in questions:
            if _key(question) in self.singles:
                continue
            text = (await self.ask(question)).text
            if text is None:
                raise SystemExit("a request failed although it was alone; see above.")
            self.singles[_key(question)] = text

    async def ask(self, question: Question, until: float = math.inf, stream: bool = True) -> Answer:
        """One request, given up at a time of the loop's clock."""
        began, answer = time.perf_counter(), Answer()
        try:
            async with asyncio.timeout_at(until if math.isfinite(until) else None):
                await (self._streamed if stream else self._whole)(question, answer, began)
        except TimeoutError:
            pass
        except openai.OpenAIError as error:
            print(f"{question.way}: {error!r}", file=sys.stderr)
            answer.failed = True
        return answer

    def differs(self, question: Question, answer: Answer) -> bool:
        """Whether it is another answer than the one that was given alone."""
        return answer.text is not None and answer.text != self.singles[_key(question)]

    async def rest(self) -> None:
        """Wait until the server has nothing under way: what was cut may be read to its end."""
        until = time.monotonic() + self._seconds
        async with httpx.AsyncClient() as client:
            while time.monotonic() < until:
                with suppress(httpx.HTTPError):
                    if (await client.get(f"{self._url}/health")).json()["active"] == 0:
                        return
                await asyncio.sleep(0.1)

    async def _streamed(self, question: Question, answer: Answer, began: float) -> None:
        text = ""
        options = {"stream": True, "stream_options": {"include_usage": True}}
        async for chunk in await self._client.chat.completions.create(**self._body(question), **options):
            piece = "".join(choice.delta.content or "" for choice in chunk.choices)
            if piece and math.isinf(answer.first):
                answer.first = time.perf_counter() - began
            text += piece
            answer.tokens = chunk.usage.completion_tokens if chunk.usage else answer.tokens
        answer.total = time.perf_counter() - began
        answer.first = min(answer.first, answer.total)
        answer.failed = not answer.tokens  # usage is what a stream ends with
        answer.text = None if answer.failed else text

    async def _whole(self, question: Question, answer: Answer, began: float) -> None:
        told = await self._client.chat.completions.create(**self._body(question))
        answer.first = answer.total = time.perf_counter() - began
        answer.text, answer.tokens = told.choices[0].message.content, told.usage.completion_tokens

    def _body(self, question: Question) -> dict[str, Any]:
        return {
            "model": self._name + WAYS[question.way],
            "messages": [{"role": "user", "content": question.prompt}],
            "max_tokens": self._max_tokens,
            "temperature": 0 if question.seed is None else 1,
            "seed": question.seed,
        }


def _key(question: Question) -> str:
    seed = "greedy" if question.seed is None else f"seed {question.seed}"
    return f"{question.way}, {question.prompt}, {seed}"


async def _measure(
    record: Record, engine: str, clients: Clients, pid: int | None, arguments: argparse.Namespace
) -> None:
    """Every request alone, then all levels of load that are missing."""
    prompts = _prompts(arguments.prompts, arguments.seed)
    questions = {way: [Question(way, prompt) for prompt in prompts] for way in arguments.ways}
    clients.singles = record.engine(engine)["singles"]
    for way in arguments.ways:
        _say(f"{engine}: {way}, each of {len(prompts)} requests alone")
        await clients.ask(questions[way][0])  # warm-up
        await clients.learn(questions[way])
    record.save()
    cells = [cell for cell in _missing(record, engine, arguments) if cell.loop != "soak"]
    for number, cell in enumerate(cells, 1):
        _say(f"[{number}/{len(cells)}] {cell.name}")
        record.add(cell, await _cell(record, cell, clients, questions[cell.way], arguments))
        await clients.rest()
    if arguments.soak and "soak" not in record.engine(engine):
        every = [question for way in arguments.ways for question in questions[way]]
        record.engine(engine)["soak"] = await _soak(clients, every, pid, arguments)
        record.save()


async def _cell(
    record: Record, cell: Cell, clients: Clients, questions: list[Question], arguments: argparse.Namespace
) -> dict[str, Any]:
    """The figures of one cell."""
    answers: list[tuple[Question, Answer]] = []
    began = time.perf_counter()
    until = asyncio.get_running_loop().time() + arguments.cell_seconds
    about: dict[str, Any]
    if cell.loop == "closed":
        wanted, about = max(arguments.requests, int(cell.load)), {"clients": int(cell.load)}
        load = _closed(clients, itertools.islice(itertools.cycle(questions), wanted), int(cell.load), until, answers)
    else:
        wanted, rate = arguments.requests, cell.load * record.best(cell.way)
        about = {"share": cell.load, "arrivals_per_second": round(rate, 3)}
        rng = random.Random(arguments.seed)
        load = _open(clients, itertools.islice(itertools.cycle(questions), wanted), rate, rng, until, answers)
    await _telling(load, answers, wanted)
    level = about | {"way": cell.way} | _level(clients, answers, time.perf_counter() - began)
    level["wanted"] = wanted
    return level


async def _closed(
    clients: Clients, work: Iterator[Question], count: int, until: float, answers: list[tuple[Question, Answer]]
) -> None:
    """So many clients, each asking again and again until all requests are done, or the time is."""
    clock = asyncio.get_running_loop().time

    async def one_client() -> None:
        while clock() < until and (question := next(work, None)):  # one iterator for all clients
            answers.append((question, await clients.ask(question, until)))

    await asyncio.gather(*(one_client() for _ in range(count)))


async def _open(
    clients: Clients,
    work: Iterator[Question],
    rate: float,
    rng: random.Random,
    until: float,
    answers: list[tuple[Question, Answer]],
) -> None:
    """Requests that arrive at a rate of so many per second, whatever becomes of those before."""
    clock = asyncio.get_running_loop().time

    async def one_request(question: Question) -> None:
        answers.append((question, await clients.ask(question, until)))

    async with asyncio.TaskGroup() as arrivals:
        while rate and clock() < until and (question := next(work, None)):
            arrivals.create_task(one_request(question))
            await asyncio.sleep(min(rng.expovariate(rate), max(until - clock(), 0)))


async def _telling(load: Coroutine[Any, Any, None], answers: list[tuple[Question, Answer]], wanted: int) -> None:
    """Wait for a load, and say now and then how far it is."""
    task, began = asyncio.ensure_future(load), time.perf_counter()
    while not (await asyncio.wait([task], timeout=TELL))[0]:
        _say(f"    {len(answers)} of {wanted} requests, {time.perf_counter() - began:.0f} s")
    await task


def _level(clients: Clients, answers: list[tuple[Question, Answer]], seconds: float) -> dict[str, Any]:
    """The figures of one level of load. Those that were cut count as slower than all others."""
    found = [answer for _, answer in answers if not answer.failed]
    good = [answer for answer in found if answer.text is not None]
    return {
        "requests": len(answers),
        "failed": len(answers) - len(found),
        "cut": len(found) - len(good),
        "differing": sum(clients.differs(*pair) for pair in answers),
        "elapsed_seconds": round(seconds, 2),
        "requests_per_second": round(len(good) / seconds, 3),
        "tokens_per_second": round(sum(answer.tokens for answer in good) / seconds, 2),
        "first_token_seconds": _percentiles([answer.first for answer in found]),
        "seconds": _percentiles([answer.total for answer in found]),
    }


async def _soak(
    clients: Clients, greedy: list[Question], pid: int | None, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Mixed load for a while: is every answer the one that was given alone, and does the server's memory grow?"""
    sampled = [Question(question.way, question.prompt, seed) for seed, question in enumerate(greedy)]
    await clients.learn(sampled)
    _say(f"{arguments.soak:g} minutes of mixed load")
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


def _growth(memory: list[float]) -> dict[str, Any]:
    """Resident memory: medians of five equal spans of time, and by how much the last is above the second."""
    if len(memory) < 5:
        return {"rss_mb": None, "growth_mb": None}
    spans = [memory[len(memory) * i // 5 : len(memory) * (i + 1) // 5] for i in range(5)]
    medians = [round(statistics.median(span), 1) for span in spans]
    return {"rss_mb": medians, "growth_mb": round(medians[-1] - medians[1], 1)}


def _rss_mb(pid: int) -> float:
    """Resident memory of a process and its children, what they share counted for each; Linux only."""
    pages = 0
    with suppress(OSError):  # one that has just ended
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    children = " ".join(path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")).split()
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6 + sum(_rss_mb(int(child)) for child in children)


# -- server ------------------------------------------------------------------------------------------------------------


@contextmanager
def _server(
    engine: str, fuser: Path, arguments: argparse.Namespace
) -> Iterator[tuple[str, subprocess.Popen[bytes] | None]]:
    """A server in a process of its own, or the one that runs already."""
    if arguments.url:
        yield arguments.url.rstrip("/"), None
        return
    _say(f"{engine}: starting a server")
    environment = os.environ | ({"OMP_NUM_THREADS": str(arguments.threads)} if arguments.threads else {})
    with tempfile.TemporaryDirectory() as folder:
        log_path = Path(folder) / "log"
        with log_path.open("w") as log:
            process = subprocess.Popen(_command(engine, fuser, arguments), stderr=log, stdout=log, env=environment)
        try:
            yield _url(process, log_path), process
        finally:
            process.kill()
            process.wait()


def _command(engine: str, fuser: Path, arguments: argparse.Namespace) -> list[str]:
    """The command of a server, with the interpreter that its engine needs."""
    python = arguments.vllm_python if engine == "vllm" else sys.executable
    command = [str(python), "-m", "c2c", "serve", str(fuser), "--name", arguments.name, "--port", "0"]
    command += ["--max-queue", str(2 * max(*arguments.clients, arguments.requests))]
    command += ["--max-batch", str(arguments.max_batch), "--batch-window-ms", str(arguments.batch_window_ms)]
    command += ["--timeout", str(arguments.timeout), "--message-tokens", str(arguments.message_tokens)]
    command += ["--engine", ENGINES[engine]]
    for option in ("dtype", "sharer_dtype"):
        if getattr(arguments, option):
            command += [f"--{option.replace('_', '-')}", getattr(arguments, option)]
    return command


def _url(process: subprocess.Popen[bytes], log: Path) -> str:
    """Where the server listens, once it does."""
    until = time.monotonic() + START
    while time.monotonic() < until and process.poll() is None:
        for line in log.read_text().splitlines():
            if '"event": "ready"' in line:
                return str(json.loads(line)["url"])
        time.sleep(0.1)
    raise SystemExit(f"the server did not start:\n{log.read_text()}")


def _tiny(folder: Path) -> Path:
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
        "receiver": LlamaForCausalLM(LlamaConfig(head_dim=32, **sizes)),  # vLLM has no kernels for smaller ones
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


def _percentiles(values: list[float]) -> dict[str, float | None] | None:
    """Those that so many values allow; None for one that falls among the infinite ones, or needs more values."""
    if not values:
        return None
    ordered = sorted(values)
    found = {}
    for share, needed in PERCENTILES.items():
        value = ordered[min(len(ordered) * share // 100, len(ordered) - 1)]
        found[f"p{share}"] = round(value, 4) if len(ordered) >= needed and math.isfinite(value) else None
    return found


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What was asked for, and the threads that everybody was told to use."""
    given = {key: value.name if isinstance(value, Path) else value for key, value in vars(arguments).items()}
    return given | {"omp_num_threads": str(arguments.threads or os.environ.get("OMP_NUM_THREADS", "unset"))}


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


HEADINGS = ("engine", "way", "load", "n", "requests/s", "tokens/s", "first p50", "p95", "p99", "whole p50", "differ")


def _rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """The table of a result: a row for each cell."""
    return [_row(level) for level in result["levels"]]


def _row(level: dict[str, Any]) -> tuple[str, ...]:
    first, whole = level["first_token_seconds"] or {}, level["seconds"] or {}
    closed = level["loop"] == "closed"
    load = _plural(level["clients"], "client") if closed else f"{level['arrivals_per_second']:.2f} arrivals/s"
    answered = level["requests"] - level["failed"] - level["cut"]
    lost = [f"{level[key]} {key}" for key in ("cut", "failed") if level[key]]
    return (
        level["engine"],
        level["way"],
        load,
        ", ".join([str(answered), *lost]),
        f"{level['requests_per_second']:.2f}",
        f"{level['tokens_per_second']:.1f}",
        *(_shown(first, share, level) for share in PERCENTILES),
        _shown(whole, 50, level),
        str(level["differing"]),
    )


def _plural(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def _shown(values: dict[str, float | None], share: int, level: dict[str, Any]) -> str:
    """Seconds; "cut" where they fall among those that were cut; a dash where there are too few requests."""
    value = values.get(f"p{share}")
    if value is not None:
        return f"{value:.2f} s"
    return "cut" if level["requests"] - level["failed"] >= PERCENTILES[share] else "–"


def _table(result: dict[str, Any]) -> Table:
    table = Table(*HEADINGS)
    for row in _rows(result):
        table.add_row(*row)
    return table


def markdown(result: dict[str, Any]) -> str:
    """The table of a result, for documentation."""
    aligned = ["---"] * 3 + ["--:"] * (len(HEADINGS) - 3)
    return "\n".join("| " + " | ".join(row) + " |" for row in (HEADINGS, aligned, *_rows(result)))


def _arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    _add_models(parser)
    _add_load(parser)
    parser.add_argument("--out", type=Path, help="file of the result; what it has already is not measured again")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the table of a result in Markdown, and end")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    arguments = parser.parse_args(given)
    arguments.engine = list(ENGINES) if arguments.engine == "both" else [arguments.engine]
    if arguments.url and len(arguments.engine) > 1:
        parser.error("--engine both starts two servers; a server at --url has one engine.")
    return arguments


def _add_models(parser: argparse.ArgumentParser) -> None:
    models = parser.add_mutually_exclusive_group()
    models.add_argument("--fuser", type=Path, default=FUSER, help="folder of a fuser for a shared prompt")
    models.add_argument("--tiny", action="store_true", help="random models in place of the fuser's")
    models.add_argument("--url", help="a server that runs already")
    parser.add_argument("--name", default="pair", help="what the server calls its model")
    parser.add_argument("--pid", type=int, help="of the server at --url, to watch its memory")
    parser.add_argument(
        "--engine",
        choices=[*ENGINES, "both"],
        default="hf",
        help="of the receiver: transformers, vLLM, one after the other",
    )
    parser.add_argument("--vllm-python", type=Path, default=_vllm_python(), help="interpreter of the vLLM server")
    parser.add_argument("--dtype", help="of both models, as for c2c serve")
    parser.add_argument("--sharer-dtype", help="of the sharer, where it differs")
    parser.add_argument("--threads", type=int, help="OMP_NUM_THREADS of the servers; by default what is set")
    parser.add_argument("--max-batch", type=int, default=16)
    parser.add_argument("--batch-window-ms", type=float, default=10)


def _add_load(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64], help="closed loop")
    parser.add_argument(
        "--open", type=float, nargs="*", default=[0.5, 0.8], metavar="SHARE", help="open loop, of the highest rate"
    )
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=["receiver", "c2c", "text"])
    parser.add_argument(
        "--leave-out", nargs="*", default=[], metavar="LOAD:WAY", help="cells not to measure, such as 64:text"
    )
    parser.add_argument("--requests", type=int, default=64, help="per level; closed loop at least one for each client")
    parser.add_argument("--cell-seconds", type=float, default=300, help="longest time for a level")
    parser.add_argument("--prompts", type=int, default=8, help="different prompts")
    parser.add_argument("--max-tokens", type=int, default=16, help="tokens per answer")
    parser.add_argument("--message-tokens", type=int, default=32, help="tokens of the sharer's text")
    parser.add_argument("--timeout", type=float, default=600)
    parser.add_argument("--soak", type=float, default=0, metavar="MINUTES", help="then mixed load for so long")
    parser.add_argument("--seed", type=int, default=1)


def _vllm_python() -> Path:
    """That of `make test-vllm`, or this one."""
    made = ROOT / ".venv-vllm" / "bin" / "python"
    return made if made.exists() else Path(sys.executable)


if __name__ == "__main__":
    main()
