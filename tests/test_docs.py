"""Every block and command of the documentation: Python runs, commands are parsed by the real command line and run.

What does not run stands in a table with the reason; an entry that fits nothing any more is an error too.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from c2c import C2CModel
from c2c.cli import app
from c2c.language_model import Sharer
from docs_rig import COMMAND, PAGES, ROOT, Block, Workspace, arguments, blocks, lines, problem, spans

REAL_CACHE = os.environ.get("C2C_CACHE")  # before the fixture that isolates tests
SHELL = ("", "bash", "sh", "console")
NOT_SHELL = {  # blocks without a language that are no commands, and what checks them
    "src/c2c/": "a tree of files: test_the_tree_names_what_is_there",
    "RemoteSharer(": "one Python expression, with a name for the reader to fill in: test_a_lone_expression",
    "command: c2c eval": "the generated record of a run that is over, whose fuser is not kept: its command is parsed",
}
PLACEHOLDERS = {"COMMAND": "gates", "S": "0", "N": "8", "CONFIG": "config.yaml"}

# commands that are parsed and not run, by what they begin with
NOT_RUN = {
    "c2c pull": "the models lie in the test's cache already: test_pull.py",
    "c2c doctor": "asks the package index: test_doctor.py",
    "c2c demo": "a server that does not end: test_demo.py",
    "c2c serve": "a server that does not end: test_serving_process.py; its requests run here",
    "c2c share": "a server that does not end: test_remote_server.py; its requests run here",
    "c2c lm-eval --fuser FUSER --tasks arc_easy": "fetches a task from the hub: test_lm_eval.py",
    "c2c lm-eval --fuser zoo/NAME --tasks arc_easy": "the same",
    "c2c train config.yaml": "several processes: test_training_processes.py",
}
# other programs, and what is checked of them
PROGRAMS = {
    "make": "the target exists",
    "pip": "the extra exists",
    "curl": "the request is sent to a server of tiny models",
    "python": "a script knows the options, a module or expression is left to the reader",
    "python3": "the same",
    "export": "of the reader's shell",
    ".": "of the reader's shell",
    "cd": "of the reader's shell",
    "echo": "writes a file, which is then there",
    "cat": "of the reader's shell",
    "jq": "not of this project",
    "docker": "needs Docker",
    "kill": "ends a server that was started before",
    "git": "not of this project",
}
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


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return Workspace(tmp_path_factory.mktemp("docs"))


@pytest.fixture
def workspace(made, tmp_path, monkeypatch):
    """The reader's folder, with the tiny models in the cache."""
    own = made.copy(tmp_path)
    monkeypatch.setenv("C2C_CACHE", str(own.cache))
    monkeypatch.chdir(own.home)
    monkeypatch.syspath_prepend(str(own.home))
    return own


def shell_blocks(page: str) -> list[Block]:
    return [b for b in blocks(page) if b.language in SHELL and not b.text.startswith(tuple(NOT_SHELL))]


def commands(page: str, records: bool = True) -> list[list[str]]:
    """The arguments of every ``c2c`` in the blocks of a page; with ``records`` also of those that are over."""
    found = []
    for block in blocks(page):
        text = block.text
        if records and text.startswith("command: "):
            text = text.partition("\n")[0]
        elif block not in shell_blocks(page):
            continue
        found += [words for line in lines(text) if (words := arguments(line)) is not None]
    return [[PLACEHOLDERS.get(word, word) for word in words] for words in found]


# -- what is written where ---------------------------------------------------------------------------------------------


def test_the_pages_are_there():
    assert len(PAGES) >= 20
    assert sum(len(commands(page)) for page in PAGES) >= 60
    assert sum(block.language == "python" for page in PAGES for block in blocks(page)) >= 30


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_of_a_kind_that_is_checked(page):
    known = {*SHELL, "python", "json", "toml", "yaml", "bibtex"}
    assert [str(block) for block in blocks(page) if block.language not in known] == []
    for block in blocks(page):
        if block.language == "json":
            json.loads(block.text)
        elif block.language == "toml":
            tomllib.loads(block.text)
        elif block.language == "yaml":
            assert isinstance(yaml.safe_load(block.text), dict | list)
        elif block.language == "python":
            compile(block.text, str(block), "exec")


@pytest.mark.parametrize("page", PAGES)
def test_commands_parse(page):
    wrong = [f"c2c {' '.join(words)}: {found}" for words in commands(page) if (found := problem(words))]
    for span in spans(page):
        words = arguments(lines(span)[0]) if span.startswith("c2c ") else None
        words = [PLACEHOLDERS.get(word, word) for word in words or []]
        if words and (found := problem(words, partly=True)):
            wrong.append(f"`{span}`: {found}")
    assert wrong == []


