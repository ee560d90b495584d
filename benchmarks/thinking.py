"""What thinking steps carry, with controls: the same model on both sides, entries copied.

The sharer reads a passage (``alone``), or the passage and the question (``asked``), and hands over the entries with N
thinking steps behind them, by every realignment. Beside it: no steps, a filler token in place of thoughts, zeros in
place of their entries, the thoughts of another row, another row's passage and thoughts, a draft, the receiver that
reads the text, and the receiver alone. Every row is answered by all, greedily; fewer steps are the first of more.

    python benchmarks/thinking.py qwen2.5-coder-0.5b --rows 20 --data-dir DATA --output benchmarks/results/thinking
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from scipy.stats import binomtest

from c2c import C2CModel
from c2c.data.config import DataSource
from c2c.data.formats import Row
from c2c.data.prompts import passage_with_question
from c2c.data.sources import load_rows
from c2c.evaluation.metrics import contains
from c2c.handoff import Handoff, QuantizedTensor
from c2c.language_model import Receiver
from c2c.prompting import with_passage
from c2c.sharer import Sharer
from c2c.utils import versions, write_json

TASKS = {
    "facts": {"synthetic": "facts_test"},
    "relay": {"synthetic": "relay_test"},
    "halves": {"synthetic": "halves_test"},
    "squad": {"path": "squad/grouped_test.jsonl"},
}
REALIGNMENTS = ("none", "norm", "soft", "filler")  # ridge is norm where the head is tied
ASKED = ("norm", "soft", "filler")


def main() -> None:
    """Measure task by task, and write a file for each."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    receiver = Receiver.from_pretrained(arguments.model, dtype="bfloat16")
    model = C2CModel.from_models(receiver, Sharer(receiver.model, receiver.tokenizer, receiver.name), fuser="copy")
    for task in arguments.tasks:
        source = DataSource(kind="private_question", limit=arguments.rows, **TASKS[task])
        rows, _ = load_rows([source], arguments.data_dir, 0)
        result = measure(model, rows, arguments.steps, arguments.new_tokens)
        facts = {"model": receiver.name, "task": task, "dtype": "bfloat16", "versions": versions()}
        write_json(Path(arguments.output) / f"{arguments.model}_{task}.json", facts | vars(arguments) | result)
        for name, system in result["systems"].items():
            print(task, name, system["right"], system["ci95"], system["seconds_read"], flush=True)


@torch.no_grad()
def measure(model: C2CModel, rows: list[Row], steps: list[int], new_tokens: int) -> dict:
    """Answer all rows in all ways.

    Args:
        model: the same model on both sides, with a copy fuser.
        rows: of private context.
        steps: numbers of thinking steps, ascending.
        new_tokens: per answer.

    Returns:
        For each way the share of right answers with its 95 % interval (Wilson), seconds that the sharer takes for a
        row on top of reading, and every answer.
    """
    handoffs, seconds = _handoffs(model.sharers[0], rows, steps)
    greedy = {"max_new_tokens": new_tokens, "do_sample": False}
    batch = [row.messages for row in rows]
    texts = {name: [r.text for r in model.generate(batch, sharer_messages=h, **greedy)] for name, h in handoffs.items()}
    reading = [with_passage(row.messages, row.sharer_messages[-1]["content"]) for row in rows]
    for name, prompts in (("reader", reading), ("receiver", batch)):
        texts[name] = [result.text for result in model.receiver.answer(prompts, **greedy)]
    return {"n": len(rows), "systems": {name: _score(found, rows, seconds.get(name)) for name, found in texts.items()}}


