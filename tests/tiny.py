"""Tiny random models and pairs, built in the test; no downloads."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    AddedToken,
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from c2c import C2CModel, kv_cache
from c2c.language_model import Receiver
from c2c.sharer import Sharer

FIXTURES = Path(__file__).parent / "fixtures"
WINDOW = 16

SIZES = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "vocab_size": 512,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}
NO_SPECIALS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


GEMMA_LAYERS = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
# model, configuration, layers, heads, KV heads, other keys
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig, 5, 6, 3, {"head_dim": 8}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, 3, 4, 2, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, 4, 4, 1, {"head_dim": 16}),
    "gemma3": (
        *(Gemma3ForCausalLM, Gemma3TextConfig, 4, 2, 1),
        {"head_dim": 16, "sliding_window": WINDOW, "layer_types": GEMMA_LAYERS},
    ),
}


def build(family: str, seed: int = 0):
    """A random model of a family; depths, heads and head sizes differ between families."""
    torch.manual_seed(seed)
    model, config, layers, heads, kv_heads, others = FAMILIES[family]
    sizes = {"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    return model(config(**SIZES, **NO_SPECIALS, **sizes, **others))


def tokenizer(name: str):
    """One of the fixture tokenizers, each with its own vocabulary and template."""
    return AutoTokenizer.from_pretrained(FIXTURES / "align" / "tokenizers" / name)


def pair(receiver: str = "llama", sharer: str = "qwen2", tokenizers=("chatml", "llama3"), **options) -> C2CModel:
    """A receiver and a sharer of two families, with an untrained fuser."""
    ours = Receiver(build(receiver, 1), tokenizer(tokenizers[0]), receiver)
    theirs = Sharer(build(sharer, 2), tokenizer(tokenizers[1]), sharer)
    return C2CModel.from_models(ours, theirs, **options)


def open_fusers(model: C2CModel, scale: float = 1.0) -> C2CModel:
    """Give the fusers random weights, so that they really change the cache."""
    generator = torch.Generator().manual_seed(3)
    for fuser in model.fusers:
        for name, parameter in fuser.named_parameters():
            if name in ("up", "up_bias"):
                torch.nn.init.normal_(parameter, std=scale, generator=generator)
            elif name.endswith("gate_logit") and parameter.dim() == 0:
                torch.nn.init.ones_(parameter)
    return model


class Scores:
    """A logits processor that changes nothing and keeps what it sees."""

    def __init__(self):
        self.seen = []

    def __call__(self, ids, scores):
        self.seen.append(scores.clone())
        return scores


def pair_folders(make_folder) -> list[str]:
    """Folders of a tiny random receiver and sharer with different tokenizers; ``make_folder(name)`` makes one.

    The tokenizers spell " A" to " H" with a token each, as those of real models do.
    """
    folders = []
    for name, family in (("chatml", "llama"), ("llama3", "qwen2")):
        folder = make_folder(name)
        build(family).save_pretrained(folder)
        words = tokenizer(name)
        words.add_tokens([AddedToken(f" {letter}", normalized=False) for letter in "ABCDEFGH"])
        words.save_pretrained(folder)
        folders.append(str(folder))
    return folders


def saved_fuser(make_folder, scale: float = 1.0) -> str:
    """Folder of a fuser with random weights between the models of :func:`pair_folders`."""
    model = open_fusers(C2CModel.from_models(*pair_folders(make_folder), fuser_options={"rank": 8}), scale)
    model.fusers[0].config.training = {"config": "random"}
    folder = make_folder("fuser")
    model.save_pretrained(folder)
    return str(folder)


def entries(cache) -> list[torch.Tensor]:
    """Keys and values of a cache, layer by layer, each ``[batch, kv_heads, tokens, head_dim]``."""
    return [entry for layer in kv_cache.layers(cache) for entry in layer]


def assert_equal_caches(one, other, **tolerance):
    """Two caches hold the same numbers, bit for bit, or within ``rtol`` and ``atol``."""
    for entry, expected in zip(entries(one), entries(other), strict=True):
        torch.testing.assert_close(entry, expected, **({"rtol": 0, "atol": 0} | tolerance))


def token_ids(results) -> list[list[int]]:
    """The new token ids of one or several results."""
    return [result.ids.tolist() for result in (results if isinstance(results, list) else [results])]


def memory_pair(receiver: str = "llama", **options) -> C2CModel:
    """A pair with a memory fuser of random weights that counts as trained."""
    model = pair(receiver, fuser="memory", fuser_options={"rank": 8} | options)
    model.fusers[0].config.training = {"config": "random"}
    generator = torch.Generator().manual_seed(4)
    for name, parameter in model.fusers[0].named_parameters():
        if name in ("weight", "up", "bias"):
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return model


def copy_pair(family: str = "qwen2", **options) -> C2CModel:
    """One model on both sides, with a copy fuser."""
    ours, theirs = (role(build(family, 2), tokenizer("chatml"), family) for role in (Receiver, Sharer))
    return C2CModel.from_models(ours, theirs, fuser="copy", fuser_options=options)


def published_pair(name: str = "pair_a", mode: str = "sequential") -> C2CModel:
    """A tiny published checkpoint with its models: ``pair_a`` has one sharer, ``pair_c`` two."""
    folder = FIXTURES / name
    number = ("",) if name == "pair_a" else ("1", "2")
    return C2CModel.from_published(
        [folder / f"checkpoint{i}" for i in number],
        receiver=folder / "receiver",
        sharer=[folder / f"sharer{i}" for i in number],
        dtype="float32",
        mode=mode,
    )
