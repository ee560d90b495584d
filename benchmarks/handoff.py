"""One document, many questions: what handing over a cache costs, against sending the text. Ratios within one run.

The sharer reads a document once; the receiver answers questions that it gets one by one. Beside it: the sharer reading
anew for every question, the receiver reading the text itself, and a summary that the sharer writes once. Every round
times all ways one after the other; medians are over rounds. With an untrained fuser the entries are random: times and
bytes are the same, answers mean nothing.

    c2c pull smollm2-135m qwen2.5-coder-0.5b
    python benchmarks/handoff.py
    python benchmarks/handoff.py --fuser zoo/NAME --document report.txt --json
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from c2c import C2CModel
from c2c.handoff import Handoff
from c2c.prompting import with_passage
from c2c.systems.text_to_text import summary_request
from c2c.utils import versions

DOCUMENT = Path(__file__).parent.parent / "docs" / "concepts.md"
PRECISIONS = ("float32", "bfloat16", "int8", "float8")


def main() -> None:
    """Run and print."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    model = _model(arguments)
    text = Path(arguments.document).read_text(encoding="utf-8")[: arguments.characters]
    result = measure(model, text, arguments.questions, arguments.new_tokens, arguments.rounds)
    result |= {"threads": arguments.threads, "versions": versions(), "trained": model.trained}
    Console(stderr=arguments.json).print(table(result))
    if arguments.json:
        print(json.dumps(result))


def measure(model: C2CModel, text: str, questions: int, new_tokens: int, rounds: int) -> dict:
    """Seconds of each way for all questions, and bytes per token of the document.

    Args:
        model: a pair with a memory fuser.
        text: the document.
        questions: how many are asked.
        new_tokens: per answer.
        rounds: how often each way is timed.
    """
    ways = _ways(model, text, questions, new_tokens)
    seconds = {name: [] for name in ways}
    for way in ways.values():  # once to warm up
        way()
    for _ in range(rounds):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ours = medians["handoff, read once"]
    return {
        "questions": questions,
        "new_tokens": new_tokens,
        "rounds": rounds,
        "seconds": medians,
        "over_handoff": {name: value / ours for name, value in medians.items()},
        **sizes(model, text),
    }


def sizes(model: C2CModel, text: str) -> dict:
    """Bytes per document token of what crosses, for each precision, and what saving and loading takes."""
    handoff = model.sharers[0].read(text)
    count = len(handoff.ids)
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for precision in PRECISIONS:
            packed = handoff.to(precision)
            path = Path(folder) / f"{precision}.safetensors"
            began = time.perf_counter()
            packed.save(path)
            saved = time.perf_counter()
            Handoff.load(path)
            loaded = time.perf_counter()
            rows[precision] = {
                "bytes_per_token": packed.nbytes / count,
                "save_seconds": saved - began,
                "load_seconds": loaded - saved,
            }
    projected = model.receiver.geometry
    entry = 2 * projected.layers * projected.width * torch.finfo(model.receiver.dtype).bits // 8
    return {
        "document_tokens": count,
        "text_bytes_per_token": len(text.encode()) / count,
        "handoff": rows,
        "projected_bytes_per_token": entry,
    }


def table(result: dict) -> Table:
    """The result for people."""
    rows = Table(title=f"{result['questions']} questions on {result['document_tokens']} tokens")
    for title in ("way", "seconds", "x handoff"):
        rows.add_column(title)
    for name, value in result["seconds"].items():
        rows.add_row(name, f"{value:.2f}", f"{result['over_handoff'][name]:.2f}")
    rows.add_section()
    rows.add_row("text, bytes per token", f"{result['text_bytes_per_token']:.1f}", "")
    for precision, size in result["handoff"].items():
        rows.add_row(f"handoff in {precision}, bytes per token", f"{size['bytes_per_token']:,.0f}", "")
    return rows


def _ways(model: C2CModel, text: str, questions: int, new_tokens: int) -> dict[str, Callable[[], None]]:
    receiver, sharer = model.receiver, model.sharers[0]
    asked = [[{"role": "user", "content": f"Question: what is point {i} of it?"}] for i in range(questions)]
    kwargs = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}

    def read_once() -> None:
        handoff = sharer.read(text)
        for messages in asked:
            model.generate(messages, sharer_messages=handoff, **kwargs)

    def read_anew() -> None:
        for messages in asked:
            model.generate(messages, sharer_messages=text, **kwargs)

    def text_in_prompt() -> None:
        for messages in asked:
            receiver.answer(with_passage(messages, text), **kwargs)

    def summary() -> None:
        written = sharer.answer(summary_request(text, 100), max_new_tokens=100, do_sample=False).text
        for messages in asked:
            receiver.answer(with_passage(messages, written), **kwargs)

    return {
        "handoff, read once": read_once,
        "handoff, read for each": read_anew,
        "text in the receiver's prompt": text_in_prompt,
        "summary of 100 tokens, written once": summary,
    }


def _model(arguments: argparse.Namespace) -> C2CModel:
    if arguments.fuser:
        return C2CModel.from_pretrained(arguments.fuser)
    model = C2CModel.from_models(arguments.receiver, arguments.sharer, fuser="memory")
    fuser = model.fusers[0]
    torch.manual_seed(0)
    torch.nn.init.normal_(fuser.weight, std=0.05)
    fuser.config.training = {"config": "random, for times alone"}  # an untrained fuser would hand over nothing
    return model


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fuser", help="a memory fuser; random entries if not given")
    parser.add_argument("--receiver", default="smollm2-135m")
    parser.add_argument("--sharer", default="qwen2.5-coder-0.5b")
    parser.add_argument("--document", default=str(DOCUMENT))
    parser.add_argument("--characters", type=int, default=2500, help="at most so much of the document")
    parser.add_argument("--questions", type=int, default=10)
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    return parser.parse_args()


if __name__ == "__main__":
    main()
