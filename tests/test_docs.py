"""Every block and command of the documentation: Python runs, commands are parsed by the real command line and run.

What does not run stands in a table with the reason; an entry that fits nothing any more is an error too.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

import c2c.systems
from c2c.cli import app
from docs_rig import (
    COMMAND,
    PAGES,
    ROOT,
    Block,
    anchors,
    arguments,
    blocks,
    inline_code,
    lines,
    links,
    make_workspace,
    problem,
    read,
    server,
)
from test_real import use_real_models

SHELL = ("", "bash", "sh", "console")
NOT_SHELL = ("src/c2c/", "RemoteSharer(")  # blocks without a language: a tree of files, an expression to fill in
PLACEHOLDERS = {"COMMAND": "gates", "S": "0", "N": "8", "CONFIG": "config.yaml"}

# commands that are parsed and not run, by what they begin with
NOT_RUN = {
    "c2c pull": "the models lie in the test's cache already: test_pull.py",
    "c2c doctor": "asks the package index: test_doctor.py",
    "c2c demo": "a server that does not end: test_demo.py",
    "c2c serve": "a server that does not end; its requests run here",
    "c2c share": "a server that does not end; its requests run here",
    "c2c lm-eval --fuser zoo/NAME --tasks arc_easy": "fetches a task from the hub: test_lm_eval.py",
    "c2c train config.yaml": "several processes: test_training_processes.py",
}
# programs of the system, of which nothing is checked; those that are checked stand in test_other_programs
PROGRAMS = {"make", "pip", "python", "python3", "curl", "echo"}
PROGRAMS |= {"export", ".", "cd", "cat", "jq", "docker", "kill", "git"}
# statements that hold for the real models only, and are run with these by test_python_with_the_real_models
REAL_ONLY = {
    "docs/concepts.md": [
        "assert report.fused_tokens == 13 and report.prompt_tokens == 38",
        'assert report.skipped_tokens == {"last token, run on the fused cache": 1, '
        '"template before the first message": 24}',
    ],
}
NO_NETWORK = {
    "docs/lm-eval.md": [
        'result = lm_eval.simple_evaluate(model=lm, tasks=["arc_easy"], limit=100, apply_chat_template=True)',
        'print(result["results"], lm.counts)',
    ],
}
runner = CliRunner()


def shell_lines(page: str) -> list[list[str]]:
    """The command lines of a page."""
    shell = [b.text for b in blocks(page) if b.language in SHELL and not b.text.startswith(NOT_SHELL)]
    return [words for text in shell for words in lines(text)]


def filled_in(words: list[str] | None) -> list[str]:
    return [PLACEHOLDERS.get(word, word) for word in words or []]


def commands(page: str) -> list[list[str]]:
    """The arguments of every ``c2c`` in the blocks of a page."""
    return [filled_in(words) for line in shell_lines(page) if (words := arguments(line)) is not None]


def is_run(words: list[str]) -> bool:
    return not " ".join(["c2c", *words]).startswith(tuple(NOT_RUN))


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_of_a_kind_that_is_checked(page):
    parsers = {"python": ast.parse, "json": json.loads, "toml": tomllib.loads, "yaml": yaml.safe_load}
    for block in blocks(page):
        assert block.language in {*SHELL, *parsers, "bibtex", "text"}, str(block)
        parsers.get(block.language, str)(block.text)


@pytest.mark.parametrize("page", PAGES)
def test_commands_parse(page):
    wrong = [f"c2c {' '.join(words)}: {found}" for words in commands(page) if (found := problem(words))]
    for code in inline_code(page):
        words = filled_in(arguments(lines(code)[0]) if code.startswith("c2c ") else None)
        if words and (found := problem(words, partly=True)):
            wrong.append(f"`{code}`: {found}")
    named = {word for words in commands(page) for word in words if word.startswith(("configs/", "zoo/smollm2"))}
    wrong += [f"{word} is not there" for word in named if not (ROOT / word).exists()]
    assert wrong == []


def test_tables_of_this_file_hold_nothing_that_is_gone():
    texts = [" ".join(["c2c", *words]) for page in PAGES for words in commands(page)]
    assert [start for start in NOT_RUN if not any(text.startswith(start) for text in texts)] == []
    for page, statements in (REAL_ONLY | NO_NETWORK).items():
        assert [one for one in statements if one not in read(page)] == []


def test_commands_elsewhere_parse():
    """Examples in --help, comments of configurations, docstrings of examples, the Makefile."""
    texts = {"Makefile": re.sub(r"\$\(BIN\)/|^\t@?", "", read("Makefile"), flags=re.MULTILINE)}
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        texts[str(path)] = "\n".join(re.findall(r"^#   (c2c .*)", path.read_text(), re.MULTILINE))
    for path in sorted((ROOT / "examples").glob("*.py")):
        texts[str(path)] = ast.get_docstring(ast.parse(path.read_text()))
    waiting = list(COMMAND.commands.items())
    while waiting:
        name, command = waiting.pop()
        texts[f"{name} --help"] = command.epilog or ""
        waiting += getattr(command, "commands", {}).items()
    checked, wrong = 0, []
    for where, text in texts.items():
        for line in re.findall(r"^(?:[A-Z0-9_]+=\S+ )?(?:.*\| )?(c2c (?:.|\\\n)*)", text, re.MULTILINE):
            words = filled_in(arguments(lines(line.rstrip("\\").replace("$(FUSER)", "FUSER").replace("...,", ""))[0]))
            checked += 1
            if found := problem(words):
                wrong.append(f"{where}: {line}: {found}")
            wrong += [
                f"{where}: no {word}" for word in words if word.startswith("configs/") and not (ROOT / word).exists()
            ]
    assert wrong == []
    assert checked >= 40


@pytest.mark.parametrize("page", PAGES)
def test_other_programs(page):
    """Targets of make, extras of pip, options of scripts."""
    extras = tomllib.loads(read("pyproject.toml"))["project"]["optional-dependencies"]
    for words in shell_lines(page):
        if arguments(words) is not None:
            continue
        assert words[0] in PROGRAMS, f"{words}: add the program to PROGRAMS"
        if words[0] == "make":
            assert re.search(rf"^{re.escape(words[1])}:", read("Makefile"), re.MULTILINE), words
        elif words[0] == "pip":
            assert {extra for word in words for extra in re.findall(r"\[([\w-]+)\]", word)} <= set(extras), words
        elif words[0].startswith("python") and words[1].endswith(".py"):
            script = read(words[1])
            assert [word for word in words[2:] if word.startswith("--") and f'"{word}"' not in script] == [], words


def test_the_tree_of_contributing_names_files_that_exist():
    tree = next(block.text for block in blocks("CONTRIBUTING.md") if block.text.startswith("src/c2c/"))
    folders: list[str] = []
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        head = re.match(r"(?:[\w./]+(?:\.py|/)(?: +|$))+", line.strip())[0].strip()
        del folders[depth:]
        assert [name for name in head.split() if not (ROOT / "/".join(folders) / name).exists()] == [], line
        folders.append(head.rstrip("/"))


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    wrong = []
    for target in links(page):
        file, _, anchor = target.partition("#")
        there = ((ROOT / page).parent / file).resolve() if file else ROOT / page
        if not there.exists() or ROOT not in (there, *there.parents):
            wrong.append(f"{target}: no such file")
        elif anchor and (there.suffix != ".md" or anchor not in anchors(there.relative_to(ROOT).as_posix())):
            wrong.append(f"{target}: no such heading")
    assert wrong == []


def test_the_site_has_every_page():
    nav = set(re.findall(r"^ +- (?:\w[\w ]*: )?([\w-]+\.md)$", read("mkdocs.yml"), re.MULTILINE))
    there = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert nav == there, "nav of mkdocs.yml, and docs/"
    assert there - {target.partition("#")[0] for target in links("docs/index.md")} == {"index.md"}


def test_tests_that_pages_name_exist():
    tests = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("*.py")}
    known = {
        *tests,
        *(name.removesuffix(".py") for name in tests),
        *re.findall(r"^def (test_\w+)", "\n".join(tests.values()), re.MULTILINE),
    }
    history = {"docs/decisions.md", "docs/log.md"}  # have names of former tests
    pages = "\n".join(read(page) for page in PAGES if page not in history)
    assert set(re.findall(r"`(test_\w+)`", pages)) - known == set()
    assert set(re.findall(r"\btest_\w+\.py\b", pages)) - known == set()


def test_documented_modules_exist():
    page = read("docs/api.md")
    named = re.findall(r"^\| `(c2c[\w.]*)` \|", page, re.MULTILINE)
    assert len(named) >= 30
    assert len(named) == len(set(named))
    for name in named:
        assert importlib.import_module(name).__doc__, name
    exported = re.search(r"^`from c2c import` gives (.+)\.$", page, re.MULTILINE)[1]
    assert sorted(re.findall(r"`(\w+)`", exported)) == sorted(c2c.__all__)


@pytest.mark.slow
def test_the_site_builds_without_warnings(tmp_path):
    for module in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        pytest.importorskip(module)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert 'src="flow.svg"' in (tmp_path / "concepts.html").read_text(encoding="utf-8")
    assert "from_pretrained" in (tmp_path / "api" / "c2c.pretrained.html").read_text(encoding="utf-8")


def test_the_documented_config_loads(tmp_path):
    from c2c.fusers.bottleneck import BottleneckConfig, BottleneckFuser

    first = next(block for block in blocks("docs/formats.md") if block.language == "json")
    (tmp_path / "config.json").write_text(first.text)
    fuser = BottleneckFuser(BottleneckConfig.from_pretrained(tmp_path))
    assert len(fuser.config.fused_layers) == len(fuser.gates()) == 3
    fuser.save_pretrained(tmp_path / "written")
    written = json.loads((tmp_path / "written" / "config.json").read_text())
    assert set(written) == set(json.loads(first.text))


def test_the_documented_training_keys_exist():
    from c2c.training.config import TrainConfig

    block = next(b for b in blocks("docs/training.md") if b.language == "yaml")
    assert set(yaml.safe_load(block.text)) <= {field.name for field in fields(TrainConfig)}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_workspace(tmp_path_factory.mktemp("docs"))


@pytest.fixture
def workspace(made, tmp_path, monkeypatch):
    """The reader's folder, with the tiny models in the cache; no command writes to these."""
    own = tmp_path / "clone"
    shutil.copytree(made, own, symlinks=True)
    monkeypatch.setenv("C2C_CACHE", str(made.parent / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"), prepend=os.pathsep)
    monkeypatch.chdir(own)
    monkeypatch.syspath_prepend(str(own))
    return own


@contextlib.contextmanager
def servers(page: str):
    """Servers that a page takes for granted at its addresses; yields a function that replaces these."""
    needed = {
        "docs/remote.md": {
            "http://127.0.0.1:8650": ("share", "qwen2.5-coder-1.5b", "--rate", "0"),
            "http://127.0.0.1:8651": ("share", "qwen2.5-coder-0.5b", "--rate", "0"),
        },
        "docs/agents.md": {"http://127.0.0.1:8000": ("serve", "MEMORY_FUSER", "--name", "NAME")},
        "docs/serving.md": {"http://127.0.0.1:8000": ("serve", "zoo/NAME", "--name", "pair")},
    }
    with contextlib.ExitStack() as stack:
        started = {
            address: stack.enter_context(server(*words, ready="/health" if words[0] == "serve" else "/"))
            for address, words in needed.get(page, {}).items()
        }

        def replace(text: str) -> str:
            for address, real in started.items():
                text = text.replace(address, real)
            return text

        yield replace


def run_block(block: Block, names: dict, leave_out=(), replace=str) -> None:
    """Run one block, or write the file that it is; where it announces an error, that must come."""
    if match := re.match(r"# file: (\S+)\n", block.text):
        Path(match[1]).write_text(block.text, encoding="utf-8")
        return  # a later block imports it
    text = replace(block.text)
    tree = ast.parse(text, str(block))
    tree.body = [node for node in tree.body if ast.get_source_segment(text, node) not in leave_out]
    ast.increment_lineno(tree, block.line)
    announced = re.search(r"^# WRONG: (\w+Error)", block.text, re.MULTILINE)
    try:
        exec(compile(tree, block.page, "exec"), names)
    except Exception as error:
        if announced is None or type(error).__name__ != announced[1]:
            raise
    else:
        assert announced is None, f"{block}: {announced[1]} did not come"


def run_page(page: str, leave_out=(), replace=str) -> None:
    names: dict = {"__name__": "__main__"}
    for block in blocks(page):
        if block.language == "toml":
            install_entry_points(block.text)
        elif block.language == "python":
            run_block(block, names, leave_out, replace)


def install_entry_points(pyproject: str) -> None:
    """Install the entry points of a package that lies in this folder."""
    c2c.systems.systems.cache_clear()
    groups = tomllib.loads(pyproject)["project"]["entry-points"]
    folder = Path(f"{'_'.join(groups).replace('.', '_')}-0.dist-info")
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {folder.name[:-12]}\nVersion: 0\n")
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in found.items()) for group, found in groups.items()]
    (folder / "entry_points.txt").write_text("".join(lines))


