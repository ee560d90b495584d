"""What can be wrong with token ids, masks and caches given by hand: an error with a way out, never a wrong answer."""

from __future__ import annotations

import pytest
import torch

from c2c import C2CModel, kv_cache
from c2c.errors import AlignmentError, C2CError, CacheError, FuserError, PromptError
from c2c.language_model import Receiver, Sharer
from c2c.tokens import left_pad
from tiny import build, pair, tokenizer

IDS = torch.arange(1, 13).reshape(2, 6)
FUSE = torch.tensor([True] * 5 + [False])


@pytest.fixture(scope="module")
def model():
    return pair("llama", "qwen2")


def run(model, ids=IDS, others=IDS, fuse_mask=FUSE, **kwargs):
    return model.generate_ids(ids, others, fuse_mask=fuse_mask, max_new_tokens=1, **kwargs)


def test_the_right_call_works(model):
    assert run(model).shape == (2, 1)
    assert run(model, IDS.tolist(), IDS.tolist(), FUSE.tolist()).tolist() == run(model).tolist()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ids": torch.zeros(1, 0).long()}, PromptError, "receiver_ids has shape"),
        ({"ids": torch.zeros(0, 4).long()}, PromptError, "receiver_ids has shape"),
        ({"ids": IDS.float()}, PromptError, r"torch.float32; expected integers"),
        ({"ids": IDS.reshape(1, 2, 6)}, PromptError, r"\(1, 2, 6\)"),
        ({"others": IDS[:, :5]}, AlignmentError, r"\(2, 6\), sharer_ids \(2, 5\).*one to one.*generate\(messages\)"),
        ({"others": IDS[:1]}, AlignmentError, "one to one"),
        ({"others": [IDS, IDS]}, PromptError, "2 tensors for 1 sharers"),
        ({"fuse_mask": FUSE[:4]}, PromptError, r"fuse_mask is .*expected \(2, 6\)"),
        ({"fuse_mask": FUSE.long() * 2}, PromptError, "bit mask 2; the largest here is 1"),
        ({"receiver_mask": torch.ones(2, 4)}, PromptError, r"receiver_mask is \(2, 4\)"),
        ({"sharer_mask": torch.ones(1, 6)}, PromptError, r"sharer_mask is \(1, 6\)"),
        ({"sections": [2, 2]}, PromptError, "sections"),
        ({"sections": [5, 5]}, PromptError, "sections"),
        ({"sections": [7, -1]}, PromptError, "sections"),
        ({"receiver_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2])}, PromptError, r"right-padded.*rows \[1\].*left"),
        ({"receiver_mask": torch.tensor([[1] * 6, [0] * 6])}, PromptError, "padding"),
    ],
)
def test_wrong_calls(model, change, error, message):
    with pytest.raises(error, match=message):
        run(model, **change)


def test_rows_need_a_token():
    for rows in ([], [[]], [[1], []]):
        with pytest.raises(PromptError, match="empty prompt"):
            left_pad(rows, 0)


def test_prompts_over_the_context_length_say_whose(model):
    long = torch.ones(1, 513).long()
    fuse = torch.tensor([True] * 512 + [False])
    with pytest.raises(PromptError, match="513 tokens for the receiver llama, which was made for 512"):
        run(model, long, long, fuse)
    short = build("qwen2", 2)
    short.config.max_position_embeddings = 5
    tight = C2CModel.from_models(model.receiver, Sharer(short, tokenizer("llama3"), "tight"))
    with pytest.raises(PromptError, match="6 tokens for the sharer tight, which was made for 5"):
        run(tight)
    assert run(tight, IDS[:, :5], IDS[:, :5], FUSE[1:]).shape == (2, 1)


def test_a_cache_of_the_whole_prompt_says_how_to_cut_it(model):
    tokens = model.receiver.encode("Hello there")
    cache = model.receiver.prefill(tokens)
    with pytest.raises(CacheError, match=rf"covers {tokens.length} tokens.*kv_cache.crop"):
        model.receiver.generate(tokens, cache, max_new_tokens=2)
    with pytest.raises(CacheError, match=r"kv_cache\.crop"):
        model.receiver.next_logits(tokens, cache)
    cut = model.receiver.generate(tokens, kv_cache.crop(cache, tokens.length - 1), max_new_tokens=4)
    assert cut.tolist() == [model.receiver.answer("Hello there", max_new_tokens=4).ids.tolist()]


def test_without_a_tokenizer_ids_still_work():
    bare = C2CModel.from_models(Receiver(build("llama", 1)), Sharer(build("qwen2", 2)))
    assert run(bare).shape == (2, 1)
    for call in (bare.generate, bare.receiver.answer, bare.stream, bare.chat().send):
        with pytest.raises(PromptError, match=r"receiver was loaded without a tokenizer.*generate_ids"):
            call("Hello")
    half = C2CModel.from_models(Receiver(build("llama", 1), tokenizer("chatml")), Sharer(build("qwen2", 2)))
    with pytest.raises(PromptError, match="sharer was loaded without a tokenizer"):
        half.generate("Hello")


def test_one_fuser_for_each_sharer(model):
    for sharers, fusers in (([], []), (model.sharers, []), (model.sharers * 2, list(model.fusers))):
        with pytest.raises(FuserError, match="one fuser per sharer"):
            C2CModel(model.receiver, sharers, fusers)


def test_every_error_is_one_family_and_the_builtin_kind(model):
    for error in (AlignmentError, CacheError, FuserError, PromptError):
        assert issubclass(error, C2CError)
        assert issubclass(error, ValueError)
    with pytest.raises(ValueError, match="empty"):
        model.generate("")


def test_padding_is_not_counted_as_a_skipped_token():
    model = pair()
    ids = torch.ones(2, 8, dtype=torch.long)
    real = torch.tensor([[1] * 8, [0] * 3 + [1] * 5])
    fuse_mask = torch.tensor([0, 0, 1, 1, 1, 1, 1, 0])
    report = model.fuse_ids(ids, ids, fuse_mask=fuse_mask, receiver_mask=real, sharer_mask=real).report
    assert report.prompt_tokens == 13 == report.fused_tokens + sum(report.skipped_tokens.values())
