"""What is saved comes back, what does not fit is refused, and broken files are named."""

from __future__ import annotations

import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from c2c import C2CModel, kv_cache
from c2c.alignment import PublishedAligner, SpanAligner
from c2c.errors import C2CError, FuserError, MismatchError
from c2c.fusers import Fuser
from c2c.fusers.base import load_fuser
from c2c.language_model import Receiver, Sharer
from c2c.published import import_published
from tiny import FIXTURES, build, open_fusers, pair, tokenizer

A, C = FIXTURES / "pair_a", FIXTURES / "pair_c"
FAMILIES = {"bottleneck": {"rank": 8}, "c2c": {"hidden_dim": 16, "intermediate_dim": 24, "num_layers": 4}}
PROMPTS = ["Hello world!", "What is the capital of France?"]


def made(fuser="bottleneck", **options):
    return open_fusers(pair(fuser=fuser, fuser_options=FAMILIES[fuser], **options))


def models(**others):
    """The two models of :func:`made`, made again."""
    return {
        "receiver": Receiver(build("llama", 1), tokenizer("chatml"), "llama"),
        "sharer": Sharer(build("qwen2", 2), tokenizer("llama3"), "qwen2"),
    } | others


def two_sharers(mode="parallel"):
    sharers = [Sharer(build("qwen2", 2), tokenizer("llama3"), "a"), Sharer(build("qwen3", 3), tokenizer("human"), "b")]
    return open_fusers(C2CModel.from_models(models()["receiver"], sharers, mode=mode, fuser_options={"rank": 8}))


def assert_same(one, other):
    for a, b in zip(
        kv_cache.layers(one.prefill(PROMPTS).cache), kv_cache.layers(other.prefill(PROMPTS).cache), strict=True
    ):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])
    answers = [[r.ids.tolist() for r in m.generate(PROMPTS, max_new_tokens=6)] for m in (one, other)]
    assert answers[0] == answers[1]


# -- round trips -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fuser", list(FAMILIES))
def test_a_model_comes_back_bit_for_bit(fuser, tmp_path):
    model = made(fuser, layer_map=[None, 0, 0, 1, 2])
    plain = model.receiver.answer(PROMPTS, max_new_tokens=6)
    model.save_pretrained(tmp_path)
    again = C2CModel.from_pretrained(tmp_path, **models())
    assert again.fusers[0].family == fuser
    assert again.fusers[0].config.layer_map == [None, 0, 0, 1, 2]
    assert again.notes == []
    state, other = model.fusers[0].state_dict(), again.fusers[0].state_dict()
    assert state.keys() == other.keys()
    assert all(torch.equal(state[name], other[name]) for name in state)
    assert_same(model, again)
    assert [r.ids.tolist() for r in again.generate(PROMPTS, max_new_tokens=6)] != [r.ids.tolist() for r in plain]


@pytest.mark.parametrize("fuser", list(FAMILIES))
def test_no_pickle_is_written(fuser, tmp_path):
    made(fuser).save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors", "c2c.json"}
    assert not (tmp_path / "model.safetensors").read_bytes().startswith(b"PK")


def test_a_fuser_comes_back_by_itself(tmp_path):
    model = made()
    model.fusers[0].save_pretrained(tmp_path)
    fuser = load_fuser(tmp_path)
    assert isinstance(fuser, Fuser)
    assert not fuser.training
    assert_same(model, C2CModel(model.receiver, model.sharers, [fuser]))
    assert_same(model, C2CModel.from_pretrained([tmp_path], **models()))


@pytest.mark.parametrize("mode", ["sequential", "parallel"])
def test_two_sharers_come_back_with_their_mode(mode, tmp_path):
    model = two_sharers(mode)
    model.save_pretrained(tmp_path)
    again = C2CModel.from_pretrained(tmp_path, receiver=model.receiver, sharer=model.sharers)
    assert again.mode == mode
    assert_same(model, again)
    other = C2CModel.from_pretrained(
        tmp_path, receiver=model.receiver, sharer=model.sharers, mode={"sequential": "parallel"}.get(mode, "sequential")
    )
    assert other.mode != mode
    with pytest.raises(MismatchError, match="sharer 1") as caught:
        C2CModel.from_pretrained(tmp_path, receiver=model.receiver, sharer=model.sharers[::-1])
    assert any(line.startswith("sharer 2") for line in caught.value.differences)


