"""Handoffs that a server keeps: in a folder over a restart, for their owner; several per request."""

from __future__ import annotations

import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from c2c import C2CModel
from c2c.library import Library
from c2c.serving.errors import ServerError
from c2c.sharer import Sharer
from serving_harness import NAME, PATIENCE, error_of, running, text_of, user
from test_private import DOCUMENT, LONGER
from test_serving_private import HANDOFFS, QUESTION, create, library
from tiny import build, copy_pair, memory_pair, tokenizer

KEYS = {"api_key": ["first", "second"]}
FIRST, SECOND = ({"Authorization": f"Bearer {key}"} for key in ("first", "second"))


@pytest.fixture(scope="module")
def pair() -> C2CModel:
    return memory_pair()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "handoffs"


def post(server, headers=FIRST, **fields) -> httpx.Response:
    return server.post(HANDOFFS, json={"messages": DOCUMENT} | fields, headers=headers)


def listed(server, headers=None) -> list[dict]:
    return server.get(HANDOFFS, headers=headers).json()["data"]


def test_handoffs_survive_a_restart(pair, folder):
    with running(pair, handoff_folder=folder) as server:
        made = [create(server), create(server, precision="int8", messages=LONGER)]
        gone = create(server)
        before = [text_of(server.chat(QUESTION, c2c={"handoff": one["id"]})) for one in made]
        assert httpx.delete(f"{server.url}{HANDOFFS}/{gone['id']}").status_code == 200
    assert len(Library(folder).names()) == 2
    with running(pair, handoff_folder=folder) as server:
        assert listed(server) == made
        assert [text_of(server.chat(QUESTION, c2c={"handoff": one["id"]})) for one in made] == before
        assert server.metric("c2c_handoff_bytes") == sum(one["bytes"] for one in made)
        assert httpx.delete(f"{server.url}{HANDOFFS}/{made[0]['id']}").status_code == 200
    assert Library(folder).names() == [made[1]["id"]]


def test_they_belong_to_a_key_over_a_restart(pair, folder):
    with running(pair, handoff_folder=folder, **KEYS) as server:
        made = post(server).json()["id"]
    for options, headers, expected in ((KEYS, FIRST, 200), (KEYS, SECOND, 404), ({}, None, 404)):
        with running(pair, handoff_folder=folder, **options) as server:
            assert server.get(f"{HANDOFFS}/{made}", headers=headers).status_code == expected
            assert server.chat(QUESTION, c2c={"handoff": made}, headers=headers).status_code == expected
            assert [one["id"] for one in listed(server, headers)] == [made][: expected == 200]
    assert b"first" not in (folder / f"{made}.safetensors").read_bytes()


def test_what_can_not_be_used_after_a_restart(pair, folder, caplog):
    """Damaged, cut, another model's, one that no server has made: not there, and left alone."""
    with running(pair, handoff_folder=folder) as server:
        good, damaged, cut, renamed, foreign = (create(server)["id"] for _ in range(5))
    kept = Library(folder)
    for name, change in ((damaged, lambda data: data[:-1] + bytes([data[-1] ^ 1])), (cut, lambda data: data[:-1])):
        path = folder / f"{name}.safetensors"
        path.write_bytes(change(path.read_bytes()))
    shutil.move(folder / f"{renamed}.safetensors", folder / "other.safetensors")
    entry, other = kept.entry(foreign), Sharer(build("qwen2", 8), tokenizer("llama3"), "other")
    kept.add(
        other.read(DOCUMENT), foreign, expires=entry.expires, bound_to=entry.bound_to, about=entry.about, overwrite=True
    )
    kept.add(pair.sharers[0].read(DOCUMENT), "mine")
    with running(pair, handoff_folder=folder) as server:
        assert [one["id"] for one in listed(server)] == [good]
        for name in (damaged, cut, renamed, foreign, "mine"):
            assert error_of(server.chat(QUESTION, c2c={"handoff": name}))["code"] == "handoff_not_found"
    lost = {record.facts["handoff"] for record in caplog.records if record.msg == "handoff_not_restored"}
    assert lost == {damaged, cut, "other", foreign, "mine"}
    assert len(kept.entries()) == 6


def test_files_of_expired_handoffs_are_deleted(pair, folder):
    with running(pair, handoff_folder=folder) as server:
        create(server, ttl_seconds=0.05)
        kept = create(server)["id"]
        server.until(lambda: Library(folder).names() == [kept] and len(list(folder.glob("*.safetensors"))) == 1)
        late = create(server, ttl_seconds=1.0)["id"]
    time.sleep(1.0)
    with running(pair, handoff_folder=folder) as server:
        assert server.get(f"{HANDOFFS}/{late}").status_code == 404
        assert [path.stem for path in folder.glob("*.safetensors")] == [kept]


def test_limits_hold_over_a_restart(pair, folder):
    with running(pair, handoff_folder=folder) as server:
        made = [create(server)["id"] for _ in range(3)]
    with running(pair, handoff_folder=folder, handoffs=2) as server:
        assert [one["id"] for one in listed(server)] == made[:2]
        assert error_of(post(server))["code"] == "handoff_limit"


def test_one_server_per_folder(pair, folder):
    with (
        running(pair, handoff_folder=folder),
        pytest.raises(ServerError, match="another server"),
        running(pair, handoff_folder=folder),
    ):
        pass


