"""What a user can get wrong is an error that says what was given, what was expected and what to do."""

from __future__ import annotations

import pytest
import torch

from c2c import C2CModel, kv_cache
from c2c.errors import AlignmentError, C2CError, CacheError, FuserError, MismatchError, ModelLoadError, PromptError
from c2c.fusers.base import load_fuser
from c2c.language_model import Receiver
from c2c.loading import load
from c2c.published import import_published
from c2c.sharer import Sharer
from c2c.tokens import left_pad
from tiny import FIXTURES, build, pair, tokenizer

A = FIXTURES / "pair_a"
IDS = torch.arange(1, 13).reshape(2, 6)
FUSE = torch.tensor([True] * 5 + [False])


@pytest.fixture(scope="module")
def model():
    return pair()


def run(model, ids=IDS, others=IDS, fuse_mask=FUSE, **kwargs):
    return model.generate_ids(ids, others, fuse_mask=fuse_mask, max_new_tokens=1, **kwargs)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "empty"),
        ([], "empty"),
        ([""], "empty"),
        ([{"role": "user", "content": ""}], "empty"),
        (None, "messages"),
        (7, "messages"),
        ([{"content": "x"}], "role"),
        ([{"role": "user"}], "content"),
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], "only parts of text"),
        ("word " * 400, "made for 512"),
    ],
)
def test_prompts(model, prompt, message):
    with pytest.raises(PromptError, match=message):
        model.generate(prompt, max_new_tokens=1)


def test_a_template_that_refuses_a_role():
    strict = tokenizer("chatml")
    strict.chat_template = "{{ raise_exception('no system') if messages[0]['role'] == 'system' else 'Hi' }}"
    with pytest.raises(PromptError, match="no system"):
        Receiver(build("llama"), strict).answer([{"role": "system", "content": "x"}, {"role": "user", "content": "y"}])


def test_without_a_tokenizer_ids_still_work():
    bare = C2CModel.from_models(Receiver(build("llama", 1)), Sharer(build("qwen2", 2)))
    assert run(bare).shape == (2, 1)
    for call in (bare.generate, bare.receiver.answer, bare.stream, bare.chat().send):
        with pytest.raises(PromptError, match=r"receiver was loaded without a tokenizer.*generate_ids"):
            call("Hello")
    half = C2CModel.from_models(Receiver(build("llama", 1), tokenizer("chatml")), Sharer(build("qwen2", 2)))
    with pytest.raises(PromptError, match="sharer was loaded without a tokenizer"):
        half.generate("Hello")


def test_tokenizers():
    class Slow:
        is_fast = False

    with pytest.raises(PromptError, match="slow tokenizer"):
        load(build("llama"), tokenizer=Slow())
    with pytest.raises(PromptError, match="both models"):
        C2CModel.from_models(build("llama"), build("qwen2"), tokenizer=tokenizer("chatml"))


