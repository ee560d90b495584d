"""Accuracy of a fuser on multiple-choice test questions, with the controls that a claim needs.

The prediction is the letter with the highest next-token logit after "The answer is". Systems: receiver alone, sharer
alone (same prompt, its own template), and the receiver with the matched sharer cache, another question's (deranged),
and with zeros. Intervals are 95 %, from a paired bootstrap over questions.

    python benchmarks/multiple_choice.py FUSER --data-dir DATA openbookqa/test.jsonl --limit 100 --out result.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.progress import track
from rich.table import Table

import c2c
from c2c import C2CModel
from c2c.files import write_json
from c2c.prompting import RenderOptions
from c2c.training.config import DataSource
from c2c.training.examples import Example, build_examples
from c2c.training.rows import load_rows
from c2c.training.step import FuserTraining
from c2c.training.store import PrefillStore

MESSAGES = {"receiver": "none", "matched": "matched", "deranged": "deranged", "zero": "zero"}
SYSTEMS = ["receiver", "sharer", "matched", "deranged", "zero"]
err = Console(stderr=True)


def main() -> None:
    """Evaluate, print a table, write JSON."""
    arguments = _arguments()
    model = C2CModel.from_pretrained(arguments.fuser)
    store_dir = Path(arguments.store_dir) if arguments.store_dir else None
    stores = [
        PrefillStore(model.receiver, range(model.receiver.geometry.layers), folder=store_dir, batch=4),
        PrefillStore(model.sharers[0], model.fusers[0].config.source_layers, folder=store_dir, batch=4),
    ]
    training = FuserTraining(model, *stores).eval()
    results = {}
    for path in arguments.files:
        rows, _ = load_rows([DataSource(path, limit=arguments.limit)], Path(arguments.data_dir), arguments.seed)
        examples, dropped = build_examples(model, rows, 1024, 16)
        right = evaluate(training, examples, path)
        results[path] = summarise(right, arguments.seed) | {"dropped": dict(dropped)}
    everything = {
        "fuser": arguments.fuser,
        "receiver": model.receiver.identity.to_dict(),
        "sharer": model.sharers[0].identity.to_dict(),
        "seed": arguments.seed,
        "limit": arguments.limit,
        "command": " ".join(["python", *sys.argv]),
        "versions": {"c2c": c2c.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "results": results,
    }
    if arguments.out:
        write_json(Path(arguments.out), everything)
    _show(results)


@torch.no_grad()
def evaluate(training: FuserTraining, examples: Sequence[Example], title: str) -> dict[str, list[int]]:
    """Right (1) or wrong (0) for each question and system."""
    right: dict[str, list[int]] = {system: [] for system in SYSTEMS}
    size = 8
    for start in track(range(0, len(examples), size), description=title, console=err):
        part = list(examples[start : start + size])
        counted = len(part)
        batch = training.collate(part if counted > 1 else [*part, examples[0]])
        for system, message in MESSAGES.items():
            logits = training.logits(batch, message, width=1)
            for row, example in enumerate(part):
                best = int(logits[row, 0, example.choice_ids].argmax())
                right[system].append(int(best == example.row.answer))
        right["sharer"] += _sharer_alone(training, part)
    return right


def _sharer_alone(training: FuserTraining, examples: Sequence[Example]) -> list[int]:
    """The sharer's own choice, from the same prompt through its own template."""
    sharer = training._frozen[0].sharers[0]
    options = RenderOptions(answer_prefix=examples[0].row.answer_prefix)
    tokens = sharer.encode([example.row.messages for example in examples], options)
    logits = sharer.next_logits(tokens, sharer.prefill(tokens, tokens.length - 1))
    right = []
    for row, example in enumerate(examples):
        ids = [sharer.tokenizer.encode(choice, add_special_tokens=False)[0] for choice in example.row.choices]
        right.append(int(int(logits[row, ids].argmax()) == example.row.answer))
    return right


def summarise(right: dict[str, list[int]], seed: int) -> dict:
    """Accuracies, G and P in points, with intervals."""
    scores = {system: np.array(values) for system, values in right.items()}
    n = len(scores["matched"])
    draws = np.random.default_rng(seed).integers(0, n, (10_000, n))

    def interval(values: np.ndarray) -> list[float]:
        return [round(100 * float(x), 1) for x in np.percentile(values[draws].mean(1), [2.5, 97.5])]

    summary: dict = {"n": n}
    for system, values in scores.items():
        summary[system] = {"accuracy": round(100 * float(values.mean()), 1), "interval": interval(values)}
    for name, other in (("G", "receiver"), ("P", "deranged")):
        difference = scores["matched"] - scores[other]
        summary[name] = {"points": round(100 * float(difference.mean()), 1), "interval": interval(difference)}
    summary["mended"] = int(((scores["matched"] == 1) & (scores["receiver"] == 0)).sum())
    summary["spoiled"] = int(((scores["matched"] == 0) & (scores["receiver"] == 1)).sum())
    summary["right"] = right
    return summary


def _show(results: dict) -> None:
    table = Table("task", "n", *SYSTEMS, "G", "P")
    for path, summary in results.items():
        row = [path, str(summary["n"])]
        row += [f"{summary[system]['accuracy']:.1f}" for system in SYSTEMS]
        row += [f"{summary[x]['points']:+.1f} {summary[x]['interval']}" for x in ("G", "P")]
        table.add_row(*row)
    Console().print(table)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fuser", help="folder of the fuser")
    parser.add_argument("files", nargs="+", help="JSONL files, relative to --data-dir")
    parser.add_argument("--data-dir", default=".")
    parser.add_argument("--limit", type=int, help="questions per file, drawn with the seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--store-dir", help="folder of a prefill store")
    parser.add_argument("--out", help="where to write the result as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    main()
