"""Blocks, command lines and links of the documentation, and a folder of tiny models to run them in."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import httpx
import torch
import typer
import yaml
from transformers import AddedToken, AutoConfig, AutoModelForCausalLM

from c2c import C2CModel
from c2c.cli import app
from tiny import FIXTURES, build, open_fusers, tokenizer

ROOT = Path(__file__).parent.parent
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    *(
        path.relative_to(ROOT).as_posix()
        for folder in ("docs", "zoo/*")
        for path in sorted(ROOT.glob(f"{folder}/*.md"))
    ),
]
COMMAND = typer.main.get_command(app)
_BLOCK = re.compile(r"^```([\w-]*)[^\n]*\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^#{1,6} +(.+?)[ \t]*$", re.MULTILINE)
_LINK = re.compile(r"\]\(([^)\s]+)\)|<(?:img|a)\b[^>]*?\b(?:src|href)=\"([^\"]+)\"")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[Block]:
    """The blocks of a page, in order."""
    text = read(page)
    return [Block(page, text.count("\n", 0, m.start()) + 1, m[1], m[2]) for m in _BLOCK.finditer(text)]


def prose(page: str) -> str:
    """A page without its blocks."""
    return _BLOCK.sub("", read(page))


def inline_code(page: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(page))


def anchors(page: str) -> set[str]:
    """Targets of links: headings whose names a code host and the site agree on, and ``<a id>`` marks."""
    found, seen = set(re.findall(r'<a id="([^"]+)"></a>', prose(page))), set()
    for heading in _HEADING.findall(prose(page)):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        host = re.sub(r"[^\w\s-]", "", words.lower()).strip().replace(" ", "-")
        if "--" not in host and host not in seen:  # the site joins dashes; a second one of a name gets a number
            found.add(host)
        seen.add(host)
    return found


def links(page: str) -> list[str]:
    """Targets of the links and pictures of a page, those on other hosts left out."""
    found = [match[1] or match[2] for match in _LINK.finditer(re.sub(r"`[^`\n]*`", "", prose(page)))]
    return [target for target in found if not re.match(r"(https?|mailto):", target)]


def lines(text: str) -> list[list[str]]:
    """The commands of a shell block as lists of words, comments left out; a pipe begins a new one."""
    found: list[list[str]] = []
    waiting = ""
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        waiting += line + "\n"
        lexer = shlex.shlex(waiting, posix=True, punctuation_chars=";&|<>")
        lexer.whitespace_split = True
        try:
            words = list(lexer)
        except ValueError:  # a quotation that goes on in the next line
            continue
        waiting = ""
        found.append([])
        for word in words:
            if word and set(word) <= set(";&|"):
                found.append([])
            else:
                found[-1].append(word)
    assert not waiting, f"not a command: {waiting!r}"
    return [words for words in found if words]


def arguments(words: list[str]) -> list[str] | None:
    """Arguments of ``c2c`` in a command line, redirections left out; None if that runs something else."""
    words = [word for word in words if not re.fullmatch(r"[A-Z][A-Z0-9_]*=.*", word)]
    if words[:1] in (["torchrun"], ["accelerate"]) or words[1:2] == ["-m"]:
        words = words[words.index("-m") + 1 :]
    if not words or Path(words[0]).name != "c2c":
        return None
    end = next((index for index, word in enumerate(words) if word in ("<", ">", ">>")), None)
    return words[1:end]


def problem(words: list[str], partly: bool = False) -> str | None:
    """What is wrong with the arguments of ``c2c``; nothing is run. With ``partly`` some may be missing."""
    command, rest = COMMAND, list(words)
    while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
        if rest[0] not in command.commands:
            return f"no such command: {rest[0]}"
        command, rest = command.commands[rest[0]], rest[1:]
    if hasattr(command, "commands"):  # options of a group do something at once, such as to install completion
        known = {name for parameter in command.params for name in parameter.opts} | {"--help"}
        return next((f"no such option: {word}" for word in rest if word not in known), None)
    try:
        with redirect_stdout(io.StringIO()):  # a page of help
            command.make_context(command.name, rest)
    except Exception as error:  # typer has a click of its own, whose errors can't be imported by name
        kind = type(error).__name__
        if kind in ("Exit", "NoArgsIsHelpError") or (partly and kind in ("MissingParameter", "BadOptionUsage")):
            return None
        return error.format_message()
    return None


@contextmanager
def server(*words: str, ready: str):
    """Run a command of ``c2c`` that serves, in a process of its own; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "c2c", *words, "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        until = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < until:
            try:
                if httpx.get(f"http://127.0.0.1:{port}{ready}").status_code < 500:
                    break
            except httpx.TransportError:
                time.sleep(0.2)
        else:
            process.kill()
            raise AssertionError(f"{' '.join(command)} does not serve: {process.communicate()[1][-2000:]}")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.communicate()


