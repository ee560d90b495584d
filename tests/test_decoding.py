"""Arguments of ``generate`` mean on a fused cache what they mean on an ordinary prompt, or are refused by name."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForCausalLM,
    BertConfig,
    BertLMHeadModel,
    CompileConfig,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MaxLengthCriteria,
    Phi3Config,
    Phi3ForCausalLM,
    RoFormerConfig,
    RoFormerForCausalLM,
    WatermarkingConfig,
)

from c2c import C2CModel
from c2c.errors import C2CError, CacheError, ContextLengthError, PromptError
from c2c.language_model import Receiver
from c2c.sharer import Sharer
from c2c.systems import SystemOptions, make_system
from tiny import NO_SPECIALS, Scores, build, memory_pair, open_fusers, pair, token_ids, tokenizer

PROMPTS = ["Hello world!", "What is the capital of France? Explain.", "A x"]
PROMPT = PROMPTS[1]
GREEDY = {"do_sample": False, "max_new_tokens": 8}
ENDS = list(range(400))


@pytest.fixture(scope="module")
def closed():
    return pair("llama", "qwen2")


@pytest.fixture(scope="module")
def opened():
    return open_fusers(pair("llama", "qwen2"))


def plainly(model, prompts, **kwargs):
    """The answers of the receiver's own ``generate`` on an ordinary prompt; rows as they come, filling included."""
    tokens = model.receiver.encode(prompts)
    torch.manual_seed(11)
    ids = model.receiver.model.generate(input_ids=tokens.ids, attention_mask=tokens.mask.long(), **kwargs)
    return ids[:, tokens.length :].tolist()


def answers(model, prompts, **kwargs):
    torch.manual_seed(11)
    return token_ids(model.generate(prompts, **kwargs))


# -- the same as on an ordinary prompt ---------------------------------------------------------------------------------

SAME = {
    "lookup": {"prompt_lookup_num_tokens": 3},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "chunks": {"prefill_chunk_size": 4},
    "sampled with a penalty of contrastive search": {"penalty_alpha": 0.6, "do_sample": True},
    "ends": {"eos_token_id": ENDS},
    "no end": {"eos_token_id": None},
    "end out of the vocabulary": {"eos_token_id": -1},
    "empty list of ends": {"eos_token_id": []},
    "ends as a tensor": {"eos_token_id": torch.tensor(ENDS)},
    "at least four": {"min_new_tokens": 4, "eos_token_id": ENDS},
    "no time": {"max_time": 0},
    "time": {"max_time": 60.0},
    "temperature of a greedy call": {"do_sample": False, "temperature": 0.0},
    "cold": {"do_sample": True, "temperature": 1e-10},
    "hot": {"do_sample": True, "temperature": 1e10},
    "no top_k": {"do_sample": True, "top_k": 0},
    "top_k switched off": {"do_sample": True, "top_k": None},
    "usual top_k": {"do_sample": True},
    "no top_p": {"do_sample": True, "top_p": 0.0},
    "whole top_p": {"do_sample": True, "top_p": 1},
    "repetition penalty": {"repetition_penalty": 1.5},
    "penalty on the prompt": {"encoder_repetition_penalty": 1.5},
    "no token twice": {"no_repeat_ngram_size": 1},
    "no pair of the prompt": {"encoder_no_repeat_ngram_size": 2},
    "suppressed": {"suppress_tokens": [1, 2, 3], "begin_suppress_tokens": list(range(100))},
    "nothing suppressed": {"suppress_tokens": []},
    "biased": {"sequence_bias": {(5,): 50.0}},
    "forced": {"forced_eos_token_id": 7},
    "length penalty": {"exponential_decay_length_penalty": (2, 1.5), "eos_token_id": 3},
    "scores": {"return_dict_in_generate": False, "output_scores": True},
    "guided": {"guidance_scale": 1.5},
    "watermark": {"watermarking_config": WatermarkingConfig(bias=5.0)},
    "allowed": {"prefix_allowed_tokens_fn": lambda row, ids: [5, 6 + row]},
    "compiled": {"compile_config": CompileConfig()},
}