def test_saving_again_replaces(tmp_path):
    model = two_sharers()
    model.save_pretrained(tmp_path)
    one = made()
    one.save_pretrained(tmp_path)
    assert_same(one, C2CModel.from_pretrained(tmp_path, **models()))


@pytest.mark.parametrize(
    "aligner", [SpanAligner(fuse_template=False), PublishedAligner("longest")], ids=["spans", "published"]
)
def test_the_aligner_comes_back(aligner, tmp_path):
    model = made(aligner=aligner)
    model.save_pretrained(tmp_path)
    assert C2CModel.from_pretrained(tmp_path, **models()).aligner == aligner
    assert C2CModel.from_pretrained(tmp_path, aligner=SpanAligner(), **models()).aligner == SpanAligner()


def test_an_aligner_chosen_later_comes_back(tmp_path):
    """It is written into c2c.json, so it is what the saved model uses."""
    chosen = SpanAligner(fuse_template=False)
    first = made()
    model = C2CModel(first.receiver, first.sharers, list(first.fusers), aligner=chosen)
    model.save_pretrained(tmp_path)
    assert C2CModel.from_pretrained(tmp_path, **models()).aligner == chosen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fusers_type_is_chosen_when_it_is_loaded(dtype, tmp_path):
    made().save_pretrained(tmp_path)
    fuser = C2CModel.from_pretrained(tmp_path, fuser_dtype=dtype, **models()).fusers[0]
    assert fuser.up.dtype == dtype
    assert fuser.gate_logit.dtype == torch.float32


def test_a_published_checkpoint_converted_and_loaded_is_the_same_bit_for_bit(tmp_path):
    folders = {"receiver": C / "receiver", "sharer": [C / "sharer1", C / "sharer2"]}
    for mode in ("sequential", "parallel"):
        model = C2CModel.from_published([C / "checkpoint1", C / "checkpoint2"], mode=mode, dtype="float32", **folders)
        model.save_pretrained(tmp_path / mode)
        again = C2CModel.from_pretrained(tmp_path / mode, dtype="float32", **folders)
        assert again.mode == mode
        ids = load_file(C / "eval.safetensors")["input_ids"]
        one, other = (
            m.fuse_ids(ids, ids, fuse_mask=torch.tensor([1] * 4 + [3] * 6 + [2] * 4 + [0])) for m in (model, again)
        )
        assert torch.equal(one.last_logits, other.last_logits)
        for a, b in zip([*one.keys, *one.values], [*other.keys, *other.values], strict=True):
            assert torch.equal(a, b)


# -- other models than the fuser was made for --------------------------------------------------------------------------


def test_every_difference_is_listed_at_once(tmp_path):
    made().save_pretrained(tmp_path)
    with pytest.raises(MismatchError) as caught:
        C2CModel.from_pretrained(
            tmp_path,
            receiver=Receiver(build("gemma3", 1), tokenizer("human"), "other receiver"),
            sharer=Sharer(build("qwen2", 7), tokenizer("metaspace"), "other sharer"),
            allow_mismatch=True,  # of no use: caches of other shapes can't be fused
        )
    found = caught.value.differences
    starts = {line.split(":")[0] for line in found}
    assert starts == {
        *("receiver architecture", "receiver kv", "receiver rope", "receiver weights", "receiver tokenizer"),
        *("receiver template", "sharer weights", "sharer tokenizer", "sharer template"),
    }
    for line in found:
        assert line in str(caught.value)
    assert "other receiver" in str(caught.value)
    assert "allow_mismatch" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("receiver weights", {"receiver": lambda: Receiver(build("llama", 8), tokenizer("chatml"))}),
        ("sharer weights", {"sharer": lambda: Sharer(build("qwen2", 8), tokenizer("llama3"))}),
        ("receiver tokenizer", {"receiver": lambda: Receiver(build("llama", 1), retold("chatml_sys", "chatml"))}),
        ("sharer template", {"sharer": lambda: Sharer(build("qwen2", 2), retold("llama3", "human"))}),
    ],
)
def test_other_weights_tokenizers_and_templates_are_accepted_when_asked_for(name, change, tmp_path):
    made().save_pretrained(tmp_path)
    given = models(**{role: make() for role, make in change.items()})
    with pytest.raises(MismatchError, match="allow_mismatch") as caught:
        C2CModel.from_pretrained(tmp_path, **given)
    assert [line.split(":")[0] for line in caught.value.differences] == [name]
    model = C2CModel.from_pretrained(tmp_path, allow_mismatch=True, **given)
    assert [note.split(":")[0] for note in model.notes] == [name]
    assert model.notes[0] in model.generate("Hello", max_new_tokens=1).report.notes


