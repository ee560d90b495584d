"""The prefill store: each prompt once, never stale, within its budget, and readable by its owner alone."""

from __future__ import annotations

import os
import stat

import pytest
import torch

from c2c import kv_cache
from c2c.language_model import Receiver
from c2c.tokens import left_pad
from c2c.training.prefill_store import PrefillStore, PromptRecords
from tiny import build, tokenizer

PROMPTS = [[5, 6, 7], [8, 9], [5, 6, 7, 8, 9]]


@pytest.fixture(scope="module")
def receiver():
    return Receiver(build("llama"), tokenizer("chatml"), "r")


@pytest.mark.parametrize("on_disk", [False, True])
def test_each_prompt_is_computed_once(receiver, tmp_path, on_disk):
    store = PrefillStore(receiver, [0, 2], folder=tmp_path if on_disk else None, batch=2)
    store.fill([*PROMPTS, PROMPTS[0]])
    first = store.get([*PROMPTS, PROMPTS[0]])
    assert store.computed == 3
    assert set(first[0].layers) == {0, 2}
    if on_disk:
        again = PrefillStore(receiver, [0, 2], folder=tmp_path)
        second = again.get(PROMPTS)
        assert again.computed == 0
        assert all(torch.equal(a.layers[0][0], b.layers[0][0]) for a, b in zip(first, second, strict=False))


def test_entries_are_the_models_own_prefill(receiver):
    store = PrefillStore(receiver, range(receiver.geometry.layers), batch=2)
    for ids, entry in zip(PROMPTS, store.get(PROMPTS), strict=True):
        own = receiver.prefill(left_pad([ids], 0))
        for layer, pair in enumerate(kv_cache.layers(own)):
            for stored, expected in zip(entry.layers[layer], pair, strict=True):
                assert torch.allclose(stored.float(), expected, atol=0.02)


def test_a_stale_entry_is_impossible(receiver, tmp_path):
    """Other weights under the same name, or other layers, are not found in the old store."""
    PrefillStore(receiver, [0], folder=tmp_path).fill([[5, 6]])
    assert [5, 6] in PrefillStore(receiver, [0], folder=tmp_path)
    assert [5, 6] not in PrefillStore(receiver, [0, 1], folder=tmp_path)
    changed = Receiver(build("llama", seed=1), receiver.tokenizer, receiver.name)
    assert [5, 6] not in PrefillStore(changed, [0], folder=tmp_path)


def test_the_budget_is_kept_and_filling_ends_with_it(receiver):
    store = PrefillStore(receiver, range(3), budget=1, batch=1)
    assert len(store.get([[5, 6]])) == 1
    assert store.used == 0
    store.fill(PROMPTS)
    assert store.computed == 2, "nothing is computed that can't be stored"


def test_progress_counts_the_tokens_that_are_left_to_do(receiver):
    """The time left follows from tokens; by prompts it was wrong by the ratio of the longest to the shortest."""
    store, seen = PrefillStore(receiver, [0], batch=1), []
    store.get([PROMPTS[0]])
    store.fill(PROMPTS, lambda done, total: seen.append((done, total)))
    assert seen == [(2, 7), (7, 7)]


def test_files_and_folders_are_readable_by_their_owner_alone(receiver, tmp_path):
    before = os.umask(0o022)
    try:
        store = PrefillStore(receiver, [0], folder=tmp_path / "store")
        store.fill(PROMPTS)
        PromptRecords(store, "drafts").get(PROMPTS, [1, 1, 1], lambda part: ["text"] * len(part))
    finally:
        os.umask(before)
    made = [tmp_path / "store", *(tmp_path / "store").rglob("*")]
    assert len(made) == 2 + 3 + 1
    assert {stat.S_IMODE(path.stat().st_mode) for path in made} == {0o700, 0o600}


def test_records_are_computed_once_per_prompt_and_setting(receiver, tmp_path):
    store, asked = PrefillStore(receiver, [0], folder=tmp_path), []

    def compute(part):
        asked.extend(part)
        return [f"{index}" for index in part]

    records = PromptRecords(store, "drafts")
    assert records.get(PROMPTS, [1, 1, 1], compute) == ["0", "1", "2"]
    assert asked == [1, 0, 2], "short prompts first"
    assert PromptRecords(store, "drafts").get(PROMPTS[:1], [1], compute) == ["0"]
    records.get(PROMPTS[:1], [2], compute)
    assert asked == [1, 0, 2, 0]