@pytest.mark.parametrize("name", SAME)
def test_options_mean_what_they_mean_on_an_ordinary_prompt(closed, name):
    kwargs = {"max_new_tokens": 6} | SAME[name]
    assert answers(closed, PROMPT, **kwargs) == plainly(closed, PROMPT, pad_token_id=0, **kwargs)


BATCHED = [
    "no cache",
    "ends",
    "repetition penalty",
    "penalty on the prompt",
    "no token twice",
    "allowed",
    "at least four",
]


@pytest.mark.parametrize("name", BATCHED)
def test_options_mean_the_same_for_a_batch_and_for_its_rows(opened, name):
    kwargs = {"max_new_tokens": 6} | SAME[name] | {"prefix_allowed_tokens_fn": None}
    for pad in (0, 201):  # what fills rows is a token like others, and must not be penalised
        together = answers(opened, PROMPTS, pad_token_id=pad, **kwargs)
        assert together == [answers(opened, prompt, **kwargs)[0] for prompt in PROMPTS]


@pytest.mark.parametrize("where", ["generation_config.json", "config.json", "keyword", "config object", "dict"])
def test_a_cache_that_is_switched_off_is_used(tmp_path, where):
    """Left in a checkpoint by training with gradient checkpointing."""
    build("llama", 1).save_pretrained(tmp_path)
    off, kwargs = {"use_cache": False}, {}
    if where.endswith(".json"):
        (tmp_path / "generation_config.json").unlink(missing_ok=where == "config.json")
        file = tmp_path / where
        file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | off))
    else:
        kwargs = {"keyword": off, "config object": {"generation_config": GenerationConfig(**off)}}.get(where, {})
        kwargs = kwargs or {"generation_config": off}
    receiver = Receiver(AutoModelForCausalLM.from_pretrained(tmp_path), tokenizer("chatml"))
    sharer = Sharer(build("qwen2", 2), tokenizer("llama3"))
    model, usual = open_fusers(C2CModel.from_models(receiver, sharer)), open_fusers(pair("llama", "qwen2"))
    for prompts in (PROMPT, PROMPTS):
        assert answers(model, prompts, **GREEDY, **kwargs) == answers(usual, prompts, **GREEDY)


@pytest.mark.parametrize(
    "kwargs", [{"prompt_lookup_num_tokens": 3}, {"assistant_early_exit": 2}, {"use_mtp": True}], ids=str
)
@pytest.mark.parametrize("given", ["keyword", "config", "checkpoint"])
def test_assisted_decoding_gives_the_same_tokens(opened, kwargs, given):
    expected = answers(opened, PROMPT, **GREEDY)
    config = opened.receiver.model.generation_config
    try:
        if given == "checkpoint":
            config.update(**kwargs)
        given = {"keyword": kwargs, "config": {"generation_config": GenerationConfig(**kwargs)}}.get(given, {})
        result = opened.generate(PROMPT, **GREEDY, **given)
    finally:
        config.update(**dict.fromkeys(kwargs))
    assert result.ids.tolist() == expected[0]
    assert any("no effect" in note and next(iter(kwargs)) in note for note in result.report.notes) == bool(given)


def test_an_assistant_is_left_out_and_the_report_says_so(opened):
    result = opened.generate(PROMPT, assistant_model=build("llama", 9), **GREEDY)
    assert result.ids.tolist() == answers(opened, PROMPT, **GREEDY)[0]
    assert any("assistant_model has no effect" in note for note in result.report.notes)
    assert not any("assistant" in note for note in opened.generate(PROMPT, **GREEDY).report.notes)


