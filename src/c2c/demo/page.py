"""The page: what stands where, and which button does what. Gradio's queue lets one event at a time use the models."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import gradio as gr

from c2c.demo.config import DemoConfig
from c2c.demo.examples import DOCUMENT, DOCUMENT_QUESTION, EXAMPLES, SYSTEM
from c2c.demo.fusers import FuserChoice, default_fuser
from c2c.demo.markup import load_status_html, pane_html, sentence, status_html
from c2c.demo.models import LoadStatus, ModelCache
from c2c.demo.panes import SYSTEMS, Pane, Question, Session
from c2c.errors import C2CError, PromptError
from c2c.utils import read_text

_LEAD = (
    "Two language models answer together without a word of text between them: the **sharer** reads the prompt, a small "
    "trained **fuser** merges its KV cache into that of the **receiver**, and the receiver answers. Compare with each "
    "model alone and with the usual way, text."
)
_PRIVATE_LEAD = (
    "Only the sharer reads the document. The receiver gets entries for its cache, made from the sharer's, and answers "
    "the question."
)
_PICTURES_LEAD = (
    "What crosses while the pair reads the prompt of the first tab: gates and weights, how strongly each token is "
    "changed, which token takes which, and where the caches lie."
)
_TIMES = (
    "Panes run one after the other, the quickest first, and each counts only its own seconds, prefills included. "
    "*Crossed* is what went from the sharer to the receiver."
)
_BLEND = "How much of what the fuser adds is taken: 0 is the receiver alone, 1 the ordinary run."
_WRONG = "The sharer reads another {}. Where its content crosses, the answer goes wrong."
_NO_FUSER = {
    False: "No fuser that merges two caches was found. Start the demo with `c2c demo --fuser FOLDER`.",
    True: "No fuser of private context was given, and none is in zoo/. Such a fuser is of the family 'memory'. Train "
    "one with `c2c train configs/private.yaml --data-dir DATA`, then start `c2c demo --fuser runs/private/best`.",
}
_FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "DejaVu Sans", "sans-serif"]
_MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "DejaVu Sans Mono", "monospace"]
# Events that use the models wait for each other; Gradio shows the place in the queue and the seconds.
_QUEUED: dict[str, Any] = {
    "concurrency_id": "models",
    "concurrency_limit": 1,
    "show_progress": "minimal",
    "api_visibility": "private",
}
_DIRECT: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
Updates = Iterator[dict[Any, Any]]


def style() -> str:
    """Return the page's CSS."""
    return Path(__file__).with_name("page.css").read_text(encoding="utf-8")


def theme() -> Any:
    """Return Gradio's theme with fonts of the machine, so that nothing is fetched from elsewhere."""
    return gr.themes.Default(primary_hue="blue", font=_FONTS, font_mono=_MONO)


def build(models: ModelCache, choices: Sequence[FuserChoice], config: DemoConfig) -> gr.Blocks:
    """Build the whole page.

    Args:
        models: where models are loaded.
        choices: fusers to choose from.
        config: options of the demo.
    """
    page: gr.Blocks = gr.Blocks(title="c2c demo", analytics_enabled=False, fill_width=True)
    with page:
        gr.Markdown(f"# Cache-to-cache\n{_LEAD}")
        with gr.Tab("Ask both", id="ask"):
            ask = _AskTab(models, choices, config)
        with gr.Tab("Private context", id="private"):
            _PrivateTab(models, choices, config)
        with gr.Tab("Pictures", id="pictures"):
            _add_pictures(ask)
        page.load(ask.load, ask.fuser, ask.status, **_QUEUED)
    return page


