"""Engine that runs models with ``transformers`` in this process: one thread, one batch at a time."""

from __future__ import annotations

import secrets
import time
from collections import Counter
from collections.abc import Sequence
from threading import Thread
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from c2c import kv_cache
from c2c.errors import C2CError
from c2c.generation import PrefilledPrompt
from c2c.model import C2CModel
from c2c.probe import rows_alone
from c2c.serving.config import ServeConfig
from c2c.serving.engine import HandoffRequest, Request, RequestHandle, SamplingParams
from c2c.serving.errors import internal
from c2c.serving.logs import log_failure
from c2c.serving.model_engine import ModelEngine, fail, failing
from c2c.serving.outputs import AnswerOutput, RequestOutput, Scored
from c2c.serving.scheduler import Job, Scheduler
from c2c.systems import System
from c2c.tokens import concatenate


class TransformersEngine(ModelEngine):
    """Answer with a :class:`~c2c.model.C2CModel`; an :class:`~c2c.serving.engine.Engine`.

    Requests of the same system that arrive within the window are prefilled and decoded as one batch, each row with
    sampling parameters of its own. A batch runs until its last answer is done; what arrives meanwhile waits.

    Args:
        model: receiver, sharers and fusers, all with tokenizers.
        config: limits, and the systems that answer.
        connection: takes the place of the system ``c2c``: the best method that the models have.
    """

    def __init__(self, model: C2CModel, config: ServeConfig, connection: System | None = None) -> None:
        super().__init__(model, config, connection)
        window = config.batch_window_ms / 1000
        self._scheduler = Scheduler(config.max_queue, config.max_batch, config.kv_tokens, window)
        self._thread = Thread(target=self._work, name="c2c-engine", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether the worker thread runs."""
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._scheduler)

    def start(self) -> None:
        """Start the worker thread."""
        self._thread.start()

    async def submit(self, request: Request) -> RequestHandle:
        """Accept a request; see :meth:`c2c.serving.engine.Engine.submit`."""
        job = await self.accept(request)
        job.handle.on_cancel(lambda: self._scheduler.remove(job))
        self._scheduler.put(job)
        return job.handle

    def close(self) -> None:
        """Finish what was accepted, and stop."""
        self._scheduler.close()
        if self._thread.is_alive():
            self._thread.join()

    # -- the worker thread ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _work(self) -> None:
        while self._run_next():  # a loop here would hold the last batch, handoffs included, while it waits for another
            pass

    def _run_next(self) -> bool:
        """Wait for a batch and answer it; return False if there will be none."""
        jobs = self._scheduler.take()
        began = time.monotonic()
        try:
            if jobs:
                self._run(jobs)
        except C2CError as error:
            for job in jobs:
                fail(job, error)
        except Exception as error:
            log_failure("batch_failed", error)
            for job in jobs:
                job.handle.fail(internal())
        self._scheduler.last_batch = time.monotonic() - began
        return bool(jobs)

    def _run(self, jobs: list[Job]) -> None:
        request, rows = jobs[0].request, sum(job.rows for job in jobs)
        if isinstance(request, HandoffRequest):
            self.create_handoff(jobs[0])
            return
        parts = [(prompt, self._outputs(part, prompt, rows)) for part, prompt in self.prefill(jobs)]
        answers = [answer for _, outputs in parts for output in outputs if output for answer in output.answers]
        if answers:
            self.on_batch(request.system, len(answers))
            decode(_join([repeat_rows(prompt, outputs) for prompt, outputs in parts if any(outputs)]), answers)

    def _outputs(self, jobs: Sequence[Job], prompt: PrefilledPrompt, rows: int) -> list[RequestOutput | None]:
        """Return the outputs of the jobs; None for one without room for its answer, which fails."""
        outputs: list[RequestOutput | None] = [None] * len(jobs)
        for row, job in enumerate(jobs):
            with failing(job):
                outputs[row] = RequestOutput(job, prompt, row, rows, self.config.max_tokens)
        return outputs


def decode(prompt: PrefilledPrompt, answers: Sequence[AnswerOutput]) -> None:
    """Decode until every answer is done, by the model's own ``generate``; the cache is used up.

    A row whose answer is done stays in the batch, unread, until the last one is done.

    Args:
        prompt: one row per answer.
        answers: take the tokens of their rows.
    """
    if prompt.model.separates(prompt.tokens, max(answer.limit for answer in answers)):
        for (tokens, cache), answer in zip(rows_alone(prompt.tokens, prompt.cache), answers, strict=True):
            decode(PrefilledPrompt(prompt.model, tokens, cache or prompt.model.empty_cache()), [answer])
        return
    rows = [(answer, Sampler(answer.params, answer.index)) for answer in answers]
    prompt.model.generate(
        prompt.tokens,
        prompt.cache,
        max_new_tokens=max(answer.limit for answer in answers),
        do_sample=False,
        num_beams=1,
        num_return_sequences=1,
        logits_processor=LogitsProcessorList([_SampleRows(rows)]),
        stopping_criteria=StoppingCriteriaList([_AppendTokens(rows)]),
        fused=True,
    )


class Sampler:
    """Choose the tokens of one answer, with parameters and a random number generator of its own.

    Requests with different temperatures, seeds and penalties run in one batch; a sampled answer is the same whatever
    it shares a batch with.

    Args:
        params: the parameters.
        index: which answer of its request it is.
    """

    def __init__(self, params: SamplingParams, index: int = 0) -> None:
        self.params = params
        self._seed = (secrets.randbits(63) if params.seed is None else params.seed + index) % 2**63
        self._generator: torch.Generator | None = None
        self._counts: Counter[int] = Counter()
        self._logprobs: Tensor | None = None
        # plain greedy decoding does, and no log-probability is reported
        self.passive = params.greedy and params.logprobs is None and not params.penalised

    def choose(self, scores: Tensor) -> Tensor:
        """Return scores, ``[vocab]``, whose largest is the chosen token."""
        if self.params.logprobs is not None:
            self._logprobs = torch.log_softmax(scores.float(), dim=-1)
        scores = self._penalise(scores)
        return scores if self.params.greedy else self._sample(scores)

    def record(self, token: int) -> Scored | None:
        """Record the token that was taken; return its log-probability if that is requested."""
        if self.params.penalised:
            self._counts[token] += 1
        if self._logprobs is None or self.params.logprobs is None:
            return None
        best = torch.topk(self._logprobs, min(self.params.logprobs, self._logprobs.numel()))
        return Scored(float(self._logprobs[token]), list(zip(best.indices.tolist(), best.values.tolist(), strict=True)))

    def _penalise(self, scores: Tensor) -> Tensor:
        if not self._counts:
            return scores
        tokens = torch.tensor(list(self._counts), device=scores.device)
        counts = torch.tensor(list(self._counts.values()), device=scores.device, dtype=scores.dtype)
        return scores.index_add(0, tokens, -(self.params.presence_penalty + self.params.frequency_penalty * counts))

    def _sample(self, scores: Tensor) -> Tensor:
        probabilities = torch.softmax(scores.float() / self.params.temperature, dim=-1)
        if self.params.top_p < 1:
            ordered, order = probabilities.sort(descending=True)
            before = ordered.cumsum(-1) - ordered
            probabilities = torch.zeros_like(probabilities).scatter(0, order, ordered * (before < self.params.top_p))
        if self._generator is None:
            self._generator = torch.Generator(scores.device).manual_seed(self._seed)
        token = torch.multinomial(probabilities, 1, generator=self._generator)
        return torch.full_like(scores, -torch.inf).scatter(0, token, 0.0)


class _SampleRows(LogitsProcessor):
    """Let every row's sampler choose its next token; ``generate`` then takes the largest score."""

    def __init__(self, rows: Sequence[tuple[AnswerOutput, Sampler]]) -> None:
        self._active = [(row, *pair) for row, pair in enumerate(rows) if not pair[1].passive]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone() if self._active else scores
        for row, answer, sampler in self._active:
            if not answer.done:
                scores[row] = sampler.choose(scores[row])
        return scores


class _AppendTokens(StoppingCriteria):
    """Append every row's token to its answer, and end the rows that are done."""

    def __init__(self, rows: Sequence[tuple[AnswerOutput, Sampler]]) -> None:
        self._rows = rows

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        for (answer, sampler), token in zip(self._rows, input_ids[:, -1].tolist(), strict=True):
            if not answer.done:
                answer.append(token, sampler.record(token))
        return torch.tensor([answer.done for answer, _ in self._rows], device=input_ids.device)


def _join(prompts: Sequence[PrefilledPrompt]) -> PrefilledPrompt:
    """Join prompts that were prefilled apart to one batch."""
    if len(prompts) == 1:
        return prompts[0]
    model = prompts[0].model
    # stacking needs all of them up to one token before their end
    caches = [model.prefill(prompt.tokens, prompt.tokens.length - 1, prompt.cache) for prompt in prompts]
    return PrefilledPrompt(model, concatenate([prompt.tokens for prompt in prompts]), kv_cache.stack(caches))


def repeat_rows(prompt: PrefilledPrompt, outputs: Sequence[RequestOutput | None]) -> PrefilledPrompt:
    """Repeat each row once for each answer of its request; drop those without any."""
    rows = [row for row, output in enumerate(outputs) if output for _ in output.answers]
    if rows == list(range(len(outputs))):
        return prompt
    cache = kv_cache.select_rows(prompt.cache, torch.tensor(rows)) if prompt.cache.layers else prompt.cache
    return PrefilledPrompt(prompt.model, prompt.tokens.select(rows), cache)
