"""Systems: every way of answering stands behind one interface, and is what its parts say it is."""

import pytest
import torch

from c2c.errors import PromptError, SystemUnavailableError
from c2c.prompting import RenderOptions, with_passage
from c2c.systems import System, SystemOptions, make_system, systems
from c2c.systems.text_to_text import summary_request
from tiny import open_fusers, pair

PROMPTS = ["hello there", "the cat sat on the mat again", "why is the sky blue?"]
PASSAGES = ["The fox sleeps in a red house.", "A dog went to the market with a cat.", "Rain fell all day."]
SHARED = ["receiver", "sharer", "text", "text_published", "c2c", "matched", "deranged", "zero", "untrained"]
PRIVATE = ["receiver", "reader", "sharer", "text", "summary_8", "draft_text", "c2c", "matched", "deranged", "zero"]
GREEDY = {"max_new_tokens": 4, "do_sample": False}


@pytest.fixture(scope="module")
def shared():
    return open_fusers(pair(fuser_options={"rank": 8}))


@pytest.fixture(scope="module")
def private():
    model = pair(fuser="memory", fuser_options={"rank": 8})
    fuser = model.fusers[0]
    with torch.no_grad():
        torch.nn.init.normal_(fuser.weight, std=0.3)
    fuser.config.training = {"step": 1}
    return model


def make(name, model, **options):
    return make_system(name, model, SystemOptions(message_tokens=6, **options))


def texts(results):
    return [result.text for result in results]


CASES = [*((name, None) for name in SHARED), *((name, PASSAGES) for name in (*PRIVATE, "draft"))]


@pytest.mark.parametrize(("name", "passages"), CASES, ids=lambda x: "private" if x == PASSAGES else x)
def test_a_batch_equals_its_single_prompts(shared, private, name, passages):
    model = private if passages else shared
    together = make(name, model, draft_tokens=3).generate(PROMPTS, passages, **GREEDY)
    for index, result in enumerate(together):
        following = (index + 1) % len(PROMPTS)
        system = make(name, model, draft_tokens=3, other=(passages or PROMPTS)[following])
        alone = system.generate(PROMPTS[index], passages and passages[index], **GREEDY)
        assert (alone.text, alone.prompt_tokens) == (result.text, result.prompt_tokens)


def test_a_deranged_draft_is_that_of_another_conversation(private):
    system = make("draft_deranged", private, draft_tokens=3)
    results = system.generate(PROMPTS[:2], PASSAGES[:2], **GREEDY)
    for prompt, place, result in zip(PROMPTS, (1, 0), results, strict=False):
        asked = with_passage([{"role": "user", "content": PROMPTS[place]}], PASSAGES[place])
        handoff = private.sharers[0].read(asked, draft_tokens=3)
        assert private.generate(prompt, sharer_messages=handoff, **GREEDY).text == result.text


def test_systems_are_what_their_parts_say(shared):
    receiver, sharer = shared.receiver, shared.sharers[0]
    assert texts(make("receiver", shared).generate(PROMPTS, **GREEDY)) == texts(receiver.answer(PROMPTS, **GREEDY))
    assert texts(make("sharer", shared).generate(PROMPTS, **GREEDY)) == texts(sharer.answer(PROMPTS, **GREEDY))
    assert texts(make("c2c", shared).generate(PROMPTS, **GREEDY)) == texts(shared.generate(PROMPTS, **GREEDY))
    untrained = make("untrained", shared).generate(PROMPTS, **GREEDY)
    assert texts(untrained) == texts(receiver.answer(PROMPTS, **GREEDY))


def test_text_to_text_hands_over_what_the_sharer_wrote(shared):
    system = make("text", shared)
    result = system.generate(PROMPTS[0], **GREEDY)
    request = [{"role": "user", "content": system.request.format(question=PROMPTS[0])}]
    written = shared.sharers[0].answer(request, max_new_tokens=6, do_sample=False)
    assert result.message.text == written.text == result.to_dict()["message"]
    conversation = [*request, {"role": "assistant", "content": written.text}, {"role": "user", "content": PROMPTS[0]}]
    assert result.text == shared.receiver.answer(conversation, **GREEDY).text
    assert result.seconds_to_first_token > result.message.seconds_total


def test_a_summary_takes_the_place_of_the_passage(private):
    result = make("summary_6", private).generate(PROMPTS[0], PASSAGES[0], **GREEDY)
    written = private.sharers[0].answer(summary_request(PASSAGES[0], 6), max_new_tokens=6, do_sample=False)
    expected = with_passage([{"role": "user", "content": PROMPTS[0]}], written.text)
    assert result.text == private.receiver.answer(expected, **GREEDY).text


def test_a_draft_is_handed_over_with_what_was_read(private):
    asked = with_passage([{"role": "user", "content": PROMPTS[0]}], PASSAGES[0])
    handoff = private.sharers[0].read(asked, draft_tokens=3)
    expected = private.generate(PROMPTS[0], sharer_messages=handoff, **GREEDY)
    for name in ("draft", "c2c"):
        assert make(name, private, draft_tokens=3).generate(PROMPTS[0], PASSAGES[0], **GREEDY).text == expected.text