class _Tab(ABC):
    """Four panes and the fields and buttons that fill them."""

    name: str
    private: bool
    prompt: Any
    wrong: Any
    blend: Any = None
    buttons: tuple[Any, Any]

    def __init__(self, models: ModelCache, choices: Sequence[FuserChoice], config: DemoConfig) -> None:
        self.models, self.config = models, config
        self.choices = {choice.label: choice for choice in choices if choice.private is self.private}
        self.session = gr.State(Session())
        first = default_fuser(list(self.choices.values()), self.private)
        self.fuser = gr.Dropdown(
            list(self.choices),
            value=first.label if first else None,
            label="Fuser, and so the pair",
            interactive=len(self.choices) > 1,
            visible=bool(self.choices),
            elem_id=f"{self.name}-fuser",
        )
        self.status = gr.HTML(self.status_html(self.fuser.value), elem_id=f"{self.name}-status")
        self.add_fields()
        with gr.Row(elem_classes="c2c-panes"):
            self.panes = {
                name: gr.HTML(pane_html(Pane(name), first), elem_id=f"{self.name}-{name}") for name in SYSTEMS
            }
        gr.Markdown(_TIMES, elem_classes="c2c-lead")
        self.connect()

    @abstractmethod
    def add_fields(self) -> None:
        """Lay out the fields above the panes."""

    @abstractmethod
    def question(self, values: dict[Any, Any]) -> Question:
        """Return the question that the fields hold."""

    def connect(self) -> None:
        """Connect buttons and fields to what they do."""
        outputs = [self.status, *self.panes.values()]
        options = _QUEUED | {"show_progress_on": [self.status]}
        run, stop = self.buttons
        asked = run.click(self.ask, self.inputs, outputs, **options)
        changes = [field.input for field in (self.wrong, self.blend) if field is not None]
        # a slider on its way sends many values: only the last one is run after the one that is running
        again = gr.on(
            changes, self.ask_again, self.inputs, outputs, trigger_mode="always_last", cancels=asked, **options
        )
        self.fuser.input(self.choose, {self.session, self.fuser}, outputs, cancels=[asked, again], **options)
        stop.click(None, cancels=[asked, again], api_visibility="private")
        stop.click(self.stop, {self.session, self.fuser}, list(self.panes.values()), **_DIRECT)

    @property
    def inputs(self) -> set[Any]:
        """Everything that a question is made of."""
        return {part for part in vars(self).values() if isinstance(part, gr.components.Component)} - {self.status}

    def add_buttons(self) -> None:
        """Lay out the buttons."""
        with gr.Row():
            able = bool(self.choices)
            self.buttons = (
                gr.Button("Ask", variant="primary", interactive=able, elem_id=f"{self.name}-run"),
                gr.Button("Stop", interactive=able, elem_id=f"{self.name}-stop"),
            )

    def add_wrong_message(self, what: str) -> None:
        """Lay out the switch that gives the sharer something else to read."""
        self.wrong = gr.Checkbox(False, label="Wrong message", info=_WRONG.format(what), elem_id=f"{self.name}-wrong")

    def add_lengths(self) -> None:
        """Lay out the fields for the lengths of answer and message."""
        fields = (
            (self.config.max_new_tokens, "Tokens per answer, at most"),
            (self.config.message_tokens, "Tokens of the passed text, at most"),
        )
        with gr.Row():
            self.tokens, self.message = (gr.Number(most, precision=0, minimum=1, label=label) for most, label in fields)

    def choice(self, values: dict[Any, Any]) -> FuserChoice | None:
        """Return the chosen fuser."""
        return self.choices.get(values[self.fuser] or "")

    def status_html(self, label: str | None, status: LoadStatus | None = None) -> str:
        """Format the state of a fuser's models."""
        choice = self.choices.get(label or "")
        if choice is None:
            return status_html("waiting", _NO_FUSER[self.private])
        return load_status_html(choice, status or self.models.status(choice))

    def load(self, label: str | None) -> Iterator[str]:
        """Load a fuser's models; yield their state."""
        choice = self.choices.get(label or "")
        if choice is not None and self.models.status(choice).state != "ready":
            yield self.status_html(label, LoadStatus("loading"))
            try:
                with self.models.use(choice):
                    pass
            except C2CError:
                pass  # part of the state
        yield self.status_html(label)

    def ask(self, values: dict[Any, Any]) -> Updates:
        """Answer a question with all systems."""
        panes = values[self.session].ask(self.models, self.choice(values), self.question(values))
        yield from self.updates(panes, values)

    def ask_again(self, values: dict[Any, Any]) -> Updates:
        """Answer the last question with cache-to-cache once more, with another switch or blend."""
        changed = {"blend": float(values.get(self.blend, 1.0)), "wrong_message": values[self.wrong]}
        yield from self.updates(values[self.session].ask_again(self.models, self.choice(values), **changed), values)

    def updates(self, panes: Iterator[Pane], values: dict[Any, Any]) -> Updates:
        """Yield what changes on the page. Closing this, as Gradio does on cancelling, stops the models."""
        with closing(panes):  # type: ignore[type-var]
            for pane in panes:
                html = pane_html(pane, self.choice(values))
                yield {self.panes[pane.name]: html, self.status: self.status_html(values[self.fuser])}

    def choose(self, values: dict[Any, Any]) -> Updates:
        """Empty the panes for another fuser and load its models."""
        values[self.session].clear()
        yield {self.panes[name]: pane_html(Pane(name), self.choice(values)) for name in SYSTEMS}
        for status in self.load(values[self.fuser]):
            yield {self.status: status}

    def stop(self, values: dict[Any, Any]) -> dict[Any, Any]:
        """Show what was stopped; the runs themselves are cancelled by Gradio."""
        session = values[self.session]
        session.stop()
        return {self.panes[name]: pane_html(pane, self.choice(values)) for name, pane in session.panes.items()}


