"""A random key that only the sharer has read is asked of the receiver: does content cross, exactly?

Keys are drawn so that they never occurred in training. With another row's handoff the answer is right by luck only.

    c2c pull smollm2-135m qwen2.5-coder-0.5b
    python examples/relay.py
    python examples/relay.py --rows 100 --seed 7
"""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path

from c2c import C2CModel
from c2c.data.config import DataSource
from c2c.data.formats import private_question
from c2c.data.synthetic import relay
from c2c.evaluation.metrics import exact
from c2c.systems import make_system

FUSER = Path(__file__).parent.parent / "zoo" / "memory_smollm2-135m_from_qwen2.5-coder-0.5b"


def main() -> None:
    """Ask for every key, with the right cache (matched) and with another row's (deranged)."""
    arguments = _arguments()
    model = C2CModel.from_pretrained(arguments.fuser, receiver=arguments.receiver, sharer=arguments.sharer)
    source = DataSource(synthetic="relay_test")
    rows = [private_question(row, source) for row in islice(relay("test", arguments.seed), arguments.rows)]
    questions, contexts = [row.messages for row in rows], [row.sharer_messages for row in rows]
    for name in ("matched", "deranged"):
        answers = make_system(name, model).generate(questions, contexts, max_new_tokens=16, do_sample=False)
        scores = [exact(answer.text, row.references) for row, answer in zip(rows, answers, strict=True)]
        for row, answer in list(zip(rows, answers, strict=True))[:5]:
            print(f"{row.question}  {answer.text.strip()!r}  (right: {row.references[0]!r})")
        print(f"{name}: {100 * sum(scores) / len(rows):.0f} % exact of {len(rows)}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fuser", default=str(FUSER), help="a memory fuser")
    parser.add_argument("--receiver", help="in place of the receiver that the fuser names")
    parser.add_argument("--sharer", help="in place of the sharer that the fuser names")
    parser.add_argument("--rows", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
