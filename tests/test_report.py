"""``c2c report``: what is loaded, which losses are marked, plots, files, and what is refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from markdown_it import MarkdownIt
from typer.testing import CliRunner

from c2c.cli.app import app
from c2c.data.config import DataSource
from c2c.evaluation import EvalConfig, evaluate
from c2c.evaluation.config import DIFFERENCES
from c2c.report import Evaluation, ReportError, load_evaluations, make_files, render
from c2c.report.names import short_command, task_titles
from tiny import saved_fuser

PERCENT, F1, NATS = "percent", "percent f1", "nats per token"
KEYS = {PERCENT: "accuracy", F1: "f1", NATS: "mean"}
GOOD = {"receiver": 28.0, "sharer": 60.0, "matched": 66.0, "deranged": 25.0, "zero": 26.0}
TIMED = {
    "matched": {"seconds": 0.6, "sharer_prefill": 0.4, "decode": 0.1, "bytes": 2.9e6, "timed": 10},
    "text": {"seconds": 1.62, "sharer_decode": 1.2, "tokens": 40, "bytes": 140, "memory": 2.1e8, "novel": 7},
}
runner = CliRunner()


def numbers(scores, *, n=300, width=2.0, unit=PERCENT, costs=None, **more) -> dict[str, Any]:
    """The numbers over some items as ``c2c eval`` writes them, every interval ``width`` wide on both sides."""
    systems = {name: {KEYS[unit]: value, "ci95": [value - width, value + width]} for name, value in scores.items()}
    for name, cost in (costs or {}).items():
        systems[name] |= cost
    row: dict[str, Any] = {"n": n, "unit": unit, "systems": systems}
    for letter, (one, other) in DIFFERENCES.items():
        if one in scores and other in scores:
            value = round(scores[one] - scores[other], 3)
            row |= {letter: value, f"{letter}_ci95": [round(value - width, 3), round(value + width, 3)]}
    if unit == PERCENT:
        row |= {"mended": 40.5, "spoiled": 2.5, "mcnemar_p": 1e-9, "gap_recovered": 112.5}
    return row | more


def result(row, *, sources=None, fuser="ab12" * 16, receiver="small", sharer="large", data=None, **config):
    data = data or list(sources or ["openbookqa/test.jsonl"])
    provenance = {
        "fuser": fuser,
        "receiver": {"name": receiver, "weights": f"{sum(map(ord, receiver)):x}"},
        "sharer": {"name": sharer, "weights": f"{sum(map(ord, sharer)):x}"},
        "data": dict.fromkeys(data, "c0ffee"),
        "config": {"data": [{"path": name} for name in data], "mode": "logits", "seed": 0, "limit": 300} | config,
        "command": "c2c eval --fuser zoo/small --data /home/someone/data/openbookqa/test.jsonl",
        "versions": {"c2c": "0.1.0"},
    }
    return row | ({"sources": sources} if sources else {}) | {"dropped": {}, "provenance": provenance}


def save(folder: Path, data) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "result.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def evaluations(tmp_path, *results) -> list[Evaluation]:
    for position, data in enumerate(results):
        save(tmp_path / f"run{position}", data)
    return load_evaluations([tmp_path])


def rows(text: str) -> dict[str, list[str]]:
    """The cells of all rows of a Markdown's tables by the first cell, of equal ones the first."""
    html = MarkdownIt("commonmark").enable("table").render(text)
    found: dict[str, list[str]] = {}
    for row in re.findall(r"<tr>(.*?)</tr>", html, flags=re.DOTALL):
        head, *cells = (re.sub("<[^>]*>", "", cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row))
        found.setdefault(head, cells)
    return found


def shown(tmp_path, *results) -> dict[str, list[str]]:
    """The rows of the tables of the only evaluation."""
    (one,) = evaluations(tmp_path, *results)
    return rows(render("report.md", [one], "T").partition("## ")[2])


