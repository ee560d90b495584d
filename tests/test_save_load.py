"""What is saved comes back, what does not fit is refused, and broken files are named."""

from __future__ import annotations

import json
import pickle
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from c2c import C2CModel
from c2c.alignment import CharSpanAligner, PublishedAligner
from c2c.errors import C2CError, FuserError, MismatchError
from c2c.fusers.base import load_fuser
from c2c.language_model import Receiver
from c2c.published import import_published
from c2c.sharer import Sharer
from tiny import FIXTURES, assert_equal_caches, build, open_fusers, pair, token_ids, tokenizer

A = FIXTURES / "pair_a"
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
    assert_equal_caches(one.prefill(PROMPTS).cache, other.prefill(PROMPTS).cache)
    assert token_ids(one.generate(PROMPTS, max_new_tokens=6)) == token_ids(other.generate(PROMPTS, max_new_tokens=6))


@pytest.mark.parametrize("fuser", FAMILIES)
def test_a_model_comes_back_bit_for_bit(fuser, tmp_path):
    model = made(fuser, layer_map=[None, 0, 0, 1, 2])
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors", "c2c.json"}  # no pickle
    again = C2CModel.from_pretrained(tmp_path, **models())
    assert again.fusers[0].family == fuser
    assert again.fusers[0].config.layer_map == [None, 0, 0, 1, 2]
    assert again.notes == []
    assert_same(model, again)
    plain = model.receiver.answer(PROMPTS, max_new_tokens=6)
    assert token_ids(again.generate(PROMPTS, max_new_tokens=6)) != token_ids(plain)


def test_a_fuser_comes_back_by_itself(tmp_path):
    model = made()
    model.fusers[0].save_pretrained(tmp_path)
    fuser = load_fuser(tmp_path)
    assert not fuser.training
    assert_same(model, C2CModel(model.receiver, model.sharers, [fuser]))
    assert_same(model, C2CModel.from_pretrained([tmp_path], **models()))


@pytest.mark.parametrize(("mode", "other"), [("sequential", "parallel"), ("parallel", "sequential")])
def test_two_sharers_come_back_with_their_mode(mode, other, tmp_path):
    model = two_sharers(mode)
    given = {"receiver": model.receiver, "sharer": model.sharers}
    model.save_pretrained(tmp_path)
    again = C2CModel.from_pretrained(tmp_path, **given)
    assert again.mode == mode
    assert_same(model, again)
    assert C2CModel.from_pretrained(tmp_path, mode=other, **given).mode == other
    with pytest.raises(MismatchError, match="sharer 1") as caught:
        C2CModel.from_pretrained(tmp_path, receiver=model.receiver, sharer=model.sharers[::-1])
    assert any(line.startswith("sharer 2") for line in caught.value.differences)


def test_saving_again_replaces(tmp_path):
    two_sharers().save_pretrained(tmp_path)
    one = made()
    one.save_pretrained(tmp_path)
    assert_same(one, C2CModel.from_pretrained(tmp_path, **models()))


@pytest.mark.parametrize("later", [False, True], ids=["of the fuser", "chosen later"])
@pytest.mark.parametrize("aligner", [CharSpanAligner(fuse_template=False), PublishedAligner("longest")], ids=str)
def test_the_aligner_comes_back(aligner, later, tmp_path):
    if later:
        first = made()
        model = C2CModel(first.receiver, first.sharers, list(first.fusers), aligner=aligner)
    else:
        model = made(aligner=aligner)
    model.save_pretrained(tmp_path)
    assert C2CModel.from_pretrained(tmp_path, **models()).aligner == aligner
    assert C2CModel.from_pretrained(tmp_path, aligner=CharSpanAligner(), **models()).aligner == CharSpanAligner()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fusers_type_is_chosen_when_it_is_loaded(dtype, tmp_path):
    made().save_pretrained(tmp_path)
    fuser = C2CModel.from_pretrained(tmp_path, fuser_dtype=dtype, **models()).fusers[0]
    assert fuser.up.dtype == dtype
    assert fuser.gate_logit.dtype == torch.float32


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
    assert {line.split(":")[0] for line in found} == {
        *("receiver architecture", "receiver kv", "receiver rope", "receiver weights", "receiver tokenizer"),
        *("receiver template", "sharer weights", "sharer tokenizer", "sharer template"),
    }
    assert all(text in str(caught.value) for text in (*found, "other receiver"))
    assert "allow_mismatch" not in str(caught.value)


