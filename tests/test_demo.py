"""The demo without a browser: fusers on offer, loading, runs, pictures, errors, and the command."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from c2c.cli import app
from c2c.data.formats import SYSTEM as TRAINED_WITH
from c2c.data.formats import letter_form
from c2c.demo.choice import default_choice, find_choices
from c2c.demo.desk import Desk
from c2c.demo.document import read_document
from c2c.demo.errors import DemoError
from c2c.demo.example import DOCUMENT, EXAMPLES, OTHER_DOCUMENT, wrong_question
from c2c.demo.loader import Loader, Stage, loading
from c2c.demo.markup import pane_html
from c2c.demo.pane import RUN_ORDER, Pane, State, Way
from c2c.demo.question import Question
from c2c.demo.settings import SYSTEM
from c2c.demo.ticking import ticking
from demo_rig import choices, fuser_folders

PROMPT = EXAMPLES[0].prompt
ASKED = Question(PROMPT, SYSTEM, "The answer is", max_new_tokens=4, message_tokens=6)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return fuser_folders(tmp_path_factory.mktemp)


@pytest.fixture(scope="module")
def offered(folders):
    return choices(folders)


@pytest.fixture(scope="module")
def desk(offered):
    return Desk(list(offered.values()), Loader(loading()))


@pytest.fixture
def tab(request):
    return request.node.name


def last(runs):
    """The last HTML of each pane, and in which order panes were done."""
    panes, done = {}, []
    for changed in runs:
        for way, html in changed.items():
            panes[way] = html
            if 'data-state="done"' in html:
                done.append(way)
    return panes, done


def states(panes):
    return {way: re.search(r'data-state="(\w+)"', html).group(1) for way, html in panes.items()}


# -- what is on offer --------------------------------------------------------------------------------------------------


def test_the_zoo_is_offered_and_its_best_is_the_default(folders):
    found = find_choices([])
    best = default_choice(found, private=False)
    assert best.prefix == "The answer is"
    assert best.value == max(choice.value or 0 for choice in found)
    named = default_choice(find_choices([folders["merging"]]), private=False)
    assert named.name == "merging"
    assert default_choice(found, private=True) is None or default_choice(found, private=True).private


def test_a_pair_whose_models_are_here_is_shown_first(monkeypatch):
    pulled = {"smollm2-135m", "qwen2.5-coder-1.5b"}  # not the receiver of the fuser with the best dev score
    monkeypatch.setattr("c2c.demo.choice.is_pulled", lambda alias: alias in pulled)
    found = find_choices([])
    assert default_choice(found, private=False).receiver == "smollm2-135m"
    pulled.add("gemma3-270m")
    assert default_choice(found, private=False).receiver == "gemma3-270m"
    assert default_choice(found, private=True) is not None  # its page says what to pull


def test_two_folders_of_one_name_are_told_apart(folders, tmp_path):
    twin = tmp_path / "other" / "merging"
    twin.parent.mkdir()
    twin.symlink_to(folders["merging"])
    copy = tmp_path / "copy" / "merging"
    copy.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (copy / name).write_bytes((twin / name).read_bytes())
    labels = [choice.label for choice in find_choices([folders["merging"], str(copy), str(twin)]) if choice.given]
    assert len(labels) == len(set(labels)) == 2


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (None, "config.json is missing"),
        ("{", "not JSON"),
        ('{"model_type": "llama"}', "expected 'c2c_fuser_<family>'"),
        ('{"model_type": "c2c_fuser_linear", "receiver": {"name": "x"}}', "which sharer"),
    ],
)
def test_what_is_no_fuser_is_refused(tmp_path, config, said):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(DemoError, match=said):
        find_choices([str(tmp_path)])


def test_examples_have_the_form_of_training():
    assert SYSTEM == TRAINED_WITH
    for example in EXAMPLES:
        row = letter_form(example.question, example.choices, example.answer)
        assert row.messages[-1]["content"] == example.prompt
        assert row.response == f" {example.letter}"
        assert wrong_question(example.prompt) != example.prompt
    assert {example.letter for example in EXAMPLES} == set("ABCD")


# -- runs --------------------------------------------------------------------------------------------------------------


def test_all_four_ways_answer_one_after_the_other(desk, tab):
    panes, done = last(desk.ask(tab, desk.default(False), ASKED))
    assert done == list(RUN_ORDER)
    assert set(panes) == set(Way)
    assert "The text that was passed" in panes[Way.TEXT]
    assert "B of text" in panes[Way.TEXT]
    assert "kB of cache" in panes[Way.C2C]
    assert all("nothing" in panes[way] for way in (Way.RECEIVER, Way.SHARER))
    assert all("right is B" in html or "\u2713 right" in html for html in panes.values())


def test_panes_say_what_the_library_says(desk, offered, tab):
    list(desk.ask(tab, desk.default(False), ASKED))
    shown = desk._board(tab).panes
    model = desk._loader.get(offered["merging"], 60)
    from c2c.prompting import RenderOptions

    kwargs = {"max_new_tokens": 4, "do_sample": False, "options": RenderOptions(answer_prefix="The answer is")}
    expected = {
        Way.RECEIVER: model.receiver.answer(ASKED.messages, **kwargs),
        Way.SHARER: model.sharers[0].answer(ASKED.messages, **kwargs),
        Way.C2C: model.generate(ASKED.messages, **kwargs),
    }
    for way, result in expected.items():
        assert (shown[way].text, shown[way].written) == (result.text, result.new_tokens)
    assert shown[Way.C2C].crossed == expected[Way.C2C].report.sharer_bytes
    from c2c.systems.text_to_text import text_to_text

    spoken = text_to_text(model.receiver, model.sharers[0], ASKED.messages, message_tokens=6, **kwargs)
    pane = shown[Way.TEXT]
    assert (pane.message, pane.text) == (spoken.message.text, spoken.answer.text)
    assert pane.crossed == len(spoken.message.text.encode())
    assert 0 < pane.first <= pane.total


def test_a_wrong_message_runs_cache_to_cache_alone_and_shows_what_was_read(desk, tab):
    label = desk.default(False)
    list(desk.ask(tab, label, ASKED))
    before = desk._board(tab).panes[Way.C2C].text
    panes, done = last(desk.again(tab, label, blend=1.0, misled=True))
    assert done == [Way.C2C]
    assert set(panes) == {Way.C2C}
    assert "Wrong message" in panes[Way.C2C]
    assert wrong_question(PROMPT).partition("\n\n")[2].splitlines()[0] in panes[Way.C2C]
    assert desk._board(tab).panes[Way.C2C].before == before
    assert desk._board(tab).panes[Way.C2C].text != before
    last(desk.again(tab, label, blend=1.0, misled=False))
    assert desk._board(tab).panes[Way.C2C].text == before


def test_blend_zero_is_the_receivers_answer(desk, tab):
    label = desk.default(False)
    list(desk.ask(tab, label, replace(ASKED, blend=0.0)))
    shown = desk._board(tab).panes
    assert shown[Way.C2C].text == shown[Way.RECEIVER].text
    assert shown[Way.C2C].crossed == 0
    last(desk.again(tab, label, blend=0.0, misled=True))
    assert desk._board(tab).panes[Way.C2C].text == shown[Way.RECEIVER].text


def test_nothing_is_run_again_before_a_first_question(desk, tab):
    assert list(desk.again(tab, desk.default(False), blend=0.5, misled=True)) == []


def test_private_context(desk, tab):
    label = desk.default(True)
    question = replace(ASKED, prompt="Where does the key hang?", document=DOCUMENT)
    panes, done = last(desk.ask(tab, label, question))
    assert done == list(RUN_ORDER)
    assert "without the document" in panes[Way.RECEIVER]
    first = desk._board(tab).panes[Way.C2C].text
    panes, _ = last(desk.again(tab, label, blend=1.0, misled=True))
    assert OTHER_DOCUMENT[:20] in panes[Way.C2C]
    assert desk._board(tab).panes[Way.C2C].text != first


def test_without_a_memory_fuser_the_page_says_how_to_train_one(offered):
    lone = Desk([offered["merging"]], Loader(loading()))
    assert lone.default(True) is None
    assert "c2c train configs/private.yaml" in lone.status(None, private=True)
    panes, _ = last(lone.ask("x", None, replace(ASKED, document=DOCUMENT)))
    assert set(states(panes).values()) == {"failed"}


@pytest.mark.parametrize(
    ("private", "change", "said"),
    [
        (False, {"prompt": "  "}, "There is no prompt"),
        (True, {"document": " "}, "There is no document"),
        (True, {}, "a fuser of private context"),
        (False, {"document": "x"}, "can&#x27;t hand over a document"),
        (False, {"prompt": "word " * 600}, "was made for 512"),
    ],
)
def test_errors_are_said_in_the_panes(desk, tab, private, change, said):
    panes, _ = last(desk.ask(tab, desk.default(private), replace(ASKED, **change)))
    assert states(panes)[Way.C2C] == "failed"
    assert said in panes[Way.C2C]


def test_what_is_unforeseen_is_said_and_other_panes_go_on(desk, tab, monkeypatch):
    from c2c.language_model import Sharer

    def broken(*args, **kwargs):
        raise RuntimeError("no room")

    monkeypatch.setattr(Sharer, "answer", broken)
    panes, done = last(desk.ask(tab, desk.default(False), ASKED))
    assert done == [Way.RECEIVER, Way.C2C]
    assert "RuntimeError: no room" in panes[Way.SHARER]


def test_what_users_and_models_write_is_escaped():
    bad = "<script>alert(1)</script>"
    html = pane_html(Pane(Way.TEXT, State.DONE, bad, bad, bad, misled=bad, before=bad, note=bad, error=bad), None)
    assert "<script>" not in html


@pytest.mark.parametrize(
    ("text", "letter"), [(" B", "B"), ("B. a lamp", "B"), (" B) lamp", "B"), ("Because", None), ("", None), ("K", None)]
)
def test_the_letter_of_an_answer(text, letter):
    assert Pane(Way.C2C, State.DONE, text=text).letter == letter


def test_an_answer_to_the_question_that_the_sharer_was_given_is_told():
    pane = Pane(Way.C2C, State.DONE, text=" C", right="B", misled="another", misled_right="C")
    assert "C is right for the question that the sharer was given" in pane_html(pane, None)
    assert "was given." not in pane_html(replace(pane, text=" D"), None)


# -- turns and loading -------------------------------------------------------------------------------------------------


def test_a_run_can_be_stopped(desk, tab):
    runs = desk.ask(tab, desk.default(False), replace(ASKED, max_new_tokens=200))
    seen = [next(runs) for _ in range(6)]
    desk.stop(tab)
    panes, done = last([*seen, *runs])
    assert "stopped" in states(panes).values()
    assert len(done) < 4


def test_a_new_question_ends_the_last_one(desk, tab):
    label = desk.default(False)
    old = desk.ask(tab, label, replace(ASKED, max_new_tokens=200))
    for _ in range(6):
        next(old)
    rest = []
    reader = threading.Thread(target=lambda: rest.extend(old))
    reader.start()
    _, done = last(desk.ask(tab, label, ASKED))
    reader.join(10)
    assert not reader.is_alive()
    assert done == list(RUN_ORDER)
    assert not any("stopped" in html for changed in rest for html in changed.values())


def test_a_slider_on_its_way_makes_one_run(desk, tab):
    label = desk.default(False)
    list(desk.ask(tab, label, ASKED))
    finished = []

    def move(blend):
        finished.append((blend, last(desk.again(tab, label, blend=blend, misled=False))[1]))

    threads = [threading.Thread(target=move, args=(blend,)) for blend in (0.1, 0.2, 0.3)]
    for thread in threads:
        thread.start()
        time.sleep(0.05)
    for thread in threads:
        thread.join(20)
    assert sorted(finished) == [(0.1, []), (0.2, []), (0.3, [Way.C2C])]


def test_models_are_loaded_once_and_shared_by_fusers_of_one_pair(offered):
    loader, parts = Loader(loading()), []
    for choice in offered.values():
        loader.start(choice)
        loader.start(choice)
        while (model := loader.get(choice, 30)) is None:
            pass
        parts.append((model.receiver, model.sharers[0]))
        assert loader.status(choice).stage is Stage.READY
    assert parts[0] == parts[1]


def test_a_pair_that_cannot_be_loaded_is_said_and_can_be_tried_again(offered):
    tries = []

    def load(choice, parts):
        tries.append(choice)
        raise OSError("disk is full")

    desk = Desk([offered["merging"]], Loader(load))
    label = desk.default(False)
    assert "will be loaded" in desk.status(label)
    assert "OSError: disk is full" in list(desk.watch(label))[-1]
    panes, _ = last(desk.ask("x", label, ASKED))
    assert set(states(panes).values()) == {"failed"}
    assert len(tries) == 2


def test_the_page_does_not_wait_for_the_models(offered):
    ready = threading.Event()

    def load(choice, parts):
        assert ready.wait(30)
        return loading()(choice, parts)

    desk = Desk([offered["merging"]], Loader(load))
    label = desk.default(False)
    desk.start(label)
    watched = desk.watch(label)
    assert "Loading" in next(watched)
    runs = desk.ask("x", label, ASKED)
    assert "waiting" in next(iter(next(runs).values()))
    ready.set()
    assert len(last(runs)[1]) == 4
    assert "Ready" in list(watched)[-1]


def test_a_stopwatch_goes_on_while_nothing_comes():
    def slow():
        yield 1
        time.sleep(0.25)
        yield 2
        raise ValueError("end")

    seen = []
    with pytest.raises(ValueError, match="end"):
        seen.extend(ticking(slow(), 0.05))
    assert [item for item in seen if item is not None] == [1, 2]
    assert seen.count(None) >= 2


# -- documents and pictures --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "said"), [(b"", "is empty"), (b"\xff\xfe\x00", "no text in UTF-8"), (b"a" * 1_000_001, "at most")]
)
def test_documents_that_cannot_be_read(tmp_path, content, said):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DemoError, match=said):
        read_document(tmp_path / "a.txt")


def test_pictures(desk, tab):
    *_, (remark, drawn) = desk.pictures(tab, desk.default(False), ASKED)
    assert 'data-status="ready"' in remark
    assert drawn.count("<figure>") == drawn.count("<svg") == 5
    *_, (remark, drawn) = desk.pictures(tab, desk.default(False), replace(ASKED, prompt=""))
    assert "There is no prompt" in remark
    assert drawn == ""


# -- the page and the command ------------------------------------------------------------------------------------------


def test_the_page_is_built_with_everything_on_it(desk):
    pytest.importorskip("gradio")
    from c2c.demo.page import build, style
    from c2c.demo.settings import Settings

    page = build(desk, Settings())
    ids = {block.elem_id for block in page.blocks.values()}
    assert {f"ask-{way}" for way in Way} | {f"private-{way}" for way in Way} <= ids
    assert {"ask-blend", "ask-wrong", "private-upload", "pictures-run"} <= ids
    assert "--c2c-ink" in style()


def test_help_and_import_are_light():
    result = CliRunner().invoke(app, ["demo", "--help"])
    assert result.exit_code == 0
    assert "Examples" in result.output
    assert "c2c demo --open" in result.output
    code = (
        "import sys, c2c.cli, c2c.demo.desk; from c2c.demo.choice import find_choices; find_choices([]); "
        "assert not {'torch', 'transformers', 'gradio', 'matplotlib'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_port_that_is_taken_is_said(folders):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "c2c", "demo", "--fuser", folders["merging"], "--port", str(port)]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    pytest.importorskip("gradio")
    assert ended.returncode == 1
    assert "Choose another --port" in ended.stderr


def test_a_page_is_served_before_the_models_are_there(folders, monkeypatch):
    pytest.importorskip("gradio")
    httpx = pytest.importorskip("httpx")
    from c2c.demo.server import launch
    from c2c.demo.settings import Settings

    ready, said = threading.Event(), []

    def load(choice, parts):
        assert ready.wait(60)
        return loading()(choice, parts)

    page = launch(Settings(fusers=tuple(folders.values()), port=0), load, said.append)
    try:
        answer = httpx.get(said[0])
        config = json.loads(httpx.get(f"{said[0]}config").text)
    finally:
        ready.set()
        page.close(verbose=False)
    assert answer.status_code == 200
    assert config["title"] == "c2c demo"
