"""The server with its sharer on another machine: what it answers, and what it says when the sharer is lost.

The sharer is a real server, with a proxy before it that spoils what passes.
"""

from __future__ import annotations

import time
from contextlib import contextmanager

import httpx
import openai
import pytest

from c2c import C2CModel
from c2c.remote import RemoteSharer
from c2c.sharer import Sharer
from remote_rig import Proxy
from remote_rig import serving as sharing
from serving_harness import NAME, PATIENCE, error_of, events, model, running, text_of, user
from test_private import DOCUMENT, QUESTION
from test_remote_faults import with_body
from tiny import build, memory_pair, tokenizer

COMPLETIONS, HANDOFFS = "/v1/completions", "/v1/c2c/handoffs"
POLICIES = ["raise", "receiver_only"]
REFUSED = b'{"error": {"code": "invalid_api_key", "message": "the API key is unknown."}}'
TEXTS = ["hello", "hello there, who buys the red house by the sea?", "fox and dog"]

# What happens to the connection, with what the client is told if the policy is ``raise``.
FAULTS = {
    "cut": ({"cut": 4000}, 502, "sharer_lost", "unreachable"),
    "slow": ({"rate": 1500}, 504, "sharer_timeout", "timeout"),
    "wrong token": (
        {"answer": b"HTTP/1.1 401 No\r\nContent-Length: %d\r\n\r\n" % len(REFUSED) + REFUSED},
        502,
        "sharer_lost",
        "invalid_api_key",
    ),
    "damaged": (
        {"change": lambda answer: with_body(answer, lambda body: body[:-1000] + b"?" + body[-999:])},
        502,
        "sharer_lost",
        "damaged",
    ),
}


@pytest.fixture(scope="module")
def pair():
    return model()


@pytest.fixture(scope="module")
def share(pair):
    with sharing(pair.sharers[0]) as running_:
        yield running_


@pytest.fixture
def proxy(share):
    with Proxy(share.port) as between:
        yield between


@contextmanager
def far(pair, url, *, policy="raise", timeout=PATIENCE, retries=0, **options):
    """A server whose sharer is at ``url``."""
    sharer = RemoteSharer(url, on_failure=policy, timeout=timeout, retries=retries)
    try:
        with running(C2CModel(pair.receiver, [sharer], list(pair.fusers)), **options) as server:
            yield server
    finally:
        sharer.close()


def fused(pair, text, tokens=6) -> str:
    return pair.generate(text, max_new_tokens=tokens, do_sample=False).text


def alone(pair, text, tokens=6) -> str:
    return pair.receiver.answer(text, max_new_tokens=tokens, do_sample=False).text


def check_by_policy(response, policy, expected, status, code):
    """An error that says so, or the receiver's own answer that says so."""
    if policy == "raise":
        error = error_of(response)
        assert (error["status"], error["code"], error["param"]) == (status, code, None)
        assert error["type"] == ("timeout_error" if status == 504 else "server_error")
        assert error["message"].startswith("the sharer could not be asked: ")
        return
    assert text_of(response) == expected
    assert response.json()["c2c"]["system"] == "c2c"
    assert response.json()["c2c"]["fallback"].startswith("receiver only: the ")


# -- a sharer that is there --------------------------------------------------------------------------------------------


def test_answers_are_those_with_a_local_sharer_alone_and_in_a_batch(pair, share):
    with far(pair, share.url, max_batch=len(TEXTS), window=PATIENCE) as server:
        before = share.log[-1:]
        found = server.chat_all(TEXTS, c2c={"report": True})
        assert [text_of(one) for one in found] == [fused(pair, text) for text in TEXTS]
        assert [one.json()["c2c"]["batch"] for one in found] == [len(TEXTS)] * len(TEXTS)
        assert [one.json()["c2c"]["fallback"] for one in found] == [None] * len(TEXTS)
        assert share.logged(len(before) + 1)[-1]["rows"] == len(TEXTS), "one request to the sharer for all of them"
        assert server.get("/health").json()["sharers"] == [{"state": "ok"}]
        assert server.metric("c2c_sharer_up", sharer="0") == 1
    with far(pair, share.url) as server:
        assert [text_of(server.chat(text)) for text in TEXTS] == [fused(pair, text) for text in TEXTS]
        seeded = {"temperature": 1.0, "seed": 5, "n": 2, "max_tokens": 8}
        with running(pair) as near:
            assert server.chat(**seeded).json()["choices"] == near.chat(**seeded).json()["choices"]
            raw = {"model": NAME, "prompt": TEXTS, "max_tokens": 5, "temperature": 0}
            assert (
                server.post(COMPLETIONS, json=raw).json()["choices"]
                == (near.post(COMPLETIONS, json=raw).json()["choices"])
            )
        assert "c2c" not in server.chat().json(), "nothing was lost, and nothing was asked for"