@pytest.fixture
def varied(tmp_path) -> list[Evaluation]:
    """Several tasks, seeds, losses, costs, systems of a later version, F1, and nats."""
    bad = GOOD | {"sharer": 67.2, "deranged": 30.0, "text": 40.0, "hybrid": 70.0}
    sources = {"openbookqa/test.jsonl": numbers(bad, n=100), "arc_easy/test.jsonl": numbers(GOOD, n=200)}
    return evaluations(
        tmp_path,
        result(numbers(GOOD | {"text": 40.0}, costs=TIMED, speed={"text": {"ratio": 2.7}}), sources=sources),
        result(numbers(GOOD), fuser="cd" * 32, sharer="other"),
        result(numbers(bad), seed=1, fuser="ef" * 32, sharer="other"),
        result(numbers({"matched": 50.0, "deranged": 9.0}, unit=F1), mode="answers", data=["squad/dev.jsonl"]),
        result(numbers({"receiver": 2.9, "matched": 2.2}, unit=NATS, width=0.1), mode="nll", data=["gsm8k/a.jsonl"]),
    )


def test_an_evaluation_of_models_is_reported(tmp_path, tmp_path_factory):
    """All that ``c2c eval`` measures: systems, costs, a router that is fitted on dev, a second fuser."""
    fuser = saved_fuser(tmp_path_factory.mktemp)
    items = [{"question": f"Number {i}?", "choices": ["fox", "dog", "sun"], "answer": i % 3} for i in range(9)]
    for name, part in (("a.jsonl", items), ("b.jsonl", items[:5]), ("dev.jsonl", items[3:])):
        (tmp_path / name).write_text("".join(json.dumps(item) + "\n" for item in part))
    config = EvalConfig(
        fuser,
        [DataSource("a.jsonl"), DataSource("b.jsonl")],
        systems=(*GOOD, "text", "router", "twin"),
        fusers={"twin": fuser},
        dev=[DataSource("dev.jsonl")],
        timed=2,
        max_new_tokens=3,
        message_tokens=4,
        data_dir=str(tmp_path),
        output_dir=str(tmp_path / "out"),
    )
    found = evaluate(config)
    (one,) = load_evaluations([tmp_path / "out"])
    assert one.systems == {*GOOD, "text", "router", "twin"}
    pooled = one.values.loc["all questions"]
    assert pooled.loc[("n", ""), "value"] == 14
    assert pooled.loc[("score", "matched"), "value"] == found["systems"]["matched"]["accuracy"]
    assert pooled.loc[("difference", "P"), ["low", "high"]].tolist() == found["P_ci95"]
    assert pooled.loc[("ratio", "text"), "value"] == found["speed"]["text"]["ratio"]
    text = render("report.md", [one], "T")
    assert all(words in text for words in ("seconds of an answer", "sharer decode", "router: share", "fuser twin: "))
    assert re.search(r"^ +data dev.jsonl: [0-9a-f]{64}$", text, re.MULTILINE)


def test_tasks_seeds_and_units_are_grouped(varied):
    assert [(one.pair, one.title, len(one.runs), one.n) for one in varied] == [
        ("small \u2190 large", "OpenBookQA, ARC-Easy", 1, 300),
        ("small \u2190 other", "OpenBookQA", 2, 300),
        ("small \u2190 large", "SQuAD dev", 1, 300),
        ("small \u2190 large", "GSM8K a", 1, 300),
    ]
    assert varied[0].tasks == ["OpenBookQA", "ARC-Easy", "all questions"]
    assert len({one.anchor for one in varied}) == 4
    text = render("report.md", varied, "T")
    found = rows(text.partition("## ")[2])
    assert found["accuracy, %"] == ["OpenBookQA, n 100", "ARC-Easy, n 200", "all questions, n 300"]
    assert found["hybrid"] == ["70.0 [68.0, 72.0] \u25b2", "\u2013", "\u2013"]
    assert found["gap recovered"] == ["112.5"] * 3
    assert all(f"(#{one.anchor})" in text and f'<a id="{one.anchor}"></a>' in text for one in varied)


def test_settings_that_change_numbers_stand_apart_and_are_named(tmp_path):
    made = []
    for rank, tokens, seed in ((32, 256, 0), (128, 256, 0), (128, 64, 0), (128, 64, 1)):
        data = result(numbers(GOOD), fuser=f"{rank}{seed}", message_tokens=tokens)
        data["provenance"]["training"] = {"config": {"seed": seed, "fuser_options": {"rank": rank}}}
        made.append(data)
    found = {one.title: len(one.runs) for one in evaluations(tmp_path, *made)}
    settings = {"default message_tokens, rank 128": 1, "default message_tokens, rank 32": 1}
    settings["message_tokens 64, rank 128"] = 2
    assert found == {f"OpenBookQA, {name}": runs for name, runs in settings.items()}


