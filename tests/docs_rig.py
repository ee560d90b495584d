"""What the tests of the documentation need: its blocks and command lines, and a folder of tiny models."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import typer
import yaml

from c2c.cli import app

ROOT = Path(__file__).parent.parent
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")),
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "zoo").glob("*/README.md")),
]
_BLOCK = re.compile(r"^```([\w-]*)[^\n]*\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"`([^`\n]+)`")
COMMAND = typer.main.get_command(app)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: str) -> list[Block]:
    """The blocks of a page, in order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [Block(page, text.count("\n", 0, m.start()) + 1, m[1], m[2]) for m in _BLOCK.finditer(text)]


def spans(page: str) -> list[str]:
    """The inline code of a page, blocks left out."""
    return _SPAN.findall(_BLOCK.sub("", (ROOT / page).read_text(encoding="utf-8")))


_TOKEN = re.compile(
    r"(?P<space>(?:[ \t]|\\\n)+)|(?P<comment>(?<![^\s])\#[^\n]*)|(?P<end>[\n;&|]+)|(?P<redirect>[<>]+)"
    r"|'(?P<single>[^']*)'|\"(?P<double>[^\"]*)\"|(?P<inner>\$\((?:'[^']*'|[^)'])*\))|(?P<plain>\\.|[^\s;&|<>'\"])"
)


def lines(text: str) -> list[list[str]]:
    """The commands of a shell block as lists of words, comments left out; a pipe begins a new one.

    A redirection is a word of its own, and what stands in ``$(...)`` is kept as it is.
    """
    found: list[list[str]] = [[]]
    word: str | None = None
    end = 0
    for token in _TOKEN.finditer(text + "\n"):
        assert token.start() == end, f"not understood: {text[end:]!r}"
        end = token.end()
        kind = token.lastgroup
        if kind in ("single", "double", "inner", "plain"):
            word = (word or "") + token[kind]
            continue
        if word is not None:
            found[-1].append(word)
            word = None
        if kind == "redirect":
            found[-1].append(token[0])
        elif kind == "end":
            found.append([])
    return [words for words in found if words]


def arguments(words: list[str]) -> list[str] | None:
    """What ``c2c`` is given in a command line, redirections left out; None if that runs something else."""
    words = [word for word in words if not re.fullmatch(r"[A-Z][A-Z0-9_]*=.*", word)]
    if words[:1] == ["command:"]:  # of a generated page
        words = words[1:]
    if "-m" in words and words[words.index("-m") + 1 :][:1] == ["c2c"]:
        words = words[words.index("-m") + 1 :]
    if not words or words[0].rpartition("/")[2] != "c2c":
        return None
    for index, word in enumerate(words):
        if set(word) <= set("<>"):
            return words[1:index]
    return words[1:]


def problem(words: list[str], partly: bool = False) -> str | None:
    """What is wrong with the arguments of ``c2c``; nothing is run. With ``partly`` some may be missing."""
    command, rest = COMMAND, list(words)
    try:
        with redirect_stdout(io.StringIO()):  # a page of help
            while hasattr(command, "commands"):
                if not rest or rest[0].startswith("-"):
                    command.make_context(command.name, [*rest, "--help"])
                if rest[0] not in command.commands:
                    return f"no such command: {rest[0]}"
                command, rest = command.commands[rest[0]], rest[1:]
            command.make_context(command.name, rest)
    except Exception as error:  # typer brings a click of its own along
        name = type(error).__name__
        if name == "Exit" or (partly and name in ("MissingParameter", "BadOptionUsage")):
            return None
        if not hasattr(error, "format_message"):
            raise
        return error.format_message()
    return None


def shrink_config(source: Path, target: Path) -> None:
    """A configuration with a few rows of each source and the same keys."""
    data = yaml.safe_load(source.read_text(encoding="utf-8"))
    for name in ("train", "dev", "data"):
        for entry in data.get(name, []):
            if isinstance(entry, dict):
                entry["limit"] = min(entry.get("limit", 4), 4)
                entry.pop("skip", None)
    for name, most in {
        "limit": 4,
        "calibration": 4,
        "batch_size": 4,
        "epochs": 1,
        "timed": 1,
        "warmup_steps": 2,
        "max_new_tokens": 8,
        "message_tokens": 8,
    }.items():
        if name in data:
            data[name] = min(data[name], most)
    if "eval_steps" in data:
        data["eval_steps"] = 100
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")


