"""connect: the best method that two models have is found, named, and used."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

import c2c
from c2c import C2CModel
from c2c.cli.app import app
from c2c.errors import MismatchError, PromptError, SystemUnavailableError
from c2c.language_model import Receiver
from c2c.serving.config import ServeConfig
from c2c.serving.transformers_engine import TransformersEngine
from c2c.sharer import Sharer
from c2c.systems import make_system
from serving_harness import NAME, running, text_of
from tiny import build, memory_pair, open_fusers, pair, pair_folders, token_ids, tokenizer

DOCUMENT = "The fox sleeps in a red house by the sea."
QUESTION = "Where does the fox sleep?"
GREEDY = {"max_new_tokens": 4, "do_sample": False}


def models(receiver="llama", sharer="qwen2"):
    return Receiver(build(receiver, 1), tokenizer("chatml"), receiver), Sharer(
        build(sharer, 2), tokenizer("llama3"), sharer
    )


def twins():
    receiver = Receiver(build("llama", 1), tokenizer("chatml"), "llama")
    return receiver, Sharer(receiver.model, receiver.tokenizer, "llama")


def trained(model: C2CModel) -> C2CModel:
    for fuser in model.fusers:
        fuser.config.training = {"config": "random"}
    return model


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder of fusers in place of the zoo."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("c2c.connection.fuser_folders", lambda: sorted((tmp_path / "fusers").glob("*")))
    return tmp_path / "fusers"


def test_the_same_model_copies_private_context_and_is_alone_in_shared(place):
    connection = c2c.connect(*twins())
    assert (connection.chosen("private").name, connection.chosen("shared").name) == ("copy", "receiver")
    result = connection.generate(QUESTION, DOCUMENT, **GREEDY)
    assert (result.report.method, result.report.alternatives) == ("copy", {})
    reader = make_system("reader", connection.model).generate(QUESTION, DOCUMENT, **GREEDY)
    assert token_ids(result) == token_ids(reader)
    alone = connection.generate(QUESTION, **GREEDY)
    assert alone.report.method == "receiver"
    assert token_ids(alone) == token_ids(connection.receiver.answer(QUESTION, **GREEDY))


def test_one_that_is_named_twice_is_loaded_once(tmp_path):
    (folder, _) = pair_folders(lambda name: tmp_path / name)
    connection = c2c.connect(folder, folder)
    assert connection.receiver.model is connection.sharer.model
    assert connection.chosen("private").name == "copy"


def test_other_models_exchange_text_and_the_report_says_why(place):
    connection = c2c.connect(*models())
    result = connection.generate(QUESTION, DOCUMENT, **GREEDY)
    assert result.report.method == "text"
    assert "tokenizer" in result.report.alternatives["copy"]
    assert "c2c train" in result.report.alternatives["fuser"]
    summary = make_system("summary", connection.model).generate(QUESTION, DOCUMENT, **GREEDY)
    assert token_ids(result) == token_ids(summary)
    assert connection.generate(QUESTION, **GREEDY).report.method == "text"


def test_a_document_may_be_shown(place):
    connection = c2c.connect(*models(), show_documents=True)
    reader = make_system("reader", connection.model).generate(QUESTION, DOCUMENT, **GREEDY)
    assert token_ids(connection.generate(QUESTION, DOCUMENT, **GREEDY)) == token_ids(reader)


def test_fusers_that_fit_are_found_for_each_context(place):
    private, shared = memory_pair(), trained(open_fusers(pair()))
    private.save_pretrained(place / "private")
    shared.save_pretrained(place / "shared")
    trained(pair("qwen3", "qwen2")).save_pretrained(place / "a_foreign_one")
    open_fusers(pair()).save_pretrained(place / "an_untrained_one")
    for _ in range(2):  # two runs choose alike
        connection = c2c.connect(private.receiver, private.sharers[0])
        chosen = [connection.chosen(context) for context in ("private", "shared")]
        assert [(one.name, one.reason.split("/")[-1]) for one in chosen] == [("fuser", "private"), ("fuser", "shared")]
    found = connection.generate(QUESTION, DOCUMENT, **GREEDY)
    assert token_ids(found) == token_ids(private.generate(QUESTION, sharer_messages=DOCUMENT, **GREEDY))
    assert list(found.report.alternatives) == ["copy"]
    found = connection.generate(QUESTION, **GREEDY)
    assert token_ids(found) == token_ids(shared.generate(QUESTION, **GREEDY))


def test_a_fuser_that_learned_to_choose_options_alone_is_not_taken_unless_it_is_given(place):
    model = open_fusers(pair())
    model.fusers[0].config.training = {"config": {"train": [{"kind": "multiple_choice"}]}}
    model.save_pretrained(place / "letters")
    sides = (model.receiver, model.sharers[0])
    assert c2c.connect(*sides).chosen("shared").name == "text"
    assert "choose options" in str(c2c.connect(*sides))
    assert c2c.connect(*sides, place / "letters").chosen("shared").name == "fuser"
    model.fusers[0].config.training["config"]["train"].append({"kind": "instruction"})
    model.save_pretrained(place / "letters")
    assert c2c.connect(*sides).chosen("shared").name == "fuser"


def test_a_given_fuser_is_used_or_refused(place):
    private = memory_pair()
    private.save_pretrained(place.parent / "mine")
    connection = c2c.connect(private.receiver, private.sharers[0], place.parent / "mine")
    assert connection.chosen("private").name == "fuser"
    assert connection.chosen("shared").name == "text"
    with pytest.raises(MismatchError):
        c2c.connect(*models("qwen3"), place.parent / "mine")


def test_a_method_can_be_asked_for(place):
    connection = c2c.connect(*twins(), method="text")
    result = connection.generate(QUESTION, DOCUMENT, **GREEDY)
    assert (result.report.method, result.report.alternatives["copy"]) == ("text", "method='text' was asked for")
    with pytest.raises(SystemUnavailableError, match="differ in"):
        c2c.connect(*models(), method="copy")
    with pytest.raises(SystemUnavailableError, match="Known"):
        c2c.connect(*models(), method="telepathy")


def test_streams_chats_and_batches_say_the_method_too(place):
    connection = c2c.connect(*twins())
    with connection.stream(QUESTION, DOCUMENT, **GREEDY) as stream:
        text = "".join(stream)
    assert (stream.result.text, stream.result.report.method) == (text, "copy")
    chat = connection.chat("Be brief.", sharer_messages=DOCUMENT, **GREEDY)
    assert [chat.send("Where?").report.method, chat.send("Who?").report.method] == ["copy", "copy"]
    batch = connection.generate([QUESTION, "Who?"], [DOCUMENT, "A dog."], **GREEDY)
    assert [result.report.method for result in batch] == ["copy", "copy"]


def test_a_document_is_read_once_for_many_questions(place):
    connection = c2c.connect(*twins())
    page = connection.read(DOCUMENT)
    asked = connection.generate(QUESTION, page, **GREEDY)
    assert token_ids(asked) == token_ids(connection.generate(QUESTION, DOCUMENT, **GREEDY))
    with pytest.raises(SystemUnavailableError, match="text"):
        c2c.connect(*models()).read(DOCUMENT)
    with pytest.raises(PromptError, match="handoff"):
        c2c.connect(*models()).generate(QUESTION, page, **GREEDY)


def test_a_server_answers_with_and_without_context(place):
    connection = c2c.connect(*twins())
    config = ServeConfig(name=NAME, batch_window_ms=10)
    with running(None, engine=TransformersEngine(connection.model, config, connection)) as server:
        for context in (DOCUMENT, None):
            given = {"sharer_messages": context} if context else {}
            answer = server.chat(QUESTION, max_tokens=4, c2c={"report": True, **given})
            assert text_of(answer) == connection.generate(QUESTION, context, **GREEDY).text
            assert answer.json()["c2c"]["report"]["method"] == ("copy" if context else "receiver")


def test_the_command_shows_what_connect_chooses(tmp_path):
    receiver, sharer = pair_folders(lambda name: tmp_path / name)
    for other, expected in ((receiver, "copy"), (sharer, "text")):
        result = CliRunner().invoke(app, ["connect", receiver, other, "--json"])
        assert result.exit_code == 0, result.output
        chosen = {one["context"]: one["method"] for one in json.loads(result.stdout)["methods"] if one["chosen"]}
        assert chosen["private"] == expected
    shown = CliRunner().invoke(app, ["connect", receiver, sharer]).stdout
    assert "differ in" in " ".join(shown.split())
