"""One model reads a page, the other answers questions on it without ever seeing it.

Each question is answered three times: from the page alone, which was read once before any question was known; from the
page and a draft, where the sharer reads the question too and hands over the cache of its answer; and without a message.

c2c pull smollm2-135m qwen2.5-coder-0.5b
python examples/read_and_answer.py
python examples/read_and_answer.py --page notes.txt --question "Who wrote this?"
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from c2c import C2CModel
from c2c.handoff import Handoff
from c2c.prompting import with_passage

FUSER = Path(__file__).parent.parent / "zoo" / "memory_smollm2-135m_from_qwen2.5-coder-0.5b"
PAGE = (
    "The lighthouse of Grey Point was built in 1884 by the engineer Mary Ellison. Its lamp burned whale oil until "
    "1911. Then a dynamo was installed. The keeper's house beside it is painted green, and is now a museum of the "
    "herring trade. The museum opens on Sundays."
)
QUESTIONS = (
    "Who built the lighthouse of Grey Point?",
    "When was a dynamo installed?",
    "What colour is the keeper's house?",
    "When does the museum open?",
)


def main() -> None:
    """Read once, ask several times, with and without what was handed over."""
    arguments = _arguments()
    model = C2CModel.from_pretrained(arguments.fuser, receiver=arguments.receiver, sharer=arguments.sharer)
    page = Path(arguments.page).read_text(encoding="utf-8") if arguments.page else PAGE
    began = time.perf_counter()
    handoff = model.sharers[0].read(page).to("bfloat16")
    print(f"{model.sharers[0].name} read {len(handoff.ids)} tokens in {time.perf_counter() - began:.2f} s;")
    print(f"it hands over {handoff.nbytes / 1e6:.1f} MB, which {model.receiver.name} reads through the fuser.\n")
    draft: Handoff | None = None
    for question in arguments.question or QUESTIONS:
        read = model.generate(question, sharer_messages=handoff, max_new_tokens=24, do_sample=False)
        began = time.perf_counter()
        request = with_passage([{"role": "user", "content": f"Question: {question}"}], page)
        draft = model.sharers[0].read(request, draft_tokens=arguments.draft, reuse=draft)  # the page is not read again
        drafted = model.generate(question, sharer_messages=draft, max_new_tokens=24, do_sample=False)
        seconds = time.perf_counter() - began
        alone = model.receiver.answer(question, max_new_tokens=24, do_sample=False)
        print(question)
        print(f"  with the handoff:  {read.text.strip()}   ({read.seconds_total:.2f} s)")
        print(f"  and with a draft:  {drafted.text.strip()}   ({seconds:.2f} s)")
        print(f"  without a message: {alone.text.strip()}   ({alone.seconds_total:.2f} s)")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fuser", default=str(FUSER), help="a memory fuser")
    parser.add_argument("--receiver", help="in place of the receiver that the fuser names")
    parser.add_argument("--sharer", help="in place of the sharer that the fuser names")
    parser.add_argument("--page", help="a text file")
    parser.add_argument("--question", action="append", help="may be given several times")
    parser.add_argument("--draft", type=int, default=32, help="tokens that the sharer may draft")
    return parser.parse_args()


if __name__ == "__main__":
    main()