def test_token_ids_as_tensors_and_as_lists(model):
    assert run(model).shape == (2, 1)
    assert run(model, IDS.tolist(), IDS.tolist(), FUSE.tolist()).tolist() == run(model).tolist()
    sharers = [Sharer(build("qwen2", 2)), Sharer(build("qwen3", 3))]
    several = C2CModel.from_models(Receiver(build("llama", 1)), sharers)
    lists = [[[5, 6, 7, 8]], [[8, 7, 6, 5]]]
    for others in (lists, [torch.tensor(ids) for ids in lists]):
        assert run(several, [5, 6, 7, 8], others, [True, True, True, False]).shape == (1, 1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ids": torch.zeros(1, 0).long()}, PromptError, "receiver_ids has shape"),
        ({"ids": torch.zeros(0, 4).long()}, PromptError, "receiver_ids has shape"),
        ({"ids": IDS.float()}, PromptError, r"torch.float32; expected integers"),
        ({"ids": IDS.reshape(1, 2, 6)}, PromptError, r"\(1, 2, 6\)"),
        ({"ids": IDS + 600}, PromptError, "0 to 511"),
        ({"others": IDS + 600}, PromptError, "sharer.* 0 to 511"),
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
def test_wrong_token_ids_and_masks(model, change, error, message):
    with pytest.raises(error, match=message):
        run(model, **change)


def test_rows_need_a_token():
    for rows in ([], [[]], [[1], []]):
        with pytest.raises(PromptError, match="empty prompt"):
            left_pad(rows, 0)


def test_a_mask_that_fuses_nothing_is_warned_of(model):
    with pytest.warns(UserWarning, match="never fused"):
        run(model, fuse_mask=torch.ones(6).bool())


def test_prompts_over_the_context_length_name_the_model(model):
    long = torch.ones(1, 513).long()
    with pytest.raises(PromptError, match="513 tokens for the receiver llama, which was made for 512"):
        run(model, long, long, torch.arange(513) < 512)
    short = build("qwen2", 2)
    short.config.max_position_embeddings = 5
    tight = C2CModel.from_models(model.receiver, Sharer(short, tokenizer("llama3"), "tight"))
    with pytest.raises(PromptError, match="6 tokens for the sharer tight, which was made for 5"):
        run(tight)
    assert run(tight, IDS[:, :5], IDS[:, :5], FUSE[1:]).shape == (2, 1)


def test_padding_is_not_counted_as_a_skipped_token(model):
    ids = torch.ones(2, 8, dtype=torch.long)
    real = torch.tensor([[1] * 8, [0] * 3 + [1] * 5])
    fuse_mask = torch.tensor([0, 0, 1, 1, 1, 1, 1, 0])
    report = model.fuse_ids(ids, ids, fuse_mask=fuse_mask, receiver_mask=real, sharer_mask=real).report
    assert report.prompt_tokens == 13 == report.fused_tokens + sum(report.skipped_tokens.values())


def test_a_cache_that_does_not_fit_the_tokens(model):
    receiver = model.receiver
    tokens = receiver.encode("Hello there")
    with pytest.raises(CacheError, match="rows"):
        receiver.generate(tokens, receiver.prefill(receiver.encode(["Hello", "Bye"]), 3), max_new_tokens=1)
    cache = receiver.prefill(tokens)
    for call in (receiver.generate, receiver.next_logits):
        with pytest.raises(CacheError, match=rf"covers {tokens.length} tokens.*kv_cache\.crop"):
            call(tokens, cache)
    cut = receiver.generate(tokens, kv_cache.crop(cache, tokens.length - 1), max_new_tokens=4)
    assert cut.tolist() == [receiver.answer("Hello there", max_new_tokens=4).ids.tolist()]


@pytest.mark.parametrize("name", ["./nothing", "nothing.gguf", "/no/such/folder"])
def test_models_that_do_not_exist(name):
    with pytest.raises(ModelLoadError, match="no such"):
        Receiver.from_pretrained(name)


def test_identity_does_not_depend_on_dtype_or_path():
    a, b = Receiver(build("llama"), name="a"), Receiver(build("llama").to(torch.bfloat16), name="b")
    assert a.identity.weights == b.identity.weights
    assert a.identity.weights != Receiver(build("llama", 1)).identity.weights


def test_folders_that_hold_no_fuser(tmp_path):
    sharers = [Sharer(build("qwen2", 2)), Sharer(build("qwen3", 3))]
    C2CModel.from_models(Receiver(build("llama", 1)), sharers).save_pretrained(tmp_path / "two")
    (tmp_path / "empty").mkdir()
    for folder, error, message in [
        (tmp_path / "empty", FuserError, "holds no fuser"),
        (tmp_path / "two", FuserError, "fuser_1, fuser_2"),
        (A / "checkpoint" / "final", FuserError, "published checkpoint"),
        (A / "receiver", FuserError, "not a fuser"),
        (tmp_path / "nothing", ModelLoadError, "no such folder"),
    ]:
        with pytest.raises(error, match=message):
            load_fuser(folder)


@pytest.mark.parametrize(
    ("options", "known"),
    [({"fuser": "botleneck"}, "bottleneck"), ({"mode": "serial"}, "sequential"), ({"layer_map": "last"}, "terminal")],
)
def test_unknown_names(options, known):
    with pytest.raises(FuserError, match=known):
        pair(**options)


def test_one_fuser_for_each_sharer(model):
    for sharers, fusers in (([], []), (model.sharers, []), (model.sharers * 2, list(model.fusers))):
        with pytest.raises(FuserError, match="one fuser per sharer"):
            C2CModel(model.receiver, sharers, fusers)


def test_an_imported_fuser_keeps_the_identity_of_its_models(tmp_path):
    parts = {"receiver": A / "receiver", "sharer": A / "sharer"}
    C2CModel.from_published(A / "checkpoint", **parts).save_pretrained(tmp_path / "a")
    again = C2CModel.from_pretrained(tmp_path / "a")  # named in the fuser
    assert again.receiver.identity.architecture == "Qwen3ForCausalLM"
    altered, _, _ = load(A / "sharer")
    with torch.no_grad():
        next(altered.parameters()).add_(1.0)
    with pytest.raises(MismatchError, match="sharer weights"):
        C2CModel.from_pretrained(tmp_path / "a", receiver=A / "receiver", sharer=Sharer(altered))
    import_published(A / "checkpoint").save_pretrained(tmp_path / "b")
    with pytest.raises(ModelLoadError, match="'receiver'"):  # named in the checkpoint's config; no model here
        C2CModel.from_pretrained(tmp_path / "b")


def test_every_error_is_one_family_and_the_builtin_kind():
    for error in (AlignmentError, CacheError, FuserError, PromptError):
        assert issubclass(error, C2CError)
        assert issubclass(error, ValueError)
