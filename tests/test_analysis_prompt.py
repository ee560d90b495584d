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
from c2c.analysis.plots import fusion_strength, html_figures, plot_alignment, prompt_plots, visible
from c2c.cli import app
from c2c.prompting import RenderOptions
from demo_rig import fuser_folders
from tiny import open_fusers, pair

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


def inspect(*arguments):
    return CliRunner().invoke(app, ["inspect", *map(str, arguments)])


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
    assert not fusion_strength(capture_prompt(pair(), PROMPT)).any()  # an untrained fuser adds nothing


def test_plots_are_the_same_for_the_same_prompt(model, capture):
    page = html_figures(prompt_plots(capture))
    assert page == html_figures(prompt_plots(capture_prompt(model, PROMPT, OPTIONS)))
    assert page.count("<figure>") == page.count("<svg") == len(TITLES)
    assert not re.search(r'(?:src|href)="http', page)
    assert "<b>" not in page
    ids = re.findall(r'<clipPath id="([^"]+)"', page)
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("family", ["c2c", "linear"])
def test_plots_of_other_families(family):
    plots = prompt_plots(capture_prompt(pair(fuser=family), PROMPT, OPTIONS))
    assert [plot.title for plot in plots] == TITLES
    assert all("<svg" in plot.svg() for plot in plots)


def test_tokens_are_visible(capture):
    assert visible(" a\n") == "\u00b7a\u21b5"
    assert visible("") == "\u2205"
    svg = plot_alignment(capture).svg()
    assert all(escape(visible(text)) in svg for text in capture.receiver_tokens)


@pytest.mark.parametrize(("name", "prompt"), [("all.png", PROMPT), ("all.html", PROMPT), ("gates.png", None)])
def test_plots_in_a_file(folders, tmp_path, name, prompt):
    """Without a prompt the gates alone are drawn, which needs no models."""
    out = tmp_path / "deeper" / name
    options = ["--prompt", prompt, "--system", "Be brief.", "--answer-prefix", "The answer is"] if prompt else []
    titles = TITLES if prompt else TITLES[:1]
    shown = inspect(folders["merging"], "--plot", out, *options)
    assert titles[-1] in " ".join(shown.output.split())
    result = inspect(folders["merging"], "--plot", out, "--json", *options)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout.strip().splitlines()[-1])["plot"] == {"file": str(out), "pictures": titles}
    content = out.read_bytes()
    assert content.startswith(b"\x89PNG" if name.endswith("png") else b"<!doctype html>")
    assert len(content) > (50_000 if prompt else 5_000)


def test_what_can_not_be_captured_is_refused(model, folders, tmp_path):
    with pytest.raises(AnalysisError, match="got 2"):
        capture_prompt(model, ["a", "b"])
    (tmp_path / "file").write_text("")
    alone = inspect(folders["merging"], "--prompt", "x")
    assert alone.exit_code == 2
    assert "--plot" in alone.output
    for plot, name, words in (
        ("a.svg", "merging", ".png or .html"),
        ("file/a.png", "merging", "file is a file"),
        ("b.png", "remembering", "private context"),
    ):
        result = inspect(folders[name], "--plot", tmp_path / plot, "--prompt", "x")
        assert isinstance(result.exception, AnalysisError)
        assert words in str(result.exception)
