"""Arguments of ``generate``: checked, and given the meaning on a prefilled cache that they have on an ordinary prompt.

``transformers`` merges keywords, a ``GenerationConfig`` and the checkpoint's ``generation_config.json``. All three are
merged here first, so that it makes no difference where an option was set.
"""

from __future__ import annotations

import copy
import inspect
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
)
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.streamers import BaseStreamer

from c2c.errors import C2CError, ContextLengthError, PromptError, did_you_mean
from c2c.tokens import OrdinaryPrompt, TokenBatch, as_list

DEFAULT_NEW_TOKENS = 256

# What the prompt and its cache already say.
_PROMPT = {
    "inputs",
    "input_ids",
    "inputs_embeds",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "cache_params",
    "cache_position",
    "token_type_ids",
    "decoder_input_ids",
    "decoder_attention_mask",
    "encoder_outputs",
    "labels",
    "pixel_values",
    "input_features",
}

# Options whose answer can't be had from a prefilled cache, with the reason.
_REFUSED = {
    "token_healing": "it takes back the end of the prompt, which is fused already. Heal the text before the call",
    "penalty_alpha": "contrastive search runs code from the hub that reads the prompt itself",
    "dola_layers": "DoLa runs code from the hub that reads the prompt itself",
    "num_beam_groups": "group beam search runs code from the hub that reads the prompt itself. Use num_beams alone",
    "constraints": "constrained beam search runs code from the hub that reads the prompt itself",
    "force_words_ids": "constrained beam search runs code from the hub that reads the prompt itself",
    "assistant_ensemble_weight": "it mixes the assistant's distribution into the model's, and the assistant reads no "
    "fused cache",
}

_OPTIONS = {name for name in vars(GenerationConfig()) if not name.startswith("_")} - {"transformers_version"}

_ASSISTED = "assisted decoding would read the prompt a second time, so the model decodes without it: the same tokens"
_CACHE = "the cache is made by the prefill: the same tokens"
_OUTPUT = "a result holds text and ids. Pass a logits_processor to see scores"

# Options that change the speed or what is returned, and no token: left out, with the reason.
_IGNORED = {
    "use_cache": _CACHE,
    "cache_implementation": _CACHE,
    "cache_config": _CACHE,
    "max_cache_len": _CACHE,
    "prefill_chunk_size": _CACHE,
    "prompt_lookup_num_tokens": _ASSISTED,
    "assistant_early_exit": _ASSISTED,
    "use_mtp": _ASSISTED,
    "speculation_type": _ASSISTED,
    "is_assistant": _ASSISTED,
    "return_dict_in_generate": _OUTPUT,
    "output_scores": _OUTPUT,
    "output_logits": _OUTPUT,
    "output_attentions": _OUTPUT,
    "output_hidden_states": _OUTPUT,
}
_IGNORED_ARGUMENTS = {"assistant_model": _ASSISTED, "assistant_tokenizer": _ASSISTED}

# Options that read the ids of the prompt, and what they become for one row.
_READ_PROMPT: dict[str, Callable[..., LogitsProcessor]] = {
    "encoder_repetition_penalty": EncoderRepetitionPenaltyLogitsProcessor,
    "repetition_penalty": lambda penalty, _: RepetitionPenaltyLogitsProcessor(penalty),
    "no_repeat_ngram_size": lambda size, _: NoRepeatNGramLogitsProcessor(size),
    "encoder_no_repeat_ngram_size": EncoderNoRepeatNGramLogitsProcessor,
}

