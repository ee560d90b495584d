"""From requests to prompts that are read, for every way to answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from c2c.alignment import Prompt
from c2c.baselines.summary import summary_request, with_passage
from c2c.baselines.text_to_text import hand_over, request
from c2c.errors import C2CError
from c2c.integrations.prompt_edits import merge
from c2c.language_model import LanguageModel
from c2c.messages import Conversation
from c2c.model import C2CModel
from c2c.prompting import RenderOptions, encode, render, require_tokenizer
from c2c.remote.errors import RemoteError, SharerLost
from c2c.remote.sharer import RemoteSharer
from c2c.report import FusionReport
from c2c.serving.batch import Prefilled, ends_of, join, write
from c2c.serving.engine import Ask, Way
from c2c.serving.errors import ApiError, internal, invalid, too_long
from c2c.serving.logs import log_failure
from c2c.serving.queue import Job
from c2c.serving.raw_text import RawText, as_message
from c2c.serving.sampling import Sampling
from c2c.serving.writer import Writer
from c2c.tokens import left_pad


@dataclass
class Prompted:
    """A request whose prompt is read.

    Attributes:
        job: the request.
        prompt_tokens: tokens that the answering model reads; entries of private context are none.
        room: new tokens that fit after the prompt; None where the model does not say.
        report: what was fused.
        message: what the sharer wrote.
        crossed: bytes that went from sharer to receiver.
    """

    job: Job
    prompt_tokens: int
    room: int | None
    report: FusionReport | None = None
    message: str | None = None
    crossed: int = 0


@dataclass
class Batch:
    """Prompts of one way that are read.

    Attributes:
        model: who writes the answers.
        prompted: the requests.
        prefilled: a row for each.
    """

    model: LanguageModel
    prompted: list[Prompted]
    prefilled: Prefilled


class Ways:
    """All ways to answer with one model.

    Args:
        model: receiver, sharers and fusers.
        message_tokens: tokens of the sharer's text at most, for text-to-text.
    """

    def __init__(self, model: C2CModel, message_tokens: int = 128) -> None:
        self.model, self.message_tokens = model, message_tokens
        self._sharer_index = model.private[0] if model.private else 0
        self._known: dict[Way, Callable[[Sequence[Job]], Batch | None]] = {
            Way.C2C: self._private if model.private else self._shared,
            Way.RECEIVER: self._receiver,
        }
        if not isinstance(model.sharers[self._sharer_index], RemoteSharer):  # its weights are not here
            self._known |= {Way.SHARER: self._sharer, Way.TEXT: self._text}

    @property
    def known(self) -> tuple[Way, ...]:
        """Who can answer."""
        return tuple(self._known)

    def read(self, way: Way, jobs: Sequence[Job]) -> Batch | None:
        """Read the prompts of requests; those that can't be read are told so on their tickets. None if none is left."""
        return self._known[way]([job for job in jobs if not job.ticket.cancelled])

    # -- what is refused before it waits -------------------------------------------------------------------------------

    def check(self, ask: Ask) -> None:
        """Refuse what can't be answered whatever the length of the prompt.

        Raises:
            ApiError: it can't.
        """
        if ask.way not in self._known:
            raise invalid(
                f"the sharer of this server is on another machine and only shares: no {ask.way} way.", "model"
            )
        if isinstance(ask.prompt, str) and (ask.way is Way.TEXT or self.model.private):
            raise invalid("text-to-text and private context need messages: use /v1/chat/completions.", "prompt")
        if ask.way is Way.TEXT and ask.prompt[-1]["role"] != "user":  # type: ignore[index]
            raise invalid("text-to-text needs messages that end with one of the user.", "messages")
        if ask.private is not None:
            self._check_private(ask, ask.private)
        elif ask.way is Way.C2C and self.model.private:
            raise invalid(
                "this fuser hands over what the sharer alone has read: pass c2c.sharer_messages, or c2c.handoff with "
                "the id that POST /v1/c2c/handoffs gave.",
                "c2c.sharer_messages",
                "missing_private_context",
            )

    def _check_private(self, ask: Ask, private: tuple[Any, ...]) -> None:
        if not self.model.private:
            raise invalid(
                "private context was given, but this fuser is for prompts that both models read. Leave sharer_messages "
                "and handoff out, or serve a 'memory' fuser.",
                "c2c",
            )
        if ask.way is Way.RECEIVER:
            raise invalid("the receiver alone reads no private context: leave sharer_messages and handoff out.", "c2c")
        if ask.way is not Way.C2C:
            _passage(private)
        elif len(private) != len(self.model.private):
            raise invalid(
                f"got private context for {len(private)} sharers, and {len(self.model.private)} hand it over: pass a "
                "list with one entry for each.",
                "c2c",
            )

    # -- one model alone -----------------------------------------------------------------------------------------------

    def _receiver(self, jobs: Sequence[Job]) -> Batch | None:
        return _alone(self.model.receiver, jobs, lambda job: _ask(job).prompt)

    def _sharer(self, jobs: Sequence[Job]) -> Batch | None:
        def prompt(job: Job) -> Conversation | str:
            ask = _ask(job)
            if ask.private is None or isinstance(ask.prompt, str):
                return ask.prompt
            return with_passage(ask.prompt, _passage(ask.private))

        return _alone(self.model.sharers[self._sharer_index], jobs, prompt)

    # -- text-to-text --------------------------------------------------------------------------------------------------

    def _text(self, jobs: Sequence[Job]) -> Batch | None:
        messages = self._messages(jobs)
        batch = _alone(self.model.receiver, [job for job in jobs if job in messages], lambda job: _told(job, messages))
        for prompted in batch.prompted if batch else []:
            prompted.message = messages[prompted.job]
            prompted.crossed = len(prompted.message.encode())
        return batch

    def _messages(self, jobs: Sequence[Job]) -> dict[Job, str]:
        """What the sharer writes to each request, greedily."""
        sharer = self.model.sharers[self._sharer_index]
        batch = _alone(sharer, jobs, self._request, new_tokens=1, prefix=False)
        if batch is None:
            return {}
        writers = [
            Writer(
                sharer.tokenizer,
                Sampling(max_tokens=_within(self.message_tokens, prompted.room), temperature=0),
                ends=ends_of(sharer),
                gone=prompted.job.ticket.gone,
            )
            for prompted in batch.prompted
        ]
        write(sharer, batch.prefilled, writers)
        pairs = zip(batch.prompted, writers, strict=True)
        return {prompted.job: writer.text for prompted, writer in pairs if not prompted.job.ticket.cancelled}

    def _request(self, job: Job) -> Conversation | str:
        ask = _ask(job)
        if ask.private is not None:
            return summary_request(_passage(ask.private), self.message_tokens)
        return request(_conversation(ask), "fair")

    # -- cache-to-cache ------------------------------------------------------------------------------------------------

    def _shared(self, jobs: Sequence[Job]) -> Batch | None:
        """Aligned one by one, read and fused together."""
        receiver = self.model.receiver
        prompted: list[Prompted] = []
        prompts: list[Prompt] = []
        for job in jobs:
            with _refusing(job):
                prompt = self._aligned(_ask(job))
                prompted.append(_prompted(job, receiver, prompt.receiver.length, int(prompt.receiver.mask.sum())))
                prompts.append(prompt)
        if not prompts:
            return None
        try:
            fused = self.model.fuse_prompts(merge(prompts))
        except SharerLost as lost:
            return self._receiver_only([one.job for one in prompted], lost)
        cache = receiver.prefill(fused.tokens, fused.tokens.length - 1, fused.cache)
        for one, prompt in zip(prompted, prompts, strict=True):
            one.crossed = self._read_bytes(prompt)
            one.report = replace(
                fused.report,
                prompt_tokens=one.prompt_tokens,
                fused_tokens=prompt.fused_tokens,
                skipped_tokens=dict(prompt.skipped),
                sharer_bytes=one.crossed,
            )
        return Batch(receiver, prompted, Prefilled(fused.tokens, cache))

    def _receiver_only(self, jobs: Sequence[Job], lost: SharerLost) -> Batch | None:
        """The receiver's own answers, where a sharer was lost whose policy is that it answers alone."""
        batch = self._receiver(jobs)
        for one in batch.prompted if batch else []:
            one.report = FusionReport(
                prompt_tokens=one.prompt_tokens,
                skipped_tokens={"a sharer was lost": one.prompt_tokens},
                skipped_layers=dict.fromkeys(range(self.model.receiver.geometry.layers), "a sharer was lost"),
                trained=self.model.trained,
                notes=[*self.model.notes, f"receiver only: {lost}"],
            )
        return batch

    def _aligned(self, ask: Ask) -> Prompt:
        ours, theirs = self.model.receiver.tokenizer, [sharer.tokenizer for sharer in self.model.sharers]
        conversation = ask.prompt
        if isinstance(conversation, str):
            ours, theirs = RawText(ours), [RawText(tokenizer) for tokenizer in theirs]
            conversation = as_message(conversation)
        prompt = self.model.aligner.align(ours, theirs, [conversation], _options(ask))[0]
        self.model.receiver.check_prompt(prompt.receiver)
        for sharer, tokens in zip(self.model.sharers, prompt.sharers, strict=True):
            sharer.check_tokens(tokens)
        return prompt

    def _read_bytes(self, prompt: Prompt) -> int:
        """Bytes of the sharers' entries that the fusers read for one prompt."""
        total = 0
        for index, (sharer, fuser) in enumerate(zip(self.model.sharers, self.model.fusers, strict=True)):
            layers: Any = fuser.config.source_layers  # type: ignore[union-attr]
            per_pair = 2 * len(layers) * sharer.geometry.width * sharer.dtype.itemsize
            alignments = [chunk.alignments[index] for chunk in prompt.chunks]
            total += per_pair * sum(len(alignment) for alignment in alignments if alignment is not None)
        return total

    def _private(self, jobs: Sequence[Job]) -> Batch | None:
        """Each by itself, since what is handed over differs in length; then joined."""
        receiver = self.model.receiver
        prompted: list[Prompted] = []
        parts: list[Prefilled] = []
        for job in jobs:
            with _refusing(job):
                ask = _ask(job)
                fused = self.model.prepare([ask.prompt], sharer_messages=ask.private, options=_options(ask))
                one = _prompted(job, receiver, fused.tokens.length, fused.report.prompt_tokens)
                one.report, one.crossed = fused.report, fused.report.sharer_bytes
                cache = receiver.prefill(fused.tokens, fused.tokens.length - 1, fused.cache)
                parts.append(Prefilled(fused.tokens, cache))
                prompted.append(one)
        return Batch(receiver, prompted, join(parts)) if parts else None


