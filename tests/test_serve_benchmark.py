"""``benchmarks/serve.py``: its cells end in time, a killed run goes on, and figures are only those that were seen."""

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


@pytest.fixture(scope="module")
def server():
    with running(model(), window=0.001) as found:
        yield found


def run(serve, monkeypatch, server, out, *options) -> dict:
    """The benchmark on a server that runs, with few short requests."""
    given = ["--url", server.url, "--name", NAME, "--requests", "3", "--prompts", "2", "--max-tokens", "3"]
    monkeypatch.setattr(sys, "argv", ["serve.py", *given, "--out", str(out), *options])
    serve.main()
    return json.loads(out.read_text())


class Slow:
    """Clients of a server that takes its time, and never answers some requests."""

    def __init__(self, serve, seconds=0.05, stuck=()):
        self.serve, self.seconds, self.stuck, self.asked = serve, seconds, stuck, itertools.count()

    async def ask(self, question, until=math.inf, stream=True):
        number, left = next(self.asked), until - asyncio.get_running_loop().time()
        seconds = math.inf if number in self.stuck else self.seconds
        await asyncio.sleep(min(seconds, left))
        if seconds > left:
            return self.serve.Answer()
        return self.serve.Answer(question.prompt, seconds / 2, seconds, tokens=4)

    def differs(self, question, answer):
        return answer.text is not None and answer.text != question.prompt


def cell(serve, clients, loop="closed", load=4, requests=8, seconds=0.4, record=None):
    arguments = serve._arguments(["--requests", str(requests), "--cell-seconds", str(seconds)])
    questions = [serve.Question("c2c", prompt) for prompt in ("one", "two")]
    record = record or serve.Record(None, {})
    return asyncio.run(serve._cell(record, serve.Cell("hf", loop, load, "c2c"), clients, questions, arguments))


# -- figures -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, 3.0, 2.0], [2.0, None, None]),
        ([1.0] * 19 + [9.0], [1.0, 9.0, None]),
        ([1.0] * 99 + [9.0], [1.0, 1.0, 9.0]),
        ([1.0, math.inf, math.inf], [None, None, None]),
        ([1.0] * 12 + [math.inf] * 8, [1.0, None, None]),
    ],
)
def test_a_percentile_needs_enough_requests_that_were_answered(serve, values, expected):
    assert list(serve._percentiles(values).values()) == expected


def test_no_requests_no_percentiles(serve):
    assert serve._percentiles([]) is None


def test_a_cell_whose_requests_are_all_answered(serve):
    level = cell(serve, Slow(serve), seconds=30)
    assert (level["requests"], level["cut"], level["failed"], level["differing"]) == (8, 0, 0, 0)
    assert level["first_token_seconds"]["p50"] == 0.025
    assert level["requests_per_second"] == pytest.approx(8 / level["elapsed_seconds"], rel=0.2)


@pytest.mark.parametrize("loop", ["closed", "open"])
def test_a_cell_ends_in_time_and_counts_what_was_cut(serve, loop):
    record = serve.Record(None, {})
    record.add(serve.Cell("hf", "closed", 4, "c2c"), {"way": "c2c", "requests_per_second": 100.0})
    level = cell(
        serve, Slow(serve, stuck=range(2, 100)), loop=loop, load={"closed": 4, "open": 1.0}[loop], record=record
    )
    assert 0.3 < level["elapsed_seconds"] < 3
    assert level["requests"] - level["cut"] == 2
    assert level["cut"] > 1
    assert level["first_token_seconds"]["p50"] is None, "most were not answered, so half of them took longer than known"
    row = serve._row({"cell": "x", "engine": "hf", "loop": loop} | level)
    assert "cut" in row
    assert f"2, {level['cut']} cut" in row


def test_all_engines_get_the_arrivals_of_the_first(serve):
    record = serve.Record(None, {})
    for engine, rate in (("hf", 3.0), ("vllm", 8.0)):
        for clients, share in ((1, 0.5), (4, 1.0)):
            level = {"way": "c2c", "requests_per_second": rate * share}
            record.add(serve.Cell(engine, "closed", clients, "c2c"), level)
    assert record.best("c2c") == 3.0
    assert record.best("text") == 0.0
    level = cell(serve, Slow(serve), loop="open", load=0.5, record=serve.Record(None, {}))
    assert level["requests"] == 0, "without a rate nobody arrives"


def test_agreement_of_engines_is_counted(serve):
    record = serve.Record(None, {})
    record.engine("hf")["singles"] = {"c2c, one, greedy": "a", "c2c, two, greedy": "b", "c2c, two, seed 1": "x"}
    record.engine("vllm")["singles"] = {"c2c, one, greedy": "a", "c2c, two, greedy": "c", "c2c, two, seed 1": "y"}
    assert record.result()["agreement"] == {"c2c": "1 of 2"}


