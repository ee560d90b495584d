"""``c2c inspect --plot``, and the figures behind the pictures."""

from __future__ import annotations

import json
import re

import pytest
import torch
from typer.testing import CliRunner

from c2c.analysis.settings import AnalysisError
from c2c.cli import app
from c2c.plots.album import figures_html, save
from c2c.plots.line import COLUMNS, boxes, columns_of, visible
from c2c.plots.reading import read_prompt
from c2c.plots.strength import strengths
from c2c.prompting import RenderOptions
from c2c.reporting.canvas import PAINT
from demo_rig import fuser_folders
from tiny import open_fusers, pair

pytest.importorskip("matplotlib")
runner = CliRunner()
PROMPT = "Größe 42? Name three uses of 铜 <b>."
TITLES = [
    "Gate and weight by layer and head",
    "Fusion strength over the prompt",
    "Token alignment",
    "PCA of the three caches",
    "Effective rank by layer",
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return fuser_folders(tmp_path_factory.mktemp)


@pytest.fixture(scope="module")
def model():
    return open_fusers(pair())


@pytest.fixture(scope="module")
def reading(model):
    return read_prompt(model, PROMPT, RenderOptions(answer_prefix="The answer is"))


def test_a_reading_holds_what_fusion_does(model, reading):
    prepared = model.prefill(PROMPT, options=RenderOptions(answer_prefix="The answer is"))
    assert len(reading.pairs) == prepared.report.fused_tokens
    assert [entries.layer for entries in reading.layers] == prepared.report.fused_layers
    columns = [token for token, _ in reading.pairs]
    for entries in reading.layers:
        keys = prepared.cache.layers[entries.layer].keys[0][:, columns].transpose(0, 1).flatten(1)
        torch.testing.assert_close(entries.fused.keys, keys)
        assert not torch.allclose(entries.receiver.keys, entries.fused.keys)
    assert "".join(reading.ours).count("Name") == 1


def test_an_untrained_fuser_has_no_strength():
    found = strengths(read_prompt(pair(), PROMPT))
    assert torch.equal(found, torch.zeros_like(found))


@pytest.mark.parametrize("family", ["bottleneck", "c2c", "linear"])
def test_every_merging_family_can_be_drawn(family, tmp_path):
    made = pair(fuser=family)
    drawn = read_prompt(made, PROMPT)
    assert save(tmp_path / "a.html", "x", made.fusers[0], drawn) == TITLES


def test_files_are_whole_and_nothing_of_the_canvas_is_left_changed(model, reading, tmp_path):
    before = dict(PAINT)
    assert save(tmp_path / "a.png", "x <- y", model.fusers[0], reading) == TITLES
    assert before == PAINT
    from matplotlib.image import imread

    height, width, _ = imread(tmp_path / "a.png").shape
    assert width > 1000
    assert height > 1000
    save(tmp_path / "a.html", "<x>", model.fusers[0], reading)
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert "<h1>&lt;x&gt;</h1>" in page
    assert page.count("<figure>") == len(TITLES)
    assert not re.search(r'(?:src|href)="http', page)
    assert "<b>" not in page


def test_html_is_the_same_for_the_same_prompt(model, reading):
    again = read_prompt(model, PROMPT, RenderOptions(answer_prefix="The answer is"))
    assert figures_html(model.fusers[0], reading) == figures_html(model.fusers[0], again)


def test_lines_of_tokens():
    assert visible(" a\n") == "\u00b7a\u21b5"
    assert visible("") == "\u2205"
    assert columns_of("铜a") == 3
    placed = boxes(["abc"] * 40, range(40))
    assert max(box.start + box.width for box in placed) <= COLUMNS
    assert [box.line for box in placed] == sorted(box.line for box in placed)
    assert placed[-1].line == 2


def test_what_cannot_be_read_is_refused(model):
    with pytest.raises(AnalysisError, match="one prompt, got 2"):
        read_prompt(model, ["a", "b"])
    with pytest.raises(AnalysisError, match="merges none"):
        read_prompt(pair(fuser="memory"), PROMPT)


# -- the command -------------------------------------------------------------------------------------------------------


def test_gates_need_no_models(folders, tmp_path):
    out = tmp_path / "gates.png"
    result = runner.invoke(app, ["inspect", folders["merging"], "--plot", str(out), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["plot"] == {"file": str(out), "pictures": TITLES[:1]}
    assert out.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["all.png", "all.html"])
def test_pictures_of_a_prompt(folders, tmp_path, name):
    out = tmp_path / "deeper" / name
    command = [
        "inspect",
        folders["merging"],
        "--plot",
        str(out),
        "--prompt",
        PROMPT,
        "--answer-prefix",
        "The answer is",
    ]
    result = runner.invoke(app, command)
    assert result.exit_code == 0, result.output
    assert out.exists()
    assert "Effective rank by layer" in " ".join(result.output.split())


def test_wrong_usage(folders, tmp_path):
    merging, remembering = folders["merging"], folders["remembering"]
    alone = runner.invoke(app, ["inspect", merging, "--prompt", "x"])
    assert alone.exit_code == 2
    assert "--plot" in alone.output
    wrong = runner.invoke(app, ["inspect", merging, "--plot", "a.svg"])
    assert isinstance(wrong.exception, AnalysisError)
    assert ".png or .html" in str(wrong.exception)
    folder = runner.invoke(app, ["inspect", merging, "--plot", str(tmp_path / "a.png")], catch_exceptions=True)
    assert folder.exit_code == 0
    private = runner.invoke(app, ["inspect", remembering, "--plot", str(tmp_path / "b.png"), "--prompt", "x"])
    assert "merges none" in str(private.exception)
