"""A graph of two agents: a reader reads a document once, a writer answers questions from the reader's cache.

The state of the graph holds the cache like any other value, and so do its checkpoints: the second question goes on
from the first one's, and the document is not read again. Beside it the usual way, in which the writer reads the text.

    c2c pull qwen2.5-coder-0.5b
    pip install langgraph
    python examples/langgraph_two_agents.py
    python examples/langgraph_two_agents.py --document notes.txt --question "Who wrote this?"
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any, TypedDict

from langchain_core.messages import AIMessage
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, StateGraph

from c2c import connect
from c2c.integrations.langchain import ChatC2C
from c2c.integrations.langgraph import HandoffSerializer

DOCUMENT = (
    "The lighthouse of Grey Point was built in 1884 by the engineer Mary Ellison. Its lamp burned whale oil until "
    "1911. Then a dynamo was installed. The keeper's house beside it is painted green, and is now a museum of the "
    "herring trade. The museum opens on Sundays. "
)
NOTES = (
    "The path to the lighthouse is two miles long, and dogs are welcome on it. Nobody lives at Grey Point in winter. "
)
QUESTIONS = (
    "Who built the lighthouse of Grey Point?",
    "When was a dynamo installed?",
    "What colour is the keeper's house?",
    "When does the museum open?",
)


class State(TypedDict, total=False):
    """What the agents pass on."""

    document: str
    question: str
    handoff: Any  # the reader's cache of the document
    answer: AIMessage


def make_graph(reader: ChatC2C, writer: ChatC2C) -> Any:
    """Make the graph: the reader reads where nothing is read yet, then the writer answers."""

    def read(state: State) -> State:
        began = time.perf_counter()
        handoff = reader.read(state["document"])
        print(f"reader: read the document in {time.perf_counter() - began:.2f} s")
        return {"handoff": handoff}

    def write(state: State) -> State:
        return {"answer": writer.invoke(state["question"], context=state["handoff"])}

    graph = StateGraph(State)
    graph.add_node("read", read)
    graph.add_node("write", write)
    graph.add_conditional_edges(START, lambda state: "write" if "handoff" in state else "read", ["read", "write"])
    graph.add_edge("read", "write")
    graph.add_edge("write", END)
    return graph.compile(checkpointer=InMemorySaver(serde=HandoffSerializer()))


def main() -> None:
    """Ask all questions in one thread of the graph, and of the writer that reads the text itself."""
    arguments = _arguments()
    document = Path(arguments.document).read_text(encoding="utf-8") if arguments.document else DOCUMENT + 12 * NOTES
    agents = connect(arguments.receiver, arguments.sharer, dtype=arguments.dtype)
    method: Any = agents.chosen("private")
    print(f"writer {agents.receiver.name}, reader {agents.sharer.name}: {method.name}, {method.reason}")
    chat = ChatC2C(system=agents, temperature=0, max_tokens=24)
    graph, thread = make_graph(chat, chat), {"configurable": {"thread_id": "1"}}
    for question in arguments.question or QUESTIONS:
        answer = graph.invoke({"document": document, "question": question}, thread)["answer"]
        text = chat.invoke(f"Answer the question briefly, from the passage.\n\nPassage: {document}\n\n{question}")
        print(question)
        for name, found in (("from the reader's cache:", answer), ("from the text:", text)):
            seconds = found.response_metadata["seconds_to_first_token"]
            print(f"  {name:24} {found.text.strip()}   (first token after {seconds:.2f} s)")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--receiver", default="qwen2.5-coder-0.5b", help="the writer's model")
    parser.add_argument("--sharer", default="qwen2.5-coder-0.5b", help="the reader's model")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--document", help="a text file")
    parser.add_argument("--question", action="append", help="may be given several times")
    return parser.parse_args()


if __name__ == "__main__":
    main()
