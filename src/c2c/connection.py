"""Connect two models by the best method that they have: copy, a trained fuser that fits them, or text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from c2c.alignment import CharSpanAligner
from c2c.errors import C2CError, CacheError, FuserError, SystemUnavailableError
from c2c.fusers import CopyFuser, Fuser
from c2c.fusers.base import load_fuser
from c2c.generation import FusionReport, GenerationResult, PrefilledPrompt
from c2c.identity import ModelIdentity, differences
from c2c.language_model import LanguageModel, Receiver
from c2c.layer_map import LayerMap
from c2c.model import C2CModel
from c2c.pretrained import load_models, made_for
from c2c.prompting import RenderOptions
from c2c.sharer import Sharer
from c2c.systems import System, SystemOptions, make_system
from c2c.utils import read_json_object
from c2c.variants import compare
from c2c.zoo import fuser_folders, trained_kinds

Context = Literal["private", "shared"]
METHODS = ("copy", "fuser", "text", "receiver")
_FIELDS = {"kv": "cache geometry", "rope": "rotary embedding"}


@dataclass(frozen=True)
class Method:
    """Hold one method of answering with two models, and whether these two have it.

    Attributes:
        context: ``private``: only the sharer has read something; ``shared``: both read the same messages.
        name: one of ``METHODS``, the better ones first.
        available: whether these models have it.
        reason: why, or why not.
        system: name of the system that answers so.
        fuser: what is used between the models; None for text.
    """

    context: Context
    name: str
    available: bool
    reason: str
    system: str = "c2c"
    fuser: Fuser | None = None


class Connection(System):
    """Answer with the best method that two models have, decided once for private and once for shared context.

    Args:
        receiver: the model that answers.
        sharer: the model that shares what it has read.
        methods: all methods, the better ones first within a context.
        options: of all systems.

    Raises:
        SystemUnavailableError: there is no method at all.
    """

    name = "connect"
    title = "best method"

    def __init__(
        self, receiver: Receiver, sharer: Sharer, methods: Sequence[Method], options: SystemOptions | None = None
    ) -> None:
        self.receiver, self.sharer = receiver, sharer
        self.methods, self._systems = list(methods), dict[Context, System]()
        for context in ("private", "shared"):
            method = self.chosen(context)
            if method is not None:
                model = _model(receiver, sharer, method.fuser)
                self._systems[context] = make_system(method.system, model, options)
        if not self._systems:
            raise SystemUnavailableError(f"{receiver.name} and {sharer.name} have no method in common. {self}")
        fused = [one for one in self._systems if (method := self.chosen(one)) and method.fuser is not None]
        super().__init__(self._systems[(fused or list(self._systems))[0]].model, options)

    def chosen(self, context: Context) -> Method | None:
        """Return the method that is used in a context; None where there is none."""
        return next((method for method in self.methods if method.context == context and method.available), None)

    def system(self, context: Context) -> System:
        """Return the system that answers in a context.

        Raises:
            SystemUnavailableError: no method is available there.
        """
        if context not in self._systems:
            raise SystemUnavailableError(f"these models have no method for {context} context. {self}")
        return self._systems[context]

    def prefill(
        self, messages: Any, sharer_messages: Any = None, *, options: RenderOptions | None = None
    ) -> PrefilledPrompt:
        """Prefill what the chosen system decodes from; see :meth:`System.prefill`."""
        context = _context(sharer_messages)
        prompt = self.system(context).prefill(messages, sharer_messages, options=options)
        prompt.report = self._report(context, prompt.report)
        return prompt

    def check(self, messages: Any, sharer_messages: Any = None, *, options: RenderOptions | None = None) -> int:
        """Check one conversation for the chosen system; see :meth:`System.check`."""
        return self.system(_context(sharer_messages)).check(messages, sharer_messages, options=options)

    def generate(
        self, messages: Any, sharer_messages: Any = None, *, options: RenderOptions | None = None, **kwargs: Any
    ) -> Any:
        """Answer; the results' reports name the method, and why not a better one. See :meth:`System.generate`."""
        context = _context(sharer_messages)
        found = self.system(context).generate(messages, sharer_messages, options=options, **kwargs)
        results: list[GenerationResult] = found if isinstance(found, list) else [found]
        report = self._report(context, results[0].report)
        for result in results:
            result.report = report
        return found

    def read(self, document: Any, **kwargs: Any) -> Any:
        """Let the sharer read a document now, for many questions later; arguments as in ``Sharer.read``.

        Returns:
            A handoff, to be passed as ``sharer_messages``.

        Raises:
            SystemUnavailableError: these models exchange text, which is read anew for each question.
        """
        method, model = self.chosen("private"), self.system("private").model
        if method is None or method.fuser is None:
            raise SystemUnavailableError(f"there is nothing to read ahead: these models exchange text. {self}")
        if method.fuser.keeps_tokens:
            kwargs.setdefault("before", "")
        return model.sharers[0].for_fuser(method.fuser).read(document, **kwargs)

    def _report(self, context: Context, report: FusionReport | None) -> FusionReport:
        report, chosen = report or FusionReport(), self.chosen(context)
        report.method = chosen.name if chosen else None
        better = [method for method in self.methods if method.context == context and not method.available]
        rank = METHODS.index(chosen.name) if chosen else len(METHODS)
        report.alternatives = {one.name: one.reason for one in better if METHODS.index(one.name) < rank}
        return report

    @property
    def language_model(self) -> LanguageModel:
        """The model that answers."""
        return self.model.receiver

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        methods = [
            {
                "context": method.context,
                "method": method.name,
                "available": method.available,
                "chosen": method is self.chosen(method.context),
                "reason": method.reason,
            }
            for method in self.methods
        ]
        return {"receiver": self.receiver.name, "sharer": self.sharer.name, "methods": methods}

    def __str__(self) -> str:
        lines = (
            f"{method.context} context: {method.name}: {'yes' if method.available else 'no'}, {method.reason}"
            for method in self.methods
        )
        return "; ".join(lines)


