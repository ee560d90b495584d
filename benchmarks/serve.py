"""Load test of ``c2c serve``: requests per second and times to the first token, by engine, system and clients.

The server runs in a process of its own; clients are those of the ``openai`` package, over HTTP. Every answer is
compared to the one that the same request got alone. Closed loop: so many clients, each of which sends its next
request when it has its answer. Open loop: requests arrive at random (Poisson), at a share of the highest rate that
the first engine reached in the closed loop. Soak: mixed systems, greedy and sampled, streamed and whole, and the
server's memory.

One engine, loop, load and system is a cell. No cell takes longer than --cell-seconds: what is unanswered then is cut,
and counted as slower than all others. With --out each cell is written when it is done, and a killed run goes on.

    python benchmarks/serve.py                                  # the fuser of the zoo; its models must be pulled
    python benchmarks/serve.py --tiny --clients 16 --soak 10    # random models; then ten minutes of mixed load
    python benchmarks/serve.py --tiny --engine transformers vllm --out runs/serve.json
    python benchmarks/serve.py --table runs/serve.json          # the table of a result, in Markdown
    python benchmarks/serve.py --url http://127.0.0.1:8000 --name pair     # a server that runs already

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
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai

from c2c.utils import write_json

ROOT = Path(__file__).parent.parent
FUSER = ROOT / "zoo" / "smollm2-135m_from_qwen2.5-coder-1.5b"
VLLM_PYTHON = ROOT / ".venv-vllm" / "bin" / "python"  # of `make test-vllm`
WORDS = ("copper", "river", "lamp", "plant", "music", "stone", "winter", "engine", "honey", "paper", "glass", "island")
START = 600.0  # seconds that a server may take to load its models
PERCENTILES = {50: 1, 95: 20, 99: 100}  # with how many requests each needs
HEADINGS = ("engine", "system", "load", "n", "requests/s", "tokens/s", "first p50", "p95", "p99", "whole p50", "differ")


@dataclass(frozen=True)
class Question:
    """One request; equal ones have equal answers. Without a seed it is greedy."""

    system: str
    prompt: str
    seed: int | None = None


@dataclass
class Outcome:
    """What one request got; seconds are infinite for what was cut, ``text`` is None for what failed or was cut."""

    text: str | None = None
    first: float = math.inf
    total: float = math.inf
    tokens: int = 0
    failed: bool = False


class Client:
    """Send requests, and compare answers to those of the same requests alone."""

    def __init__(self, url: str, options: argparse.Namespace) -> None:
        self._options, self.alone = options, {}
        key = os.environ.get("C2C_API_KEY", "none")
        self._api = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, timeout=options.timeout, max_retries=0)

    async def send(self, question: Question, until: float = math.inf) -> Outcome:
        """Send one request as a stream, given up at a time of the loop's clock."""
        outcome, began, options = Outcome(), time.perf_counter(), self._options
        system = "" if question.system == "c2c" else f"/{question.system}"
        try:
            async with asyncio.timeout_at(until if math.isfinite(until) else None):
                text, stream = (
                    "",
                    await self._api.chat.completions.create(
                        model=options.name + system,
                        messages=[{"role": "user", "content": question.prompt}],
                        max_tokens=options.max_tokens,
                        temperature=0 if question.seed is None else 1,
                        seed=question.seed,
                        stream=True,
                        stream_options={"include_usage": True},
                    ),
                )
                async for chunk in stream:
                    text += "".join(choice.delta.content or "" for choice in chunk.choices)
                    if text and math.isinf(outcome.first):
                        outcome.first = time.perf_counter() - began
                    outcome.tokens = chunk.usage.completion_tokens if chunk.usage else 0
                outcome.total = time.perf_counter() - began
                outcome.first, outcome.failed = min(outcome.first, outcome.total), not outcome.tokens
                outcome.text = None if outcome.failed else text
        except TimeoutError:
            pass
        except openai.OpenAIError as error:
            say(f"{question.system}: {error!r}")
            outcome.failed = True
        return outcome

    async def learn(self, questions: list[Question]) -> None:
        """Send each request alone, and keep its answer."""
        await self.send(questions[0])  # warm-up
        for question in questions:
            self.alone[question] = (await self.send(question)).text
            if self.alone[question] is None:
                raise SystemExit("a request failed although it was alone; see above.")

    def differs(self, question: Question, outcome: Outcome) -> bool:
        """Return whether it is another answer than the one given alone."""
        return outcome.text is not None and outcome.text != self.alone[question]


