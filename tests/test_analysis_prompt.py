"""Plots of one prompt, and ``c2c inspect --plot``."""

from __future__ import annotations

import json
import re
from xml.sax.saxutils import escape

import pytest
import torch
from typer.testing import CliRunner

from c2c.analysis.capture import capture_prompt
from c2c.analysis.config import AnalysisError
from c2c.analysis.plots import fusion_strength, html_figures, plot_alignment, prompt_plots, save_plots, visible
from c2c.cli import app
from c2c.prompting import RenderOptions
from demo_rig import fuser_folders
from tiny import open_fusers, pair

runner = CliRunner()
PROMPT = "Größe 42$? Name three uses of 铜 <b>."
OPTIONS = RenderOptions(answer_prefix="The answer is")
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
def capture(model):
    return capture_prompt(model, PROMPT, OPTIONS)


def test_a_capture_holds_what_fusion_does(model, capture):
    prefilled = model.prefill(PROMPT, options=OPTIONS)
    assert len(capture.pairs) == prefilled.report.fused_tokens
    assert [one.layer for one in capture.layers] == prefilled.report.fused_layers
    columns = [token for token, _ in capture.pairs]
    for one in capture.layers:
        keys = prefilled.cache.layers[one.layer].keys[0][:, columns].transpose(0, 1).flatten(1)
        torch.testing.assert_close(one.entries["fused"]["keys"], keys)
        assert not torch.allclose(one.entries["receiver"]["keys"], keys)
    assert all("".join(tokens).count("Name") == 1 for tokens in (capture.receiver_tokens, capture.sharer_tokens))


def test_an_untrained_fuser_has_no_strength():
    assert not fusion_strength(capture_prompt(pair(), PROMPT)).any()


@pytest.mark.parametrize("family", ["bottleneck", "c2c", "linear"])
def test_plots_of_every_family_are_the_same_for_the_same_prompt(family):
    model = open_fusers(pair()) if family == "bottleneck" else pair(fuser=family)
    plots = prompt_plots(capture_prompt(model, PROMPT, OPTIONS))
    assert [plot.title for plot in plots] == TITLES
    page = html_figures(plots)
    assert page == html_figures(prompt_plots(capture_prompt(model, PROMPT, OPTIONS)))
    assert page.count("<figure>") == page.count("<svg") == len(TITLES)
    assert not re.search(r'(?:src|href)="http', page)
    assert "<b>" not in page
    ids = re.findall(r'<clipPath id="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_a_file_that_can_not_be_written_is_refused(capture, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(AnalysisError, match="could not be written"):
        save_plots(tmp_path / "file" / "a.html", "x", prompt_plots(capture))


def test_tokens_are_visible(capture):
    assert visible(" a\n") == "\u00b7a\u21b5"
    assert visible("") == "\u2205"
    svg = plot_alignment(capture).svg()
    assert all(escape(visible(text)) in svg for text in capture.receiver_tokens)


def test_what_can_not_be_captured_is_refused(model):
    with pytest.raises(AnalysisError, match="got 2"):
        capture_prompt(model, ["a", "b"])
    with pytest.raises(AnalysisError, match="private context"):
        capture_prompt(pair(fuser="memory"), PROMPT)


def test_gates_need_no_models(folders, tmp_path):
    out = tmp_path / "gates.png"
    result = runner.invoke(app, ["inspect", folders["merging"], "--plot", str(out), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["plot"] == {"file": str(out), "pictures": TITLES[:1]}
    assert out.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["all.png", "all.html"])
def test_plots_of_a_prompt(folders, tmp_path, name):
    out = tmp_path / "deeper" / name
    options = ["--plot", str(out), "--prompt", PROMPT, "--system", "Be brief.", "--answer-prefix", "The answer is"]
    result = runner.invoke(app, ["inspect", folders["merging"], *options])
    assert result.exit_code == 0, result.output
    assert out.stat().st_size > 50_000
    assert "Effective rank by layer" in " ".join(result.output.split())


def test_wrong_usage(folders, tmp_path):
    alone = runner.invoke(app, ["inspect", folders["merging"], "--prompt", "x"])
    assert alone.exit_code == 2
    assert "--plot" in alone.output
    wrong = runner.invoke(app, ["inspect", folders["merging"], "--plot", "a.svg"])
    assert ".png or .html" in str(wrong.exception)
    private = [folders["remembering"], "--plot", str(tmp_path / "b.png"), "--prompt", "x"]
    assert "private context" in str(runner.invoke(app, ["inspect", *private]).exception)
