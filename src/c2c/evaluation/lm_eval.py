"""A pair of models as a model of the lm-evaluation-harness, so that any of its tasks runs on it.

The harness asks with strings: a context, and a continuation to score or stop strings to generate up to. All systems
here cut, truncate and score as the harness's own ``hf`` model does, so that their numbers can stand beside each other
and beside published ones. The fused ones differ in the cache of the context, and in nothing else.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import Cache

from c2c import kv_cache
from c2c.alignment import Prompt
from c2c.alignment.base import derange, fit, merge
from c2c.errors import PromptError
from c2c.integrations import IntegrationError, MissingExtraError
from c2c.language_model import LanguageModel
from c2c.messages import Conversation
from c2c.model import C2CModel
from c2c.prefill import continued_logits
from c2c.prompting import RenderOptions, render_text, require_tokenizer
from c2c.tokens import TokenBatch, left_pad
from c2c.utils import install_command

try:
    from lm_eval.api.model import LM
    from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text, resolve_max_length
    from lm_eval.models.utils_hf import stop_sequences_criteria
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ModuleNotFoundError as error:
    raise MissingExtraError(
        f"the lm-evaluation-harness is not installed ({error}). Install it: {install_command('lm-eval')}."
    ) from error

System = Literal["receiver", "sharer", "matched", "deranged"]
SYSTEMS: tuple[str, ...] = get_args(System)

DEFAULT_GEN_TOKENS = 256  # the harness's own default
_CHAT = '{"c2c_chat": '

Likelihood = tuple[float, bool]
Tokens = tuple[int, ...]
_T = TypeVar("_T")


@dataclass(frozen=True)
class Chat:
    """What :meth:`C2CLM.apply_chat_template` hands through the harness as a string: every model renders it itself.

    Attributes:
        messages: the conversation.
        answer_prefix: what the answer continues (``gen_prefix`` of a task).
    """

    messages: Conversation
    answer_prefix: str = ""

    def dump(self) -> str:
        """As JSON, which the harness passes on and logs."""
        return json.dumps({"c2c_chat": self.messages, "answer_prefix": self.answer_prefix}, ensure_ascii=False)

    @classmethod
    def load(cls, text: str) -> Chat | None:
        """The conversation in a context, or None if it is raw text."""
        if not text.startswith(_CHAT):
            return None
        data = json.loads(text)
        return cls(data["c2c_chat"], data["answer_prefix"])


@dataclass(frozen=True)
class Context:
    """What is read before something is scored or generated. Requests with equal ones share a prefill.

    Attributes:
        text: a :class:`Chat`, or raw text; empty where there is no prompt.
        ids: the tokens of the model that answers, before truncation.
        cut: how many of them are dropped on the left.
        document: task and document that it belongs to; another one's cache is never taken from the same.
    """

    text: str
    ids: Tokens
    cut: int = 0
    document: tuple[Any, Any] = field(default=(None, None), compare=False)

    @property
    def tokens(self) -> Tokens:
        """The tokens that are read."""
        return self.ids[self.cut :]


class C2CLM(LM):  # type: ignore[misc]
    """A pair of models for ``lm_eval.simple_evaluate(model=C2CLM(model, "matched"), tasks=[...])``.

    Example:
        >>> import lm_eval
        >>> lm = C2CLM(C2CModel.from_pretrained("FUSER"), system="matched", batch_size=8)
        >>> lm_eval.simple_evaluate(model=lm, tasks=["arc_easy"], limit=100, apply_chat_template=True)

    Args:
        model: the pair.
        system: who answers: ``receiver`` or ``sharer`` (the first one) alone, the fused receiver (``matched``), or the
            receiver fused with what the sharer read of another document (``deranged``).
        batch_size: contexts to prefill at a time, and continuations to score at a time.
        max_length: shorter contexts than the models were made for.
        enable_thinking: passed to chat templates that know it.

    Attributes:
        counts: what was done to contexts on the way, by reason: truncated, nothing to fuse, system message dropped.

    Raises:
        IntegrationError: unknown system, or a batch size that is no positive number.
        PromptError: a model without a tokenizer.
    """

    def __init__(
        self,
        model: C2CModel,
        system: System = "matched",
        *,
        batch_size: int = 1,
        max_length: int | None = None,
        enable_thinking: bool = False,
    ) -> None:
        super().__init__()
        if system not in SYSTEMS:
            raise IntegrationError(f"unknown system {system!r}. Known: {', '.join(SYSTEMS)}.")
        if not isinstance(batch_size, int) or batch_size < 1:
            raise IntegrationError(f"batch_size is {batch_size!r}; expected a positive integer ('auto' is not there).")
        self.model, self.system, self.batch_size = model, system, batch_size
        self.fused = system in ("matched", "deranged")
        self.scorer: LanguageModel = model.sharers[0] if system == "sharer" else model.receiver
        self.readers: list[LanguageModel] = [model.receiver, *model.sharers] if self.fused else [self.scorer]
        for reader in self.readers:
            require_tokenizer(reader.tokenizer, reader.role)
        self.counts: Counter[str] = Counter()
        self._limit, self._thinking = max_length, enable_thinking
        self._device = self.scorer.device

    # -- what the harness asks about the model -------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the model that answers."""
        return self.scorer.tokenizer

    @property
    def max_length(self) -> int:
        """Tokens that the model that answers can read."""
        return self._length(self.scorer)

    @property
    def eot_token_id(self) -> int | None:
        """The end token of the model that answers."""
        token: int | None = self.tokenizer.eos_token_id
        return token

    @property
    def tokenizer_name(self) -> str:
        """Names all tokenizers and templates that a request goes through; the harness keys its request cache by it."""
        return "__".join(reader.tokenizer.name_or_path.replace("/", "__") for reader in self.readers)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The templates of all models that read, one after the other; None where none is asked for."""
        if chat_template is False or chat_template is None:
            return None
        return "\n\n".join(f"{reader.role}: {reader.tokenizer.chat_template}" for reader in self.readers)

    def apply_chat_template(self, chat_history: Conversation, add_generation_prompt: bool = True) -> str:
        """The conversation as JSON, not as any model's text: receiver and sharer have templates of their own.

        An assistant message at the end without ``add_generation_prompt`` is the beginning of the answer. As with the
        harness's ``hf`` model, system messages are dropped where a template refuses them (for all models, then).

        Raises:
            PromptError: a template refuses the conversation.
        """
        messages, prefix = list(chat_history), ""
        if not add_generation_prompt and messages and messages[-1]["role"] == "assistant":
            prefix = messages.pop()["content"]
        chat = Chat(messages, prefix)
        try:
            self._try(chat)
        except PromptError:
            chat = Chat([message for message in messages if message["role"] != "system"], prefix)
            if chat.messages == messages:
                raise
            self._try(chat)
            self.counts["system messages dropped"] += 1
        return chat.dump()

    def get_model_info(self) -> dict[str, Any]:
        """Who the models are, for the results."""
        return {
            "model_name": self.scorer.name,
            "system": self.system,
            "receiver": self.model.receiver.identity.to_dict(),
            "sharers": [sharer.identity.to_dict() for sharer in self.model.sharers],
            "fuser_trained": self.model.trained,
        }

    # -- requests ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[Likelihood]:
        """Log-likelihood of each continuation given its context, and whether greedy decoding would give it.

        A context is prefilled and fused once for all its continuations.

        Raises:
            PromptError: an empty continuation, or one longer than the model.
        """
        pairs = [self._pair(request.args[0], request.args[1], _document(request)) for request in requests]
        answers = self._score(pairs, disable_tqdm)
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, answer)
        return answers

    @torch.no_grad()
    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows; for a model alone.

        Raises:
            IntegrationError: for a fused system: a text that is scored from its first token on has no prompt to fuse.
        """
        if self.fused:
            raise IntegrationError(
                f"system {self.system!r} can't score whole texts (loglikelihood_rolling, as in wikitext): there is no "
                "prompt whose cache could be fused. Use system 'receiver' or 'sharer'."
            )
        windows = [self._windows(request.args[0]) for request in requests]
        answers = iter(self._score([window for text in windows for window in text], disable_tqdm))
        sums = [sum(next(answers)[0] for _ in text) for text in windows]
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    @torch.no_grad()
    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What follows each context, up to a stop string, the end token or ``max_gen_toks``.

        Sampling arguments go to the model's own ``generate``.

        Raises:
            PromptError: ``max_gen_toks`` leaves no room for a context.
        """
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(index)
        texts: dict[int, str] = {}
        with tqdm(total=len(requests), disable=disable_tqdm, desc="generate_until") as bar:
            for indices in groups.values():
                arguments = normalize_gen_kwargs(requests[indices[0]].args[1], DEFAULT_GEN_TOKENS)
                contexts = {
                    index: self._prompt_context(
                        requests[index].args[0], arguments["max_gen_toks"], _document(requests[index])
                    )
                    for index in indices
                }
                for part, batch in self._batches(contexts):
                    texts |= zip(part, self._generate(batch, arguments), strict=True)
                    bar.update(len(part))
        for index, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, texts[index])
        return [texts[index] for index in range(len(requests))]

    # -- strings to tokens, as the harness's hf model does ------------------------------------------------------------

    def _pair(self, context: str, continuation: str, document: tuple[Any, Any]) -> tuple[Context, Tokens]:
        """Tokens of a context and its continuation, to which trailing whitespace of the context is moved."""
        chat = Chat.load(context)
        text = context if chat is None else self._render(self.scorer, chat)
        stripped = text.rstrip()
        if not stripped:
            continued = self._encode(text + continuation, special=False)
            start = self._prefix == continued[0] if continued else False
            ids, continued = (continued[:1], continued[1:]) if start else ([self._prefix], continued)
            shown = ""
        else:
            ids = self._encode(stripped, chat is None)
            continued = self._encode(text + continuation, chat is None)[len(ids) :]
            shown = stripped if chat is None else context
        if not 0 < len(continued) <= self.max_length:
            raise PromptError(
                f"the continuation {continuation!r} has {len(continued)} tokens for the {self.scorer.role} "
                f"{self.scorer.name}; expected 1 to {self.max_length}."
            )
        cut = max(0, len(ids) + len(continued) - self.max_length - 1)
        return Context(shown, tuple(ids), cut, document), tuple(continued)

    def _prompt_context(self, text: str, new_tokens: int, document: tuple[Any, Any]) -> Context:
        """The context of a generation, with room for the new tokens."""
        chat = Chat.load(text)
        room = self.max_length - new_tokens
        if room < 1:
            raise PromptError(
                f"max_gen_toks is {new_tokens}, and the {self.scorer.role} {self.scorer.name} was made for "
                f"{self.max_length} tokens, prompt included. Lower it: --gen-kwargs max_gen_toks=...."
            )
        ids = self._encode(text if chat is None else self._render(self.scorer, chat), chat is None)
        if not ids:
            return Context("", (self._prefix,), 0, document)
        return Context(text, tuple(ids), max(0, len(ids) - room), document)

    def _windows(self, text: str) -> list[tuple[Context, Tokens]]:
        ids = self._encode(text, special=True)
        windows = get_rolling_token_windows(ids, self._prefix, self.max_length, context_len=1)
        disjoint = [make_disjoint_window(window) for window in windows]
        return [(Context("", tuple(context)), tuple(continued)) for context, continued in disjoint]

    def _encode(self, text: str, special: bool) -> list[int]:
        tokenizer = self.tokenizer
        ids: list[int] = tokenizer.encode(text, add_special_tokens=special and not _opens(tokenizer, text))
        return ids

    @cached_property
    def _prefix(self) -> int:
        """What stands before a text without a context."""
        token = _opening(self.tokenizer)
        if token is None:
            raise PromptError(
                f"a request has no context, and the tokenizer of the {self.scorer.role} {self.scorer.name} has neither "
                "a bos nor an eos token to put before it."
            )
        return token

    def _render(self, reader: LanguageModel, chat: Chat) -> str:
        return render_text(reader.tokenizer, chat.messages, self._options(chat))

    def _try(self, chat: Chat) -> None:
        for reader in self.readers:
            self._render(reader, chat)

    def _options(self, chat: Chat) -> RenderOptions:
        return RenderOptions(answer_prefix=chat.answer_prefix, enable_thinking=self._thinking)

    def _length(self, reader: LanguageModel) -> int:
        own = int(resolve_max_length(reader.model.config, reader.tokenizer))
        return own if self._limit is None else min(own, self._limit)

    # -- prefilling ----------------------------------------------------------------------------------------------------

    def _batches(self, contexts: dict[_T, Context]) -> Iterator[tuple[list[_T], list[tuple[Context, Context | None]]]]:
        """Contexts with the one whose message each gets, longest first; those with nothing to fuse apart."""
        messages = self._messages(contexts.values())
        order = sorted(contexts, key=lambda key: -len(contexts[key].tokens))
        for fused in (True, False):
            keys = [key for key in order if (messages[contexts[key]] is not None) == fused]
            for part in _chunks(keys, self.batch_size):
                yield part, [(contexts[key], messages[contexts[key]]) for key in part]

    def _messages(self, contexts: Any) -> dict[Context, Context | None]:
        """For each context the one whose sharer caches it is fused with; None where it is read alone."""
        fusable = list(dict.fromkeys(c for c in contexts if self.fused and c.text and len(c.tokens) > 1))
        messages: dict[Context, Context | None] = dict.fromkeys(contexts)
        messages |= _derangement(fusable) if self.system == "deranged" else dict(zip(fusable, fusable, strict=True))
        self.counts["contexts"] += len(messages)
        self.counts["contexts truncated"] += sum(context.cut > 0 for context in messages)
        if self.fused:
            self.counts["contexts with nothing to fuse"] += len(messages) - len(fusable)
        return messages

    def _prefill(self, batch: Sequence[tuple[Context, Context | None]]) -> tuple[TokenBatch, Cache]:
        """Tokens of the contexts and the cache of all but the last, fused or not."""
        prompts = [self._fused_prompt(context, message) for context, message in batch if message is not None]
        if not prompts:
            tokens = left_pad([context.tokens for context, _ in batch], 0).to(self.scorer.device)
            self.scorer.check_prompt(tokens)
            return tokens, self.scorer.prefill(tokens, tokens.length - 1)
        fused = self.model.fuse_prompts(merge(prompts))
        return fused.tokens, self.scorer.prefill(fused.tokens, fused.tokens.length - 1, fused.cache)

    def _fused_prompt(self, context: Context, message: Context) -> Prompt:
        prompt = self._aligned(context)
        return prompt if message == context else derange(prompt, self._aligned(message))

    def _aligned(self, context: Context) -> Prompt:
        """The context for all models, cut to their lengths."""
        chat = Chat.load(context.text)
        tokenizers = [reader.tokenizer for reader in self.readers]
        if chat is None:
            tokenizers = [_RawText(tokenizer) for tokenizer in tokenizers]
            chat = Chat([{"role": "user", "content": context.text}])
        ours, *theirs = tokenizers
        prompt = self.model.aligner.align(ours, theirs, [chat.messages], self._options(chat))[0]
        limits = [self._length(sharer) for sharer in self.model.sharers]
        too_long = any(s.length > limit for s, limit in zip(prompt.sharers, limits, strict=True))
        self.counts["sharer contexts truncated"] += too_long
        return fit(prompt, context.ids, context.cut, limits)

    # -- scoring and generating ----------------------------------------------------------------------------------------

    def _score(self, pairs: Sequence[tuple[Context, Tokens]], quiet: bool) -> list[Likelihood]:
        groups: dict[Context, set[Tokens]] = {}
        for context, continuation in pairs:
            groups.setdefault(context, set()).add(continuation)
        answers: dict[tuple[Context, Tokens], Likelihood] = {}
        with tqdm(total=sum(map(len, groups.values())), disable=quiet, desc="loglikelihood") as bar:
            for contexts, batch in self._batches({context: context for context in groups}):
                tokens, cache = self._prefill(batch)
                asked = [(row, text) for row, context in enumerate(contexts) for text in sorted(groups[context])]
                found = self._likelihoods(tokens, cache, asked)
                answers |= {(contexts[row], text): answer for (row, text), answer in found.items()}
                bar.update(len(asked))
        return [answers[pair] for pair in pairs]

    def _likelihoods(
        self, tokens: TokenBatch, cache: Cache, asked: Sequence[tuple[int, Tokens]]
    ) -> dict[tuple[int, Tokens], Likelihood]:
        """Score continuations of rows of a prefilled batch, each on a copy of its row.

        Continuations that differ in their last token alone (letters) are one forward pass.
        """
        targets: dict[tuple[int, Tokens], list[Tokens]] = {}
        for row, text in asked:
            targets.setdefault((row, text[:-1]), []).append(text)
        found: dict[tuple[int, Tokens], Likelihood] = {}
        for part in _chunks(sorted(targets, key=lambda item: len(item[1])), self.batch_size):
            predictions = self._continue(tokens, cache, part)
            for (row, read), rows in zip(part, predictions, strict=True):
                found |= {(row, text): _likelihood(rows, text) for text in targets[row, read]}
        return found

    def _continue(self, tokens: TokenBatch, cache: Cache, part: Sequence[tuple[int, Tokens]]) -> Tensor:
        """Log-probabilities after the last context token and after each one read on, ``[part, read + 1, vocab]``."""
        rows = torch.tensor([row for row, _ in part])
        chosen = tokens.select(rows.tolist())
        width = max(len(read) for _, read in part)
        padded = torch.tensor([[*read, *[0] * (width - len(read))] for _, read in part], dtype=torch.long)
        real = torch.tensor([[True] * len(read) + [False] * (width - len(read)) for _, read in part], dtype=torch.bool)
        device = chosen.ids.device
        logits = continued_logits(
            self.scorer.model, chosen, padded.to(device), real.to(device), kv_cache.select_rows(cache, rows)
        )
        return torch.log_softmax(logits.float(), dim=-1)

    def _generate(self, batch: Sequence[tuple[Context, Context | None]], arguments: dict[str, Any]) -> list[str]:
        """Texts that follow the contexts of a batch."""
        kwargs = dict(arguments)
        stops = [*kwargs.pop("until")]
        new_tokens = kwargs.pop("max_gen_toks")
        if self.eot_token_id is not None:
            stops.append(self.tokenizer.decode(self.eot_token_id))
        if not kwargs.get("do_sample"):
            kwargs.pop("temperature", None)
        tokens, cache = self._prefill(batch)
        if self.tokenizer.pad_token_id is not None:
            kwargs["pad_token_id"] = self.tokenizer.pad_token_id
        ids = self.scorer.generate(
            tokens,
            cache,
            max_new_tokens=new_tokens,
            stopping_criteria=stop_sequences_criteria(self.tokenizer, stops, tokens.length, tokens.rows),
            **kwargs,
        )
        return [str(postprocess_generated_text(self._text(row), stops, None)) for row in ids.tolist()]

    def _text(self, ids: list[int]) -> str:
        """New tokens as text, up to the end token: a row goes on until all rows of its batch have stopped."""
        end = ids.index(self.eot_token_id) if self.eot_token_id in ids else len(ids)
        return str(self.tokenizer.decode(ids[:end], skip_special_tokens=True))


class _RawText:
    """A tokenizer whose chat template shows a message as it stands, with the special tokens that texts get.

    An aligner takes it for any other, so that raw text is aligned as a message is.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.chat_template = "the message as it stands"

    def apply_chat_template(self, conversation: Conversation, **kwargs: Any) -> str:
        return "".join(message["content"] for message in conversation)

    def __call__(self, text: str, **kwargs: Any) -> Any:
        return self._tokenizer(text, **kwargs | {"add_special_tokens": not _opens(self._tokenizer, text)})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def _opening(tokenizer: Any) -> int | None:
    token: int | None = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return token


