"""The page: what stands where, and which button does what. All that is done is done in :mod:`c2c.demo.desk`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from c2c.demo.desk import Changed, Desk, question_for
from c2c.demo.document import read_document
from c2c.demo.errors import DemoError
from c2c.demo.example import DOCUMENT, DOCUMENT_QUESTION, EXAMPLES
from c2c.demo.markup import remark_html, sentence
from c2c.demo.pane import Way
from c2c.demo.question import Question
from c2c.demo.settings import SYSTEM, Settings
from c2c.reporting.canvas import colour_rules

_LEAD = (
    "Two language models answer together without a word of text between them: the **sharer** reads the prompt, a small "
    "trained **fuser** merges its KV cache into that of the **receiver**, and the receiver answers. Compare with each "
    "model alone and with the usual way, text."
)
_CLOCKS = (
    "Panes run one after the other, the quickest first, and each stopwatch counts only its own pane's time, prefills "
    "included. *Crossed* is what went from the sharer to the receiver."
)
_BLEND = "How much of what the fuser adds is taken: 0 is the receiver alone, 1 the ordinary run."
_WRONG = "The sharer reads another {what}. Where its content crosses, the answer goes wrong."
_FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "DejaVu Sans", "sans-serif"]
_MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "DejaVu Sans Mono", "monospace"]


def style() -> str:
    """The page's CSS, with the colours of our plots in light and in dark."""
    light, dark = colour_rules()
    rules = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    return f":root {{ {light} }}\n.dark {{ {dark} }}\n{rules}"


def theme() -> Any:
    """Gradio's theme with fonts of the machine, so that nothing is fetched from elsewhere."""
    return gr.themes.Default(primary_hue="blue", font=_FONTS, font_mono=_MONO)


def build(desk: Desk, settings: Settings) -> gr.Blocks:
    """The whole page."""
    page: gr.Blocks = gr.Blocks(title="c2c demo", analytics_enabled=False, fill_width=True)
    with page:
        gr.Markdown(f"# Cache-to-cache\n{_LEAD}")
        with gr.Tab("Ask both", id="ask"):
            asking = _Ask(desk, settings)
        with gr.Tab("Private context", id="private"):
            _Private(desk, settings)
        with gr.Tab("Pictures", id="pictures"):
            _pictures(desk, asking)
        page.load(asking.watch, asking.fuser, asking.status, **_LIVE)
        page.unload(desk_forgets(desk))
    return page


# Runs are told apart and put in order by the desk, so Gradio need not hold them back.
_LIVE: dict[str, Any] = {
    "concurrency_limit": None,
    "show_progress": "hidden",
    "trigger_mode": "multiple",
    "api_visibility": "private",
}


def desk_forgets(desk: Desk) -> Any:
    """What happens when a visitor leaves."""

    def forget(request: gr.Request) -> None:
        for tab in ("ask", "private", "pictures"):
            desk.forget(_tab(request, tab))

    return forget