def connect(
    receiver: Any,
    sharer: Any,
    fuser: str | Path | Fuser | None = None,
    *,
    method: str | None = None,
    show_documents: bool = False,
    refresh: int = CopyFuser.config_class.refresh,
    options: SystemOptions | None = None,
    **load_kwargs: Any,
) -> Connection:
    """Connect two models by the best method that they have.

    For private context (what only the sharer has read) the methods are, the best first: ``copy`` (the same model on
    both sides), ``fuser`` (a trained one that fits both), ``text``. For shared context (both read the same messages):
    ``fuser``, ``text``; for the same model the receiver alone, which has read all of it.

    Example:
        >>> agents = connect("qwen2.5-coder-0.5b", "qwen2.5-coder-0.5b")
        >>> page = agents.read("The key is 4711.")
        >>> result = agents.generate("What is the key?", page, max_new_tokens=8)
        >>> print(result.text, result.report.method)

    Args:
        receiver: the model that answers: alias, hub id, folder, GGUF file or a loaded one.
        sharer: the model that reads: the same, or the URL of ``c2c share``. One that is named like the receiver is
            loaded once.
        fuser: a fuser for these two (folder, hub id or object). Without it fusers are looked for in ``$C2C_FUSERS``
            and ``zoo/``.
        method: ask for one method rather than the best: ``copy``, ``fuser``, ``text`` or ``receiver``.
        show_documents: whether the receiver may read documents themselves where they cross as text; else the sharer
            writes what it finds in them.
        refresh: for ``copy``: how many of its first tokens the receiver reads itself of each document that is moved.
        options: of all systems, such as the length of messages.
        **load_kwargs: how to load models, see :func:`c2c.loading.load`.

    Raises:
        MismatchError: the given fuser does not fit.
        SystemUnavailableError: no method, or not the one that was asked for; says why.
    """
    if method is not None and method not in METHODS:
        raise SystemUnavailableError(f"unknown method {method!r}. Known: {', '.join(METHODS)}.")
    ours, (theirs, *more) = load_models(receiver, sharer, load_kwargs, once=True)
    if more:
        raise SystemUnavailableError("connect takes one sharer, and got several; use C2CModel for these.")
    found = list(_methods(ours, theirs, fuser, show_documents, refresh))
    if method is not None:
        found = [
            one if one.name == method else replace(one, available=False, reason=f"method={method!r} was asked for")
            for one in found
        ]
    return Connection(ours, theirs, found, options)


def _context(sharer_messages: Any) -> Context:
    return "shared" if sharer_messages is None else "private"


def _methods(
    receiver: Receiver, sharer: Sharer, given: str | Path | Fuser | None, show_documents: bool, refresh: int
) -> Iterator[Method]:
    """Yield all methods, those of each context in the order of their quality."""
    fusers = _fitting(receiver, sharer, given)
    copied, reason = _copy(receiver, sharer, refresh)
    writes = sharer.generates
    no_text = "the sharer is on another machine and only shares its cache"
    yield Method("private", "copy", copied is not None, reason, fuser=copied)
    yield _fused("private", fusers, given)
    if show_documents:
        yield Method("private", "text", True, "the receiver reads the document itself", "reader")
    else:
        yield Method("private", "text", writes, "the sharer writes a summary" if writes else no_text, "summary")
    if receiver.identity.same_weights(sharer.identity):
        yield Method("shared", "receiver", True, "the same model on both sides has nothing to add", "receiver")
        return
    yield _fused("shared", fusers, given)
    answers = "the sharer answers first, and the receiver reads that"
    yield Method("shared", "text", writes, answers if writes else no_text, "text")
    yield Method("shared", "receiver", True, "the sharer has no part in it", "receiver")


