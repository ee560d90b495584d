"""``benchmarks/serve.py``: its cells end in time, a run goes on, and figures are only those that were seen."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import sys
from pathlib import Path

import pytest

from serving_harness import NAME, model, running

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import serve

    return serve


class Slow:
    """A client of a server that takes its time, and never answers some requests."""

    def __init__(self, serve, seconds=0.05, stuck=()):
        self.serve, self.seconds, self.stuck, self.sent = serve, seconds, stuck, itertools.count()

    async def send(self, question, until=math.inf):
        number, left = next(self.sent), until - asyncio.get_running_loop().time()
        seconds = math.inf if number in self.stuck else self.seconds
        await asyncio.sleep(min(seconds, left))
        if seconds > left:
            return self.serve.Outcome()
        return self.serve.Outcome(question.prompt, seconds / 2, seconds, tokens=4)

    def differs(self, question, outcome):
        return outcome.text is not None and outcome.text != question.prompt


def measure(serve, client, cell, seconds=0.4):
    options = serve.arguments(["--requests", "8", "--cell-seconds", str(seconds)])
    questions = [serve.Question("c2c", prompt) for prompt in ("one", "two")]
    return asyncio.run(serve.measure(client, {"engine": "vllm", "system": "c2c"} | cell, questions, options))


CLOSED = {"loop": "closed", "clients": 4}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], [None, None, None]),
        ([1.0, 3.0, 2.0], [2.0, None, None]),
        ([1.0] * 19 + [9.0], [1.0, 9.0, None]),
        ([1.0] * 99 + [9.0], [1.0, 1.0, 9.0]),
        ([1.0, math.inf, math.inf], [None, None, None]),
        ([1.0] * 12 + [math.inf] * 8, [1.0, None, None]),
    ],
)
def test_a_percentile_needs_enough_requests_that_were_answered(serve, values, expected):
    assert list(serve.percentiles(values).values()) == expected


def test_a_cell_whose_requests_are_all_answered(serve):
    level = measure(serve, Slow(serve), CLOSED, seconds=30)
    assert (level["requests"], level["cut"], level["failed"], level["differing"]) == (8, 0, 0, 0)
    assert level["first_token_seconds"]["p50"] == 0.025
    assert level["requests_per_second"] == pytest.approx(8 / level["elapsed_seconds"], rel=0.2)


@pytest.mark.parametrize("cell", [CLOSED, {"loop": "open", "arrivals_per_second": 100.0}])
def test_a_cell_ends_in_time_and_counts_what_was_cut(serve, cell):
    level = measure(serve, Slow(serve, stuck=range(2, 100)), cell)
    assert 0.3 < level["elapsed_seconds"] < 30
    assert level["requests"] - level["cut"] == 2
    assert level["cut"] > 1
    assert level["first_token_seconds"]["p50"] is None, "most took longer than is known"
    assert f"2, {level['cut']} cut" in serve.row(level)


def test_all_engines_get_the_arrivals_of_the_first(serve):
    levels = [
        {"engine": engine, "loop": "closed", "clients": clients, "system": "c2c", "requests_per_second": rate}
        for engine, clients, rate in (("transformers", 1, 1.5), ("transformers", 4, 3.0), ("vllm", 4, 8.0))
    ]
    options = serve.arguments(["--clients", "4", "--open", "0.5", "--systems", "c2c"])
    (cell,) = serve.cells("vllm", options, levels)
    assert cell["arrivals_per_second"] == 1.5


def test_a_run_measures_what_is_missing(serve, monkeypatch, tmp_path):
    out = tmp_path / "result.json"

    def run(server, *options):
        given = ["--url", server.url, "--name", NAME, "--requests", "2", "--max-tokens", "2", "--out", str(out)]
        monkeypatch.setattr(sys, "argv", ["serve.py", *given, *options])
        serve.main()
        return json.loads(out.read_text())

    with running(model(), window=0.001) as server:
        first = run(server, "--open", "--clients", "1", "--systems", "receiver")
        second = run(server, "--open", "0.5", "--clients", "1", "2", "--systems", "receiver", "c2c")
    assert second["levels"][0] == first["levels"][0], "it was measured again"
    assert [(level["system"], level.get("clients")) for level in second["levels"]] == [
        ("receiver", 1),
        ("c2c", 1),
        ("receiver", 2),
        ("c2c", 2),
        ("receiver", None),
        ("c2c", None),
    ]
    assert sum(level["failed"] + level["cut"] + level["differing"] for level in second["levels"]) == 0
    assert len(serve.markdown(second).splitlines()) == 2 + 6


def test_older_results_can_be_shown(serve):
    result = json.loads((BENCHMARKS / "results" / "serve_engines.json").read_text())
    assert serve.markdown(result).splitlines()[2].startswith("| hf | receiver | 1 client | 8 |")