@pytest.mark.parametrize(
    "name", ["static", "offloaded", "offloaded_static", "hybrid", "sliding_window", "dynamic", "paged"]
)
def test_every_kind_of_cache_gives_the_same_tokens(opened, name):
    result = opened.generate(PROMPT, cache_implementation=name, **GREEDY)
    assert result.ids.tolist() == answers(opened, PROMPT, **GREEDY)[0]
    assert any(name in note for note in result.report.notes) == (name != "dynamic")


def test_a_length_of_the_whole_text_is_followed(closed):
    length = closed.receiver.encode(PROMPT).length
    most = {"max_length": length + 3, "pad_token_id": 0}
    for kwargs in (most, {"generation_config": GenerationConfig(**most)}):
        for prompts in (PROMPT, PROMPTS):
            assert answers(closed, prompts, **kwargs) == plainly(closed, prompts, **kwargs)
    least = {"min_length": length + 4, "eos_token_id": ENDS, "max_new_tokens": 8}
    assert answers(closed, PROMPT, **least) == plainly(closed, PROMPT, pad_token_id=0, **least)


def test_numbers_may_be_of_any_type(closed):
    expected = answers(closed, PROMPT, do_sample=True, temperature=2.0, top_k=3, max_new_tokens=6)
    assert answers(closed, PROMPT, do_sample=True, temperature=2, top_k=3.0, max_new_tokens=6.0) == expected
    frozen = answers(closed, PROMPT, do_sample=True, temperature=1e-42, max_new_tokens=6)
    assert frozen == answers(closed, PROMPT, do_sample=False, max_new_tokens=6)


def test_one_processor_and_one_criterion_need_no_list(closed):
    def only_seven(ids, scores):
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([7]), 0.0)

    stop = MaxLengthCriteria(closed.receiver.encode(PROMPT).length + 2)
    assert answers(closed, PROMPT, logits_processor=only_seven, stopping_criteria=stop) == [[7, 7]]


# -- ends --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beams", [1, 3])
def test_rows_end_at_their_stop_string_in_a_model_without_an_end_token(opened, beams):
    free = opened.generate(PROMPTS, num_beams=beams, **GREEDY)
    pieces = [opened.receiver.tokenizer.decode(token) for token in free[1].ids[:-1]]
    word = next(piece for piece in pieces if piece.strip().isalpha() and piece.isascii())
    kwargs = GREEDY | {"num_beams": beams, "stop_strings": word}
    alone = [answers(opened, prompt, **kwargs)[0] for prompt in PROMPTS]
    assert len(alone[1]) < len(free[1].ids)
    assert answers(opened, PROMPTS, **kwargs) == alone
    assert answers(opened, PROMPTS, **GREEDY, stop_strings=[], num_beams=beams) == token_ids(free)


def test_a_criterion_ends_its_own_row(opened):
    free = answers(opened, PROMPTS, **GREEDY)

    def one_by_one(ids, scores, **kwargs):
        return torch.tensor([ids.shape[1] >= length for length in ends])

    length = opened.receiver.encode(PROMPTS).length
    ends = [length + 2, length + 5, length + 4]
    found = answers(opened, PROMPTS, stopping_criteria=[one_by_one], **GREEDY)
    assert found == [row[:count] for row, count in zip(free, (2, 5, 4), strict=True)]


def test_the_padding_token_may_be_out_of_the_vocabulary(opened):
    ends = {"eos_token_id": ENDS}
    assert answers(opened, PROMPTS, pad_token_id=-1, **GREEDY, **ends) == answers(opened, PROMPTS, **GREEDY, **ends)


# -- refused -----------------------------------------------------------------------------------------------------------

