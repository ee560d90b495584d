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
from tqdm import tqdm

from c2c import C2CModel
from c2c.evaluation.metrics import contains, f1
from c2c.handoff import Handoff
from c2c.language_model import Receiver
from c2c.recompute import LayerRange
from c2c.sharer import Sharer
from c2c.systems.alone import Reader, ReceiverAlone
from c2c.utils import versions, write_json
from c2c.variants import compare

ROOT = Path(__file__).parent.parent
FILES = {"dev": "grouped_valid.jsonl", "test": "grouped_test.jsonl"}
PAIRS = ("json:base", "base:json", "json:extract", "extract:summarise", "summarise:base", "summarise:extract")
_TOKENS = 16
_BATCH = 20
_TIMED = 4  # rows of each batch that are answered alone, for the time to the first token


def main() -> None:
    """Run and print."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    if not arguments.table:
        rows = _rows(Path(arguments.data) / "squad" / FILES[arguments.split], arguments.n)
        base = Receiver.from_pretrained(arguments.base, dtype="bfloat16")
        for pair in arguments.pairs:
            path = Path(arguments.out) / f"{arguments.split}_{_file_name(pair)}.json"
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
        Per way the share of answers that hold a reference's words, F1, the share equal to those from text, the share
        in JSON, and the median time to the first token once the sharer has read; the distance on the probe; answers.
    """
    theirs, ours = _role(Sharer, base, sharer, folder), _role(Receiver, base, receiver, folder)
    distance = compare(ours, theirs, ranges=ranges)
    ways = _ways(ours, theirs, ranges)
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    progress = tqdm(range(0, len(rows), _BATCH), f"{sharer} to {receiver}")
    for start in progress:
        part = rows[start : start + _BATCH]
        others = [rows[_other(rows, index)] for index in range(start, start + len(part))]
        for name, results in _answers(ways, part, others, _TOKENS):
            for row, result in zip(part, results, strict=True):
                references = row.get("answers") or [row["answer"]]
                scores = {"right": contains(result.text, references), "f1": f1(result.text, references)}
                answers[name].append({"text": result.text} | scores)
        for name, results in _answers(ways, part[:_TIMED], others[:_TIMED], 1, alone=True):
            seconds[name] += [result.seconds_to_first_token for result in results]
    names = {"sharer": sharer, "receiver": receiver, "n": len(rows), "bytes_per_token": _bytes_per_token(ours)}
    ways_found = {name: _summary(found, answers["text"], seconds[name]) for name, found in answers.items()}
    return names | {"ways": ways_found, "distance": distance.to_dict(), "answers": answers}


def _role(kind: type[Any], base: Receiver, name: str, folder: Path) -> Any:
    """Return the base model in a role under an adapter; ``json*3`` is one of three times its strength."""
    adapter, _, factor = name.partition("*")
    model = kind.from_pretrained(base, adapter=None if adapter == "base" else folder / adapter)
    for module in model.model.modules():
        if factor and hasattr(module, "lora_A"):
            module.scale_layer(float(factor))
    return model


def _ways(ours: Receiver, theirs: Sharer, ranges: list[LayerRange]) -> dict[str, Any]:
    options: dict[str, Any] = {"copy": {}} | {f"recompute {a}-{b}": {"recompute": (a, b)} for a, b in ranges}
    copies = {
        name: C2CModel.from_models(ours, theirs, fuser="copy", fuser_options={"variant": True, **more})
        for name, more in options.items()
    }
    return {
        "alone": ReceiverAlone(copies["copy"]),
        "text": Reader(copies["copy"]),
        **copies,
        "deranged": copies["copy"],
    }


def _answers(
    ways: dict[str, Any], rows: list[dict], others: list[dict], tokens: int, alone: bool = False
) -> Iterator[tuple[str, list[Any]]]:
    """Yield the answers of each way, as one batch or each row alone; the sharer has read the documents before."""
    sharer, read = ways["copy"].sharers[0], dict[tuple[str, int], Handoff]()
    arguments = {"do_sample": False, "max_new_tokens": tokens}
    for name, system in ways.items():
        questions = [row["question"] for row in rows]
        given: list[Any] = [row["context"] for row in (others if name == "deranged" else rows)]
        if isinstance(system, C2CModel):
            first = (system.fusers[0].config.recompute or [0])[0]
            for text in given:
                if (text, first) not in read:
                    read[text, first] = sharer.read(text, before="", keep_hidden=first)
            given = [read[text, first] for text in given]
        pairs = zip(questions, given, strict=True) if alone else [(questions, given)]
        results = [system.generate(asked, sharer_messages=one, **arguments) for asked, one in pairs]
        yield name, results if alone else results[0]


def _summary(answers: list[dict], text: list[dict], seconds: list[float]) -> dict[str, float]:
    """Return percentages, and the median time to the first token."""
    words = {
        "right": 100 * statistics.fmean(answer["right"] for answer in answers),
        "f1": 100 * statistics.fmean(answer["f1"] for answer in answers),
        "as_text": 100 * statistics.fmean(a["text"] == t["text"] for a, t in zip(answers, text, strict=True)),
        "json": 100 * statistics.fmean(_is_json(answer["text"]) for answer in answers),
        "first_token": statistics.median(seconds),
    }
    return {key: round(value, 4) for key, value in words.items()}


def _bytes_per_token(model: Receiver) -> int:
    return 2 * model.geometry.layers * model.geometry.width * model.dtype.itemsize


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def table(folder: Path, split: str) -> str:
    """Return what is stored as a table in Markdown."""
    lines = [
        "| sharer → receiver | way | right % | F1 | as from text % | JSON % | first token s | probe, nats |",
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
                f"{way['as_text']:.0f} | {way['json']:.0f} | {way['first_token']:.2f} | {nats} |"
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


def _file_name(pair: str) -> str:
    return pair.replace(":", "_to_").replace("*", "x")


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
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "results" / "variants"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