def prepare(page: str) -> None:
    """What a page takes for granted, which another page has made."""
    if page == "docs/training.md":
        from c2c.systems.lora import new_adapter, save_adapter

        receiver = c2c.Receiver.from_pretrained("smollm2-135m")
        save_adapter(new_adapter(receiver, 2), receiver, Path("runs/adapter/best"))
        linear = yaml.safe_load(Path("configs/multiple_choice.yaml").read_text()) | {"family": "linear"}
        linear |= {"fuser_options": {}, "store_dir": None}
        Path("linear.yaml").write_text(yaml.safe_dump(linear))
        Path("config.yaml").write_text(yaml.safe_dump(linear | {"family": "bottleneck", "output_dir": "runs/small"}))


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if any(block.language == "python" for block in blocks(page))])
def test_python_runs(page, workspace, monkeypatch):
    for name in ("listen", "serve"):  # a server that does not end
        monkeypatch.setattr(f"c2c.serving.http_server.{name}", lambda *args, **kwargs: None)
    prepare(page)
    modules = set(sys.modules)
    try:
        with servers(page) as replace:
            run_page(page, [*REAL_ONLY.get(page, []), *NO_NETWORK.get(page, [])], replace)
    finally:
        for name in set(sys.modules) - modules:
            if str(getattr(sys.modules[name], "__file__", "")).startswith(str(workspace)):
                del sys.modules[name]