def with_template_of(name, template):
    """A tokenizer with another one's chat template."""
    words = tokenizer(name)
    words.chat_template = tokenizer(template).chat_template
    return words


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("receiver weights", lambda: Receiver(build("llama", 8), tokenizer("chatml"))),
        ("sharer weights", lambda: Sharer(build("qwen2", 8), tokenizer("llama3"))),
        ("receiver tokenizer", lambda: Receiver(build("llama", 1), with_template_of("chatml_sys", "chatml"))),
        ("sharer template", lambda: Sharer(build("qwen2", 2), with_template_of("llama3", "human"))),
    ],
)
def test_other_weights_tokenizers_and_templates_can_be_accepted(name, change, tmp_path):
    made().save_pretrained(tmp_path)
    given = models(**{name.split()[0]: change()})
    with pytest.raises(MismatchError, match="allow_mismatch") as caught:
        C2CModel.from_pretrained(tmp_path, **given)
    assert [line.split(":")[0] for line in caught.value.differences] == [name]
    model = C2CModel.from_pretrained(tmp_path, allow_mismatch=True, **given)
    assert [note.split(":")[0] for note in model.notes] == [name]
    assert model.notes[0] in model.generate("Hello", max_new_tokens=1).report.notes


@pytest.fixture
def full_disk(monkeypatch):
    """``full_disk(n)``: the disk is full at the n-th weights file."""
    import transformers.modeling_utils as target

    def fail_at(call):
        real, calls = target.safe_save_file, []

        def save(*arguments, **kwargs):
            calls.append(1)
            if len(calls) == call:
                raise OSError("disk full")
            return real(*arguments, **kwargs)

        monkeypatch.setattr(target, "safe_save_file", save)

    return fail_at


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("call", "saved_before"), [(1, False), (1, True), (2, True)])
def test_a_failed_save_leaves_the_folder_as_it_was(call, saved_before, tmp_path, full_disk):
    """Of two fusers as of one: never the first of the new model beside the second of the old."""
    if saved_before:
        two_sharers().save_pretrained(tmp_path)
    before = files(tmp_path)
    changed = two_sharers()
    for fuser in changed.fusers:
        fuser.up.data.mul_(-1)
    full_disk(call)
    with pytest.raises(OSError, match="disk full"):
        changed.save_pretrained(tmp_path)
    assert files(tmp_path) == before


def write(content):
    return lambda path: path.write_bytes(content if isinstance(content, bytes) else content.encode())


def cut_off(path):
    path.write_bytes(path.read_bytes()[:100])


def change_state(change):
    """Change the tensors of a safetensors file or of a published ``.pt``."""

    def apply(path):
        if path.suffix == ".safetensors":
            save_file(change(load_file(path)), path, {"format": "pt"})
        else:
            torch.save(change(torch.load(path, weights_only=True)), path)

    return apply


def change_json(**changes):
    def apply(path):
        data = json.loads(path.read_text())
        for key, value in changes.items():
            (data["init_args"] if key in data["init_args"] else data)[key] = value
        path.write_text(json.dumps(data))

    return apply


