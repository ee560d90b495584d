"""Sessions: a visitor's question answered by one system after the other, and the models that are loaded for it."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import TYPE_CHECKING, Any

from c2c.demo.fusers import FuserChoice
from c2c.demo.panes import SYSTEMS, Pane, Question
from c2c.errors import C2CError, ModelLoadError, PromptError

if TYPE_CHECKING:
    from c2c.model import C2CModel

RUN_ORDER = ("receiver", "c2c", "sharer", "text")  # quickest first, so that there is something to read meanwhile


class ModelCache:
    """Keep the two models that were used last and every fuser between them; arguments as in ``from_pretrained``."""

    def __init__(self, dtype: Any = None, device_map: Any = None, allow_mismatch: bool = False) -> None:
        self._load_options = {"dtype": dtype, "device_map": device_map}
        self._allow_mismatch = allow_mismatch
        self._lock = Lock()
        self._models: dict[tuple[str, str], Any] = {}
        self._pairs: dict[str, tuple[C2CModel, float]] = {}  # with the seconds that loading took

    @contextmanager
    def use(self, choice: FuserChoice) -> Iterator[C2CModel]:
        """Load a pair where it is not loaded, and hold it; raise C2CError where it can't be, until the next use.

        Others wait: Gradio runs one event at a time, but gives way to the next before a cancelled one has ended.
        """
        with self._lock:
            if choice.source not in self._pairs:
                began = time.perf_counter()
                try:
                    model = self._load(choice)
                except C2CError:
                    raise
                except Exception as error:  # whatever it is, the page must show it and go on
                    raise ModelLoadError(f"{type(error).__name__}: {error}") from error
                self._pairs[choice.source] = model, time.perf_counter() - began
            yield self._pairs[choice.source][0]

    def seconds(self, choice: FuserChoice) -> float | None:
        """Return how long a pair took to load; None where it is not loaded."""
        return self._pairs[choice.source][1] if choice.source in self._pairs else None

    def _load(self, choice: FuserChoice) -> C2CModel:
        from c2c.language_model import Receiver
        from c2c.model import C2CModel
        from c2c.sharer import Sharer

        kinds = {("receiver", choice.receiver): Receiver, ("sharer", choice.sharer): Sharer}
        if self._models.keys() - kinds:  # two pairs may not fit into memory
            self._models = {key: model for key, model in self._models.items() if key in kinds}
            self._pairs.clear()
        for (role, name), kind in kinds.items():
            if (role, name) not in self._models:
                same = self._models.get(("receiver" if role == "sharer" else "sharer", name))  # in memory only once
                options = self._load_options if same is None else {}
                self._models[role, name] = kind.from_pretrained(name if same is None else same, **options)
        models = {role: self._models[role, name] for role, name in kinds}
        if choice.source == choice.receiver:  # no folder of a fuser
            return C2CModel.from_models(models["receiver"], models["sharer"], fuser="copy")
        return C2CModel.from_pretrained(choice.source, **models, allow_mismatch=self._allow_mismatch)


@dataclass
class Session:
    """The panes of one tab of one visitor."""

    panes: dict[str, Pane] = field(default_factory=lambda: {name: Pane(name) for name in SYSTEMS})
    question: Question | None = None

    def ask(
        self,
        models: ModelCache,
        choice: FuserChoice | None,
        question: Question,
        names: Sequence[str] = RUN_ORDER,
        previous: str | None = None,
    ) -> Generator[Pane]:
        """Answer a question with systems one after the other, so that none takes time from another.

        Yields:
            Panes as they change. Errors are panes as well.
        """
        self.question = question
        panes = self.panes = dict(self.panes)  # a cancelled run that has not ended yet goes on with its own
        for name in names:
            panes[name] = Pane(name, "waiting", question, previous=previous if name == "c2c" else None)
            yield panes[name]
        try:
            if choice is None:
                raise PromptError("no fuser is chosen. Start the demo with --fuser FOLDER.")
            question.check()
            with models.use(choice) as model:
                for name in names:
                    for pane in answer(model, panes[name]):
                        panes[name] = pane
                        yield pane
        except C2CError as error:  # no system can answer
            for name in names:
                panes[name] = replace(panes[name], state="failed", error=str(error))
                yield panes[name]

    def ask_again(self, models: ModelCache, choice: FuserChoice | None, changed: Question) -> Generator[Pane]:
        """Answer the last question with cache-to-cache and another blend or message, and finish other panes.

        Nothing is done before a first question.
        """
        if self.question is None:
            return
        question = replace(self.question, blend=changed.blend, wrong_message=changed.wrong_message)
        fused = self.panes["c2c"]
        previous = fused.text if fused.state == "done" else fused.previous
        unfinished = [name for name in RUN_ORDER if name != "c2c" and self.panes[name].state != "done"]
        yield from self.ask(models, choice, question, ["c2c", *unfinished], previous)

    def stop(self) -> None:
        """Mark what is not done as stopped."""
        for name, pane in self.panes.items():
            if pane.state in ("waiting", "running"):
                self.panes[name] = replace(pane, state="stopped")

    def clear(self) -> None:
        """Empty all panes."""
        self.panes, self.question = {name: Pane(name) for name in SYSTEMS}, None


def answer(model: C2CModel, pane: Pane) -> Generator[Pane]:
    """Answer the question of a pane with its system. Closing the iterator stops the model.

    Yields:
        The pane with more and more text, then done or failed.
    """
    from c2c.prompting import RenderOptions
    from c2c.systems import SystemOptions, make_system

    question, began = pane.question, time.perf_counter()
    system = "deranged" if pane.name == "c2c" and question.wrong_message else pane.name
    options = SystemOptions(message_tokens=question.message_tokens, blend=question.blend, other=question.other_messages)
    pane = replace(pane, state="running", seconds=0.0)
    yield pane
    try:
        stream = make_system(system, model, options).stream(
            question.messages,
            question.document,
            options=RenderOptions(answer_prefix=question.answer_prefix),
            max_new_tokens=question.max_new_tokens,
            do_sample=False,
        )
        with stream:
            for piece in stream:
                pane = replace(pane, text=pane.text + piece, seconds=time.perf_counter() - began)
                yield pane
        result = stream.result
        yield replace(pane, state="done", result=result, text=result.text if result is not None else pane.text)
    except Exception as error:  # whatever it is, the page must show it and go on
        text = str(error) if isinstance(error, C2CError) else f"{type(error).__name__}: {error}"
        yield replace(pane, state="failed", error=text)
