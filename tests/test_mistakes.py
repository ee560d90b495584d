"""What a newcomer is likely to get wrong, through the real entry point, on tiny models.

Each time: one message that says what was given, what was expected and what to do; an exit code that is not 0; nothing
on stdout; no traceback; and no file written.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shlex
import shutil
import socket
import sys
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer

from c2c import C2CError, C2CModel, utils
from c2c.cli import main
from c2c.data.config import DataSource
from c2c.evaluation import EvalConfig
from c2c.utils import install_command
from tiny import build, pair_folders, tokenizer

FIXTURES = Path(__file__).parent / "fixtures"


QUESTIONS = [{"question": f"What is {i}?", "choices": ["a", "b", "c", "d"], "answer": i % 4} for i in range(8)]
DATA = {
    "questions": QUESTIONS,
    "broken": [*QUESTIONS[:3], '{"question": oops', *QUESTIONS],
    "no_choices": [*QUESTIONS[:2], "", {"question": "Why?", "answer": 0}, *QUESTIONS],
    "no_such_answer": [*QUESTIONS[:2], {"question": "Why?", "choices": ["a", "b"], "answer": 2}],
    "one": QUESTIONS[:1],
}
CONFIG = {
    "receiver": "receiver",
    "sharer": "sharer",
    "train": [{"path": "questions.jsonl"}],
    "dev": [{"path": "questions.jsonl"}],
    "output_dir": "run",
    "batch_size": 4,
    "fuser_options": {"rank": 8},
    "max_steps": 1,
    "save_steps": 1,
    "calibration": 4,
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Models, fusers, data and a config, some of them wrong."""
    folder = tmp_path_factory.mktemp("workspace")
    for name in ("receiver", "sharer", "empty"):
        (folder / name).mkdir()
    names = pair_folders({"chatml": folder / "receiver", "llama3": folder / "sharer"}.get)
    for name, family in (("fuser", "bottleneck"), ("memory", "memory")):
        model = C2CModel.from_models(*names, fuser=family, fuser_options={"rank": 8})
        model.fusers[0].config.training = {"config": {}}
        model.save_pretrained(folder / name)
    model.sharers[0].read("The fox sleeps.").save(folder / "handoff.safetensors")
    build("llama", 9).save_pretrained(folder / "other")  # of the receiver's shape, with other weights
    tokenizer("chatml").save_pretrained(folder / "other")
    short = build("qwen2")
    short.config.max_position_embeddings = 24
    short.save_pretrained(folder / "short")
    AutoTokenizer.from_pretrained(names[1]).save_pretrained(folder / "short")
    for name, rows in DATA.items():
        lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
        (folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    (folder / "good.yaml").write_text(yaml.safe_dump(CONFIG))
    (folder / "file").write_text("not a folder")
    (folder / "latin.txt").write_bytes("der Fuchs schläft".encode("latin-1"))
    (folder / "blank.txt").write_text("\n")
    return folder


@pytest.fixture
def c2c(workspace, monkeypatch, capsys):
    """The command, in this process, in the workspace: exit code, stdout, and stderr without boxes and line ends."""
    monkeypatch.chdir(workspace)
    for name in ("TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS"):  # main sets them
        monkeypatch.setenv(name, os.environ.get(name, "error" if name.startswith("T") else "1"))
    monkeypatch.delenv("C2C_DEBUG", raising=False)
    monkeypatch.setenv("COLUMNS", "200")

    def start(line: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["c2c", *shlex.split(line)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return ended.value.code or 0, captured.out, " ".join(re.sub("[│╭╮╰╯─]", " ", captured.err).split())

    return start


def state(folder):
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def refused(c2c, workspace):
    """A command must be refused with a message that has all these parts, and leave everything as it was."""

    def check(line, *parts, code=1):
        before = state(workspace)
        ended, out, err = c2c(line)
        assert ended == code, err
        assert out == ""
        assert "Traceback" not in err
        for part in parts:
            assert part in err, err
        assert state(workspace) == before

    return check


# -- mistakes --------------------------------------------------------------------------------------------------------

EVAL = "eval --fuser fuser --data questions.jsonl"
MISTAKES = {
    "swapped models": ("run hi --fuser fuser --receiver sharer --sharer receiver", "swap receiver and sharer"),
    "a fuser for another model": ("run hi --fuser fuser --receiver other", "receiver weights", "made for", "train a"),
    "an empty folder as a fuser": ("run hi --fuser empty", "empty holds no fuser", "Expected a fuser's folder"),
    "a model as a fuser": ("run hi --fuser receiver", "receiver is not a fuser", "'llama'", "--receiver or --sharer"),
    "a handoff as a fuser": ("run hi --fuser handoff.safetensors", "file of a handoff", "Expected a fuser's folder"),
    "weights as a fuser": ("inspect fuser/model.safetensors", "is a file, perhaps of the fuser in fuser"),
    "a misspelt fuser": ("run hi --fuser ./fusr", "no such folder: ./fusr", "Did you mean 'fuser'?"),
    "an empty folder as a model": ("run hi --receiver empty --sharer sharer", "empty holds no model", "config.json"),
    "a fuser as a model": ("run hi --receiver fuser --sharer sharer", "fuser is a fuser, expected a model", "--fuser"),
    "a file as a model": ("run hi --receiver file --sharer sharer", "file is a file", "Expected a folder"),
    "a misspelt model": ("run hi --receiver smolm2-135m --sharer sharer", "Did you mean 'smollm2-135m'?"),
    "a model that was not pulled": ("run hi", "c2c pull smollm2-135m"),
    "an empty prompt": ("run '' --fuser fuser", "the prompt is empty; expected some text"),
    "a blank prompt": ("run '  ' --fuser fuser", "the prompt is empty; expected some text"),
    "a context that is missing": ("run hi --fuser memory --context gone.txt", "gone.txt", "No such file", "Expected"),
    "a context that is a folder": ("run hi --fuser memory --context empty", "--context empty", "Is a directory"),
    "a context that is no text": ("run hi --fuser memory --context latin.txt", "Expected a text file"),
    "a context that is no handoff": ("run hi --fuser memory --context other/model.safetensors", "is no handoff"),
    "a library that is not there": ("run hi --fuser memory --context fox --library gone", "no document 'fox'", "add"),
    "a library without a name": ("run hi --fuser memory --library gone", "name its documents with --context"),
    "a list of no library": ("library list gone", "no library at gone", "library add"),
    "a document that is not there": ("library remove gone fox", "no document 'fox'"),
    "a context that is empty": ("run hi --fuser memory --context blank.txt", "--context blank.txt is empty"),
    "no context for a memory fuser": ("run hi --fuser memory", "give a text with --context FILE"),
    "a context for another fuser": ("run hi --fuser fuser --context file", "--context file is for a memory fuser"),
    "a device that is not there": ("run hi --fuser fuser --device cuda:99", "'cuda:99' is not on this machine", "cpu"),
    "no device at all": ("run hi --fuser fuser --device gpux", "no such device: 'gpux'", "Here are: cpu"),
    "a misspelt type": ("run hi --fuser fuser --dtype float31", "'float31'", "Did you mean 'float32'?", "bfloat16"),
    "a prompt over the sharer's window": (
        f"run '{'word ' * 20}' --receiver receiver --sharer short --mode c2c --json",
        "tokens for the sharer short",
        "made for 24",
        "Shorten the prompt",
    ),
    "a fuser in place of a checkpoint": ("convert fuser out", "no published checkpoint", "expected projector_"),
    "a picture of another kind": ("inspect fuser --plot x.gif", "x.gif", "expected", ".png or .html"),
    "no such config": ("train gone.yaml", "no such config: gone.yaml", "Expected a YAML file", "configs/"),
    "a folder as a config": ("train empty", "empty is a folder, no config", "Expected a YAML file"),
    "a binary file as a config": ("train handoff.safetensors", "is not YAML", "Expected a YAML file"),
    "data as a config": ("train questions.jsonl", "is not YAML", "Expected a YAML file"),
    "data elsewhere": ("train good.yaml --data-dir empty", "no such data file: empty/questions.jsonl", "data_dir"),
    "an output that is a file": ("train good.yaml --output-dir file", "output_dir is file", "is a file; expected a"),
    "an output below a file": ("train good.yaml --output-dir file/run", "output_dir is file/run", "is a file"),
    "nowhere to keep prefills": ("prefill good.yaml", "--store-dir FOLDER"),
    "no fuser": ("eval --data questions.jsonl", "missing keys ['fuser']", "--fuser"),
    "no data": ("eval --fuser fuser", "no data to evaluate on", "give at least one"),
    "data that is missing": ("eval --fuser fuser --data gone.jsonl", "no such data file: gone.jsonl", "data_dir"),
    "a misspelt task": ("eval --fuser fuser --data openbokqa", "openbokqa", "Did you mean 'openbookqa'?", "Known:"),
    "a line that is no JSON": ("eval --fuser fuser --data broken.jsonl", "broken.jsonl, line 4: not JSON", "Expected"),
    "data that is no text": ("eval --fuser fuser --data handoff.safetensors", "no text in UTF-8", "Expected one JSON"),
    "no choices": ("eval --fuser fuser --data no_choices.jsonl", "line 4", "'choices' is None; expected a list"),
    "no such answer": ("eval --fuser fuser --data no_such_answer.jsonl", "line 3", "'answer' is 2", "0 to 1"),
    "one question": ("eval --fuser fuser --data one.jsonl", "1 items are left", "at least 2", "Give more questions"),
    "a misspelt system": (f"{EVAL} --systems receiver,mached", "['mached']", "Did you mean 'matched'?", "Known:"),
    "a misspelt form": (f"{EVAL} --form leter", "unknown form 'leter'", "Did you mean 'letter'?"),
    "a misspelt kind": (f"{EVAL} --kind multiplechoice", "Did you mean 'multiple_choice'?", "Known:"),
    "no questions asked for": (f"{EVAL} --limit 0", "limit is 0; give at least 2 items"),
    "one at a time": (f"{EVAL} --batch-size 1", "batch_size is 1; give at least 2"),
    "results into a file": (f"{EVAL} --output-dir file", "output_dir is file", "is a file; expected a folder"),
    "a system of private context": (f"{EVAL} --systems receiver,reader", "shared context", "no reader"),
    "an empty folder to report": ("report empty", "empty holds no result.json", "c2c eval --output-dir"),
    "nothing to report": ("report gone", "gone does not exist", "Expected the result.json"),
    "data to report": ("report questions.jsonl", "questions.jsonl is not JSON", "Expected the result.json"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(refused, mistake):
    refused(*MISTAKES[mistake])


HARNESS = "lm-eval --fuser fuser --tasks toy"
ANALYSIS = "analyze gates --fuser fuser --data questions.jsonl"
BEFORE_LOADING = {
    "an endless store": ("serve fuser --handoff-mb inf", "handoff_mb is inf", "expected a number"),
    "an endless request": ("serve fuser --timeout 1e308", "timeout is 1e+308", "expected a number"),
    "a huge batch": (f"serve fuser --max-batch {10**22}", "max_batch is 1000", "expected a whole number"),
    "a misspelt system": ("serve fuser --system mached", "unknown system 'mached'", "Did you mean 'matched'?"),
    "a message of no tokens": ("serve fuser --system summary_0", "unknown system 'summary_0'"),
    "a type of the sharer's": ("serve fuser --sharer-dtype float31", "Did you mean 'float32'?"),
    "a sharer that is a fuser": ("serve fuser --sharer fuser", "fuser is a fuser, expected a model"),
    "a device without weights": ("serve fuser --device meta", "'meta'", "holds no weights"),
    "a certificate alone": ("serve fuser --tls-cert file", "--tls-cert and --tls-key"),
    "no certificate": ("serve fuser --tls-cert file --tls-key file", "the TLS files file, file can't be used"),
    "a key that is no text": ("serve fuser --api-key \udcff", "an API key", "UTF-8"),
    "a name that is no text": ("serve fuser --name \udcff", "--name", "UTF-8"),
    "no address": (f"serve fuser --insecure --host {'é' * 70}", "is no address"),
    "layers from the end": ("share sharer --layers 3-0", "--layers '3-0' can't be read"),
    "too many layers": ("share sharer --layers 0-99999999", "can't be read", "such as 0-11,20"),
    "another fuser": ("share sharer --fuser empty", "empty holds no fuser"),
    "no weights to share": ("share sharer --device meta", "holds no weights"),
    "nothing to ask": (f"{HARNESS} --limit 0", "limit is 0"),
    "a part of a document": (f"{HARNESS} --limit 1.5", "limit is 1.5", "a whole number"),
    "settings without values": (f"{HARNESS} --gen-kwargs x", "gen_kwargs is 'x'", "max_gen_toks=64"),
    "a folder for the output": (f"{HARNESS} --output empty", "output is 'empty', a folder"),
    "an endless prefill store": (f"{ANALYSIS} --store-budget-gb inf", "store_budget_gb is inf"),
    "a prefill store in a file": (f"{ANALYSIS} --store-dir file", "store_dir is file", "is a file"),
    "a fuser of nothing": ("convert empty out --receiver receiver", "empty", "projector_"),
}


@pytest.mark.parametrize("mistake", BEFORE_LOADING)
def test_mistakes_are_found_before_models_are_loaded(refused, mistake, monkeypatch):
    monkeypatch.setattr("c2c.loading.load_causal", lambda *_: pytest.fail("a model was loaded"))
    refused(*BEFORE_LOADING[mistake])


USAGE = {
    "what no prompt is there for": ("inspect fuser --receiver receiver", "--receiver", "--prompt"),
    "a seed of no generator": ("analyze gates --fuser fuser --data questions.jsonl --seed -1", "--seed"),
    "two pages in one file": ("report empty --html a --markdown a", "overwrite"),
}


@pytest.mark.parametrize("mistake", USAGE)
def test_options_that_do_not_go_together(refused, mistake):
    refused(*USAGE[mistake], code=2)


def test_convert_refuses_models_that_the_fuser_does_not_fit(refused):
    refused("convert fuser out --dtype bfloat16 --receiver sharer", "--receiver sharer", "was made for")


@pytest.mark.parametrize("value", [[], "x", 3])
def test_a_fuser_whose_config_is_damaged(refused, workspace, value):
    folder = workspace / "damaged"
    if not folder.exists():
        shutil.copytree(workspace / "fuser", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": value}))
    refused("inspect damaged", "damaged holds no whole fuser")


CONFIG_MISTAKES = {
    "a misspelt key": ({"learning_rat": 1}, "['learning_rat']", "Did you mean 'learning_rate'?", "Known: receiver"),
    "a misspelt key inside": (
        {"train": [{"pth": "questions.jsonl"}]},
        "train: unknown keys ['pth']",
        "Did you mean 'path'?",
    ),
    "a misspelt family": ({"family": "botleneck"}, "'botleneck'", "Did you mean 'bottleneck'?", "Known:"),
    "a misspelt option": ({"fuser_options": {"rnk": 8}}, "unknown rnk", "Did you mean 'rank'?"),
    "a misspelt schedule": ({"schedule": "cosin"}, "cosin is not a valid SchedulerType", "'cosine'"),
    "one source in place of a list": ({"train": {"path": "questions.jsonl"}}, "train is {", "expected a list"),
    "a path in place of sources": ({"dev": "questions.jsonl"}, "dev is 'questions.jsonl'", "expected a list"),
    "a text in place of a list": ({"exclude": "questions.jsonl"}, "exclude is", "expected a list", "[questions.jsonl]"),
    "a layer map as a text": ({"layer_map": "0,1"}, "unknown layer map '0,1'", "a list of sharer layers"),
    "numbers in a list of texts": ({"exclude": [1]}, "exclude is [1]", "each is a text"),
    "no number": ({"learning_rate": float("nan")}, "learning_rate is nan", "expected a number"),
    "an endless store": ({"store_budget_gb": float("inf")}, "store_budget_gb is inf", "expected a number"),
    "a negative number": ({"batch_size": -1}, "batch_size is -1; expected 1 or more"),
    "a negative limit": ({"train": [{"path": "questions.jsonl", "limit": -1}]}, "limit is -1; expected 1 or more"),
    "a huge number": ({"seed": 10**30}, "seed is 1000", "expected a whole number"),
    "a key that is no text": ({1: 2}, "unknown keys [1]"),
    "an unknown reporter": ({"report_to": "paper"}, "paper is not supported", "tensorboard"),
    "an impossible rank": ({"fuser_options": {"rank": "x"}}, "fuser_options of bottleneck", "rank"),
    "a field that is no option": ({"fuser_options": {"receiver": {}}}, "unknown receiver", "Known: rank"),
    "a text for a number": ({"batch_size": "four"}, "batch_size is 'four'; expected a whole number"),
    "a number that YAML takes for text": ({"learning_rate": "2e-3"}, "'2e-3'; expected a number", "2.0e-3"),
}


@pytest.mark.parametrize("mistake", CONFIG_MISTAKES)
def test_configs(refused, workspace, mistake):
    change, *parts = CONFIG_MISTAKES[mistake]
    (workspace / "changed.yaml").write_text(yaml.safe_dump(CONFIG | change))
    refused("train changed.yaml", *parts)


@pytest.mark.parametrize("value", ["receiver", ["receiver", 1], 3])
def test_a_text_where_a_list_is_meant(value):
    with pytest.raises(C2CError, match=r"systems is .*expected a list"):
        EvalConfig("fuser", [DataSource("questions.jsonl")], systems=value)
    with pytest.raises(C2CError, match=r"data is .*expected a list"):
        EvalConfig("fuser", "questions.jsonl")


USAGE_MISTAKES = {
    "a misspelt command": ("rnu hi", "No such command 'rnu'", "run"),
    "a misspelt option": ("run hi --max-new-token 3", "--max-new-tokens"),
    "a misspelt scoring": (f"{EVAL} --mode genrate", "'genrate' is not one of", "generate"),
    "a misspelt mode": ("run hi --mode c2", "'c2' is not one of", "c2c"),
    "no tokens": ("run hi --max-new-tokens 0", "--max-new-tokens", "greater than or equal to 1"),
    "a misspelt model to pull": ("pull smolm2-135m", "Did you mean 'smollm2-135m'?", "qwen2.5-coder-0.5b"),
    "a duration without a unit": ("library add gone file --model receiver --expires 7", "--expires", "7d"),
    "one name for two files": ("library add gone file latin.txt --model receiver --name a", "one at a time"),
    "no limit for an analysis": (
        "analyze layers --fuser fuser --data questions.jsonl --limit 0",
        "--limit",
        "greater than or equal to 2",
    ),
}


@pytest.mark.parametrize("mistake", USAGE_MISTAKES)
def test_usage(refused, mistake):
    refused(*USAGE_MISTAKES[mistake], code=2)


def test_a_folder_that_is_not_writable(refused, workspace, monkeypatch):
    if os.geteuid() == 0:  # root may write everywhere
        allowed = os.access
        monkeypatch.setattr(
            utils.os, "access", lambda path, mode, **kw: Path(path) != workspace / "empty" and allowed(path, mode, **kw)
        )
    (workspace / "empty").chmod(0o500)
    try:
        for command in ("train good.yaml", EVAL):
            refused(f"{command} --output-dir empty/run", "output_dir is empty/run", "is not writable", "another folder")
    finally:
        (workspace / "empty").chmod(0o700)


def test_a_full_disk(refused):
    """Files may not grow beyond a few bytes: what is half written is gone, and the message names the place."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, hard))
    try:
        refused(f"convert {FIXTURES / 'pair_a' / 'checkpoint'} out", "out: ", "File too large", "write elsewhere")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_port_that_is_taken(refused):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for command in ("serve fuser", "demo --fuser fuser"):
            refused(f"{command} --port {port}", f"can't listen at 127.0.0.1:{port}", "in use", "--port")


@pytest.mark.parametrize(
    ("line", "package", "extra"),
    [
        ("serve fuser", "uvicorn", "serve"),
        ("share sharer", "fastapi", "remote"),
        ("demo --fuser fuser", "gradio", "demo"),
        ("lm-eval --fuser fuser --tasks arc_easy", "lm_eval", "lm-eval"),
        ("eval --fuser fuser --data openbookqa", "datasets", "datasets"),
        ("train good.yaml --family adapter", "peft", "adapter"),
        ("inspect fuser --plot x.png", "matplotlib", "analysis"),
    ],
)
def test_an_extra_that_is_not_installed(refused, monkeypatch, line, package, extra):
    # another test may have imported it, or what of ours is made of it
    for name in [name for name in sys.modules if name.startswith(f"{package}.") or name.endswith(f".{package}")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    refused(line, install_command(extra))


def test_going_on_with_another_config(c2c, refused, workspace, tmp_path):
    assert c2c(f"train good.yaml --output-dir {tmp_path}")[0] == 0
    kept = state(tmp_path)
    refused(
        f"train good.yaml --output-dir {tmp_path} --seed 1",
        f"{tmp_path} holds the run of another configuration: seed was 0, is 1",
        "--output-dir",
        "--no-resume",
    )
    assert state(tmp_path) == kept
    assert c2c(f"train good.yaml --output-dir {tmp_path} --max-steps 2")[0] == 0  # longer is no other run
    assert c2c(f"train good.yaml --output-dir {tmp_path} --seed 1 --no-resume")[0] == 0