def _alone(
    model: LanguageModel,
    jobs: Sequence[Job],
    prompt: Callable[[Job], Conversation | str],
    *,
    new_tokens: int | None = None,
    prefix: bool = True,
) -> Batch | None:
    """Prompts for a model by itself, read together.

    Args:
        model: who reads them.
        jobs: the requests.
        prompt: what it reads for each.
        new_tokens: how many must fit at least; by default what the request asks for.
        prefix: whether the prompt ends with the request's ``answer_prefix``.
    """
    prompted: list[Prompted] = []
    rows: list[list[int]] = []
    for job in jobs:
        with _refusing(job):
            ids = _ids(model, prompt(job), _options(_ask(job)) if prefix else RenderOptions())
            model.check_prompt(left_pad([ids], 0))
            prompted.append(_prompted(job, model, len(ids), len(ids), new_tokens))
            rows.append(ids)
    if not rows:
        return None
    tokens = left_pad(rows, 0).to(model.device)  # masked everywhere, so any id will do that every model has
    return Batch(model, prompted, Prefilled(tokens, model.prefill(tokens, tokens.length - 1)))


def _prompted(
    job: Job, model: LanguageModel, columns: int, prompt_tokens: int, new_tokens: int | None = None
) -> Prompted:
    """A request with the room that its prompt leaves.

    Raises:
        ApiError: what it asks for does not fit.
    """
    limit, asked = model.context_length, new_tokens or _ask(job).sampling.max_tokens or 1
    room = None if limit is None else limit - columns
    if room is not None and room < asked:
        raise too_long(
            f"the prompt has {columns} tokens for the {model.role} {model.name} and {asked} new ones were asked for, "
            f"{columns + asked} together, but it was made for {limit}. Shorten the prompt, or lower max_tokens."
        )
    return Prompted(job, prompt_tokens, room)


