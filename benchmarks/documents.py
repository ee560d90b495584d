"""Several documents, each read once and copied: right answers and time to first token, against reading their text.

The same model stands on both sides. Each question has its own passage among passages of other questions, in a drawn
order. ``text`` reads all of them for each question; ``copy R`` puts their handoffs one after the other, and reads the
first R tokens of each moved document itself. These were read behind another passage (``among=True``), or, ``apart R``,
by themselves. ``deranged`` is the last copy with the true passage left out. A run that was stopped goes on from its
journal. SQuAD's grouped_valid is for choosing, grouped_test for reporting.

    c2c pull qwen2.5-coder-0.5b
    python benchmarks/documents.py --data DATA/squad/grouped_test.jsonl --limit 60 --output runs/documents
    python benchmarks/documents.py --data DATA/squad/grouped_valid.jsonl --refresh 0 4 8 16 32 --counts 4
    python benchmarks/documents.py --data DATA/squad/grouped_test.jsonl --passages 4 --counts 1   # one long document
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy.stats import bootstrap

from c2c import C2CModel, Handoff
from c2c.data.config import DataSource
from c2c.data.formats import Row
from c2c.data.sources import load_rows
from c2c.evaluation.metrics import contains
from c2c.generation import GenerationResult
from c2c.systems import make_system
from c2c.utils import versions


class Documents:
    """Answer questions about several documents, by text and by copy.

    Args:
        model: alias or folder of the model on both sides.
        refresh: tokens that the receiver reads itself of each moved document; one copy for each number.
        apart: the same, for documents that were read by themselves.
        reread: of four documents or more, so many are computed whole.
        dtype: of the weights.
        new_tokens: longest answer.
    """

    def __init__(
        self, model: str, refresh: list[int], apart: list[int], reread: int, dtype: str, new_tokens: int
    ) -> None:
        first = C2CModel.from_models(model, model, fuser="copy", dtype=dtype)
        pair = (first.receiver, first.sharers[0])
        self.copies = {
            (among, number): C2CModel.from_models(
                *pair, fuser="copy", fuser_options={"refresh": number, "reread": reread}
            )
            for among, numbers in ((False, apart), (True, refresh))
            for number in numbers
        }
        self.reader, self.sharer = make_system("reader", first), first.sharers[0]
        self.kwargs = {"max_new_tokens": new_tokens, "do_sample": False}
        self.handoffs: dict[tuple[bool, str], Handoff] = {}

    def read(self, passage: str, among: bool) -> Handoff:
        """Read a passage, once for each way."""
        if (among, passage) not in self.handoffs:
            self.handoffs[among, passage] = self.sharer.read(passage, before="", among=among)
        return self.handoffs[among, passage]

    def answer(self, question: str, passages: list[str], own: int) -> Iterator[tuple[str, GenerationResult, int]]:
        """Yield the name of a system, its answer, and the bytes that it is handed."""
        text = self.reader.generate(question, passages, **self.kwargs)
        yield "text", text, sum(len(passage.encode()) for passage in passages)
        for (among, number), model in self.copies.items():
            handoffs = [self.read(passage, among) for passage in passages]
            result = model.generate(question, sharer_messages=handoffs, **self.kwargs)
            yield f"{'copy' if among else 'apart'} {number}", result, sum(handoff.nbytes for handoff in handoffs)
        if len(passages) > 1:
            others = [handoff for index, handoff in enumerate(handoffs) if index != own]
            yield "deranged", model.generate(question, sharer_messages=others, **self.kwargs), 0


def main() -> None:
    """Run and print."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    rows, _ = load_rows(
        [DataSource(path=arguments.data, kind="private_question", limit=arguments.limit)], ".", arguments.seed
    )
    folder = Path(arguments.output)
    folder.mkdir(parents=True, exist_ok=True)
    journal = folder / "answers.jsonl"
    done = [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []
    known = {(one["id"], one["documents"]) for one in done}
    system = Documents(
        arguments.model, arguments.refresh, arguments.apart, arguments.reread, arguments.dtype, arguments.new_tokens
    )
    jobs = [(row, count) for row in rows for count in arguments.counts if (row.id, count) not in known]
    with journal.open("a") as file:
        for row, count in track(jobs, "answering", console=Console(stderr=True)):
            for record in _records(system, row, rows, (count, arguments.passages), arguments.seed):
                done.append(record)
                file.write(json.dumps(record) + "\n")
            file.flush()
    result = summary(done, arguments.seed) | {
        "model": arguments.model,
        "data": Path(arguments.data).name,
        "n": len(rows),
        "reread": arguments.reread,
        "passages_per_document": arguments.passages,
        "seed": arguments.seed,
        "dtype": arguments.dtype,
        "threads": arguments.threads,
        "versions": versions(),
    }
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    Console(stderr=arguments.json).print(table(result))
    if arguments.json:
        print(json.dumps(result))


def _records(
    system: Documents, row: Row, rows: list[Row], sizes: tuple[int, int], seed: int
) -> Iterator[dict[str, Any]]:
    """Answer one question with so many documents of so many passages; order and other passages are drawn by its id."""
    count, each = sizes
    draw, own = random.Random(f"{seed} {row.id} {count}"), _passage(row)
    others = sorted({_passage(other) for other in rows} - {own})
    passages = [own, *draw.sample(others, count * each - 1)]
    draw.shuffle(passages)
    place = passages.index(own) // each
    documents = ["\n".join(passages[first : first + each]) for first in range(0, len(passages), each)]
    for name, result, crossed in system.answer(row.question, documents, place):
        yield {
            "id": row.id,
            "documents": count,
            "place": place,
            "system": name,
            "right": contains(result.text, row.references),
            "first_token": result.seconds_to_first_token,
            "bytes": crossed,
            "text": result.text,
        }


def _passage(row: Row) -> str:
    return str(row.sharer_messages[-1]["content"]) if row.sharer_messages else ""


def summary(records: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    """Right answers in percent with a bootstrap interval, and medians, per number of documents and system."""
    table: dict[str, dict[str, Any]] = {}
    for count in sorted({one["documents"] for one in records}):
        mine = [one for one in records if one["documents"] == count]
        texts = {one["id"]: one for one in mine if one["system"] == "text"}
        for name in dict.fromkeys(one["system"] for one in mine):
            own = [one for one in mine if one["system"] == name]
            gains = [one["right"] - texts[one["id"]]["right"] for one in own]
            table.setdefault(str(count), {})[name] = {
                "right": 100 * statistics.mean(one["right"] for one in own),
                "minus_text_ci95": _interval(gains, seed),
                "first_token": statistics.median(one["first_token"] for one in own),
                "text_over_this": statistics.median(
                    texts[one["id"]]["first_token"] / one["first_token"] for one in own
                ),
                "bytes": statistics.mean(one["bytes"] for one in own),
            }
    return {"documents": table}


def _interval(gains: list[float], seed: int) -> list[float]:
    if len(set(gains)) < 2:
        return [100 * gains[0]] * 2
    found = bootstrap(
        (gains,), statistics.mean, vectorized=False, n_resamples=2000, random_state=seed, method="percentile"
    )
    return [round(100 * found.confidence_interval.low, 1), round(100 * found.confidence_interval.high, 1)]


def table(result: dict[str, Any]) -> Table:
    """The result for people."""
    shown = Table(title=f"{result['model']}, {result['data']}, n {result['n']}")
    for title in ("documents", "system", "right, %", "minus text", "first token, s", "x faster", "MB"):
        shown.add_column(title)
    for count, systems in result["documents"].items():
        for name, one in systems.items():
            shown.add_row(
                count,
                name,
                f"{one['right']:.1f}",
                str(one["minus_text_ci95"]),
                f"{one['first_token']:.2f}",
                f"{one['text_over_this']:.1f}",
                f"{one['bytes'] / 1e6:.2f}",
            )
        shown.add_section()
    return shown


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="JSONL with question, context and answers")
    parser.add_argument("--model", default="qwen2.5-coder-0.5b", help="on both sides")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--limit", type=int, default=60, help="questions, drawn with the seed")
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 4, 8], help="numbers of documents")
    parser.add_argument("--passages", type=int, default=1, help="in each document: 4 of SQuAD have some 600 tokens")
    parser.add_argument("--refresh", type=int, nargs="+", default=[16])
    parser.add_argument("--reread", type=int, default=1, help="documents that are computed whole, of 4 or more")
    parser.add_argument("--apart", type=int, nargs="*", default=[0])
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", default="runs/documents", help="folder of the journal and the result")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    return parser.parse_args()


if __name__ == "__main__":
    main()
