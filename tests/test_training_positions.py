"""Training computes what inference computes, also where positions make a batch other than its rows."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer, BartConfig, BartForCausalLM, LlamaConfig, LlamaForCausalLM

from c2c.data.config import DataSource
from c2c.prompting import RenderOptions
from c2c.training.objective import cross_entropy
from c2c.training.run import prepare
from tiny import NO_SPECIALS
from training_rig import adapter_config, config, make_folders, open_fuser, private_config

SMALL = {"vocab_size": 512, **NO_SPECIALS}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "short_factor": [1.0] * 6}
LONG |= {"long_factor": [3.0 + channel for channel in range(6)]}
SENTENCES = [DataSource("train.jsonl", form="sentence")]


def model(kind: str, switch: int = 60):
    torch.manual_seed(1)
    if kind == "bart":
        sizes = {"d_model": 48, "decoder_layers": 3, "decoder_attention_heads": 4, "decoder_ffn_dim": 64}
        made = BartForCausalLM(BartConfig(max_position_embeddings=512, **sizes, **SMALL))
    else:
        rope = LONG | {"original_max_position_embeddings": switch}
        if kind == "dynamic":
            rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
        sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
        length = switch if kind == "dynamic" else 512  # there only an answer may be longer than the context
        made = LlamaForCausalLM(LlamaConfig(max_position_embeddings=length, **sizes, **SMALL, rope_parameters=rope))
    for parameter in made.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return made


@pytest.fixture
def folders(tmp_path):
    def make(name):
        (tmp_path / name).mkdir()
        return tmp_path / name

    return make_folders(make)


def with_models(folders, **models):
    """Put other models into the folders of receiver and sharer."""
    for folder, role in zip(folders, ("receiver", "sharer"), strict=False):
        if role in models:
            words = AutoTokenizer.from_pretrained(folder)
            model = models[role]
            model.resize_token_embeddings(len(words))
            model.save_pretrained(folder)
            words.save_pretrained(folder)


class Forced:
    """A logits processor that lets these tokens follow, and keeps the scores that the model gave."""

    def __init__(self, tokens):
        self.tokens, self.seen = tokens, []

    def __call__(self, ids, scores):
        token = self.tokens[len(self.seen)]
        self.seen.append(scores.clone())
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([token]), 0.0)


def decoded_losses(run, example):
    """The loss of each response token by the public path: prefill, fuse, and decode one token after the other."""
    forced = Forced(example.response_ids)
    options = RenderOptions(answer_prefix=example.row.answer_prefix)
    given = {"sharer_messages": example.row.sharer_messages} if run.objective.model.private else {}
    prompt = run.objective.model.prefill(example.row.messages, options=options, **given)
    prompt.generate(max_new_tokens=len(example.response_ids), do_sample=False, logits_processor=[forced])
    return cross_entropy(torch.stack(forced.seen, dim=1), torch.tensor([example.response_ids]))[0]


def trained_losses(run, examples):
    with torch.no_grad():
        batch = run.objective.collate(examples)
        found = cross_entropy(run.objective.logits(batch), batch.responses)
    return [row[: len(example.response_ids)] for row, example in zip(found, examples, strict=True)]


def varied(run, count=3):
    """Examples with prompts of different lengths."""
    return sorted(run.train, key=lambda example: len(example.receiver_ids))[:: max(1, len(run.train) // count)][:count]


@pytest.mark.parametrize("make_config", [config, private_config])
@pytest.mark.parametrize(
    ("kind", "where"),
    [
        ("longrope", "in the prompt"),
        ("longrope", "in the response"),
        ("longrope", "between the prompts"),
        ("dynamic", "in the response"),
    ],
)
def test_frequencies_that_change_with_the_length_are_those_of_inference(folders, tmp_path, kind, make_config, where):
    changes = {"train": SENTENCES} if make_config is config else {}
    first = prepare(make_config(folders, tmp_path / "first", **changes))
    longest = max(len(example.receiver_ids) + len(example.kept) for example in varied(first))
    switch = {"in the prompt": 20, "in the response": longest + 1, "between the prompts": longest - 1}[where]
    with_models(folders, receiver=model(kind, switch), sharer=model("longrope", 20))
    run = prepare(make_config(folders, tmp_path / "run", **changes))
    open_fuser(run)
    run.objective.fuser.config.training = {"config": "random"}  # else private context adds nothing
    run.objective.eval()
    examples = varied(run)
    for example, found in zip(examples, trained_losses(run, examples), strict=True):
        torch.testing.assert_close(found, decoded_losses(run, example), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("kind", ["bart", "longrope"])
@pytest.mark.parametrize("make_config", [config, private_config, adapter_config])
def test_a_batch_is_its_examples_where_a_model_computes_batches_otherwise(folders, tmp_path, kind, make_config):
    with_models(folders, receiver=model(kind), sharer=model(kind))
    changes = {"adapter_rank": 4} if make_config is adapter_config else {}
    run = prepare(make_config(folders, tmp_path / "run", **changes))
    if make_config is not adapter_config:
        open_fuser(run)
    run.objective.eval()
    examples = varied(run)
    alone = [trained_losses(run, [example])[0] for example in examples]
    for together, one in zip(trained_losses(run, examples), alone, strict=True):
        torch.testing.assert_close(together, one, rtol=1e-3, atol=1e-3)


def test_gradients_flow_through_rows_that_are_read_one_by_one(folders, tmp_path):
    with_models(folders, receiver=model("bart"))
    run = prepare(private_config(folders, tmp_path / "run"))
    open_fuser(run)
    run.objective(varied(run))["loss"].backward()
    assert all(p.grad is not None and p.grad.any() for n, p in run.objective.fuser.named_parameters() if n == "weight")
