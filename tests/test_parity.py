"""The published fuser gives the published numbers, through the public API."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from c2c import C2CModel, kv_cache
from c2c.alignment import Alignment, Chunk
from c2c.fusion import Source, fuse
from c2c.tokens import TokenBatch
from tiny import FIXTURES, Scores, entries, published_pair

A, C = FIXTURES / "pair_a", FIXTURES / "pair_c"
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def model():
    return published_pair("pair_a")


@pytest.fixture(scope="module", params=["sequential", "parallel"])
def two_sharers(request):
    return published_pair("pair_c", request.param)


@pytest.fixture(scope="module")
def expected():
    return load_file(A / "eval.safetensors")


def mask(*runs):
    """A mask of runs, each a value and its length."""
    return torch.tensor([value for value, count in runs for _ in range(count)])


WHOLE = mask((1, 12), (0, 1))


def assert_close(one, other):
    assert (one - other).abs().max() < TOLERANCE


def assert_published(fused, expected, prefix):
    assert_close(fused.last_logits, expected[f"{prefix}.last_logits"])
    for layer, (keys, values) in enumerate(zip(fused.keys, fused.values, strict=True)):
        assert_close(keys, expected[f"{prefix}.layer{layer}.key"])
        assert_close(values, expected[f"{prefix}.layer{layer}.value"])


def assert_published_scores(model, ids, fuse_mask, expected, prefix=""):
    """The ids and the scores of every step of greedy decoding."""
    seen = Scores()
    new = model.generate_ids(ids, ids, fuse_mask=fuse_mask, max_new_tokens=16, logits_processor=[seen])
    assert new.tolist() == expected[f"{prefix}generate.sequences"][:, ids.shape[1] :].tolist()
    assert_close(torch.stack(seen.seen, dim=1), expected[f"{prefix}generate.scores"])


def assert_rows_equal_singles(model, ids, real, masks, new_tokens=8):
    """Each row of a left-padded batch is what its real tokens are alone."""
    padding = {"receiver_mask": real, "sharer_mask": real}
    together = model.fuse_ids(ids, ids, fuse_mask=masks, **padding)
    new = model.generate_ids(ids, ids, fuse_mask=masks, max_new_tokens=new_tokens, **padding)
    for row, own in enumerate(real):
        one, fuse_mask = ids[row : row + 1, own], masks[row, own]
        alone = model.fuse_ids(one, one, fuse_mask=fuse_mask)
        assert_close(together.last_logits[row], alone.last_logits[0])
        for a, b in zip([*together.keys, *together.values], [*alone.keys, *alone.values], strict=True):
            assert_close(a[row, :, -one.shape[1] :], b[0])
        single = model.generate_ids(one, one, fuse_mask=fuse_mask, max_new_tokens=new_tokens)
        assert new[row].tolist() == single[0].tolist()


@pytest.mark.parametrize(
    ("prefix", "fuse_mask", "sections"),
    [
        ("fused", WHOLE, None),
        ("partial_front", mask((1, 7), (0, 6)), None),
        ("partial_back", mask((0, 5), (1, 7), (0, 1)), None),
        ("two_fused_sections", WHOLE, [4, 8, 1]),
    ],
)
def test_fused_cache_and_logits(model, expected, prefix, fuse_mask, sections):
    ids = expected["input_ids"]
    assert_published(model.fuse_ids(ids, ids, fuse_mask=fuse_mask.bool(), sections=sections), expected, prefix)


def test_receiver_alone_is_what_nothing_selected_gives(model, expected):
    ids = expected["input_ids"]
    fused = model.fuse_ids(ids, ids, fuse_mask=torch.zeros_like(ids, dtype=torch.bool))
    assert_published(fused, expected, "receiver_alone")
    assert fused.report.fused_tokens == 0
    assert any("nothing was fused" in note for note in fused.report.notes)


@pytest.mark.parametrize("mode", ["sequential", "parallel"])
def test_scores_of_every_step(mode, expected):
    assert_published_scores(published_pair("pair_a", mode), expected["input_ids"], WHOLE, expected)


def test_the_end_token_is_kept(model, expected):
    """The published code writes the pad id in its place; everything before is the same."""
    ids = expected["input_ids"]
    new = model.generate_ids(ids, ids, fuse_mask=WHOLE, max_new_tokens=16, eos_token_id=11, pad_token_id=0)
    reference = expected["eos_case.sequences"][0, 13:].tolist()
    assert new[0].tolist() == [*reference[:-1], 11]
    assert reference[-1] == 0


def test_batch(model, expected):
    ids = expected["batch2.input_ids"]
    assert_close(model.fuse_ids(ids, ids, fuse_mask=WHOLE).last_logits, expected["batch2.last_logits"])
    new = model.generate_ids(ids, ids, fuse_mask=WHOLE, max_new_tokens=8)
    assert new.tolist() == expected["batch2.generate.sequences"][:, 13:].tolist()


def test_rows_with_their_own_masks_equal_singles(model, expected):
    ids = expected["batch2.input_ids"].repeat(2, 1)
    masks = torch.stack([WHOLE, mask((0, 5), (1, 7), (0, 1)), mask((1, 7), (0, 6)), WHOLE])
    assert_rows_equal_singles(model, ids, torch.ones_like(ids, dtype=torch.bool), masks)


def test_a_left_padded_batch_equals_singles(model, expected):
    """The published code attends to padding while decoding (its defect D2)."""
    long = expected["input_ids"]
    ids = torch.cat([long, torch.cat([torch.zeros(1, 4, dtype=torch.long), long[:, :9]], dim=1)])
    real = torch.tensor([[True] * 13, [False] * 4 + [True] * 9])
    assert_rows_equal_singles(model, ids, real, WHOLE.expand(2, -1), new_tokens=10)


def test_padding_inside_a_prompt_is_never_attended_to(model, expected):
    """Alignment pads lie in the middle; what their ids are must not matter, while decoding either."""
    ids = expected["input_ids"].clone()
    real = torch.tensor([[True] * 4 + [False] * 3 + [True] * 6])
    options = {"fuse_mask": mask((0, 7), (1, 5), (0, 1)), "receiver_mask": real, "sharer_mask": real}
    answers = []
    for pad in (0, 77):
        ids[:, 4:7] = pad
        answers.append(model.generate_ids(ids, ids, max_new_tokens=12, **options).tolist())
    assert answers[0] == answers[1]


def test_two_sharers(two_sharers):
    expected, mode = load_file(C / "eval.safetensors"), two_sharers.mode
    ids = expected["input_ids"]
    for bits in (1, 2, 3):
        fuse_mask = mask((bits, 14), (0, 1))
        fused = two_sharers.fuse_ids(ids, ids, fuse_mask=fuse_mask)
        assert_published(fused, expected, f"{mode}.mask{bits}.fused")
        assert_published_scores(two_sharers, ids, fuse_mask, expected, f"{mode}.mask{bits}.")
    mixed = two_sharers.fuse_ids(ids, ids, fuse_mask=mask((1, 5), (3, 5), (0, 5)))
    assert_published(mixed, expected, f"{mode}.mixed.fused")
    all_sharers = two_sharers.fuse_ids(ids, ids, fuse_mask=mask((1, 14), (0, 1)).bool())
    assert_published(all_sharers, expected, f"{mode}.mask3.fused")


def test_two_sharers_left_padded_and_with_masks_of_their_own(two_sharers):
    prompt = load_file(C / "eval.safetensors")["input_ids"]
    ids, fuse = torch.zeros(4, 15, dtype=torch.long), torch.zeros(4, 15, dtype=torch.long)
    real = torch.zeros(4, 15, dtype=torch.bool)
    for row, (length, bits) in enumerate([(15, 3), (9, 1), (12, 2), (9, 3)]):
        ids[row, -length:], real[row, -length:], fuse[row, -length:-1] = prompt[0, :length], True, bits
    assert_rows_equal_singles(two_sharers, ids, real, fuse)


def test_the_sharers_cache(model, expected):
    with torch.no_grad():
        cache = model.sharers[0].model(expected["input_ids"][:, :12], use_cache=True).past_key_values
    names = [f"sharer.layer{layer}.{kind}" for layer in range(3) for kind in ("key", "value")]
    for entry, name in zip(entries(cache), names, strict=True):
        assert_close(entry, expected[name])


class Training:
    """The published training step on the fixture's batch, with the recorded gate noise."""

    def __init__(self, model):
        self.model, self.batch = model, load_file(A / "train_batch.safetensors")
        ids, real = self.batch["input_ids"], self.batch["attention_mask"].bool()
        self.prompt = TokenBatch(ids[:, :8], real[:, :8], self.batch["position_ids"][:, :8], padded=True)
        rows, columns = real[:, :8].nonzero(as_tuple=True)
        self.alignment = Alignment(rows, columns, columns)
        order = [f"noise.layer{layer}.{kind}_u" for layer in range(4) for kind in ("key", "value")]
        # recorded for every position of the batch, pads included; ours packs the real ones
        self.noise = [self.batch[name][rows, :, columns].transpose(0, 1).unsqueeze(0) for name in order]

    def loss(self):
        model, draws = self.model, iter(self.noise)
        model.fusers[0].uniform = lambda shape: next(draws)
        cache = model.receiver.prefill(self.prompt)
        source = Source(model.sharers[0], self.prompt, model.sharers[0].prefill(self.prompt), model.fusers[0])
        fuse(cache, model.receiver, self.prompt, [source], Chunk(8, (self.alignment,)))
        logits = model.receiver.model(
            input_ids=self.batch["input_ids"][:, 8:],
            attention_mask=self.batch["attention_mask"].long(),
            position_ids=self.batch["position_ids"][:, 8:],
            past_key_values=cache,
            use_cache=True,
        ).logits
        labels = self.batch["labels"][:, 9:]
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=-100)


