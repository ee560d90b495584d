"""The Coder reads the skeleton of a page, the Writer puts a text into the right element, having never seen the page.

The same through text: the Coder describes the page in words, and the Writer reads that. Training never asked for
these elements.

    c2c pull smollm2-135m qwen2.5-coder-0.5b
    python examples/coder_to_writer.py
    python examples/coder_to_writer.py --rows 50 --seed 7
"""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from c2c import C2CModel, GenerationResult
from c2c.data.synthetic.skeleton import skeleton
from c2c.systems.text_to_text import with_passage

FUSER = Path(__file__).parent.parent / "zoo" / "memory_smollm2-135m_from_qwen2.5-coder-0.5b"
REQUEST = "Describe this page: for every element its tag, id, class and what it is for.\n\n"
ANSWER: dict[str, Any] = {"max_new_tokens": 48, "do_sample": False}


def main() -> None:
    """Write into pages, with what was handed over, from a description, and knowing nothing."""
    arguments = _arguments()
    model = C2CModel.from_pretrained(arguments.fuser, receiver=arguments.receiver, sharer=arguments.sharer)
    right: Counter[str] = Counter()
    seconds: defaultdict[str, float] = defaultdict(float)
    rows = list(islice(skeleton("test", arguments.seed), arguments.rows))
    for index, row in enumerate(rows):
        if index < 3:
            print(f"\n{row['context']}\n\n{row['question']}")
        for way, result in _ways(model, row):
            right[way] += result.text.strip() == row["answer"]
            seconds[way] += result.seconds_total
            if index < 3:
                print(f"  {way:6} {result.text.strip()!r}  ({result.seconds_total:.1f} s)")
    print()
    for way, count in seconds.items():
        print(f"{way:6} {100 * right[way] / len(rows):3.0f} % exact of {len(rows)}, {count / len(rows):.1f} s each")


def _ways(model: C2CModel, row: dict[str, Any]) -> Iterator[tuple[str, GenerationResult]]:
    page, task = row["context"], [{"role": "user", "content": row["question"]}]
    yield "cache", model.generate(task, sharer_messages=page, **ANSWER)
    message = model.sharers[0].answer(REQUEST + page, max_new_tokens=128, do_sample=False)
    told = model.receiver.answer(with_passage(task, message.text), **ANSWER)
    told.seconds_total += message.seconds_total
    yield "text", told
    yield "alone", model.receiver.answer(task, **ANSWER)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fuser", default=str(FUSER), help="a memory fuser")
    parser.add_argument("--receiver", help="in place of the receiver that the fuser names")
    parser.add_argument("--sharer", help="in place of the sharer that the fuser names")
    parser.add_argument("--rows", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
