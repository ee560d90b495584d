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
from c2c.data.synthetic.relay import relay
from c2c.evaluation.text_scores import exact

FUSER = Path(__file__).parent.parent / "zoo" / "memory_smollm2-135m_from_qwen2.5-coder-0.5b"


def main() -> None:
    """Ask, with the right handoff and with another row's."""
    arguments = _arguments()
    model = C2CModel.from_pretrained(arguments.fuser, receiver=arguments.receiver, sharer=arguments.sharer)
    source = DataSource(synthetic="relay_test")
    rows = [private_question(row, source) for row in islice(relay("test", arguments.seed), arguments.rows)]
    handoffs = [model.sharers[0].read(row.sharer_messages) for row in rows]
    right = {"matched": 0.0, "deranged": 0.0}
    for index, row in enumerate(rows):
        for name, shift in (("matched", 0), ("deranged", 1)):
            given = handoffs[(index + shift) % len(rows)]
            answer = model.generate(row.messages, sharer_messages=given, max_new_tokens=16, do_sample=False).text
            right[name] += exact(answer, row.references)
            if index < 5:
                print(f"{name:9} {row.question}  {answer.strip()!r}  (right: {row.references[0]!r})")
    for name, count in right.items():
        print(f"{name}: {100 * count / len(rows):.0f} % exact of {len(rows)}")


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
