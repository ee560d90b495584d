"""``c2c report`` on all that ``c2c eval`` measures: other systems, costs, rules, several runs, a README."""

from __future__ import annotations

import json
import re

import pytest
from markdown_it import MarkdownIt

from c2c import C2CModel
from c2c.data.config import DataSource
from c2c.evaluation import EvalConfig, evaluate
from c2c.reporting import ReportError, draw, group, overview_markdown, read_results, to_html, to_markdown
from c2c.reporting.canvas import COLOURS, legend_lines
from c2c.reporting.findings import GAIN, LOSS
from c2c.reporting.losses import marked
from c2c.reporting.names import POOLED, STAGES
from c2c.reporting.text import cost
from test_report import GOOD, Page, found, numbers, report, result, save, section, sections
from tiny import open_fusers, pair_folders

ALL = GOOD | {
    "untrained": 28.0, "text": 50.0, "text_published": 40.0, "adapter": 32.0, "router": 45.0, "abstain": 65.0,
    "linear": 44.0, "self": 30.0,
}  # fmt: skip
STAGE_SECONDS = {
    "receiver": (0, 0, 0.1, 0, 0.02),
    "sharer": (0.45, 0, 0, 0, 0.1),
    "matched": (0.45, 0, 0.1, 0.03, 0.02),
    "text": (0.5, 0.9, 0.2, 0, 0.02),
}


def costs(scale: float = 1.0):
    """What answers cost, with text-to-text ``scale`` times as slow as usual."""
    made = {}
    for name, seconds in STAGE_SECONDS.items():
        factor = scale if name == "text" else 1
        stages = {stage: s * factor for stage, s in zip(STAGES, seconds, strict=True) if s}
        total = sum(stages.values())
        made[name] = stages | {"seconds": total, "first_token": total - 0.02, "tokens": 40, "timed": 10}
        made[name] |= {"bytes": 2.9e6 if name == "matched" else 0, "memory": 5e7}
    return made


def speed(scale: float = 1.0, width: float = 0.1):
    made = costs(scale)
    ours = made["matched"]["seconds"]
    ratios = {name: one["seconds"] / ours for name, one in made.items() if name != "matched"}
    return {name: {"ratio": ratio, "ci95": [ratio - width, ratio + width]} for name, ratio in ratios.items()}


RULES = {
    "router": {"share_asked": 0.5, "share_routed": 0.48, "ridge": 100.0},
    "abstain": {
        "margin": 0.25,
        "share_fused": 0.9,
        "curve": [
            {"share_fused": share, "accuracy": 28 + 38 * share, "spoiled": 4 * share} for share in (0.0, 0.5, 1.0)
        ],
    },
}


