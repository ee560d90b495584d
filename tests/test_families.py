"""Model families of today: each is a receiver and a sharer, with every invariant, or is refused with the reason."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import AutoTokenizer

from c2c import C2CModel, kv_cache
from c2c.errors import CacheError
from c2c.families import TEXTS, build_tiny, byte_tokenizer, causal_families, check_family, composite_families, markdown
from c2c.language_model import Receiver
from c2c.prompting import RenderOptions
from c2c.sharer import Sharer
from c2c.training import train
from c2c.training.objective import cross_entropy
from c2c.training.run import prepare
from tiny import open_fusers, token_ids
from training_rig import config, make_folders, open_fuser, private_config

HYBRIDS = ["qwen3_5_text", "lfm2", "granitemoehybrid", "falcon_h1", "nemotron_h"]
COMPOSITES = ["gemma3", "gemma4", "llama4", "mllama", "qwen3_5"]
FAMILIES = ["smollm3", "glm4", "gpt_oss", "exaone4", "cohere2", "ernie4_5", "llama4_text", "gemma4_text", *HYBRIDS]
GREEDY = {"max_new_tokens": 6, "do_sample": False}


@pytest.mark.parametrize("name", [*FAMILIES, *COMPOSITES, "whisper"])
def test_a_family_is_taken_in_both_roles_with_every_invariant(name):
    report = check_family(name)
    assert report.taken, report
    assert "bottleneck" in report.fusers


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mamba", "no layer"),
        ("deepseek_v3", "compress"),
        ("hy_v4", "DynamicIndexedLayer"),
        ("minimax", "DynamicCache"),
        ("cpmant", "33 entries"),
        ("blt", "num_hidden_layers"),
    ],
)
def test_a_model_without_entries_to_fuse_is_refused_with_the_reason(name, reason):
    report = check_family(name)
    assert "refused" in report.receiver
    assert "refused" in report.sharer
    with pytest.raises(CacheError, match=reason):
        _ = Receiver(build_tiny(name), byte_tokenizer()).geometry


def test_a_batch_that_only_decodes_otherwise_is_read_row_by_row():
    """Whisper's decoder takes positions, but ``generate`` passes none to it, since its head does not name them."""
    receiver = Receiver(build_tiny("whisper"), byte_tokenizer())
    assert receiver.separates(receiver.encode(list(TEXTS)))
    batch = receiver.answer(list(TEXTS), **GREEDY)
    assert token_ids(batch) == token_ids([receiver.answer(text, **GREEDY) for text in TEXTS])


def test_the_table_names_multimodal_families_by_their_language_model():
    composites = composite_families()
    assert "llava" in composites["llama"]
    assert "qwen2_5_vl" in composites["qwen2"]
    table = markdown([check_family("llama")])
    assert re.search(r"\| `qwen3` \|.*`qwen3_vl`", table)


@pytest.mark.parametrize("name", ["bert", "jamba"])
def test_a_model_that_can_not_go_on_from_a_cache_is_no_receiver_but_a_sharer(name):
    """BERT attends to later tokens; Jamba forgets its state when it reads several tokens more."""
    report = check_family(name)
    assert "two parts" in report.receiver
    assert report.sharer == "yes"


def pair(name: str, **options) -> C2CModel:
    receiver = Receiver(build_tiny(name), byte_tokenizer(), name)
    model = C2CModel.from_models(receiver, Sharer(build_tiny("llama", seed=7), byte_tokenizer(), "llama"), **options)
    if options.get("fuser") == "memory":
        model.fusers[0].config.training = {"config": "random"}
        for parameter in model.fusers[0].parameters():
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(4))
    return open_fusers(model)


@pytest.mark.parametrize("name", HYBRIDS)
def test_the_report_names_fused_layers_and_those_left_out_by_the_models_own_numbers(name):
    model = pair(name)
    report = model.generate("Hello", **GREEDY).report
    own = kv_cache.kv_layers(model.receiver.prefill(model.receiver.encode("Hi")))
    assert report.fused_layers == own == model.receiver.layer_numbers
    assert set(report.skipped_layers) == set(range(model.receiver.model.config.num_hidden_layers)) - set(own)