def test_dev_data_and_empty_keys_of_sources_make_no_difference(tmp_path):
    other = result(numbers(GOOD), fuser="b", dev=[{"path": "dev.jsonl"}])
    other["provenance"]["data"]["dev.jsonl"] = "f00d"
    other["provenance"]["config"]["data"][0] |= {"keep": {}, "later": None}
    assert len(evaluations(tmp_path / "a", result(numbers(GOOD)), other)) == 1
    other["provenance"]["config"]["data"][0] |= {"keep": {"error_type": "ok"}}
    assert len(evaluations(tmp_path / "b", result(numbers(GOOD)), other)) == 2


def test_files_of_one_evaluation_are_one_run(tmp_path):
    first, second = result(numbers(GOOD)), result(numbers({"matched": 66.0, "text": 50.0}, costs=TIMED))
    found = shown(tmp_path / "a", first, second)
    assert found["text"][0] == "50.0 [48.0, 52.0]"
    assert found["T = matched - text"][0] == "+16.0 [14.0, 18.0]"
    assert found["zero"][0] == "26.0 [24.0, 28.0]"
    with pytest.raises(ReportError, match="different numbers for matched"):
        evaluations(tmp_path / "b", first, result(numbers(GOOD | {"matched": 60.0, "text": 50.0})))
    with pytest.raises(ReportError, match="give one of them"):
        evaluations(tmp_path / "c", second, second)


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ("{", "is not JSON"),
        ({"n": 3}, "provenance is None"),
        (result(numbers(GOOD, unit=PERCENT) | {"unit": None}), "unit is None"),
        (result(numbers(GOOD) | {"systems": {}}), "systems is {}"),
        (result(numbers(GOOD) | {"systems": [1]}), "systems is [1], expected an object"),
        (result(numbers(GOOD) | {"systems": {"matched": {"ci95": [0, 1]}}}), "accuracy, f1 or mean is None"),
        (result(numbers(GOOD) | {"systems": {"matched": {"accuracy": True}}}), "expected a number"),
        (result(numbers(GOOD) | {"n": 0}), "n is 0"),
        (result(numbers(GOOD) | {"P_ci95": 3}), "expected [low, high]"),
        (result(numbers(GOOD) | {"P": float("nan")}), "P is nan"),
        (result(numbers(GOOD) | {"speed": {"text": {"seconds": 1}}}), "speed.text.ratio is None"),
        (result(numbers(GOOD) | {"speed": [1]}), "speed is [1], expected an object"),
        (result(numbers(GOOD), sources={"a.jsonl": {"n": 3}}), "a.jsonl: systems is None"),
        (result(numbers(GOOD), receiver=""), "receiver.name"),
    ],
)
def test_a_file_that_is_not_a_result_is_named(tmp_path, broken, says):
    path = save(tmp_path, broken)
    with pytest.raises(ReportError) as error:
        load_evaluations([path])
    assert all(part in str(error.value) for part in (says, str(path), "c2c eval --output-dir"))


def test_missing_and_empty_inputs_are_named_and_a_file_is_loaded_once(tmp_path):
    for paths, says in (([tmp_path / "no"], "does not exist"), ([tmp_path], "no result.json"), ([], "no results")):
        with pytest.raises(ReportError, match=says):
            load_evaluations(paths)
    path = save(tmp_path / "a", result(numbers(GOOD)))
    assert len(load_evaluations([path, tmp_path, tmp_path / "a"])) == 1


def test_data_and_commands_are_named_without_folders_of_a_machine(tmp_path):
    names = ["arc_easy/test.jsonl (8 options)", "mine/dev.jsonl", "owner/set", "/home/me/data/squad/dev.jsonl"]
    assert list(task_titles(names).values()) == ["ARC-Easy (8 options)", "mine/dev", "owner/set", "SQuAD dev"]
    same = ["a/squad/test.jsonl", "b/squad/test.jsonl"]
    assert list(task_titles(same).values()) == same
    command = "c2c eval --data=/home/someone/x.jsonl --data /srv/data/arc/test.jsonl --fuser ~/fusers/one --limit 3"
    assert short_command(command) == (
        "c2c eval --data=.../x.jsonl --data .../arc/test.jsonl --fuser .../fusers/one --limit 3"
    )
    data = result(numbers(GOOD), receiver="/home/someone/models/small", data=["/home/someone/data/squad/test.jsonl"])
    data["provenance"]["sharer"] = [{"name": "/home/someone/a"}, {"name": "b"}]
    files = make_files(evaluations(tmp_path, data), "T", html=Path("r.html"), markdown=Path("r.md"))
    assert all("someone" not in text and "small \u2190 a + b: SQuAD" in text for text in files.values())


