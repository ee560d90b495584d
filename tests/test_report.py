"""``c2c report``: what is read, every loss in words, plots, files, and what is refused. All results are made up."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from typer.testing import CliRunner

from c2c.cli.app import app
from c2c.evaluation.statistics import summarise
from c2c.reporting import ReportError, draw, group, make_files, read_results, to_html, to_markdown
from c2c.reporting.canvas import look
from c2c.reporting.findings import CAUTION, GAIN, LOSS, findings
from c2c.reporting.losses import losses
from c2c.reporting.markdown import escape
from c2c.reporting.names import CONTROLS, portable_command, task_titles
from c2c.reporting.results import Numbers
from c2c.reporting.sections import Section, run_title
from c2c.reporting.tables import detail_tables, section_tables
from c2c.reporting.text import Estimate, Unit, fixed

PERCENT, NATS = "percent", "nats per token"
GOOD = {"receiver": 28.0, "sharer": 60.0, "matched": 66.0, "deranged": 25.0, "zero": 26.0}
GAINS = {
    "G": ("matched", "receiver"),
    "P": ("matched", "deranged"),
    "Z": ("matched", "zero"),
    "D": ("deranged", "receiver"),
    "S": ("matched", "sharer"),
    "T": ("matched", "text"),
    "A": ("matched", "adapter"),
}
NOT_MEASURED = "Text-to-text and an adapter of the receiver were not measured"
runner = CliRunner()


def numbers(scores, *, n=300, width=2.0, unit=PERCENT, costs=None, **more):
    """One table row as ``c2c eval`` writes it, every interval ``width`` wide on both sides."""
    key = "accuracy" if unit == PERCENT else "mean"
    systems = {name: {key: value, "ci95": [value - width, value + width]} for name, value in scores.items()}
    for name, cost in (costs or {}).items():
        systems[name] |= cost
    row = {"n": n, "unit": unit, "systems": systems}
    for letter, (one, other) in GAINS.items():
        if one in scores and other in scores:
            value = round(scores[one] - scores[other], 3)
            row |= {letter: value, f"{letter}_ci95": [round(value - width, 3), round(value + width, 3)]}
    if unit == PERCENT:
        row |= {"mended": 40.5, "spoiled": 2.5, "mcnemar_p": 1e-9, "gap_recovered": 112.5}
    return row | more


def result(row, *, sources=None, fuser="ab12" * 16, seed=0, mode="logits", receiver="small", sharer="large", data=None):
    data = data or list(sources or ["openbookqa/test.jsonl"])
    config = {"data": [{"path": name, "form": "letter", "options": None} for name in data]}
    provenance = {
        "fuser": fuser,
        "receiver": {"name": receiver, "weights": f"{sum(map(ord, receiver)):x}"},
        "sharer": {"name": sharer, "weights": f"{sum(map(ord, sharer)):x}"},
        "data": dict.fromkeys(data, "c0ffee"),
        "config": config | {"mode": mode, "seed": seed, "limit": 300, "systems": list(row["systems"])},
        "key": f"key {fuser} {seed}",
        "command": "c2c eval --fuser zoo/small --data /home/someone/data/openbookqa/test.jsonl",
        "versions": {"c2c": "0.1.0", "torch": "2.13.0"},
    }
    return row | ({"sources": sources} if sources else {}) | {"dropped": {}, "provenance": provenance}


def save(folder: Path, data) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "result.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def sections(tmp_path, *results) -> list[Section]:
    for position, data in enumerate(results):
        save(tmp_path / f"run{position}", data)
    return group(read_results([tmp_path]))


def section(tmp_path, *results) -> Section:
    (only,) = sections(tmp_path, *results)
    return only


def found(section: Section, level: str) -> dict[str, str]:
    return {one.lead: one.text for one in findings(section) if one.level == level}


@pytest.fixture
def varied(tmp_path):
    """Several tasks, several seeds, losses, costs, systems of a later version, and losses in nats."""
    slow = {"matched": {"seconds": 0.66, "bytes": 2.9e6, "first_token": 0.6}, "sharer": {"seconds": 0.44, "tokens": 12}}
    bad = GOOD | {"sharer": 67.2, "deranged": 30.0, "text": 40.0, "hybrid": 70.0}
    sources = {"openbookqa/test.jsonl": numbers(bad, n=100, costs=slow), "arc_easy/test.jsonl": numbers(GOOD, n=200)}
    nats = {"receiver": 2.9, "matched": 2.2, "deranged": 2.95}
    return sections(
        tmp_path,
        result(numbers(GOOD, costs=slow), sources=sources),
        result(numbers(GOOD), seed=0, fuser="cd" * 32, sharer="other"),
        result(numbers(bad), seed=1, fuser="ef" * 32, sharer="other"),
        result(numbers(nats, unit=NATS, width=0.1), mode="nll", data=["squad/dev.jsonl"]),
    )


# Reading


def test_what_eval_computes_is_read(tmp_path):
    """The numbers of a real summary, not only made-up ones."""
    draw = np.random.default_rng(0)
    scores = {name: (draw.random(60) < rate / 100).astype(float).tolist() for name, rate in GOOD.items()}
    row = summarise(scores, 0)
    read = section(tmp_path, result(row)).numbers("OpenBookQA")[0]
    assert read.n == 60
    assert read.scores["matched"].value == row["systems"]["matched"]["accuracy"]
    assert [read.gains["P"].low, read.gains["P"].high] == row["P_ci95"]
    assert (read.mended, read.spoiled, read.mcnemar_p) == (row["mended"], row["spoiled"], row["mcnemar_p"])
    losses_in_nats = {name: draw.random(20).tolist() for name in ("receiver", "matched", "deranged")}
    data = result(summarise(losses_in_nats, 0, percent=False), mode="nll")
    assert section(tmp_path / "nll", data).unit.sign == -1


def test_sources_become_tasks_and_all_questions_come_last(varied):
    first = next(one for one in varied if len(one.tasks) > 1)
    assert first.tasks == ["OpenBookQA", "ARC-Easy", "all questions"]
    assert first.headline == "all questions"
    assert [one.n for one in first.numbers("ARC-Easy")] == [200]


def test_runs_of_one_pair_are_one_section_and_accuracies_come_first(varied):
    assert [(one.title, one.mode, len(one.runs)) for one in varied] == [
        ("small \u2190 large", "logits", 1),
        ("small \u2190 other", "logits", 2),
        ("small \u2190 large", "nll", 1),
    ]
    assert [run.seed for run in varied[1].runs] == [0, 1]
    assert len({one.slug for one in varied}) == 3


def test_other_data_or_another_mode_is_another_section(tmp_path):
    row = numbers(GOOD)
    found = sections(tmp_path, result(row), result(row, mode="generate"), result(row, data=["arc_easy/test.jsonl"]))
    assert len(found) == 3


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ("{", "is not JSON"),
        ("[1]", "expected a JSON object"),
        ({"n": 3}, "provenance is missing"),
        ({"fuser": "x", "results": {}, "provenance": {}}, "unit is missing"),
        (result(numbers(GOOD) | {"systems": {}}), "systems is empty"),
        (result(numbers(GOOD) | {"systems": {"matched": {"ci95": [0, 1]}}}), "no 'accuracy', 'f1' or 'mean'"),
        (result(numbers(GOOD) | {"systems": {"matched": {"accuracy": "66"}}}), "expected a number"),
        (result(numbers(GOOD) | {"systems": {"matched": {"accuracy": True}}}), "expected a number"),
        (result(numbers(GOOD) | {"n": 0}), "expected the number of items"),
        (result(numbers(GOOD) | {"P_ci95": 3}), "expected [low, high]"),
        (result(numbers(GOOD) | {"P": float("nan")}), "expected a number"),
        (result(numbers(GOOD), sources={"a.jsonl": {"n": 3}}), "sources.a.jsonl.systems is missing"),
        (result(numbers(GOOD), receiver=""), "provenance.receiver.name"),
    ],
)
def test_what_is_not_a_result_is_named(tmp_path, broken, says):
    path = save(tmp_path, broken)
    with pytest.raises(ReportError) as error:
        read_results([path])
    assert says in str(error.value)
    assert str(path) in str(error.value)
    assert "c2c eval --output-dir" in str(error.value)


def test_missing_and_empty_inputs_are_named(tmp_path):
    with pytest.raises(ReportError, match=r"nothing does not exist.*c2c eval"):
        read_results([tmp_path / "nothing"])
    with pytest.raises(ReportError, match=r"holds no result.json"):
        read_results([tmp_path])
    with pytest.raises(ReportError, match="no results were given"):
        read_results([])
    items = tmp_path / "items.jsonl"
    items.write_text('{"key": "x"}\n{"id": 1}\n')
    with pytest.raises(ReportError, match=r"result.json beside it"):
        read_results([items])


def test_one_file_given_twice_is_read_once_but_a_copy_is_refused(tmp_path):
    path = save(tmp_path / "a", result(numbers(GOOD)))
    assert len(read_results([path, tmp_path, tmp_path / "a"])) == 1
    save(tmp_path / "b", result(numbers(GOOD)))
    with pytest.raises(ReportError, match="the same evaluation"):
        read_results([tmp_path])


def test_titles_of_data():
    names = [
        "arc_easy/test.jsonl (sentence, 8 options)",
        "mine/dev.jsonl",
        "owner/set",
        "/home/me/data/squad/dev.jsonl",
    ]
    assert list(task_titles(names).values()) == [
        "ARC-Easy (sentence, 8 options)", "mine/dev", "owner/set", "SQuAD dev"
    ]  # fmt: skip
    assert task_titles(["a/squad/test.jsonl", "b/squad/test.jsonl"]) == {
        "a/squad/test.jsonl": "a/squad/test.jsonl",
        "b/squad/test.jsonl": "b/squad/test.jsonl",
    }


def test_exact_answers_stand_beside_their_f1(tmp_path):
    def written(exact: float) -> dict[str, Any]:
        row = numbers({"receiver": 12.5, "matched": 80.0}, unit="percent f1")
        for name, value in (("receiver", 0.0), ("matched", exact)):
            system = row["systems"][name]
            system |= {"f1": system.pop("mean"), "exact": value, "holds": value + 5}
        return row

    one = section(tmp_path, result(written(50.0), seed=0), result(written(60.0), seed=1, fuser="cd" * 32))
    [table] = [table for table in section_tables(one) if table.caption == "Exact answers, percent"]
    assert table.columns == ["data", "receiver", "matched"]
    [[_, *cells]] = [row for part in table.groups for row in part.rows]
    assert [cell.text for cell in cells] == ["0.0", "55.0"], "the mean of both runs"
    each = [table for table in detail_tables(one) if table.caption == "Exact answers, percent"]
    assert [row[-1].text for part in each[0].groups for row in part.rows] == ["50.0", "60.0"]
    held = [table for table in section_tables(one) if table.caption == "Answers that hold a reference, percent"]
    assert [row[-1].text for part in held[0].groups for row in part.rows] == ["60.0"]


def test_who_has_the_right_words_more_often_is_told(tmp_path):
    row = numbers(
        {"receiver": 2.0, "sharer": 10.0, "matched": 20.0, "deranged": 4.0, "reader": 12.0}, unit="percent f1"
    )
    held = {"receiver": 3.0, "sharer": 13.0, "matched": 13.0, "deranged": 50.0, "reader": 33.0}
    for name, share in held.items():
        system = row["systems"][name]
        system |= {"f1": system.pop("mean"), "holds": share}
    one = section(tmp_path, result(row))
    told = found(one, LOSS)["The receiver that reads the passage has the right words more often"]
    assert told == "on OpenBookQA in 33.0 % of the answers, matched in 13.0 %; these answers may be longer."
    assert [lead for lead in found(one, LOSS) if "right words" in lead] == [
        "The receiver that reads the passage has the right words more often"
    ], "nobody else; a control is no choice"


@pytest.mark.parametrize("name", sorted(CONTROLS))
def test_every_control_is_drawn_hollow(name):
    colour, marker, hollow = look(name, ["receiver", "matched", name])
    assert (colour, hollow) == ("control", True)
    assert marker


def test_no_folders_of_a_machine_are_shown(tmp_path):
    command = "c2c eval --data=/home/someone/x.jsonl --data /srv/data/arc/test.jsonl --fuser ~/fusers/one --limit 3"
    assert portable_command(command) == (
        "c2c eval --data=.../x.jsonl --data .../arc/test.jsonl --fuser .../fusers/one --limit 3"
    )
    data = result(
        numbers(GOOD), receiver="/home/someone/models/small", data=["/home/someone/data/openbookqa/test.jsonl"]
    )
    one = sections(tmp_path, data)
    assert "someone" not in to_markdown(one, "T", {}) + to_html(one, "T", draw(one))


# Findings: every rule, in both directions


def test_a_clear_win_has_no_loss(tmp_path):
    one = section(tmp_path, result(numbers(GOOD)))
    assert found(one, LOSS) == {}
    assert set(found(one, CAUTION)) == {NOT_MEASURED}
    assert found(one, GAIN) == {
        "Content crosses": "P = +41.0 [39.0, 43.0].",
        "Better than the receiver alone": "G = +38.0 [36.0, 40.0].",
        "Better than the sharer alone": "S = +6.0 [4.0, 8.0].",
    }


@pytest.mark.parametrize(
    ("scores", "lead", "says"),
    [
        ({"sharer": 67.2}, "The sharer alone is better", "by 1.2 points on OpenBookQA (S = -1.2 [-3.2, 0.8], within"),
        ({"sharer": 70.0}, "The sharer alone is better", "by 4.0 points on OpenBookQA (S = -4.0 [-6.0, -2.0])."),
        ({"deranged": 65.0, "receiver": 65.5}, "No content shown", "P = +1.0 [-1.0, 3.0]"),
        ({"deranged": 69.0}, "The wrong message does better", "P = -3.0 [-5.0, -1.0]"),
        ({"receiver": 66.5}, "No gain over the receiver shown", "G = -0.5 [-2.5, 1.5]"),
        ({"receiver": 70.0}, "Worse than the receiver alone", "G = -4.0 [-6.0, -2.0]"),
        ({"deranged": 28.4}, "A wrong message helps too", "on OpenBookQA (D = +0.4 [-1.6, 2.4], within chance)"),
        ({"deranged": 31.0}, "A wrong message helps too", "by 3.0 points on OpenBookQA (D = +3.0 [1.0, 5.0]);"),
        ({"zero": 66.5}, "A message of zeros is better", "by 0.5 points on OpenBookQA"),
        ({"text": 66.1}, "Text-to-text is better", "by 0.1 points on OpenBookQA (T = -0.1 [-2.1, 1.9], within chance)"),
        ({"adapter": 70.0}, "An adapter of the receiver, without a sharer, is better", "(A = -4.0 [-6.0, -2.0])"),
        ({"adapter": 65.0}, "No gain over an adapter of the receiver shown", "A = +1.0 [-1.0, 3.0]"),
        ({"router": 67.0}, "Sending each question to one of the two models is better", "by 1.0 points on OpenBookQA"),
        ({"abstain": 67.0}, "Leaving the fused cache out where it seems unsure is better", "by 1.0 points"),
        ({"untrained": 67.0}, "An untrained fuser is better", "by 1.0 points"),
        ({"of_the_future": 90.0}, "of_the_future is better", "by 24.0 points on OpenBookQA"),
    ],
)  # fmt: skip
def test_every_loss_is_told(tmp_path, scores, lead, says):
    one = section(tmp_path, result(numbers(GOOD | scores)))
    assert says in found(one, LOSS)[lead]
    for text in (to_markdown([one], "T", {}), to_html([one], "T", {})):
        assert lead in text
        assert "\u2717" in text


def test_less_is_better_in_nats(tmp_path):
    scores = {"receiver": 2.9, "matched": 2.2, "deranged": 2.95}
    good = section(tmp_path / "good", result(numbers(scores, unit=NATS, width=0.1), mode="nll"))
    assert found(good, LOSS) == found(good, CAUTION) == {}
    assert "P = -0.750 [-0.850, -0.650] nats per token; lower is better." in found(good, GAIN)["Content crosses"]
    scores = {"receiver": 2.2, "matched": 2.9, "deranged": 2.1}
    bad = section(tmp_path / "bad", result(numbers(scores, unit=NATS, width=0.1), mode="nll"))
    assert set(found(bad, LOSS)) == {
        "The wrong message does better", "Worse than the receiver alone", "A wrong message helps too"
    }  # fmt: skip
    assert found(bad, GAIN) == {}


def test_a_loss_on_one_task_is_not_hidden_by_the_sum(tmp_path):
    sources = {
        "openbookqa/test.jsonl": numbers(GOOD | {"deranged": 65.0}, n=10),
        "arc_easy/test.jsonl": numbers(GOOD, n=290),
    }
    one = section(tmp_path, result(numbers(GOOD), sources=sources))
    assert "Content crosses" in found(one, GAIN)
    assert found(one, LOSS)["No content shown"].startswith("on OpenBookQA (P = +1.0")
    assert "ARC-Easy" not in found(one, LOSS)["No content shown"]


def test_a_loss_in_one_of_several_runs_is_counted(tmp_path):
    runs = [result(numbers(GOOD | {"sharer": 60.0 + 4 * seed}), seed=seed, fuser=f"{seed}a" * 32) for seed in range(3)]
    one = section(tmp_path, *runs)
    assert found(one, GAIN)["Content crosses"] == "P = +41.0, mean of 3 runs from +41.0 to +41.0."
    assert found(one, GAIN)["Better than the sharer alone in 1 of 3 runs"].startswith("S = +2.0, mean of 3 runs")
    assert (
        found(one, LOSS)["The sharer alone is better"]
        == "by 2.0 points on OpenBookQA in 1 of 3 runs (S = -2.0 [-4.0, 0.0], within chance)."
    )
    assert "sharer alone better (1 of 3)" in to_markdown([one], "T", {})


def test_who_is_as_good_and_quicker_is_told(tmp_path):
    costs = {"matched": {"seconds": 0.66}, "sharer": {"seconds": 0.44}}
    behind = section(tmp_path / "a", result(numbers(GOOD | {"sharer": 67.0}, costs=costs)))
    assert "takes 0.440 seconds per question, matched 0.660" in found(behind, LOSS)["The sharer alone is better"]
    level = section(tmp_path / "b", result(numbers(GOOD | {"sharer": 65.0}, costs=costs)))
    assert "The sharer alone is quicker, and as good within chance" in found(level, LOSS)
    costs["router"] = {"seconds": 0.1}
    router = section(tmp_path / "d", result(numbers(GOOD | {"router": 66.0}, costs=costs)))
    assert found(router, LOSS) == {
        "Sending each question to one of the two models is as good and quicker": (
            "on OpenBookQA. It takes 0.100 seconds per question, matched 0.660."
        )
    }
    del costs["router"]
    ahead = section(tmp_path / "c", result(numbers(GOOD, costs=costs)))
    assert found(ahead, LOSS) == {}


def test_what_was_not_measured_is_told(tmp_path):
    one = section(tmp_path / "a", result(numbers({"matched": 66.0, "zero": 20.0})))
    assert set(found(one, CAUTION)) == {
        "P was not measured", "G was not measured", "The sharer alone was not measured", NOT_MEASURED
    }  # fmt: skip
    nothing = section(tmp_path / "b", result(numbers({"receiver": 66.0})))
    assert set(found(nothing, CAUTION)) == {"Matched was not measured"}


def test_a_gain_without_an_interval_is_not_claimed(tmp_path):
    row = {key: value for key, value in numbers(GOOD).items() if not key.endswith("_ci95")}
    assert found(section(tmp_path, result(row)), GAIN) == {}


score = st.floats(0, 100).map(lambda value: round(value, 1))


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(st.sampled_from([*GOOD, "text", "adapter", "new"]), score),
    st.floats(0, 30),
    st.sampled_from([PERCENT, NATS]),
)
def test_losses_are_exactly_what_the_numbers_say(scores, width, unit):
    gains = {}
    for letter, (one, other) in GAINS.items():
        if one in scores and other in scores:
            value = scores[one] - scores[other]
            gains[letter] = Estimate(value, value - width, value + width)
    sign = Unit(unit).sign
    fired = {
        loss.rule for loss in losses(Numbers("task", 9, {k: Estimate(v) for k, v in scores.items()}, gains), Unit(unit))
    }

    def better(one, other):
        return one in scores and other in scores and (scores[one] - scores[other]) * sign > 0

    expected = (
        ("P", {"no content", "wrong better"}), ("G", {"no gain", "harm"}), ("A", {"adapter", "ahead adapter"})
    )  # fmt: skip
    for letter, rules in expected:
        clear = letter in gains and min(gains[letter].low * sign, gains[letter].high * sign) > 0
        assert bool(fired & rules) == (letter in gains and not clear)
    assert ("sharer" in fired) == better("sharer", "matched")
    assert ("deranged" in fired) == better("deranged", "receiver")
    for name in ("zero", "text", "adapter", "new"):
        assert (f"ahead {name}" in fired) == better(name, "matched")


# What is written


class Page(HTMLParser):
    """Checks that tags close in order, and keeps text and attributes."""

    VOID = ("meta", "br", "hr", "img", "rect", "use", "path")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *attribute) for attribute in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *attribute) for attribute in attrs]

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.text += data + " "


def test_the_page_is_whole_and_needs_nothing_else(varied):
    page = Page(to_html(varied, "Our results", draw(varied)))
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    addresses = [value for _, name, value in page.attributes if name.endswith(("href", "src"))]
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert addresses
    assert all(address.startswith("#") and address[1:] in ids for address in addresses)
    assert len(ids) == len(set(ids))
    assert page.tags.count("h1") == 1
    assert page.tags.count("svg") == 3 + 2 + 2  # speed was measured for the first pair only
    for word in ("Our results", "matched - deranged", "Content crosses", "text-to-text", "hybrid", "c0ffee", "2.9 MB"):
        assert word in page.text


def test_columns_are_there_and_unknown_systems_too(varied):
    text = to_markdown(varied, "T", {})
    header = "| data | n | receiver | sharer | matched | deranged | zero | text-to-text | hybrid |"
    assert header in text
    assert "| data | G | P | S | T | Z | D | losses |" in text
    assert "| data | mended | spoiled | gap recovered | McNemar p |" in text
    assert "| OpenBookQA | 100 | 28.0 [26.0, 30.0] | **67.2** [65.2, 69.2] \u25b2 | **66.0** [64.0, 68.0] |" in text
    assert "| system | accuracy | seconds | first token, s | seconds / matched's | tokens | bytes |" in text
    assert "<0.001" in text
    assert "| data | n | receiver | matched | deranged |" in text  # nats have their own table
    assert "**2.200** [2.100, 2.300]" in text


def test_whatever_is_ahead_of_matched_is_marked(tmp_path):
    scores = {"receiver": 1.9, "matched": 2.0, "deranged": 1.95, "zero": 2.1}
    one = section(tmp_path, result(numbers(scores, unit=NATS, width=0.2), mode="nll"))
    rows = [line for line in to_markdown([one], "T", {}).splitlines() if line.startswith("| OpenBookQA")]
    assert rows[0].count("\u25b2") == 2
    assert rows[1].count("\u2717") == 3  # G, P, and the words
    assert draw([one])[one.slug][0].svg.count("\u25b2") == 2


def test_several_runs_are_summarised(varied):
    text = to_markdown(varied, "T", {})
    assert "*mean of 2 runs (lowest to highest)*" in text
    assert "**63.6** (60.0 to 67.2) \u25b2" in text
    assert "fuser cdcdcdcdcdcd, seed 0" in text
    assert "fuser efefefefefef, seed 1" in text


def test_markdown_is_read_as_tables(varied):
    html = MarkdownIt("commonmark").enable("table").render(to_markdown(varied, "T", {}))
    assert html.count("<table>") == html.count("</table>") == 2 + 4 + (3 + 3) + 2
    rows = re.findall(r"<tr>.*?</tr>", html, flags=re.DOTALL)
    assert len(rows) > 20
    assert "|" not in re.sub(r"<pre>.*?</pre>", "", html, flags=re.DOTALL)


def test_the_same_results_give_the_same_files(varied, tmp_path):
    paths = (tmp_path / "r.html", tmp_path / "r.md", tmp_path / "plots")
    first = make_files(varied, "T", *paths)
    assert {path.suffix for path in first} == {".html", ".md", ".svg"}
    assert make_files(list(varied), "T", *paths) == first
    folders = sorted(path.parent for path in tmp_path.rglob("result.json"))
    again = group(read_results(reversed(folders)))  # the order in which they are given does not matter
    assert make_files(again, "T", *paths) == first
    for text in first.values():
        assert str(tmp_path) not in text


def test_plots_are_text_and_variables(varied):
    plots = [plot for some in draw(varied).values() for plot in some]
    assert [plot.kind for plot in plots] == ["scores", "gains", "speed", "scores", "gains", "scores", "gains"]
    for plot in plots:
        ElementTree.fromstring(plot.standalone)
        assert "<text" in plot.svg
        assert re.findall(r"#[0-9a-f]{6}", plot.svg.lower()) == []
        assert "prefers-color-scheme: dark" in plot.standalone
        assert "<metadata" not in plot.svg
    assert "matched" in plots[0].svg
    assert "66.0" in plots[0].svg


def test_odd_numbers_are_drawn(tmp_path):
    """Equal scores, no intervals, free questions, a single system."""
    level = {name: {"accuracy": 50.0, "seconds": 0.0} for name in ("receiver", "matched", "deranged")}
    same = result({"n": 2, "unit": PERCENT, "systems": level})
    alone = result({"n": 2, "unit": PERCENT, "systems": {"new": {"accuracy": 0.0}}}, sharer="x")
    whole = result(
        {"n": 2, "unit": PERCENT, "systems": {"matched": {"accuracy": 100.0, "ci95": [100, 100]}}}, sharer="y"
    )
    odd = sections(tmp_path, same, alone, whole)
    Page(to_html(odd, "T", draw(odd)))


EVIL = "<script>alert(1)</script> $x$ `|` [a](http://b) **c** & \"q\" 'r'"


def test_nothing_from_a_file_is_markup(tmp_path):
    scores = GOOD | {EVIL: 90.0}
    sources = {f"{EVIL}/a.jsonl": numbers(scores), "b.jsonl": numbers(scores)}
    data = result(numbers(scores), sources=sources, receiver=EVIL, sharer=f"{EVIL}\n# heading", mode=EVIL, fuser=EVIL)
    data["provenance"] |= {"command": f"c2c eval ```` {EVIL}", "versions": {EVIL: EVIL}}
    data["dropped"] = {EVIL: 3}
    one = sections(tmp_path, data)
    page = Page(to_html(one, EVIL, draw(one)))
    assert not {"script", "strong", "em"} & set(page.tags)
    assert "http://b" not in [value for _, name, value in page.attributes if name.endswith("href")]
    assert "<script>alert(1)</script>" in page.text  # as text
    for plot in draw(one)[one[0].slug]:
        assert not [tag for tag in ElementTree.fromstring(plot.svg).iter() if tag.tag.endswith("script")]
    images = {one[0].slug: [(f"] {EVIL}", "plot.svg")]}
    html = MarkdownIt("commonmark").enable("table").render(to_markdown(one, EVIL, images))
    assert '<img src="plot.svg"' in html
    assert "<script" not in html
    assert "<a " not in html
    assert html.count("<h1>") == 1
    assert "<strong>c</strong>" not in html


def test_dollars_are_no_formula(tmp_path):
    costs = {"matched": {"seconds": 1}, "$x_$": {"seconds": 2}}
    row = numbers(GOOD | {"$x_$": 50.0}, costs=costs)
    data = result(row, data=["a $y^$ b.jsonl"])
    for plot in draw(sections(tmp_path, data))["small-from-large-logits"]:
        assert "a $y^$ b" in plot.svg
        assert plot.kind == "gains" or "$x_$" in plot.svg


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_categories=["C"]), max_size=40))
def test_escaped_text_is_shown_as_it_is(text):
    html = MarkdownIt("commonmark").enable("table").render(f"| x {escape(text)} |\n| --- |\n")
    shown = Page(html).text
    assert " ".join(shown.split()) == " ".join(f"x {text}".split())


def test_fixed_has_no_negative_zero():
    assert (fixed(-0.04, 1), fixed(-0.04, 1, signed=True), fixed(1.25, 1, signed=True)) == ("0.0", "+0.0", "+1.2")


# The command


def report(*arguments) -> tuple[int, str, Exception | None]:
    done = runner.invoke(app, ["report", *map(str, arguments)])
    return done.exit_code, done.stdout, done.exception


def test_help_shows_examples():
    done = runner.invoke(app, ["report", "--help"])
    assert done.exit_code == 0
    assert "Examples" in done.output
    assert "c2c report" in done.output


def test_markdown_on_stdout_without_options(tmp_path):
    code, out, _ = report(save(tmp_path, result(numbers(GOOD))), "--title", "My title")
    assert code == 0
    assert out.startswith("<!-- Made by `c2c report`")
    assert "# My title" in out


def test_files_are_written_and_checked(tmp_path):
    source = save(tmp_path / "in", result(numbers(GOOD)))
    html, markdown, plots = (tmp_path / "out" / name for name in ("r.html", "docs/r.md", "docs/plots"))
    arguments = [source, "--html", html, "--markdown", markdown, "--plots", plots]
    assert report(*arguments)[0] == 0
    images = re.findall(r"!\[[^]]*\]\(([^)]+)\)", markdown.read_text())
    assert len(images) == 2
    assert all((markdown.parent / image).is_file() for image in images)
    assert report(*arguments, "--check")[0] == 0

    markdown.write_text(markdown.read_text().replace("66.0", "77.0"))
    code, _, error = report(*arguments, "--check")
    assert code == 1
    assert f"{markdown} is not what the results say. Run: c2c report" in str(error)
    assert "77.0" in str(error)
    assert "77.0" in markdown.read_text()  # nothing was written

    (plots / Path(images[0]).name).unlink()
    assert "there is no such file yet" in str(report(*arguments, "--check")[2])
    assert report(*arguments)[0] == 0
    assert report(*arguments, "--check")[0] == 0


def test_check_fails_when_a_result_changes(tmp_path):
    source, markdown = save(tmp_path, result(numbers(GOOD))), tmp_path / "r.md"
    assert report(source, "--markdown", markdown)[0] == 0
    save(tmp_path, result(numbers(GOOD | {"matched": 61.0})))
    assert report(source, "--markdown", markdown, "--check")[0] == 1


def test_options_that_need_others(tmp_path):
    source = save(tmp_path, result(numbers(GOOD)))
    assert report(source, "--check")[0] == 2
    assert report(source, "--plots", tmp_path / "plots")[0] == 2


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    source = save(tmp_path, result(numbers(GOOD)))
    (tmp_path / "file").write_text("")
    code, _, error = report(source, "--markdown", tmp_path / "file" / "r.md")
    assert code == 1
    assert isinstance(error, ReportError)
    assert "can't be written" in str(error)


def test_errors_are_one_message_and_exit_code_1(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "c2c", "report", str(save(tmp_path, "{"))], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert done.stderr.startswith("c2c: ")
    assert "Traceback" not in done.stderr


def test_without_matplotlib_there_is_markdown_and_a_hint(tmp_path):
    """And no torch is needed for either."""
    source = save(tmp_path, result(numbers(GOOD)))
    code = (
        "import sys; sys.modules['matplotlib'] = None; sys.argv = ['c2c', 'report', *sys.argv[1:]]\n"
        "from c2c.cli import main\n"
        "try: main()\n"
        "finally: assert 'torch' not in sys.modules"
    )
    plain = subprocess.run([sys.executable, "-c", code, str(source)], capture_output=True, text=True, timeout=60)
    assert plain.stdout.startswith("<!--"), plain.stderr
    page = subprocess.run(
        [sys.executable, "-c", code, str(source), "--html", str(tmp_path / "r.html")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert page.returncode == 1
    assert "pip install 'matplotlib>=" in page.stderr
    assert not (tmp_path / "r.html").exists()


def test_runs_are_named_by_the_seed_of_their_training_and_other_trainings_stand_apart(tmp_path):
    made = []
    for name, seed, rank in (("a", 1, 128), ("b", 0, 128), ("c", 0, 32)):
        data = result(numbers(GOOD), fuser=name * 64)
        data["provenance"]["training"] = {"family": "bottleneck", "config": {"seed": seed, "rank": rank}}
        made.append(data)
    several, single = sorted(sections(tmp_path, *made), key=lambda section: -len(section.runs))
    assert [run_title(run)[:15] for run in several.runs] == ["training seed 0", "training seed 1"]
    assert len(single.runs) == 1
