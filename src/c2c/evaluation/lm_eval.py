"""A pair of models as a model of the lm-evaluation-harness, so that any of its tasks runs on it.

:class:`C2CLM` is the harness's own ``hf`` model (``HFLM``), which cuts, truncates, scores and generates; a model alone
is left to it. The fused receiver differs in the KV cache of the context, and in nothing else.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from tqdm import tqdm

from c2c import kv_cache
from c2c.alignment import Prompt
from c2c.alignment.base import derange, truncate
from c2c.errors import PromptError
from c2c.evaluation.answers import score_tokens
from c2c.generation import PrefilledPrompt
from c2c.integrations import IntegrationError, MissingExtraError
from c2c.language_model import LanguageModel
from c2c.messages import Conversation
from c2c.model import C2CModel
from c2c.prompting import RenderOptions, render_text, require_tokenizer
from c2c.tokens import left_pad
from c2c.utils import install_command

try:
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils import Collator, normalize_gen_kwargs, resolve_max_length
except ModuleNotFoundError as error:
    raise MissingExtraError(
        f"the lm-evaluation-harness is not installed ({error}). Install it: {install_command('lm-eval')}."
    ) from error

System = Literal["receiver", "sharer", "matched", "deranged"]
SYSTEMS: tuple[str, ...] = get_args(System)
Likelihood = tuple[float, bool]
Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Chat:
    """A conversation and the beginning of its answer, as a string that the harness passes on to all models.

    Attributes:
        raw: the only message is the whole prompt, which no template renders.
    """

    messages: Conversation
    answer_prefix: str = ""
    raw: bool = False

    def dump(self) -> str:
        """Return JSON, which the harness also logs."""
        return json.dumps({"c2c_chat": self.messages, "answer_prefix": self.answer_prefix}, ensure_ascii=False)

    @classmethod
    def load(cls, text: str) -> Chat:
        """Read a context."""
        if text.startswith('{"c2c_chat": '):
            return cls(*json.loads(text).values())
        return cls([{"role": "user", "content": text}], raw=True)


class Context(NamedTuple):
    """A prompt of one request: its text, the answering model's tokens, and how many are cut off on the left."""

    text: str
    ids: Tokens
    cut: int = 0

    @property
    def tokens(self) -> Tokens:
        """The tokens that are read."""
        return self.ids[self.cut :]