_SMALL = {"limit": 4, "calibration": 4, "batch_size": 4, "epochs": 1, "timed": 1, "warmup_steps": 2}
_SMALL |= {"max_new_tokens": 8, "message_tokens": 8}


def shrink_config(source: Path, target: Path) -> None:
    """Write a configuration with a few rows of each source and the same keys."""
    data = yaml.safe_load(source.read_text(encoding="utf-8"))
    for entry in (
        entry for name in ("train", "dev", "data") for entry in data.get(name, []) if isinstance(entry, dict)
    ):
        entry["limit"] = min(entry.get("limit", 4), 4)
        entry.pop("skip", None)
    data |= {name: min(data[name], most) for name, most in _SMALL.items() if name in data}
    if "eval_steps" in data:
        data["eval_steps"] = 100
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")


def rows(name: str) -> list[dict]:
    """Six rows with the keys of every kind; the same question in two files would be a leak of the test data."""
    words = ["stone", "lamp", "door", "river", "key", "map"]
    return [
        {
            "id": str(i),
            "context": f"The {word} is in room {i}.",
            "question": f"Which word is number {i}? ({name if '/' in name else 'here'})",
            "choices": [f"{colour} {word}" for colour in ("red", "blue", "old", "new")],
            "answer": i % 4,
            "instruction": f"Say {i} ({name}).",
            "input": "",
            "output": f"It is {i}.",
        }
        for i, word in enumerate(words)
    ]


def make_workspace(home: Path) -> Path:
    """Make a folder like a clone in which somebody has worked, with tiny models under the names that the pages use.

    Returns:
        The clone, ``home/clone``; the models lie in ``home/cache``.
    """
    clone, models = home / "clone", home / "cache" / "models"
    _write_models(models)
    _write_published(clone)
    (clone / "tests").symlink_to(ROOT / "tests")  # its numbers of the published code are only read
    for name in ("docs/results", "results"):
        shutil.copytree(ROOT / name, clone / name)
    for name in ("README.md", "docs/results.md"):
        shutil.copy(ROOT / name, clone / name)
    for source in sorted((ROOT / "configs").rglob("*.yaml")):
        shrink_config(source, clone / source.relative_to(ROOT))
    sources = [*PAGES, *(str(p) for g in ("configs/**/*.yaml", "src/c2c/evaluation/**/*.py") for p in ROOT.glob(g))]
    for name in {name for page in sources for name in re.findall(r"(?<![\w/.-])(?!runs)\w[\w/-]*\.jsonl", read(page))}:
        for file in {name.removeprefix("DATA/"), f"data/{name.removeprefix('DATA/').removeprefix('data/')}"}:
            (clone / file).parent.mkdir(parents=True, exist_ok=True)
            (clone / file).write_text("".join(json.dumps(row) + "\n" for row in rows(file)), encoding="utf-8")
    (clone / "page.txt").write_text("The key to the boat house hangs behind the clock.")
    for config in sorted((ROOT / "zoo").glob("*/config.json")):
        shipped = json.loads(config.read_text(encoding="utf-8"))
        names, family = [shipped[role]["name"] for role in ("receiver", "sharer")], shipped["model_type"]
        _write_fuser(clone / "zoo" / config.parent.name, models, *names, family.removeprefix("c2c_fuser_"))
    _write_adapters(clone / "zoo" / "adapters", models)
    _write_fuser(clone / "runs" / "private" / "best", models, "smollm2-135m", "qwen2.5-coder-0.5b", "memory")
    shipped = "smollm2-135m_from_qwen2.5-coder-1.5b"
    links = {"DATA": "data", "zoo/NAME": f"zoo/{shipped}", "FUSER": f"zoo/{shipped}"}
    links |= {"CHECKPOINT": "qwen3_0.6b+qwen2.5_0.5b_Fuser", "MEMORY_FUSER": "runs/private/best"}
    for name, seed in (("seed_0", 0), ("seed_1", 1), ("seed_2", 2), ("eval_0.5b", 0), ("eval_1.5b", 1)):
        links[f"runs/{name}"] = f"results/{shipped}/seed_{seed}"
    for name, target in links.items():  # inside the folder, so that a copy of the folder keeps them
        (clone / name).symlink_to(os.path.relpath(target, Path(name).parent))
    return clone


