"""What things are called on the page: systems, gains, costs, stages, tasks; and paths without a machine's folders."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable

POOLED = "all questions"

# In the order of the tables; a system that is not here comes after these, by its own name.
SYSTEMS: dict[str, tuple[str, str]] = {
    "receiver": ("receiver", "the receiver alone"),
    "sharer": ("sharer", "the sharer alone, same questions"),
    "matched": ("matched", "the receiver with the sharer's cache of the same question, through the fuser"),
    "deranged": ("deranged", "the same fuser with the sharer's cache of another question"),
    "zero": ("zero", "the same fuser with a sharer cache of zeros"),
    "untrained": ("untrained", "a fuser that was not trained"),
    "text": ("text-to-text", "the sharer answers briefly in words, the receiver reads that and answers"),
    "text_published": (
        "text, published",
        "the same as in the published evaluation: the sharer must not say the answer",
    ),
    "adapter": ("adapter", "the receiver with a small adapter (LoRA) of its own, trained on the same rows; no sharer"),
    "router": ("router", "each question goes to the sharer or the receiver, by its words, before either has run"),
    "abstain": ("abstain", "matched where it seems surer than the receiver alone, else the receiver"),
    "reader": ("reader", "the receiver with the passage in its own prompt"),
    "summary_50": ("summary 50", "the receiver with the sharer's summary of the passage, at most 50 tokens"),
    "summary_100": ("summary 100", "the same, at most 100 tokens"),
    "summary_200": ("summary 200", "the same, at most 200 tokens"),
    "draft": ("draft", "matched, and the sharer is asked too and drafts an answer first, whose cache crosses as well"),
    "draft_deranged": ("draft, deranged", "the same with the passage and draft of another question"),
    "draft_text": ("draft as text", "the receiver reads the sharer's draft in words"),
    "linear": ("linear", "a linear fuser, fitted in closed form"),
    "self": ("self", "a fuser that reads the receiver's own cache, as its own sharer"),
}
# Nothing of the message, or of the training, is in them: they should not win.
CONTROLS = frozenset({"deranged", "zero", "untrained", "draft_deranged"})

GAINS: dict[str, tuple[str, str]] = {
    "G": ("matched", "receiver"),
    "P": ("matched", "deranged"),
    "S": ("matched", "sharer"),
    "T": ("matched", "text"),
    "A": ("matched", "adapter"),
    "Z": ("matched", "zero"),
    "D": ("deranged", "receiver"),
}

# The letter of matched's gain over a system.
LETTERS = {other: letter for letter, (system, other) in GAINS.items() if system == "matched"}

# Each gain in plain words.
READING = (
    ("G", "matched - receiver", "what the fuser brings over the receiver alone."),
    (
        "P",
        "matched - deranged",
        "how much of G is the content of the message. Deranged: the same fuser with the sharer's cache of another "
        "question. At zero, nothing that the sharer read in this one has crossed.",
    ),
    ("D", "deranged - receiver", "what of G comes with any message, right or wrong. It should be at zero."),
    ("S", "matched - sharer", "what the pair has over the sharer alone. Below zero, ask the sharer, if you can."),
    ("T", "matched - text-to-text", "what the cache carries over words. Below zero, let the sharer write instead."),
    ("A", "matched - adapter", "what the pair has over training the receiver alone. Below zero, no sharer is needed."),
)

# What is counted of written answers: a title, and what it says.
WRITTEN: dict[str, tuple[str, str]] = {
    "exact": (
        "Exact answers",
        "But for case, articles and punctuation; where a number is asked, the last one named. Other answers that stand "
        "in a longer sentence do not count.",
    ),
    "holds": (
        "Answers that hold a reference",
        "Its words in a row, in an answer of any length; of numbers, any that is named. This favours who writes much, "
        "as exact answers and F1 favour who writes little.",
    ),
}

COSTS: dict[str, str] = {
    "seconds": "seconds",
    "first_token": "first token, s",
    "tokens": "tokens",
    "bytes": "bytes",
    "memory": "memory",
}
# Parts of the seconds, in the order in which they pass.
STAGES: dict[str, str] = {
    "sharer_prefill": "sharer reads",
    "sharer_decode": "sharer writes",
    "receiver_prefill": "receiver reads",
    "fuse": "fusing",
    "decode": "answer",
}

_PHRASES = {
    "receiver": "The receiver alone",
    "sharer": "The sharer alone",
    "zero": "A message of zeros",
    "untrained": "An untrained fuser",
    "text": "Text-to-text",
    "text_published": "Text-to-text with the published request",
    "adapter": "An adapter of the receiver, without a sharer,",
    "router": "Sending each question to one of the two models",
    "abstain": "Leaving the fused cache out where it seems unsure",
    "reader": "The receiver that reads the passage",
    "summary_50": "A summary of 50 tokens",
    "summary_100": "A summary of 100 tokens",
    "summary_200": "A summary of 200 tokens",
    "draft": "A draft by the sharer",
    "draft_text": "A draft by the sharer, read as text,",
    "linear": "A linear fuser",
    "self": "The receiver as its own sharer",
}

_TASKS = {
    "arc_challenge": "ARC-Challenge",
    "arc_easy": "ARC-Easy",
    "ceval": "C-Eval",
    "gsm8k": "GSM8K",
    "hotpotqa": "HotpotQA",
    "mmlu": "MMLU",
    "mmlu_redux": "MMLU-Redux",
    "openbookqa": "OpenBookQA",
    "squad": "SQuAD",
}


def in_order(names: Iterable[str], known: Iterable[str]) -> list[str]:
    """Names in the known order, the unknown ones after them by the alphabet."""
    rank = {name: position for position, name in enumerate(known)}
    return sorted(set(names), key=lambda name: (rank.get(name, len(rank)), name))


def system_title(name: str) -> str:
    """A system's name on the page."""
    return SYSTEMS[name][0] if name in SYSTEMS else name