QUESTIONS = [
    {"id": str(index), "question": f"Which word is number {index}?", "choices": choices, "answer": index % 4}
    for index, choices in enumerate(
        [
            ["red stone", "blue lamp", "old door", "new river"],
            ["a cat", "a dog", "a bird", "a fish"],
            ["north", "east", "south", "west"],
            ["one", "two", "three", "four"],
            ["iron", "copper", "silver", "gold"],
            ["sand", "clay", "peat", "chalk"],
        ]
    )
]
PASSAGES = [
    {"id": str(index), "context": f"The {thing} is in room {index}.", "question": f"Where is the {thing}?"}
    | {"answer": f"room {index}"}
    for index, thing in enumerate(("key", "lamp", "map", "hat", "coat", "book"))
]
TASKS = [{"id": str(i), "instruction": f"Say {i}.", "input": "", "output": f"It is {i}."} for i in range(6)]
SUMS = [{"id": str(i), "question": f"What is {i} + 1?", "answer": f"{i} + 1 = {i + 1}\n#### {i + 1}"} for i in range(6)]


def write_rows(path: Path, rows: list[dict]) -> None:
    """A JSONL file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


class Workspace:
    """A folder like a clone in which somebody has worked: tiny random models under the names that the pages use."""

    def __init__(self, home: Path) -> None:
        self.home, self.cache = home / "clone", home / "cache"
        self.home.mkdir(parents=True)
        self._models()
        self._repository()
        self._data()
        self._fusers()

    def copy(self, home: Path) -> Workspace:
        """One for a single test, which may change its files; the models are shared, no command writes to them."""
        new = Workspace.__new__(Workspace)
        new.home, new.cache = home / "clone", self.cache
        shutil.copytree(self.home, new.home, symlinks=True)
        return new

    def _link(self, name: str, target: str) -> None:
        """A link inside the folder, which a copy of the folder keeps."""
        (self.home / name).symlink_to(os.path.relpath(target, Path(name).parent))

    def _models(self) -> None:
        from transformers import AddedToken

        from tiny import build, tokenizer

        def save(folder: Path, family: str, words: str, seed: int) -> None:
            folder.mkdir(parents=True)
            model = build(family, seed)
            model.config.max_position_embeddings = 4096  # questions are long in the letters of a small tokenizer
            model.save_pretrained(folder)
            made = tokenizer(words)  # spells " A" to " J" with a token each, as those of real models do
            made.add_tokens([AddedToken(f" {letter}", normalized=False) for letter in "ABCDEFGHIJ"])
            made.save_pretrained(folder)

        for seed, (alias, family, words) in enumerate(
            [
                ("smollm2-135m", "llama", "chatml"),
                ("qwen2.5-coder-0.5b", "qwen2", "llama3"),
                ("qwen2.5-coder-1.5b", "qwen2", "llama3"),
                ("gemma3-270m", "qwen3", "chatml"),  # a tiny one of its own family has a window of 16 tokens
            ]
        ):
            save(self.cache / "models" / alias, family, words, seed)
            (self.cache / "models" / alias / "c2c_source.json").write_text("{}")
        self._published()

    def _published(self) -> None:
        """The tiny published pair of the fixtures, and the hub ids that stand for it; these need a tokenizer."""
        from transformers import AutoConfig, AutoModelForCausalLM

        from tiny import FIXTURES, tokenizer

        for name, role, words in (
            ("Qwen/Qwen3-0.6B", "receiver", "chatml"),
            ("Qwen/Qwen2.5-0.5B-Instruct", "sharer", "chatml"),
        ):
            config = AutoConfig.from_pretrained(FIXTURES / "pair_a" / role)
            config.vocab_size = 512
            AutoModelForCausalLM.from_config(config).save_pretrained(self.home / name)
            tokenizer(words).save_pretrained(self.home / name)
        checkpoint = self.home / "qwen3_0.6b+qwen2.5_0.5b_Fuser"
        shutil.copytree(FIXTURES / "pair_a" / "checkpoint", checkpoint)
        text = json.loads((checkpoint / "config.json").read_text())
        text["model"] |= {"base_model": "Qwen/Qwen3-0.6B", "teacher_model": "Qwen/Qwen2.5-0.5B-Instruct"}
        (checkpoint / "config.json").write_text(json.dumps(text))
        self._link("CHECKPOINT", checkpoint.name)

    def _repository(self) -> None:
        (self.home / "tests").symlink_to(ROOT / "tests")  # its numbers of the published code are only read
        (self.home / "docs").mkdir()
        shutil.copy(ROOT / "README.md", self.home)
        shutil.copy(ROOT / "docs" / "results.md", self.home / "docs")
        shutil.copytree(ROOT / "docs" / "results", self.home / "docs" / "results")
        shutil.copytree(ROOT / "results", self.home / "results")
        for source in sorted((ROOT / "configs").rglob("*.yaml")):
            shrink_config(source, self.home / source.relative_to(ROOT))

    def _data(self) -> None:
        for name in ("questions.jsonl", "a.jsonl", "b.jsonl", "q.jsonl", "test.jsonl"):
            write_rows(self.home / name, QUESTIONS)
        write_rows(self.home / "squad.jsonl", PASSAGES[:2])
        write_rows(self.home / "answers.jsonl", SUMS)
        data = self.home / "data"
        for task in ("openbookqa", "arc_easy", "arc_challenge"):
            for part in ("train", "dev", "test"):
                rows = [row | {"question": f"{row['question']} ({task} {part})"} for row in QUESTIONS]
                write_rows(data / task / f"{part}.jsonl", rows)
        for name in ("mmlu/aux_train_norace", "mmlu/test", "mmlu_redux/test_ok", "mmlu_redux/test", "ceval/val"):
            rows = [row | {"question": f"{row['question']} ({name})"} for row in QUESTIONS]
            write_rows(data / f"{name}.jsonl", rows)
        write_rows(data / "t0_mixture" / "train.jsonl", TASKS)
        for part in ("train", "test"):
            rows = [row | {"question": f"{row['question']} ({part})"} for row in SUMS]
            write_rows(data / "gsm8k" / f"{part}.jsonl", rows)
        for part in ("train", "valid", "test"):
            rows = [row | {"question": f"{row['question']} ({part})"} for row in PASSAGES]
            write_rows(data / "squad" / f"grouped_{part}.jsonl", rows)
        for name in ("hotpotqa_evidence", "hotpotqa_distractor", "nq_oracle"):
            write_rows(data / name / "test.jsonl", PASSAGES)
        self._link("DATA", data.name)
        (self.home / "page.txt").write_text("The key to the boat house hangs behind the clock.")
        results = "results/smollm2-135m_from_qwen2.5-coder-1.5b"
        (self.home / "runs").mkdir()
        for seed in (0, 1, 2):
            self._link(f"runs/seed_{seed}", f"{results}/seed_{seed}")
        for size, seed in (("0.5b", 0), ("1.5b", 1)):
            self._link(f"runs/eval_{size}", f"{results}/seed_{seed}")

    def _fusers(self) -> None:
        for config in sorted((ROOT / "zoo").glob("*/config.json")):
            shipped = json.loads(config.read_text(encoding="utf-8"))
            family = shipped["model_type"].removeprefix("c2c_fuser_")
            self.fuser(f"zoo/{config.parent.name}", shipped["receiver"]["name"], shipped["sharer"]["name"], family)
        for name in ("zoo/NAME", "FUSER"):
            self._link(name, "zoo/smollm2-135m_from_qwen2.5-coder-1.5b")
        self.fuser("runs/private/best", "smollm2-135m", "qwen2.5-coder-0.5b", "memory")
        self._link("MEMORY_FUSER", "runs/private/best")

    def fuser(self, name: str, receiver: str, sharer: str, family: str = "bottleneck") -> Path:
        """A fuser with random weights between two models of the cache, which says that it is trained."""
        import torch

        from c2c import C2CModel
        from tiny import open_fusers

        models = self.cache / "models"
        model = C2CModel.from_models(str(models / receiver), str(models / sharer), fuser=family)
        fuser = open_fusers(model, 0.3).fusers[0]
        if family == "memory":
            torch.nn.init.normal_(fuser.weight, std=0.3, generator=torch.Generator().manual_seed(4))
        fuser.config.training = {"config": {"train": [{"kind": "multiple_choice", "form": "letter"}]}}
        for role, alias in (("receiver", receiver), ("sharer", sharer)):
            setattr(fuser.config, role, getattr(fuser.config, role) | {"name": alias})
        (self.home / name).parent.mkdir(parents=True, exist_ok=True)
        fuser.save_pretrained(self.home / name)
        return self.home / name