@pytest.mark.parametrize(
    ("scores", "row", "marked"),
    [
        ({}, "P = matched - deranged", False),
        ({"deranged": 65.0}, "P = matched - deranged", True),  # the interval reaches zero
        ({"receiver": 65.0}, "G = matched - receiver", True),
        ({}, "S = matched - sharer", False),
        ({"sharer": 65.0}, "S = matched - sharer", True),
        ({"adapter": 65.0}, "A = matched - adapter", True),
        ({"text": 70.0}, "T = matched - text", True),
        ({"text": 40.0}, "T = matched - text", False),
        ({"deranged": 28.4}, "D = deranged - receiver", True),
        ({"deranged": 20.0}, "D = deranged - receiver", False),
    ],
)
def test_losses_are_marked(tmp_path, scores, row, marked):
    assert ("\u2717" in shown(tmp_path, result(numbers(GOOD | scores)))[row][0]) == marked


def test_whatever_is_better_than_matched_is_marked_and_the_best_is_bold(tmp_path):
    scores = {"sharer": 67.2, "router": 66.5, "of_the_future": 70.0, "linear": 66.0}
    (one,) = evaluations(tmp_path, result(numbers(GOOD | scores)))
    text = render("report.md", [one], "T").partition("## ")[2]
    ahead = {head for head, cells in rows(text).items() if any("\u25b2" in cell for cell in cells)}
    assert ahead == {"sharer", "router", "of the future"}
    assert re.findall(r"\*\*([\d.]+)\*\*", text) == ["70.0"]


def test_less_is_better_in_nats_and_no_interval_is_no_gain(tmp_path):
    nats = {"receiver": 2.9, "matched": 2.2, "deranged": 2.95}
    good = shown(tmp_path / "a", result(numbers(nats, unit=NATS, width=0.1)))
    assert good["P = matched - deranged"] == ["-0.750 [-0.850, -0.650]"]
    assert good["G = matched - receiver"] == ["-0.700 [-0.800, -0.600]"]
    bad = shown(tmp_path / "b", result(numbers(nats | {"deranged": 2.1}, unit=NATS, width=0.1)))
    assert bad["P = matched - deranged"] == ["+0.100 [0.000, 0.200] \u2717"]
    assert bad["deranged"] == ["2.100 [2.000, 2.200] \u25b2"]
    row = {name: value for name, value in numbers(GOOD).items() if not name.startswith(("P", "G_ci95"))}
    found = shown(tmp_path / "c", result(row))
    assert found["P = matched - deranged"] == ["+41.0 \u2717"]
    assert found["G = matched - receiver"] == ["+38.0 \u2717"]


def test_runs_are_shown_as_their_mean_and_one_by_one(tmp_path):
    runs = [result(numbers(GOOD | {"sharer": 60.0 + 4 * i}), seed=i, fuser=f"{i}a" * 32) for i in range(3)]
    runs[0]["systems"]["text"] = {"accuracy": 50.0}
    (one,) = evaluations(tmp_path, *runs)
    text = render("report.md", [one], "T")
    found = rows(text.partition("## ")[2])
    assert found["sharer"] == ["64.0 (60.0 to 68.0)"]
    assert found["matched"] == ["66.0"]  # the same in every run
    assert found["text"] == ["50.0 (1 of 3 runs)"]
    assert found["S = matched - sharer"] == ["+2.0 (-2.0 to 6.0) \u2717"]  # a loss in one of them
    assert "fuser 1a1a1a1a1a1a, seed 1" in text
    assert "**68.0** [66.0, 70.0] \u25b2" in text
    assert rows(render("summary.md", [one]))["OpenBookQA"][0] == "300 (3 runs)"


def test_costs_and_written_answers_have_rows(tmp_path):
    row = numbers({"matched": 50.0, "text": 40.0}, unit=F1, costs=TIMED, speed={"text": {"ratio": 2.7, "ci95": [2, 3]}})
    for name, exact in (("matched", 31.0), ("text", 22.0)):
        row["systems"][name] |= {"exact": exact, "holds": exact + 30}
    data = result(row, mode="answers")
    text = render("report.md", evaluations(tmp_path, data), "T")
    for cells in (
        "| matched | **31.0** |", "| text | 52.0 |", "| text | 1.62 |", "| text | 2.70 [2.00, 3.00] |",
        "| matched | 2.9 MB |", "| text | 210.0 MB |", "| text | 140.0 B |", "| *novel* |",
    ):  # fmt: skip
        assert cells in text
    assert rows(render("summary.md", evaluations(tmp_path, data)))["OpenBookQA (F1, %)"][-1] == "1.62 / 0.6"
    faster = result(row | {"speed": {"text": {"ratio": 0.5}}}, mode="answers", sharer="faster")
    assert "0.50 \u2717" in render("report.md", evaluations(tmp_path / "b", faster), "T")