def test_a_folder_that_can_not_be_written(pair, folder):
    with running(pair, handoff_folder=folder) as server:
        folder.chmod(0o755)  # as a slip of its owner
        error = error_of(post(server))
        assert (error["status"], error["code"]) == (507, "handoff_not_saved")
        assert listed(server) == []


@pytest.mark.parametrize("made", [copy_pair, memory_pair])
def test_several_documents_of_one_sharer(made):
    """Any of them in any order, as in the library; requests with different ones run in one batch."""
    model, documents = made(), [DOCUMENT, LONGER, "The boat house was built in 1924."]
    before = "" if made is copy_pair else None
    handoffs = [model.sharers[0].read(document, before=before) for document in documents]
    subsets = [[0, 1, 2], [2, 0, 1], [1], [0, 2]]
    with running(model, max_batch=4, window=PATIENCE) as server, ThreadPoolExecutor(4) as clients:
        ids = [create(server, messages=document)["id"] for document in documents]

        def ask(subset: list[int]) -> dict:
            given = [ids[place] for place in subset]
            return server.chat(QUESTION, c2c={"handoff": [given] if subset[0] else given, "report": True}).json()

        found = list(clients.map(ask, subsets))
    expected = [library(model, QUESTION, [handoffs[place] for place in subset]) for subset in subsets]
    assert [answer["choices"][0]["message"]["content"] for answer in found] == expected
    assert len(set(expected)) == 4
    assert [answer["c2c"]["batch"] for answer in found] == [4] * 4


def test_several_documents_for_each_of_two_sharers(pair):
    both = C2CModel(pair.receiver, [pair.sharers[0]] * 2, [pair.fusers[0], memory_pair().fusers[0]])
    read = pair.sharers[0].read
    with running(both) as server:
        first, second, third = (
            create(server, messages=document, sharer=sharer)["id"]
            for document, sharer in ((DOCUMENT, 0), (LONGER, 0), (LONGER, 1))
        )
        for given, expected in (
            ([first, third], (read(DOCUMENT), read(LONGER))),
            ([[first, second], third], ([read(DOCUMENT), read(LONGER)], read(LONGER))),
        ):
            assert text_of(server.chat(QUESTION, c2c={"handoff": given})) == library(both, QUESTION, expected)
        error = error_of(server.chat(QUESTION, c2c={"handoff": [first, second]}))
        assert (error["status"], error["param"]) == (400, "c2c")
        assert "2" in error["message"]


def test_a_copy_is_exact_under_the_prompt_that_it_was_read_for(folder):
    model, system = copy_pair(), "Be brief."
    asked = [{"role": "system", "content": system}, *user(QUESTION)]
    with running(model, handoff_folder=folder, systems=["c2c", "reader"]) as server:
        plain, under = create(server), create(server, before=system)
        again = create(server, before=[{"role": "system", "content": system}])
        for messages, handoff, exact in (
            (user(QUESTION), plain, True),
            (asked, under, True),
            (asked, again, True),
            (asked, plain, False),
            (user(QUESTION), under, False),
        ):
            found = server.chat(messages=messages, c2c={"handoff": handoff["id"], "report": True}).json()
            notes = " ".join(found["c2c"]["report"]["notes"])
            assert ("lie where they were read" in notes, "moved" in notes) == (exact, not exact)
            if exact:
                read = server.chat(messages=messages, model=f"{NAME}/reader", c2c={"sharer_messages": DOCUMENT})
                assert found["choices"][0]["message"]["content"] == text_of(read)
        error = error_of(server.post(HANDOFFS, json={"messages": DOCUMENT, "before": user("Hello")}))
        assert (error["status"], "user message" in error["message"]) == (400, True)


def test_a_document_among_others_is_read_behind_another():
    model = copy_pair()
    with running(model) as server:
        alone, among = create(server), create(server, among="Wheat is a grain.")
        expected = model.sharers[0].read(DOCUMENT, before="", among="Wheat is a grain.")
        assert (alone["tokens"], among["tokens"]) != (among["tokens"], alone["tokens"])
        assert among["tokens"] == len(expected.ids)
        own = model.generate(QUESTION, sharer_messages=expected, max_new_tokens=8, do_sample=False).text
        assert text_of(server.chat(QUESTION, c2c={"handoff": among["id"]}, max_tokens=8)) == own
        error = error_of(server.post(HANDOFFS, json={"messages": DOCUMENT, "among": True, "draft_tokens": 2}))
        assert (error["status"], error["param"]) == (400, "among")


@pytest.mark.parametrize("name", ["before", "among"])
def test_what_stands_before_is_for_a_copy_fuser(pair, name):
    with running(pair) as server:
        error = error_of(server.post(HANDOFFS, json={"messages": DOCUMENT, name: "Be brief."}))
        assert (error["status"], error["param"]) == (400, name)


def test_a_request_names_so_many_handoffs(pair):
    with running(pair, handoffs_per_request=2) as server:
        made = [create(server)["id"] for _ in range(3)]
        for given in (made, [made]):
            error = error_of(server.chat(QUESTION, c2c={"handoff": given}))
            assert (error["status"], error["code"]) == (400, "too_many_handoffs")
        for given in ([made[0]] * 2, [[made[0], made[1]], made[0]]):
            assert "twice" in error_of(server.chat(QUESTION, c2c={"handoff": given}))["message"]
        for given in ([], [[]], "", [3], {"id": made[0]}):
            assert error_of(server.chat(QUESTION, c2c={"handoff": given}))["param"].startswith("c2c.handoff")
