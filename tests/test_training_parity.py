"""The published training step: what :mod:`test_parity` holds for packed entries holds for whole sections too.

The batch is the one of the fixture: two samples whose shorter one has pads between prompt and response.
"""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file

from c2c import C2CModel
from c2c.alignment import Alignment, Chunk
from c2c.errors import FuserError
from c2c.fusers import C2CFuser, Entries
from c2c.fusers.bottleneck import soft_gate
from c2c.fusers.c2c import annealed_temperature, gumbel_gate, hard_gate
from c2c.fusion import Source, fuse
from c2c.kv_cache import KVGeometry
from c2c.tokens import TokenBatch
from tiny import FIXTURES

A = FIXTURES / "pair_a"
PROMPT = 8
EXPECTED = json.loads((A / "expected.json").read_text())
BATCH = load_file(A / "train_batch.safetensors")
NOISE = [f"noise.layer{layer}.{kind}_u" for layer in range(4) for kind in ("key", "value")]


@pytest.fixture
def model():
    loaded = C2CModel.from_published(A / "checkpoint", receiver=A / "receiver", sharer=A / "sharer", dtype="float32")
    loaded.fusers[0].train()
    loaded.fusers[0].on_step(EXPECTED["train.temperature_step"])
    return loaded


def packed(rows):
    """Real positions only, and their part of the noise."""
    real = BATCH["attention_mask"].bool()[rows, :PROMPT]
    at, columns = real.nonzero(as_tuple=True)
    draws = [BATCH[name][rows][at, :, columns].transpose(0, 1).unsqueeze(0) for name in NOISE]
    return Alignment(at, columns, columns), draws


def whole(rows):
    """All positions as one block, pads included, as the published code computes."""
    return Alignment.from_block(len(rows), 0, PROMPT), [BATCH[name][rows] for name in NOISE]


def losses(model, entries=packed, rows=(0, 1)):
    """Cross-entropy of every response token of these rows: ``[rows, response - 1]``."""
    rows = list(rows)
    alignment, draws = entries(rows)
    remaining = iter(draws)

    def uniform(shape):
        draw = next(remaining)
        assert draw.shape == shape
        return draw

    model.fusers[0].uniform = uniform
    ids, real = BATCH["input_ids"][rows], BATCH["attention_mask"][rows].bool()
    positions = BATCH["position_ids"][rows]
    prompt = TokenBatch(ids[:, :PROMPT], real[:, :PROMPT], positions[:, :PROMPT], bool((~real).any()))
    cache = model.receiver.prefill(prompt)
    source = Source(model.sharers[0], prompt, model.sharers[0].prefill(prompt), model.fusers[0])
    fuse(cache, model.receiver, prompt, [source], Chunk(PROMPT, (alignment,)))
    logits = model.receiver.model(
        input_ids=ids[:, PROMPT:],
        attention_mask=real.long(),
        position_ids=positions[:, PROMPT:],
        past_key_values=cache,
        use_cache=True,
    ).logits
    if model.fusers[0].training:
        assert next(remaining, None) is None  # every draw was used, in order
    labels = BATCH["labels"][rows, PROMPT + 1 :]
    each = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none"
    )
    return each.view(labels.shape), labels != -100


def mean(parts):
    each, counted = parts
    return each.sum() / counted.sum()


@pytest.mark.parametrize("entries", [packed, whole])
def test_loss_gradients_and_the_step_after(model, entries):
    fuser = model.fusers[0]
    gradients = load_file(A / "train_gradients.safetensors")
    loss = mean(losses(model, entries))
    assert float(loss.detach()) == pytest.approx(EXPECTED["train.loss"], abs=1e-4)
    loss.backward()
    norms = EXPECTED["train.grad_norm_per_tensor"]
    seen = {}
    for index, projector in enumerate(fuser.layers):
        for name, parameter in projector.named_parameters():
            key = f"projector{index}.{name}"
            assert (parameter.grad - gradients[key]).abs().max() < 1e-4, key
            seen[key] = float(parameter.grad.norm())
    assert seen.keys() == gradients.keys() == norms.keys()
    assert seen == pytest.approx(norms, abs=1e-4, rel=1e-3)
    norm = torch.nn.utils.clip_grad_norm_(fuser.parameters(), 1.0)
    assert float(norm) == pytest.approx(EXPECTED["train.global_grad_norm"], rel=1e-4)
    torch.optim.AdamW(fuser.parameters(), lr=1e-3, weight_decay=0.01).step()
    with torch.no_grad():
        after = float(mean(losses(model, entries)))
        fuser.eval()
        hard = float(mean(losses(model, entries)))
    assert after == pytest.approx(EXPECTED["train.loss_after_one_adamw_step_same_noise"], abs=1e-4)
    assert hard == pytest.approx(EXPECTED["train.eval_mode_loss_after_step"], abs=1e-4)
    assert after != pytest.approx(EXPECTED["train.loss"], abs=1e-3)


