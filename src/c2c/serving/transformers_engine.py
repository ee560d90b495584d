"""Engine that runs models with ``transformers`` in this process: one thread, one batch at a time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from threading import Thread
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from c2c import kv_cache
from c2c.batch_probe import rows_alone
from c2c.generation import PrefilledPrompt
from c2c.model import C2CModel
from c2c.serving.engine import GenerateRequest, HandoffRequest, Request, RequestHandle
from c2c.serving.errors import internal
from c2c.serving.logs import log_failure
from c2c.serving.model_engine import ModelEngine, failing
from c2c.serving.outputs import AnswerOutput, RequestOutput
from c2c.serving.scheduler import Job, Scheduler
from c2c.serving.serve_config import ServeConfig
from c2c.tokens import concatenate


class TransformersEngine(ModelEngine):
    """Answer with a :class:`~c2c.model.C2CModel`; an :class:`~c2c.serving.engine.Engine`.

    Requests of the same system that arrive within the window are prefilled and decoded as one batch, each row with
    sampling parameters of its own. A batch runs until its last answer is done; what arrives meanwhile waits.

    Args:
        model: receiver, sharers and fusers, all with tokenizers.
        config: limits, and the systems that answer.
    """

    def __init__(self, model: C2CModel, config: ServeConfig) -> None:
        super().__init__(model, config)
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
        except Exception as error:
            log_failure("batch_failed", error)
            for job in jobs:
                job.handle.fail(internal())
        self._scheduler.last_batch = time.monotonic() - began
        return bool(jobs)

    def _run(self, jobs: list[Job]) -> None:
        if isinstance(jobs[0].request, HandoffRequest):
            self.create_handoff(jobs[0])
            return
        batches, rows = self.prefill(jobs), sum(job.rows for job in jobs)
        parts = [(prompt, self._outputs(part, prompt, rows)) for part, prompt in batches]
        answers = [answer for _, outputs in parts for output in outputs if output for answer in output.answers]
        if answers and isinstance(jobs[0].request, GenerateRequest):
            self.on_batch(jobs[0].request.system, len(answers))
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
        for (tokens, cache, _), answer in zip(rows_alone(prompt.tokens, prompt.cache), answers, strict=True):
            decode(PrefilledPrompt(prompt.model, tokens, cache or kv_cache.empty_cache()), [answer])
        return
    prompt.model.generate(
        prompt.tokens,
        prompt.cache,
        max_new_tokens=max(answer.limit for answer in answers),
        do_sample=False,
        num_beams=1,
        num_return_sequences=1,
        logits_processor=LogitsProcessorList([_SampleRows(answers)]),
        stopping_criteria=StoppingCriteriaList([_AppendTokens(answers)]),
        fused=True,
    )


class _SampleRows(LogitsProcessor):
    """Let every row's sampler choose its next token; ``generate`` then takes the largest score."""

    def __init__(self, answers: Sequence[AnswerOutput]) -> None:
        self._active = [(row, answer) for row, answer in enumerate(answers) if not answer.sampler.passive]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone() if self._active else scores
        for row, answer in self._active:
            if not answer.done:
                scores[row] = answer.sampler.choose(scores[row])
        return scores


class _AppendTokens(StoppingCriteria):
    """Append every row's token to its answer, and end the rows that are done."""

    def __init__(self, answers: Sequence[AnswerOutput]) -> None:
        self._answers = answers

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        for answer, token in zip(self._answers, input_ids[:, -1].tolist(), strict=True):
            answer.append(token)
        return torch.tensor([answer.done for answer in self._answers], device=input_ids.device)


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