@pytest.mark.real
@pytest.mark.parametrize("page", ["docs/concepts.md", "docs/footguns.md"])
def test_python_with_the_real_models(page, monkeypatch, tmp_path):
    use_real_models(monkeypatch, "smollm2-135m", "qwen2.5-coder-0.5b")
    monkeypatch.chdir(tmp_path)
    run_page(page)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if any(is_run(words) for words in commands(page))])
def test_commands_run(page, workspace):
    for block in blocks(page):
        if block.language == "yaml" and (match := re.match(r"# (tasks/\S+)\n", block.text)):
            Path(match[1]).parent.mkdir(exist_ok=True)
            Path(match[1]).write_text(block.text.replace("/path/to", str(workspace)))
    with servers(page) as replace:
        for line in shell_lines(page):
            if line[0] == "echo":
                assert line[-2] == ">"
                Path(line[-1]).write_text(" ".join(line[1:-2]) + "\n")
            words = [replace(word) for word in filled_in(arguments(line))]
            if not words or not is_run(words):
                continue
            if words[0] == "convert" and Path(words[2]).exists():
                words[2] = f"converted/{len(list(Path().glob('converted/*')))}"  # FUSER is another one as well
            result = runner.invoke(app, words)
            assert result.exit_code == 0, f"c2c {' '.join(words)}: {result.output[-2000:]} {result.exception!r}"


