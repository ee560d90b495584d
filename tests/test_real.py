"""The real models of ``c2c pull``. Skipped where they are not in the cache; ``make test-real`` fetches them."""

from __future__ import annotations

import os
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch

from c2c import C2CModel, hub_aliases, kv_cache
from c2c.language_model import Receiver
from c2c.prompting import RenderOptions
from c2c.sharer import Sharer
from c2c.systems import SystemOptions, make_system
from tiny import assert_equal_caches, entries

CACHE = os.environ.get("C2C_CACHE")  # before the fixture that isolates other tests
pytestmark = pytest.mark.real

PROMPTS = [
    "Write one sentence about rivers.",
    "What is 2+2?",
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say hello in Chinese: 你好 🙂"}],
]


def use_real_models(monkeypatch, *aliases: str) -> None:
    """Use the user's own cache, which other tests must not see; skip where a model is not in it."""
    if CACHE is None:
        monkeypatch.delenv("C2C_CACHE", raising=False)
    else:
        monkeypatch.setenv("C2C_CACHE", CACHE)
    missing = [alias for alias in aliases if not hub_aliases.is_pulled(alias)]
    if missing:
        (pytest.fail if os.environ.get("C2C_REAL") else pytest.skip)(f"not pulled: {missing}")


@pytest.fixture(autouse=True)
def need(monkeypatch):
    """Skip a test without its models."""
    use_real_models(monkeypatch)
    return partial(use_real_models, monkeypatch)


@pytest.fixture(scope="module")
def loaded():
    """Models are loaded once for all tests of this module."""
    return {}


@pytest.fixture
def pair(loaded, need):
    need("smollm2-135m", "qwen2.5-coder-0.5b")
    if "pair" not in loaded:
        loaded["pair"] = C2CModel.from_models("smollm2-135m", "qwen2.5-coder-0.5b")
    return loaded["pair"]


def test_the_models_answer(pair):
    for model in (pair.receiver, pair.sharers[0]):
        assert "Paris" in model.answer("What is the capital of France?", max_new_tokens=12).text


def test_untrained_equals_the_receiver_bit_for_bit(pair):
    for prompt in PROMPTS:
        fused = pair.prefill(prompt)
        own = pair.receiver.prefill(fused.tokens, kv_cache.length(fused.cache))
        assert_equal_caches(fused.cache, own)
        assert pair.generate(prompt, max_new_tokens=12).text == pair.receiver.answer(prompt, max_new_tokens=12).text


def test_a_batch_equals_its_singles_with_an_open_fuser(pair):
    fuser = pair.fusers[0]
    torch.nn.init.normal_(fuser.up, std=2e-4, generator=torch.Generator().manual_seed(0))
    try:
        batch = pair.generate(PROMPTS, max_new_tokens=12)
        singles = [pair.generate(prompt, max_new_tokens=12) for prompt in PROMPTS]
        assert [result.text for result in batch] == [result.text for result in singles]
        own = pair.receiver.prefill(pair.receiver.encode(PROMPTS[0]))
        fused = pair.prefill(PROMPTS[0]).cache
        cut = kv_cache.crop(own, kv_cache.length(fused))
        assert any(not torch.equal(a, b) for a, b in zip(entries(fused), entries(cut), strict=True))
    finally:
        torch.nn.init.zeros_(fuser.up)


def test_every_message_token_takes_the_sharer_token_of_its_last_character(pair):
    prompt = pair.aligner.align(
        pair.receiver.tokenizer,
        [pair.sharers[0].tokenizer],
        [[{"role": "user", "content": "Größenwahn, 你好, naïve 🙂 x = f(y)"}]],
        RenderOptions(),
    )[0]
    alignment = prompt.chunks[0].alignments[0]
    last = prompt.sharers[0].length - 1
    assert int(alignment.sharer.max()) == last
    assert alignment.sharer.tolist() == sorted(alignment.sharer.tolist())


def test_text_to_text_reports_both_costs(pair):
    result = make_system("text", pair, SystemOptions(message_tokens=8)).generate("What is copper?", max_new_tokens=8)
    assert result.message.text.strip()
    assert result.seconds_to_first_token > result.message.seconds_total


def test_bfloat16_and_device_map(need):
    need("smollm2-135m", "qwen2.5-coder-0.5b")
    model = C2CModel.from_models("smollm2-135m", "qwen2.5-coder-0.5b", dtype="bfloat16", device_map="cpu")
    fused = model.prefill(PROMPTS[0])
    assert kv_cache.layer(fused.cache, 0)[0].dtype == torch.bfloat16
    assert model.generate(PROMPTS[0], max_new_tokens=6).text == model.receiver.answer(PROMPTS[0], max_new_tokens=6).text


@pytest.mark.parametrize(("receiver", "sharer"), list(product(["gemma3-270m", "smollm2-135m"], repeat=2))[:3])
def test_gemma_beyond_its_sliding_window(receiver, sharer, need):
    """700 words are more than Gemma 3's window of 512; every layer must still hold every token."""
    need(receiver, sharer)
    model = C2CModel.from_models(receiver, sharer)
    prompt = "The river runs to the sea. " * 100 + "What does the river do?"
    fused = model.prefill(prompt)
    assert {keys.shape[2] for keys, _ in kv_cache.layers(fused.cache)} == {fused.tokens.length - 1}
    plain = model.receiver.model.generate(
        input_ids=fused.tokens.ids, attention_mask=fused.tokens.mask.long(), max_new_tokens=8, do_sample=False
    )
    text = model.receiver.tokenizer.decode(plain[0, fused.tokens.length :], skip_special_tokens=True)
    assert model.generate(prompt, max_new_tokens=8, do_sample=False).text == text


def test_a_gguf_file_is_the_model_that_was_pulled(need):
    """Loads the file itself, where one was kept by ``c2c pull --keep-gguf``."""
    need("smollm2-135m")
    files = list(Path(hub_aliases.local_path("smollm2-135m")).glob("*.gguf"))
    if not files:
        pytest.skip("no GGUF kept; run c2c pull --force --keep-gguf smollm2-135m")
    assert (
        Receiver.from_pretrained(files[0]).identity.weights == Sharer.from_pretrained("smollm2-135m").identity.weights
    )