@pytest.mark.parametrize("policy", POLICIES)
def test_one_prompt_that_the_sharer_refuses_does_not_spoil_its_batch(pair, policy):
    length = pair.sharers[0].encode(TEXTS[1]).length
    texts = [TEXTS[0], TEXTS[1] * 3, TEXTS[2]]
    with (
        sharing(pair.sharers[0], max_tokens=length) as small,
        far(pair, small.url, policy=policy, max_batch=len(texts), window=PATIENCE) as server,
    ):
        first, second, third = server.chat_all(texts)
        assert [text_of(first), text_of(third)] == [fused(pair, texts[0]), fused(pair, texts[2])]
        if policy == "raise":
            assert (second.status_code, second.json()["error"]["code"]) == (400, "context_length_exceeded")
        else:
            assert text_of(second) == alone(pair, texts[1])
            assert "too" in second.json()["c2c"]["fallback"] or "takes" in second.json()["c2c"]["fallback"]
        assert server.get("/health").json()["sharers"] == [{"state": "ok"}], "it answers, though not everybody"


# -- a sharer that is lost ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_lost_sharer_is_an_error_or_the_receiver_alone(pair, proxy, fault, policy):
    how, status, code, reason = FAULTS[fault]
    with far(pair, proxy.url, policy=policy, timeout=3.0, max_batch=len(TEXTS), window=0.3) as server:
        assert [text_of(one) for one in server.chat_all(TEXTS)] == [fused(pair, text) for text in TEXTS]
        proxy.spoil(**how)
        for text, response in zip(TEXTS, server.chat_all(TEXTS), strict=True):
            check_by_policy(response, policy, alone(pair, text), status, code)
        (state,) = server.get("/health").json()["sharers"]
        assert (state["state"], state["code"]) == ("lost", reason)
        assert abs(state["since"] - time.time()) < PATIENCE
        assert server.get("/health").status_code == 200, "the receiver alone can be asked"
        assert server.metric("c2c_sharer_up", sharer="0") == 0
        assert server.metric("c2c_fallbacks_total", system="c2c") == (3 if policy == "receiver_only" else 0)
        assert text_of(server.chat(model=f"{NAME}/receiver")) == alone(pair, "hello there")
        proxy.spoil(times=0)
        assert [text_of(one) for one in server.chat_all(TEXTS)] == [fused(pair, text) for text in TEXTS], "it is back"
        assert server.get("/health").json()["sharers"] == [{"state": "ok"}]
        assert server.metric("c2c_sharer_up", sharer="0") == 1


def test_streams_say_it_before_their_first_word(pair, proxy):
    with far(pair, proxy.url, policy="receiver_only") as server:
        proxy.spoil(cut=2000)
        plain = events(server.chat(stream=True, n=2).text)
        for index in range(2):
            chunks = [chunk for chunk in plain[:-1] if chunk["choices"][0]["index"] == index]
            assert chunks[0]["c2c"]["fallback"].startswith("receiver only: ")
            assert all("c2c" not in chunk for chunk in chunks[1:])
            assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == alone(pair, "hello there")
        told = events(server.chat(stream=True, c2c={"report": True}).text)
        assert told[-2]["c2c"]["fallback"] == told[0]["c2c"]["fallback"] == told[-2]["c2c"]["report"]["notes"][-1]
        raw = {"model": NAME, "prompt": TEXTS[:2], "max_tokens": 5, "temperature": 0}
        found = events(server.post(COMPLETIONS, json=raw | {"stream": True}).text)
        assert [chunk["choices"][0]["index"] for chunk in found[:-1] if "c2c" in chunk] == [0, 1]
        whole = server.post(COMPLETIONS, json=raw).json()
        assert [one["fallback"][:14] for one in whole["c2c"]["prompts"]] == ["receiver only:"] * 2
        stream = server.client().chat.completions.create(model=NAME, messages=user("hello"), max_tokens=4, stream=True)
        assert next(iter(stream)).c2c["fallback"].startswith("receiver only: ")