def test_training_loss_gradients_and_one_step():
    model = published_pair("pair_a")
    expected = json.loads((A / "expected.json").read_text())
    gradients = load_file(A / "train_gradients.safetensors")
    fuser, training = model.fusers[0], Training(model)
    with torch.no_grad():
        assert float(training.loss()) == pytest.approx(expected["train.eval_mode_loss"], abs=TOLERANCE)
    fuser.train()
    fuser.on_step(expected["train.temperature_step"])
    assert fuser.temperature == pytest.approx(expected["train.gate_temperature"])
    loss = training.loss()
    loss.backward()
    assert float(loss.detach()) == pytest.approx(expected["train.loss"], abs=TOLERANCE)
    found = {
        f"projector{index}.{name}": parameter.grad
        for index, projector in enumerate(fuser.layers)
        for name, parameter in projector.named_parameters()
    }
    assert found.keys() == gradients.keys()
    for name, gradient in found.items():
        assert_close(gradient, gradients[name])
    norm = torch.nn.utils.clip_grad_norm_(fuser.parameters(), 1.0)
    assert float(norm) == pytest.approx(expected["train.global_grad_norm"], rel=1e-4)
    torch.optim.AdamW(fuser.parameters(), lr=1e-3, weight_decay=0.01).step()
    with torch.no_grad():
        after = float(training.loss())
        fuser.eval()
        hard = float(training.loss())
    assert after == pytest.approx(expected["train.loss_after_one_adamw_step_same_noise"], abs=TOLERANCE)
    assert hard == pytest.approx(expected["train.eval_mode_loss_after_step"], abs=TOLERANCE)