def parse(html: str) -> tuple[list[str], list[tuple[str, str]], str]:
    """The tags, attributes and text of a page."""
    tags, attributes, texts = [], [], []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attrs: (tags.append(tag), attributes.extend(attrs))
    parser.handle_data = texts.append
    parser.feed(html)
    return tags, attributes, "".join(texts)


def test_the_page_needs_nothing_else(varied):
    tags, attributes, text = parse(make_files(varied, "Our results", html=Path("r.html"))[Path("r.html")])
    assert not {"script", "link", "iframe"} & set(tags)
    ids = [value for name, value in attributes if name == "id"]
    addresses = [value for name, value in attributes if name in ("href", "src")]
    assert addresses
    assert all(address.startswith("data:") or address[1:] in ids for address in addresses)
    assert tags.count("img") == 4
    for words in ("Our results", "P = matched - deranged", "hybrid", "c0ffee", "2.9 MB", "\u2717"):
        assert words in text


def test_plots_are_deterministic_svg(varied, tmp_path):
    files, again = (make_files(varied, "T", markdown=Path("r.md"), plots=Path("p")) for _ in range(2))
    assert files == again
    plots = {path.stem: text for path, text in files.items() if path.suffix == ".svg"}
    assert list(plots) == ["accuracy", "open-answers", "content", "speed"]
    for svg in plots.values():
        ElementTree.fromstring(svg)
    assert all(words in plots["accuracy"] for words in ("ARC-Easy", "matched", "small \u2190 other"))
    assert all(words in plots["content"] for words in ("SQuAD dev", "OpenBookQA, run 2"))
    assert all(words in plots["speed"] for words in ("sharer prefill", "text"))


def test_unusual_numbers_are_drawn(tmp_path):
    """Equal scores, no intervals, no seconds, a single system that has no style."""
    level = {name: {"accuracy": 50.0, "seconds": 0.0} for name in ("receiver", "matched", "deranged")}
    some = evaluations(
        tmp_path,
        result({"n": 2, "unit": PERCENT, "systems": level}),
        result({"n": 2, "unit": "points of $x$", "systems": {"new_$y^$": {"mean": 0.0}}}, sharer="$z$"),
    )
    files = make_files(some, "T", html=Path("r.html"), markdown=Path("p/r.md"), plots=Path("p"))
    assert {path.name for path in files} == {"r.html", "r.md", "accuracy.svg", "content.svg"}


EVIL = "<script>alert(1)</script> $x$ `|` [a](http://b) **c** & \"q\" 'r'"


def test_nothing_from_a_file_is_markup(tmp_path):
    scores = GOOD | {EVIL: 90.0}
    sources = {f"{EVIL}/a.jsonl": numbers(scores), "b.jsonl": numbers(scores)}
    data = result(numbers(scores), sources=sources, receiver=EVIL, sharer=f"{EVIL}\n# heading", mode=EVIL, fuser=EVIL)
    data["provenance"] |= {"command": f"c2c eval ```` {EVIL}", "versions": {EVIL: EVIL}}
    data["dropped"] = {EVIL: 3}
    files = make_files(evaluations(tmp_path, data), EVIL, html=Path("r.html"), markdown=Path("r.md"))
    tags, _, text = parse(files[Path("r.html")])
    assert not {"script", "strong", "em"} & set(tags)
    assert "<script>alert(1)</script>" in text
    html = MarkdownIt("commonmark").enable("table").render(files[Path("r.md")])
    assert "<script" not in html
    assert 'href="http' not in html
    assert html.count("<h1>") == 1
    assert " ".join(EVIL.split()) in parse(html)[2]


def report(*arguments) -> tuple[int, str, Exception | None]:
    done = runner.invoke(app, ["report", *map(str, arguments)])
    return done.exit_code, done.stdout, done.exception


