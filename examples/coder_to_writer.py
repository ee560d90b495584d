"""The Coder reads the skeleton of a page, the Writer puts a text into the right element, having never seen the page.

The same through text: the Coder describes the page in words, and the Writer reads that; beside it a Writer that reads
the page itself. By default one model plays both parts, and its cache is handed over as it is; with `--fuser` a trained
memory fuser stands between two models.

    c2c pull qwen2.5-coder-1.5b
    python examples/coder_to_writer.py
    python examples/coder_to_writer.py --rows 50 --seed 7
    python examples/coder_to_writer.py --fuser zoo/memory_smollm2-135m_from_qwen2.5-coder-0.5b
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from typing import Any, ClassVar

from c2c import C2CModel, RenderOptions, connect
from c2c.data.synthetic import skeleton
from c2c.messages import Conversation
from c2c.systems import System, SystemOptions, make_system
from c2c.systems.text_to_text import TextToText

MODEL = "qwen2.5-coder-1.5b"
FORM = (
    "Answer with one line of HTML: the element as it stands in the page, tag, id and class unchanged, with the text "
    "between its tags."
)


class PageInWords(TextToText):
    """Text-to-text in which the sharer describes a page."""

    name: ClassVar[str] = "page_in_words"
    title: ClassVar[str] = "page in words"

    def requests(self, batch: Sequence[Conversation], passages: Sequence[str] | None) -> list[Conversation]:
        """Return the sharer's prompts, one for each page."""
        request = "Describe this page: for every element its tag, id, class and what it is for."
        return [[{"role": "user", "content": f"{request}\n\n{page}"}] for page in passages or ()]


def main() -> None:
    """Write into pages: from the Coder's cache, from its description, from the page itself, and from nothing."""
    arguments = _arguments()
    systems = _systems(arguments)
    right: Counter[str] = Counter()
    seconds: Counter[str] = Counter()
    rows = list(islice(skeleton("test", arguments.seed), arguments.rows))
    for index, row in enumerate(rows):
        request = {"messages": row["question"]} if arguments.fuser else _request(row["question"])
        if index < 3:
            print(f"\n{row['context']}\n\n{row['question']}")
        for name, system in systems.items():
            result = system.generate(sharer_messages=row["context"], max_new_tokens=48, do_sample=False, **request)
            right[name] += result.text.strip() == row["answer"]
            seconds[name] += result.seconds_total
            if index < 3:
                print(f"  {name:6} {result.text.strip()!r}  ({result.seconds_total:.1f} s)")
    print()
    for name in systems:
        share, mean = 100 * right[name] / len(rows), seconds[name] / len(rows)
        print(f"{name:6} {share:3.0f} % exact of {len(rows)}, {mean:.1f} s each")


def _systems(arguments: argparse.Namespace) -> dict[str, System]:
    """Return the ways to answer, by their names."""
    if arguments.fuser:
        models = {"receiver": arguments.receiver, "sharer": arguments.sharer}
        model = C2CModel.from_pretrained(arguments.fuser, **models, dtype=arguments.dtype)
        first = make_system("c2c", model)
    else:
        receiver = arguments.receiver or MODEL
        first = connect(receiver, arguments.sharer or receiver, method="copy", dtype=arguments.dtype or "bfloat16")
        model = first.model
    text = PageInWords(model, SystemOptions(message_tokens=128))
    return {"cache": first, "text": text, "page": make_system("reader", model), "alone": make_system("receiver", model)}


def _request(question: str) -> dict[str, Any]:
    """Ask a model that was not trained for it: say the form of an answer, and begin it with the comment."""
    topic = question.partition(" page for the ")[2].partition(",")[0]
    options = RenderOptions(answer_prefix=f"```html\n<!-- {topic} -->")
    return {"messages": f"{question}\n\n{FORM}", "options": options, "stop_strings": ["\n"]}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fuser", help="a memory fuser; without one both models must be the same")
    parser.add_argument("--receiver", help=f"the Writer; by default the fuser's, or {MODEL}")
    parser.add_argument("--sharer", help="the Coder; by default the fuser's, or the Writer's model")
    parser.add_argument("--dtype", help="by default bfloat16, with a fuser that of the models' files")
    parser.add_argument("--rows", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