def test_a_wrong_command_is_found():
    assert "No such option: --fuzer" in problem(["run", "--fuzer", "x", "hello"])
    assert "no such command" in problem(["analyse"])
    assert "Missing argument" in problem(["inspect"])
    assert problem(["inspect"], partly=True) is None
    assert "'--mode'" in problem(["run", "--mode", "both", "hello"])
    assert problem(["run", "hello", "--fuser", "x"]) is None
    assert arguments(["HF_HOME=/x", "torchrun", "-m", "c2c", "train", "a.yaml"]) == ["train", "a.yaml"]
    assert lines("c2c run 'a # b' # it's\nx | c2c \\\n  run - > f") == [
        ["c2c", "run", "a # b"],
        ["x"],
        ["c2c", "run", "-", ">", "f"],
    ]


def test_commands_elsewhere_parse():
    """Examples in --help, comments of configurations, docstrings of examples, the Makefile."""
    texts = {"Makefile": re.sub(r"\$\(BIN\)/|^\t@?", "", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)}
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        texts[str(path)] = "\n".join(re.findall(r"^#   (c2c .*)", path.read_text(), re.MULTILINE))
    for path in sorted((ROOT / "examples").glob("*.py")):
        texts[str(path)] = ast.get_docstring(ast.parse(path.read_text()))
    waiting = [(name, command) for name, command in COMMAND.commands.items()]
    while waiting:
        name, command = waiting.pop()
        texts[f"{name} --help"] = command.epilog or ""
        waiting += getattr(command, "commands", {}).items()
    checked, wrong = 0, []
    for where, text in texts.items():
        for line in re.findall(r"^(?:[A-Z0-9_]+=\S+ )?(?:.*\| )?(c2c (?:.|\\\n)*)", text, re.MULTILINE):
            words = arguments(lines(line.replace("$(FUSER)", "FUSER").replace("...,", ""))[0])
            checked += 1
            if found := problem([PLACEHOLDERS.get(word, word) for word in words]):
                wrong.append(f"{where}: {line}: {found}")
            files = [ROOT / word for word in words if word.startswith("configs/")]
            wrong += [f"{where}: {line}: no {path.name}" for path in files if not path.exists()]
    assert wrong == []
    assert checked >= 40


@pytest.mark.parametrize("page", PAGES)
def test_files_that_commands_name_are_there(page):
    named = {word for words in commands(page) for word in words if word.startswith(("configs/", "zoo/smollm2"))}
    assert [word for word in named if not (ROOT / word).exists()] == []


def test_the_tree_names_what_is_there():
    tree = next(block.text for block in blocks("CONTRIBUTING.md") if block.text.startswith("src/c2c/"))
    folders: list[str] = []
    named: set[str] = set()
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        head = re.match(r"(?:[\w./]+(?:\.py|/)(?: +|$))+", line.strip())[0].strip()
        del folders[depth:]
        for name in head.split():
            assert (ROOT / "/".join(folders) / name).exists(), line
            named.add("/".join([*folders, name]).rstrip("/"))
        folders.append(head.rstrip("/"))
    modules = [p.relative_to(ROOT).as_posix() for p in (ROOT / "src/c2c").iterdir() if p.suffix == ".py" or p.is_dir()]
    missing = [name for name in modules if name not in named and "__" not in name]
    assert missing == []


def test_a_lone_expression():
    from c2c.remote import RemoteSharer

    text = next(b.text for page in PAGES for b in blocks(page) if b.text.startswith("RemoteSharer("))
    call = ast.parse(text.strip(), mode="eval").body
    known = RemoteSharer.__init__.__kwdefaults__
    assert {word.arg for word in call.keywords} <= set(known)


# -- links -------------------------------------------------------------------------------------------------------------

_HEADING = re.compile(r"^#{1,6} +(.+?)[ \t]*$", re.MULTILINE)
_LINK = re.compile(r"\]\(([^)\s]+)\)|<(?:img|a)\b[^>]*?\b(?:src|href)=\"([^\"]+)\"")


