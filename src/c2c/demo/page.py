"""The page: tabs of fields, buttons and four panes, and what happens when they are used."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from c2c.data.formats import SYSTEM
from c2c.demo import DemoConfig
from c2c.demo.fusers import FuserChoice, default_fuser
from c2c.demo.panes import DOCUMENT, DOCUMENT_QUESTION, EXAMPLES, SYSTEMS, TEXTS, Pane, Question, pane_html, status_html
from c2c.demo.session import ModelCache, Session
from c2c.errors import C2CError, PromptError
from c2c.utils import read_text

# Events that use the models wait for each other; Gradio shows the place in the queue and the seconds.
QUEUED: dict[str, Any] = {
    "concurrency_id": "models",
    "concurrency_limit": 1,
    "show_progress": "minimal",
    "api_visibility": "private",
}
DIRECT: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
Values = dict[Any, Any]  # of components
Updates = Iterator[dict[Any, str]]  # of components
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
            gr.Markdown(TEXTS["pictures"], elem_classes="c2c-lead")
            draw = gr.Button("Draw", variant="primary", elem_id="pictures-run")
            shown = [gr.HTML("", elem_id="pictures-status"), gr.HTML("", elem_id="pictures-shown")]
            draw.click(ask.draw, ask.inputs, shown, **QUEUED)
        page.load(ask.load, {ask.fuser}, ask.status, **QUEUED)
    return page


class AnswerTab:
    """Fields, buttons and four panes: of one prompt for both models, or of a document that only the sharer reads."""

    def __init__(
        self, models: ModelCache, choices: Sequence[FuserChoice], config: DemoConfig, *, private: bool
    ) -> None:
        self.models, self.private = models, private
        name = "private" if private else "ask"
        self.choices = {choice.label: choice for choice in choices if choice.private is private}
        first = default_fuser(list(self.choices.values()), private)
        self.session = gr.State(Session())
        shown: dict[str, Any] = {"interactive": len(self.choices) > 1, "visible": bool(first)}
        value, label = first.label if first else None, "Fuser, and so the pair"
        self.fuser = gr.Dropdown(list(self.choices), value=value, label=label, elem_id=f"{name}-fuser", **shown)
        self.status = gr.HTML(self.status_html(first), elem_id=f"{name}-status")
        self._add_texts(name)
        with gr.Row():
            run = gr.Button("Ask", variant="primary", interactive=bool(first), elem_id=f"{name}-run")
            stop = gr.Button("Stop", interactive=bool(first), elem_id=f"{name}-stop")
        wrong = TEXTS["wrong_message"].format("document" if private else "question")
        with gr.Row():
            with gr.Column(min_width=280, visible=not private):  # private context is there or not
                self.blend = gr.Slider(0, 1, 1, step=0.05, label="Blend", info=TEXTS["blend"], elem_id=f"{name}-blend")
            with gr.Column(min_width=280):
                self.wrong = gr.Checkbox(False, label="Wrong message", info=wrong, elem_id=f"{name}-wrong")
        with gr.Row(elem_classes="c2c-panes"):
            self.panes = {one: gr.HTML(pane_html(Pane(one), first), elem_id=f"{name}-{one}") for one in SYSTEMS}
        gr.Markdown(TEXTS["times"], elem_classes="c2c-lead")
        with gr.Accordion("Options", open=False):
            prefix, label = (
                first.answer_prefix if first and not private else "",
                "Answer prefix: text that the answer continues",
            )
            self.answer_prefix = gr.Textbox(prefix, label=label, elem_id=f"{name}-prefix")
            self.system = gr.Textbox("" if private else SYSTEM, label="System message", elem_id=f"{name}-system")
            with gr.Row():
                limit = partial(gr.Number, precision=0, minimum=1)
                self.tokens = limit(config.max_new_tokens, label="Tokens per answer, at most")
                self.message_tokens = limit(config.message_tokens, label="Tokens of the passed text, at most")
        self._connect(run, stop)

    def _add_texts(self, name: str) -> None:
        what, start, lines = ("Question", DOCUMENT_QUESTION, 2) if self.private else ("Prompt", EXAMPLES[0].prompt, 7)
        with gr.Column(visible=self.private):
            gr.Markdown(TEXTS["private"], elem_classes="c2c-lead")
            label, types = "Document, read by the sharer alone", ["text", ".md", ".txt"]
            self.document = gr.Textbox(DOCUMENT, label=label, lines=5, elem_id=f"{name}-document")
            upload = gr.File(label="or upload a text file", file_types=types, height=120, elem_id=f"{name}-upload")
            uploaded = gr.HTML("", elem_id=f"{name}-uploaded")
        self.prompt = gr.Textbox(start, label=f"{what}, read by both models", lines=lines, elem_id=f"{name}-prompt")
        if not self.private:
            prompts, titles = [[example.prompt] for example in EXAMPLES], [example.title for example in EXAMPLES]
            gr.Examples(prompts, self.prompt, example_labels=titles, label=TEXTS["examples"], api_visibility="private")
        upload.upload(read_upload, upload, [self.document, uploaded], **DIRECT)

    @property
    def inputs(self) -> set[Any]:
        """Everything that a question is made of."""
        return {part for part in vars(self).values() if isinstance(part, gr.components.Component)} - {self.status}

    def question(self, values: Values) -> Question:
        """Return the question that the fields hold."""
        return Question(
            values[self.prompt],
            values[self.system],
            values[self.answer_prefix],
            int(values[self.tokens]),
            int(values[self.message_tokens]),
            float(values[self.blend]),
            values[self.document] if self.private else None,
            values[self.wrong],
        )

    def choice(self, values: Values) -> FuserChoice | None:
        """Return the chosen fuser."""
        return self.choices.get(values[self.fuser] or "")

    def _connect(self, run: Any, stop: Any) -> None:
        outputs, options = [self.status, *self.panes.values()], QUEUED | {"show_progress_on": [self.status]}
        asked = run.click(self.ask, self.inputs, outputs, **options)
        # a slider on its way sends many values: only the last one is run after the one that is running
        changed = [self.wrong.input, self.blend.input]
        options["trigger_mode"] = "always_last"
        again = gr.on(changed, partial(self.ask, again=True), self.inputs, outputs, cancels=asked, **options)
        self.fuser.input(self.choose, {self.session, self.fuser}, outputs, cancels=[asked, again], **options)
        stop.click(None, cancels=[asked, again], api_visibility="private")
        stop.click(self.stop, {self.session, self.fuser}, list(self.panes.values()), **DIRECT)

    def load(self, values: Values) -> Iterator[str]:
        """Load the chosen fuser's models; yield their state."""
        choice = self.choice(values)
        if choice is not None and self.models.seconds(choice) is None:
            pair = choice.pair
            yield status_html("loading", f"Loading {pair} \u2026 You can ask already.")
            try:
                with self.models.use(choice):
                    pass
            except C2CError as error:
                yield status_html("failed", f"{pair} could not be loaded: {error}")
                return
        yield self.status_html(choice)

    def ask(self, values: Values, again: bool = False) -> Updates:
        """Answer a question with all systems, or the last one with cache-to-cache and another switch or blend.

        Closing this, as Gradio does on cancelling, stops the models.
        """
        session, choice, question = values[self.session], self.choice(values), self.question(values)
        run = session.ask_again if again else session.ask
        with closing(run(self.models, choice, question)) as panes:
            for pane in panes:
                yield {self.panes[pane.name]: pane_html(pane, choice), self.status: self.status_html(choice)}

    def choose(self, values: Values) -> Updates:
        """Empty the panes for another fuser and load its models."""
        values[self.session].clear()
        yield {self.panes[name]: pane_html(Pane(name), self.choice(values)) for name in SYSTEMS}
        for status in self.load(values):
            yield {self.status: status}

    def stop(self, values: Values) -> dict[Any, str]:
        """Show what was stopped; the runs themselves are cancelled by Gradio."""
        session = values[self.session]
        session.stop()
        return {self.panes[pane.name]: pane_html(pane, self.choice(values)) for pane in session.panes.values()}

    def draw(self, values: Values) -> tuple[str, str]:
        """Draw what the fuser does to the caches of the prompt."""
        from c2c.analysis.capture import capture_prompt
        from c2c.analysis.experiment import check_drawing
        from c2c.analysis.plots import html_figures, prompt_plots
        from c2c.prompting import RenderOptions

        question, choice = self.question(values), self.choice(values)
        try:
            if choice is None:
                raise PromptError(TEXTS["no_shared_fuser"])
            question.check()
            check_drawing()
            with self.models.use(choice) as model:
                capture = capture_prompt(model, question.messages, RenderOptions(answer_prefix=question.answer_prefix))
        except C2CError as error:
            return status_html("failed", str(error)), ""
        status = status_html("ready", f"Of the prompt in the first tab, {len(question.prompt)} letters.")
        return status, f'<div class="c2c-pictures">{html_figures(prompt_plots(capture))}</div>'

    def status_html(self, choice: FuserChoice | None) -> str:
        """Format the state of a fuser's models."""
        if choice is None:
            return status_html("waiting", TEXTS["no_private_fuser" if self.private else "no_shared_fuser"])
        seconds = self.models.seconds(choice)
        if seconds is None:
            return status_html("waiting", f"{choice.pair}: will be loaded when they are needed.")
        return status_html("ready", f"Ready: {choice.pair}, loaded in {seconds:.0f} s.")


def read_upload(path: str) -> tuple[Any, str]:
    """Read an uploaded document into the field, where it can be read and changed; say how long it is."""
    try:
        text = read_text(Path(path), Path(path).name, PromptError)
    except PromptError as error:
        return gr.skip(), status_html("failed", str(error))
    return text, status_html("ready", f"Read {Path(path).name}: {len(text):,} letters, for the sharer alone.")
