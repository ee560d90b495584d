"""The pair of models under evaluation: loading, other fusers, prefill stores, and which items both can read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from c2c.data.formats import Row
from c2c.data.prompts import choice_tokens, response_tokens
from c2c.errors import PromptError
from c2c.evaluation.config import EvalConfig, EvaluationError
from c2c.evaluation.prefills import EvaluationPrefills, StoredSharer
from c2c.fusers import Fuser
from c2c.fusers.base import load_fuser
from c2c.handoff import sharer_prompt
from c2c.language_model import Sharer
from c2c.model import C2CModel
from c2c.private_context import first_user_column
from c2c.prompting import RenderOptions


class Pair:
    """One receiver with one sharer, whose prefills all systems share.

    Args:
        config: the fuser, which names the models, and the stores.

    Raises:
        EvaluationError: the fuser has several sharers, or one on another machine.
    """

    def __init__(self, config: EvalConfig) -> None:
        self.config = config
        self.model = C2CModel.from_pretrained(
            config.fuser,
            receiver=config.receiver,
            sharer=config.sharer,
            dtype=config.dtype,
            sharer_dtype=config.sharer_dtype,
            device_map=config.device_map,
        )
        sharers = self.model.sharers
        if len(sharers) != 1 or not sharers[0].generates:
            raise EvaluationError(
                f"{config.fuser} has {len(sharers)} sharers; one that is loaded here is evaluated at a time: give one "
                "of its fusers."
            )
        self.receiver, self.sharer = self.model.receiver, StoredSharer.of(sharers[0], config)
        self.model.sharers = [self.sharer]
        self._prefills = EvaluationPrefills(self.receiver, config)
        self._sharers = [self.sharer]

    @contextmanager
    def stores(self, *, prefills: bool, texts: bool) -> Iterator[None]:
        """Take prefills and generated texts from the stores inside the block; outside, all is computed."""
        self.receiver.stored = self._prefills if prefills else None
        for sharer in self._sharers:
            sharer.use_stores(prefills=prefills, texts=texts)
        try:
            yield
        finally:
            self.receiver.stored = None
            for sharer in self._sharers:
                sharer.use_stores(prefills=False, texts=False)

    def with_fuser(self, folder: str) -> C2CModel:
        """Return the same receiver with another fuser, whose sharer may be the receiver itself or another model.

        Raises:
            EvaluationError: the fuser does not name its sharer.
        """
        fuser = load_fuser(folder, dtype=torch.float32)
        model = C2CModel(self.receiver, [self._sharer_of(fuser, folder)], [fuser])
        model.fusers.to(self.receiver.device).eval()
        return model

    def unreadable(self, row: Row) -> str | None:
        """Return why these models can't read an item, None where they can."""
        try:
            lengths = self._lengths(row)
            response_tokens(self.receiver.tokenizer, row)
            choice_tokens(self.receiver.tokenizer, row.lead, row.choices)
        except PromptError as error:
            return type(error).__name__
        limits = [limit for limit in (self.receiver.context_length, self.sharer.context_length) if limit]
        return "prompt too long" if max(lengths) > min(limits, default=max(lengths)) else None

    def _lengths(self, row: Row) -> tuple[int, int]:
        """Return the tokens of both models' prompts."""
        options = RenderOptions(answer_prefix=row.answer_prefix)
        if not self.model.private:
            (prompt,) = self.model.align([row.messages], options)
            return prompt.receiver.length, prompt.sharers[0].length
        first_user_column(self.receiver.tokenizer, row.messages, options)  # where the entries will stand
        read = sharer_prompt(self.sharer.tokenizer, row.sharer_messages or [], options)
        return self.receiver.encode([row.messages], options).length, len(read.ids)

    def _sharer_of(self, fuser: Fuser, folder: str) -> StoredSharer:
        recorded = fuser.config.identity("sharer")
        if recorded is None:
            raise EvaluationError(f"{folder} does not record which sharer it was made for.")
        for sharer in self._sharers:
            if recorded.same_weights(sharer.identity):
                return sharer
        receiver, config = self.receiver, self.config
        if recorded.same_weights(receiver.identity):
            model = Sharer(receiver.model, receiver.tokenizer, receiver.name)
        else:
            dtype = config.sharer_dtype or config.dtype
            model = Sharer.from_pretrained(recorded.name, dtype=dtype, device_map=config.device_map)
        self._sharers.append(StoredSharer.of(model, config))
        return self._sharers[-1]