_COUNTS = ("max_new_tokens", "max_length", "num_beams", "num_return_sequences")
_NUMBERS: dict[str, tuple[str, Callable[[float], bool]]] = {
    "max_time": ("a number of seconds from 0", lambda x: 0 <= x < math.inf),
    "repetition_penalty": ("a number above 0; 1 is no penalty", lambda x: 0 < x < math.inf),
    "encoder_repetition_penalty": ("a number above 0; 1 is no penalty", lambda x: 0 < x < math.inf),
    "length_penalty": ("a number", math.isfinite),
    "guidance_scale": ("a number", math.isfinite),
}
_SAMPLING: dict[str, tuple[str, Callable[[float], bool]]] = {
    "temperature": ("a number above 0; for greedy decoding pass do_sample=False", lambda x: 0 < x < math.inf),
    "top_p": ("a number from 0 to 1; 1 keeps all tokens", lambda x: 0 <= x <= 1),
    "min_p": ("a number from 0 to 1", lambda x: 0 <= x <= 1),
    "top_h": ("a number above 0, at most 1", lambda x: 0 < x <= 1),
    "typical_p": ("a number above 0, at most 1; 1 keeps all tokens", lambda x: 0 < x <= 1),
    "epsilon_cutoff": ("a number from 0, below 1; 0 is off", lambda x: 0 <= x < 1),
    "eta_cutoff": ("a number from 0, below 1; 0 is off", lambda x: 0 <= x < 1),
}
_COLDEST = 1e-30  # below it scores divided by the temperature overflow in float32; what is sampled is the same


@dataclass
class Decoding:
    """Hold the arguments of one call of ``generate``.

    Attributes:
        config: all options merged.
        arguments: the other arguments, such as processors and streamers.
        notes: options without effect, for the report.
        room: new tokens that the model has positions for, where the caller asked for more; else None.
    """

    config: GenerationConfig
    arguments: dict[str, Any]
    notes: list[str]
    room: int | None = None

    @property
    def copies(self) -> int:
        """Rows that ``generate`` makes of each row of the prompt."""
        return max(int(self.config.num_beams or 1), int(self.config.num_return_sequences or 1))

    @property
    def beams(self) -> bool:
        """Whether beams are searched."""
        return int(self.config.num_beams or 1) > 1

    @property
    def ends(self) -> list[int]:
        """Tokens that end a row."""
        return as_list(self.config.eos_token_id)

    def add_criteria(self, criterion: Callable[..., Any]) -> None:
        """Add a stopping criterion."""
        given = as_callables(self.arguments.get("stopping_criteria"))
        self.arguments["stopping_criteria"] = [*given, criterion]

    def for_row(self, kwargs: dict[str, Any], index: int) -> dict[str, Any]:
        """Return the caller's arguments for one row by itself."""
        allowed = kwargs.get("prefix_allowed_tokens_fn")
        if allowed is None:
            return kwargs
        return kwargs | {"prefix_allowed_tokens_fn": lambda _, ids: allowed(index, ids)}

    def run(self, model: Any, **prompt: Any) -> Tensor:
        """Run the model's own ``generate``; return its ids, the prompt included.

        Raises:
            PromptError: it refuses its arguments.
        """
        held = model.generation_config  # what is equal to it need not be said, and would be warned about
        options = {name: value for name, value in vars(self.config).items() if name in _OPTIONS}
        options = {name: value for name, value in options.items() if getattr(held, name, None) != value}
        if self.config.do_sample:
            options["top_k"] = self.config.top_k  # None too, which would be filled in
        generate: Callable[..., Any] = model.generate
        try:
            out = generate(**prompt, **self.arguments, **options)
        except C2CError:  # from a function of the caller
            raise
        except (ValueError, TypeError, NotImplementedError) as error:
            raise _refusal(error, self.arguments) from error
        except RuntimeError as error:
            if "probability tensor" not in str(error):
                raise
            raise PromptError(
                "no token is left to sample from: the options and processors suppress all of them. Give them room."
            ) from error
        return out if isinstance(out, Tensor) else out.sequences


