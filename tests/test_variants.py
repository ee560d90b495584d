"""Variants of one model: adapters around shared weights, layers recomputed, distances, and what is refused."""

import copy
import dataclasses
import json
import threading
from pathlib import Path

import pytest
import torch

from c2c import C2CModel, kv_cache
from c2c.adapters import share_weights
from c2c.connection import connect
from c2c.errors import CacheError, FuserError, HandoffError, MismatchError, ModelLoadError, PromptError
from c2c.handoff import Handoff, QuantizedTensor, passage_prompt
from c2c.language_model import Receiver
from c2c.prompting import RenderOptions, with_passage
from c2c.recompute import prefill_with_hidden, recompute_layers
from c2c.sharer import Sharer
from c2c.systems.lora import new_adapter, trainable
from c2c.tokens import left_pad
from c2c.variants import Divergence, VariantReport, compare
from tiny import build, entries, tokenizer

pytest.importorskip("peft")
IDS = [5, 6, 7, 8, 9, 10, 11, 12]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base model and adapters of it: two strong ones, and one that hardly changes it."""
    folder = tmp_path_factory.mktemp("variants")
    build("qwen2").save_pretrained(folder / "base")
    tokenizer("chatml").save_pretrained(folder / "base")
    for seed, (name, size) in enumerate({"one": 0.2, "two": 0.2, "near": 0.002}.items()):
        made = new_adapter(Receiver(build("qwen2")), 2)
        torch.manual_seed(seed)
        for parameter in trainable(made):
            torch.nn.init.normal_(parameter, std=size)
        made.peft_config["default"].base_model_name_or_path = str(folder / "base")
        made.save_pretrained(folder / name)
    return folder


def prefilled(model) -> list[torch.Tensor]:
    return entries(model.prefill(left_pad([IDS], 0)))


def same(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# -- adapters ---------------------------------------------------------------------------------------------------------


def test_each_role_keeps_its_own_adapter_around_one_set_of_weights(folders):
    base = Receiver.from_pretrained(folders / "base")
    one = Sharer.from_pretrained(base, adapter=folders / "one")
    two = Receiver.from_pretrained(one, adapter=folders / "two")
    alone = {name: prefilled(Receiver.from_pretrained(folders / name)) for name in ("base", "one", "two")}
    identity = {name: Receiver.from_pretrained(folders / name).identity for name in ("base", "one", "two")}
    for _ in range(2):
        for name, model in (("base", base), ("one", one), ("two", two)):
            assert same(prefilled(model), alone[name])
            assert model.identity.same_weights(identity[name])
            assert sum(model.identity.same_weights(other) for other in identity.values()) == 1
    assert same(prefilled(one.without_adapter()), alone["base"])
    weight = base.model.get_input_embeddings().weight
    assert {model.model.get_input_embeddings().weight.data_ptr() for model in (base, one, two)} == {weight.data_ptr()}


def test_adapters_in_two_threads_do_not_mix(folders):
    base = Receiver.from_pretrained(folders / "base")
    models = [Sharer.from_pretrained(base, adapter=folders / name) for name in ("one", "two")]
    alone, wrong = [prefilled(model) for model in models], []

    def work(model, expected):
        for _ in range(20):
            if not same(prefilled(model), expected):
                wrong.append(model.name)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(models, alone, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_two_names_of_one_base_are_loaded_once(folders):
    model = C2CModel.from_models(str(folders / "base"), str(folders / "one"), fuser="memory")
    weights = [part.model.get_input_embeddings().weight.data_ptr() for part in (model.receiver, *model.sharers)]
    assert weights[0] == weights[1]
    assert model.sharers[0].identity.variant == "adapter default"
    assert model.receiver.identity.variant == ""


def test_a_shared_tree_can_be_moved_and_freed_alone(folders):
    base = Receiver.from_pretrained(folders / "base")
    before = prefilled(base)
    sharer = Sharer.from_pretrained(base, adapter=folders / "one")
    sharer.release()
    share_weights(base.model).double()
    assert same(prefilled(base), before)


def test_adapters_that_can_not_be_used(folders, tmp_path):
    base = Receiver.from_pretrained(folders / "base")
    with pytest.raises(ModelLoadError, match="no adapter in"):
        Sharer.from_pretrained(base, adapter=tmp_path)
    inside = Receiver(new_adapter(Receiver(build("qwen2")), 2))
    with pytest.raises(ModelLoadError, match="already"):
        Sharer.from_pretrained(inside, adapter=folders / "one")
    with pytest.raises(ModelLoadError, match="does not fit"):
        Sharer.from_pretrained(Receiver(build("llama")), adapter=folders / "one")


# -- layers recomputed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3"])
@pytest.mark.parametrize("column", [0, 3])
def test_recomputing_all_layers_is_reading_bit_for_bit(family, column):
    receiver = Receiver(build(family, 1))
    tokens, document = left_pad([list(range(3, 33))], 0), range(column + 3, 28)
    cache = receiver.prefill(tokens, column) if column else receiver.empty_cache()
    made = recompute_layers(receiver, tokens, column, torch.tensor(document), (0, receiver.geometry.layers), cache)
    assert kv_cache.length(cache) == column, "the cache is left as it was"
    read = receiver.prefill(tokens, 25, kv_cache.view(cache) if column else None)
    for (keys, values), (own_keys, own_values) in zip(made, kv_cache.layers(read), strict=True):
        assert torch.equal(keys, own_keys[:, :, column:])
        assert torch.equal(values, own_values[:, :, column:])


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_layers_from_a_hidden_state_are_those_of_one_pass(family):
    model = Sharer(build(family, 1))
    tokens, count = left_pad([list(range(3, 33))], 0), model.geometry.layers
    cache, hidden = prefill_with_hidden(model, tokens, 2)
    assert same(entries(cache), entries(model.prefill(tokens)))
    before = kv_cache.crop(cache, 4)
    made = recompute_layers(model, tokens, 4, tokens.ids[0, 4:], (2, count), before, hidden[:, 4:])
    for (keys, values), (own_keys, own_values) in zip(made, kv_cache.layers(cache)[2:], strict=True):
        torch.testing.assert_close(keys, own_keys[:, :, 4:])
        torch.testing.assert_close(values, own_values[:, :, 4:])


@pytest.mark.parametrize("layers", [(2, 2), (0, 99), (-1, 2), 3, (0, 1, 2), (0, 1.5), None])
def test_ranges_of_layers_that_can_not_be(layers):
    model = Receiver(build("llama"))
    with pytest.raises(CacheError, match="expected the first layer"):
        recompute_layers(model, left_pad([IDS], 0), 0, torch.tensor(IDS), layers, model.empty_cache())


def test_upper_layers_need_hidden_states():
    model = Receiver(build("llama"))
    with pytest.raises(CacheError, match="hidden states"):
        recompute_layers(model, left_pad([IDS], 0), 0, torch.tensor(IDS), (1, 3), model.empty_cache())


def test_a_decoder_without_plain_layers_is_refused():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = Receiver(GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=64)))
    with pytest.raises(CacheError, match="recomputed"):
        recompute_layers(model, left_pad([IDS], 0), 0, torch.tensor(IDS), (0, 1), model.empty_cache())


# -- distances --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(folders):
    return Receiver.from_pretrained(folders / "base")


def test_the_same_weights_have_no_distance(base):
    report = compare(base, Sharer.from_pretrained(base), answer_tokens=4)
    assert report.copy == Divergence(0.0, 1.0)
    assert all(layer.keys == layer.values == layer.kl == 0 for layer in report.layers)
    assert report.decision == "copy"
    assert report.to_dict()["decision"] == "copy"


def test_another_adapter_is_at_a_distance_that_recomputing_all_layers_takes_away(base, folders):
    sharer, count = Sharer.from_pretrained(base, adapter=folders / "one"), base.geometry.layers
    report = compare(base, sharer, answer_tokens=4, ranges=[(0, 1), (1, count), (0, count)])
    assert report.copy.kl > 0.01
    assert all(layer.keys > 0 and layer.values > 0 for layer in report.layers)
    assert report.recomputed[0, count] == Divergence(0.0, 1.0)
    assert report.recomputed[0, 1].kl > 0
    assert report.recomputed[1, count].kl > 0
    assert len(report.table()) == 4


@pytest.mark.parametrize(
    ("copied", "recomputed", "decision", "layers"),
    [
        (0.01, {}, "copy", None),
        (9, {(0, 3): 0.01, (0, 2): 0.02, (0, 1): 9}, "recompute", (0, 2)),
        (9, {}, "none", None),
    ],
)
def test_the_cheapest_way_within_the_limit_is_chosen(copied, recomputed, decision, layers):
    report = VariantReport(Divergence(copied, 0.5), [], {key: Divergence(kl, 0.5) for key, kl in recomputed.items()})
    assert (report.decision, report.range) == (decision, layers if decision == "recompute" else report.range)
    assert f"{copied:.3f}" in report.reason


@pytest.mark.parametrize("change", ["geometry", "rope", "tokenizer"])
def test_models_that_are_no_variants_are_refused(base, change):
    if change == "geometry":
        other = Sharer(build("qwen3"), base.tokenizer)
    elif change == "tokenizer":
        other = Sharer(build("qwen2"), tokenizer("llama3"))
    else:
        config = copy.deepcopy(base.model.config)
        config.rope_parameters = config.rope_parameters | {"rope_theta": 77.0}
        other = Sharer(type(base.model)(config), base.tokenizer)
    with pytest.raises(MismatchError, match={"geometry": "kv"}.get(change, change)):
        compare(base, other)


# -- copies from a variant --------------------------------------------------------------------------------------------

DOCUMENT = "The fox sleeps in a red house by the sea."
QUESTION = "Where does the fox sleep?"


def first_logits(model, given):
    fused = model.prefill(QUESTION, sharer_messages=given)
    return fused.model.next_logits(fused.tokens, fused.cache)


def copies(receiver, sharer, **options):
    return C2CModel.from_models(receiver, sharer, fuser="copy", fuser_options={"variant": True} | options)


@pytest.fixture(scope="module")
def one(base, folders):
    return Sharer.from_pretrained(base, adapter=folders / "one")


def test_a_copy_with_all_layers_recomputed_is_reading_the_text_bit_for_bit(base, one):
    options = RenderOptions()
    prompt = base.encode(with_passage([{"role": "user", "content": QUESTION}], DOCUMENT, options=options), options)
    plan = passage_prompt(base.tokenizer, DOCUMENT, "", options)
    cache = None
    for stop in (plan.kept[0], len(plan.ids)):  # in the parts in which it is read beside a copy
        cache = base.prefill(prompt, stop, cache)
    expected = base.next_logits(prompt, cache)
    count = base.geometry.layers
    assert torch.equal(first_logits(copies(base, one, recompute=(0, count)), DOCUMENT), expected)
    parts = [first_logits(copies(base, one, **more), DOCUMENT) for more in ({}, {"recompute": (0, 1)}, {"refresh": 3})]
    assert len({tuple(part.flatten().tolist()) for part in [*parts, expected]}) == 4


def test_upper_layers_are_recomputed_from_states_that_cross_with_the_handoff(base, one, folders, tmp_path):
    model, count = copies(base, one, recompute=[1, base.geometry.layers]), base.geometry.layers
    handoff = one.read(DOCUMENT, before="", keep_hidden=1)
    assert torch.equal(first_logits(model, handoff), first_logits(model, DOCUMENT))
    handoff.save(tmp_path / "handoff.safetensors")
    loaded = Handoff.load(tmp_path / "handoff.safetensors")
    assert torch.equal(first_logits(model, loaded), first_logits(model, handoff))
    assert handoff.nbytes - one.read(DOCUMENT, before="").nbytes == handoff.hidden[1].data.nbytes > 0
    small, zeros = first_logits(model, handoff.to("int8")), first_logits(model, handoff.zeros_like())
    torch.testing.assert_close(small, first_logits(model, handoff), rtol=0.2, atol=0.2)
    assert not torch.allclose(zeros, small, rtol=0.2, atol=0.2)
    for given in (one.read(DOCUMENT, before=""), one.read(DOCUMENT, before="", keep_hidden=2)):
        with pytest.raises(CacheError, match="hidden states"):
            first_logits(model, given)
    with pytest.raises(PromptError, match="draft"):
        one.read(DOCUMENT, keep_hidden=1, draft_tokens=2)
    with pytest.raises(CacheError, match="expected the first layer"):
        one.read(DOCUMENT, before="", keep_hidden=count)


def test_a_damaged_file_of_hidden_states_is_refused(one, tmp_path):
    handoff = one.read(DOCUMENT, before="", keep_hidden=1)
    layer, states = handoff.hidden
    short = dataclasses.replace(handoff, hidden=(layer, QuantizedTensor(states.data[:, :2])))
    short.save(tmp_path / "short.safetensors")
    with pytest.raises(HandoffError, match="hidden states"):
        Handoff.load(tmp_path / "short.safetensors")


def test_a_handoff_of_another_adapter_is_refused(base, one, folders):
    with pytest.raises(MismatchError, match="variant"):
        C2CModel.from_models(base, one, fuser="copy")
    other = Sharer.from_pretrained(base, adapter=folders / "two").read(DOCUMENT, before="")
    for sharer, options in ((one, {"variant": True}), (Sharer.from_pretrained(base), {})):
        model = C2CModel.from_models(base, sharer, fuser="copy", fuser_options=options)
        with pytest.raises(MismatchError, match="handoff"):
            model.generate(QUESTION, sharer_messages=other, max_new_tokens=1)


def test_what_a_variant_has_read_before_the_document_is_not_taken(base, one):
    """The receiver's own prefix is; only the document's entries cross, and the report says so."""
    result = copies(base, one).generate(QUESTION, sharer_messages=DOCUMENT, max_new_tokens=1, do_sample=False)
    assert any("variant" in note for note in result.report.notes)
    exact = copies(base, Sharer.from_pretrained(base))
    result = exact.generate(QUESTION, sharer_messages=DOCUMENT, max_new_tokens=1, do_sample=False)
    assert not any("variant" in note for note in result.report.notes)


def test_the_layers_to_recompute_are_recorded_and_checked(base, one):
    config = copies(base, one, recompute=(0, 2)).fusers[0].config
    again = type(config).from_dict(json.loads(json.dumps(config.to_dict())))
    assert list(again.recompute) == [0, 2]
    with pytest.raises(FuserError, match="recompute"):
        copies(base, one, recompute=(2, 1))


def test_connect_copies_from_a_near_variant_and_says_why_not_from_a_far_one(folders):
    near = connect(str(folders / "base"), str(folders / "near"))
    result = near.generate(QUESTION, DOCUMENT, max_new_tokens=2)
    assert result.report.method == "copy"
    assert near.chosen("private").fuser.config.variant
    assert "nats" in near.chosen("private").reason
    far = connect(str(folders / "base"), str(folders / "one"))
    assert far.chosen("private").name == "text"
    assert "nats" in next(method.reason for method in far.methods if method.name == "copy")


def test_the_benchmark_answers_all_rows_in_every_way(base, folders, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    import variants

    rows = [{"question": QUESTION, "context": f"{DOCUMENT} {word}", "answer": word} for word in ("One.", "Two.")]
    result = variants.measure(base, "one*2", "base", rows, [(0, 2), (1, 3)], folders)
    assert list(result["ways"]) == ["alone", "text", "copy", "recompute 0-2", "recompute 1-3", "deranged"]
    assert result["ways"]["text"]["as_text"] == 100
    assert all(len(found) == len(rows) for found in result["answers"].values())
    (tmp_path / "dev_pair.json").write_text(json.dumps(result))
    assert len(variants.table(tmp_path, "dev").splitlines()) == 2 + len(result["ways"])
