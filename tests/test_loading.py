"""Loading takes every weight of a checkpoint, or says what is wrong with it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from c2c import C2CModel
from c2c.errors import ModelLoadError, PromptError
from c2c.language_model import Receiver
from c2c.loading import load
from c2c.sharer import Sharer
from tiny import SIZES, build, token_ids, tokenizer

# peft asks transformers 5 for it by its old name
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
IDS = torch.arange(10, 20).unsqueeze(0)
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}
QWEN_VISION = {"depth": 1, "hidden_size": 16, "out_hidden_size": 48, "num_heads": 2, "intermediate_size": 16}
TEXT = SIZES | {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]}}


@pytest.fixture
def folder(tmp_path):
    """A folder of a tiny model with its tokenizer."""
    path = tmp_path / "model"
    build("llama").save_pretrained(path)
    tokenizer("chatml").save_pretrained(path)
    return path


def rewrite(folder, change):
    """Save the weights of a folder under other names: ``change(name, tensor)`` gives the new name, or None."""
    path = folder / "model.safetensors"
    weights = {change(name): tensor for name, tensor in load_file(path).items() if change(name)}
    save_file(weights, path, metadata={"format": "pt"})


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# -- weights that do not fit -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda name: f"module.{name}", "missing: .*lm_head.weight.*not in the model: module"),
        (lambda name: f"_orig_mod.{name}", "save the model inside"),
        (lambda name: name if "layers.1.mlp.up" not in name else None, "missing: model.layers.1.mlp.up_proj.weight"),
        (lambda name: name.removeprefix("model.") if "lm_head" not in name else None, "missing: lm_head.weight"),
        (lambda name: name.replace("q_proj.weight", "q_proj.base_layer.weight"), "base_layer"),
        (lambda name: name.replace("layers.4.", "layers.9."), "layers.4"),
    ],
)
def test_weights_under_other_names(folder, change, message):
    rewrite(folder, change)
    with pytest.raises(ModelLoadError, match=message):
        load(folder)


@pytest.mark.parametrize(
    "name", ["q_proj.bias", "q_norm.weight", "q_proj.lora_A.default.weight", "q_proj.weight_scale"]
)
def test_weights_inside_a_layer_that_would_be_dropped(folder, name):
    path = folder / "model.safetensors"
    weights = load_file(path) | {f"model.layers.0.self_attn.{name}": torch.ones(48)}
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=rf"not in the model: .*{name}"):
        load(folder)


def test_a_config_that_cuts_layers_off_or_changes_sizes(folder):
    edit(folder / "config.json", num_hidden_layers=3)
    with pytest.raises(ModelLoadError, match=r"not in the model: model\.layers\.3"):
        load(folder)
    edit(folder / "config.json", num_hidden_layers=5, vocab_size=600)
    for options in ({}, {"ignore_mismatched_sizes": True}):
        with pytest.raises(ModelLoadError, match=r"embed_tokens|mismatch"):
            load(folder, **options)


def test_parts_outside_of_the_language_model_are_left_out(folder):
    path = folder / "model.safetensors"
    extra = (
        "visual.merger.weight",
        "mtp.layers.0.mlp.up_proj.weight",
        "model.layers.5.eh_proj.weight",
        "v_head.weight",
    )
    extra += ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.0.self_attn.k_proj.k_scale")
    before = load(folder)[0](IDS).logits
    save_file(load_file(path) | {name: torch.ones(2) for name in extra}, path, metadata={"format": "pt"})
    edit(folder / "config.json", num_nextn_predict_layers=1)
    assert torch.equal(load(folder)[0](IDS).logits, before)


def test_a_tied_head_need_not_be_stored(tmp_path):
    model = build("qwen2")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path)
    assert torch.equal(load(tmp_path)[0](IDS).logits, model.eval()(IDS).logits)


@pytest.mark.parametrize(
    ("model", "config", "options", "message"),
    [
        ("LlamaModel", "LlamaConfig", {}, "missing: lm_head"),
        ("LlamaForSequenceClassification", "LlamaConfig", {"tie_word_embeddings": True}, "SequenceClassification"),
        ("BertForMaskedLM", "BertConfig", {}, "Expected a causal"),
        ("BertLMHeadModel", "BertConfig", {}, "both directions"),
        ("T5ForConditionalGeneration", "T5Config", {"d_kv": 12, "d_ff": 32, "num_heads": 4}, "encoder-decoder"),
        ("BartForConditionalGeneration", "BartConfig", {"d_model": 48, "encoder_layers": 1}, "encoder-decoder"),
        ("Gemma3TextModel", "Gemma3TextConfig", {"use_bidirectional_attention": True}, "both directions"),
        ("CLIPModel", "CLIPConfig", {}, "does not have as a causal language model"),
    ],
)
def test_models_that_do_not_write_token_by_token(tmp_path, model, config, options, message):
    sizes = {} if model == "CLIPModel" else SIZES | {"num_hidden_layers": 1, "num_attention_heads": 4} | options
    made = getattr(transformers, config)(**sizes)
    if model == "CLIPModel":
        made.save_pretrained(tmp_path)
    else:
        getattr(transformers, model)(made).save_pretrained(tmp_path)
    with pytest.raises(ModelLoadError, match=message):
        load(tmp_path)


# -- multimodal folders ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "config", "text", "vision", "taken"),
    [
        ("Llava", "LlavaConfig", {"model_type": "llama"}, VISION | {"model_type": "clip_vision_model"}, "Llama"),
        ("Mistral3", "Mistral3Config", {"model_type": "mistral"}, VISION | {"model_type": "pixtral"}, "Mistral"),
        ("Qwen2_5_VL", "Qwen2_5_VLConfig", MROPE, QWEN_VISION, "Qwen2"),
        ("Qwen3VL", "Qwen3VLConfig", MROPE, QWEN_VISION | {"deepstack_visual_indexes": []}, "Qwen3"),
        ("SmolVLM", "SmolVLMConfig", {"model_type": "llama"}, VISION, "Llama"),
        ("Gemma3", "Gemma3Config", {"sliding_window": 16}, VISION | {"model_type": "siglip_vision_model"}, "Gemma3"),
    ],
)
def test_the_language_model_of_a_multimodal_folder(tmp_path, name, config, text, vision, taken):
    torch.manual_seed(0)
    made = getattr(transformers, config)(text_config=TEXT | text, vision_config=vision)
    whole = getattr(transformers, f"{name}ForConditionalGeneration")(made).eval()
    whole.save_pretrained(tmp_path)
    model = load(tmp_path)[0]
    assert type(model).__name__.startswith(f"{taken}For")
    assert torch.equal(model(IDS).logits, whole(IDS).logits)


# -- adapters and wrappers ---------------------------------------------------------------------------------------------


def adapted(model, seed=3):
    peft = pytest.importorskip("peft")
    torch.manual_seed(seed)
    return peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )


def test_a_folder_of_an_adapter_loads_its_base_with_it(folder, tmp_path):
    wrapped = adapted(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)).eval()
    wrapped.save_pretrained(tmp_path / "adapter")
    model, words, name = load(tmp_path / "adapter")
    assert torch.equal(model(IDS).logits, wrapped(IDS).logits)
    assert words.get_vocab() == tokenizer("chatml").get_vocab()
    assert Receiver(model).identity.same_weights(Receiver(wrapped).identity)
    edit(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path=str(tmp_path / "gone"))
    with pytest.raises(ModelLoadError, match=r"no such folder: .*gone"):
        load(name)
    edit(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path=None)
    with pytest.raises(ModelLoadError, match="does not name"):
        load(name)


def test_an_adapter_in_the_folder_of_its_base(folder):
    wrapped = adapted(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)).eval()
    wrapped.save_pretrained(folder)
    assert torch.equal(load(folder)[0](IDS).logits, wrapped(IDS).logits)
    rewrite(folder, lambda name: f"module.{name}")
    with pytest.raises(ModelLoadError, match=r"missing: .*lm_head"):
        load(folder)


def test_an_adapter_of_another_model_does_not_fit(folder, tmp_path):
    adapted(AutoModelForCausalLM.from_pretrained(folder)).save_pretrained(tmp_path / "adapter")
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    cut = {name: tensor for name, tensor in weights.items() if "layers.0" not in name}
    save_file(cut, tmp_path / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=r"does not fit its base.*missing: .*layers\.0"):
        load(tmp_path / "adapter")


@pytest.mark.parametrize("wrapper", ["peft", "compiled", "parallel", "both", "offloaded", "on disk"])
def test_wrapped_models_answer_as_what_they_wrap(wrapper, tmp_path):
    plain = build("llama", 1).eval()
    if wrapper == "peft":
        peft = pytest.importorskip("peft")
        wrapped = peft.get_peft_model(plain, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    elif wrapper == "offloaded":
        wrapped = pytest.importorskip("accelerate").cpu_offload(plain, execution_device="cpu")
        assert Receiver(wrapped).identity.same_weights(Receiver(build("llama", 1)).identity)
    elif wrapper == "on disk":
        pytest.importorskip("accelerate").disk_offload(plain, tmp_path, execution_device="cpu")
        wrapped = plain
    elif wrapper == "parallel":
        wrapped = torch.nn.DataParallel(plain)
    else:
        wrapped = torch.compile(torch.nn.DataParallel(plain) if wrapper == "both" else plain, backend="eager")
    want = Receiver(build("llama", 1), tokenizer("chatml")).answer("Hello", max_new_tokens=4, do_sample=False)
    taken = Receiver(wrapped, tokenizer("chatml"))
    loaded = Receiver.from_pretrained(wrapped, tokenizer=tokenizer("chatml"))
    for receiver in (taken, loaded):
        model = C2CModel.from_models(receiver, Sharer(build("qwen2", 2), tokenizer("llama3")))
        assert token_ids(model.generate("Hello", max_new_tokens=4, do_sample=False)) == token_ids(want)


def test_adapters_that_work_outside_of_the_layers_are_refused():
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ModelLoadError, match="adds to the prompt"):
        Receiver(peft.get_peft_model(build("llama"), config))


@pytest.mark.parametrize("given", [None, 7, torch.nn.Linear(2, 2), "base"])
def test_objects_that_are_no_language_model(given):
    with pytest.raises(ModelLoadError, match="Expected"):
        Receiver.from_pretrained(build("llama").model if given == "base" else given)


@pytest.mark.parametrize(
    "options", [{"dtype": "bfloat16"}, {"device_map": "meta"}, {"revision": "v1"}, {"load_in_8bit": True}]
)
def test_options_that_a_loaded_model_can_not_take(options):
    with pytest.raises(ModelLoadError, match=f"{next(iter(options))}=.* loaded already"):
        load(build("llama"), **options)
    assert load(build("llama"), dtype="float32", device_map="cpu")[0].dtype == torch.float32


# -- types of weights --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spelling", "dtype"),
    [
        *(dict.fromkeys(["bf16", "bfloat16", "torch.bfloat16", "BF16", torch.bfloat16], torch.bfloat16).items()),
        *(dict.fromkeys(["fp16", "half", "float16", "torch.float16"], torch.float16).items()),
        *(dict.fromkeys(["fp32", "float", "float32", "torch.float32"], torch.float32).items()),
    ],
)
def test_spellings_of_types(folder, spelling, dtype):
    assert load(folder, dtype=spelling)[0].dtype == dtype


def test_types_that_are_none(folder):
    assert load(folder, torch_dtype="bf16")[0].dtype == torch.bfloat16
    for options in ({"dtype": "int8"}, {"dtype": torch.int32}, {"dtype": "float8_e4m3fn"}, {"dtype": "int4"}):
        with pytest.raises(ModelLoadError, match="type"):
            load(folder, **options)
    with pytest.raises(ModelLoadError, match="differ"):
        load(folder, dtype="float32", torch_dtype="bfloat16")
    with pytest.raises(ModelLoadError, match="could not load"):
        load(folder, dtpye="float32")


# -- files -------------------------------------------------------------------------------------------------------------


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("damage", ["pointer", "cut", "empty", "text"])
def test_damaged_files(folder, name, damage):
    path = folder / name
    cut(path) if damage == "cut" else path.write_text(
        {"pointer": POINTER, "empty": "", "text": "<html>404</html>"}[damage]
    )
    with pytest.raises(ModelLoadError, match="git-lfs pointer" if damage == "pointer" else path.stem):
        load(folder)


def test_a_pickle_under_another_name(folder):
    torch.save(build("llama").state_dict(), folder / "model.safetensors")
    with pytest.raises(ModelLoadError, match="pickle"):
        load(folder)


def test_a_pickle_that_runs_code_is_not_run(folder, tmp_path):
    class Code:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Code()}, folder / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match="could not load"):
        load(folder)
    assert not (tmp_path / "ran").exists()


def test_shards(tmp_path):
    model = build("llama").eval()
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert torch.equal(load(tmp_path)[0](IDS).logits, model(IDS).logits)
    index = tmp_path / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    kept = shard.read_bytes()
    shard.unlink()
    with pytest.raises(ModelLoadError, match=f"lacks 1 .*{shard.name}"):
        load(tmp_path)
    shard.write_bytes(kept)
    del whole["weight_map"]["model.norm.weight"]
    map_ = {name: file for name, file in whole["weight_map"].items() if file != shard.name}
    index.write_text(json.dumps(whole | {"weight_map": map_}))
    with pytest.raises(ModelLoadError, match="missing"):
        load(tmp_path)


def test_tokenizers_that_do_not_belong_to_the_model(folder):
    small = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SIZES | {"vocab_size": 100, "num_hidden_layers": 1, "num_attention_heads": 4})
    )
    with pytest.raises(PromptError, match="embeddings for 100"):
        load(small, tokenizer=tokenizer("chatml"))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelLoadError, match="tokenizer"):
        load(folder)


def test_a_tokenizer_without_padding_token(folder):
    words = tokenizer("chatml")
    words.pad_token = None
    receiver = Receiver(load(folder)[0], words)
    one, two = receiver.answer(["Hello", "Name three rivers."], max_new_tokens=3, do_sample=False)
    assert token_ids(two) == token_ids(receiver.answer("Name three rivers.", max_new_tokens=3, do_sample=False))
    assert token_ids(one) == token_ids(receiver.answer("Hello", max_new_tokens=3, do_sample=False))


# -- GGUF --------------------------------------------------------------------------------------------------------------

WIDTH, HIDDEN, HEAD = 32, 64, 16
FACTORS = [1.0, 1.0, 1.0, 1.0, 1.5, 8.0, 8.0, 8.0]


def gguf(path, architecture="llama", keys=(), tensors=(), without=""):
    """Write a one-layer model with a byte-level vocabulary, without one of its tensors."""
    from gguf import GGUFWriter
    from tokenizers.pre_tokenizers import ByteLevel

    vocabulary = ["<|end|>", *sorted(ByteLevel.alphabet()), "he"]
    writer = GGUFWriter(path, architecture)
    facts = {"context_length": 512, "block_count": 1, "head_count": 2, "head_count_kv": 1, "rope_freq_base": 500000.0}
    facts |= {"embedding_length": WIDTH, "feed_forward_length": HIDDEN, "rope_dimension_count": HEAD}
    facts |= {"layer_norm_rms_eps": 1e-5, "vocab_size": len(vocabulary), "tokenizer_model": "gpt2"}
    facts |= {"token_list": vocabulary, "token_merges": ["h e"], "bos_token_id": 0, "eos_token_id": 0}
    facts |= {"token_types": [3] + [1] * (len(vocabulary) - 1)}
    for name, value in facts.items():
        getattr(writer, f"add_{name}")(value)
    for name, value in dict(keys).items():
        add = writer.add_string if isinstance(value, str) else writer.add_float32
        (writer.add_uint32 if isinstance(value, int) else add)(f"{architecture}.{name}", value)
    shapes = {"token_embd": (len(vocabulary), WIDTH), "output": (len(vocabulary), WIDTH), "output_norm": (WIDTH,)}
    layer = {"attn_norm": (WIDTH,), "ffn_norm": (WIDTH,), "attn_q": (WIDTH, WIDTH), "attn_output": (WIDTH, WIDTH)}
    layer |= {"attn_k": (HEAD, WIDTH), "attn_v": (HEAD, WIDTH)}
    layer |= {"ffn_gate": (HIDDEN, WIDTH), "ffn_up": (HIDDEN, WIDTH), "ffn_down": (WIDTH, HIDDEN)}
    random = np.random.default_rng(0)
    weights = {f"{n}.weight": random.normal(0, 0.1, shape) for n, shape in shapes.items()}
    weights |= {f"blk.0.{n}.weight": random.normal(0, 0.1, shape) for n, shape in layer.items()}
    weights.pop(without, None)
    for name, values in (weights | dict(tensors)).items():
        writer.add_tensor(name, np.asarray(values, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama3_factors(factor, length):
    """The factors of rotary frequencies as they are written to GGUF files of Llama 3."""
    bare = 1.0 / 500000.0 ** (np.arange(0, HEAD, 2) / HEAD)
    waves = 2 * np.pi / bare
    smooth = (length / waves - 1.0) / (4.0 - 1.0)
    middle = 1.0 / ((1 - smooth) / factor + smooth)
    return np.where(waves < length / 4, 1.0, np.where(waves > length, factor, middle))


@pytest.mark.parametrize(
    ("keys", "tensors", "expected"),
    [
        ({}, {}, {"rope_type": "default"}),
        ({"rope.scaling.type": "none"}, {}, {"rope_type": "default"}),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope.scale_linear": 2.0}, {}, {"rope_type": "linear", "factor": 2.0}),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 128},
            {},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        ),
        (
            {},
            {"rope_freqs.weight": llama3_factors(32.0, 8192)},
            {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192},
        ),
        ({}, {"rope_freqs.weight": np.ones(HEAD // 2)}, {"rope_type": "default"}),
        (
            {"rope.scaling.original_context_length": 128},
            {"rope_factors_long.weight": [2.0] * 8, "rope_factors_short.weight": [1.0] * 8},
            {"rope_type": "longrope", "long_factor": [2.0] * 8, "factor": 4.0},
        ),
    ],
)
def test_rotary_scaling_of_a_gguf_is_carried_over(tmp_path, keys, tensors, expected):
    model, _, _ = load(gguf(tmp_path / "tiny.gguf", keys=keys, tensors=tensors))
    rope = model.config.rope_parameters
    assert {key: rope.get(key) for key in expected} == expected
    inverse = model.model.rotary_emb.inv_freq
    bare = 1.0 / 500000.0 ** (torch.arange(0, HEAD, 2) / HEAD)
    if "rope_freqs.weight" in tensors:
        torch.testing.assert_close(inverse, bare / torch.tensor(tensors["rope_freqs.weight"]).float())
    else:
        assert torch.allclose(inverse, bare) == (expected["rope_type"] in ("default", "longrope"))


@pytest.mark.parametrize(
    ("keys", "tensors", "message"),
    [
        ({}, {"rope_freqs.weight": FACTORS}, "not those of Llama 3"),
        ({"rope.scaling.type": "spiral"}, {}, "spiral"),
        ({"rope.scaling.type": "yarn", "rope.scaling.yarn_log_multiplier": 0.1}, {}, "yarn_log_multiplier"),
        ({}, {"blk.0.attn_q.bias": np.ones(WIDTH)}, "biases"),
    ],
)
def test_what_a_gguf_would_lose_is_refused(tmp_path, keys, tensors, message):
    with pytest.raises(ModelLoadError, match=message):
        load(gguf(tmp_path / "tiny.gguf", keys=keys, tensors=tensors))


def test_a_gguf_without_one_of_its_tensors_such_as_the_first_of_several_files(tmp_path):
    with pytest.raises(ModelLoadError, match=r"missing: .*up_proj"):
        load(gguf(tmp_path / "tiny.gguf", without="blk.0.ffn_up.weight"))


def test_damaged_gguf_files(tmp_path, folder):
    path = gguf(tmp_path / "tiny.gguf")
    whole = path.read_bytes()
    for size in (len(whole) - 100, len(whole) // 2, 200, 20):
        path.write_bytes(whole[:size])
        with pytest.raises(ModelLoadError, match="tiny"):
            load(path)
    for content, message in ((POINTER.encode(), "git-lfs"), ((folder / "model.safetensors").read_bytes(), "no GGUF")):
        path.write_bytes(content)
        with pytest.raises(ModelLoadError, match=message):
            load(path)