def test_controls_change_the_cache_and_nothing_else(shared):
    prefilled = {name: make(name, shared).prefill(PROMPTS) for name in ("c2c", "deranged", "zero")}
    values = {name: prompt.cache.layers[0].values for name, prompt in prefilled.items()}
    assert torch.equal(prefilled["c2c"].tokens.ids, prefilled["deranged"].tokens.ids)
    assert not torch.equal(values["c2c"], values["deranged"])
    assert not torch.equal(values["c2c"], values["zero"])


def test_blend_zero_is_the_receiver(shared):
    closed = make("c2c", shared, blend=0.0).generate(PROMPTS, **GREEDY)
    assert texts(closed) == texts(shared.receiver.answer(PROMPTS, **GREEDY))


@pytest.mark.parametrize("name", ["receiver", "sharer", "text", "c2c"])
def test_a_stream_and_a_chat_equal_generate(shared, name):
    system = make(name, shared)
    stream = system.stream(PROMPTS[0], **GREEDY)
    assert "".join(stream) == stream.result.text == system.generate(PROMPTS[0], **GREEDY).text
    chat = system.chat(**GREEDY)
    assert chat.send(PROMPTS[0]).text == stream.result.text


def test_closing_a_stream_ends_the_sharers_writing(shared):
    stream = make_system("text", shared, SystemOptions(message_tokens=300)).stream(PROMPTS[0], **GREEDY)
    stream.close()
    assert stream.result.message.new_tokens < 300


def test_reports_of_rows_add_up(shared):
    report = make("c2c", shared).prefill(PROMPTS).report
    rows = [report.row(index) for index in range(len(PROMPTS))]
    for count in ("prompt_tokens", "fused_tokens", "sharer_bytes"):
        assert sum(getattr(row, count) for row in rows) == getattr(report, count)
    single = make("c2c", shared).prefill(PROMPTS[1]).report
    assert rows[1].skipped_tokens == single.skipped_tokens
    assert rows[1].sharer_bytes == single.sharer_bytes


@pytest.mark.parametrize(("name", "words"), [("nothing", "unknown system"), ("adapter", "folder"), ("recever", "mean")])
def test_what_can_not_answer_says_why(shared, name, words):
    with pytest.raises(SystemUnavailableError, match=words):
        make(name, shared)


def test_a_sharer_that_only_shares_can_not_write(shared, monkeypatch):
    monkeypatch.setattr(shared.sharers[0], "generates", False)
    for name in ("sharer", "text"):
        with pytest.raises(SystemUnavailableError, match="another machine"):
            make(name, shared)
    assert make("c2c", shared).generate(PROMPTS[0], **GREEDY).text


def test_wrong_inputs_are_refused(shared, private):
    with pytest.raises(PromptError, match="at least two"):
        make("deranged", shared).generate(PROMPTS[0], **GREEDY)
    with pytest.raises(PromptError, match="user message"):
        make("text", shared).generate([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    handoff = private.sharers[0].read(PASSAGES[0])
    with pytest.raises(PromptError, match="handoff"):
        make("reader", private).generate(PROMPTS[0], handoff, **GREEDY)
    with pytest.raises(PromptError, match="2 private contexts"):
        make("reader", private).generate(PROMPTS, PASSAGES[:2], **GREEDY)


@pytest.mark.parametrize("name", ["c2c", "matched", "deranged", "zero", "draft"])
def test_private_context_is_given_exactly_where_it_is_taken(shared, private, name):
    """A context that is dropped without a word would be a wrong answer."""
    with pytest.raises(PromptError, match="both models read"):
        make(name, shared, draft_tokens=3).generate(PROMPTS, PASSAGES, **GREEDY)
    with pytest.raises(PromptError, match="sharer_messages"):
        make(name, private, draft_tokens=3).generate(PROMPTS, **GREEDY)


def test_one_other_conversation_is_expected(shared):
    with pytest.raises(PromptError, match="expected one"):
        make("deranged", shared, other=PROMPTS).generate(PROMPTS, **GREEDY)


def test_raw_text_is_continued_without_a_template(shared):
    options = RenderOptions(chat_template=False)
    for name in ("receiver", "sharer", "c2c"):
        prompt = make(name, shared).prefill("once upon a time", options=options)
        ids = prompt.model.tokenizer("once upon a time").input_ids
        assert prompt.tokens.ids[0].tolist() == ids


def test_a_new_system_is_one_class(shared):
    class Shouting(System):
        name, title = "shouting", "receiver in capitals"

        def prefill(self, messages, sharer_messages=None, *, options=None):
            return self.model.receiver.prefill_messages(messages.upper(), options)

    systems.cache_clear()
    assert make("shouting", shared).generate("hi", **GREEDY).text == shared.receiver.answer("HI", **GREEDY).text