REFUSED = [
    ({"max_new_tokens": 0}, "max_new_tokens"),
    ({"max_new_tokens": -1}, "max_new_tokens"),
    ({"max_new_tokens": "5"}, "max_new_tokens"),
    ({"max_new_tokens": 2.5}, "max_new_tokens"),
    ({"max_length": 3}, "max_length"),
    ({"num_beams": 0}, "num_beams"),
    ({"num_return_sequences": 0}, "num_return_sequences"),
    ({"num_return_sequences": 2}, "num_return_sequences"),
    ({"max_time": float("nan")}, "max_time"),
    *(({"do_sample": True, "temperature": x}, "temperature") for x in (0, -1.0, float("nan"), float("inf"), "hot")),
    *(({"do_sample": True, "top_p": x}, "top_p") for x in (-0.1, 1.5, float("nan"))),
    ({"do_sample": True, "top_k": -1}, "top_k"),
    ({"do_sample": True, "min_p": 2.0}, "min_p"),
    ({"do_sample": True, "suppress_tokens": list(range(512))}, "suppress"),
    ({"repetition_penalty": 0.0}, "repetition_penalty"),
    ({"repetition_penalty": float("inf")}, "repetition_penalty"),
    ({"exponential_decay_length_penalty": (2, 1.5), "eos_token_id": None}, "exponential_decay"),
    ({"bad_words_ids": []}, "bad_words_ids"),
    ({"stop_strings": ["x", ""]}, "stop_strings"),
    ({"stop_strings": [3]}, "stop_strings"),
    ({"cache_implementation": "quantized"}, "quantized"),
    ({"cache_implementation": "nonsense"}, "cache_implementation"),
    ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha"),
    ({"penalty_alpha": 0.6, "trust_remote_code": True}, "penalty_alpha"),
    ({"dola_layers": "high"}, "dola_layers"),
    ({"num_beams": 4, "num_beam_groups": 2}, "num_beam_groups"),
    ({"force_words_ids": [[5]], "num_beams": 2}, "force_words_ids"),
    ({"num_beams": 2, "low_memory": True}, "low_memory"),
    ({"token_healing": True}, "token_healing"),
    ({"custom_generate": "transformers-community/x", "trust_remote_code": True}, "custom_generate"),
    ({"assistant_model": "x", "assistant_ensemble_weight": 0.5}, "assistant_ensemble_weight"),
    *(({name: torch.ones(1, 3).long()}, name) for name in ("inputs", "input_ids", "attention_mask", "position_ids")),
    ({"inputs_embeds": torch.ones(1, 3, 48)}, "inputs_embeds"),
    ({"past_key_values": ()}, "past_key_values"),
    ({"generation_config": "greedy"}, "generation_config"),
    ({"temprature": 1.0}, "temperature"),
]


@pytest.mark.parametrize(("kwargs", "name"), REFUSED, ids=[str(kwargs)[:60] for kwargs, _ in REFUSED])
def test_what_a_prefilled_cache_can_not_follow_is_refused_by_name(closed, kwargs, name):
    with pytest.raises(PromptError, match=name):
        closed.generate(PROMPT, **({"max_new_tokens": 4} if "max_length" not in kwargs else {}) | kwargs)


@pytest.mark.parametrize("messages", [[], [[]], "", [""], [{"role": "user", "content": ""}]], ids=str)
def test_an_empty_prompt_is_refused(closed, messages):
    for call in (closed.generate, closed.receiver.answer, closed.stream):
        with pytest.raises(C2CError, match="empty"):
            call(messages, max_new_tokens=2)


@pytest.mark.parametrize("tokens", [-1, 2.5, True, "3"])
def test_a_draft_has_a_length(closed, tokens):
    with pytest.raises(PromptError, match="draft_tokens"):
        closed.sharers[0].read("A red boat.", draft_tokens=tokens)
    assert len(closed.sharers[0].read("A red boat.", draft_tokens=0).ids)


def test_decoding_from_another_cache_than_the_fused_one_is_an_error(opened):
    def own_way(model, input_ids, **kwargs):
        """Decode without the cache that was given."""
        for _ in range(3):
            input_ids = torch.cat([input_ids, model(input_ids).logits[:, -1:].argmax(-1)], 1)
        return input_ids

    with pytest.raises(CacheError, match="custom_generate"):
        opened.generate(PROMPT, custom_generate=own_way, **GREEDY)


# -- private context ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def private():
    return memory_pair()