class _AskTab(_Tab):
    """One prompt for both models."""

    name, private = "ask", False

    def add_fields(self) -> None:
        """Lay out prompt, examples, buttons, switches and options."""
        self.prompt = gr.Textbox(EXAMPLES[0].prompt, label="Prompt, read by both models", lines=7, elem_id="ask-prompt")
        gr.Examples(
            [[example.prompt] for example in EXAMPLES],
            self.prompt,
            example_labels=[example.title for example in EXAMPLES],
            label="Examples, in the form that the shipped fuser was trained on",
            api_visibility="private",
        )
        self.add_buttons()
        with gr.Row():
            with gr.Column(min_width=280):
                self.blend = gr.Slider(0, 1, 1, step=0.05, label="Blend", info=_BLEND, elem_id="ask-blend")
            with gr.Column(min_width=280):
                self.add_wrong_message("question")
        choice = self.choices.get(self.fuser.value or "")
        with gr.Accordion("Options", open=False):
            self.answer_prefix = gr.Textbox(
                choice.answer_prefix if choice else "",
                label="Answer prefix: text that the answer continues",
                elem_id="ask-prefix",
            )
            self.system = gr.Textbox(SYSTEM, label="System message", elem_id="ask-system")
            self.add_lengths()

    def question(self, values: dict[Any, Any]) -> Question:
        """Return the question that the fields hold."""
        return Question(
            values[self.prompt],
            values[self.system],
            values[self.answer_prefix],
            int(values[self.tokens]),
            int(values[self.message]),
            float(values[self.blend]),
            wrong_message=values[self.wrong],
        )


class _PrivateTab(_Tab):
    """A document that only the sharer reads."""

    name, private = "private", True

    def add_fields(self) -> None:
        """Lay out document, upload, question, switch and buttons."""
        gr.Markdown(_PRIVATE_LEAD, elem_classes="c2c-lead")
        with gr.Row(equal_height=False):
            with gr.Column(min_width=280):
                self.document = gr.Textbox(
                    DOCUMENT, label="Document, read by the sharer alone", lines=7, elem_id="private-document"
                )
                upload = gr.File(
                    label="or upload a text file",
                    file_types=["text", ".md", ".txt"],
                    height=120,
                    elem_id="private-upload",
                )
                uploaded = gr.HTML("", elem_id="private-uploaded")
            with gr.Column(min_width=280):
                self.prompt = gr.Textbox(
                    DOCUMENT_QUESTION, label="Question, read by both models", lines=2, elem_id="private-prompt"
                )
                self.add_wrong_message("document")
                self.add_lengths()
                self.add_buttons()
        upload.upload(read_upload, upload, [self.document, uploaded], **_DIRECT)

    def question(self, values: dict[Any, Any]) -> Question:
        """Return the question that the fields hold."""
        return Question(
            values[self.prompt],
            max_new_tokens=int(values[self.tokens]),
            message_tokens=int(values[self.message]),
            document=values[self.document],
            wrong_message=values[self.wrong],
        )


def read_upload(path: str) -> tuple[Any, str]:
    """Read an uploaded document into the field, where it can be read and changed; say how long it is."""
    try:
        text = read_text(Path(path), Path(path).name, PromptError)
    except PromptError as error:
        return gr.skip(), status_html("failed", sentence(error))
    return text, status_html("ready", f"{Path(path).name}: {len(text):,} letters, for the sharer alone.")


def _add_pictures(ask: _AskTab) -> None:
    """Lay out the tab that draws what crosses for the prompt of the first tab."""
    gr.Markdown(_PICTURES_LEAD, elem_classes="c2c-lead")
    button = gr.Button("Draw", variant="primary", elem_id="pictures-run")
    status = gr.HTML("", elem_id="pictures-status")
    pictures = gr.HTML("", elem_id="pictures-shown")

    def draw(values: dict[Any, Any]) -> tuple[str, str]:
        question = ask.question(values)
        try:
            html = draw_pictures(ask.models, ask.choice(values), question)
        except C2CError as error:
            return status_html("failed", sentence(error)), ""
        return status_html("ready", f"Of the prompt in the first tab, {len(question.prompt)} letters."), html

    button.click(draw, ask.inputs, [status, pictures], **_QUEUED)


def draw_pictures(models: ModelCache, choice: FuserChoice | None, question: Question) -> str:
    """Draw what the fuser does to the caches of a prompt, as HTML.

    Raises:
        C2CError: no fuser or no prompt, matplotlib is missing, or the models can't take the prompt.
    """
    if choice is None:
        raise PromptError(_NO_FUSER[False])
    question.check(choice)
    from c2c.plots.album import check_matplotlib, figures_html
    from c2c.plots.reading import read_prompt
    from c2c.prompting import RenderOptions

    check_matplotlib()
    with models.use(choice) as model:
        reading = read_prompt(model, question.messages, RenderOptions(answer_prefix=question.answer_prefix))
        return f'<div class="c2c-pictures">{figures_html(model.fusers[0], reading)}</div>'  # type: ignore[arg-type]