# -- a run -------------------------------------------------------------------------------------------------------------


def test_a_run_goes_on_where_it_was(serve, monkeypatch, server, tmp_path):
    out = tmp_path / "result.json"
    closed = ["--open", "--clients", "1", "--ways", "receiver"]
    first = run(serve, monkeypatch, server, out, *closed)
    assert [level["cell"] for level in first["levels"]] == ["hf, closed, 1, receiver"]
    more = ["--open", "0.5", "--clients", "1", "4", "--ways", "receiver", "c2c"]
    second = run(serve, monkeypatch, server, out, *more)
    assert second["levels"][0] == first["levels"][0], "it was measured again"
    assert [level["cell"] for level in second["levels"][1:]] == [
        "hf, closed, 1, c2c",
        "hf, closed, 4, receiver",
        "hf, closed, 4, c2c",
        "hf, open, 0.5, receiver",
        "hf, open, 0.5, c2c",
    ]
    assert (second["failed"], second["cut"], second["differing"]) == (0, 0, 0)
    assert second["requests"] == 3 + 3 + 4 + 4 + 3 + 3
    table = serve.markdown(second).splitlines()
    assert table[2].startswith("| hf | receiver | 1 client | 3 |")
    assert len(table) == 2 + 6
    before = out.read_bytes()
    monkeypatch.setattr(serve, "_run", lambda *_: pytest.fail("nothing was missing"))
    run(serve, monkeypatch, server, out, *more)
    assert out.read_bytes() == before


def test_a_run_that_is_killed_keeps_its_cells(serve, monkeypatch, server, tmp_path):
    out = tmp_path / "result.json"
    options = ["--open", "--clients", "1", "2", "--ways", "receiver"]
    rest = serve.Clients.rest

    async def killed(clients):
        raise KeyboardInterrupt

    monkeypatch.setattr(serve.Clients, "rest", killed)
    with pytest.raises(KeyboardInterrupt):
        run(serve, monkeypatch, server, out, *options)
    kept = json.loads(out.read_text())
    assert [level["clients"] for level in kept["levels"]] == [1]
    monkeypatch.setattr(serve.Clients, "rest", rest)
    whole = run(serve, monkeypatch, server, out, *options)
    assert whole["levels"][0] == kept["levels"][0]
    assert whole["engines"]["hf"]["singles"] == kept["engines"]["hf"]["singles"]
    assert [level["clients"] for level in whole["levels"]] == [1, 2]


def test_other_settings_are_not_mixed(serve, monkeypatch, server, tmp_path):
    out = tmp_path / "result.json"
    options = ["--open", "--clients", "1", "--ways", "receiver"]
    run(serve, monkeypatch, server, out, *options)
    with pytest.raises(SystemExit, match="max_tokens was 3, now 5"):
        run(serve, monkeypatch, server, out, *options, "--max-tokens", "5")


def test_cells_can_be_left_out(serve):
    arguments = serve._arguments(["--clients", "4", "64", "--open", "0.5", "--leave-out", "64:text", "0.5:c2c"])
    names = [cell.name for cell in serve._missing(serve.Record(None, {}), "hf", arguments)]
    assert len(names) == 3 + 2 + 2
    assert "hf, closed, 64, text" not in names
    assert "hf, open, 0.5, c2c" not in names


def test_each_engine_has_its_interpreter(serve, tmp_path):
    arguments = serve._arguments(
        ["--engine", "both", "--vllm-python", "/there/python", "--dtype", "float32", "--sharer-dtype", "bfloat16"]
    )
    assert arguments.engine == ["hf", "vllm"]
    ours, theirs = (serve._command(engine, tmp_path, arguments) for engine in arguments.engine)
    assert ours[0] == sys.executable
    assert theirs[0] == "/there/python"
    for command, engine in ((ours, "transformers"), (theirs, "vllm")):
        assert command[command.index("--engine") + 1] == engine
        assert command[command.index("--sharer-dtype") + 1] == "bfloat16"


def test_the_options_are_those_of_the_command(serve, tmp_path):
    """What the server is started with is there: it would be told after minutes otherwise."""
    import typer

    from c2c.cli import app

    arguments = serve._arguments(["--dtype", "float32", "--sharer-dtype", "bfloat16"])
    options = serve._command("vllm", tmp_path, arguments)[4:]
    typer.main.get_command(app).commands["serve"].make_context("serve", options)
