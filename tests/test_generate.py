"""Decoding is the receiver's own ``generate``, with all that it can do, from the fused cache."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig

from c2c import C2CModel, GenerationResult, kv_cache
from c2c.errors import PromptError
from c2c.language_model import Receiver
from c2c.prefill import logits_after
from c2c.prompting import RenderOptions
from c2c.sharer import Sharer
from tiny import Scores, build, open_fusers, pair, token_ids, tokenizer

PROMPTS = ["Hello world!", "What is the capital of France? Explain step by step, slowly.", "A 你好 🙂"]
GREEDY = {"do_sample": False}


@pytest.fixture(scope="module", params=[("llama", "qwen3"), ("gemma3", "qwen2")], ids="-".join)
def closed(request):
    return pair(*request.param)


@pytest.fixture(scope="module")
def opened():
    return open_fusers(pair("qwen3", "llama"))


def generate_plainly(model, prompts, **kwargs):
    """The receiver's ``generate`` as transformers users call it."""
    tokens = model.receiver.encode(prompts)
    out = model.receiver.model.generate(
        input_ids=tokens.ids, attention_mask=tokens.mask.long(), pad_token_id=0, **kwargs
    )
    return out[:, tokens.length :].tolist()


MODES = {
    "greedy": GREEDY,
    "sampling": {"do_sample": True, "temperature": 1.3, "top_k": 40, "top_p": 0.95},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "several beams": {"num_beams": 3, "num_return_sequences": 2, "do_sample": False, "length_penalty": 0.5},
    "beam sampling": {"num_beams": 2, "do_sample": True},
    "penalties": {"do_sample": False, "repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
    "bad words": {"do_sample": False, "bad_words_ids": [[5], [9]], "min_new_tokens": 7},
}


@pytest.mark.parametrize("prompts", [PROMPTS[1], PROMPTS], ids=["single", "batch"])
@pytest.mark.parametrize("mode", MODES)
def test_a_closed_fuser_generates_what_the_receiver_does(closed, mode, prompts):
    kwargs = MODES[mode] | {"max_new_tokens": 7}
    found = []
    for run in (closed.generate, closed.receiver.answer):
        torch.manual_seed(11)
        found.append(token_ids(run(prompts, **kwargs)))
    torch.manual_seed(11)
    assert found == [generate_plainly(closed, prompts, **kwargs)] * 2


def test_a_generation_config_is_followed(opened):
    options = {"max_new_tokens": 3, "num_beams": 2, "num_return_sequences": 2, "do_sample": False}
    results = opened.generate(PROMPTS[0], generation_config=GenerationConfig(pad_token_id=0, **options))
    assert [result.new_tokens for result in results] == [3, 3]
    assert token_ids(results) == token_ids(opened.generate(PROMPTS[0], **options))


def test_the_answer_is_bounded_by_default():
    model = pair("llama", "qwen2")
    model.receiver.model.generation_config.eos_token_id = None
    assert model.generate("Hello").new_tokens == 256


def test_greedy_is_the_argmax_from_the_fused_cache(opened):
    """Step by step, without ``generate``."""
    prepared, seen = opened.prefill(PROMPTS[1]), Scores()
    tokens, cache = prepared.tokens, prepared.cache
    assert kv_cache.length(cache) == tokens.length - 1
    first = logits = opened.receiver.next_logits(tokens, cache)
    expected = []
    for step in range(6):
        expected.append(int(logits.argmax()))
        position = torch.tensor([[tokens.length + step]])
        logits = opened.receiver.model(
            input_ids=torch.tensor([[expected[-1]]]), past_key_values=cache, position_ids=position
        ).logits[:, -1]
    options = GREEDY | {"max_new_tokens": 6}
    assert token_ids(opened.generate(PROMPTS[1], logits_processor=[seen], **options)) == [expected]
    assert token_ids(opened.receiver.answer(PROMPTS[1], **options)) != [expected]
    torch.testing.assert_close(seen.seen[0], first, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kwargs", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}], ids=str)
def test_beams_of_a_batch_are_those_of_its_rows(opened, kwargs):
    kwargs = kwargs | GREEDY | {"max_new_tokens": 6}
    together = token_ids(opened.generate(PROMPTS, **kwargs))
    assert together == [row for prompt in PROMPTS for row in token_ids(opened.generate(prompt, **kwargs))]
    assert len(together) == len(PROMPTS) * kwargs.get("num_return_sequences", 1)
    assert together != token_ids(opened.receiver.answer(PROMPTS, **kwargs))


def test_several_samples_differ_and_share_a_report(opened):
    torch.manual_seed(0)
    results = opened.generate(PROMPTS[:2], do_sample=True, temperature=2.0, num_return_sequences=3, max_new_tokens=8)
    assert len({tuple(ids) for ids in token_ids(results)}) > 2
    assert len({id(result.report) for result in results}) == 1
    lengths = opened.receiver.encode(PROMPTS[:2]).mask.sum(-1).tolist()
    assert [result.prompt_tokens for result in results] == [n for n in lengths for _ in range(3)]


def test_a_stop_string_ends_the_answer(opened):
    options = GREEDY | {"max_new_tokens": 12}
    free = opened.generate(PROMPTS[1], **options)
    pieces = [opened.receiver.tokenizer.decode(token) for token in free.ids]
    # a token with letters that were not said before it
    place, word = next(
        (i, piece)
        for i, piece in enumerate(pieces)
        if i > 1 and piece.strip().isalpha() and piece.isascii() and piece not in "".join(pieces[:i])
    )
    stopped = opened.generate(PROMPTS[1], stop_strings=[word], **options)
    assert stopped.ids.tolist() == free.ids.tolist()[: place + 1]
    assert stopped.text.endswith(word)


@pytest.mark.parametrize("where", ["config", "argument"])
def test_the_end_token_is_kept_and_padding_is_not(where):
    """Rows of a batch end at different lengths; each result holds its own tokens only."""
    model = open_fusers(pair("qwen3", "llama"))
    options = GREEDY | {"max_new_tokens": 10}
    free = token_ids(model.generate(PROMPTS, **options))
    end = free[0][2]
    expected = [row[: row.index(end) + 1] if end in row else row for row in free]
    assert len({len(row) for row in expected}) > 1
    if where == "argument":
        options["eos_token_id"] = end
    else:
        model.receiver.model.generation_config.eos_token_id = [end]
    found = model.generate(PROMPTS, pad_token_id=0, **options)
    assert token_ids(found) == expected
    assert [result.new_tokens for result in found] == [len(row) for row in expected]
    assert [token_ids(model.generate(prompt, **options))[0] for prompt in PROMPTS] == expected


def test_a_row_that_met_its_stop_string_is_not_filled():
    model = open_fusers(pair("qwen3", "llama"))
    model.receiver.model.generation_config.eos_token_id = 511  # as every real model has one
    free = model.generate(PROMPTS, max_new_tokens=10, **GREEDY)
    word = model.receiver.tokenizer.decode(free[1].ids[1:3])
    kwargs = GREEDY | {"max_new_tokens": 10, "stop_strings": [word], "pad_token_id": 300}
    alone = [token_ids(model.generate(prompt, **kwargs))[0] for prompt in PROMPTS]
    assert len({len(row) for row in alone}) > 1
    assert token_ids(model.generate(PROMPTS, **kwargs)) == alone


def test_an_answer_prefix_is_read_and_not_repeated(opened):
    options = RenderOptions(answer_prefix="The answer is")
    result = opened.generate("Hello", options=options, max_new_tokens=3)
    assert result.prompt_tokens == opened.receiver.encode("Hello", options).length
    assert result.prompt_tokens > opened.receiver.encode("Hello").length
    assert not result.text.startswith("The answer is")


def test_forms_of_a_prompt_and_forms_of_a_result(opened):
    single = opened("Hello", max_new_tokens=3)
    assert isinstance(single, GenerationResult)
    conversation = [{"role": "user", "content": "Hello"}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    for prompt in ("Hello", conversation, parts, ["Hello"], [conversation]):
        result = opened.generate(prompt, max_new_tokens=3)
        assert isinstance(result, list) == (prompt in (["Hello"], [conversation]))
        assert token_ids(result) == token_ids(single)


def test_fields_of_a_result(opened):
    result = opened.generate(PROMPTS[1], max_new_tokens=4, **GREEDY)
    assert (result.ids.dtype, result.ids.dim(), result.new_tokens) == (torch.long, 1, 4)
    assert result.text == str(result) == opened.receiver.tokenizer.decode(result.ids, skip_special_tokens=True)
    assert result.prompt_tokens == opened.receiver.encode(PROMPTS[1]).length
    assert 0 < result.seconds_to_first_token < result.seconds_total
    data = result.to_dict()
    assert data["text"] == result.text
    assert data["report"]["fused_tokens"] == result.report.fused_tokens
    assert opened.receiver.answer(PROMPTS[1], max_new_tokens=4).to_dict()["report"] is None


@pytest.mark.parametrize("prompts", [PROMPTS[1], PROMPTS], ids=["single", "batch"])
def test_fields_of_a_report(opened, prompts):
    results = opened.generate(prompts, max_new_tokens=2)
    report = (results if isinstance(results, list) else [results])[0].report
    tokens = opened.receiver.encode(prompts)
    assert report.prompt_tokens == int(tokens.mask.sum())
    assert report.prompt_tokens == report.fused_tokens + sum(report.skipped_tokens.values())
    assert report.skipped_tokens["last token, run on the fused cache"] == tokens.rows
    assert (report.fused_layers, report.skipped_layers) == ([0, 1, 2, 3], {})
    assert report.sharer_bytes == report.fused_tokens * 4 * 2 * opened.sharers[0].geometry.width * 4
    assert set(report.seconds) == {"sharer_prefill", "receiver_prefill", "fuse", "first_token", "decode"}
    assert all(seconds > 0 for seconds in report.seconds.values())
    assert 0 < report.gate_openness < 1
    assert report.trained is False
    assert report.to_dict()["sharer_bytes"] == report.sharer_bytes


def test_a_report_counts_a_position_once_for_two_sharers():
    receiver = Receiver(build("llama", 1), tokenizer("chatml"))
    sharers = [Sharer(build("qwen2", 2), tokenizer("llama3")), Sharer(build("qwen3", 3), tokenizer("human"))]
    model = C2CModel.from_models(receiver, sharers, layer_map=[None, 0, 1, 2, None])
    report = model.prefill(PROMPTS).report
    assert report.prompt_tokens == report.fused_tokens + sum(report.skipped_tokens.values())
    assert report.fused_layers == [1, 2, 3]
    assert set(report.skipped_layers) == {0, 4}
    width = sum(sharer.geometry.width for sharer in sharers)
    assert report.sharer_bytes == report.fused_tokens * 3 * 2 * width * 4


# -- chat --------------------------------------------------------------------------------------------------------------


def test_every_turn_of_a_chat_is_a_fresh_run_of_its_messages(opened):
    options = GREEDY | {"max_new_tokens": 6}
    chat = opened.chat("Be brief.", **options)
    answers = [chat.send(text) for text in ("Hello", "And now?", "Bye")]
    assert [m["role"] for m in chat.messages] == ["system", *["user", "assistant"] * 3]
    assert [m["content"] for m in chat.messages[2::2]] == [answer.text for answer in answers]
    for turn, answer in enumerate(answers):
        fresh = opened.generate(chat.messages[: 2 + 2 * turn], **options)
        assert token_ids(fresh) == token_ids(answer)
        assert fresh.report.fused_tokens == answer.report.fused_tokens


def test_a_turn_that_fails_is_not_kept(opened):
    chat = opened.chat(max_new_tokens=3)
    chat.send("Hello")
    before = list(chat.messages)
    with pytest.raises(PromptError):
        chat.send("word " * 600)
    with pytest.raises(TypeError, match="num_return_sequences"):
        chat.send("Hello", num_return_sequences=2, do_sample=True)
    assert chat.messages == before
    assert chat.send("Again", max_new_tokens=2).new_tokens == 2


class HeadCopies(TorchDispatchMode):
    """Count batched products with a matrix as large as the head."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.found = vocabulary, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found += func is torch.ops.aten.bmm.default and self.vocabulary in args[1].shape
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize(("rows", "keep"), [(2, 1), (2, 3), (1, 1)])
def test_the_head_is_never_copied_once_for_each_row(family, rows, keep):
    """transformers cuts the last states out of a batch; torch makes one product per row of such a view."""
    plain = build(family).requires_grad_(False)
    model = build(family)
    receiver = Receiver(model, tokenizer("chatml"))
    Receiver(model, tokenizer("chatml"))  # a model in two roles
    tokens = receiver.encode(PROMPTS[:rows])
    logits, copies = [], []
    for one in (model, plain):
        with torch.no_grad(), HeadCopies(plain.config.vocab_size) as mode:
            logits.append(logits_after(one.eval(), tokens.ids, tokens.mask, tokens.positions, None, keep=keep))
        copies.append(mode.found)
    assert copies == [0, 1]
    torch.testing.assert_close(*logits)