def _write_adapters(folder: Path, models: Path) -> None:
    """Write LoRA adapters of a tiny model under the names of those that ship."""
    import peft

    for config in sorted((ROOT / "zoo" / "adapters").glob("*/adapter_config.json")):
        shipped = json.loads(config.read_text(encoding="utf-8"))["base_model_name_or_path"]
        model = AutoModelForCausalLM.from_pretrained(models / shipped)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers 5 for something by its old name
            lora = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["k_proj", "v_proj"]))
        lora.peft_config["default"].base_model_name_or_path = shipped
        lora.save_pretrained(folder / config.parent.name)


def _write_models(folder: Path) -> None:
    models = {
        "smollm2-135m": ("llama", "chatml"),
        "qwen2.5-coder-0.5b": ("qwen2", "llama3"),
        "qwen2.5-coder-1.5b": ("qwen2", "llama3"),
        "gemma3-270m": ("qwen3", "chatml"),  # a tiny one of its own family has a window of 16 tokens
    }
    for seed, (alias, (family, words)) in enumerate(models.items()):
        model = build(family, seed)
        model.config.max_position_embeddings = 4096  # questions are long in the letters of a small tokenizer
        model.save_pretrained(folder / alias)
        spelling = tokenizer(words)  # spells " A" to " J" with a token each, as those of real models do
        spelling.add_tokens([AddedToken(f" {letter}", normalized=False) for letter in "ABCDEFGHIJ"])
        spelling.save_pretrained(folder / alias)
        (folder / alias / "c2c_source.json").write_text("{}")


def _write_published(clone: Path) -> None:
    """Write the published pair of the fixtures, and the hub ids that stand for it; these need a tokenizer."""
    names = {"receiver": "Qwen/Qwen3-0.6B", "sharer": "Qwen/Qwen2.5-0.5B-Instruct"}
    for role, name in names.items():
        config = AutoConfig.from_pretrained(FIXTURES / "pair_a" / role)
        config.vocab_size = 512
        AutoModelForCausalLM.from_config(config).save_pretrained(clone / name)
        tokenizer("chatml").save_pretrained(clone / name)
    checkpoint = clone / "qwen3_0.6b+qwen2.5_0.5b_Fuser"
    shutil.copytree(FIXTURES / "pair_a" / "checkpoint", checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())
    config["model"] |= {"base_model": names["receiver"], "teacher_model": names["sharer"]}
    (checkpoint / "config.json").write_text(json.dumps(config))


def _write_fuser(folder: Path, models: Path, receiver: str, sharer: str, family: str) -> None:
    """Write a fuser with random weights between two models, which says that it is trained."""
    model = C2CModel.from_models(str(models / receiver), str(models / sharer), fuser=family)
    fuser = open_fusers(model, 0.3).fusers[0]
    if family == "memory":
        torch.nn.init.normal_(fuser.weight, std=0.3, generator=torch.Generator().manual_seed(4))
    fuser.config.training = {"config": {"train": [{"kind": "multiple_choice", "form": "letter"}]}}
    for role, alias in (("receiver", receiver), ("sharer", sharer)):
        setattr(fuser.config, role, getattr(fuser.config, role) | {"name": alias})
    fuser.save_pretrained(folder)