def prepare(model: PreTrainedModel, batch: TokenBatch, kwargs: dict[str, Any], limit: int | None = None) -> Decoding:
    """Merge and check the arguments of ``generate``.

    Args:
        model: the model that decodes.
        batch: the whole prompt, on the model's device.
        kwargs: as the caller gave them.
        limit: positions that the model has; None where there is no bound.

    Raises:
        PromptError: an argument that is wrong, or means nothing on a prefilled cache.
        ContextLengthError: the prompt leaves no position for an answer.
    """
    config, arguments, asked = _merge(model, kwargs)
    notes = _leave_out(config, arguments, asked)
    _check_numbers(config)
    _check_mode(config, arguments)
    decoding = Decoding(config, arguments, notes)
    _set_lengths(decoding, batch, asked, limit)
    _set_padding(config, model)
    arguments["logits_processor"] = LogitsProcessorList(as_callables(arguments.get("logits_processor")))
    if batch.has_slots or (
        batch.padded and any(_is_on(config, name) for name in _READ_PROMPT)
    ):  # only then are tokens brought to the host
        prompt = OrdinaryPrompt(batch, int(config.pad_token_id))
        _read_own_rows(decoding, prompt)
        if batch.has_slots:
            _hide_slots(decoding, prompt)
    return decoding