class _Panes:
    """Four panes and what runs them: common to the two tabs that answer."""

    def __init__(self, desk: Desk, tab: str, private: bool) -> None:
        self.desk, self.tab, self.private = desk, tab, private
        self.fuser: Any = None
        self.status: Any = None

    def choose(self) -> None:
        """Choice of a fuser, and how far its models are."""
        labels = self.desk.labels(self.private)
        self.fuser = gr.Dropdown(
            labels,
            value=self.desk.default(self.private),
            label="Fuser, and so the pair",
            interactive=len(labels) > 1,
            visible=bool(labels),
            elem_id=f"{self.tab}-fuser",
        )
        self.status = gr.HTML(self.desk.status(self.fuser.value, self.private), elem_id=f"{self.tab}-status")

    def show(self) -> None:
        """The panes."""
        start = self.desk.board(f"{self.tab} start", self.fuser.value, self.private)
        with gr.Row(elem_classes="c2c-panes"):
            self.panes = {way: gr.HTML(start[way], elem_id=f"{self.tab}-{way}") for way in Way}
        gr.Markdown(_CLOCKS, elem_classes="c2c-lead")

    @property
    def outputs(self) -> list[Any]:
        """Status and panes."""
        return [self.status, *self.panes.values()]

    def updates(self, label: str | None, runs: Iterator[Changed]) -> Iterator[list[Any]]:
        """What a run changes on the page."""
        for changed in runs:
            yield [
                self.desk.status(label, self.private),
                *(changed.get(way, gr.skip()) for way in self.panes),
            ]

    def watch(self, label: str | None) -> Iterator[str]:
        """The models' state while they are loaded."""
        yield from self.desk.watch(label, self.private)

    def choose_other(self, label: str | None, request: gr.Request) -> Iterator[list[Any]]:
        """Another fuser: empty panes, and its models in the background."""
        tab = _tab(request, self.tab)
        self.desk.forget(tab)
        fresh = self.desk.board(tab, label, self.private)
        yield [self.desk.status(label, self.private), *(fresh[way] for way in self.panes)]
        for status in self.watch(label):
            yield [status, *(gr.skip() for _ in self.panes)]

    def again(self, label: str | None, blend: float, misled: bool, request: gr.Request) -> Iterator[list[Any]]:
        """One thing was changed: cache-to-cache once more."""
        yield from self.updates(label, self.desk.again(_tab(request, self.tab), label, blend=blend, misled=misled))

    def stop(self, request: gr.Request) -> None:
        """End the run."""
        self.desk.stop(_tab(request, self.tab))


class _Ask(_Panes):
    """One prompt for both models."""

    def __init__(self, desk: Desk, settings: Settings) -> None:
        super().__init__(desk, "ask", private=False)
        self.choose()
        chosen = desk.choice(self.fuser.value)
        example = EXAMPLES[0].prompt
        self.prompt = gr.Textbox(example, label="Prompt, read by both models", lines=7, elem_id="ask-prompt")
        gr.Examples(
            [[example.prompt] for example in EXAMPLES],
            self.prompt,
            example_labels=[example.title for example in EXAMPLES],
            label="Examples, in the form that the shipped fuser was trained on",
            api_visibility="private",
        )
        prefix = chosen.prefix if chosen is not None else ""
        with gr.Row():
            run = gr.Button("Ask", variant="primary", elem_id="ask-run")
            stop = gr.Button("Stop", elem_id="ask-stop")
        with gr.Row():
            with gr.Column(min_width=280):
                self.blend = gr.Slider(0, 1, 1, step=0.05, label="Blend", info=_BLEND, elem_id="ask-blend")
            with gr.Column(min_width=280):
                self.wrong = gr.Checkbox(
                    False, label="Wrong message", info=_WRONG.format(what="question"), elem_id="ask-wrong"
                )
        self.show()
        with gr.Accordion("Options", open=False):
            self.prefix = gr.Textbox(
                prefix, label="Answer prefix: text that the answer continues", elem_id="ask-prefix"
            )
            self.system = gr.Textbox(SYSTEM, label="System message", elem_id="ask-system")
            self.tokens, self.message = _lengths(settings)
        self._wire(run, stop)

    def _wire(self, run: Any, stop: Any) -> None:
        again = [self.fuser, self.blend, self.wrong]
        run.click(self.ask, self.inputs, self.outputs, **_LIVE)
        stop.click(self.stop, None, None, api_visibility="private")
        self.wrong.input(self.again, again, self.outputs, **_LIVE)
        self.blend.input(self.again, again, self.outputs, **_LIVE)
        self.fuser.input(self.choose_other, self.fuser, self.outputs, **_LIVE)

    @property
    def inputs(self) -> list[Any]:
        """What a question is made of."""
        return [
            self.fuser,
            self.prompt,
            self.prefix,
            self.system,
            self.tokens,
            self.message,
            self.blend,
            self.wrong,
        ]

    def ask(
        self,
        label: str | None,
        prompt: str,
        prefix: str,
        system: str,
        tokens: float,
        message: float,
        blend: float,
        wrong: bool,
        request: gr.Request,
    ) -> Iterator[list[Any]]:
        """Run all panes."""
        question = question_for(Question(prompt, system, prefix, int(tokens), int(message), float(blend)), wrong)
        yield from self.updates(label, self.desk.ask(_tab(request, self.tab), label, question))


