"""Answering: decoding is the receiver's own ``generate``, with all that it can do."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig, TextStreamer
from transformers.generation.streamers import BaseStreamer

from c2c import C2CModel, GenerationResult, kv_cache
from c2c.errors import PromptError
from c2c.language_model import Receiver, Sharer
from c2c.prefill import logits_after
from c2c.prompting import RenderOptions
from tiny import Scores, build, open_fusers, pair, tokenizer

PROMPTS = ["Hello world!", "What is the capital of France? Explain step by step, slowly.", "A 你好 🙂"]


@pytest.fixture(scope="module", params=[("llama", "qwen3"), ("gemma3", "qwen2")], ids="-".join)
def closed(request):
    return pair(*request.param)


@pytest.fixture(scope="module")
def opened():
    return open_fusers(pair("qwen3", "llama"))


class OnlyToken:
    def __init__(self, token):
        self.token = token

    def __call__(self, ids, scores):
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([self.token]), 0.0)


def rows(results):
    return [result.ids.tolist() for result in (results if isinstance(results, list) else [results])]


def plain(model, prompts, **kwargs):
    """The receiver's ``generate`` as transformers users call it."""
    tokens = model.receiver.encode(prompts)
    out = model.receiver.model.generate(
        input_ids=tokens.ids, attention_mask=tokens.mask.long(), pad_token_id=0, **kwargs
    )
    return out[:, tokens.length :].tolist()


# -- the same as plain generate ----------------------------------------------------------------------------------------

MODES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 1.3, "top_k": 40, "top_p": 0.95},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3, "do_sample": False},
    "several beams": {"num_beams": 3, "num_return_sequences": 2, "do_sample": False, "length_penalty": 0.5},
    "beam sampling": {"num_beams": 2, "do_sample": True},
    "penalties": {"do_sample": False, "repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
    "bad words": {"do_sample": False, "bad_words_ids": [[5], [9]], "min_new_tokens": 7},
}


@pytest.mark.parametrize("prompts", [PROMPTS[1], PROMPTS], ids=["single", "batch"])
@pytest.mark.parametrize("mode", list(MODES))
def test_a_closed_fuser_answers_as_the_receiver_does(closed, mode, prompts):
    kwargs = MODES[mode] | {"max_new_tokens": 7}
    torch.manual_seed(11)
    ours = rows(closed.generate(prompts, **kwargs))
    torch.manual_seed(11)
    expected = plain(closed, prompts, **kwargs)
    assert ours == expected
    torch.manual_seed(11)
    assert rows(closed.receiver.answer(prompts, **kwargs)) == expected


def test_the_seed_decides(opened):
    def sample(seed):
        torch.manual_seed(seed)
        return rows(opened.generate(PROMPTS, do_sample=True, temperature=2.0, max_new_tokens=8))

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_a_generation_config_is_followed(opened):
    config = GenerationConfig(max_new_tokens=3, num_beams=2, num_return_sequences=2, do_sample=False, pad_token_id=0)
    results = opened.generate(PROMPTS[0], generation_config=config)
    assert [result.new_tokens for result in results] == [3, 3]
    assert rows(results) == rows(
        opened.generate(PROMPTS[0], max_new_tokens=3, num_beams=2, num_return_sequences=2, do_sample=False)
    )


def test_the_answer_is_bounded_by_default():
    model = pair("llama", "qwen2")
    model.receiver.model.generation_config.eos_token_id = None
    seen = Scores()
    assert model.generate("Hello", logits_processor=[seen]).new_tokens == len(seen.seen) == 256


# -- an open fuser -----------------------------------------------------------------------------------------------------


def test_greedy_is_the_argmax_from_the_fused_cache(opened):
    """Step by step, without ``generate``."""
    prepared = opened.prefill(PROMPTS[1])
    tokens, cache = prepared.tokens, prepared.cache
    logits, expected = opened.receiver.next_logits(tokens, cache), []
    for step in range(6):
        expected.append(int(logits.argmax()))
        position = torch.tensor([[tokens.length + step]])
        logits = opened.receiver.model(
            input_ids=torch.tensor([[expected[-1]]]), past_key_values=cache, position_ids=position
        ).logits[:, -1]
    assert opened.generate(PROMPTS[1], max_new_tokens=6, do_sample=False).ids.tolist() == expected
    assert opened.receiver.answer(PROMPTS[1], max_new_tokens=6, do_sample=False).ids.tolist() != expected


