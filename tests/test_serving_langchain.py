"""The server behind LangChain's client, as it comes. Skipped where langchain-openai is not installed.

pip install langchain-openai
"""

from __future__ import annotations

import openai
import pytest

from serving_harness import NAME, model, running

langchain_openai = pytest.importorskip("langchain_openai")

SAID = [("system", "Be brief."), ("human", "hello there")]
SENT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello there"}]


@pytest.fixture(scope="module")
def server():
    with running(model()) as found:
        yield found


def chat(server, way="", **fields):
    """LangChain's client of the server; nothing but its address, model and key is ours."""
    settings = {"temperature": 0, "max_tokens": 6} | fields
    return langchain_openai.ChatOpenAI(model=NAME + way, base_url=f"{server.url}/v1", api_key="any", **settings)


def direct(server, way="", **fields) -> str:
    """What the server answers to the same request without LangChain."""
    response = server.chat(model=NAME + way, messages=SENT, **fields)
    return response.json()["choices"][0]["message"]["content"]


@pytest.mark.parametrize("way", ["", "/receiver", "/sharer", "/text"])
def test_invoke(server, way):
    answer = chat(server, way).invoke(SAID)
    assert answer.content == direct(server, way)
    assert answer.usage_metadata["output_tokens"] == 6
    assert answer.response_metadata["finish_reason"] == "length"
    assert answer.response_metadata["model_name"] == NAME + way


@pytest.mark.parametrize("usage", [False, True])
def test_stream(server, usage):
    pieces = list(chat(server, stream_usage=usage).stream(SAID))
    assert len(pieces) > 3
    whole = sum(pieces[1:], pieces[0])
    assert whole.content == direct(server)
    assert (whole.usage_metadata or {}).get("output_tokens") == (6 if usage else None)


def test_batch(server):
    texts = [f"hello {number}" for number in range(4)]
    answers = chat(server).batch(texts)
    expected = [server.chat(text).json()["choices"][0]["message"]["content"] for text in texts]
    assert [answer.content for answer in answers] == expected


def test_extra_body_reaches_the_server(server):
    given = {"c2c": {"answer_prefix": "The answer is", "report": True}}
    expected = direct(server, c2c=given["c2c"])
    assert expected != direct(server)
    assert chat(server, extra_body=given).invoke(SAID).content == expected
    assert "".join(piece.content for piece in chat(server, extra_body=given).stream(SAID)) == expected


def test_settings_of_the_client_reach_the_server(server):
    sampled = chat(server, temperature=1, top_p=0.9, seed=3)
    assert sampled.invoke(SAID).content == direct(server, temperature=1, top_p=0.9, seed=3)
    whole = direct(server)
    assert chat(server, stop=[whole[2]]).invoke(SAID).content == whole[: whole.index(whole[2])]


def test_what_the_server_does_not_have_is_the_clients_error(server):
    with pytest.raises(openai.BadRequestError, match="tools"):
        chat(server).bind_tools([{"type": "function", "function": {"name": "f", "parameters": {}}}]).invoke(SAID)
    with pytest.raises(openai.NotFoundError, match="nobody"):
        chat(server, "/nobody").invoke(SAID)