@contextmanager
def _refusing(job: Job) -> Iterator[None]:
    """What goes wrong with one prompt is told to its request, and the others of the batch go on."""
    try:
        yield
    except C2CError as error:
        job.ticket.fail(as_api_error(error, "prompt" if isinstance(_ask(job).prompt, str) else "messages"))
    except Exception as error:
        log_failure("prompt_failed", error)
        job.ticket.fail(internal())


def as_api_error(error: C2CError, param: str | None = None) -> ApiError:
    """An error of the library as an answer to the request that it is about."""
    if isinstance(error, ApiError):
        return error
    message = str(error)
    if isinstance(error, RemoteError):
        return ApiError(502, f"the sharer could not be asked: {message}", code="sharer_lost")
    # said by LanguageModel.check_tokens alone, which has no type of its own for it
    return too_long(message, param) if "which was made for" in message else invalid(message, param)


def _ask(job: Job) -> Ask:
    if not isinstance(job.ask, Ask):
        raise TypeError("a reading has no prompt to answer")
    return job.ask


def _conversation(ask: Ask) -> Conversation:
    return as_message(ask.prompt) if isinstance(ask.prompt, str) else ask.prompt


def _options(ask: Ask) -> RenderOptions:
    return RenderOptions(answer_prefix=ask.answer_prefix)


def _within(wanted: int, room: int | None) -> int:
    return wanted if room is None else min(wanted, room)


def _ids(model: LanguageModel, prompt: Conversation | str, options: RenderOptions) -> list[int]:
    tokenizer = require_tokenizer(model.tokenizer, model.role)
    if isinstance(prompt, str):
        tokenizer, prompt = RawText(tokenizer), as_message(prompt)
    return encode(tokenizer, render(tokenizer, prompt, options)).ids


def _told(job: Job, messages: dict[Job, str]) -> Conversation:
    """What the receiver reads of the sharer's text."""
    ask = _ask(job)
    if ask.private is not None:
        return with_passage(_conversation(ask), messages[job])
    return hand_over(_conversation(ask), "fair", messages[job])


def _passage(private: tuple[Any, ...]) -> str:
    """Private context as text, for ways that hand over text.

    Raises:
        ApiError: it is none.
    """
    given = private[0] if len(private) == 1 else None
    if isinstance(given, list) and len(given) == 1 and given[0]["role"] == "user":
        return str(given[0]["content"])
    raise invalid(
        "a sharer that answers or writes itself reads text: pass sharer_messages with one text or user message, and no "
        "handoff.",
        "c2c",
    )
