"""The identity of a model changes exactly when what it computes changes."""

from __future__ import annotations

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from c2c import C2CModel
from c2c.errors import CacheError, MismatchError
from c2c.identity import ModelIdentity
from c2c.language_model import Receiver
from c2c.sharer import Sharer
from c2c.training.prefill_store import PrefillStore
from tiny import FIXTURES, build, memory_pair, pair, token_ids, tokenizer

# peft asks transformers 5 for it by its old name
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
peft = pytest.importorskip("peft")
TEXT = "The boat house was built in 1924."


def lora(model, name: str, seed: int = 0, **options):
    """Add a LoRA adapter of random weights."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=4, target_modules=["k_proj", "v_proj"], init_lora_weights=False, **options)
    model.add_adapter(config, name)


def two_adapters() -> Sharer:
    model = build("qwen2", 2)
    lora(model, "a", 1)
    lora(model, "b", 2)
    model.set_adapter("a")
    return Sharer(model, tokenizer("llama3"), "sharer")


def same(one, other) -> bool:
    return one.identity.same_weights(other.identity)


# -- what counts -------------------------------------------------------------------------------------------------------


def test_each_adapter_is_another_model_and_none_is_the_base():
    sharer, base = two_adapters(), Sharer(build("qwen2", 2))
    first = sharer.identity
    assert not same(sharer, base)
    sharer.model.set_adapter("b")
    second = sharer.identity
    assert not first.same_weights(second)
    sharer.model.set_adapter("a")
    assert sharer.identity == first
    sharer.model.disable_adapters()
    assert same(sharer, base)
    assert sharer.identity.weights == base.identity.weights
    assert (first.variant, second.variant, sharer.identity.variant) == ("adapter a", "adapter b", "")


def test_an_adapter_is_the_same_under_any_name_and_wrapper():
    named, wrapped = build("qwen2", 2), build("qwen2", 2)
    lora(named, "a", 1)
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=["k_proj", "v_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(wrapped, config)
    assert same(Sharer(named), Sharer(wrapped))
    strong = build("qwen2", 2)
    lora(strong, "a", 1, lora_alpha=64)
    assert not same(Sharer(named), Sharer(strong))


def test_an_adapter_added_to_a_model_in_use_has_no_dropout():
    sharer = Sharer(build("qwen2", 2), tokenizer("llama3"))
    before = sharer.read(TEXT).id
    lora(sharer.model, "late", lora_dropout=0.5)
    one, two = sharer.read(TEXT), sharer.read(TEXT)
    assert one.id == two.id != before
    assert torch.equal(one.layers[-1][0].data, two.layers[-1][0].data)


def test_merged_adapters_equal_what_is_merged_for_good():
    wrapped = peft.get_peft_model(build("qwen2", 2), peft.LoraConfig(r=4, target_modules=["v_proj"]))
    torch.nn.init.normal_(wrapped.base_model.model.model.layers[0].self_attn.v_proj.lora_B["default"].weight)
    sharer = Sharer(wrapped)
    active = sharer.identity
    wrapped.merge_adapter()
    merged = sharer.identity
    assert not merged.same_weights(active)
    assert Sharer(wrapped.merge_and_unload()).identity.same_weights(merged)


def test_copies_of_whole_modules_count_while_they_are_active():
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    wrapped = peft.get_peft_model(build("llama"), config)
    sharer, base = Sharer(wrapped), Sharer(build("llama"))
    before = sharer.identity
    with torch.no_grad():
        wrapped.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)
    assert not before.same_weights(sharer.identity)
    with wrapped.disable_adapter():
        assert same(sharer, base)


@pytest.mark.parametrize("write", ["add_", "data", "replaced", "optimizer", "one value"])
def test_weights_written_to_in_place(write):
    receiver = Receiver(build("llama"), tokenizer("chatml"))
    before = receiver.identity
    layer = receiver.model.model.layers[2].self_attn.k_proj
    with torch.no_grad():
        if write == "add_":
            layer.weight.add_(1e-2)
        elif write == "data":  # leaves no trace in the tensor's version
            layer.weight.data += 1e-2
        elif write == "replaced":
            layer.weight = torch.nn.Parameter(layer.weight * 1.01, requires_grad=False)
        elif write == "one value":  # outside of every sample
            layer.weight[3, 17] += 0.5
        else:
            layer.weight.grad = torch.ones_like(layer.weight)
            torch.optim.SGD([layer.weight], lr=1e-2).step()
    assert not before.same_weights(receiver.identity)
    assert receiver.identity == receiver.identity


def test_packed_weights_in_buffers_and_attributes_count():
    one, other = build("llama"), build("llama")
    for model, value in ((one, 1), (other, 2)):
        layer = model.model.layers[0].self_attn.q_proj
        layer.register_buffer("qweight", torch.full((4, 4), value, dtype=torch.int32))
    assert not same(Receiver(one), Receiver(other))
    one, other = build("llama"), build("llama")
    for model, value in ((one, 1.0), (other, 2.0)):
        model.model.layers[0].self_attn.q_proj.weight.SCB = torch.full((4,), value)
    assert not same(Receiver(one), Receiver(other))


# -- what does not count -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_one_checkpoint_in_every_type_is_one_model(tmp_path, stored):
    model = build("llama")
    with torch.no_grad():  # values that float16 rounds or takes for zero
        model.model.embed_tokens.weight[:64] *= 10.0 ** -torch.arange(0, 8, 0.125).unsqueeze(1)
    model.to(stored).save_pretrained(tmp_path)
    types = (torch.float32, torch.bfloat16, torch.float16)
    loaded = [Receiver(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)) for dtype in types]
    other = Receiver(build("llama", 5).half())
    for one in loaded:
        assert all(same(one, another) for another in loaded)
        assert not same(one, other)


def test_a_fuser_of_a_bfloat16_checkpoint_takes_it_as_float16(tmp_path):
    folders = [tmp_path / "receiver", tmp_path / "sharer"]
    for folder, family, words in zip(folders, ("llama", "qwen2"), ("chatml", "llama3"), strict=True):
        build(family).to(torch.bfloat16).save_pretrained(folder)
        tokenizer(words).save_pretrained(folder)
    C2CModel.from_models(*folders, dtype="bfloat16").save_pretrained(tmp_path / "fuser")
    half = C2CModel.from_pretrained(tmp_path / "fuser", dtype="float16")
    assert half.receiver.dtype == half.sharers[0].dtype == torch.float16


def test_a_record_without_a_checksum_is_compared_by_its_fingerprint():
    stored = Receiver.from_pretrained(FIXTURES / "pair_a" / "receiver")
    old = stored.identity.to_dict() | {"weights": "c8b1513f4634718ed7a8525a0a365935"}  # as versions before wrote it
    del old["values"], old["variant"]
    assert ModelIdentity.from_dict(old).same_weights(stored.identity)
    with torch.no_grad():
        stored.model.model.embed_tokens.weight.mul_(1.5)
    assert not ModelIdentity.from_dict(old).same_weights(stored.identity)


def test_the_base_of_a_rotary_embedding_may_be_written_as_a_whole_number():
    model = pair()
    identity = model.receiver.identity
    rope = json.loads(identity.rope)
    whole = ModelIdentity.from_dict(
        identity.to_dict() | {"rope": json.dumps(rope | {"rope_theta": math.floor(10000.0)})}
    )
    model.fusers[0].config.receiver = whole.to_dict()
    C2CModel(model.receiver, model.sharers, list(model.fusers))


# -- who relies on it --------------------------------------------------------------------------------------------------


def test_a_handoff_is_not_extended_under_another_adapter():
    sharer = two_adapters()
    first = sharer.read(TEXT)
    assert sharer.read(TEXT + " It is red.", reuse=first).shared_prefix(first.ids.tolist())
    sharer.model.set_adapter("b")
    assert sharer.read(TEXT).id != first.id
    with pytest.raises(MismatchError, match=r"handoff was made for .*adapter a.*got .*adapter b"):
        sharer.read(TEXT + " It is red.", reuse=first)


@pytest.mark.parametrize("private", [False, True])
def test_a_switch_after_construction_is_noticed(private):
    model = memory_pair() if private else pair()
    context = {"sharer_messages": TEXT} if private else {}
    given = {"max_new_tokens": 2, "do_sample": False} | context
    before = token_ids(model.generate("Which year?", **given))
    lora(model.sharers[0].model, "late")
    with pytest.raises(MismatchError, match=r"sharer weights.*adapter late"):
        model.generate("Which year?", **given)
    model.sharers[0].model.disable_adapters()
    assert token_ids(model.generate("Which year?", **given)) == before
    model.sharers[0].model.enable_adapters()
    relaxed = C2CModel(model.receiver, model.sharers, list(model.fusers), allow_mismatch=True)
    report = relaxed.generate("Which year?", **given).report
    assert any("adapter late" in note for note in report.notes)


def test_a_prefill_store_refuses_a_model_that_was_changed():
    receiver = Receiver(build("llama"), tokenizer("chatml"))
    store = PrefillStore(receiver, [0, 1])
    store.get([[1, 2, 3]])
    lora(receiver.model, "late")
    with pytest.raises(CacheError, match="another adapter"):
        store.get([[1, 2, 3]])
