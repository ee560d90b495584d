"""The blend: 0 is the receiver bit for bit, 1 the ordinary run, and what lies between is between."""

from __future__ import annotations

import pytest
import torch

from c2c import C2CModel, kv_cache
from c2c.errors import PromptError
from tiny import Scores, open_fusers, pair

PROMPT = "Größe 42? Name three uses of copper."


def scores(generate, *args, **kwargs):
    """Return all logits of an answer and its report."""
    seen = Scores()
    result = generate(*args, max_new_tokens=6, do_sample=False, logits_processor=[seen], **kwargs)
    return torch.stack(seen.seen), (result[0] if isinstance(result, list) else result).report


@pytest.fixture(scope="module")
def model():
    return open_fusers(pair())


@pytest.mark.parametrize("family", ["bottleneck", "c2c", "linear"])
def test_zero_is_the_receiver_and_one_the_ordinary_run(family):
    made = pair(fuser=family)
    for parameter in made.fusers.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    alone = scores(made.receiver.answer, PROMPT)[0]
    logits, report = scores(made.generate, PROMPT, blend=0.0)
    assert torch.equal(logits, alone)
    assert report.sharer_bytes == 0
    assert any("blend 0" in note for note in report.notes)
    (whole, report), (ordinary, expected) = scores(made.generate, PROMPT, blend=1.0), scores(made.generate, PROMPT)
    assert torch.equal(whole, ordinary)
    assert report.notes == expected.notes
    assert not torch.equal(ordinary, alone)


def test_the_cache_moves_on_a_straight_line(model):
    def entries(blend):
        return torch.stack([torch.stack(pair) for pair in kv_cache.layers(model.prefill(PROMPT, blend=blend).cache)])

    own, half, whole = entries(0.0), entries(0.5), entries(1.0)
    assert not torch.allclose(own, whole)
    torch.testing.assert_close(half, (own + whole) / 2)


@pytest.mark.parametrize("mode", ["sequential", "parallel"])
def test_several_sharers_and_batches(mode):
    made = pair()
    both = open_fusers(C2CModel.from_models(made.receiver, [made.sharers[0], made.sharers[0]], mode=mode))
    batch = [PROMPT, "2 + 2 ="]
    ordinary = scores(both.generate, batch)[0]
    assert torch.equal(scores(both.generate, batch, blend=0.0)[0], scores(both.receiver.answer, batch)[0])
    assert torch.equal(scores(both.generate, batch, blend=1.0)[0], ordinary)
    assert not torch.equal(scores(both.generate, batch, blend=0.5)[0], ordinary)


@pytest.mark.parametrize("blend", [-0.1, 1.5, float("nan")])
def test_impossible_blends_are_refused(model, blend):
    with pytest.raises(PromptError, match="from 0"):
        model.generate(PROMPT, blend=blend)
