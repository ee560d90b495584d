"""The ways of a server whose models lie in vLLM engines; prompts are read one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from c2c.integrations.vllm.hosted import Hosted, row_of
from c2c.language_model import LanguageModel
from c2c.model import C2CModel
from c2c.serving.batch import ends_of
from c2c.serving.engine import Way
from c2c.serving.queue import Job
from c2c.serving.reading import read_alone
from c2c.serving.sampling import Sampling
from c2c.serving.ways import Ways
from c2c.serving.writer import Writer
from c2c.serving.written import Written

Complete = Callable[[Hosted, list[int], Writer], None]


class HostedWays(Ways):
    """All ways to answer with one model.

    Args:
        model: its receiver in an engine; its sharers in one, or not.
        message_tokens: tokens of the sharer's text at most, for text-to-text.
        complete: lets a model in an engine write a whole answer.
    """

    def __init__(self, model: C2CModel, message_tokens: int, complete: Complete) -> None:
        super().__init__(model, message_tokens)
        if isinstance(self._speaker, Hosted):
            self._known[Way.TEXT] = HostedWritten(model.receiver, self._speaker, message_tokens, complete).read

    @property
    def speaker(self) -> LanguageModel:
        """The sharer that answers and writes."""
        return self._speaker


class HostedWritten(Written):
    """What a sharer in an engine has written to the receiver."""

    def __init__(self, receiver: LanguageModel, sharer: Hosted, tokens: int, complete: Complete) -> None:
        super().__init__(receiver, sharer, tokens)
        self._writing, self._complete = sharer, complete

    def _messages(self, jobs: Sequence[Job]) -> dict[Job, str]:
        messages: dict[Job, str] = {}
        for job in jobs:
            batch = read_alone(self._writing, [job], self._request, new_tokens=1, prefix=False)
            if batch is None:
                continue
            sampling: Any = Sampling(max_tokens=self._within(batch.prompted[0].room), temperature=0)
            words: Any = self._writing.tokenizer
            writer = Writer(words, sampling, ends=ends_of(self._writing), gone=job.ticket.gone)
            self._complete(self._writing, row_of(batch.prefilled.tokens), writer)
            if not job.ticket.cancelled:
                messages[job] = writer.text
        return messages