class C2CLM(HFLM):  # type: ignore[misc]
    """A pair of models for ``lm_eval.simple_evaluate(model=C2CLM(model, "matched"), tasks=[...])``.

    Example:
        >>> import lm_eval
        >>> lm = C2CLM(C2CModel.from_pretrained("FUSER"), system="matched", batch_size=8)
        >>> lm_eval.simple_evaluate(model=lm, tasks=["arc_easy"], limit=100, apply_chat_template=True)

    Args:
        pair: the models with their fuser.
        system: ``receiver`` or ``sharer`` (the first one) alone, the fused receiver (``matched``), or the receiver
            fused with what the sharer read of another document (``deranged``).
        batch_size: contexts to prefill at a time, and continuations to score at a time.
        max_length: shorter contexts than the models were made for.
        enable_thinking: passed to chat templates that have such a switch.

    Attributes:
        counts: contexts, and how many were truncated, had nothing to fuse, or lost their system message.

    Raises:
        IntegrationError: unknown system, or a batch size that is no positive number.
        PromptError: a model without a tokenizer.
    """

    def __init__(
        self,
        pair: C2CModel,
        system: System = "matched",
        *,
        batch_size: int = 1,
        max_length: int | None = None,
        enable_thinking: bool = False,
    ) -> None:
        if system not in SYSTEMS:
            raise IntegrationError(f"unknown system {system!r}. Known: {', '.join(SYSTEMS)}.")
        if not isinstance(batch_size, int) or batch_size < 1:
            raise IntegrationError(f"batch_size is {batch_size!r}; expected a positive integer ('auto' is not there).")
        self.pair, self.system = pair, system
        self.fused = system in ("matched", "deranged")
        self.language_model: LanguageModel = pair.sharers[0] if system == "sharer" else pair.receiver
        self.readers = [pair.receiver, *pair.sharers] if self.fused else [self.language_model]
        for reader in self.readers:
            require_tokenizer(reader.tokenizer, reader.role)
        self.counts: Counter[str] = Counter()
        self._others: dict[str, str] = {}  # per text of a call, whose sharer cache it gets
        self._batch: list[Context] = []  # the prompts of the generation under way
        self._thinking = enable_thinking
        tokenizer = copy.deepcopy(self.language_model.tokenizer)  # the harness gives it a pad token
        super().__init__(self.language_model.model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length)

    @property
    def tokenizer_name(self) -> str:
        """Names of all tokenizers that read a request; the harness keys its request cache by it."""
        return "__".join(reader.tokenizer.name_or_path.replace("/", "__") for reader in self.readers)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the templates of all models that read, one after the other; None where none is asked for."""
        if chat_template is False or chat_template is None:
            return None
        return "\n\n".join(f"{reader.role}: {reader.tokenizer.chat_template}" for reader in self.readers)

    def apply_chat_template(self, chat_history: Conversation, add_generation_prompt: bool = True) -> str:
        """Return the conversation as JSON, since receiver and sharer have templates of their own.

        An assistant message at the end without ``add_generation_prompt`` is the beginning of the answer. As with the
        harness's ``hf`` model, system messages are dropped where a template refuses them (for all models, then).

        Raises:
            PromptError: a template refuses the conversation.
        """
        messages, prefix = list(chat_history), ""
        if not add_generation_prompt and messages and messages[-1]["role"] == "assistant":
            prefix = messages.pop()["content"]
        without = [message for message in messages if message["role"] != "system"]
        for kept in (messages, without):
            chat = Chat(kept, prefix)
            try:
                for reader in self.readers:
                    render_text(reader.tokenizer, kept, self._options(chat))
            except PromptError:
                if kept == without:
                    raise
            else:
                break
        self.counts["system messages dropped"] += kept != messages
        return chat.dump()

    def get_model_info(self) -> dict[str, Any]:
        """Return the identities of the models, for the results."""
        return {
            "model_name": self.language_model.name,
            "system": self.system,
            "receiver": self.pair.receiver.identity.to_dict(),
            "sharers": [sharer.identity.to_dict() for sharer in self.pair.sharers],
            "fuser_trained": self.pair.trained,
        }

    @torch.no_grad()
    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Likelihood]:
        """Score continuations: log-likelihood, and whether greedy decoding would give them.

        Raises:
            PromptError: an empty continuation, or one longer than the model.
        """
        self._others = _derangement(requests) if self.system == "deranged" else {}
        scores: list[Likelihood] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return scores

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Score whole texts, in windows; for a model alone.

        Raises:
            IntegrationError: for a fused system: a text that is scored from its first token on has no prompt to fuse.
        """
        if self.fused:
            raise IntegrationError(
                f"system {self.system!r} can't score whole texts (loglikelihood_rolling, as in wikitext): there is no "
                "prompt whose cache could be fused. Use system 'receiver' or 'sharer'."
            )
        scores: list[float] = super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
        return scores

    @torch.no_grad()
    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Generate what follows each context, up to a stop string, the end token or ``max_gen_toks``.

        Raises:
            PromptError: ``max_gen_toks`` leaves no room for a context.
        """
        self._others = _derangement(requests) if self.system == "deranged" else {}
        longest = max((normalize_gen_kwargs(r.args[1], self.max_gen_toks)["max_gen_toks"] for r in requests), default=0)
        if longest >= self.max_length:
            raise PromptError(
                f"max_gen_toks is {longest}, and the {self.language_model.role} {self.language_model.name} was made "
                f"for {self.max_length} tokens, prompt included. Lower it: --gen-kwargs max_gen_toks=...."
            )
        texts: list[str] = super().generate_until(requests, disable_tqdm=disable_tqdm)
        return texts

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Encode a context and its continuation, to which trailing whitespace of the context is moved."""
        text, special = self._render(context)
        stripped = text.rstrip()
        if not stripped:  # the harness's own model refuses a context of spaces where texts begin with no token
            return [self.prefix_token_id], self.tok_encode(text + continuation, add_special_tokens=False)
        ids = self.tok_encode(stripped, add_special_tokens=special)
        return ids, self.tok_encode(text + continuation, add_special_tokens=special)[len(ids) :]

    def tok_batch_encode(
        self, strings: Sequence[str], padding_side: str = "left", left_truncate_len: int | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Encode contexts for generation: ids and mask, ``[batch, tokens]``, left-padded."""
        limit = left_truncate_len or self.max_length
        rows = [tuple(self._encode(text)) for text in strings]
        self._batch = [Context(text, ids, max(0, len(ids) - limit)) for text, ids in zip(strings, rows, strict=True)]
        self._count(self._batch)
        batch = left_pad([ids[-limit:] for ids in rows], self.tokenizer.pad_token_id or 0)
        return batch.ids, batch.mask.long()

    def tok_decode(self, tokens: Any, skip_special_tokens: bool = True) -> str:
        """Decode tokens up to the end token: a row goes on until all rows of its batch have stopped."""
        if skip_special_tokens and self.eot_token_id in tokens:
            tokens = tokens[: tokens.index(self.eot_token_id)]
        return str(super().tok_decode(tokens, skip_special_tokens))

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **kwargs: Any) -> Tensor:
        """Generate from the contexts of :meth:`tok_batch_encode`; returns ids ``[batch, context + new]``."""
        if not self.fused:
            whole: Tensor = super()._model_generate(context, max_length, stop, **kwargs)
            return whole
        prompt = self._fuse(self._batch)
        tokens, width = prompt.tokens, context.shape[1]
        kwargs |= {"attention_mask": tokens.mask.long(), "past_key_values": prompt.cache}
        kwargs |= {} if tokens.natural else {"position_ids": tokens.positions}
        whole = super()._model_generate(tokens.ids, max_length - width + tokens.length, stop, **kwargs)
        return torch.cat([context, whole[:, tokens.length :]], dim=1)

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Likelihood]:
        """Score continuations, given as ((context, continuation), context ids, continuation ids)."""
        pairs = [self._context(*request) for request in requests]
        self._count({context for context, _ in pairs})
        alone = {
            pair: request
            for pair, request in zip(pairs, requests, strict=True)
            if not self.fused or len(pair[0].tokens) < 2
        }
        answers = super()._loglikelihood_tokens([*alone.values()], disable_tqdm, override_bs)
        scores = self._score_fused([pair for pair in pairs if pair not in alone], disable_tqdm)
        for pair, (strings, _, _) in zip(pairs, requests, strict=True):
            if pair in scores:
                self.cache_hook.add_partial("loglikelihood", strings, scores[pair])
        scores |= zip(alone, answers, strict=True)
        return [scores[pair] for pair in pairs]

    def _context(
        self, strings: tuple[str, str] | None, ids: list[int], continuation: list[int]
    ) -> tuple[Context, Tokens]:
        """Return the context of a scoring request, cut as the harness does, and its continuation."""
        if not 0 < len(continuation) <= self.max_length:
            raise PromptError(
                f"a continuation has {len(continuation)} tokens for the {self.language_model.role} "
                f"{self.language_model.name}; expected 1 to {self.max_length}."
            )
        text = strings[0] if strings and strings[0].strip() else ""
        cut = max(0, len(ids) + len(continuation) - self.max_length - 1)
        return Context(text, tuple(ids), cut), tuple(continuation)

    def _score_fused(
        self, pairs: Sequence[tuple[Context, Tokens]], quiet: bool
    ) -> dict[tuple[Context, Tokens], Likelihood]:
        """Score continuations, each on a copy of its context's cache; those of one context share its prefill."""
        groups: dict[Context, list[Tokens]] = {}
        for context, continuation in dict.fromkeys(pairs):
            groups.setdefault(context, []).append(continuation)
        scores: dict[tuple[Context, Tokens], Likelihood] = {}
        order = sorted(groups, key=lambda context: -len(context.tokens))
        with tqdm(total=len(groups), disable=quiet, desc="loglikelihood of fused contexts") as bar:
            for part in Collator.get_chunks(order, n=self.batch_size):
                prompt = self._fuse(part)
                found = [(row, text) for row, context in enumerate(part) for text in groups[context]]
                for some in Collator.get_chunks(sorted(found, key=lambda item: len(item[1])), n=self.batch_size):
                    rows, texts = zip(*some, strict=True)
                    cache = kv_cache.select_rows(prompt.cache, torch.tensor(rows))
                    copies = PrefilledPrompt(prompt.model, prompt.tokens.select(rows), cache)
                    likelihoods, greedy = (column.tolist() for column in score_tokens(copies, texts))
                    keys = [(part[row], text) for row, text in some]
                    scores |= zip(keys, zip(likelihoods, greedy, strict=True), strict=True)
                bar.update(len(part))
        return scores

    def _fuse(self, contexts: Sequence[Context]) -> PrefilledPrompt:
        """Prefill and fuse contexts, up to the last token.

        Raises:
            PromptError: a context of a single token, which leaves nothing to fuse.
        """
        if any(len(context.tokens) < 2 for context in contexts):
            raise PromptError(f"system {self.system!r} can't answer an empty prompt: there is nothing to fuse.")
        prompts = []
        for context in contexts:
            prompt, other = self._align(context), self._others.get(context.text, context.text)
            if other != context.text:
                prompt = derange(prompt, self._align(Context(other, tuple(self._encode(other)))))
            prompts.append(prompt)
        fused = self.pair.fuse_prompts(prompts)
        fused.cache = self.pair.receiver.prefill(fused.tokens, fused.tokens.length - 1, fused.cache)
        return fused

    def _align(self, context: Context) -> Prompt:
        """Align a context for all models, cut to their lengths."""
        chat = Chat.load(context.text)
        (prompt,) = self.pair.align([chat.messages], self._options(chat))
        lengths = (resolve_max_length(one.model.config, one.tokenizer) for one in self.pair.sharers)
        limits = [min(length, self._max_length or length) for length in lengths]
        too_long = any(theirs.length > limit for theirs, limit in zip(prompt.sharers, limits, strict=True))
        self.counts["sharer contexts truncated"] += too_long
        return truncate(prompt, context.ids, context.cut, limits)

    def _encode(self, context: str) -> list[int]:
        """Encode a context for the model that answers; an empty one as the token that texts begin with."""
        ids: list[int] = self.tok_encode(*self._render(context))
        return ids or [self.prefix_token_id]

    def _render(self, context: str) -> tuple[str, bool | None]:
        """Return the text that the answering model reads, and whether its tokenizer adds special tokens."""
        chat = Chat.load(context)
        text = render_text(self.tokenizer, chat.messages, self._options(chat))
        return text, None if chat.raw else False  # None: as the harness decides

    def _options(self, chat: Chat) -> RenderOptions:
        prefix, thinking = chat.answer_prefix, self._thinking
        return RenderOptions(chat_template=not chat.raw, answer_prefix=prefix, enable_thinking=thinking)

    def _count(self, contexts: Collection[Context]) -> None:
        self.counts["contexts"] += len(contexts)
        self.counts["contexts truncated"] += sum(context.cut > 0 for context in contexts)
        if self.fused:
            self.counts["contexts with nothing to fuse"] += sum(len(c.tokens) < 2 for c in contexts)


def _derangement(requests: Sequence[Any]) -> dict[str, str]:
    """Return for each context the next one of another document, of the same task where there is one.

    Raises:
        IntegrationError: all contexts belong to one document.
    """
    documents: dict[str, tuple[Any, Any]] = {}  # task and number; a request without a number is one of its own
    for request in requests:
        text, number = request.args[0], getattr(request, "doc_id", None)
        if text.strip():
            documents.setdefault(text, (getattr(request, "task_name", None), text if number is None else number))
    if len(set(documents.values())) < 2:
        raise IntegrationError("system 'deranged' needs the prompts of at least two documents: raise the limit.")
    texts, chosen = list(documents), {}
    for index, text in enumerate(texts):
        following = [*texts[index + 1 :], *texts[:index]]
        others = [other for other in following if documents[other] != documents[text]]
        same_task = (other for other in others if documents[other][0] == documents[text][0])
        chosen[text] = next(same_task, others[0])
    return chosen