@pytest.mark.parametrize("mode", ["sequential", "parallel"])
def test_a_converted_checkpoint_is_the_same_model_bit_for_bit(mode, tmp_path):
    model = published_pair("pair_c", mode)
    model.save_pretrained(tmp_path)
    again = C2CModel.from_pretrained(
        tmp_path, receiver=C / "receiver", sharer=[C / "sharer1", C / "sharer2"], dtype="float32"
    )
    assert again.mode == mode
    ids, fuse_mask = load_file(C / "eval.safetensors")["input_ids"], mask((1, 4), (3, 6), (2, 4), (0, 1))
    one, other = (m.fuse_ids(ids, ids, fuse_mask=fuse_mask) for m in (model, again))
    assert torch.equal(one.last_logits, other.last_logits)
    for a, b in zip([*one.keys, *one.values], [*other.keys, *other.values], strict=True):
        assert torch.equal(a, b)


def test_no_token_is_prefilled_twice_or_in_vain(model, expected):
    """The sharer does not run past the last fused position, nor the receiver twice over any token."""
    ids, seen = expected["input_ids"], []
    hooks = [
        m.model.get_decoder().register_forward_pre_hook(
            lambda module, args, kwargs, who=who: seen.append((who, kwargs["input_ids"].shape[1])), with_kwargs=True
        )
        for who, m in (("receiver", model.receiver), ("sharer", model.sharers[0]))
    ]
    try:
        model.generate_ids(ids, ids, fuse_mask=mask((1, 7), (0, 6)).bool(), max_new_tokens=1)
    finally:
        for hook in hooks:
            hook.remove()
    assert seen == [("sharer", 7), ("receiver", 7), ("receiver", 6)]
    assert kv_cache.length(model.receiver.prefill(TokenBatch(ids, ids > -1, expected["position_ids"], False), 5)) == 5