def _copy(receiver: Receiver, sharer: Sharer, refresh: int) -> tuple[CopyFuser | None, str]:
    """Return a copy fuser for two models, or None, with the reason."""
    hard, soft = differences("sharer", receiver.identity, sharer.identity, "receiver")
    fields = [line.split(":")[0].split(" ")[-1] for line in [*hard, *soft]]
    other = [_FIELDS.get(field, field) for field in fields if field != "template"]
    if other and (other != ["weights"] or not sharer.generates):
        return None, f"the models differ in {', '.join(other)}"
    if receiver.left_out:
        return None, f"layers {_short(receiver.left_out)} keep a state instead of keys and values, which is not copied"
    try:
        receiver.check_continuation()
        receiver.check_private_context()
        receiver.check_rotary()
    except CacheError as error:
        return None, str(error)
    more: dict[str, Any] = {}
    if other:
        report = compare(receiver, sharer)
        if report.decision == "none":
            return None, f"a variant of the receiver: {report.reason}"
        more = {"variant": True, "recompute": report.range if report.decision == "recompute" else None}
    layers: LayerMap = list(range(receiver.geometry.layers))
    new = CopyFuser.from_geometry(sharer.geometry, receiver.geometry, layers, refresh=refresh, **more)
    new.config.alignment = CharSpanAligner().to_dict()
    reason = f"a variant of the receiver: {report.reason}" if other else "the same model on both sides"
    return made_for(new, receiver, sharer), reason  # type: ignore[return-value]


def _short(layers: Any) -> str:
    numbers = list(layers)
    return ", ".join(map(str, numbers[:4])) + (", ..." if len(numbers) > 4 else "")


def _fused(context: Context, fusers: Sequence[tuple[str, Fuser]], given: Any) -> Method:
    """Return the method of a trained fuser for a context."""
    chooses = list[str]()
    for name, fuser in fusers:
        if fuser.context == context and given is None and trained_kinds(fuser.config.to_dict()) == {"multiple_choice"}:
            chooses.append(name)
        elif fuser.context == context:
            return Method(context, "fuser", True, f"{fuser.family} fuser {name}", fuser=fuser)
    missing = "no trained fuser for these two in $C2C_FUSERS or zoo/; c2c train makes one"
    if chooses:
        missing = f"{', '.join(chooses)} learned to choose options of a question alone; name it where that is asked"
    return Method(context, "fuser", False, missing if given is None else "the given fuser is for the other context")


def _fitting(receiver: Receiver, sharer: Sharer, given: str | Path | Fuser | None) -> list[tuple[str, Fuser]]:
    """Load the trained fusers that fit both models; the given one, or else those that are found, in their order.

    Raises:
        MismatchError: the given one does not fit.
    """
    if given is not None:
        fuser = given if isinstance(given, Fuser) else load_fuser(given, dtype=torch.float32)
        torch.nn.Module.to(fuser, receiver.device)
        C2CModel(receiver, [sharer], [fuser])  # checks all that must fit
        return [(getattr(fuser.config, "_name_or_path", "") or fuser.family, fuser)]
    return [
        (str(folder), load_fuser(folder, dtype=torch.float32).to(receiver.device))  # type: ignore[arg-type]
        for folder in fuser_folders()
        if _made_for_these(folder, receiver, sharer)
    ]


def _made_for_these(folder: Path, receiver: Receiver, sharer: Sharer) -> bool:
    """Whether a folder holds a trained fuser whose config names just these models."""
    config = read_json_object(folder / "config.json", FuserError)
    if not config.get("training"):
        return False
    for role, model in (("receiver", receiver), ("sharer", sharer)):
        if not config.get(role) or any(differences(role, ModelIdentity.from_dict(config[role]), model.identity)):
            return False
    return True


@dataclass
class _Pair:
    """Hold two models that exchange text, between which no fuser could be made."""

    receiver: Receiver
    sharers: list[Sharer]
    private: tuple[int, ...] = ()


def _model(receiver: Receiver, sharer: Sharer, fuser: Fuser | None) -> Any:
    """Make the model of a method; text needs no fuser, and an untrained one is not used there."""
    if fuser is not None:
        return C2CModel(receiver, [sharer], [fuser])
    try:
        return C2CModel.from_models(receiver, sharer)
    except C2CError:
        return _Pair(receiver, [sharer])