BROKEN = {
    "config is not JSON": ("config.json", write("{")),
    "config is a list": ("config.json", write("[]")),
    "manifest is not JSON": ("c2c.json", write("{")),
    "weights are missing": ("model.safetensors", lambda path: path.unlink()),
    "weights are cut off": ("model.safetensors", cut_off),
    "a weight is missing": ("model.safetensors", change_state(lambda s: {k: s[k] for k in s if k != "up"})),
    "a weight has another shape": ("model.safetensors", change_state(lambda s: s | {"up": torch.zeros(3)})),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_fuser_is_an_error_that_names_the_file(what, tmp_path):
    file, damage = BROKEN[what]
    made().save_pretrained(tmp_path)
    damage(tmp_path / file)
    with pytest.raises(C2CError) as caught:
        C2CModel.from_pretrained(tmp_path, **models())
    assert file in str(caught.value) or str(tmp_path) in str(caught.value)


class Malicious:
    def __reduce__(self):
        return (open, ("pwned", "w"))


BROKEN_CHECKPOINTS = {
    "no map": ("projector_config.json", lambda path: path.unlink()),
    "map is not JSON": ("projector_config.json", write("{")),
    "map is empty": ("projector_config.json", write("{}")),
    "map is a list": ("projector_config.json", write("[]")),
    "map names a projector that is not there": ("projector_config.json", write('{"0": {"1": {"0": [[0, 9]]}}}')),
    "no json": ("projector_1.json", lambda path: path.unlink()),
    "json is not JSON": ("projector_1.json", write("nope")),
    "json is a list": ("projector_1.json", write("[]")),
    "another class": ("projector_0.json", change_json(**{"class": "AllInOneProjector"})),
    "another width than the rest": ("projector_2.json", change_json(hidden_dim=64)),
    "no weights": ("projector_3.pt", lambda path: path.unlink()),
    "empty weights": ("projector_3.pt", write(b"")),
    "weights are noise": ("projector_3.pt", write(b"\x80\x04noise" * 9)),
    "weights are cut off": ("projector_3.pt", cut_off),
    "weights are a list": ("projector_3.pt", lambda path: torch.save([torch.zeros(1)], path)),
    "a weight is missing": ("projector_3.pt", change_state(lambda s: {k: s[k] for k in list(s)[3:]})),
    "a weight has another shape": ("projector_3.pt", change_state(lambda s: s | {"key_in.bias": torch.ones(5)})),
    "a weight too many": ("projector_3.pt", change_state(lambda s: s | {"extra": torch.ones(5)})),
    "a pickle that runs code": ("projector_0.pt", write(pickle.dumps(Malicious()))),
    "an archive that runs code": ("projector_0.pt", lambda path: torch.save({"key_in.bias": Malicious()}, path)),
}


def copy_checkpoint(target, source="checkpoint"):
    shutil.copytree(A / source, target)
    for path in target.rglob("*"):
        path.chmod(0o755)
    return target


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("what", BROKEN_CHECKPOINTS)
def test_a_broken_checkpoint_is_a_fuser_error_that_names_the_file(what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file, damage = BROKEN_CHECKPOINTS[what]
    damage(copy_checkpoint(tmp_path / "checkpoint") / "final" / file)
    named = "projector_9" if "not there" in what else file
    with pytest.raises(FuserError, match=named.replace(".", r"\.")):
        import_published(tmp_path / "checkpoint")
    assert not (tmp_path / "pwned").exists()


def test_too_few_layers_in_every_json_is_a_fuser_error(tmp_path):
    for path in (copy_checkpoint(tmp_path / "checkpoint") / "final").glob("projector_[0-9].json"):
        change_json(num_layers=2)(path)
    with pytest.raises(FuserError, match="num_layers"):
        import_published(tmp_path / "checkpoint")


def test_the_newest_checkpoint_of_a_training_run_is_taken(tmp_path):
    for step in (9, 10):
        copy_checkpoint(tmp_path / f"checkpoint-{step}", "checkpoint/final")
    change_state(lambda s: s | {"key_gate_logit": torch.tensor(-3.0)})(tmp_path / "checkpoint-10" / "projector_0.pt")
    assert import_published(tmp_path).layers[0].key_gate_logit.item() == -3.0


WRONG_SIZES = [
    ("bottleneck", {"rank": 0}, "integer from 1"),
    ("bottleneck", {"rank": -3}, "integer from 1"),
    ("bottleneck", {"rank": True}, "integer from 1"),
    ("bottleneck", {"rank": 10**12}, "to 65536"),
    ("memory", {"rank": 0}, "integer from 1"),
    ("memory", {"slots": -1}, "integer from 0"),
    ("c2c", {"hidden_dim": 0}, "integer from 1"),
    ("c2c", {"intermediate_dim": -1}, "integer from 1"),
    ("c2c", {"num_layers": 2}, "integer from 3"),
    ("c2c", {"initial_temperature": 0.0}, "number from 1e-06"),
    ("linear", {"ridge": -1}, "number from 0"),
    ("linear", {"blend": 1.5}, "number from 0 to 1"),
]


@pytest.mark.parametrize(("fuser", "options", "expected"), WRONG_SIZES)
def test_an_impossible_size_is_refused_with_what_was_expected(fuser, options, expected):
    (name, value), *_ = options.items()
    with pytest.raises(FuserError, match=rf"(?s){name}.*{re.escape(str(value))} was given; expected .*{expected}"):
        pair(fuser=fuser, fuser_options=options)


@pytest.mark.parametrize("change", [{"rank": 0}, {"receiver_kv": {"layers": 5, "kv_heads": 0, "head_dim": 8}}])
def test_a_stored_config_with_an_impossible_size_is_refused(tmp_path, change):
    pair().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(FuserError, match="0"):
        load_fuser(tmp_path)
