"""``c2c library``, and ``c2c run`` on several documents of which each was read once."""

from __future__ import annotations

import time

import pytest

from c2c import C2CModel
from c2c.errors import C2CError
from c2c.library import Library
from c2c.sharer import Sharer
from test_cli import c2c, c2c_json, runner
from tiny import build, pair_folders

TEXTS = {
    "fox": "The fox sleeps in a red house.",
    "dog": "The dog is by the sea.",
    "boat": "The boat was built in 1924.",
}
QUESTION = "Where does the fox sleep?"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Folder of a tiny model."""
    return pair_folders(tmp_path_factory.mktemp)[1]


@pytest.fixture(scope="module")
def fuser(model, tmp_path_factory):
    """Folder of a copy fuser for that model on both sides, as connect makes it."""
    folder = tmp_path_factory.mktemp("copy")
    C2CModel.from_models(model, model, fuser="copy").save_pretrained(folder)
    return folder


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in TEXTS.items():
        (tmp_path / f"{name}.txt").write_text(text)
    return [f"{name}.txt" for name in TEXTS]


def add(*arguments: object) -> dict[str, bool]:
    """Which documents were read."""
    return {one["name"]: one["read"] for one in c2c_json("library", "add", "lib", *arguments)["documents"]}


def refused(message: str, *arguments: object) -> None:
    with pytest.raises(C2CError, match=message):
        c2c(*arguments)


def test_add_list_remove(files, model):
    assert add(*files, "--model", model, "--precision", "int8", "--expires", "12h") == dict.fromkeys(TEXTS, True)
    shown = {one["name"]: one for one in c2c_json("library", "list", "lib")["documents"]}
    assert set(shown) == set(TEXTS)
    assert {(one["precision"], one["problem"]) for one in shown.values()} == {("int8", None)}
    assert all(abs(one["expires"] - time.time() - 12 * 3600) < 100 for one in shown.values())
    assert "fox" in c2c("library", "list", "lib")
    c2c("library", "remove", "lib", "fox", "dog")
    assert Library("lib").names() == ["boat"]
    refused("no document 'cat'", "library", "remove", "lib", "boat", "cat")
    assert Library("lib").names() == ["boat"]


def test_broken_documents_are_listed(files, model):
    add(*files, "--model", model)
    path = Library("lib").entry("dog").path
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert c2c_json("library", "list", "lib")["documents"][1]["problem"] is None  # only the headers were read
    found = runner.invoke(*_command("library", "list", "lib", "--check"))
    assert found.exit_code == 1
    assert "damaged" in found.stdout
    assert add("dog.txt", "--model", model) == {"dog": True}
    c2c("library", "list", "lib", "--check")


def test_documents_that_will_stand_among_others(files, model, monkeypatch):
    monkeypatch.setattr("c2c.handoff.OTHER_PASSAGE", "Wheat is a grain.")
    add(*files, "--model", model)
    alone = Library("lib").get("fox")
    assert add(*files, "--model", model, "--among") == dict.fromkeys(TEXTS, True)
    among = Library("lib").get("fox")
    assert among.kept[0] > alone.kept[0]
    assert among.ids[among.kept].tolist() == alone.ids[alone.kept].tolist()
    assert add(*files, "--model", model, "--among") == dict.fromkeys(TEXTS, False)
    command = ("library", "add", "lib", "fox.txt", "--model", model, "--among", "--family", "memory")
    found = runner.invoke(*_command(*command))
    assert found.exit_code == 2


def _command(*words: str):
    from c2c.cli import app

    return app, list(words)


def test_what_was_read_is_not_read_again(files, model, tmp_path):
    options = ("--model", model)
    assert add(*files, *options) == dict.fromkeys(TEXTS, True)
    created = Library("lib").entry("fox").created
    assert add(*files, *options) == dict.fromkeys(TEXTS, False)
    assert Library("lib").entry("fox").created == created
    (tmp_path / "fox.txt").write_text("The fox has moved.")
    assert add(*files, *options) == {"fox": True, "dog": False, "boat": False}
    for changed in (["--system", "Be brief."], ["--precision", "bfloat16"], ["--family", "memory"]):
        assert add("fox.txt", *options, *changed) == {"fox": True}
        assert add("fox.txt", *options, *changed) == {"fox": False}
    build("qwen2", 7).save_pretrained(tmp_path / "other")
    Sharer.from_pretrained(model).tokenizer.save_pretrained(tmp_path / "other")
    assert add("fox.txt", "--model", tmp_path / "other") == {"fox": True}
    assert add("fox.txt", "--model", tmp_path / "other", "--expires", "90m") == {"fox": False}
    assert Library("lib").entry("fox").expires is not None
    assert add("fox.txt", "--model", tmp_path / "other") == {"fox": False}
    assert Library("lib").entry("fox").expires is None


def test_names_are_never_taken_from_other_files(files, model, tmp_path):
    add(*files, "--model", model)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "fox.txt").write_text("Another fox.")
    refused("--name", "library", "add", "lib", "other/fox.txt", "--model", model)
    refused("--name", "library", "add", "lib2", "fox.txt", "other/fox.txt", "--model", model)
    assert add("other/fox.txt", "--model", model, "--name", "the other fox") == {"the other fox": True}
    assert len(Library("lib").names()) == 4


def ask(fuser, *arguments: object) -> dict:
    return c2c_json("run", QUESTION, "--fuser", fuser, "--max-new-tokens", "6", *arguments)["results"]


def test_run_answers_from_several_documents(files, model, fuser):
    """Texts, handoffs and documents of a library answer alike; one at its place as if its text were read."""
    add(*files, "--model", model)
    kept, library = Library("lib"), ("--library", "lib", "--mode", "c2c")
    one = ask(fuser, "--context", "fox", *library)["c2c"]["text"]
    assert one == ask(fuser, "--context", "fox.txt", "--mode", "reader")["reader"]["text"]
    names = [word for name in TEXTS for word in ("--context", name)]
    several = ask(fuser, *names, *library)["c2c"]
    assert several["report"]["memory_slots"] == sum(kept.entry(name).tokens for name in TEXTS)
    texts = [word for name in files for word in ("--context", name)]
    paths = [word for name in TEXTS for word in ("--context", kept.entry(name).path)]
    mixed = [*paths[:2], "--context", "dog", *texts[4:]]
    for given in (texts, paths, mixed):
        assert ask(fuser, *given, *library)["c2c"]["text"] == several["text"]
    pair = ("--receiver", model, "--sharer", model)  # without a fuser: connected, which is a copy
    connected = c2c_json("run", QUESTION, *pair, "--max-new-tokens", "6", *names, *library)
    assert (connected["method"], connected["results"]["c2c"]["text"]) == ("copy", several["text"])
    assert set(ask(fuser, *texts)) == {"receiver", "sharer", "text", "c2c"}
    assert set(ask(fuser, *names, "--library", "lib")) == {"receiver", "c2c"}  # the others need the text


def test_contexts_that_can_not_be_used(files, model, fuser, tmp_path):
    add(*files, "--model", model)
    run = ("run", QUESTION, "--fuser", fuser, "--library", "lib")
    refused("Did you mean 'fox'", *run, "--context", "fix")
    refused("reader|text", *run, "--context", "fox", "--mode", "reader")
    (tmp_path / "fox").write_text("a file")
    refused(r"\./fox", *run, "--context", "fox")
    build("qwen2", 7).save_pretrained(tmp_path / "other")
    Sharer.from_pretrained(model).tokenizer.save_pretrained(tmp_path / "other")
    add("dog.txt", "--model", tmp_path / "other", "--name", "theirs")
    refused("handoff weights", *run, "--context", "theirs")