def _handoffs(sharer: Sharer, rows: list[Row], steps: list[int]) -> tuple[dict[str, list[Handoff]], dict[str, float]]:
    """Return for each way the handoffs of all rows, and the mean seconds of each on top of reading."""
    made: dict[str, list[Handoff]] = {}
    seconds: dict[str, float] = {}

    def add(name: str, read: Callable[[Row, Handoff | None], Handoff], base: str | None = None) -> list[Handoff]:
        began = time.perf_counter()
        made[name] = [read(row, made[base][i] if base else None) for i, row in enumerate(rows)]
        seconds[name] = (time.perf_counter() - began) / len(rows)
        return made[name]

    def asked(row: Row, known: Handoff | None, **how) -> Handoff:
        return sharer.read(passage_with_question(row), reuse=known, **how)

    def alone(row: Row, known: Handoff | None, **how) -> Handoff:
        return sharer.read(row.sharer_messages[-1]["content"], before="", reuse=known, **how)

    for place, read, ways in (("alone", alone, REALIGNMENTS), ("asked", asked, ASKED)):
        add(f"{place}, no steps", read)
        for way in ways:
            most = add(f"{place}, {way} {steps[-1]}", _thinking(read, steps[-1], way), f"{place}, no steps")
            for count in steps[:-1] if way == "soft" else ():
                made[f"{place}, {way} {count}"] = [first_thoughts(one, count) for one in most]
        soft = made[f"{place}, soft {steps[-1]}"]
        others = [*soft[1:], soft[0]]
        made[f"{place}, soft {steps[-1]}, zeros for thoughts"] = [one.zeros_like(one.thoughts) for one in soft]
        made[f"{place}, soft {steps[-1]}, another row's thoughts"] = [
            with_thoughts_of(one, other) for one, other in zip(soft, others, strict=True)
        ]
        made[f"{place}, soft {steps[-1]}, another row's passage and thoughts"] = others
    add("asked, draft 16", lambda row, known: asked(row, known, draft_tokens=16), "asked, no steps")
    return made, seconds


def _thinking(read: Callable[..., Handoff], steps: int, way: str) -> Callable[[Row, Handoff | None], Handoff]:
    return lambda row, known: read(row, known, think=steps, realign=way)


def first_thoughts(handoff: Handoff, steps: int) -> Handoff:
    """Return a handoff with its first thoughts only, which do not depend on the others."""
    length = int(handoff.thoughts[0]) + steps
    layers = [tuple(QuantizedTensor(part.data[:, :, :length]) for part in pair) for pair in handoff.layers]
    return replace(handoff, ids=handoff.ids[:length], kept=handoff.kept[handoff.kept < length], layers=layers)


def with_thoughts_of(handoff: Handoff, other: Handoff) -> Handoff:
    """Return a handoff with the values of another one's thoughts; keys keep their own positions, so they stay."""

    def exchanged(part: QuantizedTensor, theirs: QuantizedTensor) -> QuantizedTensor:
        data = part.data.clone()
        data[:, :, handoff.thoughts] = theirs.data[:, :, other.thoughts]
        return QuantizedTensor(data)

    layers = [(k, exchanged(v, theirs)) for (k, v), (_, theirs) in zip(handoff.layers, other.layers, strict=True)]
    return replace(handoff, layers=layers)


def _score(texts: list[str], rows: list[Row], seconds: float | None) -> dict:
    right = [_right(text, row) for text, row in zip(texts, rows, strict=True)]
    interval = binomtest(sum(right), len(right)).proportion_ci(method="wilson")
    answers = [{"id": row.id, "text": text, "right": ok} for row, text, ok in zip(rows, texts, right, strict=True)]
    return {
        "right": sum(right),
        "ci95": [round(100 * float(bound), 1) for bound in (interval.low, interval.high)],
        "seconds_read": None if seconds is None else round(seconds, 3),
        "answers": answers,
    }


def _right(text: str, row: Row) -> bool:
    """Whether an answer holds a reference; of rows with a half on each side, both parts."""
    if row.known:
        return all(contains(text, [part]) for part in row.references[0].split(", "))
    return bool(contains(text, row.references))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="alias, folder or hub id")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--rows", type=int, default=20, help="of each task")
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 20])
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--output", default="benchmarks/results/thinking")
    return parser.parse_args()


if __name__ == "__main__":
    main()