@pytest.mark.parametrize("kwargs", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}], ids=str)
def test_beams_of_a_batch_are_those_of_its_rows(opened, kwargs):
    kwargs = kwargs | {"max_new_tokens": 6, "do_sample": False}
    together = rows(opened.generate(PROMPTS, **kwargs))
    apart = [row for prompt in PROMPTS for row in rows(opened.generate(prompt, **kwargs))]
    assert together == apart
    assert len(together) == len(PROMPTS) * kwargs.get("num_return_sequences", 1)


def test_beams_find_likelier_answers_than_greedy(opened):
    def log_likelihood(prompt, ids):
        prepared = opened.prefill(prompt)
        tokens, cache = prepared.tokens, prepared.cache
        whole = torch.cat([tokens.ids[:, -1:], torch.tensor([ids])], dim=1)
        positions = torch.arange(tokens.length - 1, tokens.length + len(ids)).unsqueeze(0)
        logits = opened.receiver.model(input_ids=whole, past_key_values=cache, position_ids=positions).logits[0]
        return float(logits[:-1].log_softmax(-1).gather(1, torch.tensor(ids).unsqueeze(1)).sum())

    gains = []
    for prompt in (*PROMPTS, "And now?", "Paris", "a b c", "Is it so?"):
        greedy, beams = (
            opened.generate(prompt, max_new_tokens=8, do_sample=False, num_beams=n).ids.tolist() for n in (1, 8)
        )
        gains.append(log_likelihood(prompt, beams) - log_likelihood(prompt, greedy))
    assert min(gains) > -1e-4
    assert max(gains) > 0.01


def test_several_samples_differ_and_share_a_report(opened):
    torch.manual_seed(0)
    results = opened.generate(PROMPTS[:2], do_sample=True, temperature=2.0, num_return_sequences=3, max_new_tokens=8)
    assert len(results) == 6
    assert len({tuple(result.ids.tolist()) for result in results}) > 2
    assert len({id(result.report) for result in results}) == 1
    lengths = [int(n) for n in opened.receiver.encode(PROMPTS[:2]).mask.sum(-1)]
    assert [result.prompt_tokens for result in results] == [n for n in lengths for _ in range(3)]


def test_logits_processors_decide_every_token(opened):
    assert rows(opened.generate(PROMPTS, max_new_tokens=3, logits_processor=[OnlyToken(7)])) == [[7] * 3] * 3


def test_the_first_scores_come_from_the_fused_cache(opened):
    seen, prepared = Scores(), opened.prefill(PROMPTS[0])
    opened.generate(PROMPTS[0], max_new_tokens=1, logits_processor=[seen])
    assert torch.allclose(seen.seen[0], opened.receiver.next_logits(prepared.tokens, prepared.cache), atol=1e-4)


def test_a_stop_string_ends_the_answer(opened):
    free = opened.generate(PROMPTS[1], max_new_tokens=12, do_sample=False)
    pieces = [opened.receiver.tokenizer.decode(token) for token in free.ids]
    # a token with letters that were not said before it
    place, word = next(
        (i, piece)
        for i, piece in enumerate(pieces)
        if i > 1 and piece.strip().isalpha() and piece.isascii() and piece not in "".join(pieces[:i])
    )
    stopped = opened.generate(PROMPTS[1], max_new_tokens=12, do_sample=False, stop_strings=[word])
    assert stopped.ids.tolist() == free.ids.tolist()[: place + 1]
    assert stopped.text.endswith(word)


@pytest.mark.parametrize("where", ["config", "argument"])
def test_the_end_token_is_kept_and_padding_is_not(where):
    """Rows of a batch end at different lengths; each result holds its own tokens only."""
    model = open_fusers(pair("qwen3", "llama"))
    free = rows(model.generate(PROMPTS, max_new_tokens=10, do_sample=False))
    end = free[0][2]
    expected = [row[: row.index(end) + 1] if end in row else row for row in free]
    assert len({len(row) for row in expected}) > 1
    kwargs = {"eos_token_id": end} if where == "argument" else {}
    if where == "config":
        model.receiver.model.generation_config.eos_token_id = [end]
    found = model.generate(PROMPTS, max_new_tokens=10, do_sample=False, pad_token_id=0, **kwargs)
    assert rows(found) == expected
    assert [result.new_tokens for result in found] == [len(row) for row in expected]
    assert [rows(model.generate(p, max_new_tokens=10, do_sample=False, **kwargs))[0] for p in PROMPTS] == expected