# -- load --------------------------------------------------------------------------------------------------------------


async def closed_loop(client: Client, work: Iterator[Question], clients: int, until: float) -> list[Any]:
    """Let clients send one request after the other."""
    found: list[Any] = []

    async def run() -> None:
        while asyncio.get_running_loop().time() < until and (question := next(work, None)):
            found.append((question, await client.send(question, until)))

    await asyncio.gather(*(run() for _ in range(clients)))
    return found


async def open_loop(client: Client, work: Iterator[Question], rate: float, until: float, seed: int) -> list[Any]:
    """Send requests at random times, whether or not others are answered."""
    rng, clock, found = random.Random(seed), asyncio.get_running_loop().time, []

    async def run(question: Question) -> None:
        found.append((question, await client.send(question, until)))

    async with asyncio.TaskGroup() as group:
        while rate and clock() < until and (question := next(work, None)):
            group.create_task(run(question))
            await asyncio.sleep(min(rng.expovariate(rate), max(until - clock(), 0)))
    return found


async def measure(client: Client, cell: dict[str, Any], questions: list[Question], options: Any) -> dict[str, Any]:
    """Measure one cell: its load, with the figures added."""
    began, until = time.perf_counter(), asyncio.get_running_loop().time() + options.cell_seconds
    if cell["loop"] == "closed":
        work = itertools.islice(itertools.cycle(questions), max(options.requests, cell["clients"]))
        found = await closed_loop(client, work, cell["clients"], until)
    else:
        work = itertools.islice(itertools.cycle(questions), options.requests)
        found = await open_loop(client, work, cell["arrivals_per_second"], until, options.seed)
    seconds = time.perf_counter() - began
    outcomes = [outcome for _, outcome in found if not outcome.failed]
    whole = [outcome for outcome in outcomes if outcome.text is not None]
    return cell | {
        "requests": len(found),
        "failed": len(found) - len(outcomes),
        "cut": len(outcomes) - len(whole),
        "differing": sum(client.differs(*pair) for pair in found),
        "elapsed_seconds": round(seconds, 2),
        "requests_per_second": round(len(whole) / seconds, 3),
        "tokens_per_second": round(sum(outcome.tokens for outcome in whole) / seconds, 2),
        "first_token_seconds": percentiles([outcome.first for outcome in outcomes]),
        "seconds": percentiles([outcome.total for outcome in outcomes]),
    }


async def soak(client: Client, questions: list[Question], pid: int | None, options: Any) -> dict[str, Any]:
    """Send mixed load for a while; report wrong answers, and how the server's memory grows."""
    questions = questions + [Question(one.system, one.prompt, seed) for seed, one in enumerate(questions)]
    await client.learn(questions)
    until, memory = asyncio.get_running_loop().time() + 60 * options.soak, []
    rng, clients = random.Random(options.seed), max(options.clients)

    async def watch() -> None:
        while pid is not None and asyncio.get_running_loop().time() < until:
            memory.append(rss_mb(pid))
            await asyncio.sleep(1)

    work = (rng.choice(questions) for _ in itertools.count())
    found, _ = await asyncio.gather(closed_loop(client, work, clients, until), watch())
    quarter = len(memory) // 4
    growth = (
        round(sum(memory[-quarter:]) / quarter - sum(memory[quarter : 2 * quarter]) / quarter, 1) if quarter else None
    )
    failed, wrong = sum(one.failed for _, one in found), sum(client.differs(*pair) for pair in found)
    return {"clients": clients, "requests": len(found), "failed": failed, "differing": wrong, "growth_mb": growth}


