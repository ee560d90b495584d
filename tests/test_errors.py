"""What a user can get wrong is an error that says what was given, what was expected and what to do."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, Qwen3NextConfig, Qwen3NextForCausalLM, StaticCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from c2c import C2CModel, kv_cache
from c2c.errors import AlignmentError, CacheError, FuserError, MismatchError, ModelLoadError, PromptError
from c2c.fusers.base import load_fuser
from c2c.language_model import Receiver, Sharer
from c2c.loading import load
from c2c.published import import_published
from tiny import FIXTURES, build, pair, tokenizer

A = FIXTURES / "pair_a"


@pytest.fixture(scope="module")
def model():
    return pair()


@pytest.mark.parametrize(
    "prompt", ["", [], [""], [{"role": "user", "content": ""}], None, 7, [{"content": "x"}], [{"role": "user"}]]
)
def test_empty_or_unreadable_prompts(model, prompt):
    with pytest.raises(PromptError):
        model.generate(prompt, max_new_tokens=1)


def test_images_are_refused(model):
    with pytest.raises(PromptError, match="only text"):
        model.generate([{"role": "user", "content": [{"type": "image", "url": "x"}]}])


def test_prompt_over_the_context_length(model):
    with pytest.raises(PromptError, match="made for 512"):
        model.generate("word " * 400, max_new_tokens=1)


def test_unaligned_prompt():
    """A template that drops the message leaves nothing to fuse."""
    deaf = tokenizer("llama3")
    deaf.chat_template = "{{ 'Hi' }}"
    model = C2CModel.from_models(Receiver(build("llama"), tokenizer("chatml")), Sharer(build("qwen2"), deaf))
    with pytest.raises(AlignmentError, match="no token of prompt 0"):
        model.generate("Hello")


def test_cache_with_other_rows(model):
    cache = model.receiver.prefill(model.receiver.encode(["Hello", "Bye"]), 3)
    with pytest.raises(CacheError, match="rows"):
        model.receiver.generate(model.receiver.encode("Hello"), cache, max_new_tokens=1)


def test_unsupported_cache_layers(model):
    config = model.receiver.model.config
    for cache in (StaticCache(config=config, max_cache_len=8), DynamicCache(config=build("gemma3").config), ((1, 2),)):
        with pytest.raises(CacheError, match=r"Use a model|expected a transformers"):
            kv_cache.check_layers(cache)
    with pytest.raises(CacheError, match=DynamicSlidingWindowLayer.__name__):
        kv_cache.check_layers(DynamicCache(config=build("gemma3").config))


def test_linear_attention_is_refused():
    config = Qwen3NextConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        vocab_size=64,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        linear_num_key_heads=1,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    )
    with pytest.raises(CacheError, match="without a KV cache per token"):
        Receiver(Qwen3NextForCausalLM(config))


def test_slow_tokenizer():
    class Slow:
        is_fast = False

    with pytest.raises(PromptError, match="slow tokenizer"):
        load(build("llama"), tokenizer=Slow())


def test_template_that_refuses_a_role():
    strict = tokenizer("chatml")
    strict.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ messages[0]['content'] }}"
    )
    receiver = Receiver(build("llama"), strict)
    with pytest.raises(PromptError, match="no system"):
        receiver.answer([{"role": "system", "content": "x"}, {"role": "user", "content": "y"}])


@pytest.mark.parametrize("name", ["./nothing", "nothing.gguf", "/no/such/folder"])
def test_models_that_do_not_exist(name):
    with pytest.raises(ModelLoadError, match="no such"):
        Receiver.from_pretrained(name)


def test_identity_does_not_depend_on_dtype_or_path():
    a, b = Receiver(build("llama"), name="a"), Receiver(build("llama").to(torch.bfloat16), name="b")
    assert a.identity.weights == b.identity.weights
    assert a.identity.weights != Receiver(build("llama", 1)).identity.weights


def test_folders_that_hold_no_fuser(tmp_path):
    with pytest.raises(FuserError, match="holds no fuser"):
        load_fuser(tmp_path)
    with pytest.raises(FuserError, match="published checkpoint"):
        load_fuser(A / "checkpoint" / "final")
    with pytest.raises(FuserError, match="not a fuser"):
        load_fuser(A / "receiver")
    with pytest.raises(ModelLoadError, match="no such folder"):
        load_fuser(tmp_path / "nothing")


def test_unknown_names():
    with pytest.raises(FuserError, match="bottleneck"):
        pair(fuser="botleneck")
    with pytest.raises(FuserError, match="sequential"):
        pair(mode="serial")
    with pytest.raises(FuserError, match="terminal"):
        pair(layer_map="last")


def test_ids_that_a_model_does_not_have(model):
    ids = torch.full((1, 6), 600)
    with pytest.raises(PromptError, match="knows 0 to 511"):
        model.generate_ids(ids, torch.ones_like(ids), fuse_mask=torch.ones(6).bool())
    with pytest.raises(PromptError, match="sharer"):
        model.generate_ids(torch.ones_like(ids), ids, fuse_mask=torch.tensor([1, 1, 1, 1, 1, 0]))


def test_a_mask_that_fuses_nothing_is_not_silent(model):
    ids = torch.ones(1, 6, dtype=torch.long)
    with pytest.warns(UserWarning, match="never fused"):
        model.generate_ids(ids, ids, fuse_mask=torch.ones(6).bool(), max_new_tokens=1)


def test_nested_lists_of_several_sharers():
    receiver = Receiver(build("llama", 1))
    model = C2CModel.from_models(receiver, [Sharer(build("qwen2", 2)), Sharer(build("qwen3", 3))])
    lists = [[[5, 6, 7, 8]], [[8, 7, 6, 5]]]
    fuse_mask = [True, True, True, False]
    one = model.fuse_ids([5, 6, 7, 8], lists, fuse_mask=fuse_mask)
    other = model.fuse_ids([5, 6, 7, 8], [torch.tensor(ids) for ids in lists], fuse_mask=fuse_mask)
    assert torch.equal(one.last_logits, other.last_logits)


def test_an_imported_fuser_remembers_its_models(tmp_path):
    parts = {"receiver": A / "receiver", "sharer": A / "sharer"}
    C2CModel.from_published(A / "checkpoint", **parts).save_pretrained(tmp_path / "a")
    again = C2CModel.from_pretrained(tmp_path / "a")  # named in the fuser
    assert again.receiver.identity.architecture == "Qwen3ForCausalLM"
    with pytest.raises(MismatchError, match="sharer weights"):
        C2CModel.from_pretrained(tmp_path / "a", receiver=A / "receiver", sharer=Sharer(altered(A / "sharer")))
    import_published(A / "checkpoint").save_pretrained(tmp_path / "b")
    with pytest.raises(
        ModelLoadError, match="'receiver'"
    ):  # the name in the checkpoint's config, which is no model here
        C2CModel.from_pretrained(tmp_path / "b")


def altered(folder):
    model = load(folder).model
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    return model


def test_a_folder_with_several_fusers_names_them(tmp_path):
    receiver = Receiver(build("llama", 1))
    C2CModel.from_models(receiver, [Sharer(build("qwen2", 2)), Sharer(build("qwen3", 3))]).save_pretrained(tmp_path)
    with pytest.raises(FuserError, match="fuser_1, fuser_2"):
        load_fuser(tmp_path)


def test_one_tokenizer_for_two_models_is_refused():
    with pytest.raises(PromptError, match="both models"):
        C2CModel.from_models(build("llama"), build("qwen2"), tokenizer=tokenizer("chatml"))