def test_a_row_that_met_its_stop_string_waits_without_adding_to_its_answer():
    model = open_fusers(pair("qwen3", "llama"))
    model.receiver.model.generation_config.eos_token_id = 511  # as every real model has one
    free = model.generate(PROMPTS, max_new_tokens=10, do_sample=False)
    word = model.receiver.tokenizer.decode(free[1].ids[1:3])
    kwargs = {"max_new_tokens": 10, "do_sample": False, "stop_strings": [word], "pad_token_id": 300}
    alone = [rows(model.generate(prompt, **kwargs))[0] for prompt in PROMPTS]
    assert len({len(row) for row in alone}) > 1
    assert rows(model.generate(PROMPTS, **kwargs)) == alone


def test_unknown_arguments_are_not_swallowed(opened):
    with pytest.raises(ValueError, match="temprature"):
        opened.generate("Hello", max_new_tokens=2, temprature=0.5)


def test_an_answer_prefix_is_read_and_not_repeated(opened):
    options = RenderOptions(answer_prefix="The answer is")
    result = opened.generate("Hello", options=options, max_new_tokens=3)
    assert result.prompt_tokens == opened.receiver.encode("Hello", options).length
    assert result.prompt_tokens > opened.receiver.encode("Hello").length
    assert not result.text.startswith("The answer is")


# -- results and reports -----------------------------------------------------------------------------------------------


def test_forms_of_a_prompt_and_forms_of_a_result(opened):
    single = opened.generate("Hello", max_new_tokens=3)
    assert isinstance(single, GenerationResult)
    for same in (
        [{"role": "user", "content": "Hello"}],
        [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}],
    ):
        assert opened.generate(same, max_new_tokens=3).ids.tolist() == single.ids.tolist()
    for batch in (["Hello"], [[{"role": "user", "content": "Hello"}]]):
        results = opened.generate(batch, max_new_tokens=3)
        assert isinstance(results, list)
        assert rows(results) == [single.ids.tolist()]
    assert rows(opened("Hello", max_new_tokens=3)) == rows(single)


def test_what_a_result_says(opened):
    result = opened.generate(PROMPTS[1], max_new_tokens=4, do_sample=False)
    assert result.ids.dtype == torch.long
    assert result.ids.dim() == 1
    assert result.new_tokens == 4
    assert result.text == str(result) == opened.receiver.tokenizer.decode(result.ids, skip_special_tokens=True)
    assert result.prompt_tokens == opened.receiver.encode(PROMPTS[1]).length
    assert 0 < result.seconds_to_first_token < result.seconds_total
    data = result.to_dict()
    assert data["text"] == result.text
    assert data["report"]["fused_tokens"] == result.report.fused_tokens
    alone = opened.receiver.answer(PROMPTS[1], max_new_tokens=4)
    assert alone.report is None
    assert alone.to_dict()["report"] is None


@pytest.mark.parametrize("prompts", [PROMPTS[1], PROMPTS], ids=["single", "batch"])
def test_what_a_report_says(opened, prompts):
    results = opened.generate(prompts, max_new_tokens=2)
    report = (results if isinstance(results, list) else [results])[0].report
    tokens = opened.receiver.encode(prompts)
    assert report.prompt_tokens == int(tokens.mask.sum())
    assert report.prompt_tokens == report.fused_tokens + sum(report.skipped_tokens.values())
    assert report.skipped_tokens["last token, run on the fused cache"] == tokens.rows
    assert report.fused_layers == [0, 1, 2, 3]
    assert report.skipped_layers == {}
    sharer = opened.sharers[0].geometry
    assert report.sharer_bytes == report.fused_tokens * len(report.fused_layers) * 2 * sharer.width * 4
    assert set(report.seconds) == {"sharer_prefill", "receiver_prefill", "fuse", "first_token", "decode"}
    assert all(seconds > 0 for seconds in report.seconds.values())
    assert 0 < report.gate_openness < 1
    assert report.trained is False
    assert report.to_dict()["sharer_bytes"] == report.sharer_bytes


