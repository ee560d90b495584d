"""The demo without a browser: fusers on offer, models, sessions, panes, the page and the command."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest

from c2c.demo import DemoConfig
from c2c.demo.fusers import default_fuser, find_fusers
from c2c.demo.panes import DOCUMENT, EXAMPLES, OTHER_DOCUMENT, SYSTEMS, Pane, Question, other_question, pane_html
from c2c.demo.session import RUN_ORDER, ModelCache, Session
from c2c.errors import C2CError, FuserError, ModelLoadError
from c2c.prompting import RenderOptions
from c2c.systems import SystemOptions, make_system
from demo_rig import Visitor, fuser_folders

PROMPT = EXAMPLES[0].prompt
ASKED = Question(PROMPT, "You are a helpful assistant.", "The answer is", max_new_tokens=4, message_tokens=6)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return fuser_folders(tmp_path_factory.mktemp)


@pytest.fixture(scope="module")
def choices(folders):
    return {choice.name: choice for choice in find_fusers(list(folders.values()))}


@pytest.fixture(scope="module")
def models():
    return ModelCache()


@pytest.fixture
def merging(choices):
    return choices["merging"]


def done(panes):
    """The names of the systems in the order in which they finished."""
    return [pane.name for pane in panes if pane.state == "done"]


def states(session):
    return {name: pane.state for name, pane in session.panes.items()}


def test_the_zoo_is_offered_and_a_fuser_that_the_user_names_comes_first(folders):
    shipped = find_fusers([])
    best = default_fuser(shipped, private=False)
    assert best.answer_prefix == "The answer is"
    assert best.score == max(choice.score or 0 for choice in shipped if not choice.private)
    assert default_fuser(find_fusers([folders["merging"]]), private=False).name == "merging"
    assert default_fuser([], private=True) is None


def test_a_pair_whose_models_are_pulled_is_shown_first(monkeypatch):
    pulled = {"smollm2-135m", "qwen2.5-coder-1.5b"}  # not the receiver of the fuser with the best dev score
    monkeypatch.setattr("c2c.demo.fusers.is_pulled", lambda alias: alias in pulled)
    shipped = find_fusers([])
    assert default_fuser(shipped, private=False).receiver == "smollm2-135m"
    pulled.add("gemma3-270m")
    assert default_fuser(shipped, private=False).receiver == "gemma3-270m"


def test_one_model_on_both_sides_needs_no_fuser(choices, tmp_path):
    model, folder = ModelCache(), choices["merging"].receiver
    offered = find_fusers([choices["merging"].source], [folder])
    choice = default_fuser(offered, private=True)
    assert (choice.family, choice.receiver, choice.sharer, choice.given) == ("copy", folder, folder, True)
    session, asked = Session(), Question("Where is it?", max_new_tokens=4, message_tokens=6, document="It is here.")
    assert done(session.ask(model, choice, asked)) == list(RUN_ORDER)
    with model.use(choice) as both:
        assert both.receiver.model is both.sharers[0].model
        reader = make_system("reader", both).generate(asked.messages, asked.document, max_new_tokens=4, do_sample=False)
    assert session.panes["c2c"].text == reader.text
    assert "on both sides" in choice.pair


def test_two_folders_of_one_name_have_different_labels(folders, tmp_path):
    shutil.copytree(folders["merging"], tmp_path / "copy" / "merging")
    (tmp_path / "link").symlink_to(folders["merging"])  # the same fuser once more
    given = [folders["merging"], str(tmp_path / "copy" / "merging"), str(tmp_path / "link")]
    labels = [choice.label for choice in find_fusers(given) if choice.given]
    assert len(labels) == len(set(labels)) == 2


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "config.json is missing"),
        ({"fuser_0/config.json": "{}"}, "name one of them: fuser_0"),
        ({"config.json": "{"}, "not JSON"),
        ({"config.json": '{"model_type": "llama"}'}, "expected 'c2c_fuser_<family>'"),
        ({"config.json": '{"model_type": "c2c_fuser_linear", "receiver": {"name": "x"}}'}, "which sharer"),
    ],
)
def test_a_folder_that_is_no_fuser_is_refused(tmp_path, files, words):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(FuserError, match=words):
        find_fusers([str(tmp_path)])


def test_without_any_fuser_the_error_says_what_to_give(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("c2c.demo.fusers.fuser_folders", list)
    with pytest.raises(FuserError, match="--fuser"):
        find_fusers([])
    with pytest.raises(C2CError, match=r"no such folder|not"):
        find_fusers(["./gone"])


def test_every_example_has_another_question_with_another_answer():
    answers = {example.prompt: example.letter for example in EXAMPLES}
    assert set(answers.values()) == set("ABCD")
    assert all(answers[other_question(prompt)] != letter for prompt, letter in answers.items())
    assert other_question("anything else") in answers


def test_panes_show_what_the_systems_answer(models, merging):
    session = Session()
    assert done(session.ask(models, merging, ASKED)) == list(RUN_ORDER)
    with models.use(merging) as model:
        for name, pane in session.panes.items():
            expected = make_system(name, model, SystemOptions(message_tokens=6)).generate(
                ASKED.messages, options=RenderOptions(answer_prefix="The answer is"), max_new_tokens=4, do_sample=False
            )
            assert pane.text == expected.text
            html = pane_html(pane, merging)
            assert re.search(rf"first token</dt><dd>\d+\.\d\d s.*tokens read</dt><dd>{expected.prompt_tokens}<", html)
            assert "right is B" in html or "\u2713 right" in html
            crossed = {"receiver": "nothing", "sharer": "nothing", "text": ".* of text", "c2c": ".* of cache"}[name]
            assert re.search(f"crossed</dt><dd>{crossed}</dd>", html)
    assert "The text that was passed" in pane_html(session.panes["text"], merging)


def test_a_wrong_message_runs_cache_to_cache_alone_and_shows_what_was_read(models, merging):
    session = Session()
    list(session.ask(models, merging, ASKED))
    first = session.panes["c2c"].text
    assert done(session.ask_again(models, merging, replace(ASKED, wrong_message=True))) == ["c2c"]
    pane, html = session.panes["c2c"], pane_html(session.panes["c2c"], merging)
    assert pane.previous == first != pane.text
    assert all(words in html for words in ("Wrong message", "before: ", other_question(PROMPT).splitlines()[2]))
    list(session.ask_again(models, merging, ASKED))
    assert session.panes["c2c"].text == first


def test_blend_zero_is_the_receivers_answer_whatever_the_sharer_reads(models, merging):
    session, silent = Session(), replace(ASKED, blend=0.0)
    assert list(session.ask_again(models, merging, silent)) == []  # nothing was asked yet
    list(session.ask(models, merging, silent))
    assert session.panes["c2c"].result.report.sharer_bytes == 0
    for wrong_message in (False, True):
        list(session.ask_again(models, merging, replace(silent, wrong_message=wrong_message)))
        assert session.panes["c2c"].text == session.panes["receiver"].text


def test_only_the_sharer_reads_a_document(models, choices):
    session, private = Session(), choices["remembering"]
    question = Question("Where does the key hang?", max_new_tokens=4, message_tokens=6, document=DOCUMENT)
    assert done(session.ask(models, private, question)) == list(RUN_ORDER)
    assert "without the document" in pane_html(session.panes["receiver"], private)
    assert session.panes["receiver"].result.prompt_tokens < session.panes["sharer"].result.prompt_tokens
    first = session.panes["c2c"].text
    list(session.ask_again(models, private, replace(ASKED, wrong_message=True)))
    assert OTHER_DOCUMENT[:20] in pane_html(session.panes["c2c"], private)
    assert session.panes["c2c"].text != first


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": "  "}, "There is no prompt"),
        ({"document": " "}, "There is no document"),
        ({"document": "x"}, "memory"),
        ({"prompt": "word " * 600}, "was made for 512"),
    ],
)
def test_errors_are_shown_in_the_panes(models, merging, change, words):
    session = Session()
    list(session.ask(models, merging, replace(ASKED, **change)))
    assert states(session)["c2c"] == "failed"
    assert words in pane_html(session.panes["c2c"], merging)


def test_no_fuser_and_the_unforeseen_are_shown(models, merging, monkeypatch):
    session = Session()
    list(session.ask(models, None, ASKED))
    assert set(states(session).values()) == {"failed"}

    with models.use(merging) as model:
        monkeypatch.setattr(model.sharers[0].model, "generate", Mock(side_effect=RuntimeError("no room")))
    assert done(session.ask(models, merging, ASKED)) == ["receiver", "c2c"]  # the others go on
    assert "RuntimeError: no room" in pane_html(session.panes["sharer"], merging)


def test_a_run_can_be_stopped_and_finished_later(models, merging):
    session = Session()
    run = session.ask(models, merging, replace(ASKED, max_new_tokens=200))
    while next(run).state != "running":
        pass
    run.close()
    session.stop()
    assert set(states(session).values()) == {"stopped"}
    finished = done(session.ask_again(models, merging, ASKED))
    assert finished == ["c2c", "receiver", "sharer", "text"]
    session.clear()
    assert set(states(session).values()) == {"idle"}


def test_what_users_and_models_write_is_escaped():
    bad = "<script>alert(1)</script>"
    pane = Pane("c2c", "failed", Question(bad, answer_prefix=bad), text=bad, previous=bad, error=bad)
    assert "script>" not in pane_html(pane, None).replace("&lt;/script&gt;", "").replace("&lt;script&gt;", "")


@pytest.mark.parametrize(
    ("text", "letter"), [(" B", "B"), ("B. a lamp", "B"), (" B) lamp", "B"), ("Because", None), ("", None), ("K", None)]
)
def test_the_letter_of_an_answer(text, letter):
    assert Pane("c2c", text=text).letter == letter


def test_the_right_answer_to_the_sharers_question_is_recognised(models, merging):
    session = Session()
    list(session.ask(models, merging, replace(ASKED, wrong_message=True)))
    misled = replace(session.panes["c2c"], text=" A")  # right for chalk and vinegar
    assert "A is right for the question that the sharer was given" in pane_html(misled, merging)
    assert "was given." not in pane_html(replace(misled, text=" D"), merging)


def test_models_are_loaded_once_and_give_way_to_another_pair(choices, tmp_path):
    models, merging = ModelCache(allow_mismatch=True), choices["merging"]
    assert models.seconds(merging) is None
    with models.use(merging) as first:
        pass
    with models.use(choices["remembering"]) as second:
        assert (second.receiver, second.sharers[0]) == (first.receiver, first.sharers[0])
    with models.use(merging) as again:
        assert again is first
    assert models.seconds(merging) > 0
    twin = {"receiver": str(shutil.copytree(merging.receiver, tmp_path / "twin"))}
    with models.use(replace(merging, source=shutil.copytree(merging.source, tmp_path / "fuser"), **twin)):
        assert models.seconds(merging) is None


def test_a_pair_that_cannot_be_loaded_is_shown_and_can_be_tried_again(merging, tmp_path):
    models, session = ModelCache(), Session()
    gone = replace(merging, receiver=str(tmp_path / "model"))
    list(session.ask(models, gone, ASKED))
    assert set(states(session).values()) == {"failed"}
    shutil.copytree(merging.receiver, tmp_path / "model")
    assert len(done(session.ask(models, gone, ASKED))) == 4


def test_what_is_unforeseen_in_loading_is_an_error_with_its_name(merging, monkeypatch):
    full = Mock(side_effect=ValueError("disk is full"))
    monkeypatch.setattr("c2c.language_model.Receiver.from_pretrained", full)
    with pytest.raises(ModelLoadError, match="ValueError: disk is full"), ModelCache().use(merging):
        pass


@pytest.mark.parametrize(("content", "words"), [(b"", "empty"), (b"\xff\xfe\x00", "UTF-8"), (b"A fox.", "6 letters")])
def test_uploads_are_read_or_refused(tmp_path, content, words):
    pytest.importorskip("gradio")
    from c2c.demo.page import read_upload

    (tmp_path / "a.txt").write_bytes(content)
    text, status = read_upload(str(tmp_path / "a.txt"))
    assert words in status
    assert (text == "A fox.") == (content == b"A fox.")


@pytest.mark.parametrize("names", [("merging", "remembering"), ("merging",)])
def test_the_page_is_built_with_everything_on_it(models, choices, names):
    pytest.importorskip("gradio")
    from c2c.demo.page import build

    page = build(models, [choices[name] for name in names], DemoConfig())
    shown = {block.elem_id: block for block in page.blocks.values()}
    assert {f"{tab}-{name}" for tab in ("ask", "private") for name in SYSTEMS} <= set(shown)
    assert {"ask-blend", "ask-wrong", "private-upload", "pictures-run"} <= set(shown)
    missing = "remembering" not in names
    assert ("c2c train configs/private.yaml" in shown["private-status"].value) == missing


def test_what_the_page_waits_for_is_light():
    code = (
        "import sys, c2c.cli, c2c.demo.server; from c2c.demo.fusers import find_fusers; find_fusers([]); "
        "assert not {'torch', 'transformers', 'gradio', 'matplotlib'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.fixture(scope="module")
def address(folders, choices, models):
    pytest.importorskip("gradio")
    from c2c.demo.server import launch

    addresses = []
    with models.use(choices["remembering"]):  # the page does not wait for the models
        page = launch(DemoConfig(fuser=list(folders.values()), port=0, max_new_tokens=4), models, addresses.append)
        assert Visitor(addresses[0]).http.get("").status_code == 200
    yield addresses[0]
    page.close(verbose=False)


def test_a_visitor_asks_switches_and_changes_the_fuser(address):
    visitor, other = Visitor(address), Visitor(address)
    assert 'data-status="ready"' in visitor.trigger("None", "load")["ask-status"]
    for tab, wrong in (("ask", {"ask_wrong": True}), ("private", {"private_wrong": True})):
        assert 'data-state="done"' in visitor.trigger(f"{tab}-run", "click")[f"{tab}-text"]
        assert "Wrong message" in visitor.trigger(f"{tab}-wrong", "input", **wrong)[f"{tab}-c2c"]
        shown = visitor.trigger(f"{tab}-stop", "click")
        assert all('data-state="done"' in html for html in shown.values())
    assert all('data-state="idle"' in html for html in other.trigger("ask-stop", "click").values())
    assert 'data-status="ready"' in visitor.trigger("ask-fuser", "input")["ask-status"]
    assert all('data-state="idle"' in html for html in visitor.trigger("ask-stop", "click").values())


def test_a_visitor_sees_pictures_and_errors(address):
    visitor = Visitor(address)
    assert "<svg" in visitor.trigger("pictures-run", "click")["pictures-shown"]
    assert "There is no prompt" in visitor.trigger("pictures-run", "click", ask_prompt=" ")["pictures-status"]
    assert "There is no document" in visitor.trigger("private-run", "click", private_document="")["private-text"]


def test_a_pair_that_is_not_here_is_shown_on_the_page(folders, tmp_path):
    pytest.importorskip("gradio")
    from c2c.demo.server import launch

    fuser = Path(shutil.copytree(folders["merging"], tmp_path / "fuser")) / "config.json"
    config = json.loads(fuser.read_text())
    config["receiver"]["name"] = str(tmp_path / "gone")
    fuser.write_text(json.dumps(config))
    page = launch(DemoConfig(fuser=[str(fuser.parent)], port=0), on_start=print)
    assert "could not be loaded" in Visitor(page.local_url).trigger("None", "load")["ask-status"]
    page.close(verbose=False)