def test_loss_with_hard_gates(model):
    model.fusers[0].eval()
    with torch.no_grad():
        assert float(mean(losses(model))) == pytest.approx(EXPECTED["train.eval_mode_loss"], abs=1e-4)


def test_a_batch_is_its_rows(model):
    """Padding inside the shorter sample takes no part."""
    each, counted = losses(model)
    for row in range(2):
        alone, own = losses(model, rows=(row,))
        assert torch.equal(own[0], counted[row])
        assert torch.allclose(alone[0], each[row], atol=1e-4)


def test_padding_may_hold_any_token(model):
    with torch.no_grad():
        before = losses(model)[0]
        changed = BATCH["input_ids"].clone()
        changed[BATCH["attention_mask"] == 0] = 123
        original, BATCH["input_ids"] = BATCH["input_ids"], changed
        try:
            assert not torch.equal(original, changed)
            assert torch.allclose(losses(model)[0], before, atol=1e-5)
        finally:
            BATCH["input_ids"] = original


def test_both_models_stay_frozen(model):
    mean(losses(model)).backward()
    for frozen in (model.receiver.model, model.sharers[0].model):
        assert not frozen.training
        assert all(p.grad is None and not p.requires_grad for p in frozen.parameters())
    assert all(p.grad is not None for p in model.fusers[0].parameters())


def test_the_temperature_schedule():
    schedule = [annealed_temperature(step, 1.0, 0.001, 100) for step in (0, 30, 50, 100, 500)]
    assert schedule == pytest.approx([1.0, EXPECTED["train.gate_temperature"], 0.001**0.5, 0.001, 0.001])
    assert annealed_temperature(0, 1.0, 0.001, 0) == 0.001


def test_gates():
    logits = torch.tensor([-1.0, 0.0, 1e-6, 2.0])
    assert hard_gate(logits.to(torch.bfloat16)).tolist() == [0, 0, 1, 1]
    assert hard_gate(logits.to(torch.bfloat16)).dtype == torch.float32
    assert soft_gate(logits.to(torch.bfloat16)).dtype == torch.float32
    assert soft_gate(logits)[1] == 0.5
    uniform = torch.rand(20000, generator=torch.Generator().manual_seed(0))
    opened = gumbel_gate(torch.tensor(0.0), uniform, 0.5) > 0.5
    assert float(opened.float().mean()) == pytest.approx(0.632, abs=0.01)  # 1 - 1/e: one draw, not two
    cold = gumbel_gate(torch.tensor(0.0), uniform, 0.001)
    assert float(((cold < 0.01) | (cold > 0.99)).float().mean()) > 0.98
    assert torch.isfinite(gumbel_gate(torch.tensor(0.0), torch.tensor([0.0, 1.0 - 2**-24]), 0.5)).all()


def small_fuser(dropout=0.0):
    torch.manual_seed(0)
    geometry = KVGeometry(1, 2, 4)
    return C2CFuser.from_geometry(
        geometry, geometry, [0], hidden_dim=16, intermediate_dim=24, dropout=dropout, zero_init=False
    )


def entries(seed, rows=3):
    draw = torch.Generator().manual_seed(seed)
    return Entries(*([torch.randn(rows, 2, 5, 4, generator=draw)] for _ in range(2)))


def outputs(fuser):
    """Everything that a fuser adds, its gates open."""
    fuser.uniform = lambda shape: torch.full(shape, 0.9999)
    return torch.cat([x.flatten() for pair in fuser(entries(1), entries(2)) for x in pair])


def test_dropout_is_of_training_alone():
    plain, dropping = small_fuser(), small_fuser(0.5)
    dropping.load_state_dict(plain.state_dict())
    assert torch.equal(outputs(dropping.eval()), outputs(plain.eval()))
    assert not torch.allclose(outputs(dropping.train()), outputs(plain.train()))
    for bad in (-0.1, 1.0):
        with pytest.raises(FuserError, match="from 0 to below 1"):
            small_fuser(bad)


def test_under_autocast_products_are_rounded_and_gradients_are_not():
    gradients = []
    for enabled in (False, True):
        fuser = small_fuser().train()
        with warnings.catch_warnings(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            warnings.simplefilter("error")  # RMSNorm warns of mixed types
            loss = outputs(fuser).float().square().sum()
        loss.backward()
        gradients.append([p.grad for p in fuser.parameters() if p.grad is not None])
    for exact, near in zip(*gradients, strict=True):
        assert near.dtype == torch.float32
        assert (near - exact).norm() <= 0.05 * exact.norm() + 1e-6
    assert any(not torch.equal(exact, near) for exact, near in zip(*gradients, strict=True))
