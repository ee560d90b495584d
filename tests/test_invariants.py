"""The invariants of the design, over families, tokenizers, depths and KV geometries."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from c2c import C2CModel, kv_cache
from c2c.alignment import SpanAligner
from c2c.language_model import Receiver, Sharer
from c2c.prompting import RenderOptions, encode, render, text_tokens
from c2c.rope import Rotary, tables
from tiny import WINDOW, build, open_fusers, pair, tokenizer

PAIRS = [("llama", "qwen2"), ("qwen2", "llama"), ("qwen3", "gemma3"), ("gemma3", "qwen3"), ("gemma3", "llama")]
PROMPTS = [
    "Hello world!",
    "What is the capital of France? Explain step by step, slowly and in many words.",
    "A 你好 🙂",
]
slow = settings(derandomize=True, max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


def close(a, b, tolerance=2e-4):
    return torch.allclose(a, b, atol=tolerance * max(1.0, float(b.abs().max())))


@pytest.fixture(scope="module", params=PAIRS, ids="-".join)
def closed(request):
    return pair(*request.param)


@pytest.fixture(scope="module", params=PAIRS, ids="-".join)
def opened(request):
    return open_fusers(pair(*request.param))


@pytest.mark.parametrize("prompt", PROMPTS)
def test_untrained_fuser_changes_nothing_bit_for_bit(closed, prompt):
    fused = closed.prefill(prompt)
    own = closed.receiver.prefill(fused.tokens, fused.tokens.length - 1)
    for (keys, values), (own_keys, own_values) in zip(kv_cache.layers(fused.cache), kv_cache.layers(own), strict=True):
        assert torch.equal(keys, own_keys)
        assert torch.equal(values, own_values)
    logits = closed.receiver.next_logits(fused.tokens, fused.cache)
    assert torch.equal(logits, closed.receiver.next_logits(fused.tokens, own))
    answers = [
        m.ids.tolist()
        for m in (closed.generate(prompt, max_new_tokens=8), closed.receiver.answer(prompt, max_new_tokens=8))
    ]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("receiver", ["llama", "gemma3"])
def test_closed_gates_of_the_published_fuser_change_nothing_bit_for_bit(receiver):
    model = pair(receiver, "qwen3", fuser="c2c", fuser_options={"hidden_dim": 16, "intermediate_dim": 16})
    fused = model.prefill(PROMPTS[1])
    own = model.receiver.prefill(fused.tokens, fused.tokens.length - 1)
    assert all(
        torch.equal(a, b)
        for a, b in zip(sum(kv_cache.layers(fused.cache), ()), sum(kv_cache.layers(own), ()), strict=True)
    )


def test_batch_equals_singles_and_permutes(opened):
    together = opened.prefill(PROMPTS)
    answers = [result.ids.tolist() for result in opened.generate(PROMPTS, max_new_tokens=8)]
    for row, prompt in enumerate(PROMPTS):
        alone = opened.prefill(prompt)
        n = kv_cache.length(alone.cache)
        for (keys, values), (one_keys, one_values) in zip(
            kv_cache.layers(together.cache), kv_cache.layers(alone.cache), strict=True
        ):
            assert close(keys[row, :, -n:], one_keys[0])
            assert close(values[row, :, -n:], one_values[0])
        assert opened.generate(prompt, max_new_tokens=8).ids.tolist() == answers[row]
    order = [2, 0, 1]
    permuted = opened.generate([PROMPTS[i] for i in order], max_new_tokens=8)
    assert [result.ids.tolist() for result in permuted] == [answers[i] for i in order]


def test_only_the_aligned_positions_change(opened):
    prompt = opened.aligner.align(
        opened.receiver.tokenizer,
        [opened.sharers[0].tokenizer],
        [[{"role": "user", "content": p}] for p in PROMPTS],
        RenderOptions(),
    )[0]
    fused = opened.fuse_prompts([prompt])
    own = opened.receiver.prefill(prompt.receiver, prompt.receiver.length - 1)
    alignment = prompt.chunks[0].alignments[0]
    touched = torch.zeros(3, prompt.receiver.length - 1, dtype=torch.bool)
    touched[alignment.rows, alignment.receiver] = True
    assert not touched[~prompt.receiver.mask[:, :-1]].any()  # padding
    for (keys, values), (own_keys, own_values) in zip(kv_cache.layers(fused.cache), kv_cache.layers(own), strict=True):
        assert keys.shape == own_keys.shape
        for new, old in ((keys, own_keys), (values, own_values)):
            changed = (new != old).any(-1).any(1)
            assert torch.equal(changed, touched)


def test_the_content_of_the_message_matters(opened):
    """The same receiver prompt with another sharer prompt gives another cache."""
    align = opened.aligner.align
    batch = [[{"role": "user", "content": "Hello world!"}]], [[{"role": "user", "content": "Jello morld?"}]]
    ours, other = (
        align(opened.receiver.tokenizer, [opened.sharers[0].tokenizer], b, RenderOptions())[0] for b in batch
    )
    alignment = ours.chunks[0].alignments[0]
    if int(alignment.sharer.max()) >= other.sharers[0].length:
        pytest.skip("tokenised to another length")
    swapped = type(ours)(ours.receiver, other.sharers, ours.chunks, ours.skipped)
    a, b = (kv_cache.layer(opened.fuse_prompts([p]).cache, 0)[1] for p in (ours, swapped))
    assert not torch.allclose(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cache_keeps_the_receivers_dtype(dtype):
    receiver = Receiver(build("llama", 1).to(dtype), tokenizer("chatml"))
    model = open_fusers(C2CModel.from_models(receiver, Sharer(build("qwen2", 2), tokenizer("llama3"))), 0.1)
    fused = model.prefill(PROMPTS)
    assert {t.dtype for pair_ in kv_cache.layers(fused.cache) for t in pair_} == {dtype}
    assert len(model.generate(PROMPTS, max_new_tokens=3)) == 3


def test_gemma_keeps_every_token_beyond_its_window():
    model = pair("gemma3", "gemma3")
    prompt = "the quick brown fox " * 10
    fused = model.prefill(prompt)
    assert fused.tokens.length > 3 * WINDOW
    assert {keys.shape[2] for keys, _ in kv_cache.layers(fused.cache)} == {fused.tokens.length - 1}
    plain = model.receiver.model.generate(
        input_ids=fused.tokens.ids, attention_mask=fused.tokens.mask.long(), max_new_tokens=8, pad_token_id=0
    )
    assert model.generate(prompt, max_new_tokens=8).ids.tolist() == plain[0, fused.tokens.length :].tolist()


# -- decoding is the receiver's own generate ---------------------------------------------------------------------------


def plain_generate(model, prompt, **kwargs):
    tokens = model.receiver.encode(prompt)
    torch.manual_seed(5)
    out = model.receiver.model.generate(
        input_ids=tokens.ids, attention_mask=tokens.mask.long(), max_new_tokens=8, pad_token_id=0, **kwargs
    )
    return out[:, tokens.length :].tolist()


def ours_generate(model, prompt, **kwargs):
    torch.manual_seed(5)
    results = model.generate(prompt, max_new_tokens=8, pad_token_id=0, **kwargs)
    return [result.ids.tolist() for result in (results if isinstance(results, list) else [results])]


@pytest.mark.parametrize(
    "kwargs",
    [
        {"do_sample": True, "temperature": 0.8, "top_p": 0.9},
        {"num_beams": 3, "do_sample": False},
        {"num_beams": 3, "num_return_sequences": 2, "do_sample": False},
        {"do_sample": True, "num_return_sequences": 4},
        {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("prompt", [PROMPTS[0], PROMPTS], ids=["single", "batch"])
def test_closed_fuser_decodes_as_plain_generate(closed, kwargs, prompt):
    assert ours_generate(closed, prompt, **kwargs) == plain_generate(closed, prompt, **kwargs)


def test_beams_from_an_open_fuser_equal_beams_from_its_cache(opened):
    results = opened.generate(PROMPTS, max_new_tokens=6, num_beams=3, num_return_sequences=2, do_sample=False)
    assert len(results) == 6
    alone = opened.generate(PROMPTS[1], max_new_tokens=6, num_beams=3, num_return_sequences=2, do_sample=False)
    assert [r.ids.tolist() for r in results[2:4]] == [r.ids.tolist() for r in alone]


def test_stop_strings_and_logits_processors(opened):
    free = opened.generate(PROMPTS[1], max_new_tokens=12, do_sample=False)
    word = opened.receiver.tokenizer.decode(free.ids[:1])
    stopped = opened.generate(PROMPTS[1], max_new_tokens=12, do_sample=False, stop_strings=[word])
    assert stopped.new_tokens <= free.new_tokens
    assert word in stopped.text

    def only_token_7(ids, scores):
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([7]), 0.0)

    forced = opened.generate(PROMPTS[0], max_new_tokens=3, logits_processor=[only_token_7])
    assert forced.ids.tolist() == [7, 7, 7]


def test_unknown_arguments_are_not_swallowed(opened):
    with pytest.raises(ValueError, match="temprature"):
        opened.generate("Hello", max_new_tokens=2, temprature=0.5)


def test_stream_gives_the_same_text(opened):
    stream = opened.stream(PROMPTS[1], max_new_tokens=10, do_sample=False)
    text = "".join(stream)
    assert stream.result is not None
    assert text == opened.generate(PROMPTS[1], max_new_tokens=10, do_sample=False).text == stream.result.text


def test_a_stream_can_be_closed_and_passes_errors_on(opened):
    with opened.stream(PROMPTS[0], max_new_tokens=400) as stream:
        next(stream)
    assert stream.result is None or stream.result.new_tokens < 400
    with pytest.raises(ValueError, match="temprature"):
        list(opened.stream(PROMPTS[0], temprature=1))


def test_chat_turns_equal_a_fresh_run(opened):
    chat = opened.chat(max_new_tokens=5, do_sample=False)
    chat.send("Hello")
    second = chat.send("And now?")
    fresh = opened.generate(chat.messages[:-1], max_new_tokens=5, do_sample=False)
    assert second.ids.tolist() == fresh.ids.tolist()
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2


def test_report_and_result(opened):
    result = opened.generate(PROMPTS[1], max_new_tokens=4)
    report = result.report
    assert report.prompt_tokens == result.prompt_tokens == report.fused_tokens + sum(report.skipped_tokens.values())
    assert set(report.seconds) == {"sharer_prefill", "receiver_prefill", "fuse", "first_token", "decode"}
    assert 0 < result.seconds_to_first_token <= result.seconds_total
    assert report.gate_openness == pytest.approx(0.5)
    assert report.sharer_bytes > 0
    assert report.trained is False
    assert str(result) == result.text
    assert result.to_dict()["report"]["fused_tokens"] == report.fused_tokens


def test_two_sharers_with_their_own_tokenizers():
    receiver = Receiver(build("llama", 1), tokenizer("chatml"))
    sharers = [Sharer(build("qwen2", 2), tokenizer("llama3")), Sharer(build("gemma3", 4), tokenizer("metaspace"))]
    models = {
        mode: open_fusers(C2CModel.from_models(receiver, sharers, mode=mode)) for mode in ("sequential", "parallel")
    }
    caches = {mode: kv_cache.layer(model.prefill(PROMPTS).cache, 2)[1] for mode, model in models.items()}
    assert not torch.allclose(caches["sequential"], caches["parallel"])
    # in parallel the order of the sharers does not matter
    swapped = C2CModel(receiver, sharers[::-1], list(models["parallel"].fusers)[::-1], mode="parallel")
    assert close(kv_cache.layer(swapped.prefill(PROMPTS).cache, 2)[1], caches["parallel"])


def test_partial_layer_maps_leave_other_layers_alone():
    model = open_fusers(pair("llama", "qwen2", layer_map=[None, 0, None, 2, None]))
    fused = model.prefill(PROMPTS[1])
    own = model.receiver.prefill(fused.tokens, fused.tokens.length - 1)
    same = [torch.equal(a[0], b[0]) for a, b in zip(kv_cache.layers(fused.cache), kv_cache.layers(own), strict=True)]
    assert same == [True, False, True, False, True]
    assert fused.report.fused_layers == [1, 3]
    assert set(fused.report.skipped_layers) == {0, 2, 4}


# -- rotary embedding --------------------------------------------------------------------------------------------------


@slow
@given(st.integers(0, 2**20), st.integers(0, 400))
def test_rotary_undo_inverts_apply(seed, position):
    generator = torch.Generator().manual_seed(seed)
    angles = torch.rand(1, 3, 4, generator=generator) * position
    angles = torch.cat([angles, angles], dim=-1)
    x = torch.randn(1, 2, 3, 12, generator=generator)  # 8 of 12 channels are rotated
    table = Rotary(1.3 * angles.cos(), 1.3 * angles.sin())
    assert torch.allclose(table.undo(table.apply(x)), x, atol=1e-5)
    assert torch.equal(table.apply(x)[..., 8:], x[..., 8:])


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3"])
def test_keys_without_rotation_do_not_depend_on_the_position(family):
    model = Receiver(build(family))
    model.check_rotary()
    table = tables(model.model, torch.tensor([[0], [7]]))
    keys = kv_cache.layer(model._probe, 1)[0]
    assert not torch.allclose(keys[0], keys[1], atol=1e-3)
    bare = table[1].undo(keys)
    assert torch.allclose(bare[0], bare[1], atol=1e-4)


# -- span alignment ----------------------------------------------------------------------------------------------------

words = st.lists(
    st.sampled_from(["user", "assistant", "Hello", "你好", "🙂", "a", "\n", "  ", "<", "naïve", "system", "x=1;", "é"]),
    min_size=1,
    max_size=12,
).map(" ".join)
texts = st.one_of(words, st.text(min_size=1, max_size=30)).filter(lambda text: text.strip() and "\ue000" not in text)
NAMES = ["chatml", "chatml_sys", "llama3", "metaspace", "human"]


@slow
@given(texts, st.sampled_from(NAMES), st.sampled_from(NAMES))
def test_spans_point_at_the_message(text, name, other):
    del other
    rendered = render(tokenizer(name), [{"role": "user", "content": text}], RenderOptions())
    found = rendered.spans[0]
    assert found is not None
    (start, end), offset = found
    piece = rendered.text[start:end]
    assert piece == text[offset : offset + len(piece)]
    assert piece.strip() == text.strip()


@slow
@given(texts, st.sampled_from(NAMES), st.sampled_from(NAMES))
def test_alignment_takes_the_token_of_the_last_character(text, name, other):
    conversation = [{"role": "user", "content": text}]
    ours, theirs = (encode(tokenizer(n), render(tokenizer(n), conversation, RenderOptions())) for n in (name, other))
    pairs = SpanAligner().pairs(ours, theirs)
    owner = text_tokens(ours)
    first = owner.index(0)
    last = max(i for i, message in enumerate(owner) if message == 0)
    assert all(target is None for target in pairs[:first])
    assert all(target == len(theirs.ids) - 1 for target in pairs[last + 1 :])
    inside = pairs[first : last + 1]
    assert inside == sorted(inside)
    (start, end), offset = ours.rendered.spans[0]
    (other_start, other_end), other_offset = theirs.rendered.spans[0]
    for token, target in zip(range(first, last + 1), inside, strict=True):
        character = min(ours.offsets[token][1], end) - 1 - start + offset
        place = min(max(character - other_offset + other_start, other_start), other_end - 1)
        begin, stop = theirs.offsets[target]
        assert begin <= place
        assert stop > place or stop == begin or target + 1 == len(theirs.ids) or theirs.offsets[target + 1][0] > place
    if name == other:
        assert list(inside) == list(range(first, last + 1)) or any(
            ours.offsets[i][1] > ours.offsets[i + 1][0]
            for i in range(first, last)  # a character split over two tokens
        )


def test_repeated_and_multi_turn_messages_are_told_apart():
    conversation = [
        {"role": "system", "content": "user"},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Hello"},
    ]
    rendered = render(tokenizer("chatml"), conversation, RenderOptions())
    spans = [found[0] for found in rendered.spans]
    assert spans == sorted(spans)
    assert len(set(spans)) == 4
    dropped = render(tokenizer("human"), conversation, RenderOptions())
    assert dropped.spans[0] is None
    assert all(found is not None for found in dropped.spans[1:])


def test_template_between_turns_takes_what_was_read_so_far():
    conversation = [{"role": r, "content": c} for r, c in (("user", "Hello"), ("assistant", "Fine"), ("user", "Bye"))]
    ours, theirs = (
        encode(tokenizer(n), render(tokenizer(n), conversation, RenderOptions())) for n in ("chatml", "llama3")
    )
    pairs, owner, other = SpanAligner().pairs(ours, theirs), text_tokens(ours), text_tokens(theirs)
    for message in (0, 1):
        place = max(i for i, m in enumerate(owner) if m == message) + 1
        assert owner[place] is None
        assert pairs[place] == min(i for i, m in enumerate(other) if m == message + 1) - 1
