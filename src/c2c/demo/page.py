"""The page: its tabs and its style. Gradio's queue lets one event at a time use the models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from c2c.demo.config import DemoConfig
from c2c.demo.fusers import FuserChoice
from c2c.demo.markup import TEXTS, status_html
from c2c.demo.models import ModelCache
from c2c.demo.panes import Question
from c2c.demo.tab import QUEUED, AnswerTab, Values
from c2c.errors import C2CError, PromptError

_FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "DejaVu Sans", "sans-serif"]
_MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "DejaVu Sans Mono", "monospace"]


def style() -> dict[str, Any]:
    """Return the page's CSS, and a theme with fonts of the machine, so that nothing is fetched from elsewhere."""
    css = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    return {"css": css, "theme": gr.themes.Default(primary_hue="blue", font=_FONTS, font_mono=_MONO)}


def build(models: ModelCache, choices: Sequence[FuserChoice], config: DemoConfig) -> gr.Blocks:
    """Build the whole page, with the fusers to choose from."""
    page: gr.Blocks = gr.Blocks(title="c2c demo", analytics_enabled=False, fill_width=True)
    with page:
        gr.Markdown(f"# Cache-to-cache\n{TEXTS['lead']}")
        with gr.Tab("Ask both", id="ask"):
            ask = AnswerTab(models, choices, config, private=False)
        with gr.Tab("Private context", id="private"):
            AnswerTab(models, choices, config, private=True)
        with gr.Tab("Pictures", id="pictures"):
            _add_pictures(ask)
        page.load(ask.load, {ask.fuser}, ask.status, **QUEUED)
    return page


def _add_pictures(ask: AnswerTab) -> None:
    """Lay out the tab that draws what crosses for the prompt of the first tab."""
    gr.Markdown(TEXTS["pictures"], elem_classes="c2c-lead")
    button = gr.Button("Draw", variant="primary", elem_id="pictures-run")
    status = gr.HTML("", elem_id="pictures-status")
    pictures = gr.HTML("", elem_id="pictures-shown")

    def draw(values: Values) -> tuple[str, str]:
        question = ask.question(values)
        try:
            html = draw_pictures(ask.models, ask.choice(values), question)
        except C2CError as error:
            return status_html("failed", str(error)), ""
        return status_html("ready", f"Of the prompt in the first tab, {len(question.prompt)} letters."), html

    button.click(draw, ask.inputs, [status, pictures], **QUEUED)


def draw_pictures(models: ModelCache, choice: FuserChoice | None, question: Question) -> str:
    """Draw what the fuser does to the caches of a prompt, as HTML.

    Raises:
        C2CError: no fuser or no prompt, matplotlib is missing, or the models can't take the prompt.
    """
    if choice is None:
        raise PromptError(TEXTS["no_shared_fuser"])
    question.check()
    from c2c.analysis.capture import capture_prompt
    from c2c.analysis.experiment import check_drawing
    from c2c.analysis.plots import html_figures, prompt_plots
    from c2c.prompting import RenderOptions

    check_drawing()
    with models.use(choice) as model:
        capture = capture_prompt(model, question.messages, RenderOptions(answer_prefix=question.answer_prefix))
    return f'<div class="c2c-pictures">{html_figures(prompt_plots(capture))}</div>'