def retold(name, template):
    """A tokenizer with another one's chat template."""
    made = tokenizer(name)
    made.chat_template = tokenizer(template).chat_template
    return made


def test_models_under_other_names_and_types_are_the_same_models(tmp_path):
    made().save_pretrained(tmp_path)
    receiver = Receiver(build("llama", 1).to(torch.bfloat16), tokenizer("chatml"), "elsewhere")
    assert C2CModel.from_pretrained(tmp_path, **models(receiver=receiver)).notes == []


# -- writing fails -----------------------------------------------------------------------------------------------------


def fail_at(monkeypatch, call):
    """The disk is full at the n-th weights file."""
    import transformers.modeling_utils as target

    real, calls = target.safe_save_file, []

    def save(*arguments, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise OSError("disk full")
        return real(*arguments, **kwargs)

    monkeypatch.setattr(target, "safe_save_file", save)


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_failed_first_save_leaves_nothing_that_loads(tmp_path, monkeypatch):
    fail_at(monkeypatch, 1)
    with pytest.raises(OSError, match="disk full"):
        made().save_pretrained(tmp_path)
    assert files(tmp_path) == {}
    with pytest.raises(FuserError, match="holds no fuser"):
        C2CModel.from_pretrained(tmp_path, **models())


@pytest.mark.parametrize("call", [1, 2])
def test_a_failed_save_leaves_the_old_model(call, tmp_path, monkeypatch):
    """Of two fusers as of one: never the first of the new model beside the second of the old."""
    two_sharers().save_pretrained(tmp_path)
    before = files(tmp_path)
    changed = two_sharers()
    for fuser in changed.fusers:
        fuser.up.data.mul_(-1)
    fail_at(monkeypatch, call)
    with pytest.raises(OSError, match="disk full"):
        changed.save_pretrained(tmp_path)
    after = files(tmp_path)
    assert after.keys() == before.keys()
    assert [name for name in before if before[name] != after[name]] == []


# -- broken files ------------------------------------------------------------------------------------------------------


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def without(path, name):
    state = load_file(path)
    del state[name]
    save_file(state, path, {"format": "pt"})


def reshaped(path, name):
    state = load_file(path)
    state[name] = torch.zeros(3)
    save_file(state, path, {"format": "pt"})


BROKEN = {
    "config is not JSON": ("config.json", lambda p: write(p, "{")),
    "config is a list": ("config.json", lambda p: write(p, "[]")),
    "manifest is not JSON": ("c2c.json", lambda p: write(p, "{")),
    "weights are missing": ("model.safetensors", lambda p: p.unlink()),
    "weights are cut off": ("model.safetensors", lambda p: write(p, p.read_bytes()[:100])),
    "a weight is missing": ("model.safetensors", lambda p: without(p, "up")),
    "a weight has another shape": ("model.safetensors", lambda p: reshaped(p, "up")),
}


@pytest.mark.parametrize("what", list(BROKEN))
def test_a_broken_fuser_is_an_error_that_names_the_file(what, tmp_path):
    file, damage = BROKEN[what]
    made().save_pretrained(tmp_path)
    damage(tmp_path / file)
    with pytest.raises(C2CError) as caught:
        C2CModel.from_pretrained(tmp_path, **models())
    assert file in str(caught.value) or str(tmp_path) in str(caught.value)


def rewritten(path, **changes):
    data = json.loads(path.read_text())
    for key, value in changes.items():
        (data["init_args"] if key in data["init_args"] else data)[key] = value
    path.write_text(json.dumps(data))


def resaved(path, change):
    state = torch.load(path, weights_only=True)
    torch.save(change(state), path)


class Malicious:
    def __reduce__(self):
        return (open, ("pwned", "w"))


BROKEN_CHECKPOINTS = {
    "no map": ("projector_config.json", lambda p: p.unlink()),
    "map is not JSON": ("projector_config.json", lambda p: write(p, "{")),
    "map is empty": ("projector_config.json", lambda p: write(p, "{}")),
    "map is a list": ("projector_config.json", lambda p: write(p, "[]")),
    "map names a projector that is not there": (
        "projector_9",
        lambda p: write(p.parent / "projector_config.json", '{"0": {"1": {"0": [[0, 9]]}}}'),
    ),
    "no json": ("projector_1.json", lambda p: p.unlink()),
    "json is not JSON": ("projector_1.json", lambda p: write(p, "nope")),
    "json is a list": ("projector_1.json", lambda p: write(p, "[]")),
    "another class": ("projector_0.json", lambda p: rewritten(p, **{"class": "AllInOneProjector"})),
    "another width than the rest": ("projector_2.json", lambda p: rewritten(p, hidden_dim=64)),
    "no weights": ("projector_3.pt", lambda p: p.unlink()),
    "empty weights": ("projector_3.pt", lambda p: write(p, b"")),
    "weights are noise": ("projector_3.pt", lambda p: write(p, b"\x80\x04noise" * 9)),
    "weights are cut off": ("projector_3.pt", lambda p: write(p, p.read_bytes()[:2000])),
    "weights are a list": ("projector_3.pt", lambda p: torch.save([torch.zeros(1)], p)),
    "a weight is missing": ("projector_3.pt", lambda p: resaved(p, lambda s: {k: s[k] for k in list(s)[3:]})),
    "a weight has another shape": (
        "projector_3.pt",
        lambda p: resaved(p, lambda s: s | {"key_in.bias": torch.ones(5)}),
    ),
    "a weight too many": ("projector_3.pt", lambda p: resaved(p, lambda s: s | {"extra": torch.ones(5)})),
    "a pickle that runs code": ("projector_0.pt", lambda p: write(p, pickle.dumps(Malicious()))),
    "an archive that runs code": ("projector_0.pt", lambda p: torch.save({"key_in.bias": Malicious()}, p)),
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("what", list(BROKEN_CHECKPOINTS))
def test_a_broken_checkpoint_is_a_fuser_error_that_names_the_file(what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file, damage = BROKEN_CHECKPOINTS[what]
    shutil.copytree(A / "checkpoint", tmp_path / "checkpoint")
    for path in (tmp_path / "checkpoint").rglob("*"):
        path.chmod(0o755)
    damage(tmp_path / "checkpoint" / "final" / file)
    with pytest.raises(FuserError, match=file.replace(".", r"\.")):
        import_published(tmp_path / "checkpoint")
    assert not (tmp_path / "pwned").exists()


def test_too_few_layers_in_every_json_is_a_fuser_error(tmp_path):
    shutil.copytree(A / "checkpoint", tmp_path / "checkpoint")
    for path in (tmp_path / "checkpoint" / "final").glob("projector_[0-9].json"):
        path.chmod(0o644)
        rewritten(path, num_layers=2)
    with pytest.raises(FuserError, match="num_layers"):
        import_published(tmp_path / "checkpoint")


def test_the_newest_checkpoint_of_a_training_run_is_taken(tmp_path):
    for step in (9, 10):
        shutil.copytree(A / "checkpoint" / "final", tmp_path / f"checkpoint-{step}")
    path = tmp_path / "checkpoint-10" / "projector_0.pt"
    path.chmod(0o644)
    resaved(path, lambda s: s | {"key_gate_logit": torch.tensor(-3.0)})
    assert float(import_published(tmp_path).gate_logits()[0, 0]) == -3.0
