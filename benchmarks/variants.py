"""What crosses between LoRA adapters of one model without training: copies, copies with layers recomputed, text.

The sharer reads a passage under one adapter; the receiver answers a question under another. Both stand around the same
weights in memory. Beside the copies: the receiver that reads the text itself, another row's passage (deranged), and no
passage. A pair is written when it is done, and a killed run goes on.

    c2c pull qwen2.5-coder-0.5b
    python benchmarks/adapters.py --data DIR        # where zoo/adapters is empty
    python benchmarks/variants.py --data DIR --split dev --n 24 --ranges 0-6 0-12 0-18 6-12 12-24
    python benchmarks/variants.py --data DIR
    python benchmarks/variants.py --table           # of what is stored
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from c2c import C2CModel
from c2c.evaluation.metrics import contains, f1
from c2c.handoff import Handoff
from c2c.language_model import Receiver, Sharer
from c2c.recompute import LayerRange
from c2c.systems.alone import Reader
from c2c.utils import versions, write_json
from c2c.variants import compare

ROOT = Path(__file__).parent.parent
FILES = {"dev": "grouped_valid.jsonl", "test": "grouped_test.jsonl"}
PAIRS = ("json:base", "base:json", "json:extract", "extract:summarise", "summarise:base", "summarise:extract")
_GREEDY = {"do_sample": False, "max_new_tokens": 24}


def main() -> None:
    """Run and print."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    if not arguments.table:
        rows = _rows(Path(arguments.data) / "squad" / FILES[arguments.split], arguments.n)
        base = Receiver.from_pretrained(arguments.base, dtype="bfloat16")
        for pair in arguments.pairs:
            path = Path(arguments.out) / f"{arguments.split}_{pair.replace(':', '_to_')}.json"
            if not path.exists():
                result = measure(base, *pair.split(":"), rows, arguments.ranges, Path(arguments.adapters))
                result |= {"split": arguments.split, "threads": arguments.threads, "versions": versions()}
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json(path, result)
    Console(width=200).print(table(Path(arguments.out), arguments.split), markup=False)


def measure(
    base: Receiver, sharer: str, receiver: str, rows: list[dict], ranges: list[LayerRange], folder: Path
) -> dict[str, Any]:
    """Answer all rows in every way.

    Args:
        base: the base model; both roles stand around its weights.
        sharer: adapter that reads, or ``base``.
        receiver: adapter that answers, or ``base``.
        rows: passages, questions and answers.
        ranges: layers ``(first, stop)`` to recompute.
        folder: of the adapters.

    Returns:
        Per way the share of answers that hold a reference's words, F1, the share equal to those from text, the median
        time to the first token and the bytes handed over; the distance on the probe; all answers.
    """
    theirs, ours = (
        kind.from_pretrained(base, adapter=None if name == "base" else folder / name)
        for kind, name in ((Sharer, sharer), (Receiver, receiver))
    )
    distance = compare(ours, theirs, ranges=ranges)
    ways = _ways(ours, theirs, ranges)
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    for index, row in enumerate(track(rows, f"{sharer} to {receiver}", console=Console(stderr=True))):
        for name, result in _answers(ways, row, rows[_other(rows, index)]):
            references = row.get("answers") or [row["answer"]]
            scores = {"right": contains(result.text, references), "f1": f1(result.text, references)}
            report = result.report.sharer_bytes if result.report else 0
            times = {"first_token": round(result.seconds_to_first_token, 4), "bytes": report}
            answers[name].append({"text": result.text} | scores | times)
    return {
        "sharer": sharer,
        "receiver": receiver,
        "n": len(rows),
        "ways": {name: _summary(name, found, answers["text"]) for name, found in answers.items()},
        "distance": distance.to_dict(),
        "answers": answers,
    }