def test_a_stream_that_can_not_begin_has_the_status_of_its_error(pair, proxy):
    with far(pair, proxy.url) as server:
        proxy.spoil(cut=2000)
        response = server.chat(stream=True)
        assert (response.status_code, response.json()["error"]["code"]) == (502, "sharer_lost")
        with pytest.raises(openai.InternalServerError, match="the sharer could not be asked"):
            server.client().chat.completions.create(model=NAME, messages=user("hello"), stream=True)


def test_a_stream_that_has_begun_ends_with_an_error(pair):
    """The second of two prompts is refused when the answer to the first is on its way."""
    length = pair.sharers[0].tokenizer(TEXTS[1], return_tensors="pt")["input_ids"].numel() + 2
    with (
        sharing(pair.sharers[0], max_tokens=length) as small,
        far(pair, small.url) as server,
    ):
        body = {"model": NAME, "prompt": [TEXTS[0], TEXTS[1] * 3], "max_tokens": 5, "temperature": 0}
        response = server.post(COMPLETIONS, json=body | {"stream": True})
        found = events(response.text)
        assert response.status_code == 200
        assert found[-1]["error"]["code"] == "context_length_exceeded"
        assert found[0]["choices"][0]["index"] == 0
        assert server.post(COMPLETIONS, json=body).status_code == 400


def test_another_model_at_the_address_is_an_error_under_every_policy(pair, share, proxy):
    other = Sharer(build("qwen2", 9), tokenizer("llama3"), "qwen2")
    with sharing(other) as changed, far(pair, proxy.url, policy="receiver_only") as server:
        assert text_of(server.chat()) == fused(pair, "hello there")
        proxy.port = changed.port
        response = server.chat()
        assert (response.status_code, response.json()["error"]["code"]) == (502, "sharer_mismatch")
        assert server.get("/health").json()["sharers"][0]["code"] == "mismatch"
        proxy.port = share.port
        assert text_of(server.chat()) == fused(pair, "hello there")


def test_a_client_that_does_not_wait_for_a_slow_sharer(pair, proxy):
    """Its request ends in time, and the others get their answers."""
    with far(pair, proxy.url, retries=0) as server:
        proxy.spoil(times=1, rate=3000)
        with pytest.raises(httpx.ReadTimeout):
            server.chat("hello", timeout=0.5)
        assert text_of(server.chat()) == fused(pair, "hello there")
        server.until(lambda: server.state.active == 0)
        assert server.metric("c2c_requests_total", status="499") == 1


# -- private context ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_a_sharer_that_is_lost_with_what_it_alone_has_read(policy):
    here = memory_pair()
    document = {"sharer_messages": DOCUMENT}
    with sharing(here.sharers[0]) as share, Proxy(share.port) as proxy, far(here, proxy.url, policy=policy) as server:
        expected = here.generate(QUESTION, sharer_messages=DOCUMENT, max_new_tokens=6, do_sample=False).text
        assert text_of(server.chat(messages=QUESTION, c2c=document)) == expected
        kept = server.post(HANDOFFS, json={"messages": DOCUMENT}).json()["id"]
        proxy.spoil(cut=3000)
        check_by_policy(server.chat(messages=QUESTION, c2c=document), policy, alone(here, QUESTION), 502, "sharer_lost")
        response = server.post(HANDOFFS, json={"messages": DOCUMENT})
        assert (response.status_code, response.json()["error"]["code"]) == (502, "sharer_lost")
        assert server.metric("c2c_fallbacks_total", system="c2c") == (1 if policy == "receiver_only" else 0)
        assert text_of(server.chat(messages=QUESTION, c2c={"handoff": kept})) == expected, "what it has read is here"


def test_a_remote_sharer_of_private_context_shares_and_does_not_answer():
    here = memory_pair()
    with sharing(here.sharers[0]) as share, far(here, share.url) as server:
        assert [card["id"] for card in server.get("/v1/models").json()["data"]] == [NAME, f"{NAME}/receiver"]
        assert server.chat(model=f"{NAME}/text").status_code == 404
        made = server.post(HANDOFFS, json={"messages": DOCUMENT}).json()
        assert text_of(server.chat(messages=QUESTION, c2c={"handoff": made["id"]})) == (
            here.generate(QUESTION, sharer_messages=DOCUMENT, max_new_tokens=6, do_sample=False).text
        )
        assert made["bytes"] > 1000
        refused = server.post(HANDOFFS, json={"messages": DOCUMENT, "precision": "int8"})
        assert error_of(refused)["param"] == "precision"