class Seen(Scores):
    """Keep the ids that a processor sees."""

    def __call__(self, ids, scores):
        self.seen.append(ids.clone())
        return scores


@pytest.mark.parametrize("prompts", [PROMPT, PROMPTS], ids=["single", "batch"])
def test_functions_of_the_caller_see_the_prompt_without_entries(private, prompts):
    processed, stopped, rows = Seen(), Seen(), []

    def never(ids, scores, **kwargs):
        stopped(ids, scores)
        return torch.zeros(ids.shape[0], dtype=torch.bool)

    def anything(row, ids):
        rows.append((row, ids.tolist()))
        return list(range(512))

    functions = {"logits_processor": [processed], "stopping_criteria": [never], "prefix_allowed_tokens_fn": anything}
    contexts = ["A red boat.", "A boat house, built in 1924.", "Rain."][: 1 if prompts == PROMPT else 3]
    context = contexts[0] if prompts == PROMPT else contexts
    made = answers(private, prompts, sharer_messages=context, pad_token_id=0, **functions, **GREEDY)
    assert made == answers(private, prompts, sharer_messages=context, **GREEDY)
    tokens = private.receiver.encode(prompts)
    assert torch.equal(processed.seen[0], tokens.ids.masked_fill(~tokens.mask, 0))
    assert torch.equal(stopped.seen[2][:, : tokens.length], processed.seen[0])
    assert rows[0] == (0, tokens.ids[0][tokens.mask[0]].tolist())


PENALTIES = [{"repetition_penalty": 3.0}, {"encoder_repetition_penalty": 3.0}, {"no_repeat_ngram_size": 1}]


@pytest.mark.parametrize("kwargs", PENALTIES, ids=str)
def test_penalties_read_the_prompt_without_entries(private, kwargs):
    """What fills the entries' columns is a token like others; the scores show whether it was penalised."""
    usual, penalised = Scores(), Scores()
    call = {"sharer_messages": "A red boat.", "max_new_tokens": 1, "do_sample": False}
    private.generate(PROMPT, logits_processor=[usual], **call)
    private.generate(PROMPT, logits_processor=[penalised], **call, **kwargs)
    changed = (usual.seen[0] != penalised.seen[0]).nonzero()[:, 1].tolist()
    ids = set(private.receiver.encode(PROMPT).ids[0].tolist())
    others = set(range(512)) - ids
    assert set(changed) == ids or (kwargs == PENALTIES[1] and set(changed) <= others | ids)
    assert 0 not in ids


def test_lengths_do_not_count_entries(private):
    length = private.receiver.encode(PROMPT).length
    assert len(answers(private, PROMPT, sharer_messages="A red boat.", max_length=length + 3)[0]) == 3
    call = {"sharer_messages": "A red boat.", "eos_token_id": ENDS, "max_new_tokens": 8}
    ends_late = answers(private, PROMPT, min_new_tokens=4, **call)
    assert answers(private, PROMPT, min_length=length + 4, **call) == ends_late != answers(private, PROMPT, **call)


def test_several_answers_to_private_context(private):
    options = {"num_beams": 3, "num_return_sequences": 2, **GREEDY}
    contexts = ["A red boat.", "A boat house, built in 1924.", "Rain."]
    together = private.generate(PROMPTS, sharer_messages=contexts, **options)
    alone = [
        row
        for pair in zip(PROMPTS, contexts, strict=True)
        for row in answers(private, pair[0], sharer_messages=pair[1], **options)
    ]
    assert token_ids(together) == alone
    lengths = private.receiver.encode(PROMPTS).mask.sum(-1).tolist()
    assert [result.prompt_tokens for result in together] == [n for n in lengths for _ in range(2)]


# -- positions ---------------------------------------------------------------------------------------------------------

SMALL = {"vocab_size": 512, **NO_SPECIALS}
ENCODER = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4} | SMALL
DECODER = ENCODER | {"num_key_value_heads": 2, "max_position_embeddings": 512}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 6,
    "long_factor": [2.0 + channel for channel in range(6)],
    "original_max_position_embeddings": 40,
    "factor": 4.0,
}