def _ways(ours: Receiver, theirs: Sharer, ranges: list[LayerRange]) -> dict[str, Any]:
    options = {"copy": {}} | {f"recompute {a}-{b}": {"recompute": (a, b)} for a, b in ranges}
    copies = {
        name: C2CModel.from_models(ours, theirs, fuser="copy", fuser_options={"variant": True, **more})
        for name, more in options.items()
    }
    return {"alone": ours, "text": Reader(copies["copy"]), **copies, "deranged": copies["copy"]}


def _answers(ways: dict[str, Any], row: dict, other: dict) -> Iterator[tuple[str, Any]]:
    """Yield the answer of each way; documents are read before, once for all ways that start at one layer."""
    sharer, read = ways["copy"].sharers[0], dict[tuple[str, int], Handoff]()
    for name, system in ways.items():
        if name == "alone":
            yield name, system.answer(row["question"], **_GREEDY)
        elif name == "text":
            yield name, system.generate(row["question"], row["context"], **_GREEDY)
        else:
            text = (other if name == "deranged" else row)["context"]
            first = (system.fusers[0].config.recompute or [0])[0]
            if (text, first) not in read:
                read[text, first] = sharer.read(text, before="", keep_hidden=first)
            yield name, system.generate(row["question"], sharer_messages=read[text, first], **_GREEDY)


def _summary(name: str, answers: list[dict], text: list[dict]) -> dict[str, float]:
    """Return percentages, seconds and bytes; both compared with text on the same rows."""
    words = {
        "right": 100 * statistics.fmean(answer["right"] for answer in answers),
        "f1": 100 * statistics.fmean(answer["f1"] for answer in answers),
        "as_text": 100 * statistics.fmean(a["text"] == t["text"] for a, t in zip(answers, text, strict=True)),
        "json": 100 * statistics.fmean(_is_json(answer["text"]) for answer in answers),
        "first_token": statistics.median(answer["first_token"] for answer in answers),
        "bytes": statistics.median(answer["bytes"] for answer in answers),
    }
    return {key: round(value, 4) for key, value in words.items()}


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def table(folder: Path, split: str) -> str:
    """Return what is stored as a table in Markdown."""
    lines = [
        "| sharer → receiver | way | right % | F1 | as from text % | first token s | KB | probe, nats |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for path in sorted(folder.glob(f"{split}_*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        probe = {"copy": result["distance"]["copy"]["kl"]} | {
            f"recompute {layers}": found["kl"] for layers, found in result["distance"]["recomputed"].items()
        }
        for name, way in result["ways"].items():
            nats = f"{probe[name]:.3f}" if name in probe else ""
            lines.append(
                f"| {result['sharer']} → {result['receiver']} | {name} | {way['right']:.0f} | {way['f1']:.0f} | "
                f"{way['as_text']:.0f} | {way['first_token']:.2f} | {way['bytes'] / 1000:.0f} | {nats} |"
            )
    return "\n".join(lines)


def _rows(path: Path, n: int) -> list[dict]:
    """Return rows with a passage each, spread over the file: neighbours share theirs."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    step = max(1, len(rows) // n)
    return rows[::step][:n]


def _other(rows: list[dict], index: int) -> int:
    """Return the next row with another passage."""
    return next(
        i % len(rows)
        for i in range(index + 1, index + len(rows))
        if rows[i % len(rows)]["context"] != rows[index]["context"]
    )


def _range(text: str) -> LayerRange:
    first, _, stop = text.partition("-")
    return int(first), int(stop)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data", help="folder with squad/")
    parser.add_argument("--base", default="qwen2.5-coder-0.5b")
    parser.add_argument("--adapters", default=str(ROOT / "zoo" / "adapters"))
    parser.add_argument("--pairs", nargs="+", default=PAIRS, metavar="SHARER:RECEIVER")
    parser.add_argument("--split", choices=list(FILES), default="test", help="choose on dev, report on test")
    parser.add_argument("--n", type=int, default=60)
    parser.add_argument("--ranges", nargs="*", type=_range, default=[(0, 6), (0, 12)], metavar="FIRST-STOP")
    parser.add_argument("--out", default=str(ROOT / "results" / "variants"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