@pytest.mark.parametrize("name", HYBRIDS)
def test_beams_streams_and_chats_of_hybrids_carry_their_state(name):
    model = pair(name)
    untouched = C2CModel.from_models(model.receiver, model.sharers[0])
    beams = {"num_beams": 3, "max_new_tokens": 5, "do_sample": False}
    tokens = model.receiver.encode(TEXTS[0])
    with torch.no_grad():
        expected = model.receiver.model.generate(
            input_ids=tokens.ids, attention_mask=tokens.mask.long(), pad_token_id=0, use_cache=False, **beams
        )
    assert untouched.generate(TEXTS[0], **beams).ids.tolist() == expected[0, tokens.length :].tolist()
    answer = model.generate(TEXTS[0], **GREEDY)
    stream = model.stream(TEXTS[0], **GREEDY)
    assert "".join(stream) == answer.text
    chat = model.chat(**GREEDY)
    assert chat.send(TEXTS[0]).text == answer.text
    conversation = [*chat.messages, {"role": "user", "content": "And now?"}]
    assert chat.send("And now?").ids.tolist() == model.generate(conversation, **GREEDY).ids.tolist()


@pytest.mark.parametrize("name", HYBRIDS)
def test_private_context_of_hybrids_is_read_by_every_row(name):
    model = pair(name, fuser="memory", fuser_options={"rank": 4})
    context = ["The code is 8264.", "The boat house was built in 1924, and it is red."]
    batch = model.generate(list(TEXTS[:2]), sharer_messages=context, **GREEDY)
    singles = [model.generate(t, sharer_messages=c, **GREEDY) for t, c in zip(TEXTS[:2], context, strict=True)]
    assert token_ids(batch) == token_ids(singles)
    assert all(result.report.memory_slots > 0 for result in singles)


def test_a_hybrid_reads_a_growing_document_anew_and_rightly():
    sharer = Sharer(build_tiny("lfm2"), byte_tokenizer())
    first = sharer.read("The boat house")
    grown, whole = sharer.read("The boat house is red.", reuse=first), sharer.read("The boat house is red.")
    assert grown.id == whole.id
    for one, other in zip(grown.layers, whole.layers, strict=True):
        assert torch.equal(one[0].data, other[0].data)


def test_attention_layers_of_another_shape_take_no_private_context():
    with pytest.raises(CacheError, match=r"private context.*layers \[3\]"):
        pair("gemma4_text", fuser="memory")


def test_the_installed_transformers_has_the_families_that_people_run():
    assert set(FAMILIES) <= set(causal_families())


@pytest.fixture(scope="module", params=["qwen3_5_text", "lfm2", "granitemoehybrid"])
def hybrid_folders(request, tmp_path_factory):
    """Folders of a hybrid as receiver, an ordinary sharer, and rows."""
    receiver, sharer, data = make_folders(tmp_path_factory.mktemp)
    AutoTokenizer.from_pretrained(receiver).save_pretrained(receiver)
    build_tiny(request.param).save_pretrained(receiver)
    return receiver, sharer, data


@pytest.mark.parametrize("make_config", [config, private_config])
def test_training_on_a_hybrid_carries_its_state(hybrid_folders, tmp_path, make_config):
    """Its loss is that of the public path, for a batch as for single examples, and the fuser learns from it."""
    run = prepare(make_config(hybrid_folders, tmp_path))
    open_fuser(run)
    objective, examples = run.objective.eval(), run.train[:3]
    with torch.no_grad():
        together = objective.losses(objective.collate(examples), "matched")
        alone = torch.cat([objective.losses(objective.collate([example]), "matched") for example in examples])
    torch.testing.assert_close(together, alone, rtol=2e-3, atol=2e-3)
    if make_config is config:
        options = RenderOptions(answer_prefix=examples[0].row.answer_prefix)
        fused = objective.model.prefill(examples[0].row.messages, options=options)
        logits = objective.receiver.next_logits(fused.tokens, fused.cache)
        direct = torch.nn.functional.cross_entropy(logits, torch.tensor(examples[0].response_ids[:1]))
        batch = objective.collate(examples[:1])
        stored = cross_entropy(objective.logits(batch, "matched"), batch.responses)[0, 0]
        assert float(stored.detach()) == pytest.approx(float(direct), abs=0.02)
    summary = train(make_config(hybrid_folders, tmp_path / "run"))
    assert C2CModel.from_pretrained(summary["fuser"]).trained