class _Private(_Panes):
    """A document that only the sharer reads."""

    def __init__(self, desk: Desk, settings: Settings) -> None:
        super().__init__(desk, "private", private=True)
        gr.Markdown(
            "Only the sharer reads the document. The receiver gets entries for its cache, made from the sharer's, and "
            "answers the question.",
            elem_classes="c2c-lead",
        )
        self.choose()
        able = self.fuser.value is not None
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
                self.said = gr.HTML("", elem_id="private-said")
            with gr.Column(min_width=280):
                self.prompt = gr.Textbox(
                    DOCUMENT_QUESTION, label="Question, read by both models", lines=2, elem_id="private-prompt"
                )
                self.wrong = gr.Checkbox(
                    False, label="Wrong message", info=_WRONG.format(what="document"), elem_id="private-wrong"
                )
                self.tokens, self.message = _lengths(settings)
                with gr.Row():
                    run = gr.Button("Ask", variant="primary", interactive=able, elem_id="private-run")
                    stop = gr.Button("Stop", interactive=able, elem_id="private-stop")
        self.show()
        self._wire(run, stop, upload)

    def _wire(self, run: Any, stop: Any, upload: Any) -> None:
        run.click(
            self.ask,
            [self.fuser, self.document, self.prompt, self.tokens, self.message, self.wrong],
            self.outputs,
            **_LIVE,
        )
        stop.click(self.stop, None, None, api_visibility="private")
        self.wrong.input(self.flip, [self.fuser, self.wrong], self.outputs, **_LIVE)
        self.fuser.input(self.choose_other, self.fuser, self.outputs, **_LIVE)
        upload.upload(self.read, upload, [self.document, self.said], api_visibility="private")

    def flip(self, label: str | None, wrong: bool, request: gr.Request) -> Iterator[list[Any]]:
        """The wrong-message switch."""
        yield from self.again(label, 1.0, wrong, request)

    def read(self, path: str) -> tuple[Any, str]:
        """An uploaded document into the field, where it can be read and changed."""
        try:
            text = read_document(path)
        except DemoError as error:
            return gr.skip(), remark_html("failed", sentence(error))
        return text, remark_html("ready", f"{Path(path).name}: {len(text):,} letters, for the sharer alone.")

    def ask(
        self,
        label: str | None,
        document: str,
        prompt: str,
        tokens: float,
        message: float,
        wrong: bool,
        request: gr.Request,
    ) -> Iterator[list[Any]]:
        """Run all panes."""
        question = Question(prompt, max_new_tokens=int(tokens), message_tokens=int(message), document=document)
        runs = self.desk.ask(_tab(request, self.tab), label, question_for(question, wrong))
        yield from self.updates(label, runs)


def _lengths(settings: Settings) -> tuple[Any, Any]:
    with gr.Row():
        tokens = gr.Number(settings.max_new_tokens, precision=0, minimum=1, label="Tokens per answer, at most")
        message = gr.Number(settings.message_tokens, precision=0, minimum=1, label="Tokens of the passed text, at most")
    return tokens, message


def _pictures(desk: Desk, asking: _Ask) -> None:
    gr.Markdown(
        "What crosses while the pair reads the prompt of the first tab: gates and weights, how strongly each token is "
        "changed, which token takes which, and where the caches lie.",
        elem_classes="c2c-lead",
    )
    button = gr.Button("Draw", variant="primary", elem_id="pictures-run")
    remark = gr.HTML("", elem_id="pictures-status")
    shown = gr.HTML("", elem_id="pictures-shown")

    def draw(label: str | None, prompt: str, prefix: str, system: str, request: gr.Request) -> Iterator[Any]:
        yield from desk.pictures(_tab(request, "pictures"), label, Question(prompt, system, prefix))

    inputs = [asking.fuser, asking.prompt, asking.prefix, asking.system]
    button.click(draw, inputs, [remark, shown], **_LIVE)


def _tab(request: gr.Request, tab: str) -> str:
    """One string per visitor and tab."""
    return f"{request.session_hash} {tab}"