def _opens(tokenizer: Any, text: str) -> bool:
    """Whether a text brings the token that texts begin with."""
    token = _opening(tokenizer)
    return token is not None and text.startswith(tokenizer.decode(token))


def _document(request: Any) -> tuple[Any, Any]:
    """Task and document of a request; a request that names none is a document of its own."""
    number = getattr(request, "doc_id", None)
    return (getattr(request, "task_name", None), request.args[0] if number is None else number)


def _derangement(contexts: Sequence[Context]) -> dict[Context, Context]:
    """Each context with the next one of another document, of the same task where there is one.

    Raises:
        IntegrationError: all contexts belong to one document.
    """
    tasks: dict[Any, list[Context]] = {}
    for context in contexts:
        tasks.setdefault(context.document[0], []).append(context)
    chosen: dict[Context, Context] = {}
    for own in tasks.values():
        for index, context in enumerate(own):
            following = (own[(index + step) % len(own)] for step in range(1, len(own)))
            others = (c for c in chain(following, contexts) if c.document != context.document)
            other = next((c for c in others if c.text != context.text), None)
            if other is None:
                raise IntegrationError(
                    "system 'deranged' needs the prompts of at least two documents, and only one was asked about: "
                    "raise the limit."
                )
            chosen[context] = other
    return chosen


def _likelihood(predictions: Tensor, continuation: Tokens) -> Likelihood:
    """Of one continuation, from log-probabilities ``[tokens, vocab]``."""
    rows = predictions[: len(continuation)]
    wanted = torch.tensor(continuation, device=rows.device)
    total = float(rows.gather(1, wanted.unsqueeze(1)).sum())
    return total, bool((rows.argmax(-1) == wanted).all())


def _chunks(items: Sequence[_T], size: int) -> Iterator[list[_T]]:
    for start in range(0, len(items), size):
        yield list(items[start : start + size])
