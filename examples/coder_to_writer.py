"""The Coder reads the skeleton of a page, the Writer puts a text into the right element, having never seen the page.

The same through text: the Coder describes the page in words, and the Writer reads that. Training never asked for
these elements.

    c2c pull smollm2-135m qwen2.5-coder-0.5b
    python examples/coder_to_writer.py
    python examples/coder_to_writer.py --rows 50 --seed 7
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import ClassVar

from c2c import C2CModel
from c2c.data.synthetic import skeleton
from c2c.messages import Conversation
from c2c.systems import SystemOptions, make_system
from c2c.systems.text_to_text import TextToText

FUSER = Path(__file__).parent.parent / "zoo" / "memory_smollm2-135m_from_qwen2.5-coder-0.5b"


class PageInWords(TextToText):
    """Text-to-text in which the sharer describes a page."""

    name: ClassVar[str] = "page_in_words"
    title: ClassVar[str] = "page in words"

    def requests(self, batch: Sequence[Conversation], passages: Sequence[str] | None) -> list[Conversation]:
        """Return the sharer's prompts, one for each page."""
        request = "Describe this page: for every element its tag, id, class and what it is for."
        return [[{"role": "user", "content": f"{request}\n\n{page}"}] for page in passages or ()]


def main() -> None:
    """Write into pages: from the sharer's cache, from its description, and without either."""
    arguments = _arguments()
    model = C2CModel.from_pretrained(arguments.fuser, receiver=arguments.receiver, sharer=arguments.sharer)
    systems = {
        "cache": make_system("c2c", model),
        "text": PageInWords(model, SystemOptions(message_tokens=128)),
        "alone": make_system("receiver", model),
    }
    right: Counter[str] = Counter()
    seconds: Counter[str] = Counter()
    rows = list(islice(skeleton("test", arguments.seed), arguments.rows))
    for index, row in enumerate(rows):
        if index < 3:
            print(f"\n{row['context']}\n\n{row['question']}")
        for name, system in systems.items():
            result = system.generate(row["question"], row["context"], max_new_tokens=48, do_sample=False)
            right[name] += result.text.strip() == row["answer"]
            seconds[name] += result.seconds_total
            if index < 3:
                print(f"  {name:6} {result.text.strip()!r}  ({result.seconds_total:.1f} s)")
    print()
    for name in systems:
        share, mean = 100 * right[name] / len(rows), seconds[name] / len(rows)
        print(f"{name:6} {share:3.0f} % exact of {len(rows)}, {mean:.1f} s each")


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