def listed_titles(names: Iterable[str]) -> str:
    """Systems in the known order, with commas."""
    return ", ".join(system_title(name) for name in in_order(names, SYSTEMS))


def system_phrase(name: str) -> str:
    """A system at the beginning of a sentence."""
    return _PHRASES.get(name, system_title(name))


def task_titles(sources: Iterable[str]) -> dict[str, str]:
    """Short titles of data files, as long as these tell them apart."""
    short = {source: task_title(source) for source in sources}
    titles = list(short.values())
    return {source: title if titles.count(title) == 1 else source for source, title in short.items()}


def task_title(source: str) -> str:
    """``arc_easy/test.jsonl (8 options)`` as ``ARC-Easy (8 options)``; other names nearly as they are."""
    match = re.fullmatch(r"(?P<path>.+?)(\.jsonl?)(?P<how> \(.*\))?", source, flags=re.DOTALL)
    if match is None:
        return relative(source)
    *folders, name = re.split(r"[/\\]", relative(match["path"], 2))
    folder = folders[-1] if folders else ""
    how = match["how"] or ""
    if name == "test" and folder:
        return _TASKS.get(folder, folder) + how
    if folder in _TASKS:
        return f"{_TASKS[folder]} {name}{how}"
    return _TASKS.get(name, f"{folder}/{name}" if folder else name) + how


def relative(path: str, parts: int = 1) -> str:
    """A path that starts at a machine's root or home by its last names only; others as they are."""
    if not re.match(r"[/~]|[A-Za-z]:[/\\]", path):
        return path
    inside = re.sub(r"^(~[^/\\]*|/root|/home/[^/]+|/Users/[^/]+|[A-Za-z]:[/\\]Users[/\\][^/\\]+)(?=[/\\]|$)", "", path)
    names = [name for name in re.split(r"[/\\]", inside) if name and not re.fullmatch(r"[A-Za-z]:", name)]
    return "/".join(names[-parts:]) or "home"


def portable_command(command: str) -> str:
    """A command without the folders of the machine that it ran on."""
    try:
        words = shlex.split(command)
    except ValueError:
        words = command.split()
    return shlex.join(_portable(word) for word in words)


def _portable(word: str) -> str:
    option, equals, value = word.rpartition("=")
    short = relative(value, 2)
    return option + equals + (value if short == value else f".../{short}")