def test_markdown_and_the_summary_are_printed(tmp_path):
    source = save(tmp_path, result(numbers(GOOD)))
    code, out, _ = report(source, "--title", "My title")
    assert (code, out[:26], "# My title" in out) == (0, "<!-- Made by `c2c report` ", True)
    code, out, _ = report(source, "--overview")
    assert (code, "# " in out, rows(out)["OpenBookQA"][:3]) == (0, False, ["300", "28.0", "60.0"])


def test_files_are_written_and_checked(tmp_path):
    source, markdown, plots = save(tmp_path, result(numbers(GOOD))), tmp_path / "docs/r.md", tmp_path / "docs/plots"
    arguments = [source, "--markdown", markdown, "--plots", plots]
    assert report(*arguments)[0] == 0
    images = re.findall(r"!\[[^]]*\]\(([^)]+)\)", markdown.read_text())
    assert {(markdown.parent / image).resolve() for image in images} == set(plots.iterdir())
    (plots / "accuracy.svg").write_text("drawn by another matplotlib")
    assert report(*arguments, "--check")[0] == 0
    (plots / "old.svg").write_text("")
    assert "old.svg" in str(report(*arguments, "--check")[2])
    markdown.write_text(markdown.read_text().replace("66.0", "77.0"))
    code, _, error = report(source, "--markdown", markdown, "--check")
    assert code == 1
    assert "77.0" in markdown.read_text()  # nothing was written
    assert all(part in str(error) for part in (str(markdown), "Run: c2c"))
    assert "no such file" in str(report(source, "--html", tmp_path / "no.html", "--check")[2])
    assert report(source, "--check")[0] == report(source, "--plots", plots)[0] == 2  # without a file to check or show
    assert "can't be written" in str(report(source, "--markdown", source / "r.md")[2])


def test_a_readme_is_filled_and_checked(tmp_path):
    text = result(numbers(GOOD | {"text": 40.0}, n=60, costs=TIMED), limit=60)
    for name, data in (("a", result(numbers(GOOD))), ("b", text), ("c", result(numbers(GOOD), mode="generate"))):
        save(tmp_path / "in" / name, data)
    readme = tmp_path / "README.md"
    readme.write_text("# Mine\n\n<!-- results -->\nold\n<!-- /results -->\n\nMore.\n")
    assert report(tmp_path / "in", "--readme", readme, "--check")[0] == 1
    assert "old" in readme.read_text()  # only checked
    assert report(tmp_path / "in", "--readme", readme)[0] == 0
    filled = readme.read_text()
    assert re.fullmatch(r"# Mine\n\n<!-- results -->\n.*\n<!-- /results -->\n\nMore\.\n", filled, re.DOTALL)
    found = rows(filled)
    assert len(found) == 4  # columns, the pair, and a row for each family
    assert found["OpenBookQA"] == [
        "300", "28.0", "60.0", "66.0", "25.0", "+41.0 [39.0, 43.0]", "40.0 (n 60)", "1.62 / 0.6"
    ]  # fmt: skip
    assert report(tmp_path / "in", "--readme", readme, "--check")[0] == 0
    assert report(tmp_path / "in", "--readme", readme)[0] == 0
    assert readme.read_text() == filled  # and again the same


@pytest.mark.parametrize("text", ["# Mine\n", "<!-- /results -->\n<!-- results -->\n", "<!-- results -->\n" * 2, None])
def test_a_readme_without_its_marks_is_refused(tmp_path, text):
    readme = tmp_path / "README.md"
    if text is not None:
        readme.write_text(text)
    code, _, error = report(save(tmp_path / "in", result(numbers(GOOD))), "--readme", readme)
    assert (code, type(error)) == (1, ReportError)
    assert str(readme) in str(error)
    assert text is None or readme.read_text() == text


@pytest.mark.parametrize(("missing", "says"), [("", "is not JSON"), ("pandas", "pandas>=|.report.")])
def test_errors_are_one_message_and_torch_is_not_imported(tmp_path, missing, says):
    code = (
        f"import sys; sys.modules |= dict.fromkeys('{missing}'.split()); sys.argv = ['c2c', 'report', sys.argv[1]]\n"
        "from c2c.cli import main\n"
        "try: main()\n"
        "finally: assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, str(save(tmp_path, "{"))], capture_output=True, text=True)
    assert (done.returncode, done.stderr[:5], "Traceback" in done.stderr) == (1, "c2c: ", False)
    assert re.search(says, done.stderr)