class _OwnRows(LogitsProcessor):
    """Run a processor of ``transformers`` on each row's own tokens: padding is none of them, entries neither."""

    def __init__(self, prompt: OrdinaryPrompt, make: Callable[[Any], LogitsProcessor]) -> None:
        self._prompt, self._rows = prompt, [make(row.unsqueeze(0)) for row in prompt.rows]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores, ``[batch * copies, vocab]``."""
        copies = input_ids.shape[0] // len(self._rows)
        rows = (
            self._rows[index // copies](self._prompt.row(index // copies, ids).unsqueeze(0), scores[index : index + 1])
            for index, ids in enumerate(input_ids)
        )
        return torch.cat(list(rows))


class _OrdinaryStreamer(BaseStreamer):
    """Hand the prompt on without entries of private context; it is what ``generate`` puts first."""

    def __init__(self, streamer: BaseStreamer, prompt: OrdinaryPrompt) -> None:
        self._streamer, self._prompt = streamer, prompt
        self._first = True

    def put(self, value: Tensor) -> None:
        """Receive the prompt, then new tokens."""
        value, self._first = self._prompt.ids.cpu() if self._first else value, False
        self._streamer.put(value)

    def end(self) -> None:
        """Receive the end."""
        self._streamer.end()


def _merge(model: PreTrainedModel, kwargs: dict[str, Any]) -> tuple[GenerationConfig, dict[str, Any], set[str]]:
    """Merge keywords, the caller's config and the checkpoint's; return also what the caller set."""
    given = kwargs.get("generation_config")
    if isinstance(given, dict):
        options = dict(given)
        given = _checked(lambda: GenerationConfig(**options), options)
    if not (given is None or isinstance(given, GenerationConfig)):
        raise PromptError(f"generation_config is a {type(given).__name__}; expected a GenerationConfig or a dict.")
    config = copy.deepcopy(given) if given is not None else GenerationConfig()
    keywords = {
        name: _integer(name, value, 1) if name in _COUNTS else value
        for name, value in kwargs.items()
        if name != "generation_config" and not (name in _PROMPT and value is None)
    }
    asked = {name for name, value in config.to_dict().items() if value is not None}
    asked |= {name for name, value in keywords.items() if value is not None}
    if own := sorted(_PROMPT & asked):
        raise PromptError(
            f"{', '.join(own)}: the prompt and its cache are made from the messages, so generate takes none of its own."
            " Pass messages, or token ids to generate_ids."
        )
    held = model.generation_config.to_dict()

    def update() -> dict[str, Any]:
        config.update(watermarking_config=config.watermarking_config)  # which makes an object of a dict
        config.update(**held, defaults_only=True, allow_custom_entries=True)
        config.update(top_k=50, defaults_only=True)  # as generate has it; a keyword None switches it off
        rest: dict[str, Any] = config.update(**keywords)
        return rest

    return config, _checked(update, keywords), asked


def _leave_out(config: GenerationConfig, arguments: dict[str, Any], asked: set[str]) -> list[str]:
    """Leave out what has no effect on the tokens; return a note for each that the caller asked for."""
    if config.cache_implementation == "quantized":
        raise PromptError(
            "cache_implementation='quantized' changes the answer, and the prefilled cache is not quantised. Leave it "
            "out (cache_implementation=None)."
        )
    usual: dict[str, tuple[Any, ...]] = {"use_cache": (None, True), "cache_implementation": (None, "dynamic")}
    notes = []
    for name, reason in _IGNORED.items():
        value = getattr(config, name, None)
        if name in asked and value not in usual.get(name, (None, False)):
            notes.append(f"{name}={value!r} has no effect: {reason}")
        setattr(config, name, None)
    config.use_cache = True
    for name, reason in _IGNORED_ARGUMENTS.items():
        if arguments.pop(name, None) is not None:
            notes.append(f"{name} has no effect: {reason}")
    return notes


def _check_numbers(config: GenerationConfig) -> None:
    """Check every number, where it takes effect.

    Raises:
        PromptError: not a number, not finite, or out of its range.
    """
    for name in _COUNTS:
        setattr(config, name, _integer(name, getattr(config, name), 1))
    ranges = _NUMBERS | (_SAMPLING if config.do_sample else {})
    for name, (expected, fits) in ranges.items():
        value = getattr(config, name, None)
        if value is None:
            continue
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not fits(number):
            raise PromptError(f"{name} is {value!r}; expected {expected}.")
        setattr(config, name, number)
    if config.do_sample:
        config.top_k = _integer("top_k", config.top_k, 0)
        if config.temperature is not None:
            config.temperature = max(config.temperature, _COLDEST)


def _integer(name: str, value: Any, low: int) -> int | None:
    """Return an integer option, None where it is not set.

    Raises:
        PromptError: no integer, or below ``low``.
    """
    if value is None:
        return None
    whole = int(value) if isinstance(value, float) and value.is_integer() else value  # as JSON has it
    try:
        number = low - 1 if isinstance(value, bool) else operator.index(whole)
    except TypeError:
        number = low - 1
    if number < low:
        raise PromptError(f"{name} is {value!r}; expected an integer from {low}.")
    return number


def _check_mode(config: GenerationConfig, arguments: dict[str, Any]) -> None:
    """Refuse what can't be decoded from a prefilled cache.

    Raises:
        PromptError: names the option and the reason.
    """
    modes = {
        "penalty_alpha": GenerationMode.CONTRASTIVE_SEARCH,
        "dola_layers": GenerationMode.DOLA_GENERATION,
        "num_beam_groups": GenerationMode.GROUP_BEAM_SEARCH,
    }
    mode = config.get_generation_mode()
    for name, reason in _REFUSED.items():
        if getattr(config, name, None) in (None, False) or modes.get(name, mode) != mode:
            continue
        raise PromptError(f"{name} can't be used on a prefilled cache: {reason}.")
    if isinstance(arguments.get("custom_generate"), str):
        raise PromptError(
            "custom_generate names code on the hub, which may read the prompt itself instead of the prefilled cache. "
            "Pass a function that decodes from past_key_values."
        )
    if config.exponential_decay_length_penalty is not None and not as_list(config.eos_token_id):
        raise PromptError(
            "exponential_decay_length_penalty raises the end token, and there is none: pass eos_token_id."
        )
    if arguments.get("streamer") is not None and int(config.num_beams or 1) > 1:
        raise PromptError("a streamer can't follow several beams: num_beams must be 1.")
    stops = config.stop_strings
    stops = [stops] if isinstance(stops, str) else list(stops or [])
    if not all(isinstance(stop, str) and stop for stop in stops):
        raise PromptError(f"stop_strings is {config.stop_strings!r}; expected texts that are not empty.")
    config.stop_strings = stops or None


def _set_lengths(decoding: Decoding, batch: TokenBatch, asked: set[str], limit: int | None) -> None:
    """Turn bounds of the whole length to bounds of the new tokens, since entries of private context are no tokens."""
    config = decoding.config
    whole = config.max_new_tokens is None and "max_length" in asked
    # counted where a bound needs it: the mask may lie on a device, which is then waited for
    tokens = int((batch.mask & ~batch.slots).sum(-1).max()) if whole or config.min_length else 0
    if whole:
        config.max_new_tokens = int(config.max_length or 0) - tokens
        if config.max_new_tokens < 1:
            raise PromptError(
                f"max_length is {config.max_length} and the prompt has {tokens} tokens: nothing is left for an answer. "
                "Pass max_new_tokens."
            )
    if config.min_new_tokens is None and config.min_length:
        config.min_new_tokens = max(config.min_length - tokens, 0)
    config.max_length = config.min_length = None
    wanted = config.max_new_tokens or DEFAULT_NEW_TOKENS
    room = None if limit is None else limit - batch.length
    if room is not None and room < 1:
        raise ContextLengthError(
            f"the prompt has {batch.length} tokens and the model can go on up to {limit}: nothing is left for an "
            "answer. Shorten the prompt."
        )
    if room is not None and room < wanted:
        decoding.room = room if config.max_new_tokens is not None else None
        wanted = room
    config.max_new_tokens = wanted


def _set_padding(config: GenerationConfig, model: Any) -> None:
    """Choose what fills finished rows; it is fed to the model, so it must be one of its tokens."""
    words = model.get_input_embeddings().num_embeddings
    ends = as_list(config.eos_token_id)
    config.eos_token_id = ends or None
    candidates = [*as_list(config.pad_token_id), *ends]
    config.pad_token_id = next((token for token in candidates if 0 <= token < words), 0)


def _read_own_rows(decoding: Decoding, prompt: OrdinaryPrompt) -> None:
    """Let options that read the prompt read each row's own tokens."""
    config, made = decoding.config, list[LogitsProcessor]()
    for name, make in _READ_PROMPT.items():
        if _is_on(config, name):
            made.append(_OwnRows(prompt, partial(make, getattr(config, name))))
            setattr(config, name, None)
    if made:
        given = decoding.arguments["logits_processor"]
        decoding.arguments["logits_processor"] = LogitsProcessorList([*made, *given])