def prose(page: str) -> str:
    """A page without its blocks."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for block in blocks(page):
        text = text.replace(block.text, "", 1)
    return text


def anchors(page: str) -> set[str]:
    """What can be linked to: names of headings that a code host and the site agree on, and marks of their own."""
    found, seen = set(re.findall(r'<a id="([^"]+)"></a>', prose(page))), {}
    for heading in _HEADING.findall(prose(page)):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        host = re.sub(r"[^\w\s-]", "", words.lower()).strip().replace(" ", "-")
        site = re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", words.lower()).strip())
        if host == site and host not in seen:  # a second one of a name gets another number on each
            found.add(host)
        seen[host] = True
    return found


def links(page: str) -> list[str]:
    """Targets of the links and pictures of a page, those on other hosts left out."""
    text = re.sub(r"`[^`\n]*`", "", prose(page))
    found = [match[1] or match[2] for match in _LINK.finditer(text)]
    return [target for target in found if not re.match(r"(https?|mailto):", target)]


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


def test_wrong_links_would_be_found():
    assert sum(len(links(page)) for page in PAGES) >= 100
    assert sum("#" in target for page in PAGES for target in links(page)) >= 10
    assert "the-flow" in anchors("docs/concepts.md")
    assert "no-such-heading" not in anchors("docs/concepts.md")
    assert "images/demo-phone.png" in links("docs/demo.md")


# -- the site ----------------------------------------------------------------------------------------------------------

SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


def test_the_site_has_every_page():
    def pages(entry):
        if isinstance(entry, str):
            return [entry]
        return [page for part in (entry.values() if isinstance(entry, dict) else entry) for page in pages(part)]

    there = sorted(path.name for path in (ROOT / "docs").glob("*.md"))
    assert sorted(pages(SITE["nav"])) == there, "nav of mkdocs.yml, and docs/"
    index = {target.partition("#")[0] for target in links("docs/index.md")}
    assert [page for page in there if page not in index and page != "index.md"] == [], "table of docs/index.md"


def test_documented_modules_are_there():
    import importlib

    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    named = re.findall(r"^\| `(c2c[\w.]*)` \|", page, re.MULTILINE)
    assert len(named) >= 30
    for name in named:
        assert importlib.import_module(name).__doc__, name
    exported = re.search(r"^`from c2c import` gives (.+)\.$", page, re.MULTILINE)[1]
    import c2c

    assert sorted(re.findall(r"`(\w+)`", exported)) == sorted(c2c.__all__)


def test_the_site_builds_without_warnings(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings_handlers.python")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    flow = (tmp_path / "site" / "concepts.html").read_text(encoding="utf-8")
    assert 'src="flow.svg"' in flow
    assert (tmp_path / "site" / "flow.svg").exists()
    assert "from_pretrained" in (tmp_path / "site" / "api" / "c2c.model.html").read_text(encoding="utf-8")


# -- other programs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_other_programs(page):
    makefile = (ROOT / "Makefile").read_text()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for block in shell_blocks(page):
        for words in lines(block.text):
            if arguments(words) is not None:
                continue
            program = words[0]
            assert program in PROGRAMS, f"{block}: {' '.join(words)}: say in PROGRAMS what is checked of it"
            if program == "make":
                assert re.search(rf"^{re.escape(words[1])}:", makefile, re.MULTILINE), f"{block}: {words}"
            elif program == "pip":
                named = [extra for word in words for extra in re.findall(r"\[([\w-]+)\]", word)]
                assert set(named) <= set(extras), f"{block}: {words}"
            elif program.startswith("python") and words[1].endswith(".py"):
                script = (ROOT / words[1]).read_text()
                options = [word for word in words[2:] if word.startswith("--")]
                assert [option for option in options if f'"{option}"' not in script] == [], f"{block}"


def test_programs_are_used():
    used = {words[0] for page in PAGES for block in shell_blocks(page) for words in lines(block.text)}
    spare = {"cat", "cd", "docker", "git", "jq", "kill", "python3", "."}  # may come and go
    assert set(PROGRAMS) - used - spare == set()


# -- Python ------------------------------------------------------------------------------------------------------------

PYTHON_PAGES = [page for page in PAGES if any(block.language == "python" for block in blocks(page))]


def test_what_is_left_out_is_still_there():
    for table in (REAL_ONLY, NO_NETWORK):
        for page, statements in table.items():
            text = "".join(block.text for block in blocks(page))
            assert [one for one in statements if one not in text] == []


def run_block(block: Block, names: dict, leave_out=(), replace=()) -> None:
    """Run one block, or write the file that it is; where it announces an error, that must come."""
    if match := re.match(r"# file: (\S+)\n", block.text):
        Path(match[1]).write_text(block.text, encoding="utf-8")
        return  # a later block imports it
    text = block.text
    for old, new in replace:
        text = text.replace(old, new)
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


def run_page(page: str, leave_out=(), replace=()) -> None:
    names: dict = {"__name__": "__main__"}
    for block in blocks(page):
        if block.language == "toml":
            announce(block.text)
        elif block.language == "python":
            run_block(block, names, leave_out, replace)


def announce(pyproject: str) -> None:
    """Install the entry points of a package that lies in this folder."""
    folder = Path("somebody-0.dist-info")
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: somebody\nVersion: 0\n")
    points = tomllib.loads(pyproject)["project"]["entry-points"]
    text = "".join(
        f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in found.items()) for group, found in points.items()
    )
    (folder / "entry_points.txt").write_text(text)


@contextlib.contextmanager
def servers(page: str, workspace):
    """What the page takes for granted at its addresses; yields replacements."""
    cache = workspace.cache / "models"
    if page == "docs/remote.md":
        from remote_rig import serving

        large, small = (Sharer.from_pretrained(str(cache / f"qwen2.5-coder-{size}")) for size in ("1.5b", "0.5b"))
        with serving(large) as first, serving(small) as second:
            yield [("http://127.0.0.1:8650", first.url), ("http://127.0.0.1:8651", second.url)]
    elif page == "docs/serving.md":
        with serve("zoo/NAME", "pair") as url:
            yield [("http://127.0.0.1:8000", url)]
    else:
        yield []


@contextlib.contextmanager
def serve(fuser: str, name: str):
    """A server like ``c2c serve FUSER --name NAME``."""
    from threading import Thread

    from c2c.serving.app import create_app
    from c2c.serving.huggingface import HuggingFaceEngine
    from c2c.serving.server import Server, listen
    from c2c.serving.settings import Settings
    from remote_rig import until

    model = C2CModel.from_pretrained(fuser)
    sock = listen("127.0.0.1", 0)
    server = Server(create_app(HuggingFaceEngine(model), Settings(name)))
    thread = Thread(target=server.run, args=([sock],), daemon=True)
    thread.start()
    try:
        until(lambda: server.started)
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


@pytest.mark.parametrize("page", PYTHON_PAGES)
def test_python_runs(page, workspace, monkeypatch, capsys):
    import uvicorn

    started = []
    monkeypatch.setattr(uvicorn, "run", lambda application, **options: started.append((application, options)))
    prepare(page, workspace)
    leave_out = [*REAL_ONLY.get(page, []), *NO_NETWORK.get(page, [])]
    modules = set(sys.modules)
    try:
        with servers(page, workspace) as replace:
            run_page(page, leave_out, replace)
    finally:
        for name in set(sys.modules) - modules - {n for n in sys.modules if "." in n}:
            if getattr(sys.modules[name], "__file__", None) and str(workspace.home) in sys.modules[name].__file__:
                del sys.modules[name]
    assert bool(started) == (page == "docs/serving.md")


def prepare(page: str, workspace) -> None:
    """What a page takes for granted, which another page has made."""
    if page == "docs/training.md":
        from c2c.language_model import Receiver
        from c2c.systems.lora import new_adapter, save_adapter

        receiver = Receiver.from_pretrained("smollm2-135m")
        save_adapter(new_adapter(receiver, 2), receiver, Path("runs/adapter/best"))
        linear = yaml.safe_load(Path("configs/multiple_choice.yaml").read_text()) | {"family": "linear"}
        linear |= {"fuser_options": {}, "store_dir": None}
        Path("linear.yaml").write_text(yaml.safe_dump(linear))
        linear |= {"family": "bottleneck", "output_dir": "runs/small"}
        Path("config.yaml").write_text(yaml.safe_dump(linear))


@pytest.mark.real
@pytest.mark.parametrize("page", [page for page in ("docs/concepts.md", "docs/footguns.md") if page in PYTHON_PAGES])
def test_python_with_the_real_models(page, made, monkeypatch, tmp_path):
    from test_real import need

    if REAL_CACHE is None:
        monkeypatch.delenv("C2C_CACHE", raising=False)
    else:
        monkeypatch.setenv("C2C_CACHE", REAL_CACHE)
    need("smollm2-135m", "qwen2.5-coder-0.5b")
    monkeypatch.chdir(tmp_path)
    run_page(page)


# -- commands ----------------------------------------------------------------------------------------------------------


def not_run(words: list[str]) -> str | None:
    """Why a command is only parsed."""
    text = " ".join(["c2c", *words])
    return next((why for start, why in NOT_RUN.items() if text.startswith(start)), None)


def test_what_is_not_run_is_still_there():
    texts = [" ".join(["c2c", *words]) for page in PAGES for words in commands(page)]
    assert [start for start in NOT_RUN if not any(text.startswith(start) for text in texts)] == []


RUN_PAGES = [page for page in PAGES if any(not_run(words) is None for words in commands(page, records=False))]


@pytest.mark.parametrize("page", RUN_PAGES)
def test_commands_run(page, workspace):
    for block in blocks(page):
        if block.language == "yaml" and (match := re.match(r"# (tasks/\S+)\n", block.text)):
            Path(match[1]).parent.mkdir(exist_ok=True)
            Path(match[1]).write_text(block.text.replace("/path/to", str(workspace.home)))
    with servers(page, workspace) as replace:
        for block in shell_blocks(page):
            for line in lines(block.text):
                words = arguments(line)
                if line[0] == "echo":
                    assert line[-2] == ">"
                    Path(line[-1]).write_text(" ".join(line[1:-2]) + "\n")
                if words is None or not_run(words) is not None:
                    continue
                words = [PLACEHOLDERS.get(word, word) for word in words]
                for old, new in replace:
                    words = [word.replace(old, new) for word in words]
                if words[0] == "convert" and Path(words[2]).exists():
                    words[2] = f"converted/{len(list(Path().glob('converted/*')))}"  # FUSER is another one as well
                result = runner.invoke(app, words)
                assert result.exit_code == 0, f"c2c {' '.join(words)}: {result.output[-2000:]} {result.exception!r}"


def test_the_command_that_training_ends_with_runs(workspace):
    trained = runner.invoke(app, ["train", "configs/start.yaml"])
    assert trained.exit_code == 0, trained.output[-2000:]
    advice = " ".join(trained.output.partition("Try it: ")[2].split())
    words = arguments(lines(advice)[0])
    assert "--context" in words
    result = runner.invoke(app, [*words, "--mode", "c2c", "--max-new-tokens", "2"])
    assert result.exit_code == 0, f"{advice}: {result.output[-2000:]} {result.exception!r}"


# -- requests ----------------------------------------------------------------------------------------------------------


def request(words: list[str]) -> tuple[str, str, dict | None]:
    """Method, address and body of a curl line."""
    rest, method, body, address = list(words[1:]), None, None, None
    while rest:
        word = rest.pop(0)
        if word in ("-H", "--header"):
            rest.pop(0)
        elif word in ("-X", "--request"):
            method = rest.pop(0)
        elif word in ("-d", "--data"):
            body = json.loads(rest.pop(0))
        else:
            assert not word.startswith("-"), f"curl {word}: not known to this test"
            assert address is None, f"curl with two addresses: {words}"
            address = word
    return method or ("GET" if body is None else "POST"), address, body


CURL_PAGES = [page for page in PAGES if any(w[0] == "curl" for b in shell_blocks(page) for w in lines(b.text))]


@pytest.mark.parametrize("page", CURL_PAGES)
def test_requests_are_answered(page, workspace):
    import httpx

    asked = 0
    with serve("zoo/NAME", "pair") as shared, serve("runs/private/best", "NAME") as private:
        handoff = None
        for block in shell_blocks(page):
            for words in lines(block.text):
                if words[0] != "curl":
                    continue
                method, address, body = request(words)
                url = private if "NAME" in json.dumps(body) or "handoffs" in address else shared
                address = re.sub(r"http://[\w.:]+", url, address).replace("handoff-...", str(handoff))
                sent = None if body is None else json.loads(json.dumps(body).replace("handoff-...", str(handoff)))
                answer = httpx.request(method, address, json=sent, timeout=60)
                assert answer.status_code < 300, f"{block}: {answer.text}"
                asked += 1
                if "handoffs" in address and method == "POST":
                    handoff = answer.json()["id"]
    assert asked >= 1


# -- formats -----------------------------------------------------------------------------------------------------------


def test_the_documented_config_is_one(tmp_path):
    from c2c.fusers.bottleneck import BottleneckConfig, BottleneckFuser

    first = next(block for block in blocks("docs/formats.md") if block.language == "json")
    (tmp_path / "config.json").write_text(first.text)
    config = BottleneckConfig.from_pretrained(tmp_path)
    fuser = BottleneckFuser(config)
    assert len(config.fused_layers) == len(fuser.gates()) == 3
    fuser.save_pretrained(tmp_path / "written")
    written = json.loads((tmp_path / "written" / "config.json").read_text())
    assert set(written) == set(json.loads(first.text))


def test_the_documented_training_keys_are_known():
    from dataclasses import fields

    from c2c.training.config import TrainConfig

    block = next(b for b in blocks("docs/training.md") if b.language == "yaml")
    assert set(yaml.safe_load(block.text)) <= {field.name for field in fields(TrainConfig)}
