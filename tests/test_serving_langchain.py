"""The server behind LangChain's client, as it comes. Skipped where langchain-openai is not installed.

pip install langchain-openai
"""

from __future__ import annotations

import openai
import pytest

from serving_harness import NAME, model, running, text_of

langchain_openai = pytest.importorskip("langchain_openai")

SAID = [("system", "Be brief."), ("human", "hello there")]
SENT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello there"}]


@pytest.fixture(scope="module")
def server():
    with running(model()) as found:
        yield found


def chat(server, system="", **fields):
    """LangChain's client of the server; nothing but its address, model and key is ours."""
    settings = {"temperature": 0, "max_tokens": 6} | fields
    return langchain_openai.ChatOpenAI(model=NAME + system, base_url=f"{server.url}/v1", api_key="any", **settings)


def text(server, **fields) -> str:
    """What the server answers to the same request without LangChain."""
    return text_of(server.chat(messages=SENT, **fields))


def test_invoke_stream_and_batch(server):
    answer = chat(server, "/text").invoke(SAID)
    assert answer.content == text(server, model=f"{NAME}/text")
    assert answer.usage_metadata["output_tokens"] == 6
    assert answer.response_metadata["finish_reason"] == "length"
    assert answer.response_metadata["model_name"] == f"{NAME}/text"
    for usage in (False, True):
        pieces = list(chat(server, stream_usage=usage).stream(SAID))
        assert len(pieces) > 3
        whole = sum(pieces[1:], pieces[0])
        assert whole.content == text(server)
        assert (whole.usage_metadata or {}).get("output_tokens") == (6 if usage else None)
    texts = [f"hello {number}" for number in range(4)]
    assert [one.content for one in chat(server).batch(texts)] == [text_of(server.chat(one)) for one in texts]


def test_settings_of_the_client_reach_the_server(server):
    given = {"c2c": {"answer_prefix": "The answer is", "report": True}}
    expected, whole = text(server, **given), text(server)
    assert expected != whole
    assert chat(server, extra_body=given).invoke(SAID).content == expected
    assert "".join(piece.content for piece in chat(server, extra_body=given).stream(SAID)) == expected
    sampled = {"temperature": 1, "top_p": 0.9, "seed": 3}
    assert chat(server, **sampled).invoke(SAID).content == text(server, **sampled)
    assert chat(server, stop=[whole[2]]).invoke(SAID).content == whole[: whole.index(whole[2])]


def test_what_the_server_does_not_have_is_the_clients_error(server):
    with pytest.raises(openai.BadRequestError, match="tools"):
        chat(server).bind_tools([{"type": "function", "function": {"name": "f", "parameters": {}}}]).invoke(SAID)
    with pytest.raises(openai.NotFoundError, match="nobody"):
        chat(server, "/nobody").invoke(SAID)