@pytest.mark.slow
def test_the_command_that_training_ends_with_runs(workspace):
    trained = runner.invoke(app, ["train", "configs/start.yaml"])
    assert trained.exit_code == 0, trained.output[-2000:]
    advice = " ".join(trained.output.partition("Try it: ")[2].split())
    words = arguments(lines(advice)[0])
    assert "--context" in words
    result = runner.invoke(app, [*words, "--mode", "c2c", "--max-new-tokens", "2"])
    assert result.exit_code == 0, f"{advice}: {result.output[-2000:]} {result.exception!r}"


CURL = argparse.ArgumentParser()
CURL.add_argument("address")
CURL.add_argument("-H", "--header")
CURL.add_argument("-X", "--request")
CURL.add_argument("-d", "--data")


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if any(words[0] == "curl" for words in shell_lines(page))])
def test_requests_are_answered(page, workspace):
    """Two servers stand for the one of the page: of shared and of private context."""
    import httpx

    handoff = ""
    with (
        server("serve", "zoo/NAME", "--name", "pair", ready="/health") as shared,
        server("serve", "runs/private/best", "--name", "NAME", ready="/health") as private,
    ):
        for words in (line for line in shell_lines(page) if line[0] == "curl"):
            call = CURL.parse_args([word.replace("handoff-...", handoff) for word in words[1:]])
            url = private if "NAME" in (call.data or "") or "handoffs" in call.address else shared
            method = call.request or ("POST" if call.data else "GET")
            address = re.sub(r"http://[\w.:]+", url, call.address)
            answer = httpx.request(method, address, json=call.data and json.loads(call.data), timeout=60)
            assert answer.status_code < 300, f"{words}: {answer.text}"
            if method == "POST" and address.endswith("handoffs"):
                handoff = answer.json()["id"]