def test_a_report_counts_a_position_once_for_two_sharers():
    receiver = Receiver(build("llama", 1), tokenizer("chatml"))
    sharers = [Sharer(build("qwen2", 2), tokenizer("llama3")), Sharer(build("qwen3", 3), tokenizer("human"))]
    model = C2CModel.from_models(receiver, sharers, layer_map=[None, 0, 1, 2, None])
    report = model.generate(PROMPTS, max_new_tokens=1).pop().report
    assert report.prompt_tokens == report.fused_tokens + sum(report.skipped_tokens.values())
    assert report.fused_layers == [1, 2, 3]
    assert set(report.skipped_layers) == {0, 4}
    width = sum(sharer.geometry.width for sharer in sharers)
    assert report.sharer_bytes == report.fused_tokens * 3 * 2 * width * 4


# -- streaming ---------------------------------------------------------------------------------------------------------


class Collector(BaseStreamer):
    def __init__(self):
        self.ids, self.ended = [], False

    def put(self, value):
        self.ids += value.flatten().tolist()

    def end(self):
        self.ended = True


def test_a_streamer_sees_every_token(opened):
    collector = Collector()
    result = opened.generate(PROMPTS[0], max_new_tokens=5, streamer=collector)
    prompt = opened.receiver.encode(PROMPTS[0]).ids[0].tolist()
    assert collector.ids == prompt + result.ids.tolist()
    assert collector.ended


def test_a_text_streamer_prints_the_answer(opened, capsys):
    streamer = TextStreamer(opened.receiver.tokenizer, skip_prompt=True, skip_special_tokens=True)
    result = opened.generate(PROMPTS[0], max_new_tokens=5, streamer=streamer)
    assert capsys.readouterr().out.rstrip("\n") == result.text.rstrip("\n")


@pytest.mark.parametrize("kwargs", [{"do_sample": False}, {"do_sample": True}], ids=["greedy", "sampling"])
def test_the_pieces_of_a_stream_join_to_the_answer(opened, kwargs):
    torch.manual_seed(4)
    stream = opened.stream(PROMPTS[1], max_new_tokens=16, **kwargs)
    pieces = list(stream)
    torch.manual_seed(4)
    result = opened.generate(PROMPTS[1], max_new_tokens=16, **kwargs)
    assert "".join(pieces) == result.text == stream.result.text
    assert len([piece for piece in pieces if piece]) > 1
    assert stream.result.ids.tolist() == result.ids.tolist()
    assert stream.result.report.fused_tokens == result.report.fused_tokens


