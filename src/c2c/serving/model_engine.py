"""Base of engines that answer with a C2CModel: systems by name, checks, prefill, handoffs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from c2c import identity
from c2c.errors import C2CError, ContextLengthError, RemoteError, SharerChanged, SystemUnavailableError
from c2c.generation import PrefilledPrompt
from c2c.handoff import Handoff
from c2c.model import C2CModel
from c2c.prompting import collect_notes
from c2c.serving.config import ServeConfig
from c2c.serving.engine import GenerateRequest, HandoffCreated, HandoffRequest, Request, RequestHandle
from c2c.serving.errors import ServerError, internal, invalid, to_api_error
from c2c.serving.logs import log_failure, warn
from c2c.serving.outputs import new_tokens
from c2c.serving.scheduler import Job
from c2c.sharer import Sharer
from c2c.systems import System, SystemOptions, make_system
from c2c.utils import without_folder


class ModelEngine:
    """Base of engines that answer with a :class:`~c2c.model.C2CModel`.

    Args:
        model: receiver, sharers and fusers, all with tokenizers; models lose the folder in their names.
        config: limits, and the systems that answer.
        connection: takes the place of the system ``c2c``: the best method that the models have.

    Raises:
        SystemUnavailableError: a system of ``config.systems`` that these models don't have.
        ServerError: a folder of handoffs for a sharer on another machine.
    """

    def __init__(self, model: C2CModel, config: ServeConfig, connection: System | None = None) -> None:
        self.model, self.config = model, config
        for part in (model.receiver, *model.sharers):
            part.name = without_folder(part.name)  # as clients see it
        pairs = [(model.sharers[index], model.fusers[index]) for index in model.private]
        if config.handoff_folder is not None and not all(one.generates or fuser.keeps_tokens for one, fuser in pairs):
            raise ServerError(
                "--handoff-folder is for a sharer in this process: of one on another machine no whole cache is kept. "
                "Leave it out."
            )
        self.systems: dict[str, System] = {}
        self.on_batch: Callable[[str, int], object] = lambda system, rows: None
        for name in config.systems or config.default_systems:
            try:
                self.systems[name] = make_system(name, model, SystemOptions(message_tokens=config.message_tokens))
            except SystemUnavailableError:
                if config.systems:
                    raise
        if connection is not None and "c2c" in self.systems:
            self.systems["c2c"] = connection

    @property
    def info(self) -> dict[str, Any]:
        """Facts for clients."""
        return {
            "receiver": self.model.receiver.name,
            "sharers": [sharer.name for sharer in self.model.sharers],
            "context": "private" if self.model.private else "shared",
            "trained": self.model.trained,
        }

    @property
    def sharers(self) -> list[dict[str, Any]]:
        """Health of the sharers; one in this process is always there."""
        losses = [getattr(sharer, "lost", None) for sharer in self.model.sharers]
        return [
            {"state": "lost", "code": loss.code, "since": loss.since} if loss else {"state": "ok"} for loss in losses
        ]

    # -- before a request waits ----------------------------------------------------------------------------------------

    async def accept(self, request: Request) -> Job:
        """Check a request and measure what it takes of a batch, on the event loop.

        Raises:
            ApiError: it can't be answered by this server, or its prompt can't be read by the models.
        """
        try:
            return await asyncio.to_thread(self._job, request, RequestHandle())  # tokenizing long prompts takes time
        except C2CError as error:
            raise to_api_error(error, _prompt_param(request)) from error

    def _job(self, request: Request, handle: RequestHandle) -> Job:
        if isinstance(request, HandoffRequest):
            self.check_handoff(request)
            return Job(request, handle, key=object())
        system = self.systems[request.system]
        self._check_private(system, request.private)
        with collect_notes() as notes:
            prompt = system.check(request.prompt, _context([request]), options=request.render)
        new = new_tokens(system.language_model, prompt, request.sampling.max_tokens, self.config.max_tokens)
        entries, most = request.n * (prompt + new), self.config.kv_tokens
        if entries > most:
            raise ContextLengthError(
                f"{request.n} answers of {prompt} tokens of prompt and {new} new ones need {entries} entries of the KV "
                f"cache, and this server has {most} (--kv-tokens). Shorten the prompt, or lower max_tokens or n."
            )
        private = tuple(_is_read(part) for part in request.private or ())
        key = (request.system, request.render, private, *notes)
        return Job(request, handle, key, request.n, prompt, new, tuple(notes))

    def _check_private(self, system: System, private: tuple[Any, ...] | None) -> None:
        expected = len(self.model.private) if system.needs_context else 1
        if private is None:
            if system.needs_context and self.model.private:
                raise invalid(
                    "this fuser hands over what the sharer alone has read: pass c2c.sharer_messages, or c2c.handoff "
                    "with the id that POST /v1/c2c/handoffs gave.",
                    "c2c.sharer_messages",
                    "missing_private_context",
                )
        elif not self.model.private or not system.reads_context:
            raise invalid(
                "private context was given, and nothing here takes it: the receiver alone reads none, nor do fusers of "
                "prompts that both models read. Leave sharer_messages and handoff out, or serve a 'memory' or 'copy' "
                "fuser.",
                "c2c",
            )
        elif len(private) != expected:
            raise invalid(
                f"got private context for {len(private)} sharers; expected a list with one entry for each of "
                f"{expected}.",
                "c2c",
            )

    # -- prefill -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def prefill(self, jobs: Sequence[Job]) -> list[tuple[list[Job], PrefilledPrompt]]:
        """Prefill the prompts of jobs with equal keys, all together.

        Where that fails because of one of them, or a remote sharer does not take so many, each is prefilled by itself;
        what fails then fails alone.

        Returns:
            Batches of jobs, each with the prompts of its jobs in order.
        """
        jobs = [job for job in jobs if not job.handle.cancelled]
        requests = [job.request for job in jobs if isinstance(job.request, GenerateRequest)]
        if not requests:
            return []
        prompts, render = [request.prompt for request in requests], requests[0].render
        try:
            prompt = self.systems[requests[0].system].prefill(prompts, _context(requests), options=render)
        except C2CError as error:
            if len(jobs) > 1 and _concerns_one(error):
                return [batch for job in jobs for batch in self.prefill([job])]
            for job in jobs:
                fail(job, error)
            return []
        lost = prompt.report.lost if prompt.report else None
        if lost is not None:
            if len(jobs) > 1 and lost.about_request:
                return [batch for job in jobs for batch in self.prefill([job])]
            _log_lost(lost)
        return [(jobs, prompt)]

    # -- handoffs ------------------------------------------------------------------------------------------------------

    def check_handoff(self, request: HandoffRequest) -> Sharer:
        """Return the sharer that a handoff is requested of.

        Raises:
            ApiError: there is none that hands anything over, or it can't do this.
        """
        private = self.model.private
        if not private:
            raise invalid(
                "this fuser is for prompts that both models read, so there is nothing to hand over. Serve a 'memory' "
                "fuser.",
                "messages",
            )
        if request.sharer is not None and request.sharer not in private:
            raise invalid(
                f"sharer is {request.sharer}; expected one of {private}, which hand over private context.", "sharer"
            )
        sharer = self.model.sharers[self._index(request)]
        if request.precision is not None and not sharer.generates:
            raise invalid("the sharer is on another machine, and its entries are kept as they come.", "precision")
        for name, given in (("before", request.before is not None), ("among", request.among is not False)):
            if given and not self._keeps_tokens(request):
                raise invalid(
                    f"{name} is for a 'copy' fuser, which lays documents where the receiver would read them; with this "
                    "one they are read by themselves. Leave it out.",
                    name,
                )
        if request.among is not False and request.draft_tokens:
            raise invalid("among is for a document without a draft; leave draft_tokens out.", "among")
        return sharer

    @torch.no_grad()
    def create_handoff(self, job: Job) -> None:
        """Let a sharer prefill messages, and report the handoff."""
        request = job.request
        if not isinstance(request, HandoffRequest):
            raise TypeError("expected a HandoffRequest")
        with failing(job):
            index = self._index(request)
            sharer = self.model.sharers[index].for_fuser(self.model.fusers[index])
            before = request.before
            if before is None and self._keeps_tokens(request) and not request.draft_tokens:
                before = []  # read where a prompt without a system message has it
            with collect_notes() as notes:
                handoff: Any = sharer.read(
                    request.messages, before=before, among=request.among, draft_tokens=request.draft_tokens
                )
            if request.precision is not None:
                handoff = handoff.to(request.precision)
            job.handle.push(_created(handoff, sharer.name, index, notes))

    def restore_handoff(self, handoff: Any, index: int) -> HandoffCreated:
        """Take up a handoff that was made before a restart; see :class:`~c2c.serving.engine.Engine`."""
        if index not in self.model.private:
            raise SystemUnavailableError(f"sharer {index} hands nothing over here; {self.model.private} do.")
        sharer = self.model.sharers[index]
        identity.check([("sharer", handoff.sharer, sharer.identity)], allow_mismatch=False, what="handoff")
        return _created(handoff, sharer.name, index)

    def _keeps_tokens(self, request: HandoffRequest) -> bool:
        return bool(self.model.fusers[self._index(request)].keeps_tokens)

    def _index(self, request: HandoffRequest) -> int:
        return self.model.private[0] if request.sharer is None else request.sharer


@contextmanager
def failing(job: Job) -> Iterator[None]:
    """End a request with the error of the enclosed work; others of its batch go on."""
    try:
        yield
    except C2CError as error:
        fail(job, error)
    except Exception as error:
        log_failure("request_failed", error)
        job.handle.fail(internal())


def _created(handoff: Any, sharer: str, index: int, notes: Sequence[str] = ()) -> HandoffCreated:
    size = getattr(handoff, "held_bytes", handoff.nbytes)
    return HandoffCreated(handoff, size, len(handoff.ids), sharer, index, handoff.precision, tuple(notes))


def _is_read(part: Any) -> bool:
    """Return whether private context is one handoff or several, and no text."""
    return isinstance(part, Handoff) or (isinstance(part, list) and isinstance(part[0], Handoff))


def fail(job: Job, error: C2CError) -> None:
    """End a request with an error of the library, which its client is shown."""
    _log_lost(error)
    job.handle.fail(error, _prompt_param(job.request))


def _context(requests: Sequence[GenerateRequest]) -> Any:
    """Return the private context of requests as systems take it: per sharer one list, a tuple of several."""
    if requests[0].private is None:
        return None
    columns = [list(column) for column in zip(*(request.private or () for request in requests), strict=True)]
    return tuple(columns) if len(columns) > 1 else columns[0]


def _prompt_param(request: Request) -> str:
    """Return the field of the HTTP request that holds the prompt, for errors."""
    return "prompt" if isinstance(request, GenerateRequest) and not request.render.chat_template else "messages"


def _concerns_one(error: C2CError) -> bool:
    """Return whether an error may be that of one prompt of a batch, so that the others can be answered."""
    return not isinstance(error, SharerChanged) and (not isinstance(error, RemoteError) or error.about_request)


def _log_lost(error: C2CError) -> None:
    if isinstance(error, RemoteError):
        warn("sharer_lost", code=error.code, status=error.status)
    elif isinstance(error, SharerChanged):
        warn("sharer_lost", code="mismatch")