def family(name: str):
    torch.manual_seed(1)
    if name == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(n_embd=48, n_layer=3, n_head=4, n_positions=42, **SMALL))
    elif name == "bart":
        sizes = {"d_model": 48, "decoder_layers": 3, "decoder_attention_heads": 4, "decoder_ffn_dim": 64}
        model = BartForCausalLM(BartConfig(max_position_embeddings=512, **sizes, **SMALL))
    elif name == "roformer":
        model = RoFormerForCausalLM(RoFormerConfig(is_decoder=True, **ENCODER))
    elif name == "bert":
        model = BertLMHeadModel(BertConfig(**ENCODER))
    elif name == "phi3":
        rope = {"rope_parameters": LONG, "original_max_position_embeddings": 40}
        model = Phi3ForCausalLM(Phi3Config(**rope, **DECODER))
    elif name == "dynamic":
        rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
        model = LlamaForCausalLM(LlamaConfig(**DECODER | {"max_position_embeddings": 30}, rope_parameters=rope))
        model.config.max_position_embeddings = 512  # as in checkpoints that say how far they may be stretched
    else:
        model = LlamaForCausalLM(LlamaConfig(rope_parameters=LONG, **DECODER))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def receiving(model, sharer=None) -> C2CModel:
    sharer = Sharer(sharer or build("qwen2", 2), tokenizer("llama3"), "sharer")
    return C2CModel.from_models(Receiver(model, tokenizer("chatml"), "receiver"), sharer, fuser="c2c")


COLUMNS = ["bart", "roformer"]
LENGTHS = ["dynamic", "longrope"]  # prompts of 25 to 39 tokens, and a change at 30 or 40


@pytest.mark.parametrize("name", COLUMNS + LENGTHS)
def test_a_batch_is_its_single_runs_where_the_model_does_not_make_it_so(name):
    model = receiving(family(name))
    single = [plainly(model, prompt, pad_token_id=0, **GREEDY)[0] for prompt in PROMPTS]
    assert [answers(model, prompt, **GREEDY)[0] for prompt in PROMPTS] == single
    results = model.generate(PROMPTS, **GREEDY)
    assert token_ids(results) == single
    assert any("one by one" in note for note in results[0].report.notes)
    assert token_ids(model.receiver.answer(PROMPTS, **GREEDY)) == single
    beams = GREEDY | {"num_beams": 3, "num_return_sequences": 2}
    assert answers(model, PROMPTS, **beams) == [row for one in PROMPTS for row in answers(model, one, **beams)]


@pytest.mark.parametrize("name", [*COLUMNS, "bert"])
def test_batches_of_a_sharer_that_counts_columns_or_sees_what_follows(name):
    model = open_fusers(receiving(build("llama", 1), family(name)))
    together = answers(model, PROMPTS, **GREEDY)
    assert together == [answers(model, prompt, **GREEDY)[0] for prompt in PROMPTS]
    assert together != token_ids(model.receiver.answer(PROMPTS, **GREEDY))
    if name == "bert":  # which writes no text
        return
    text = make_system("text", model, SystemOptions(message_tokens=5))
    assert token_ids(text.generate(PROMPTS, **GREEDY)) == [token_ids(text.generate(p, **GREEDY))[0] for p in PROMPTS]


@pytest.mark.parametrize("name", COLUMNS)
def test_logits_of_a_batch_that_must_be_run_row_by_row(name):
    receiver = receiving(family(name)).receiver
    tokens = receiver.encode(PROMPTS)
    together = receiver.next_logits(tokens, receiver.prefill(tokens, tokens.length - 1))
    for row, prompt in enumerate(PROMPTS):
        alone = receiver.encode(prompt)
        expected = receiver.next_logits(alone, receiver.prefill(alone, alone.length - 1))
        torch.testing.assert_close(together[row : row + 1], expected, rtol=1e-4, atol=1e-4)