def _is_on(config: GenerationConfig, name: str) -> bool:
    value = getattr(config, name)
    return value is not None and (value > 0 if name.endswith("size") else value != 1.0)


def _hide_slots(decoding: Decoding, prompt: OrdinaryPrompt) -> None:
    """Show the caller's functions and streamer the prompt without entries of private context."""
    arguments = decoding.arguments
    arguments["logits_processor"] = LogitsProcessorList(
        process if isinstance(process, _OwnRows) else _on_ordinary(process, prompt)
        for process in arguments["logits_processor"]
    )
    stops = as_callables(arguments.get("stopping_criteria"))
    arguments["stopping_criteria"] = [_on_ordinary(stop, prompt) for stop in stops]
    allowed = arguments.get("prefix_allowed_tokens_fn")
    if allowed is not None:
        arguments["prefix_allowed_tokens_fn"] = lambda row, ids: allowed(row, prompt.row(row, ids))
    if (streamer := arguments.get("streamer")) is not None:
        arguments["streamer"] = _OrdinaryStreamer(streamer, prompt)


def _on_ordinary(function: Callable[..., Any], prompt: OrdinaryPrompt) -> Callable[..., Any]:
    return lambda ids, scores, **kwargs: function(prompt.of(ids), scores, **kwargs)


def as_callables(value: Any) -> list[Callable[..., Any]]:
    """Return processors or criteria as a list; one alone is meant as a list of one."""
    if value is None:
        return []
    return [value] if callable(value) and not isinstance(value, list) else list(value)


def _checked(update: Callable[[], Any], keywords: dict[str, Any]) -> Any:
    try:
        return update()
    except (ValueError, TypeError, AttributeError) as error:
        raise _refusal(error, keywords) from error


def _refusal(error: Exception, keywords: dict[str, Any]) -> PromptError:
    """Make an error of ``transformers`` one of this package, with the name that was meant."""
    known = {*vars(GenerationConfig()), *inspect.signature(GenerationMixin.generate).parameters}
    near = [hint for name in keywords if name not in known and (hint := did_you_mean(name, known))]
    return PromptError(f"generate refuses its arguments: {error}{near[0] if near else ''}")