def full(*, seed=0, fuser="ab12" * 16, scores=ALL, scale=1.0, timed=True, dev="arc_easy/dev.jsonl", **more):
    """A result with everything."""
    row = numbers(scores, costs=costs(scale), speed=speed(scale)) if timed else numbers(scores)
    row |= {name: facts for name, facts in RULES.items() if name in scores}
    data = result(row, seed=seed, fuser=fuser, **more)
    config = data["provenance"]["config"]
    del config["systems"]
    config |= {"max_new_tokens": 8, "message_tokens": 256, "dev": [{"path": dev}]}
    data["provenance"]["data"] = data["provenance"]["data"] | {dev: "dev" + "0" * 8}
    return data | {"provenance": data["provenance"] | {"fusers": {"linear": "1f" * 32, "self": "5e" * 32}}}


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A real evaluation of tiny random models, with costs and the rules that are fitted on dev."""
    receiver, sharer = pair_folders(tmp_path_factory.mktemp)
    model = open_fusers(C2CModel.from_models(receiver, sharer, fuser_options={"rank": 8}))
    model.fusers[0].config.training = {"config": "random"}
    fuser = str(tmp_path_factory.mktemp("fuser"))
    model.save_pretrained(fuser)
    folder = tmp_path_factory.mktemp("data")
    rows = [
        {"id": str(i), "question": f"Number {i}?", "choices": ["fox", "dog", "sun"], "answer": i % 3} for i in range(9)
    ]
    for name, part in (("a.jsonl", rows), ("b.jsonl", rows[:5]), ("dev.jsonl", rows[3:])):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in part))
    out = tmp_path_factory.mktemp("out")
    config = EvalConfig(
        fuser,
        [DataSource("a.jsonl"), DataSource("b.jsonl")],
        systems=(*GOOD, "untrained", "text", "text_published", "router", "abstain", "twin"),
        fusers={"twin": fuser},
        dev=[DataSource("dev.jsonl")],
        timed=2,
        batch_size=4,
        max_new_tokens=3,
        message_tokens=4,
        data_dir=str(folder),
        output_dir=str(out),
    )
    return out, evaluate(config)


# A real evaluation


def test_what_eval_measures_is_read(evaluated):
    folder, numbers = evaluated
    (one,) = group(read_results([folder]))
    (run,) = one.runs
    pooled = run.tasks[-1]
    assert one.systems == [*GOOD, "untrained", "text", "text_published", "router", "abstain", "twin"]
    assert pooled.gains["T"].value == numbers["T"]
    assert [pooled.gains["T"].low, pooled.gains["T"].high] == numbers["T_ci95"]
    assert pooled.timed == 4
    assert run.tasks[0].timed == 2
    assert "timed" not in pooled.costs["matched"]
    assert pooled.costs["text"]["sharer_decode"] == numbers["systems"]["text"]["sharer_decode"]
    assert pooled.speed["text"].value == numbers["speed"]["text"]["ratio"]
    assert run.routing.sent == numbers["router"]["share_routed"]
    assert [point.accuracy for point in run.abstention.curve] == [p["accuracy"] for p in numbers["abstain"]["curve"]]
    assert (run.answer_tokens, run.message_tokens) == (3, 4)


def test_a_real_evaluation_is_shown(evaluated):
    one = group(read_results([evaluated[0]]))
    plots = draw(one)
    assert [plot.kind for plot in plots[one[0].slug]] == ["scores", "tasks", "gains", "speed", "stages", "abstention"]
    page = Page(to_html(one, "T", plots))
    text = to_markdown(one, "T", {})
    for words in ("sharer writes", "Router:", "Abstain:", "mean of 4 that were answered one by one", "twin"):
        assert words in page.text
        assert words in text
    assert "at most 3 tokens, messages in text-to-text of at most 4" in text
    assert re.search(r"^fuser twin: [0-9a-f]{64}$", text, re.MULTILINE)
    assert re.search(r"^dev .*dev.jsonl: [0-9a-f]{64}$", text, re.MULTILINE)


# Tables


def tables(text: str) -> list[list[list[str]]]:
    """The cells of every table."""
    html = MarkdownIt("commonmark").enable("table").render(text)
    found = []
    for table in re.findall(r"<table>.*?</table>", html, flags=re.DOTALL):
        rows = re.findall(r"<tr>(.*?)</tr>", table, flags=re.DOTALL)
        found.append([re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, flags=re.DOTALL) for row in rows])
    return found


def test_no_table_is_wide_and_every_system_is_in_one(tmp_path):
    one = section(tmp_path, full(sources=None))
    made = tables(to_markdown([one], "T", {}))
    assert max(len(table[0]) for table in made) <= 9
    shown = {column for table in made for column in table[0]}
    assert {"text-to-text", "text, published", "adapter", "router", "abstain", "linear", "self", "untrained"} <= shown
    others = next(table for table in made if "linear" in table[0])
    assert others[0][:2] == ["data", "matched"]
    assert "<strong>66.0</strong>" in others[-1][1]


def test_costs_are_a_table_without_the_count(tmp_path):
    text = to_markdown([section(tmp_path, full())], "T", {})
    header = "| system | accuracy | seconds | first token, s | seconds / matched's | tokens | bytes | memory |"
    assert header in text
    assert "timed" not in text.replace("--timed", "")
    assert "Cost per question, mean of 10 that were answered one by one" in text
    line = next(line for line in text.splitlines() if line.startswith("| text-to-text | 50.0"))
    assert "| 1.62 | 1.60 | 2.70 [2.60, 2.80] | 40 | 0 B | 50 MB |" in line
    stages = next(table for table in tables(text) if "sharer writes" in table[0])
    assert next(row for row in stages if row[0] == "text-to-text")[1:] == [
        "0.500",
        "0.900",
        "0.200",
        "\u2013",
        "0.0200",
    ]
    assert "Router: 48 % of the questions went to the sharer, 50 % were meant to." in text
    assert "Abstain: 90 % of the questions were answered from the fused cache" in text


def test_numbers_of_costs():
    assert [cost("seconds", value) for value in (0.44, 0.5586, 2, 123.4, 4321, 0)] == [
        "0.440", "0.559", "2.00", "123", "4,321", "0"
    ]  # fmt: skip
    assert (cost("tokens", 46.0), cost("memory", 2.1e8), cost("bytes", 140)) == ("46", "210 MB", "140 B")


# Several runs


def test_runs_with_other_systems_dev_and_timing_are_one_section(tmp_path):
    """A run without a system shows nothing there, and is not counted where the system is."""
    more = full(fuser="a" * 64)
    fewer = full(fuser="b" * 64, scores=GOOD, timed=False, dev="openbookqa/dev.jsonl")
    old = result(numbers(GOOD), fuser="c" * 64)  # before there was dev
    one = section(tmp_path, more, fewer, old)
    assert len(one.runs) == 3
    text = to_markdown([one], "T", {})
    assert "| OpenBookQA | **66.0** | 50.0 1 of 3 runs | 40.0 1 of 3 runs |" in text
    assert "in 1 of 3 runs" in next(line for line in text.splitlines() if line.startswith("Cost per question"))
    assert found(one, GAIN)["Better than text-to-text"].startswith("T = +16.0 [14.0, 18.0]")
    single = text[text.index("fuser bbbbbbbbbbbb") :]
    assert "| OpenBookQA | **66.0** [64.0, 68.0] | \u2013 | \u2013 |" in single


def test_a_loss_in_the_only_run_that_measured_it_is_marked(tmp_path):
    runs = [full(fuser=f"{i}e" * 32, scores=ALL | {"text": 70.0} if i == 0 else GOOD, timed=i == 0) for i in range(3)]
    one = section(tmp_path, *runs)
    rows = one.numbers("OpenBookQA")
    assert {"text", "T"} <= marked(rows, one.unit)
    assert "on OpenBookQA in the one run that measured it" in found(one, LOSS)["Text-to-text is better"]
    assert "text-to-text better (1 of 1)" in to_markdown([one], "T", {})


def test_files_of_one_evaluation_are_one_run(tmp_path):
    """Systems and costs that were measured later, in another folder."""
    first, second = full(scores=GOOD, timed=False), full(scores={name: ALL[name] for name in STAGE_SECONDS})
    one = section(tmp_path, first, second)
    (run,) = one.runs
    assert set(run.tasks[0].scores) == {*GOOD, "text"}
    assert run.tasks[0].gains["T"].value == 16.0
    assert run.tasks[0].gains["P"].value == 41.0
    assert run.tasks[0].speed["text"].value == pytest.approx(2.7)
    other = full(scores=GOOD | {"matched": 60.0, "text": 50.0}, timed=False)
    with pytest.raises(ReportError, match="with different numbers for matched"):
        sections(tmp_path / "other", first, other)
    with pytest.raises(ReportError, match="the same evaluation"):
        sections(tmp_path / "same", second, second)


def test_settings_that_change_numbers_stand_apart_and_are_named(tmp_path):
    made = []
    for rank, tokens in ((32, 256), (128, 256), (128, 64)):
        data = full(fuser=f"{rank}".ljust(64, "f"))
        data["provenance"]["training"] = {"config": {"seed": 0, "fuser_options": {"rank": rank}}}
        data["provenance"]["config"]["message_tokens"] = tokens
        made.append(data)
    names = sorted(one.variant for one in sections(tmp_path, *made))
    assert names == [
        "default message_tokens, rank 128",
        "default message_tokens, rank 32",
        "message_tokens 64, rank 128",
    ]


def test_unknown_keys_of_sources_make_no_difference(tmp_path):
    """A later version writes settings of the data that have no effect unless they are used."""
    data = full(fuser="b" * 64)
    data["provenance"]["config"]["data"][0] |= {"keep": {}, "later": None}
    assert len(section(tmp_path / "a", full(), data).runs) == 2
    data["provenance"]["config"]["data"][0] |= {"keep": {"error_type": "ok"}}
    assert len(sections(tmp_path / "b", full(), data)) == 2


# Losses


@pytest.mark.parametrize(
    ("text", "scale", "lead", "says"),
    [
        (70.0, 0.2, "Text-to-text is better", "It takes 0.324 seconds per question, matched 0.600."),
        (65.0, 0.2, "Text-to-text is quicker, and as good within chance", "on OpenBookQA (T = +1.0 [-1.0, 3.0])."),
        (40.0, 0.2, "Slower than text-to-text", "text-to-text takes 0.54 [0.44, 0.64] on OpenBookQA."),
    ],
)
def test_losses_to_text(tmp_path, text, scale, lead, says):
    one = section(tmp_path, full(scores=ALL | {"text": text}, scale=scale))
    lost = found(one, LOSS)
    assert says in lost[lead]
    assert [name for name in lost if "ext-to-text" in name] == [lead]  # told once
    assert "Quicker than text-to-text" not in found(one, GAIN)
    assert re.search(r"\| \*\*0\.54\*\* \[0\.44, 0\.64\] \u2717 \|", to_markdown([one], "T", {}))


def test_a_slower_text_is_a_gain(tmp_path):
    one = section(tmp_path / "a", full())
    assert found(one, GAIN)["Quicker than text-to-text"] == "text-to-text takes 2.70 [2.60, 2.80] times as long."
    assert not [name for name in found(one, LOSS) if "ext-to-text" in name]
    chance = full() | {"speed": {"text": {"ratio": 1.05, "ci95": [0.9, 1.2]}}}
    assert "Quicker than text-to-text" not in found(section(tmp_path / "b", chance), GAIN)


def test_every_loss_is_in_the_overview(tmp_path):
    """Those of single tasks too, once for each comparison."""
    easy = numbers(ALL | {"text": 80.0, "adapter": 70.0, "zero": 67.0}, n=10)
    sources = {"arc_easy/test.jsonl": easy, "openbookqa/test.jsonl": numbers(ALL, n=290)}
    one = section(tmp_path, full(sources=sources))
    text = overview_markdown([one])
    assert "\u2717 sharer alone quicker" not in text
    assert "on some of the data: text-to-text better; adapter better; zero better" in text


# Plots


def test_many_tasks_are_drawn_in_short(tmp_path):
    sources = {f"{name}/test.jsonl": numbers(ALL, n=60) for name in ("a", "b", "c", "d", "e")}
    one = section(tmp_path, full(sources=sources))
    plots = {plot.kind: plot for plot in draw([one])[one.slug]}
    assert set(plots) == {"scores", "tasks", "gains", "speed", "stages", "abstention"}
    height = int(re.search(r'height="(\d+)"', plots["scores"].svg)[1])
    assert height < 450
    assert all(f">{task}<" in plots["tasks"].svg for task in one.tasks)
    assert all(STAGES[stage] in plots["stages"].svg for stage in STAGES)
    for words in ("sharer 60.0", "receiver 28.0", "spoiled"):
        assert words in plots["abstention"].svg


def test_systems_have_colours_and_signs_of_their_own(tmp_path):
    one = section(tmp_path, full())
    svg = draw([one])[one.slug][0].svg
    names = ["receiver", "sharer", "matched", "control", "text", "adapter", "router", "abstain", "other"]
    assert all(f"--c2c-{name})" in svg for name in names)
    for theme in (0, 1):
        assert len({COLOURS[name][theme] for name in names}) == len(names)


def test_a_legend_stays_inside():
    lines = legend_lines(["matched", "text-to-text", "sharer reads", "sharer writes", "receiver reads", "answer"])
    assert lines[0][0] == (10.0, "matched")
    assert len(lines) > 1
    assert all(x < 420 for line in lines for x, _ in line)


def test_plots_of_a_run_without_costs_or_curve(tmp_path):
    one = section(tmp_path, full(timed=False) | {"abstain": RULES["abstain"] | {"curve": []}})
    assert [plot.kind for plot in draw([one])[one.slug]] == ["scores", "gains"]


# Overview and README


def test_the_overview_has_a_line_per_pair_and_data_set(tmp_path):
    sources = {name: numbers(ALL, n=150, speed=speed()) for name in ("arc_easy/test.jsonl", "openbookqa/test.jsonl")}
    runs = [full(fuser=f"{i}d" * 32, sources=sources) for i in range(2)]
    text = overview_markdown(sections(tmp_path, *runs, full(sharer="other", scores=GOOD, timed=False)))
    (table,) = tables(text)
    assert table[0] == [
        "receiver \u2190 sharer", "n", "receiver", "sharer", "matched", "deranged", "P", "S", "T", "A",
        "text's seconds / ours",
    ]  # fmt: skip
    assert [row[0] for row in table[1:]] == [
        "<em>small \u2190 large</em>", "ARC-Easy", "OpenBookQA", "<strong>these 2 together</strong>",
        "<em>small \u2190 other</em>", "OpenBookQA",
    ]  # fmt: skip
    pooled = next(row for row in table if "together" in row[0])
    assert pooled[1] == "300 (2 runs)"
    assert pooled[-1] == "2.70"
    assert table[-1][-2:] == ["\u2013", "\u2013"]
    assert "- small \u2190 large, ARC-Easy, OpenBookQA: \u2713 content crosses;" in text


def test_the_overview_alone_is_printed(tmp_path):
    code, out, _ = report(save(tmp_path, full()), "--overview")
    assert code == 0
    assert out.startswith("At a glance, accuracy, percent:\n\n| receiver \u2190 sharer | n |")
    assert "# " not in out


def test_a_readme_is_filled_and_checked(tmp_path):
    source, readme = save(tmp_path / "in", full()), tmp_path / "README.md"
    readme.write_text("# Mine\n\n<!-- results -->\nold\n<!-- /results -->\n\nMore.\n")
    assert report(source, "--readme", readme, "--check")[0] == 1
    assert "old" in readme.read_text()  # only checked
    assert report(source, "--readme", readme)[0] == 0
    text = readme.read_text()
    assert text.startswith("# Mine\n\n<!-- results -->\n")
    assert text.endswith("\n<!-- /results -->\n\nMore.\n")
    assert "old" not in text
    assert "| OpenBookQA | 300 | 28.0 | 60.0 | **66.0** |" in text
    assert report(source, "--readme", readme, "--check")[0] == 0
    assert report(source, "--readme", readme)[0] == 0
    assert readme.read_text() == text  # and again the same
    readme.write_text(text.replace("66.0", "77.0"))
    code, _, error = report(source, "--readme", readme, "--check")
    assert code == 1
    assert "--readme" in str(error)


@pytest.mark.parametrize(
    "text", ["# Mine\n", "<!-- results -->\n", "<!-- /results -->\n<!-- results -->\n", "<!-- results -->\n" * 2, None]
)
def test_a_readme_without_its_place_is_refused(tmp_path, text):
    readme = tmp_path / "README.md"
    if text is not None:
        readme.write_text(text)
    code, _, error = report(save(tmp_path / "in", full()), "--readme", readme)
    assert code == 1
    assert isinstance(error, ReportError)
    assert str(readme) in str(error)
    assert text is None or readme.read_text() == text


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ({"speed": {"text": {}}}, "speed.text.ratio is None"),
        ({"speed": [1]}, "speed is a list"),
        ({"router": {"share_asked": 0.5}}, "router.share_routed"),
        ({"abstain": {"share_fused": 0.5, "curve": 3}}, "abstain.curve is a int"),
        ({"abstain": {"share_fused": 0.5, "curve": [{"share_fused": 1}]}}, "abstain.curve.accuracy"),
    ],
)
def test_broken_new_numbers_are_named(tmp_path, broken, says):
    with pytest.raises(ReportError, match=re.escape(says)):
        read_results([save(tmp_path, full() | broken)])


def test_a_brief_overview_has_a_row_for_each_section_and_every_loss_in_words(tmp_path):
    """As a README has it: all questions together, named, and what single data sets lost below."""
    sources = {name: numbers(ALL, n=150, speed=speed()) for name in ("arc_easy/test.jsonl", "openbookqa/test.jsonl")}
    found = sections(tmp_path, full(sources=sources), full(sharer="other", scores=GOOD, timed=False))
    whole, brief = overview_markdown(found), overview_markdown(found, brief=True)
    lines = [line for line in brief.splitlines() if line.startswith("| ") and "---" not in line]
    assert len(lines) == 1 + 2 * 2  # columns; a title and one row for each of two pairs
    assert all(", ".join(task for task in one.tasks if task != POOLED) in brief for one in found)
    assert brief.split("not measured.")[1] == whole.split("not measured.")[1]