def test_a_batch_of_a_model_that_counts_tokens_is_run_as_one(opened):
    assert not any("one by one" in note for note in opened.generate(PROMPTS, **GREEDY)[0].report.notes)


def test_a_model_that_sees_what_follows_does_not_decode_from_a_cache():
    with pytest.raises(CacheError, match="two parts"):
        receiving(family("bert"))
    with pytest.raises(CacheError, match="two parts"):
        Receiver(family("bert"), tokenizer("chatml")).answer(PROMPT, **GREEDY)


@pytest.mark.parametrize("name", LENGTHS)
def test_a_long_prompt_leaves_nothing_behind(name):
    """Frequencies that grew for a longer prompt are not those of a shorter one."""
    model = receiving(family(name))
    expected = plainly(receiving(family(name)), PROMPT, pad_token_id=0, **GREEDY)
    model.generate(PROMPT + " Then tell me more of it, and slowly.", **GREEDY)
    assert answers(model, PROMPT, **GREEDY) == expected


def test_an_answer_that_grows_out_of_a_fused_cache_is_an_error():
    """Phi-3 drops its cache at the length from which on it rotates otherwise, and fused entries with it."""
    model = receiving(family("phi3"))
    short = PROMPTS[0]
    room = 41 - model.receiver.encode(short).length
    assert answers(model, short, **GREEDY) == plainly(model, short, pad_token_id=0, **GREEDY)
    with pytest.raises(ContextLengthError, match=f"max_new_tokens={room}"):
        model.generate(short, max_new_tokens=room + 1, do_sample=False)
    ended = plainly(model, short, pad_token_id=0, max_new_tokens=room, do_sample=False)[0]
    end = next(token for token in ended if ended.index(token) > 2)
    assert answers(model, short, max_new_tokens=100, do_sample=False, eos_token_id=end)[0][-1] == end
    long = {"max_new_tokens": room + 5, "do_sample": False}
    assert token_ids(model.receiver.answer(short, **long)) == plainly(model, short, pad_token_id=0, **long)


def test_an_answer_ends_where_the_table_of_positions_does():
    model = receiving(family("gpt2"))
    room = 43 - model.receiver.encode(PROMPT).length
    for answer in (model.generate, model.receiver.answer):
        assert answer(PROMPT, max_new_tokens=room, do_sample=False).new_tokens == room
        assert answer(PROMPT, do_sample=False).new_tokens == room
        with pytest.raises(ContextLengthError, match=f"max_new_tokens={room}"):
            answer(PROMPT, max_new_tokens=room + 1, do_sample=False)


@pytest.mark.slow
def test_a_server_answers_a_batch_row_by_row_where_the_model_needs_it():
    from serving_harness import running, text_of

    model = receiving(family("bart"))
    expected = [model.generate(prompt, max_new_tokens=6, do_sample=False).text for prompt in PROMPTS]
    with running(model, window=0.5) as server:
        assert [text_of(response) for response in server.chat_all(PROMPTS)] == expected


@pytest.mark.parametrize("how", ["whole", "part"])
def test_training_mode_entered_between_calls_is_left_again(how):
    """Also of one layer, and of a layer that was put in later: its dropout would change the answer."""
    receiver = Receiver(family("gpt2"), tokenizer("chatml"))
    expected = token_ids(receiver.answer(PROMPT, **GREEDY | {"max_new_tokens": 3}))
    drop = torch.nn.Sequential(receiver.model.transformer.h[1].mlp, torch.nn.Dropout(0.9))
    receiver.model.transformer.h[1].mlp = drop
    (receiver.model if how == "whole" else drop).train()
    assert token_ids(receiver.answer(PROMPT, **GREEDY | {"max_new_tokens": 3})) == expected
    prompt = receiver.prefill_messages(PROMPT)
    (receiver.model if how == "whole" else drop).train()
    assert token_ids(prompt.generate(**GREEDY | {"max_new_tokens": 3})) == expected