def percentiles(values: list[float]) -> dict[str, float | None]:
    """Return percentiles; None for one that falls among the cut requests, or needs more of them."""
    ordered, found = sorted(values), {}
    for share, needed in PERCENTILES.items():
        value = ordered[min(len(ordered) * share // 100, len(ordered) - 1)] if len(ordered) >= needed else math.inf
        found[f"p{share}"] = round(value, 4) if math.isfinite(value) else None
    return found


def rss_mb(pid: int) -> float:
    """Return the resident memory of a process and its children; Linux only."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        children = " ".join(path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")).split()
    except OSError:  # it has just ended
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6 + sum(rss_mb(int(child)) for child in children)


# -- server ------------------------------------------------------------------------------------------------------------


@contextmanager
def server(engine: str, fuser: Path, options: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """Run a server in a process of its own."""
    python = VLLM_PYTHON if engine == "vllm" and VLLM_PYTHON.exists() else sys.executable
    command = [python, "-m", "c2c", "serve", fuser, "--name", options.name, "--port", "0", "--engine", engine]
    command += ["--max-queue", 2 * max(*options.clients, options.requests), "--timeout", options.timeout]
    command += options.serve_options.split()
    with tempfile.TemporaryDirectory() as folder, (log := Path(folder) / "log").open("w") as out:
        process = subprocess.Popen([str(part) for part in command], stderr=out, stdout=out)
        try:
            until, ready = time.monotonic() + START, None
            while ready is None:
                if time.monotonic() > until or process.poll() is not None:
                    raise SystemExit(f"the server did not start:\n{log.read_text()}")
                time.sleep(0.1)
                ready = next((line for line in log.read_text().splitlines() if '"event": "ready"' in line), None)
            yield json.loads(ready)["url"], process.pid
            process.send_signal(signal.SIGTERM)
            process.wait(options.timeout)
        finally:
            process.kill()
            process.wait()


def tiny(folder: Path) -> Path:
    """Make random models of two families, and a fuser that really changes the cache; return its folder."""
    sys.path.insert(0, str(ROOT / "tests"))
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    from c2c import C2CModel
    from tiny import NO_SPECIALS, SIZES, open_fusers, tokenizer

    sizes = SIZES | NO_SPECIALS | {"hidden_size": 64, "num_hidden_layers": 4, "max_position_embeddings": 2048}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}  # vLLM has no kernels for smaller ones
    models = {
        "chatml": LlamaForCausalLM(LlamaConfig(**sizes, **heads)),
        "llama3": Qwen2ForCausalLM(Qwen2Config(**sizes)),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer(name).save_pretrained(folder / name)
    pair = C2CModel.from_models(str(folder / "chatml"), str(folder / "llama3"))
    open_fusers(pair).save_pretrained(folder / "fuser")
    return folder / "fuser"


# -- result ------------------------------------------------------------------------------------------------------------


def cells(engine: str, options: argparse.Namespace, levels: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Iterate over the cells of an engine that are not in ``levels``, which grows meanwhile."""
    loads = [{"loop": "closed", "clients": count} for count in options.clients]
    loads += [{"loop": "open", "share": share} for share in options.open]
    for load, system in itertools.product(loads, options.systems):
        cell = {"engine": engine, "system": system} | load
        if any(cell.items() <= level.items() for level in levels):
            continue
        if load["loop"] == "open":
            rates = [one for one in levels if one["loop"] == "closed" and one["system"] == system]
            best = max((one["requests_per_second"] for one in rates if one["engine"] == rates[0]["engine"]), default=0)
            cell["arrivals_per_second"] = round(best * load["share"], 3)
        yield cell


async def run(url: str, pid: int | None, engine: str, result: dict[str, Any], options: argparse.Namespace) -> None:
    """Measure all cells of an engine that are missing."""
    client, rng = Client(url, options), random.Random(options.seed)
    prompts = [f"Question {n}: what do {', '.join(rng.sample(WORDS, rng.randint(2, 8)))} share?" for n in range(8)]
    questions = {system: [Question(system, prompt) for prompt in prompts] for system in options.systems}
    for one in questions.values():
        await client.learn(one)
    for cell in cells(engine, options, result["levels"]):
        result["levels"].append(await measure(client, cell, questions[cell["system"]], options))
        say(" | ".join(row(result["levels"][-1])))
        save(result, options)
    if options.soak:
        result["soak"][engine] = await soak(client, [q for one in questions.values() for q in one], pid, options)
        save(result, options)


def save(result: dict[str, Any], options: argparse.Namespace) -> None:
    """Write the file of the result, if there is one."""
    if options.out:
        write_json(options.out, result)


def row(level: dict[str, Any]) -> list[str]:
    """Return the row of a cell; "cut" stands for a time among the requests that were cut, a dash for too few."""

    def shown(times: dict[str, float | None], share: int) -> str:
        value = times.get(f"p{share}")
        missing = "cut" if level["requests"] - level["failed"] >= PERCENTILES[share] else "–"
        return missing if value is None else f"{value:.2f} s"

    closed = level["loop"] == "closed"
    load = (
        f"{level['clients']} client{'s' * (level['clients'] > 1)}"
        if closed
        else f"{level['arrivals_per_second']:.2f} arrivals/s"
    )
    lost = [f"{level[key]} {key}" for key in ("cut", "failed") if level[key]]
    answered = str(level["requests"] - level["cut"] - level["failed"])
    rates = [f"{level['requests_per_second']:.2f}", f"{level['tokens_per_second']:.1f}"]
    first = [shown(level["first_token_seconds"], share) for share in PERCENTILES]
    system = level.get("system") or level["way"]  # so older results call it
    whole = shown(level["seconds"], 50)
    return [level["engine"], system, load, ", ".join([answered, *lost]), *rates, *first, whole, str(level["differing"])]


def markdown(result: dict[str, Any]) -> str:
    """Return the table of a result."""
    rows = [HEADINGS, ["---"] * 3 + ["--:"] * (len(HEADINGS) - 3), *map(row, result["levels"])]
    return "\n".join(f"| {' | '.join(one)} |" for one in rows)


def say(text: str) -> None:
    """Print progress."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = parser.add_mutually_exclusive_group()
    models.add_argument("--fuser", type=Path, default=FUSER, help="folder of a fuser for a shared prompt")
    models.add_argument("--tiny", action="store_true", help="random models in place of the fuser's")
    models.add_argument("--url", help="a server that runs already")
    parser.add_argument("--name", default="pair", help="what the server calls its model")
    parser.add_argument("--engine", nargs="+", choices=["transformers", "vllm"], default=["transformers"])
    parser.add_argument("--serve-options", default="", help='more options of c2c serve, such as "--dtype bfloat16"')
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64], help="closed loop")
    parser.add_argument("--open", type=float, nargs="*", default=[0.5, 0.8], help="open loop, shares of the best rate")
    parser.add_argument("--systems", nargs="+", default=["receiver", "c2c", "text"])
    parser.add_argument("--requests", type=int, default=64, help="per cell; closed loop at least one for each client")
    parser.add_argument("--cell-seconds", type=float, default=300, help="longest time for a cell")
    parser.add_argument("--max-tokens", type=int, default=16, help="tokens per answer")
    parser.add_argument("--timeout", type=float, default=600, help="seconds per request")
    parser.add_argument("--soak", type=float, default=0, metavar="MINUTES", help="then mixed load for so long")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="file of the result; cells that it has are not measured again")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the table of a result in Markdown, and end")
    return parser.parse_args(given)


def main() -> None:
    """Run, and print the table."""
    options = arguments()
    if options.table:
        print(markdown(json.loads(options.table.read_text())))
        return
    machine = f"{platform.machine()}, {os.cpu_count()} cores, OMP_NUM_THREADS {os.environ.get('OMP_NUM_THREADS')}"
    settings = {key: value.name if isinstance(value, Path) else value for key, value in vars(options).items()}
    result = {"levels": [], "soak": {}, "settings": settings, "machine": machine}
    if options.out and options.out.exists():
        result |= json.loads(options.out.read_text())
    with tempfile.TemporaryDirectory() as folder:
        fuser = tiny(Path(folder)) if options.tiny else options.fuser
        for engine in options.engine:
            with nullcontext((options.url, None)) if options.url else server(engine, fuser, options) as (url, pid):
                asyncio.run(run(url, pid, engine, result, options))
    print(markdown(result), *result["soak"].items(), sep="\n")


if __name__ == "__main__":
    main()