def in_time(work, seconds=3):
    """What ``work`` returns; fails if it does not end."""
    box = []
    thread = threading.Thread(target=lambda: box.append(work()), daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "it waits for ever"
    return box[0]


def test_a_stream_that_has_ended_stays_ended(opened):
    """As the iterator protocol demands: asking again is an end again, and not a wait for ever."""
    stream = opened.stream(PROMPTS[0], max_new_tokens=2)
    assert list(stream)
    assert in_time(lambda: list(stream)) == []


def test_closing_a_stream_stops_the_work(opened):
    slow = threading.Event()

    class Wait:
        def __call__(self, ids, scores):
            slow.wait(0.02)
            return scores

    before = threading.active_count()
    with opened.stream(PROMPTS[0], max_new_tokens=200, logits_processor=[Wait()]) as stream:
        next(stream)
    assert threading.active_count() == before
    assert stream.result.new_tokens < 100


def test_a_stream_keeps_the_readers_own_criteria(opened):
    class After3:
        def __call__(self, ids, scores, **kwargs):
            return torch.full((ids.shape[0],), ids.shape[1] >= length + 3)

    length = opened.receiver.encode(PROMPTS[0]).length
    stream = opened.stream(PROMPTS[0], max_new_tokens=50, stopping_criteria=[After3()])
    list(stream)
    assert stream.result.new_tokens == 3


@pytest.mark.parametrize(
    ("prompt", "kwargs", "error"),
    [
        ("Hello", {"temprature": 1}, "temprature"),  # refused by generate
        ("word " * 600, {}, "made for 512"),  # refused before it
        ("Hello", {"num_beams": 2}, "streamer"),
    ],
)
def test_errors_in_the_thread_reach_the_reader(opened, prompt, kwargs, error):
    began = time.perf_counter()
    stream = opened.stream(prompt, max_new_tokens=4, **kwargs)
    with pytest.raises(ValueError, match=error):
        list(stream)
    assert time.perf_counter() - began < 20
    assert stream.result is None


def test_an_error_midway_reaches_the_reader_after_what_was_said(opened):
    class Breaks:
        def __init__(self):
            self.left = 4

        def __call__(self, ids, scores):
            self.left -= 1
            if not self.left:
                raise RuntimeError("broken pipe")
            return scores

    stream, pieces = opened.stream(PROMPTS[0], max_new_tokens=10, logits_processor=[Breaks()]), []
    with pytest.raises(RuntimeError, match="broken pipe"):
        pieces.extend(stream)
    assert stream.result is None


def test_only_one_conversation_is_streamed(opened):
    with pytest.raises(PromptError, match="only one conversation"):
        opened.stream(PROMPTS)
    assert (
        "".join(opened.stream(PROMPTS[:1], max_new_tokens=3, do_sample=False))
        == opened.generate(PROMPTS[0], max_new_tokens=3, do_sample=False).text
    )


# -- chat --------------------------------------------------------------------------------------------------------------


def test_every_turn_of_a_chat_is_a_fresh_run_of_its_messages(opened):
    chat = opened.chat("Be brief.", max_new_tokens=6, do_sample=False)
    answers = [chat.send(text) for text in ("Hello", "And now?", "Bye")]
    assert [m["role"] for m in chat.messages] == ["system", *["user", "assistant"] * 3]
    assert [m["content"] for m in chat.messages[2::2]] == [answer.text for answer in answers]
    for turn, answer in enumerate(answers):
        fresh = opened.generate(chat.messages[: 2 + 2 * turn], max_new_tokens=6, do_sample=False)
        assert fresh.ids.tolist() == answer.ids.tolist()
        assert fresh.report.fused_tokens == answer.report.fused_tokens
    assert answers[0].prompt_tokens < answers[1].prompt_tokens < answers[2].prompt_tokens


def test_a_turn_that_fails_is_not_remembered(opened):
    chat = opened.chat(max_new_tokens=3)
    chat.send("Hello")
    before = list(chat.messages)
    with pytest.raises(PromptError):
        chat.send("word " * 600)
    with pytest.raises(TypeError, match="num_return_sequences"):
        chat.send("Hello", num_return_sequences=2, do_sample=True)
    assert chat.messages == before
    assert chat.send("Again", max_new_tokens=2).new_tokens == 2


def test_a_prepared_prompt_can_be_decoded_by_hand(opened):
    prepared = opened.prefill(PROMPTS)
    assert kv_cache.length(prepared.cache) == prepared.tokens.length - 1
    ids = opened.receiver.generate(prepared.tokens, prepared.cache, max_new_tokens=5, do_sample=False)
    assert ids.tolist() == rows(opened.generate(PROMPTS, max_new_tokens=5, do_sample=False))


# -- the language-model head -------------------------------------------------------------------------------------------


class RowByRow(TorchDispatchMode):
    """Notes products of a batch of matrices with copies of one of them as large as the head."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.found = vocabulary, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.bmm.default and self.vocabulary in args[1].shape:
            self.found += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("keep", [1, 3])
def test_the_head_is_never_copied_once_for_each_row(family, keep):
    """transformers cuts the last states out of a batch; of such a view torch made one product per row."""
    receiver = Receiver(build(family), tokenizer("chatml"))
    Receiver(receiver.model, receiver.tokenizer)  # a model in two roles is still hooked once
    head = receiver.model.get_output_embeddings()
    assert len(head._forward_pre_hooks) == 1
    tokens = receiver.encode(PROMPTS)
    mode = RowByRow(head.out_features)
    with torch.no_grad(), mode:
        logits = logits_after(receiver.model, tokens.ids, tokens.mask, tokens.positions, None, keep=keep)
    assert mode.found == 0
    head._forward_pre_hooks.clear()
    with torch.no_grad(), mode:
        plain = logits_after(receiver.model, tokens.ids, tokens.mask, tokens.positions, None, keep=keep)
    assert mode.found == 1
    torch.testing.assert_close(logits, plain)
